"""More of what random arguments are given to: losses, estimates, functions, files."""

import tempfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_ebm as pe
from pyro_ebm import losses, ops
from pyro_ebm.losses import gaussian_noise
from tests.properties.targets import (
    DISTRIBUTIONS,
    KERNELS,
    MACHINE,
    Target,
    gaussian,
    half_square,
    levels,
    look,
)
from tests.properties.targets_of_models import CHAINS, EVIDENCE

# -- losses ------------------------------------------------------------------------------------


def fit(loss: Any) -> Any:
    net = nn.Linear(2, 1)
    log_z = nn.Parameter(torch.zeros(()))

    def model() -> None:
        p = pe.UnnormalizedEnergy(
            lambda x: net(x).squeeze(-1) + half_square(x), (2,), log_normalizer=log_z
        )
        with pyro.plate("data", 4):
            pyro.sample("x", p, obs=torch.linspace(-1.0, 1.0, 8).reshape(4, 2))

    def guide() -> None:
        if loss.needs_noise:
            with pyro.plate("data", 4):
                pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))

    value = loss(model, guide)()
    if value.requires_grad:
        value.backward()
    return value


def fit_bits(loss: Any) -> Any:
    weight = nn.Parameter(torch.ones(()))

    def model() -> None:
        with pyro.plate("data", 4):
            x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
            p = pe.UnnormalizedEnergy(lambda x: weight * x.prod(-1), (2,), dist.constraints.boolean)
            pyro.sample("x", p, obs=x)

    value = loss(model, lambda: None)()
    value.backward()
    return value


SPIN_ROWS = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])


def composite_model(x: Any) -> None:
    J = pyro.sample("J", dist.Normal(0.0, 1.0))
    p = pe.BoltzmannMachine(J, edges=torch.tensor([[0, 1]]))
    with pyro.plate("data", 4):
        pyro.sample("x", pe.pseudolikelihood(p), obs=x)


def fit_levels(loss: Any) -> Any:
    scale = nn.Parameter(torch.ones(()))

    def model() -> None:
        with pyro.plate("data", 4):
            x = torch.linspace(-1.0, 1.0, 8).reshape(4, 2)
            pyro.sample("x", levels(lambda x: scale * half_square(x)), obs=x)

    value = loss(model, lambda: None)()
    value.backward()
    return value


def in_a_loop(checkpoint: Any = None, **kwargs: Any) -> Any:
    """``fit``, with files in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(checkpoint, str) and checkpoint:
            checkpoint = Path(folder) / checkpoint
        return pe.fit(checkpoint=checkpoint, **kwargs)


def batch_model(x: Any) -> None:
    width = pyro.param("width", torch.tensor(2.0))
    p = pe.UnnormalizedEnergy(lambda x: half_square(x) / width**2, (2,))
    x = x.reshape(len(x), -1)[:, :1].float().expand(-1, 2)
    with pyro.plate("data", len(x)):
        pyro.sample("x", p, obs=x)


LOOP = Target(
    "fit",
    in_a_loop,
    {
        "model": batch_model,
        "guide": lambda x: None,
        "loss": losses.ScoreMatching(),
        "data": torch.randn(4, 2),
        "num_steps": 1,
        "batch_size": 2,
        "num_epochs": None,
        "shuffle": True,
        "optim": None,
        "lr": 0.1,
        "schedule": None,
        "clip_norm": 1.0,
        "average": 0.9,
        "metric": lambda: 1.0,
        "metric_every": 1,
        "patience": 1,
        "checkpoint": "fit.ckpt",
        "checkpoint_every": 1,
        "resume": False,
        "callbacks": [],
        "distributed": False,
        "disable_progbar": True,
    },
)

PARTICLES = {"num_particles": 1}
NOISE = {**PARTICLES, "noise_ratio": 2}
LOSSES = [
    Target(
        "ContrastiveDivergence",
        losses.ContrastiveDivergence,
        {
            **PARTICLES,
            "kernel": None,
            "num_steps": 1,
            "persistent": True,
            "num_chains": 3,
            "restart_prob": 0.1,
            "energy_penalty": 0.1,
            "augmentation": None,
            "chains_by": None,
            "kl_weight": 0.1,
            "monitor": None,
            "monitor_every": 10,
        },
        fit,
    ),
    Target(
        "ScoreMatching",
        losses.ScoreMatching,
        {**PARTICLES, "method": "hutchinson", "num_projections": 1, "distribution": "gaussian"},
        fit,
    ),
    Target(
        "SlicedScoreMatching",
        losses.SlicedScoreMatching,
        {**PARTICLES, "num_projections": 1, "distribution": "sphere"},
        fit,
    ),
    Target(
        "DenoisingScoreMatching", losses.DenoisingScoreMatching, {**PARTICLES, "sigma": 0.1}, fit
    ),
    Target(
        "EnergyDiscrepancy",
        losses.EnergyDiscrepancy,
        {**PARTICLES, "time": 0.1, "num_samples": 2, "stabilization": 1.0},
        fit,
    ),
    Target(
        "PseudoLikelihood",
        losses.PseudoLikelihood,
        {**PARTICLES, "blocks": [[0], [1]], "subsample_size": 1},
        fit_bits,
    ),
    Target(
        "DenoisingScoreMatching of levels",
        losses.DenoisingScoreMatching,
        {"sigma": None, "dual": True, "control_variate": True},
        fit_levels,
    ),
    Target(
        "RecoveryLikelihood",
        losses.RecoveryLikelihood,
        {**PARTICLES, "kernel": None, "num_steps": 1, "energy_penalty": 0.1},
        fit_levels,
    ),
    Target(
        "CooperativeTraining",
        losses.CooperativeTraining,
        {**PARTICLES, "kernel": None, "num_steps": 1, "energy_penalty": 0.1},
        fit,
    ),
    Target("NCE", losses.NCE, NOISE, fit),
    Target("RankingNCE", losses.RankingNCE, NOISE, fit),
    Target(
        "FlowNCE",
        losses.FlowNCE,
        {
            **NOISE,
            "alternate": None,
            "threshold": 0.6,
            "smoothing": 0.9,
            "broad_noise": None,
            "broad_weight": 0.1,
        },
        fit,
    ),
    Target("gaussian_noise", gaussian_noise, {"data": torch.randn(9, 2), "width": 1.5}, look),
]


# -- estimates, functions, files ------------------------------------------------------------------


def estimate(method: str | None, **good: Any) -> Target:
    p = pe.UnnormalizedEnergy(half_square, (2,), base=dist.Normal(torch.zeros(2), 1.0).to_event(1))
    good = {"p": p, "method": method, "disable_progbar": True, **good}
    return Target(f"estimate_log_normalizer {method}", pe.estimate_log_normalizer, good)


def saved(path: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path if isinstance(path, str) and path else path
        pe.save_training(file)
        return pe.load_training(file)


NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)
FUNCTIONS = [
    Target(
        "estimate_log_normalizer exact",
        pe.estimate_log_normalizer,
        {"p": pe.RBM(**MACHINE), "method": "exact", "max_units": 10},
    ),
    estimate("quadrature"),
    estimate("importance", proposal=NORMAL, num_samples=50),
    estimate(
        "ais",
        proposal=NORMAL,
        num_chains=10,
        num_steps=1,
        num_temperatures=5,
        kernel=None,
        path=None,
    ),
    estimate("ais", betas=[0.0, 0.5, 1.0], num_chains=5, samples=None),
    estimate("ais", ess_drop=0.3, num_chains=5),
    estimate("bridge", proposal=NORMAL, samples=torch.randn(50, 2), num_samples=50),
    Target(
        "mean_log_likelihood",
        pe.mean_log_likelihood,
        {"p": gaussian(), "data": torch.randn(5, 2), "estimate": 1.8},
    ),
    Target(
        "pseudolikelihood",
        pe.pseudolikelihood,
        {"p": pe.RBM(**MACHINE), "blocks": [[0, 1]]},
        lambda fn: fn.log_prob(torch.zeros(fn.event_shape)),
    ),
    Target(
        "curvature_adjustment",
        lambda **k: pe.curvature_adjustment(composite_model, (SPIN_ROWS,), **k),
        {"plate": None, "num_simulations": 20},
    ),
    Target("ops.score", ops.score, {"p": gaussian(), "x": torch.zeros(3, 2)}),
    Target(
        "fisher_divergence",
        pe.fisher_divergence,
        {"p": gaussian(), "q": NORMAL, "x": torch.zeros(3, 2), "event_dim": 1},
    ),
    Target(
        "log_integral",
        ops.log_integral,
        {"log_f": lambda z: -z.square().sum(-1), "dim": 1, "rtol": None},
    ),
    Target("save_training", saved, {"path": "a.pt"}),
]

TARGETS = [*KERNELS, *DISTRIBUTIONS, *LOSSES, LOOP, *FUNCTIONS, *CHAINS, *EVIDENCE]
