"""The latent sites of a model.

Their shapes and supports, the transforms to unconstrained coordinates, their starting values, and
which of them are discrete.
"""
