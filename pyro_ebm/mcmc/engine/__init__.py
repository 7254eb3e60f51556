"""How transitions run: as they are, or as a graph of tensor operations.

``engine`` chooses, keeps graphs and falls back; ``graph`` captures and compiles one; and
``graph_guards`` are the parameters and modules that must be the same for a graph to be used again.
"""
