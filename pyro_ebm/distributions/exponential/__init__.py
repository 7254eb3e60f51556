"""Exponential families: normalizers in closed form and by quadrature, and the table of families."""
