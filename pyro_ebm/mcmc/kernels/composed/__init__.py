"""Kernels that are made of other kernels.

``composite`` holds kernels that take turns on different sites, ``tempering`` one kernel that moves
replicas at several temperatures, ``flow`` one that adds far moves by a flow which ``fitted_flow``
fits in the warmup.
"""
