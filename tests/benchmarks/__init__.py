"""Measurements. Each question is a file that can be run alone; the first is asked by ``__main__``.

A file of this folder says in its docstring what it asks, and prints one readable table. A
comparison runs all its rows in one process, in alternating order, over several rounds, and names
settings, versions and seed beside the numbers.
"""
