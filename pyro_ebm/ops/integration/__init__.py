"""Integrals and sums of unnormalized densities.

Quadrature over one or two dimensions, enumeration of discrete states, and line integrals of
gradients.
"""
