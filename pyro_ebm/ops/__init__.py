"""Functions of batched tensors, without Pyro and without state.

Each formula stands here once, for the kernels, losses and estimators of the other wings: scores,
steps of samplers, integrals, and checks of arguments and of the rows of a batch.
"""

from pyro_ebm.ops.integration.quadrature import log_integral
from pyro_ebm.ops.score import fisher_divergence, score, value_and_grad
from pyro_ebm.ops.steps.langevin import langevin_log_accept_ratio, langevin_proposal
from pyro_ebm.ops.steps.leapfrog import drift, energy_change, kick
from pyro_ebm.ops.steps.metropolis import log_uniform, metropolis_accept, select
from pyro_ebm.ops.steps.precondition import precondition, precondition_transposed

__all__ = [
    "drift",
    "energy_change",
    "fisher_divergence",
    "kick",
    "langevin_log_accept_ratio",
    "langevin_proposal",
    "log_integral",
    "log_uniform",
    "metropolis_accept",
    "precondition",
    "precondition_transposed",
    "score",
    "select",
    "value_and_grad",
]
