r"""An estimate of log Z, and the reliability of the weights that it is made of.

Most estimators average random *weights* whose expectation is :math:`Z`. Of :math:`n` independent
ones,

.. math:: \hat Z = \frac1n \sum_i w_i, \qquad
          \mathrm{ESS} = \frac{\big(\sum_i w_i\big)^2}{\sum_i w_i^2}, \qquad
          \mathrm{sd}(\log \hat Z) \approx \sqrt{\frac{n / \mathrm{ESS} - 1}{n - 1}},

the last by the delta method. The variance in it is estimated too, from the same weights, and is low
where the estimate is low. With few of them intervals of that width would hold the truth too rarely:
the error that is stated takes the variance as one standard error of its own larger,
:math:`1 + \sqrt{(\kappa - 1) / n}` times, with :math:`\kappa` the kurtosis of the weights.
:math:`\hat Z` is unbiased, and so, by Jensen's inequality,
:math:`\log \hat Z` is too low on average: a *stochastic lower bound*. It exceeds
:math:`\log Z + b` with a probability of at most :math:`e^{-b}`, whatever the weights.

The error is computed from the same weights as the estimate. Where the few that matter were never
drawn, all look alike, and the estimate is low and seems certain. A small effective sample size, and
a heavy tail of the weights (:func:`~pyro_ebm.ops.pareto.pareto_k`), are signs of that.
"""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ebm.ops.code import outside_level
from pyro_ebm.ops.pareto import MAX_PARETO_K, MIN_WEIGHTS, pareto_k

MAX_LOG_Z = 1e10
"""No log Z of a density is larger, or smaller than minus this."""

MIN_ESS = 100.0
"""From fewer effective weights no error can be estimated."""


class UnreliableEstimateWarning(UserWarning):
    """An estimate of log Z may be off by more than its stated error."""


@dataclass(frozen=True, eq=False, repr=False)
class NormalizerEstimate:
    r"""An estimate of :math:`\log Z`, one for each batch element of a distribution.

    ``p.normalized(estimate)`` is the distribution with this :math:`\log Z`,
    :func:`~pyro_ebm.normalizer.likelihood` the log-likelihood of data under it. ``value`` is a
    plain tensor, without a gradient, and ``float(estimate)`` a number.

    Args:
        value: :math:`\log \hat Z`, shape ``batch_shape``.
        std_error: its standard error in nats, estimated from the draws, shape ``batch_shape``; 0
            where nothing is random.
        method: how it was made.
        ess: effective sample size, shape ``batch_shape``, of the weights.
        log_weights: the log of unbiased estimates of :math:`Z` (``"importance"``, ``"ais"``), or
            of :math:`1 / Z` (``"reverse_ais"``), shape ``(n, *batch_shape)``.
        lower: a lower bound in expectation, shape ``batch_shape``; its error is ``std_error``.
        upper: the value of a reverse run, shape ``batch_shape``: an upper bound in expectation if
            it started at exact draws of the density, else none. Being random, the two may cross.
        upper_error: its standard error, shape ``batch_shape``.
        exact_samples: whether it did, as far as the caller said.
        zeros: fraction of the weights that are 0, shape ``batch_shape``.
        pareto_k: see :func:`~pyro_ebm.ops.pareto.pareto_k`, shape ``batch_shape``.
        betas: the inverse temperatures of annealing, from 0 to 1.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> NormalizerEstimate(zero + 10.2934, zero + 0.0123, "bridge", ess=zero + 612)
        NormalizerEstimate(log Z = 10.293 +- 0.012, method=bridge, ESS=612)
    """

    value: Tensor
    std_error: Tensor
    method: str
    ess: Tensor | None = None
    log_weights: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    upper_error: Tensor | None = None
    exact_samples: bool = False
    zeros: Tensor | None = None
    pareto_k: Tensor | None = None
    betas: Tensor | None = None

    quantity: ClassVar[str] = "log Z"
    """What it is an estimate of, in its representation."""

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        if self.value.numel() != 1:
            low, high, error = self.value.min(), self.value.max(), self.std_error.max()
            parts = [
                f"batch_shape={tuple(self.value.shape)}",
                f"{self.quantity} from {low:.3f} to {high:.3f}, +- {digits(error)} at most",
                f"method={self.method}",
            ]
            if self.ess is not None:
                parts.append(f"ESS={self.ess.min():.0f} at least")
            return f"{type(self).__name__}({', '.join(parts)})"
        decimals = places(self.std_error)
        parts = [
            f"{self.quantity} = {self.value.item():.{decimals}f} +- {digits(self.std_error)}",
            f"method={self.method}",
        ]
        if self.ess is not None:
            parts.append(f"ESS={self.ess.item():.0f}")
        if self.lower is not self.upper:
            parts += self._bounds(decimals)
        if self.betas is not None:
            parts.append(f"temperatures={len(self.betas)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _bounds(self, decimals: int) -> list[str]:
        """Both, each with its error; where they cross, by how much."""
        found = []
        if self.lower is not None:
            error = "" if self.lower is not self.value else f" +- {digits(self.std_error)}"
            found.append(f"lower bound {self.lower.item():.{decimals}f}{error}")
        if self.upper is not None:
            error = "" if self.upper_error is None else f" +- {digits(self.upper_error)}"
            number = f"{self.upper.item():.{decimals}f}{error}"
            if self.exact_samples:
                found.append(f"upper bound {number}")
            else:
                found.append(f"in reverse {number} (a bound only from exact draws)")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            error = self.std_error.square()
            if self.upper_error is not None:
                error = error + self.upper_error.square()
            gap = f"{float(self.lower - self.upper):.{decimals}f} +- {digits(error.sqrt())}"
            found.append(f"which cross by {gap}")
        return found


def places(error: Tensor) -> int:
    """Decimals that show two digits of an error."""
    size = float(error.max())
    return 4 if not 0 < size < math.inf else min(max(1 - math.floor(math.log10(size)), 1), 6)


def digits(error: Tensor) -> str:
    """An error, rounded to two digits."""
    size = float(error.max())
    return "0" if size == 0 else f"{size:.{places(error)}f}"


def check_weights(log_weights: Tensor, what: str) -> None:
    """Refuses weights that no mean can be taken of.

    Args:
        log_weights: shape ``(n, *batch)``.
        what: what they are weights of.

    Raises:
        ValueError: with the fraction, if some are NaN or infinite, or all of a batch element 0.

    Example:
        >>> check_weights(torch.tensor([0.0, float("nan")]), "importance sampling")
        Traceback (most recent call last):
        ValueError: 50% of the weights of importance sampling are NaN: ...
    """
    wrong = {"NaN": log_weights.isnan(), "infinite": log_weights == torch.inf}
    for kind, bad in wrong.items():
        if bad.any():
            raise ValueError(
                f"{_percent(bad)} of the weights of {what} are {kind}: the log density is"
                f" {'no number' if kind == 'NaN' else 'infinite'} there. Look at the energy, and at"
                " the density that the points were drawn from, at such points"
            )
    zero = (log_weights == -torch.inf).reshape(len(log_weights), -1)
    if zero.all(0).any():
        raise ValueError(
            f"100% of the weights of {what} are 0 (of {int(zero.all(0).sum())} of {zero.shape[1]}"
            " batch elements): no point was drawn where the density is positive. Start from a"
            " density that overlaps with it: proposal=..."
        )


def estimate_of(
    log_weights: Tensor,
    method: str,
    what: str,
    remedy: str,
    reverse: bool = False,
    more: str = "num_samples=",
) -> NormalizerEstimate:
    r"""The estimate from weights, with a warning where their error cannot be estimated.

    Args:
        log_weights: the log of unbiased estimates of :math:`Z`, or in ``reverse`` of
            :math:`1 / Z`, shape ``(n, *batch)``.
        method: how they were made.
        what: what they are weights of, for messages.
        remedy: what to do where they are unreliable.
        reverse: which of the two they are.
        more: by which argument there are more of them.

    Raises:
        ValueError: for weights that no mean can be taken of.

    Example:
        >>> log_w = torch.randn(1000) / 10  # E w = exp(1 / 200)
        >>> estimate_of(log_w, "importance", "importance sampling", "use another proposal")
        NormalizerEstimate(log Z = 0.0... +- 0.003..., method=importance, ESS=9..., lower bound ...)
    """
    check_weights(log_weights, what)
    n, ess, k = len(log_weights), effective_sample_size(log_weights), tail_shape(log_weights)
    wrong_way = "too high" if reverse else "too low"
    warn_if_unreliable(what, ess, n, k, remedy, MIN_ESS, wrong_way, more)
    value = -log_mean_exp(log_weights) if reverse else log_mean_exp(log_weights)
    if (value.abs() > MAX_LOG_Z).any():
        warn(
            f"{what}: a log Z of {float(value.flatten()[value.abs().argmax()]):.3g} is that of no"
            " density. If the points ran off to where it is so small, it is likely improper, flat"
            " in some direction: check the energy; base= makes any bounded one proper"
        )
    return NormalizerEstimate(
        value=value,
        std_error=stated_error(log_weights),
        method=method,
        ess=ess,
        log_weights=log_weights,
        lower=None if reverse else value,
        zeros=(log_weights == -torch.inf).to(log_weights.dtype).mean(0),
        pareto_k=k,
    )


def _percent(bad: Tensor) -> str:
    share = 100 * bad.double().mean().item()
    return f"{share:.3g}%"


def log_mean_exp(x: Tensor) -> Tensor:
    """The log of the mean of ``exp(x)`` over the first dimension."""
    return x.logsumexp(0) - math.log(len(x))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Kish's :math:`(\sum w)^2 / \sum w^2`, over the first dimension.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -float("inf")]))
        tensor(2.)
    """
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def log_mean_error(log_weights: Tensor) -> Tensor:
    """The standard error of :func:`log_mean_exp` of independent weights, by the delta method."""
    n = len(log_weights)
    if n < 2:
        return torch.full_like(log_weights[0], torch.inf)
    return ((n / effective_sample_size(log_weights) - 1).clamp(min=0.0) / (n - 1)).sqrt()


def stated_error(log_weights: Tensor) -> Tensor:
    r"""The same, with the variance of the weights taken as one standard error larger.

    Example:
        >>> log_w = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
        >>> log_mean_error(log_w), stated_error(log_w)  # the kurtosis is 1.64
        (tensor(0.2582), tensor(0.3055))
    """
    relative = (log_weights - log_mean_exp(log_weights)).exp() - 1  # w / mean - 1
    square = relative.square()
    #     sd(v) / v = sqrt((kappa - 1) / n),  kappa - 1 = Var(square) / mean(square)^2
    excess = square.var(0, unbiased=False) / square.mean(0).square()
    excess = torch.where(square.mean(0) > 0, excess, 0.0)
    return log_mean_error(log_weights) * (1 + (excess / len(log_weights)).sqrt()).sqrt()


def tail_shape(log_weights: Tensor) -> Tensor | None:
    """Pareto's k of the weights, shape ``(*batch)``; None if there are too few of them.

    Where the weights are all but equal, nothing is left of a tail but noise: ``-inf``.
    """
    if len(log_weights) < MIN_WEIGHTS:
        return None
    spread = len(log_weights) / effective_sample_size(log_weights) - 1
    return torch.where(spread > 0.05, pareto_k(log_weights), -torch.inf)


FEW = 20.0
"""From so few weights no error can be estimated, however equal they look."""


def warn_if_unreliable(
    what: str,
    ess: Tensor,
    num: int,
    k: Tensor | None,
    remedy: str,
    least: float = MIN_ESS,
    wrong_way: str = "too low",
    more: str = "num_samples=",
) -> None:
    """Warns where weights are too few, or their tail too heavy, for an error to be estimated.

    Args:
        what: which weights.
        ess: their effective sample size, shape ``(*batch)``.
        num: how many there are.
        k: the shape of their tail, shape ``(*batch)``.
        remedy: what to do about it.
        least: how many should be effective, if there are four times as many.
        wrong_way: on which side of the truth such estimates are.
        more: by which argument there are more of them.
    """
    few = ess < min(least, max(num / 4, FEW))
    heavy = torch.zeros_like(few) if k is None else k > MAX_PARETO_K
    if not (few | heavy).any():
        return
    evidence = [f"an effective sample size of {float(ess.min()):.3g} of {num}"]
    if k is not None:
        good = f"up to {MAX_PARETO_K} is good"
        good += ", from 1 on their mean is infinite" if k.max() >= 1 else ""
        evidence.append(f"a Pareto k of {float(k.max()):.2f} ({good})")
    some = f" of {int((few | heavy).sum())} of {few.numel()} batch elements" if few.dim() else ""
    seen = f"{what}: the weights{some} have {' and '.join(evidence)}"
    if not heavy.any() and (ess[few] > num / 2).all():
        warn(
            f"{seen}. They are near to each other, and too few to tell the error of log Z: take"
            f" more of them ({more})"
        )
        return
    warn(f"{seen}. log Z is likely off by more than the stated error, {wrong_way}: {remedy}")


def warn(message: str) -> None:
    """Warns at the line that called this package's estimates from outside."""
    warnings.warn(message, UnreliableEstimateWarning, stacklevel=outside_level())
