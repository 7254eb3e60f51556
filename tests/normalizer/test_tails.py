"""Densities without a finite Z are told by their tails, and heavy tails with one are not."""

import warnings

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy, estimate_log_normalizer
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer import UnreliableEstimateWarning
from pyro_ebm.normalizer.estimate_result import estimate_of
from pyro_ebm.normalizer.tails import warn_if_improper


def power(n):
    """``(1 + |x|^2)^(-n / 2)``, which falls like ``|x|^-n``."""
    return lambda x: n / 2 * (1 + x.square().sum(-1)).log()


POSITIVE, UNIT = constraints.positive, constraints.unit_interval
IMPROPER = {
    "power 1": (lambda x: (1 + x**2).log() / 2, (), None, r"at large values .*\^-1"),
    "power .5": (lambda x: (1 + x**2).log() / 4, (), None, "-0.5"),
    "one side": (lambda x: torch.where(x < 0, -(-x).log1p(), x).abs(), (), None, "far negative"),
    "flat in y": (lambda x: x[..., 0] ** 2 / 2, (2,), None, r"goes like .x.\^-?0"),
    "power 2 in 2-d": (power(2.0), (2,), None, "in 2 dimensions"),
    "power 49.5 in 50-d": (power(49.5), (50,), None, "in 50 dimensions"),
    "1 / x": (torch.log, (), POSITIVE, "towards the .* end"),
    "1 / x at 0": (lambda x: x.log() + x, (), POSITIVE, "towards the lower end"),
    "1 / x far out": (lambda x: x.log1p(), (), POSITIVE, "towards the upper end"),
    "1 / x on (0, 1)": (torch.log, (), UNIT, "towards the lower end"),
    "differences": (lambda x: x.diff().square().sum(-1), (2,), None, "move together"),
    "differences in 10-d": (lambda x: x.diff().square().sum(-1), (10,), None, "move together"),
    "rises": (lambda x: -x.abs(), (), None, "finite Z"),
}
PROPER = {
    "normal": (lambda x: x**2 / 2 + 1e5, (), None),
    "quartic": (lambda x: x**4, (), None),
    "Laplace": (torch.abs, (), None),
    "Student 1.5": (lambda x: -dist.StudentT(1.5).log_prob(x), (), None),
    "Student .1": (lambda x: -dist.StudentT(0.1).log_prob(x), (), None),
    "Student 1.5 in 50-d": (power(51.5), (50,), None),
    "power 2.1 in 2-d": (power(2.1), (2,), None),
    "wide differences": (
        lambda x: x.diff().square().sum(-1) + 1e-3 * x.mean(-1) ** 2,
        (10,),
        None,
    ),
    "narrower far out": (lambda x: (x[..., 0] ** 3 - x[..., 1] ** 3) ** 2, (2,), None),
    "Gamma .1": (lambda x: 0.9 * x.log() + x, (), POSITIVE),
    "half Cauchy": (lambda x: (x**2).log1p(), (), POSITIVE),
    "LogNormal": (lambda x: x.log() + x.log() ** 2 / 50, (), POSITIVE),
    "Beta .1": (lambda x: 0.9 * x.log(), (), UNIT),
    "uniform": (torch.zeros_like, (), UNIT),
    "simplex": (lambda x: 0 * x.sum(-1), (3,), constraints.simplex),
    "overflows": (lambda x: x.exp() + (-x).exp(), (), None),
    "bits": (lambda x: x.sum(-1), (3,), constraints.boolean),
}


def looked_at(energy, event_shape, support):
    target = EnergyPotential(UnnormalizedEnergy(energy, event_shape, support))
    warn_if_improper(target, torch.randn(100, target.dim), "annealing")


@pytest.mark.parametrize("name", IMPROPER)
def test_what_has_no_finite_integral(name):
    *density, message = IMPROPER[name]
    with pytest.warns(UnreliableEstimateWarning, match=message):
        looked_at(*density)


@pytest.mark.parametrize("name", PROPER)
def test_heavy_tails_that_have_one(name):
    looked_at(*PROPER[name])  # warnings are errors


def test_a_diagonal_in_which_the_points_run_off():
    p = UnnormalizedEnergy(lambda x: x.sum(-1) ** 2, event_shape=(2,))
    z = torch.randn(100, 2) + 30 * torch.randn(100, 1) * torch.tensor([1.0, -1.0])
    with pytest.warns(UnreliableEstimateWarning, match="the diagonal in which the points spread"):
        warn_if_improper(EnergyPotential(p), z, "annealing")


def test_an_estimate_of_the_size_of_no_density():
    log_w = 1e13 * torch.linspace(-1.0, -0.5, 100)
    with pytest.warns(UnreliableEstimateWarning) as caught:
        estimate_of(log_w, "ais", "annealing", "anneal longer")
    assert any("a log Z of -5e+12 is that of no density" in str(w.message) for w in caught)


def test_a_batch_of_which_one_is_improper():
    df = torch.tensor([1.5, 0.0, 3.0])  # a power of df + 1
    p = UnnormalizedEnergy(lambda x: (1 + df) / 2 * (x**2).log1p(), batch_shape=(3,))
    with pytest.warns(UnreliableEstimateWarning, match="-1"):
        warn_if_improper(EnergyPotential(p), torch.randn(300, 1), "annealing")


@pytest.mark.parametrize("method", ["ais", "importance", "bridge"])
def test_an_estimate_of_an_improper_density_is_told(method):
    p = UnnormalizedEnergy(lambda x: (1 + x**2).log() / 2)
    given = {"samples": 3 * torch.randn(400)} if method == "bridge" else {"num_chains": 100}
    given = {"proposal": dist.Cauchy(0.0, 3.0)} if method == "importance" else given
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate_log_normalizer(p, method, **given)
    assert any("no finite Z" in str(warning.message) for warning in caught)


def test_an_estimate_of_a_heavy_tail_is_not():
    student = dist.StudentT(1.5)
    p = UnnormalizedEnergy(lambda x: -student.log_prob(x))
    estimates = [
        estimate_log_normalizer(p, "importance", proposal=dist.Cauchy(0.0, 1.0)),
        estimate_log_normalizer(p, "bridge", samples=student.sample((2000,))),
    ]
    for estimate in estimates:
        assert estimate.value.abs() < 4.5 * estimate.std_error
