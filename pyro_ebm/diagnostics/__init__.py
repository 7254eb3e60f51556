"""What you look at after a run.

``results`` holds its draws and statistics, with their summaries; ``arviz`` converts them to ArviZ;
``replay`` runs the model again at the draws, for log likelihoods point by point.
"""

from pyro_ebm.diagnostics.arviz import open_store, to_arviz
from pyro_ebm.diagnostics.results import Results

__all__ = ["Results", "open_store", "to_arviz"]
