"""What you look at after a run.

``results`` holds its draws and statistics, with their summaries; ``convergence`` says what is wrong
with them, by ``chain_statistics``, and ``superchains`` whether many short chains agree;
``targets`` says how many draws are missing; ``arviz`` converts them to ArviZ; ``replay`` runs the
model again at the draws, for log likelihoods point by point; ``distances`` compares two samples.
"""

from pyro_ebm.diagnostics.arviz import open_store, to_arviz
from pyro_ebm.diagnostics.convergence import ConvergenceWarning, Finding, findings
from pyro_ebm.diagnostics.distances import mmd, sliced_wasserstein
from pyro_ebm.diagnostics.results import Results
from pyro_ebm.diagnostics.superchains import nested_r_hat

__all__ = [
    "ConvergenceWarning",
    "Finding",
    "Results",
    "findings",
    "mmd",
    "nested_r_hat",
    "open_store",
    "sliced_wasserstein",
    "to_arviz",
]
