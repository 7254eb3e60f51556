"""Latent sites: their supports and transforms, and where they start."""
