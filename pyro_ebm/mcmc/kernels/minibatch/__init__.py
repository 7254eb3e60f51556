"""Langevin and Hamiltonian dynamics on minibatches, without a Metropolis test.

``kernel`` is what both have in common, ``moments`` how their steps are learned, and
``control_variates`` how the noise of the subsamples is reduced.
"""
