"""What warmup learns, pooled over chains and ranks.

``warmup`` adapts the step size (by ``dual_averaging``) and, at the ends of ``windows``, the mass
matrix: ``metric`` collects what ``fisher`` makes it of, from the chains that are not out
(``population``). ``chees`` adapts the length of Hamiltonian trajectories.
"""
