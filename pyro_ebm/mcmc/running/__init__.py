"""Runs of many transitions: :class:`~pyro_ebm.MCMC`, and the runners that it holds.

A runner returns draws: ``vectorized`` moves all chains at once (``chains``), on several ranks of a
process group too (``distributed``); ``sequential`` moves one chain after another, or one in each
worker process. ``options`` is what they are asked to do, ``progress`` what they show, ``storage``
where their draws are kept, and ``run_settings`` what two runs must have in common for one to go on
from the other.
"""
