"""Steps of samplers on flat positions ``(chains, dim)``.

Langevin and leapfrog steps, the Metropolis test, and preconditioning by a mass matrix.
"""
