"""A Pyro model as a density of its latent sites.

Which sites there are and where they start, which tensors depend on which latents, how all chains
are evaluated at once, and checks that the model is one fixed density.
"""
