"""How heavy the tail of importance weights is."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_WEIGHTS = 25
"""The tail of fewer importance weights is too short to be fitted."""
MAX_PARETO_K = 0.7
"""Above it the mean of the weights, and an error computed from them, are not to be trusted."""


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""How heavy the upper tail of importance weights is: the shape :math:`k` of a Pareto tail.

    The largest :math:`3 \sqrt n` weights are fitted by a generalized Pareto distribution, which has
    moments below :math:`1 / k` only. Above 0.5 the variance of the weights is infinite, and above
    0.7 their mean is not to be trusted, nor the error that is computed from them.

    Args:
        log_weights: shape ``(n, *batch)``, at least 25 of them; ``-inf`` is a weight of 0.

    Returns:
        Shape ``(*batch)``; ``-inf`` where the largest weights are all the same, and ``inf`` where
        there are too few of them for a fit.

    Raises:
        ValueError: for fewer weights, or NaN or infinite ones.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.

    Example:
        >>> log_weights = 0.6 * dist.Exponential(1.0).sample((10_000,))  # 1 / u^0.6
        >>> bool((pareto_k(log_weights) - 0.6).abs() < 0.2)
        True
    """
    if log_weights.dim() < 1 or len(log_weights) < MIN_WEIGHTS:
        raise ValueError(
            f"pareto_k needs at least {MIN_WEIGHTS} log weights, got shape"
            f" {tuple(log_weights.shape)}"
        )
    if not (log_weights < torch.inf).all():
        raise ValueError("pareto_k needs log weights that are numbers, and some are NaN or +inf")
    rows = log_weights.reshape(len(log_weights), -1).T.detach().cpu().numpy().astype(np.float64)
    k = [_pareto_k(row - row.max()) for row in rows]
    return torch.tensor(k, dtype=log_weights.dtype, device=log_weights.device).reshape(
        log_weights.shape[1:]
    )


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Importance weights whose largest ones are quantiles of a Pareto tail, and its shape.

    Args:
        log_weights: shape ``(n,)``, at least 25 of them, finite.

    Returns:
        Log weights, shape ``(n,)``, which sum to 1, and :func:`pareto_k`.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.

    Example:
        >>> log_weights = 0.6 * dist.Exponential(1.0).sample((1000,))
        >>> smoothed, k = pareto_smoothed(log_weights)
        >>> bool(smoothed.max() < log_weights.log_softmax(0).max() + 0.5), round(k, 1)
        (True, 0.5)
    """
    import arviz

    k, row = float(pareto_k(log_weights)), log_weights.detach().cpu().double().numpy()
    if math.isinf(k):  # there is no tail to be smoothed
        return log_weights.log_softmax(0), k
    if int(arviz.__version__.split(".")[0]) < 1:
        psislw: Any = arviz.psislw
    else:
        from arviz_stats.base import array_stats

        psislw = array_stats.psislw
    smoothed = torch.from_numpy(np.asarray(psislw(row)[0])).to(log_weights)
    return smoothed.log_softmax(0), k


def _pareto_k(row: np.ndarray) -> float:
    """The shape of one row of log weights, the largest of them 0."""
    tail = math.ceil(min(len(row) / 5, 3 * len(row) ** 0.5))
    above = int((row > np.sort(row)[-tail - 1]).sum())
    if above < 5:  # bounded weights, or a few that dwarf all others
        return math.inf if above else -math.inf
    if 2 * int((row == 0).sum()) > above:  # most of the tail is at its end: bounded
        return -math.inf
    import arviz

    if int(arviz.__version__.split(".")[0]) < 1:
        psislw: Any = arviz.psislw
        return float(psislw(row)[1])
    from arviz_stats.base import array_stats

    statistics: Any = array_stats
    return float(statistics.pareto_khat(np.exp(row), chain_axis=None, r_eff=1.0, tail="right"))
