"""The steps of Markov chains as formulas: Langevin, leapfrog, Metropolis, preconditioning."""
