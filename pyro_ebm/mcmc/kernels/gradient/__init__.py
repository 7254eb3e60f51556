"""Kernels that follow the gradient of the log density."""
