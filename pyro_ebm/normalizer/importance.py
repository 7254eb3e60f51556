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
from pyro_ebm.normalizer.estimate_result import (
    NormalizerEstimate,
    check_weights,
    effective_sample_size,
    log_mean_exp,
    stated_error,
    tail_shape,
    warn_if_unreliable,
)
from pyro_ebm.normalizer.proposals import checked_proposal, exact_draws
from pyro_ebm.ops.eval_mode import eval_mode


def importance(
    p: UnnormalizedEnergy, proposal: Any = None, num_samples: int = 10_000
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
    check_weights(log_w, "importance sampling")
    value, ess, k = log_mean_exp(log_w), effective_sample_size(log_w), tail_shape(log_w)
    remedy = "use a proposal that is wider and nearer to the density (a fitted flow), or annealing"
    warn_if_unreliable("importance sampling", ess, num_samples, k, remedy)
    return NormalizerEstimate(
        value=value,
        std_error=stated_error(log_w),
        method="importance",
        ess=ess,
        log_weights=log_w,
        lower=value,
        zeros=(log_w == -torch.inf).to(log_w.dtype).mean(0),
        pareto_k=k,
    )


def _log_weights(p: UnnormalizedEnergy, q: Any, x: Tensor) -> Tensor:
    """``log p~ - log q``, and ``-inf`` outside the support, shape ``(n, *batch)``."""
    inside = p.support.check(x)
    log_q = unvalidated(q).log_prob(x)
    with eval_mode(p.modules):
        log_p = unvalidated(p).unnormalized_log_prob(x)
    return torch.where(inside, log_p - log_q, -torch.inf)


__all__ = ["importance"]
