"""Conditions that a model must fulfil to be sampled, each in a file of its own.

It is one fixed density, the supports of its latents stay, no unknown log Z depends on a latent, and
states at which one of its distributions does not exist have no density. What breaks one of them is
refused before the first transition, with an error that names the site.
"""
