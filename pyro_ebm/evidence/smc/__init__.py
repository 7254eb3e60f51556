"""Tempered sequential Monte Carlo, as a sampler and for the evidence.

``sampler`` is what a user calls, ``run`` the walk along the path, ``moves`` the kernel at one
temperature, ``particles`` weights, resampling and ancestry, ``findings`` what may be wrong, and
``checkpoint`` a run on disk.
"""
