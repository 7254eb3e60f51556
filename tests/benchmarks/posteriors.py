"""How much does a second of sampling bring on two real posteriors?

Eight schools (Rubin 1981), non-centred, 10 unconstrained dimensions; and logistic regression on
scikit-learn's breast cancer data, 30 standardized features and an intercept, 31 dimensions.

Each sampler runs once a round, in an order that is turned by one each round, so that a slow minute
of the machine hits no sampler alone. Every row is one run and tells

- ``whole``: seconds from the construction of the kernel to the last draw, with tracing, capture and
  compilation;
- ``warm``: seconds of the transitions alone, warmup included: without what comes before the first
  one of each chain, and with a transition that captures or compiles a graph (it lasts more than
  fifty times the median and 0.2 s) counted as a median one;
- ``transitions``: the number of transitions, over all chains, warmup included;
- ``ess``: the smallest bulk effective sample size among all latent quantities (ArviZ);
- ``r_hat``: the largest rank-normalized R-hat among them, of half chains, so that one chain has it
  too. Where it is well above 1.01, ``ess`` is no measure of anything.

What Python imports on first use is imported before the first round, and counted for nobody.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import NUTS, RandomWalkKernel
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from pyro_ebm import MCMC, LangevinKernel, MHKernel

# ---- the posteriors ----------------------------------------------------------------------------


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def schools_data() -> tuple[Tensor, Tensor]:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return sigma, torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def logistic_regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("patient", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def cancer_data() -> tuple[Tensor, Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    return torch.cat([torch.ones(len(x), 1), x], -1), torch.tensor(y, dtype=torch.float32)


@dataclass(frozen=True)
class Posterior:
    title: str
    model: Callable[..., None]
    data: Callable[[], tuple[Tensor, ...]]
    dense: bool  # whether a dense mass matrix pays


POSTERIORS = {
    "schools": Posterior("Eight schools, non-centred, 10-d", eight_schools, schools_data, False),
    "logistic": Posterior(
        "Logistic regression, breast cancer, 31-d", logistic_regression, cancer_data, True
    ),
}

# ---- the samplers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One row: a kernel, and how long it runs. The chains of Pyro's kernels run in turn."""

    sampler: str
    chains: int
    warmup: int
    draws: int  # transitions of each chain after warmup
    thinning: int
    kernel: Callable[[Posterior], Any] = field(repr=False)
    arguments: str = ""

    @property
    def name(self) -> str:
        return f"{self.sampler}, {self.chains} chain{'s' * (self.chains > 1)}"


def settings(posterior: Posterior, quick: bool) -> Iterator[Setting]:
    """The rows of one posterior, ours before Pyro's."""

    def rows(sampler, chains, warmup, draws, thinning, kernel, arguments=""):
        for c in chains:
            few = (40, 40, 1) if quick else (warmup, draws, thinning)
            yield Setting(sampler, c, *few, kernel, arguments)

    dense = f"full_mass={posterior.dense}"
    for jit in (False, True):
        yield from rows(
            "LangevinKernel" + ", compiled" * jit,
            (1, 4) if quick else (1, 4, 64),
            1000,
            1500,
            1,
            lambda p, jit=jit: LangevinKernel(p.model, full_mass=p.dense, jit_compile=jit),
            dense,
        )
    yield from rows(
        "MHKernel", (1, 4) if quick else (1, 4, 64), 1000, 3000, 2, lambda p: MHKernel(p.model)
    )
    yield from rows("NUTS", (1,), 300, 400, 1, lambda p: NUTS(p.model))
    yield from rows(
        "NUTS, jit",
        (1,) if quick else (1, 4),
        300,
        400,
        1,
        lambda p: NUTS(p.model, jit_compile=True, ignore_jit_warnings=True),
    )
    yield from rows(
        "RandomWalkKernel",
        (1,) if quick else (1, 4),
        1000,
        3000,
        2,
        lambda p: RandomWalkKernel(p.model),
    )


# ---- the measurement ---------------------------------------------------------------------------


class Stopwatch:
    """A hook that takes the time after every transition."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.last = 0.0

    def __call__(self, kernel: Any, params: Any, stage: str, i: int) -> None:
        now = time.perf_counter()
        first = stage.startswith("Warmup") and i == 0
        if not first:
            self.gaps.append(now - self.last)
        self.last = now

    def warm(self) -> float:
        gaps = torch.tensor(self.gaps, dtype=torch.float64)
        median = gaps.median()
        return float(torch.where(gaps > 0.2 + 50 * median, median, gaps).sum())


def quantities(mcmc: MCMC) -> Iterator[np.ndarray]:
    """The draws of every latent number, each of shape ``(chains, draws)``."""
    for x in mcmc.get_samples(group_by_chain=True).values():
        yield from x.flatten(2).permute(2, 0, 1).numpy() if x.dim() > 2 else x[None].numpy()


def halves(x: np.ndarray) -> np.ndarray:
    """The two halves of every chain as chains, shape ``(2 chains, draws / 2)``."""
    return x.reshape(2 * x.shape[0], x.shape[1] // 2)


def measure(posterior: Posterior, setting: Setting, seed: int) -> dict[str, Any]:
    """Runs one sampler once."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    data, watch = posterior.data(), Stopwatch()
    start = time.perf_counter()
    mcmc = MCMC(
        setting.kernel(posterior),
        setting.draws,
        setting.warmup,
        num_chains=setting.chains,
        thinning=setting.thinning,
        hook_fn=watch,
        disable_progbar=True,
    )
    mcmc.run(*data)
    whole, warm = time.perf_counter() - start, watch.warm()
    chains = list(quantities(mcmc))
    ess = min(float(az.ess(x, method="bulk")) for x in chains)
    r_hat = max(float(az.rhat(halves(x), method="rank")) for x in chains)
    transitions = setting.chains * (setting.warmup + setting.draws)
    return {
        "sampler": setting.sampler,
        "chains": setting.chains,
        "warmup": setting.warmup,
        "draws": setting.draws,
        "arguments": setting.arguments,
        "seed": seed,
        "whole": whole,
        "warm": warm,
        "transitions": transitions,
        "transitions_per_second": transitions / warm,
        "ess": ess,
        "ess_per_second_whole": ess / whole,
        "ess_per_second_warm": ess / warm,
        "r_hat": r_hat,
    }


def compare(
    posterior: Posterior, rounds: int, seed: int, quick: bool, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All samplers, ``rounds`` times, each round in another order and with another seed."""
    rows = list(settings(posterior, quick))
    for kernel in (LangevinKernel(posterior.model), NUTS(posterior.model)):
        chains = 2 if isinstance(kernel, LangevinKernel) else 1
        MCMC(kernel, 2, num_chains=chains, disable_progbar=True).run(*posterior.data())
    results = []
    for i in range(rounds):
        turn = i * len(rows) // rounds
        for setting in rows[turn:] + rows[:turn]:
            progress(f"round {i + 1} of {rounds}: {posterior.title}: {setting.name}")
            results.append({"round": i, **measure(posterior, setting, seed + i)})
    order = [(s.sampler, s.chains) for s in rows]
    return sorted(results, key=lambda r: (order.index((r["sampler"], r["chains"])), r["round"]))
