"""What you look at afterwards: draws in ArviZ, and log likelihoods point by point."""

from pyro_ebm.diagnostics.arviz import open_store, to_arviz

__all__ = ["open_store", "to_arviz"]
