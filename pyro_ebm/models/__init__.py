"""Pyro models, run and examined before they are sampled.

``runs`` holds a model with its arguments and runs it; ``provenance`` follows which latents tensors
come from; ``batched`` and ``over_chains`` evaluate a function of one chain for many at once;
``masks`` and ``transforms`` prepare the latents; ``curvature`` and ``adjusted_model`` correct
composite likelihoods. In ``sites`` are the latents' supports and starts, in ``checks`` the
conditions that a model must fulfil. No kernel is imported here.
"""
