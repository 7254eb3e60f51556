"""Where chains start: at draws of a guide, of Pathfinder, or of an earlier run.

Each is an ``init_strategy``, for the kernels of this package and for Pyro's.
"""
