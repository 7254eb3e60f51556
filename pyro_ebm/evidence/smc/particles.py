r"""Weighted particles: how far the next temperature may be, resampling, and who descends from whom.

Particle :math:`i` has the weight :math:`W_i` among :math:`N`, :math:`\sum_i W_i = 1`. With the
incremental weights :math:`g_i` of a step of the temperature, the *conditional effective sample
size*

.. math:: \mathrm{CESS} = N\, \frac{\big(\sum_i W_i g_i\big)^2}{\sum_i W_i g_i^2}

says how far the step is, whatever the weights were before it.

Resampling makes relatives. Let :math:`e_i` be the *ancestor* of particle :math:`i`, the draw of the
start that it descends from, and

.. math:: V_e = \hat Z \sum_{i\,:\,e_i = e} N W_i , \qquad \hat Z = \frac1N \sum_e V_e .

The families of different ancestors are all but independent, and each :math:`V_e` is an unbiased
estimate of :math:`Z`, as the weight of a chain is in annealed importance sampling: the error of
:math:`\log \hat Z` is that of a mean of :math:`N` such weights, and their effective sample size is
how many ancestors the particles have, in effect. It is conservative for systematic resampling,
which copies a particle as often as its weight says, up to rounding.

Reference:
    Chan and Lai (2013), A general theory of particle filters in hidden Markov models and some
    applications. Lee and Whiteley (2018), Variance estimation in the particle filter. Zhou,
    Johansen and Aston (2016), Toward automatic model comparison: an adaptive sequential Monte Carlo
    approach. Douc and Cappe (2005), Comparison of resampling schemes for particle filtering.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.normalizer.estimate_result import effective_sample_size

SHORTEST = 1e-12
"""The shortest step of beta."""


def log_cess(log_w: Tensor, log_g: Tensor) -> float:
    """The log of CESS / N.

    Args:
        log_w: log weights before the step, shape ``(N,)``.
        log_g: incremental log weights, shape ``(N,)``.

    Example:
        >>> log_g = torch.tensor([0.0, -float("inf")], dtype=torch.float64)
        >>> round(log_cess(torch.zeros(2, dtype=torch.float64), log_g), 4)  # half of them
        -0.6931
    """
    both = torch.where(log_w == -torch.inf, -torch.inf, log_w + log_g)
    twice = torch.where(log_w == -torch.inf, -torch.inf, log_w + 2 * log_g)
    return float(2 * both.logsumexp(0) - twice.logsumexp(0) - log_w.logsumexp(0))


def next_beta(
    log_weights: Callable[[float], Tensor], log_w: Tensor, beta: float, drop: float
) -> float:
    """How far a drop of the CESS allows to go: a beta up to 1.

    Args:
        log_weights: the incremental log weights of a step to a beta, shape ``(N,)``.
        log_w: log weights before it, shape ``(N,)``.
        beta: where the particles are.
        drop: the share of the CESS that the step may cost.

    Example:
        >>> x = torch.randn(100_000, dtype=torch.float64)  # CESS = exp(-beta^2) of weights e^(b x)
        >>> round(next_beta(lambda b: b * x, torch.zeros_like(x), 0.0, 0.3), 1)
        0.6
    """
    least = math.log1p(-drop)
    low, high = math.log(SHORTEST), math.log(max(1 - beta, SHORTEST))
    if 1 - beta <= 2 * SHORTEST or log_cess(log_w, log_weights(1.0)) >= least:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if log_cess(log_w, log_weights(beta + math.exp(middle))) >= least:
            low = middle
        else:
            high = middle
    return beta + math.exp(low)


def systematic(log_w: Tensor, u: float) -> Tensor:
    """Which particles to copy, each :math:`N W_i` times up to rounding, in their order.

    Args:
        log_w: log weights, shape ``(N,)``.
        u: uniform on (0, 1).

    Returns:
        Indices, shape ``(N,)``.

    Example:
        >>> systematic(torch.tensor([0.5, 0.0, 0.25, 0.25]).log(), 0.5).tolist()
        [0, 0, 2, 3]
    """
    n = len(log_w)
    cdf = log_w.double().softmax(0).cumsum(0)
    points = (torch.arange(n, dtype=cdf.dtype, device=cdf.device) + u) / n * cdf[-1]
    return torch.searchsorted(cdf, points).clamp(max=n - 1)


def ess_share(log_w: Tensor) -> float:
    """The effective sample size of weights, as a share of their number."""
    return float(effective_sample_size(log_w)) / len(log_w)


def of_ancestors(log_w: Tensor, ancestors: Tensor) -> Tensor:
    """The log of N times the mean weight that descends from each ancestor, shape ``(N,)``.

    Args:
        log_w: log weights of the particles, whose mean is an estimate, shape ``(N,)``.
        ancestors: the number of the ancestor of each, shape ``(N,)``.

    Example:
        >>> of_ancestors(torch.zeros(3), torch.tensor([0, 0, 2])).exp()
        tensor([2., 0., 1.])
    """
    top = log_w.max()
    return torch.zeros_like(log_w).index_add(0, ancestors, (log_w - top).exp()).log() + top
