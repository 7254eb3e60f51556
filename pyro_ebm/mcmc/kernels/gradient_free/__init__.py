"""Kernels that need no gradient."""
