"""Kernels that need no gradient.

``metropolis`` is the Metropolis-Hastings kernel, for the ``proposals`` of continuous sites, the
``integer_walk`` of whole numbers, and those of a user.
"""
