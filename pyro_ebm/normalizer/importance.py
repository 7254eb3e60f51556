r"""Importance sampling: log Z from draws of a density that covers the target.

.. math:: Z = \mathbb E_q \frac{h(x)\, e^{-E(x)}}{q(x)}

The proposal :math:`q` must be wider than the target. Where it is narrower the few points that
matter are drawn almost never, the weights have a heavy tail, and the estimate is low.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, estimate_of
from pyro_ebm.normalizer.proposals import Proposal, checked_proposal, exact_draws
from pyro_ebm.normalizer.tails import warn_if_improper
from pyro_ebm.ops.eval_mode import eval_mode


def importance(
    p: UnnormalizedEnergy, proposal: Proposal | None = None, num_samples: int = 10_000
) -> NormalizerEstimate:
    """``method="importance"`` of :func:`~pyro_ebm.estimate_log_normalizer`."""
    if proposal is None:
        proposal = p.base
    if proposal is None:
        raise ValueError(
            f"importance sampling needs a proposal, and {p!r} has no base: give a normalized"
            " distribution, a FlowDistribution or a guide as proposal="
        )
    q = checked_proposal(proposal, p)
    x = exact_draws(q, num_samples)
    log_w = _log_weights(p, q, x)
    if not p.support.is_discrete:
        target = EnergyPotential(p, like=x)
        warn_if_improper(target, target.to_position(x), "importance sampling")
    remedy = "use a proposal that is wider and nearer to the density (a fitted flow), or annealing"
    return estimate_of(log_w, "importance", "importance sampling", remedy)


def _log_weights(p: UnnormalizedEnergy, q: Any, x: Tensor) -> Tensor:
    """``log p~ - log q``, and ``-inf`` outside the support, shape ``(n, *batch)``."""
    inside = p.support.check(x)
    log_q = unvalidated(q).log_prob(x)
    with eval_mode(p.modules):
        log_p = unvalidated(p).unnormalized_log_prob(x)
    return torch.where(inside, log_p - log_q, -torch.inf)
