"""The evidence of the data under a model: its marginal likelihood.

``model_path`` leads from the prior of a model, or a guide, to its joint density, which ``proper``
sees to be one; ``model_starts`` are the densities that it starts at.
"""
