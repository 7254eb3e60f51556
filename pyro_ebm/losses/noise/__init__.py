"""Noise-contrastive estimation: losses that tell data from noise which the guide samples.

One file for each loss; what they share, the noise of a site and the checks of it, is in ``noise``.
"""
