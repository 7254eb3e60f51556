"""Composite likelihoods: products of conditional densities, which need no log Z.

``conditionals`` has the densities of some variables given all others, and ``pseudolikelihood`` the
distribution that multiplies them.
"""
