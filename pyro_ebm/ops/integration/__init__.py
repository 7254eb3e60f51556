"""Integrals and sums: quadrature, enumeration, line integrals."""
