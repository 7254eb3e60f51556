"""Kernels that are made of other kernels.

``composite`` holds kernels that take turns on different sites, ``tempering`` one kernel that moves
replicas at several temperatures.
"""
