r"""A pilot run along a path, which tunes the kernel and measures how far each step goes.

A small population of chains steps from temperature to temperature as far as a given drop of the
*conditional effective sample size* allows. With the log weight :math:`D` of a step,

.. math:: \mathrm{CESS} = \frac{(\mathbb E e^D)^2}{\mathbb E e^{2D}}
          \approx e^{-\ell^2}, \qquad \ell^2 = \operatorname{Var}(D) .

The population is resampled by the weights and moved, and so is near equilibrium at every
temperature. There the pilot tunes the step size to the kernel's ``target_accept_prob``, takes the
deviations of the population as preconditioner, and measures how many transitions :math:`\tau` the
kernel needs to forget :math:`D`.

What it measures is then fixed. The run that follows uses nothing else of the pilot, so that its
weights are exactly unbiased.

Reference:
    Zhou, Johansen and Aston (2016), Toward automatic model comparison: an adaptive sequential Monte
    Carlo approach (the conditional effective sample size).
"""

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.annealing.schedule import SchedulePoint
from pyro_ebm.normalizer.estimate_result import check_weights, log_mean_exp, warn
from pyro_ebm.normalizer.starts import deviations

NUM_CHAINS = 256
"""Chains of the pilot, for each batch element."""

DROP = 0.3
"""The drop of the conditional effective sample size from temperature to temperature."""

NUM_MOVES = 10
"""Transitions at each temperature, twice as many at the first."""

LAG = 5
"""Transitions over which it measures a correlation."""

MAX_CORRELATION = 0.95

CHECK_MOVES = 50
STILL, MAX_STILL = 0.2, 0.01
"""A chain that accepts less than this share of what all do stands still; how many of them may."""

MAX_POINTS = 500

SHORTEST = 1e-12
"""The shortest step of beta."""


def pilot(
    path: AnnealingPath, kernel: Kernel, disable_progbar: bool = False
) -> list[SchedulePoint]:
    """Anneals a small population, and returns what it measured at each temperature.

    Args:
        path: the densities.
        kernel: bound to the path; tuned where it adapts its step size or mass matrix.
        disable_progbar: whether to show no progress.

    Raises:
        ValueError: if start and target do not overlap, or there is no end to the steps.
    """
    z, beta = path.at(0.0).draw(NUM_CHAINS), 0.0
    kernel.init(z)
    step_size = kernel.adaptation.step_size
    if kernel.adapt_mass_matrix:  # before a graph is captured
        kernel.adaptation.inverse_mass_sqrt = _widths(path, kernel, z)
    points = [SchedulePoint(0.0, 0.0, 1.0, step_size, kernel.adaptation.inverse_mass_sqrt)]
    with tqdm(total=1.0, disable=disable_progbar, desc="pilot", delay=1.0) as bar:
        while beta < 1:
            if len(points) > MAX_POINTS:
                raise ValueError(
                    f"after {MAX_POINTS} temperatures the pilot has come to beta={beta:.6g} only:"
                    " the density may be improper, or the start is too far from it. Give a"
                    " proposal= that is nearer, or betas="
                )
            new, log_w = _next_beta(path, z, beta)
            bar.update(new - beta)
            length = (2 * log_mean_exp(log_w) - log_mean_exp(2 * log_w)).min()  # log CESS
            z = _resampled(z.reshape(log_w.shape + (-1,)), log_w).reshape(z.shape)
            path.at(new)
            z, slowness = _tuned(path, kernel, z, beta, new, first=len(points) == 1)
            length = math.sqrt(max(-float(length), 0.0))
            adaptation = kernel.adaptation
            settings = adaptation.step_size, adaptation.inverse_mass_sqrt
            points.append(SchedulePoint(new, length, slowness, *settings))
            beta = new
    _warn_if_standing(kernel, z, path.targets)
    points[0] = points[0]._replace(
        step_size=points[1].step_size, inverse_mass_sqrt=points[1].inverse_mass_sqrt
    )
    return points


def _next_beta(path: AnnealingPath, z: Tensor, beta: float) -> tuple[float, Tensor]:
    """How far the drop of the CESS allows to go, and the log weights ``(chains, targets)``."""
    parts = path.parts(z)
    here = path.at(beta).combine(*parts)

    def log_weights(new: float) -> Tensor:
        log_w = here - path.at(new).combine(*parts)
        return log_w.reshape(-1, path.targets)

    log_w = log_weights(1.0)
    check_weights(log_w, "annealing")
    low, high = math.log(SHORTEST), math.log(1 - beta)
    if 1 - beta <= 2 * SHORTEST or _lasts(log_w):
        return 1.0, log_w
    for _ in range(30):
        middle = (low + high) / 2
        if _lasts(log_weights(beta + math.exp(middle))):
            low = middle
        else:
            high = middle
    new = beta + math.exp(low)
    return new, log_weights(new)


def _lasts(log_w: Tensor) -> bool:
    """Whether the CESS of every target drops by no more than it may."""
    log_cess = 2 * log_mean_exp(log_w) - log_mean_exp(2 * log_w)
    return bool((log_cess >= math.log1p(-DROP)).all())


def _resampled(z: Tensor, log_w: Tensor) -> Tensor:
    """Positions ``(chains, targets, dim)`` drawn by their weights: systematic resampling."""
    n = len(z)
    cdf = log_w.softmax(0).cumsum(0)
    points = (
        torch.arange(n, dtype=z.dtype, device=z.device)[:, None] + torch.rand_like(cdf[:1])
    ) / n
    points = points * cdf[-1]
    index = torch.searchsorted(cdf.mT.contiguous(), points.mT.contiguous()).clamp(max=n - 1)
    return z.gather(0, index.mT[..., None].expand(z.shape))


def _widths(path: AnnealingPath, kernel: Kernel, z: Tensor) -> Tensor:
    """The factor of the population's covariance; dense only for ``full_mass=True``."""
    return deviations(z, path.targets, kernel.full_mass is True)[1]


def _tuned(
    path: AnnealingPath, kernel: Kernel, z: Tensor, old: float, new: float, first: bool
) -> tuple[Tensor, float]:
    """Moves the population, tunes the kernel to it, and measures how slowly it forgets."""
    adaptation = kernel.adaptation
    if kernel.adapt_mass_matrix:
        adaptation.inverse_mass_sqrt = _widths(path, kernel, z)
    state = kernel.evaluate(z)
    log_ratios = []
    moves = NUM_MOVES * (2 if first and kernel.adapt_step_size else 1)
    for i in range(moves):
        if i == moves - LAG:
            log_ratios.append(_log_ratio(path, state.z, old, new))
        state, info = kernel.step(state)
        if kernel.adapt_step_size:
            gap = adaptation.pooled(info.accept_prob) - adaptation.target_accept_prob
            adaptation.step_size = adaptation.step_size * (2 / (1 + i) ** 0.5 * gap).exp()
    log_ratios.append(_log_ratio(path, state.z, old, new))
    return state.z, _slowness(*log_ratios)


def _warn_if_standing(kernel: Kernel, z: Tensor, targets: int) -> None:
    """Warns if the kernel hardly moves some of the chains at the target.

    There the density is narrower than its step, as in the neck of a funnel. Chains that come in do
    not come out, and so, in equilibrium, hardly any come in: annealing misses that mass.
    """
    state = kernel.evaluate(z)
    accepted = torch.zeros_like(state.potential)
    for _ in range(CHECK_MOVES):
        state, info = kernel.step(state)
        if (info.accept_prob == 1).all():  # Gibbs sweeps
            return
        accepted = accepted + info.accept_prob
    accepted = accepted.reshape(-1, targets)
    still = float((accepted < STILL * accepted.mean(0)).double().mean(0).max())
    if still > MAX_STILL:
        warn(
            f"annealing: {type(kernel).__name__} hardly moves {100 * still:.2g}% of the chains of"
            " the pilot: the density is narrower there than its step. It comes there too rarely,"
            " and log Z is likely off by more than the stated error, too low: change coordinates,"
            " or use another kernel"
        )


def _log_ratio(path: AnnealingPath, z: Tensor, old: float, new: float) -> Tensor:
    """The log weight of the step that led here, ``(chains, targets)``."""
    parts = path.parts(z)
    difference = path.at(old).combine(*parts) - path.at(new).combine(*parts)
    return difference.reshape(-1, path.targets)


def _slowness(before: Tensor, after: Tensor) -> float:
    r""":math:`(1 + \phi) / (1 - \phi)` if the autocorrelation falls as :math:`\phi^t`."""
    before, after = before - before.mean(0), after - after.mean(0)
    size = (before.square().sum(0) * after.square().sum(0)).sqrt()
    rho = float(torch.where(size > 0, (before * after).sum(0) / size, 0.0).mean())
    if not math.isfinite(rho):
        return 1.0
    phi = min(max(rho, 0.0), MAX_CORRELATION) ** (1 / LAG)
    return (1 + phi) / (1 - phi)
