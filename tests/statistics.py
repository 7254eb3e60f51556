"""Tolerances of statistical tests, from the Monte Carlo error."""

import torch
from pyro.ops.stats import effective_sample_size
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

from pyro_ebm.mcmc import Info, Kernel, Potential

SIGMAS = 4.5


def standard_error(draws: Tensor) -> Tensor:
    """The standard error sd / sqrt(ESS) of the mean of ``(chains, draws, ...)``."""
    ess = effective_sample_size(draws, chain_dim=0, sample_dim=1)
    return draws.flatten(0, 1).std(0) / ess.sqrt()


def assert_mean(draws: Tensor, truth: Tensor | float) -> None:
    """The mean of ``(chains, draws, ...)`` is the truth, up to 4.5 standard errors."""
    draws = draws.double()
    z = (draws.flatten(0, 1).mean(0) - truth) / standard_error(draws)
    assert z.abs().max() < SIGMAS, f"mean {draws.mean((0, 1))} is {z} errors from {truth}"


def assert_moments(draws: Tensor, mean: Tensor | float, variance: Tensor | float) -> None:
    """The mean and the variance of ``(chains, draws, ...)`` are these."""
    assert_mean(draws, mean)
    assert_mean((draws - mean).square(), variance)


def assert_cdf(draws: Tensor, probability: dict[float, float]) -> None:
    """P(x <= point) of ``(chains, draws)`` is the probability, for each point."""
    for point, p in probability.items():
        assert_mean((draws <= point).double(), p)


def assert_mean_of_rows(rows: Tensor, truth: Tensor | float = 0.0) -> None:
    """The mean of independent rows ``(n, ...)`` is the truth: all elements at 4.5 errors of one.

    Of few rows the error is itself an estimate, whence Student's t.
    """
    error = rows.std(0) / len(rows) ** 0.5
    bound = student.isf(norm.sf(SIGMAS) / error.numel(), len(rows) - 1)
    gap = (rows.mean(0) - truth).abs()
    assert (gap <= bound * error + 1e-9).all(), (gap / error, bound)


def assert_equal_means(mean: Tensor, error: Tensor, other: Tensor, other_error: Tensor) -> None:
    """Two estimates of ``(dim,)`` means agree, all dimensions together at 4.5 errors of one."""
    z = (mean - other) / (error.square() + other_error.square()).sqrt()
    level = 2 * norm.sf(SIGMAS) / z.numel()
    assert z.abs().max() < norm.isf(level / 2), z


def normal_scores(draws: Tensor) -> Tensor:
    """The ranks of ``(chains, draws, ...)``, as normal quantiles: far tails count as the order.

    Reference:
        Vehtari et al. (2021), Rank-normalization, folding, and localization: an improved R-hat.
    """
    flat = draws.double().flatten(0, 1)
    ranks = flat.argsort(0).argsort(0) + 1
    return torch.special.ndtri((ranks - 3 / 8) / (len(flat) + 1 / 4)).reshape(draws.shape)


def run_kernel(
    kernel: Kernel, potential: Potential, z: Tensor, warmup_steps: int, num_draws: int
) -> tuple[Tensor, Info]:
    """Positions ``(chains, draws, dim)`` and what happened, ``(chains, draws)``, from ``z``."""
    kernel.bind(potential, warmup_steps)
    state = kernel.init(z)
    for _ in range(warmup_steps):
        state, _ = kernel.step(state)
    draws, infos = [], []
    for _ in range(num_draws):
        state, info = kernel.step(state)
        draws.append(state.z)
        infos.append(info)
    return torch.stack(draws, 1), Info(*(torch.stack(x, 1) for x in zip(*infos, strict=True)))
