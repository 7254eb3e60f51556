"""Potentials U(z) on flat batches of chains: of a function, of an energy, of a Pyro model."""
