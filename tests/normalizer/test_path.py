"""Paths lead from a known density to the target, by densities whose sweeps leave them invariant."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import RBM, GaussianRBM
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.distributions.boltzmann.potts import Potts
from pyro_ebm.mcmc import EnergyPotential
from pyro_ebm.normalizer import GeometricPath, LayersPath, TemperedPath
from pyro_ebm.normalizer.annealing.choices import path_of
from pyro_ebm.normalizer.annealing.function_path import FunctionPath
from pyro_ebm.normalizer.annealing.path import Known, Parts

DOUBLE = torch.float64


def rbm(n=5, m=3, batch=()):
    shapes = [(*batch, n, m), (*batch, n), (*batch, m)]
    return RBM(*(torch.randn(shape, dtype=DOUBLE) for shape in shapes))


def gaussian_rbm(n=4, m=3, batch=()):
    shapes = [(*batch, n, m), (*batch, n), (*batch, m)]
    scale = torch.rand((*batch, n), dtype=DOUBLE) + 0.5
    return GaussianRBM(*(torch.randn(shape, dtype=DOUBLE) for shape in shapes), scale=scale)


MODELS = {
    "geometric": lambda: UnnormalizedEnergy(
        lambda x: (x**4).sum(-1), (3,), base=dist.Normal(torch.zeros(3).double(), 2.0).to_event(1)
    ),
    "positive": lambda: UnnormalizedEnergy(
        lambda x: (x**2).sum(-1),
        (3,),
        constraints.positive,
        base=dist.Exponential(torch.ones(3).double()).to_event(1),
    ),
    "fitted": lambda: UnnormalizedEnergy(lambda x: (x**4).sum(-1), (3,), batch_shape=(2,)),
    "ising": lambda: BoltzmannMachine(torch.tensor(0.3).double(), edges=lattice_edges(2, 3)),
    "potts": lambda: Potts(0.5, torch.randn(4, 3, dtype=DOUBLE), edges=lattice_edges(4)),
    "bits": lambda: UnnormalizedEnergy(
        lambda x: x[..., 0] * x[..., 1], (3,), constraints.boolean, batch_shape=(2,)
    ),
    "rbm": rbm,
    "rbms": lambda: rbm(batch=(2,)),
    "gaussian_rbm": gaussian_rbm,
    "gaussian_rbms": lambda: gaussian_rbm(batch=(2,)),
}

KINDS = {
    "geometric": GeometricPath,
    "positive": GeometricPath,
    "fitted": GeometricPath,
    "ising": TemperedPath,
    "potts": TemperedPath,
    "bits": TemperedPath,
    **dict.fromkeys(["rbm", "rbms", "gaussian_rbm", "gaussian_rbms"], LayersPath),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_path_ends_at_the_target(name):
    p = MODELS[name]()
    path = path_of(p)
    assert type(path) is KINDS[name]
    z = path.draw(10)
    assert z.shape == (10 * path.targets, path.dim)
    assert torch.allclose(path.at(1.0)(z), path.target(z))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_in_between_is_geometric(name):
    # of the log density given hidden units, if there are any, and so not of LayersPath
    path = path_of(MODELS[name]())
    if KINDS[name] is LayersPath:
        return
    z = path.draw(10)
    ends = path.at(0.0)(z), path.at(1.0)(z)
    assert torch.allclose(path.at(0.25)(z), 0.75 * ends[0] + 0.25 * ends[1])


@pytest.mark.parametrize("name", ["ising", "potts", "bits", "rbm", "rbms"])
def test_the_log_normalizer_of_the_start_of_discrete_paths(name):
    path = path_of(MODELS[name]())
    support_values = path.sites[0].support_values.to(path.dtype)
    count = path.dim // support_values.shape[1]
    grid = torch.cartesian_prod(*[torch.arange(len(support_values))] * count)
    states = support_values[grid].reshape(len(grid), -1).repeat_interleave(path.targets, 0)
    log_z = (-path.at(0.0)(states)).reshape(-1, path.targets).logsumexp(0)
    want = path.log_normalizer.expand(path.target.energy.batch_shape).flatten()
    assert torch.allclose(log_z, want.expand(path.targets).to(log_z))


def test_the_log_normalizer_of_the_start_of_real_units():
    # of -log p~_0 beside the normalized density of the start
    path = path_of(gaussian_rbm())
    z = path.draw(10)
    log_q = path.visible.log_prob(path.target.to_points(z))
    assert torch.allclose(-path.at(0.0)(z), log_q + path.log_normalizer)


def at_beta(machine, path, beta):
    """The machine that the path passes at beta, and what it is off by."""
    start = (1 - beta) / path.scale**2 if path.scale is not None else 1 - beta
    if isinstance(machine, RBM):
        bias = start * path.loc + beta * machine.visible_bias
        new = RBM(beta * machine.weights, bias, beta * machine.hidden_bias)
        return new, (1 - beta) * torch.nn.functional.softplus(path.loc).sum(-1)
    scale = (start + beta / machine.scale**2) ** -0.5
    bias = scale**2 * (start * path.loc + beta * machine.visible_bias / machine.scale**2)
    weights = beta * machine.weights * (scale / machine.scale)[..., None] ** 2
    return GaussianRBM(weights, bias, beta * machine.hidden_bias, scale=scale), None


@pytest.mark.parametrize("name", ["rbm", "rbms", "gaussian_rbm", "gaussian_rbms"])
@pytest.mark.parametrize("remembered", [False, True])
def test_every_density_between_is_a_machine(name, remembered):
    machine = MODELS[name]()
    path, beta = path_of(machine), 0.3
    between, constant = at_beta(machine, path, beta)
    path.at(beta)
    x = path.target.to_points(path.draw(7))
    z = path.target.to_position(x)
    gap = path(z).reshape(x.shape[:-1]) - between.energy(x)
    if constant is None:
        constant = gap[0]
    assert torch.allclose(gap, constant.expand(gap.shape))
    if remembered:
        path.here = Known(z, Parts(path.parts(z), ()))
    noise = path.gibbs_noise(z)
    swept = path.target.to_points(path.gibbs_sweep(z, noise))
    assert torch.allclose(swept, between.gibbs_sweep(x, noise))


def test_a_sweep_of_other_positions_does_not_use_what_is_remembered():
    path = path_of(rbm()).at(1.0)
    z = path.draw(7)
    path.here = Known(z, Parts(path.parts(z), ()))
    z = path.draw(7)
    noise = path.gibbs_noise(z)
    assert torch.equal(path.gibbs_sweep(z, noise), path.target.gibbs_sweep(z, noise))


def test_a_product_of_coins_is_the_start_of_a_machine():
    machine, logits = rbm(), torch.randn(5, dtype=DOUBLE)
    path = path_of(machine, dist.Bernoulli(logits=logits).to_event(1))
    assert isinstance(path, LayersPath)
    assert torch.equal(path.loc, logits)
    path = path_of(gaussian_rbm(), dist.Normal(torch.ones(4).double(), 2.0).to_event(1))
    assert isinstance(path, LayersPath)
    assert torch.equal(path.loc, torch.ones(4).double())
    other = dist.StudentT(3.0, torch.zeros(4).double()).to_event(1)
    assert isinstance(path_of(gaussian_rbm(), other), GeometricPath)


def test_the_start_is_fitted_to_draws_of_the_model():
    bias = torch.tensor([3.0, -3.0, 0.0])
    path = path_of(RBM(torch.zeros(3, 2), bias, torch.zeros(2)))
    assert torch.allclose(path.loc, bias, atol=0.7)
    mean = torch.tensor([5.0, -4.0])
    p = UnnormalizedEnergy(lambda x: ((x - mean) ** 2).sum(-1) / 2, event_shape=(2,))
    path = path_of(p)
    assert torch.allclose(path.start.mean[0], mean, atol=0.3)
    assert torch.allclose(path.start.factor[0], torch.full((2,), 1.5), atol=0.3)


def test_an_infinite_energy_is_nothing_at_the_power_0():
    p = UnnormalizedEnergy(lambda x: torch.where(x > 0, x, torch.inf))
    path = path_of(p, dist.Normal(0.0, 1.0))
    z = torch.tensor([[-1.0]])
    assert path.at(0.0)(z).isfinite()
    assert path.at(0.5)(z) == torch.inf
    value, grad = path.at(0.0).value_and_grad(z)
    assert value.isfinite()
    assert torch.allclose(grad, z)


# -- paths of the user ---------------------------------------------------------------------------


def widening(beta):
    return UnnormalizedEnergy(lambda x: x**2 / (2 + 6 * beta))


TARGET = UnnormalizedEnergy(lambda x: x**2 / 8)


def test_a_function_is_a_path():
    path = path_of(TARGET, dist.Normal(0.0, 1.0), widening)
    assert isinstance(path, FunctionPath)
    assert torch.allclose(path.log_normalizer, torch.tensor(0.5 * math.log(2 * math.pi)))
    assert torch.allclose(path.at(0.5)(torch.tensor([[2.0]])), torch.tensor([0.8]))


def test_a_function_of_machines_has_blocks():
    machine = BoltzmannMachine(0.4, edges=lattice_edges(2, 3))
    path = path_of(
        machine, path=lambda beta: BoltzmannMachine(0.4 * beta, edges=lattice_edges(2, 3))
    )
    assert torch.allclose(path.log_normalizer, torch.tensor(6 * math.log(2.0)))
    z = path.at(0.5).draw(4)
    noise = path.gibbs_noise(z)
    want = BoltzmannMachine(0.2, edges=lattice_edges(2, 3)).gibbs_sweep(z, noise)
    assert torch.equal(path.gibbs_sweep(z, noise), want)


@pytest.mark.parametrize(
    ("function", "proposal", "message"),
    [
        (widening, dist.Normal(0.0, 2.0), "does not start at Normal"),
        (widening, None, "has neither"),
        (lambda b: widening(b / 2), dist.Normal(0.0, 1.0), "at beta=1 the path must be"),
        (lambda b: 1.0, None, "must map beta to energies"),
        (lambda b: widening(b).expand((3,)), None, "must map beta to energies"),
        ("path", None, "must be an AnnealingPath, or a function"),
    ],
)
def test_functions_that_are_no_path(function, proposal, message):
    with pytest.raises(ValueError, match=message):
        path_of(TARGET, proposal, function)


def test_a_path_to_another_energy():
    path = path_of(TARGET, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="leads to"):
        path_of(UnnormalizedEnergy(lambda x: (x**2).sum(-1), (2,)), path=path)
    with pytest.raises(ValueError, match="not both"):
        path_of(TARGET, dist.Normal(0.0, 1.0), path)


def test_a_start_of_another_shape():
    class Wrong(GeometricPath):
        def sample(self, num):
            return torch.zeros(num)

    path = Wrong.between(dist.Normal(0.0, 1.0), TARGET)
    with pytest.raises(ValueError, match=r"must return positions of shape \(3, 1\)"):
        path.draw(3)


def test_a_tempered_path_is_for_discrete_energies():
    with pytest.raises(ValueError, match="discrete energies without a base"):
        TemperedPath(EnergyPotential(TARGET))
