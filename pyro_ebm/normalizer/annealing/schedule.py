r"""Which temperatures to anneal at, and the kernel's settings at each.

Let :math:`D = \log \tilde p_{\beta'} - \log \tilde p_\beta` be the log weight of one step, and
:math:`\ell^2 = \operatorname{Var}(D)` under :math:`p_\beta`: :math:`\ell` is the length of the step
in the metric of the Fisher information. Annealing in :math:`T` steps of equal length ends with log
weights of variance

.. math:: \Lambda^2 / T, \qquad \Lambda = \sum \ell \sqrt{\tau} .

A kernel that needs :math:`\tau` transitions to forget :math:`D` lags behind as if there were
:math:`\tau` times fewer temperatures. That says how many temperatures are enough. Lengths and
:math:`\tau` are measured by a pilot run (:mod:`~pyro_ebm.normalizer.annealing.pilot`).

Reference:
    Crooks (2007), Measuring thermodynamic length. Sivak and Crooks (2012), Thermodynamic metrics
    and optimal paths.
"""

import bisect
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.ops.steps.precondition import Factor

VARIANCE = 0.5
"""The variance of the log weights that the default number of temperatures aims at."""

MAX_TEMPERATURES = 10_001


class SchedulePoint(NamedTuple):
    """What the pilot run measured at a temperature."""

    beta: float
    length: float
    r""":math:`\ell` of the step that led here, of the batch element that had farthest to go."""
    slowness: float
    r""":math:`\tau`, transitions that the kernel needs to forget."""
    step_size: Tensor
    """Shape ``(targets,)``."""
    inverse_mass_sqrt: Factor | None
    """The root of the inverse mass matrix, shape ``(targets, dim)`` or ``(targets, dim, dim)``."""


class TemperatureSchedule:
    """Temperatures, and the settings of the kernel at each.

    Args:
        points: those of the pilot, from beta 0 to 1; without any, the kernel keeps its settings.
        betas: temperatures from 0 to 1.
    """

    def __init__(self, points: list[SchedulePoint], betas: list[float]):
        self.points, self.betas = points, betas
        self._knots = [point.beta for point in points]

    def set(self, kernel: Kernel, beta: float) -> None:
        """Gives the kernel its settings at a temperature, interpolated between two points."""
        if not self.points:
            return
        above = min(bisect.bisect_left(self._knots, beta), len(self.points) - 1)
        low, high = self.points[max(above - 1, 0)], self.points[above]
        share = 1.0 if high.beta == low.beta else (beta - low.beta) / (high.beta - low.beta)
        log_step = torch.lerp(low.step_size.log(), high.step_size.log(), share)
        kernel.adaptation.step_size = log_step.exp()
        here, there = low.inverse_mass_sqrt, high.inverse_mass_sqrt
        if isinstance(here, Tensor) and isinstance(there, Tensor):
            kernel.adaptation.inverse_mass_sqrt = torch.lerp(here, there, share)


def schedule_of(
    points: list[SchedulePoint], num_temperatures: int | None = None, ess_drop: float | None = None
) -> list[float]:
    """Temperatures from 0 to 1, spaced by what the pilot measured.

    Args:
        points: those of the pilot.
        num_temperatures: how many, both ends counted.
        ess_drop: the drop of the conditional effective sample size from each to the next.

    Example:
        >>> one = torch.ones(1)
        >>> points = [SchedulePoint(b, 1.0, 1.0, one, None) for b in (0.0, 0.1, 1.0)]
        >>> schedule_of(points, num_temperatures=5)
        [0.0, 0.05, 0.1, 0.55, 1.0]
    """
    if ess_drop is not None:
        lengths = [point.length for point in points[1:]]
        steps = math.ceil(sum(lengths) / math.sqrt(-math.log1p(-ess_drop)) - 1e-6)
    else:
        lengths = [point.length * math.sqrt(point.slowness) for point in points[1:]]
        steps = math.ceil(sum(lengths) ** 2 / VARIANCE - 1e-6)
        if num_temperatures is not None:
            steps = num_temperatures - 1
    steps = max(min(steps, MAX_TEMPERATURES - 1) if num_temperatures is None else steps, 1)
    lengths = [max(length, 1e-6) for length in lengths]  # a path may stand still
    ends = torch.tensor([0.0, *lengths], dtype=torch.float64).cumsum(0)
    knots = torch.tensor([point.beta for point in points], dtype=torch.float64)
    where = torch.linspace(0.0, float(ends[-1]), steps + 1, dtype=torch.float64)
    index = torch.searchsorted(ends, where, right=True).clamp(1, len(points) - 1)
    share = (where - ends[index - 1]) / (ends[index] - ends[index - 1])
    betas = torch.lerp(knots[index - 1], knots[index], share).tolist()
    return [0.0, *betas[1:-1], 1.0]
