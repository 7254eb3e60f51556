"""The latent sites of a model: supports, transforms to the reals, discrete values, and starts.

``site`` is how a kernel's position holds a latent; the other files find what is in it.
"""
