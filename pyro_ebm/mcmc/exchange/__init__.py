"""The exchange algorithm, for posteriors in which a latent moves an unknown log Z.

``kernel`` is the Metropolis-Hastings kernel, ``potential`` the model without its log Z, ``checks``
which sites it is for. ``auxiliary`` draws what makes log Z cancel, ``terms`` are those of the log
ratio. ``watch`` warns of moves that fail, and ``inner_steps`` compares runs of different lengths of
the inner chains.
"""
