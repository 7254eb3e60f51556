"""Kernels of discrete sites."""
