"""Kernels that follow the gradient of the log density.

``langevin`` takes one step of Langevin dynamics, ``barker`` chooses the signs of a random walk, and
``hmc`` follows Hamiltonian trajectories of a learned length.
"""
