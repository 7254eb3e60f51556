"""Potentials U(z), minus a log density on flat unconstrained positions of many chains.

``base`` is what a kernel needs of one, ``function`` a potential of one chain as a user writes it,
``energy`` that of an energy alone, and ``model`` that of a Pyro model.
"""
