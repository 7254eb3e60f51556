"""Kernels that follow the gradient of the log density.

``hmc`` follows Hamiltonian trajectories of a learned length. ``local`` is the base of kernels of
one gradient a transition: ``langevin`` takes a step of Langevin dynamics, ``barker`` chooses the
signs of a random walk.
"""
