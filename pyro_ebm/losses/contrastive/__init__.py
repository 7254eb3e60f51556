"""Contrastive divergence: its negatives, its closed form for RBMs, and layerwise training."""
