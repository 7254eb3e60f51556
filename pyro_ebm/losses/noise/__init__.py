"""Losses with noise that the guide samples: to tell the data from it, or to start chains at it.

One file for each loss; what they share, the noise of a site and the checks of it, is in ``noise``.
"""
