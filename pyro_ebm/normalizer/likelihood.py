r"""The likelihood of data under an energy whose log Z was estimated.

.. math:: \frac1n \sum_i \log p(x_i) = \frac1n \sum_i \log \tilde p(x_i) - \log \hat Z

It has two errors. That of the mean over data shrinks with more data, that of :math:`\log \hat Z`
is common to all of them and does not. An estimate of :math:`\log Z` that is too low, as annealing
is where its chains do not keep up, makes the likelihood too *high*.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.arguments import expands
from pyro_ebm.distributions.checks.rows import check_rows
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, digits, places
from pyro_ebm.ops.arguments import check_tensor, shown
from pyro_ebm.ops.eval_mode import eval_mode

ROWS_COMPARED = 64


@dataclass(frozen=True, eq=False, repr=False)
class LogLikelihood:
    """The mean log-likelihood of data, in nats a point.

    Args:
        value: the mean, shape ``batch_shape``.
        std_error: both errors together, shape ``batch_shape``.
        data_error: the standard error of the mean over the data.
        normalizer_error: that of the estimate of log Z.
        lower: from the value in reverse of log Z, if the estimate has one: a lower bound as far as
            that is an upper one.
        upper: from a lower bound of log Z, if the estimate has one.
        num_points: how many points the mean is of.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x**2 / 2, log_normalizer=math.log(2 * math.pi) / 2)
        >>> found = mean_log_likelihood(p, torch.randn(1000))
        >>> bool((found.value + 1.4189).abs() < 4.5 * found.std_error)
        True
        >>> found.num_points, float(found.normalizer_error)
        (1000, 0.0)
    """

    value: Tensor
    std_error: Tensor
    data_error: Tensor
    normalizer_error: Tensor
    lower: Tensor | None
    upper: Tensor | None
    num_points: int

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        if self.value.numel() != 1:
            return (
                f"LogLikelihood(batch_shape={tuple(self.value.shape)}, from {self.value.min():.2f}"
                f" to {self.value.max():.2f} nats a point, +- {self.std_error.max():.2g} at most,"
                f" {self.num_points} points)"
            )
        value = f"{self.value.item():.{places(self.std_error)}f}"
        return (
            f"LogLikelihood({value} +- {digits(self.std_error)} nats a point:"
            f" {digits(self.data_error)} from {self.num_points} points,"
            f" {digits(self.normalizer_error)} from log Z)"
        )


@torch.no_grad()
def mean_log_likelihood(
    p: UnnormalizedEnergy, data: Tensor, estimate: NormalizerEstimate | Tensor | float | None = None
) -> LogLikelihood:
    r"""The mean log-likelihood of data, with both of its errors.

    .. math:: \mathrm{sd}^2 = \frac{\operatorname{Var}(\log \tilde p(x))}{n}
              + \mathrm{sd}(\log \hat Z)^2

    The data should not be those that the energy was fitted to.

    Args:
        p: the energy.
        data: points, shape ``(n, *event)``, or ``(n, *batch, *event)``.
        estimate: what :func:`~pyro_ebm.estimate_log_normalizer` returned; or a number or tensor,
            taken as exact. By default the energy's own ``log_normalizer``, taken as exact, if it is
            known.

    Raises:
        ValueError: without a known log Z, for an estimate that is not finite, or data of another
            shape, outside the support, or NaN.

    Example:
        >>> from pyro_ebm.normalizer import estimate_log_normalizer
        >>> p = UnnormalizedEnergy(lambda x: x**2 / 2)
        >>> mean_log_likelihood(p, torch.randn(1000), estimate_log_normalizer(p))  # exactly -1.42
        LogLikelihood(-1.4... +- 0.02... nats a point: 0.02... from 1000 points, 0 from log Z)
    """
    if not isinstance(p, UnnormalizedEnergy):
        raise ValueError(f"p must be an UnnormalizedEnergy, got {shown(p)}")
    check_tensor("data", data)
    if estimate is None:
        if not p.is_normalized:
            raise ValueError(
                f"log Z of {p!r} is {p.normalizer_state}: give the estimate, as in"
                " mean_log_likelihood(p, data, estimate_log_normalizer(p))"
            )
        estimate = p.log_normalizer
    shape = p.batch_shape + p.event_shape
    if data.shape[1:] == p.event_shape:
        data = data.reshape(data.shape[:1] + (1,) * len(p.batch_shape) + p.event_shape)
        data = data.expand(data.shape[:1] + shape)
    if data.dim() < 1 or data.shape[1:] != shape or not len(data):
        raise ValueError(
            f"data must have shape (n, *event), event_shape={tuple(p.event_shape)}, got"
            f" {tuple(data.shape)}"
        )
    if data.isnan().any() or not p.support.check(data).all():
        raise ValueError(f"the data hold NaN, or leave the energy's support {p.support}")
    with eval_mode(p.modules):
        check_rows(p, data[:ROWS_COMPARED], f"the energy {p!r}")
        density = p.unnormalized_log_prob(data)
    if density.isnan().any():
        raise ValueError(f"the energy is NaN at {int(density.isnan().sum())} of the data")
    if not density.isfinite().all():
        bad = int((~density.isfinite()).sum())
        raise ValueError(
            f"the density is 0 or infinite at {bad} of {density.numel()} of the data, whose mean"
            " log-likelihood is then no finite number: leave them out, or widen the model"
        )
    mean, n = density.mean(0), len(density)
    data_error = density.std(0) / math.sqrt(n) if n > 1 else torch.full_like(mean, torch.inf)

    def at(log_z: object) -> Tensor | None:
        if log_z is None:
            return None
        try:
            log_z = torch.as_tensor(log_z).to(mean)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"estimate must be an estimate, a number or a tensor, got {shown(estimate)}"
            ) from error
        if not expands(log_z.shape, p.batch_shape):
            raise ValueError(
                f"the estimate has shape {tuple(log_z.shape)}, the energy a log Z for each of"
                f" batch_shape={tuple(p.batch_shape)}"
            )
        return log_z.expand(p.batch_shape)

    log_z = at(getattr(estimate, "value", estimate))
    assert log_z is not None
    if not log_z.isfinite().all():
        raise ValueError(f"the estimate of log Z must be finite, got {log_z}")
    normalizer_error = at(getattr(estimate, "std_error", 0.0))
    assert normalizer_error is not None
    low, high = at(getattr(estimate, "lower", None)), at(getattr(estimate, "upper", None))
    return LogLikelihood(
        value=mean - log_z,
        std_error=(data_error.square() + normalizer_error.square()).sqrt(),
        data_error=data_error,
        normalizer_error=normalizer_error,
        lower=None if high is None else mean - high,
        upper=None if low is None else mean - low,
        num_points=n,
    )
