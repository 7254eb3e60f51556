"""Measurements. Each question is a file that can be run alone; ``__main__`` runs them all.

A question (:mod:`tests.benchmarks.harness`) measures rows, contestants taking turns over several
rounds, and shows them as a readable table, as JSON with settings, versions and seeds, as pictures,
and as its own section of a page. A new one is a file that ends in a ``QUESTION`` and a name in
``__main__.NAMES``.

``densities`` is another kind: how well each loss fits, not how fast.
"""
