"""Exponential families, whose log Z is a known function of the parameters.

The family of a distribution and its table of formulas, families of one's own, and quadrature in one
or two dimensions for those that have no formula.
"""
