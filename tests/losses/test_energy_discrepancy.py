"""Energy discrepancy: its objective by quadrature and enumeration, its two limits, its refusals."""

import itertools
import math

import numpy
import pyro
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.distributions.core.discrete import spin
from pyro_ebm.losses import EnergyDiscrepancy, ScoreMatching
from tests.statistics import assert_mean_of_rows

PRECISION = 1.5
GROUPS = 50


def no_guide(x):
    pass


def model_of(energy, start, **kwargs):
    def model(x):
        t = pyro.param("t", torch.as_tensor(start).detach().clone().double())
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: energy(t, x), x.shape[1:], **kwargs)
            pyro.sample("x", p, obs=x)

    return model


def gaussian(t, x):
    return t * x**2 / 2


def gradients(loss, model, x, rows):
    """The gradient in ``t`` at one point, each the mean over so many rows, ``(groups, d)``."""
    found = []
    for _ in range(GROUPS):
        if "t" in pyro.get_param_store():
            pyro.param("t").grad = None
        loss.loss_and_grads(model, no_guide, x.expand(rows, *x.shape))
        found.append(pyro.param("t").grad / rows)
    return torch.stack(found)


def closed_form(precision, square, time):
    r"""The slope in :math:`\lambda` of E(x) - U_t(y), of :math:`E = \lambda x^2 / 2`, given x^2.

    As the integral of N(y; x', t) exp(-E(x')) is (1 + lam t)^(-1/2) exp(-lam y^2 / 2(1 + lam t)).
    """
    shrunk = 1 + precision * time
    return square / 2 - (square + time) / (2 * shrunk**2) - time / (2 * shrunk)


@pytest.mark.parametrize("stabilization", [0.0, 0.7])
def test_the_gradient_is_that_of_quadrature(stabilization):
    # over the noise of the way out and of two ways back, 40^3 nodes
    x, time = torch.tensor(0.8).double(), 0.5
    nodes, weights = map(torch.tensor, numpy.polynomial.hermite_e.hermegauss(40))
    away, one, two = (math.sqrt(time) * z for z in torch.meshgrid(*[nodes] * 3, indexing="ij"))
    weight = weights[:, None, None] * weights[:, None] * weights / (2 * math.pi) ** 1.5
    t = torch.tensor([PRECISION, 0.3]).double().requires_grad_()

    def energy(t, x):
        return t[0] * x**2 / 2 + t[1] * x**3 / (1 + x**2)

    ratios = [(energy(t, x) - energy(t, x + away + back)).exp() for back in (one, two)]
    objective = (weight * ((stabilization + sum(ratios)) / 2).log()).sum()
    (want,) = torch.autograd.grad(objective, t)
    loss = EnergyDiscrepancy(time, 2, stabilization)
    assert_mean_of_rows(gradients(loss, model_of(energy, t), x, 4000), want)


@pytest.mark.parametrize("time", [0.05, 1.0, 10.0])
def test_many_points_give_the_discrepancy_itself(time):
    x = torch.tensor(0.8).double()
    loss = EnergyDiscrepancy(time, 4000, 0.0)
    found = gradients(loss, model_of(gaussian, PRECISION), x, 40)
    assert_mean_of_rows(found, closed_form(PRECISION, x**2, time))


def test_short_times_are_score_matching_and_long_ones_maximum_likelihood():
    x = torch.linspace(-1.0, 2.0, 7).double()
    ScoreMatching().loss_and_grads(model_of(gaussian, PRECISION), no_guide, x)
    squares = x.square()
    short = closed_form(PRECISION, squares, 1e-6) / 1e-6
    assert pyro.param("t").grad == pytest.approx(float(short.sum()), rel=1e-4)
    long = closed_form(PRECISION, squares, 1e8)
    torch.testing.assert_close(long, (squares - 1 / PRECISION) / 2)


@pytest.mark.parametrize("time", [0.3, math.inf])
def test_flips_of_bits_are_enumerated(time):
    x = torch.tensor([1.0, 0.0]).double()
    flip = (1 - math.exp(-2 * time)) / 2

    def energy(t, x):
        return t[0] * x[..., 0] + t[1] * x.prod(-1) - x[..., 1]

    def moved(point):  # from a point: where to, and with what probability
        for flips in itertools.product((0, 1), repeat=2):
            there = torch.where(torch.tensor(flips) == 1, 1 - point, point)
            yield there, math.prod(flip if f else 1 - flip for f in flips)

    t = torch.tensor([0.5, -1.5]).double().requires_grad_()
    objective = 0.0
    for away, p in moved(x):
        for (one, p_one), (two, p_two) in itertools.product(moved(away), repeat=2):
            ratios = [(energy(t, x) - energy(t, back)).exp() for back in (one, two)]
            objective = objective + p * p_one * p_two * ((1.0 + sum(ratios)) / 2).log()
    (want,) = torch.autograd.grad(objective, t)
    model = model_of(energy, t, support=constraints.boolean)
    assert_mean_of_rows(gradients(EnergyDiscrepancy(time, 2), model, x, 4000), want)


def test_spins_flip_as_bits_do():
    found = {}
    for support, of_bits in ((constraints.boolean, lambda x: x), (spin, lambda s: (s + 1) / 2)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = model_of(lambda t, x, of_bits=of_bits: t * of_bits(x), 0.5, support=support)
        x = torch.tensor([0.0, 1.0, 1.0])
        x = x if support is constraints.boolean else 2 * x - 1
        EnergyDiscrepancy().loss_and_grads(model, no_guide, x)
        found[support] = pyro.param("t").grad
    torch.testing.assert_close(found[spin], found[constraints.boolean])


def test_data_that_are_integers_or_truths_flip_too():
    for dtype in (torch.long, torch.bool):
        pyro.clear_param_store()
        x = torch.tensor([0, 1, 1]).to(dtype)
        model = model_of(lambda t, x: t * x, 0.5, support=constraints.boolean)
        EnergyDiscrepancy().loss_and_grads(model, no_guide, x)
        assert pyro.param("t").grad.isfinite()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"time": 0.0}, "time must be positive, got 0.0"),
        ({"time": math.nan}, "time must be positive"),
        ({"time": "1"}, "time must be a number"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"stabilization": -1.0}, "stabilization must be finite and >= 0, got -1.0"),
        ({"stabilization": math.inf}, "stabilization must be finite"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EnergyDiscrepancy(**kwargs)


@pytest.mark.parametrize("support", [constraints.positive, constraints.unit_interval])
def test_other_supports_are_refused(support):
    model = model_of(gaussian, 1.0, support=support)
    with pytest.raises(ValueError, match=r"'x': a diffusion would leave the support"):
        EnergyDiscrepancy().loss_and_grads(model, no_guide, torch.rand(4).double())


def test_an_infinite_time_is_for_bits():
    with pytest.raises(ValueError, match=r"'x': an infinite time is for data of two values"):
        EnergyDiscrepancy(math.inf).loss_and_grads(model_of(gaussian, 1.0), no_guide, torch.ones(2))
