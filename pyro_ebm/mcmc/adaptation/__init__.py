"""What warmup learns, pooled over chains and ranks.

``warmup`` has the windows, and adapts the step size (by ``dual_averaging``) and the mass matrix
(``metric``); ``chees`` adapts the length of Hamiltonian trajectories.
"""
