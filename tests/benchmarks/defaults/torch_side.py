"""Our samplers and Pyro's NUTS on the real posteriors.

``before`` is all from the construction of the kernel to the first draw, with tracing and compiling
(the compiler starts with an empty cache), and what follows the last; ``sampling`` the transitions
after warmup. Of these, one that compiles a graph (it lasts more than fifty times the median and
0.2 s) counts as a median one, and its compiling as before.
"""

import time
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import NUTS

from pyro_ebm import MCMC, LangevinKernel
from pyro_ebm.mcmc import ChEESKernel
from tests.benchmarks.real.posteriors import REAL, RealPosterior, Samples

DENSE = 300  # dimensions up to which a dense mass matrix is a good choice


def kernel_of(sampler: str, posterior: RealPosterior) -> Any:
    """The kernel that a row names."""
    kind = LangevinKernel if "Langevin" in sampler else ChEESKernel
    jit = {"jit_compile": True, "ignore_jit_warnings": True}
    if sampler.startswith("Pyro"):
        return NUTS(posterior.model, **jit)
    if sampler.endswith("tuned"):
        return kind(posterior.model, full_mass=posterior.dim <= DENSE, **jit)
    if sampler.endswith("diagonal"):
        return kind(posterior.model, full_mass=False, **jit)
    return kind(posterior.model)


class Watch:
    """The time of every transition, and its leapfrog steps where a kernel counts them."""

    def __init__(self) -> None:
        self.last = 0.0
        self.gaps: list[float] = []
        self.drawn: list[bool] = []
        self.steps: list[Any] = []

    def tick(self, drawn: bool) -> None:
        """A transition is made; ``drawn`` if its state is a draw, and not of warmup."""
        now = time.perf_counter()
        self.gaps.append(now - self.last)
        self.drawn.append(drawn)
        self.last = now

    def sampling(self) -> float:
        """Seconds of the draws, without compiling."""
        gaps = np.array(self.gaps)[np.array(self.drawn)]
        usual = np.median(gaps)
        return float(np.where(gaps > 0.2 + 50 * usual, usual, gaps).sum())

    def hook(self, kernel: Any, params: Any, stage: str, i: int) -> None:
        """For Pyro's kernels."""
        self.tick(stage.startswith("Sample"))


def _watched(kernel: Any, watch: Watch, warmup: int) -> None:
    """Has a kernel of ours tell a watch of its steps. (A hook would be handed all values.)"""
    step = kernel.step

    def told(state: Any) -> Any:
        found = step(state)
        watch.steps.append(kernel.extra_fields.get("n_steps"))
        watch.tick(len(watch.gaps) >= warmup)
        return found

    kernel.step = told


def measure(
    sampler: str,
    posterior: str,
    chains: int,
    warmup: int | None,
    draws: int,
    seed: int,
    **options: Any,
) -> tuple[dict[str, Any], Samples]:
    """One run: its seconds and counts, and the draws. Options are those of ``MCMC``."""
    from torch._inductor.utils import fresh_cache

    target = REAL[posterior]
    torch.set_default_dtype(torch.float64 if target.double else torch.float32)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    torch._dynamo.reset()
    data, watch = target.tensors(), Watch()
    with fresh_cache():
        start = watch.last = time.perf_counter()
        kernel, ours = kernel_of(sampler, target), sampler.startswith("pyro_ebm")
        hook = None if ours else watch.hook
        options |= {"num_chains": chains, "hook_fn": hook, "disable_progbar": True}
        mcmc = MCMC(kernel, draws, warmup, **options)
        if ours:
            _watched(kernel, watch, mcmc.warmup_steps)
        mcmc.run(*data)
        samples = mcmc.get_samples(group_by_chain=True)
        whole = time.perf_counter() - start
    if len(watch.gaps) != (mcmc.warmup_steps + draws) * (1 if ours else chains):
        raise RuntimeError(f"{sampler} made {len(watch.gaps)} transitions, not as many as asked")
    sampling = watch.sampling()
    found = {
        "whole": whole,
        "before": whole - sampling,
        "sampling": sampling,
        "warmup": mcmc.warmup_steps,
        "settings": repr(kernel),
    }
    if ours:
        steps = [1.0 if n is None else float(n.float().mean()) for n in watch.steps]
        found["warmup_gradients"] = sum(steps[: mcmc.warmup_steps])
        found["draw_gradients"] = sum(steps[mcmc.warmup_steps :])
    return found, {name: x.numpy() for name, x in samples.items()}
