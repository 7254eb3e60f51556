"""Our samplers and Pyro's, on the posteriors of :mod:`tests.benchmarks.models`.

``whole`` counts all from the construction of the kernel to the draws on their supports, with
tracing, capturing and compiling; the compiler starts with an empty cache. ``warm`` counts the
transitions, warmup included, and what follows the last; a transition that captures or compiles a
graph (it lasts more than fifty times the median and 0.2 s) counts as a median one. Pyro's kernels
are watched by a hook; ours in their ``step``, since a hook is also handed the values of all sites.
"""

import time
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import NUTS, RandomWalkKernel

from pyro_ebm import MCMC, LangevinKernel, MHKernel
from pyro_ebm.mcmc import ChEESKernel
from tests.benchmarks.models import POSTERIORS, Posterior


def setup() -> None:
    """What Python imports on first use is imported before anything is timed."""
    posterior = POSTERIORS["schools"]
    kernel = LangevinKernel(posterior.model, jit_compile=True, ignore_jit_warnings=True)
    MCMC(kernel, 2, num_chains=2, disable_progbar=True).run(*posterior.tensors())
    nuts = NUTS(posterior.model, jit_compile=True, ignore_jit_warnings=True)
    MCMC(nuts, 1, disable_progbar=True).run(*posterior.tensors())


class Stopwatch:
    """Takes the time after every transition; a hook for Pyro's kernels."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.last = 0.0

    def __call__(self, kernel: Any, params: Any, stage: str, i: int) -> None:
        self.tick(between=not (stage.startswith("Warmup") and i == 0))

    def tick(self, between: bool = True) -> None:
        """A transition is made; not ``between`` if a new chain was set up before it."""
        now = time.perf_counter()
        if self.last and between:
            self.gaps.append(now - self.last)
        self.last = now

    def warm(self, end: float) -> float:
        """Seconds of the transitions, and from the last of them to the end."""
        gaps = np.array(self.gaps)
        usual = np.median(gaps)
        return float(np.where(gaps > 0.2 + 50 * usual, usual, gaps).sum()) + end - self.last


def kernel_of(sampler: str, posterior: Posterior, watch: Stopwatch) -> Any:
    """The kernel that a row names."""
    jit = {"jit_compile": True, "ignore_jit_warnings": True}
    if sampler == "pyro_ebm Langevin":
        return _watched(LangevinKernel, watch)(posterior.model, full_mass=posterior.dense, **jit)
    if sampler == "pyro_ebm ChEES":
        return _watched(ChEESKernel, watch)(posterior.model, full_mass=posterior.dense, **jit)
    if sampler == "pyro_ebm MH":
        return _watched(MHKernel, watch)(posterior.model, **jit)
    if sampler == "Pyro NUTS, jit":
        return NUTS(posterior.model, full_mass=posterior.dense, **jit)
    return RandomWalkKernel(posterior.model)


def _watched(kind: Any, watch: Stopwatch) -> Any:
    """A kernel whose steps tell a watch."""

    def step(self: Any, state: Any) -> Any:
        found = kind.step(self, state)
        watch.tick()
        return found

    return type(kind.__name__, (kind,), {"step": step})


def measure(
    sampler: str, posterior: str, chains: int, warmup: int, draws: int, seed: int
) -> dict[str, Any]:
    """One run: seconds, and the draws."""
    from torch._inductor.utils import fresh_cache

    target = POSTERIORS[posterior]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    torch._dynamo.reset()
    data, watch = target.tensors(), Stopwatch()
    with fresh_cache():
        start = time.perf_counter()
        kernel = kernel_of(sampler, target, watch)
        hook = None if sampler.startswith("pyro_ebm") else watch
        mcmc = MCMC(kernel, draws, warmup, num_chains=chains, hook_fn=hook, disable_progbar=True)
        mcmc.run(*data)
        samples = mcmc.get_samples(group_by_chain=True)
        end = time.perf_counter()
    return {
        "whole": end - start,
        "warm": watch.warm(end),
        "samples": {name: x.numpy() for name, x in samples.items()},
    }
