"""Kernels of discrete sites.

``gibbs`` draws variables given the others, ``discrete_gradient`` proposes moves by a gradient, and
``proposals`` are those of Metropolis-Hastings. All see a position as ``variables``.
"""
