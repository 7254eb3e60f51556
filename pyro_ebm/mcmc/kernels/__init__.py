"""Transition kernels: one transition of a batch of chains, on any potential.

``base`` is what every kernel has, ``pyro_contract`` adds a Pyro model and what Pyro's MCMC calls,
``transition`` the draws, the engine and the adaptation of a kernel that is one transition, and
``accept`` the acceptance of proposals. The kernels themselves follow a ``gradient``, need none
(``gradient_free``), move ``discrete`` sites, or are ``composed`` of others.
"""
