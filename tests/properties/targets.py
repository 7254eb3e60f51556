"""What random arguments are given to, with good ones: kernels and distributions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_ebm as pe
from pyro_ebm import mcmc
from pyro_ebm.distributions import GaussianRBMModule, JointRBM, RBMModule, flow, lattice_edges
from pyro_ebm.nn import ConvEnergy, MLPEnergy

SPINS = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


@dataclass(frozen=True)
class Target:
    """A callable, arguments that it takes, and what to do with what it returns."""

    name: str
    call: Callable[..., Any]
    good: dict[str, Any] = field(default_factory=dict)
    """Every argument to be replaced, at a value of which it works."""
    use: Callable[[Any], Any] = lambda made: made
    positional: tuple[str, ...] = ()

    def __call__(self, **changed: Any) -> Any:
        """Calls it with these arguments instead of the good ones."""
        arguments = {**self.good, **changed}
        return self.use(self.call(*[arguments.pop(name) for name in self.positional], **arguments))

    def __repr__(self) -> str:
        return self.name


# -- kernels -----------------------------------------------------------------------------------


def real_model() -> Tensor:
    return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def spin_model() -> Tensor:
    return pyro.sample("s", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))


def run(kernel: Any) -> Any:
    sampler = pe.MCMC(kernel, 2, 2, num_chains=2, disable_progbar=True)
    sampler.run()
    return sampler.get_samples()


def run_proposal(proposal: Any) -> Any:
    return run(pe.MHKernel(real_model, proposal=proposal))


def sampled(sampler: Any) -> Any:
    sampler.run()
    return sampler.get_samples()


BASE = {
    "target_accept_prob": 0.5,
    "jit_compile": False,
    "max_plate_nesting": None,
    "init_strategy": pyro.infer.autoguide.initialization.init_to_uniform,
}
DYNAMIC = {
    **BASE,
    "model": real_model,
    "adapt_step_size": True,
    "adapt_mass_matrix": True,
    "full_mass": False,
    "transforms": None,
}
SPIN = {
    "model": spin_model,
    "jit_compile": False,
    "max_plate_nesting": None,
    "init_strategy": BASE["init_strategy"],
}
KERNELS = [
    Target(
        "LangevinKernel",
        pe.LangevinKernel,
        {**DYNAMIC, "step_size": 0.1, "temperature": 1.0, "adjusted": True},
        run,
    ),
    Target("BarkerKernel", pe.BarkerKernel, {**DYNAMIC, "step_size": 0.1, "spread": 1.0}, run),
    Target(
        "ChEESKernel",
        pe.ChEESKernel,
        {**DYNAMIC, "step_size": 0.1, "trajectory_length": 2.0, "adapt_trajectory_length": True},
        run,
    ),
    Target("MHKernel", pe.MHKernel, {**DYNAMIC, "proposal": None}, run),
    Target("GibbsKernel", pe.GibbsKernel, SPIN, run),
    Target("GibbsWithGradientsKernel", pe.GibbsWithGradientsKernel, SPIN, run),
    Target(
        "DiscreteLangevinKernel",
        pe.DiscreteLangevinKernel,
        {**SPIN, "step_size": 0.2, "adjusted": True, "target_accept_prob": 0.5},
        run,
    ),
    Target(
        "CompositeKernel",
        pe.CompositeKernel,
        {"model": real_model, "kernels": [pe.LangevinKernel()], "transforms": None},
        run,
    ),
    Target(
        "TemperingKernel",
        pe.TemperingKernel,
        {"kernel": pe.LangevinKernel(real_model), "betas": [1.0, 0.5]},
        run,
    ),
    Target(
        "FlowKernel",
        pe.FlowKernel,
        {"kernel": pe.LangevinKernel(real_model), "flow": None, "num_fit_steps": 2, "lr": 0.01},
        run,
    ),
    Target(
        "geometric_betas",
        mcmc.geometric_betas,
        {"lowest": 0.1, "num_replicas": 3},
    ),
    Target(
        "RandomWalk",
        mcmc.RandomWalk,
        {"scale": 0.5},
        lambda w: run(pe.MHKernel(real_model, proposal=w)),
    ),
    Target(
        "Independence",
        mcmc.Independence,
        {"distribution": dist.Normal(torch.zeros(2), 1.5).to_event(1)},
        run_proposal,
    ),
    Target(
        "MCMC",
        pe.MCMC,
        {
            "kernel": pe.LangevinKernel(real_model),
            "num_samples": 3,
            "warmup_steps": 2,
            "num_chains": 2,
            "thinning": 1,
            "chain_method": "vectorized",
            "initial_params": None,
            "hook_fn": None,
            "transforms": None,
            "save_params": None,
            "save_warmup": False,
            "draws_device": None,
            "disable_progbar": True,
            "checkpoint_every": 5,
            "check_convergence": False,
        },
        sampled,
    ),
    Target(
        "ModelPotential",
        mcmc.ModelPotential,
        {"model": real_model, "transforms": None},
        lambda potential: potential(potential.initial(3)),
    ),
]


# -- distributions -----------------------------------------------------------------------------


def half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1) / 2


def gaussian(**arguments: Any) -> pe.UnnormalizedEnergy:
    return pe.UnnormalizedEnergy(half_square, (2,), **arguments)


def levels(energy: Any) -> pe.UnnormalizedEnergy:
    return pe.noise_conditional(
        lambda x, sigma: energy(x) / (1 + sigma**2), [1.0, 0.5], event_shape=(2,)
    )


def look(p: Any) -> Any:
    x = p.sample((3,))
    return x, p.log_prob(x), repr(p), p.expand((2, *p.batch_shape))


SQUARE = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
MACHINE = {
    "weights": torch.ones(2, 3),
    "visible_bias": torch.zeros(2),
    "hidden_bias": torch.zeros(3),
}
DISTRIBUTIONS = [
    Target(
        "UnnormalizedEnergy",
        pe.UnnormalizedEnergy,
        {
            "energy": half_square,
            "event_shape": (2,),
            "support": None,
            "batch_shape": None,
            "base": None,
            "log_normalizer": None,
            "kernel": None,
            "num_steps": 4,
        },
        look,
    ),
    Target("normalized", lambda **k: gaussian().normalized(**k), {"log_normalizer": 1.8}, look),
    Target(
        "noise_conditional",
        pe.noise_conditional,
        {
            "energy": lambda x, sigma: half_square(x) / (1 + sigma**2),
            "sigmas": [1.0, 0.5],
            "event_shape": (2,),
            "base": None,
            "batch_shape": None,
        },
        look,
    ),
    Target("at", lambda **k: levels(half_square).at(**k), {"sigma": 0.5}, look),
    Target(
        "geometric_ladder",
        pe.geometric_ladder,
        {"largest": 2.0, "smallest": 0.5, "num_levels": 3},
    ),
    Target(
        "annealed_langevin",
        mcmc.annealed_langevin,
        {
            "p": levels(half_square),
            "x": torch.zeros(3, 2),
            "steps_per_level": 2,
            "step_size": 0.1,
            "adjusted": False,
        },
    ),
    Target("tempered", lambda **k: gaussian().tempered(**k), {"beta": 0.5}, look),
    Target("energy", lambda **k: gaussian().energy(**k), {"x": torch.zeros(3, 2)}),
    Target("log_prob", lambda **k: gaussian().log_prob(**k), {"value": torch.zeros(3, 2)}),
    Target("score", lambda **k: gaussian().score(**k), {"x": torch.zeros(3, 2)}),
    Target("RBM", pe.RBM, MACHINE, look),
    Target("JointRBM", JointRBM, MACHINE, look),
    Target("GaussianRBM", pe.GaussianRBM, {**MACHINE, "scale": 1.0}, look),
    Target(
        "BoltzmannMachine",
        pe.BoltzmannMachine,
        {"couplings": SQUARE, "bias": torch.zeros(2), "states": "spin"},
        look,
    ),
    Target(
        "Ising",
        pe.BoltzmannMachine,
        {"couplings": 0.2, "bias": 0.0, "edges": torch.tensor([[0, 1]])},
        look,
    ),
    Target("Potts", pe.Potts, {"couplings": SQUARE, "field": None, "num_states": 3}, look),
    Target(
        "ExponentialFamily",
        pe.ExponentialFamily,
        {
            "statistic": lambda x: torch.stack([x, -x.square()], -1),
            "natural_parameters": torch.tensor([0.0, 0.5]),
            "log_base_measure": None,
            "support": dist.constraints.real,
            "event_shape": (),
            "num_steps": 4,
        },
        look,
    ),
    Target(
        "RBMModule",
        RBMModule,
        {"num_visible": 2, "num_hidden": 3, "weight_scale": 0.01},
        lambda m: m.forward,
    ),
    Target(
        "GaussianRBMModule",
        GaussianRBMModule,
        {"num_visible": 2, "num_hidden": 3, "data": torch.randn(5, 2), "weight_scale": 0.01},
    ),
    Target("DeepBeliefNetwork", pe.DeepBeliefNetwork, {"machines": [RBMModule(2, 3)]}),
    Target(
        "product",
        pe.product,
        {"a": gaussian(), "b": dist.Normal(torch.zeros(2), 1.0).to_event(1)},
        look,
        positional=("a", "b"),
    ),
    Target(
        "mixture",
        pe.mixture,
        {"weights": torch.tensor([0.5, 0.5]), "components": [gaussian(log_normalizer=1.8)] * 2},
        look,
    ),
    Target(
        "negation",
        pe.negation,
        {"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 2.0), "weight": 0.5},
        look,
    ),
    Target(
        "MLPEnergy",
        MLPEnergy,
        {"event_shape": (2,), "hidden": (4,)},
        lambda e: e(torch.zeros(3, 2)),
    ),
    Target(
        "ConvEnergy",
        ConvEnergy,
        {"image_shape": (4, 4), "channels": 2},
        lambda e: e(torch.zeros(3, 4, 4)),
    ),
    Target("lattice_edges", lattice_edges, {"n": 3, "periodic": True}, positional=("n",)),
    Target(
        "neural_spline_flow",
        flow.neural_spline_flow,
        {"features": 2, "context": 0, "transforms": 1, "hidden_features": (4,)},
    ),
    Target(
        "fit_flow",
        flow.fit_flow,
        {
            "flow": flow.neural_spline_flow(2, transforms=1, hidden_features=(4,)),
            "data": torch.randn(10, 2),
            "num_steps": 2,
            "batch_size": 4,
            "lr": 1e-3,
            "disable_progbar": True,
        },
    ),
]
