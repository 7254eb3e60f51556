"""Checks of a model before it is sampled.

No latent moves an unknown log Z, the density is a function of the latents, and supports and
arguments are valid.
"""
