"""Integrals and sums over all states.

Quadrature in one and two dimensions, sums over finite sets, and integrals along a line.
"""
