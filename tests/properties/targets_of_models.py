"""More of what random arguments are given to: evidence, starts, minibatches, many short chains."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_ebm as pe
from pyro_ebm import mcmc
from pyro_ebm.diagnostics import nested_r_hat
from pyro_ebm.evidence import EvidenceEstimate
from tests.properties.targets import DYNAMIC, Target, real_model, run, sampled

Y = torch.tensor([0.5, 1.0, -0.5, 2.0])


def subsampled_model() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows])


MINIBATCH = {
    "model": subsampled_model,
    "potential_fn": None,
    "step_size": None,
    "schedule": None,
    "variance_bias": 0.1,
    "precondition_steps": True,
    "control_variates": False,
    "shared_rows": None,
    **{name: DYNAMIC[name] for name in ("init_strategy", "transforms")},
}


def until(**arguments: Any) -> Any:
    """A run until a target is met, of as many draws as it may take."""
    kernel = pe.LangevinKernel(real_model)
    sampler = pe.MCMC(kernel, 4, 2, num_chains=4, disable_progbar=True)
    sampler.run_until(**arguments)
    return sampler.get_samples()


def started(strategy: Any) -> Any:
    return run(pe.LangevinKernel(real_model, init_strategy=strategy))


def earlier() -> Any:
    kernel = pe.LangevinKernel(real_model)
    source = pe.MCMC(kernel, 2, 0, num_chains=2, check_convergence=False, disable_progbar=True)
    source.run()
    return source


CHAINS = [
    Target("SGLDKernel", pe.SGLDKernel, MINIBATCH, run),
    Target("SGHMCKernel", pe.SGHMCKernel, {**MINIBATCH, "friction": 0.3}, run),
    Target(
        "MCMC of super-chains",
        pe.MCMC,
        {
            "kernel": pe.LangevinKernel(real_model),
            "num_samples": 2,
            "warmup_steps": 2,
            "num_chains": 4,
            "num_superchains": 2,
            "chain_method": "vectorized",
            "initial_params": None,
            "thinning": 1,
            "distributed": False,
            "disable_progbar": True,
        },
        sampled,
    ),
    Target(
        "run_until",
        until,
        {"ess": 2.0, "rhat": 3.0, "max_draws": 4, "max_seconds": None, "names": None},
    ),
    Target(
        "nested_r_hat",
        lambda **k: nested_r_hat(torch.zeros(4, 3), **k),
        {"num_superchains": 2},
    ),
    Target(
        "init_to_guide",
        mcmc.init_to_guide,
        {"guide": real_model, "fallback": None},
        started,
        positional=("guide",),
    ),
    Target(
        "init_to_draws",
        mcmc.init_to_draws,
        {"source": earlier(), "fallback": None},
        started,
    ),
    Target(
        "init_to_pathfinder",
        mcmc.init_to_pathfinder,
        {
            "model": real_model,
            "num_paths": 2,
            "num_draws": 30,
            "max_iterations": 3,
            "max_plate_nesting": None,
            "fallback": None,
        },
        started,
        positional=("model",),
    ),
]


def evidence_model(**kwargs: Any) -> Tensor:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(x, 1.0).expand([4]).to_event(1), obs=Y)


def wide() -> None:
    pyro.sample("x", dist.Normal(0.5, 1.5))


def evidence(method: str, **good: Any) -> Target:
    good = {"model": evidence_model, "method": method, "disable_progbar": True, **good}
    good |= {"kwargs": None, "shared_improper": (), "max_plate_nesting": None}
    return Target(f"log_evidence {method}", pe.log_evidence, good, positional=("model",))


def result(value: float) -> Any:
    return EvidenceEstimate(torch.tensor(value), torch.tensor(0.01), "bridge")


EVIDENCE = [
    evidence("bridge", draws={"x": torch.randn(4, 20)}, num_samples=50, keep_discrete=None),
    evidence(
        "ais", num_chains=10, num_steps=1, betas=[0.0, 1.0], kernel=None, guide=None, draws=None
    ),
    evidence("ais", num_chains=10, num_temperatures=3, exact_draws=False),
    evidence("importance", num_samples=50, guide=wide, distributed=False),
    evidence("smc", num_particles=12, num_steps=1, ess_drop=0.3),
    Target(
        "compare_evidence",
        pe.compare_evidence,
        {"results": {"a": result(-3.0), "b": result(-4.0)}, "prior_probabilities": None},
    ),
    Target(
        "SMC",
        pe.SMC,
        {
            "model": evidence_model,
            "kernel": None,
            "num_particles": 12,
            "guide": None,
            "num_moves": 1,
            "ess_drop": 0.5,
            "shared_improper": (),
            "disable_progbar": True,
            "checkpoint_every": 5,
            "check_convergence": True,
            "distributed": False,
        },
        sampled,
    ),
]
