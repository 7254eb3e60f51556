"""Annealed importance sampling.

``ais`` makes the estimate: ``choices`` picks path, kernel and temperatures, ``pilot`` tunes the
kernel at each temperature of a ``schedule``, and ``annealer`` runs the chains. The paths are in
``path``, ``rbm_path`` (machines with hidden units) and ``function_path`` (functions of beta).
"""
