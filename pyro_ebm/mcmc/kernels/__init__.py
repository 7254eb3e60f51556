"""Transition kernels, by what they need: a gradient, none, discrete sites, or other kernels."""
