"""Which method for which energy, exact ones, and arguments that will not do."""

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import LangevinKernel, UnnormalizedEnergy
from pyro_ebm.distributions import RBM, GaussianRBM, spin
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.distributions.boltzmann.potts import Potts
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.normalizer import estimate as module
from pyro_ebm.normalizer import estimate_log_normalizer
from pyro_ebm.normalizer.estimate import TAKES
from tests.normalizer.targets import DOUBLE_WELL, assert_agrees, gaussian, wells

NORMAL = UnnormalizedEnergy(lambda x: x**2 / 2)


def bits(count, batch_shape=(), **kwargs):
    return UnnormalizedEnergy(
        lambda x: x.sum(-1), (count,), constraints.boolean, batch_shape, **kwargs
    )


EXACT = {
    "ising": (BoltzmannMachine(0.4406868, edges=lattice_edges(4, 4)), 15.521916),
    "potts": (Potts(1.005052, edges=lattice_edges(4, 4), num_states=3), 34.172593),
    "bits": (bits(10), 10 * math.log(1 + math.exp(-1))),
    "batch": (bits(10, (2, 3)), 10 * math.log(1 + math.exp(-1))),
    "spins": (
        UnnormalizedEnergy(lambda x: x.sum(-1), (8,), spin),
        8 * math.log(2 * math.cosh(1.0)),
    ),
    "levels": (
        UnnormalizedEnergy(lambda x: 1.0 * x, support=constraints.integer_interval(0, 3)),
        math.log(sum(math.exp(-i) for i in range(4))),
    ),
    "one-hot": (
        UnnormalizedEnergy(lambda x: x[..., 0].sum(-1), (4, 3), constraints.one_hot),
        4 * math.log(2 + math.exp(-1)),
    ),
    "base": (
        UnnormalizedEnergy(lambda x: x.sum(-1), base=dist.Bernoulli(0.3).expand([6]).to_event(1)),
        6 * math.log(0.7 + 0.3 * math.exp(-1)),
    ),
    "family": (ExponentialFamily.gaussian(1.0, 2.0), None),
}


@pytest.mark.parametrize("method", [None, "exact"])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, method):
    p, log_z = EXACT[name]
    estimate = estimate_log_normalizer(p, method)
    assert estimate.method == "exact"
    assert estimate.value.shape == p.batch_shape
    want = p.log_normalizer if log_z is None else torch.tensor(log_z).expand(p.batch_shape)
    assert torch.allclose(estimate.value, want, rtol=1e-5)
    assert not estimate.std_error.any()
    assert estimate.lower is estimate.upper is estimate.value
    assert not estimate.value.requires_grad


def test_quadrature_and_its_choice():
    estimate = estimate_log_normalizer(wells(1))
    assert estimate.method == "quadrature"
    assert abs(estimate.value - DOUBLE_WELL) < 1e-4
    scale = torch.tensor([1.0, 3.0])
    p = UnnormalizedEnergy(lambda x: (x / scale) ** 2 / 2, batch_shape=(2,))
    value = estimate_log_normalizer(p).value
    assert torch.allclose(value, (2 * math.pi * scale**2).log() / 2)


@pytest.mark.parametrize(
    ("p", "given", "method"),
    [
        (NORMAL, {}, "quadrature"),
        (NORMAL, {"num_chains": 50}, "ais"),
        (NORMAL, {"kernel": LangevinKernel()}, "ais"),
        (bits(5), {"num_chains": 50}, "ais"),
        (bits(25), {}, "ais"),
        (RBM(torch.zeros(30, 5), torch.zeros(30), torch.zeros(5)), {}, "exact"),
        (RBM(torch.zeros(5, 30), torch.zeros(5), torch.zeros(30)), {}, "exact"),
        (RBM(torch.zeros(30, 30), torch.zeros(30), torch.zeros(30)), {}, "ais"),
        (GaussianRBM(torch.zeros(30, 5), torch.zeros(30), torch.zeros(5)), {}, "exact"),
        (BoltzmannMachine(0.1, edges=lattice_edges(6, 6)), {}, "exact"),
        (BoltzmannMachine(0.1, edges=lattice_edges(7, 7)), {}, "ais"),
        (gaussian(3, 1.0)[0], {}, "ais"),
        (
            UnnormalizedEnergy(lambda x: x[..., 0], (3,), constraints.simplex),
            {},
            "quadrature",
        ),
    ],
)
def test_the_method_is_chosen_by_energy_and_arguments(p, given, method, monkeypatch):
    def run(p, *args, **kwargs):  # the long ones
        return module._certain(p, torch.tensor(0.0), args[0] if args else "quadrature")

    monkeypatch.setattr(module, "quadrature", run)
    monkeypatch.setattr(module, "annealed", run)
    assert estimate_log_normalizer(p, **given).method == method


def test_every_argument_belongs_to_a_method():
    names = set(inspect.signature(estimate_log_normalizer).parameters)
    assert names - {"p", "method", "disable_progbar"} == set.union(*TAKES.values())


def test_the_estimate_is_used_in_a_model():
    estimate = estimate_log_normalizer(NORMAL)

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", NORMAL.normalized(estimate), obs=x)
        return scale

    trace = pyro.poutine.trace(model).get_trace(torch.zeros(3))
    trace.compute_log_prob()
    want = -torch.full((3,), math.log(2 * math.pi) / 2)
    assert torch.allclose(trace.nodes["x"]["log_prob"], want)


def test_an_energy_with_parameters_keeps_no_graph():
    precision = torch.nn.Parameter(torch.tensor(4.0))
    p = UnnormalizedEnergy(lambda x: precision * x.square().sum(-1) / 2, event_shape=(2,))
    for method, given in {
        "quadrature": {},
        "ais": {"num_chains": 200},
        "importance": {"proposal": dist.Normal(torch.zeros(2), 1.0).to_event(1)},
        "bridge": {"num_samples": 500},
    }.items():
        estimate = estimate_log_normalizer(p, method, **given)
        assert not estimate.value.requires_grad
        assert precision.grad is None
        if method != "quadrature":
            assert_agrees(estimate, math.log(2 * math.pi / 4))


SAMPLES = torch.randn(10)


@pytest.mark.parametrize(
    ("p", "method", "given", "message"),
    [
        (NORMAL, "annealing", {}, r"method must be one of \['exact'"),
        (NORMAL, "exact", {}, 'method="quadrature" in one or two'),
        (bits(40), "exact", {}, r"2\^40 states"),
        (bits(40), "quadrature", {}, "is discrete"),
        (gaussian(3, 1.0)[0], "quadrature", {}, "one or two unconstrained dimensions"),
        (NORMAL, "importance", {"betas": [0, 1]}, r"does not take \['betas'\]"),
        (NORMAL, "exact", {"num_chains": 5}, "does not take"),
        (NORMAL, "reverse_ais", {}, "give samples="),
        (NORMAL, "ais", {"betas": [0, 1], "ess_drop": 0.1}, "one of"),
        (NORMAL, "ais", {"betas": [0.0, 0.5]}, "must rise from 0"),
        (NORMAL, "ais", {"ess_drop": 1.5}, r"ess_drop must lie in \(0, 1\)"),
        (NORMAL, "ais", {"num_chains": 0}, "num_chains must be an integer of at least 1"),
        (NORMAL, "ais", {"num_steps": 1.5}, "num_steps must be an integer"),
        (NORMAL, "ais", {"num_temperatures": 1}, "at least 2"),
        (NORMAL, "importance", {"num_samples": True}, "num_samples must be"),
        (NORMAL, "ais", {"samples": SAMPLES[:1]}, "two or more points"),
        (NORMAL, "ais", {"samples": [0.0, 1.0]}, "got list"),
        (NORMAL, "ais", {"samples": torch.randn(10, 2)}, r"shape \(n,\), got \(10, 2\)"),
        (NORMAL, "ais", {"samples": SAMPLES / 0}, "leave the support|density is 0"),
        (bits(2), "bridge", {"samples": torch.randn(10, 2)}, "leave the support"),
        (
            UnnormalizedEnergy(lambda x: torch.where(x > 0, x, torch.inf)),
            "reverse_ais",
            {"samples": torch.tensor([-1.0, 1.0])},
            "at 50% of the samples the density is 0",
        ),
        (NORMAL.expand([3]).to_event(1), None, {}, "an energy inside Independent"),
        (dist.Normal(0.0, 1.0), None, {}, "must be an UnnormalizedEnergy, got Normal"),
    ],
)
def test_arguments_that_will_not_do(p, method, given, message):
    with pytest.raises(ValueError, match=message):
        estimate_log_normalizer(p, method, **given)
