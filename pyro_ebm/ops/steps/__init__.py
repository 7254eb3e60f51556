"""The steps of Markov chains as formulas.

``langevin`` and ``leapfrog`` are proposals, ``metropolis`` their acceptance, and ``precondition``
the product with a factor of the mass matrix. All are pure functions of batches of chains.
"""
