"""Discrete targets whose states are counted: every frequency against its probability."""

import itertools

import torch
from scipy.stats import binom, norm
from torch import Tensor

from pyro_ebm.mcmc import Info, Kernel, Potential
from tests.statistics import SIGMAS, run_kernel


def states_of(potential: Potential) -> tuple[Tensor, Tensor]:
    """All positions ``(states, dim)``, and the log density of each up to a constant."""
    sites = []
    for site in potential.sites:
        assert site.support_values is not None
        support_values = site.support_values.to(potential.dtype)
        num = site.shape.numel() // support_values.shape[1]
        sites.append([torch.cat(c) for c in itertools.product(support_values, repeat=num)])
    states = torch.stack([torch.cat(parts) for parts in itertools.product(*sites)])
    return states, -potential(states).detach()


def number_of(z: Tensor, states: Tensor) -> Tensor:
    """Which state each row of ``z`` is, shape ``(rows,)``."""
    same = (z[:, None] == states).all(-1)
    assert same.any(-1).all(), "a position is no state"
    return same.long().argmax(-1)


def draws_of(states: Tensor, log_p: Tensor, num: int) -> Tensor:
    """Exact independent draws, shape ``(num, dim)``."""
    return states[torch.distributions.Categorical(logits=log_p).sample((num,))]


def assert_counts(counts: Tensor, p: Tensor) -> None:
    """Counts ``(..., states)`` are those of probabilities ``p``: all, at 4.5 errors of one."""
    n, p = counts.sum(-1, keepdim=True).expand(counts.shape), p.double().clamp(max=1)
    assert (counts[p == 0] == 0).all()
    counts, n, p = counts[p > 0], n[p > 0], p[p > 0]
    below = torch.as_tensor(binom.cdf(counts, n, p))
    above = torch.as_tensor(binom.sf(counts - 1, n, p))
    assert torch.minimum(below, above).min() > norm.sf(SIGMAS) / len(p), (counts, n * p)


def assert_draws(z: Tensor, states: Tensor, log_p: Tensor) -> None:
    """Independent positions ``(rows, dim)`` are draws of this density."""
    assert_counts(number_of(z, states).bincount(minlength=len(states)), log_p.softmax(0))


def assert_invariant(
    kernel: Kernel, potential: Potential, num: int = 20_000, steps: int = 2
) -> Info:
    """Exact draws stay exact draws, and move; what happened, ``(num, steps)``."""
    states, log_p = states_of(potential)
    start = draws_of(states, log_p, num)
    z, info = run_kernel(kernel, potential, start, 0, steps)
    assert (z[:, -1] != start).any(-1).double().mean() > 0.05
    assert_draws(z[:, -1], states, log_p)
    return info
