"""Constants that are made from a latent are constants, and dependences that hide are found."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.mcmc import NormalizerError, check_normalizers
from pyro_ebm.mcmc.potentials.model import ModelPotential

DATA = torch.tensor([0.5, -1.0, 2.0])
ONE = torch.tensor(1.0)

# ones, whatever mu is, by operations that look at shape and dtype, not at values
OF_A_SHAPE = {
    "ones_like": torch.ones_like,
    "zeros_like": lambda mu: torch.zeros_like(mu) + 1,
    "zeros_like, by name": lambda mu: torch.zeros_like(input=mu) + 1,
    "full_like": lambda mu: torch.full_like(mu, 1.0),
    "empty_like, filled": lambda mu: torch.empty_like(mu).fill_(1.0),
    "empty_like, drawn": lambda mu: torch.empty_like(mu).normal_().clamp(1.0, 1.0),
    "a copy, filled": lambda mu: mu.clone().fill_(1.0),
    "a copy, filled, itself": lambda mu: [copy := mu.clone(), copy.fill_(1.0), copy][2],
    "new_ones": lambda mu: mu.new_ones(mu.shape),
    "new_zeros": lambda mu: mu.new_zeros(()) + 1,
    "new_full": lambda mu: mu.new_full((), 1.0),
    "new_tensor": lambda mu: mu.new_tensor(1.0),
    "new_empty": lambda mu: mu.new_empty(()).fill_(1),
    "to": lambda mu: ONE.to(mu),
    "to, by name": lambda mu: ONE.to(tensor=mu),
    "type_as": lambda mu: ONE.type_as(mu),
    "dtype": lambda mu: ONE.to(mu.dtype),
    "device": lambda mu: torch.ones(mu.shape, dtype=mu.dtype, device=mu.device),
    "expand_as": lambda mu: ONE.expand_as(mu),
    "view_as": lambda mu: ONE.view_as(mu),
    "reshape_as": lambda mu: ONE.reshape_as(mu),
    "broadcast": lambda mu: torch.broadcast_tensors(ONE, mu)[0],
    "the shape of a uniform": lambda mu: dist.Uniform(0.0, 1.0).expand(mu.shape).high,
    "dim": lambda mu: torch.tensor(mu.dim() + 1.0),
    "numel": lambda mu: torch.tensor(float(mu.numel())),
    "finfo": lambda mu: ONE.clamp(min=torch.finfo(mu.dtype).tiny),
    "times 0": lambda mu: mu * 0 + 1,
    "0 times": lambda mu: 0.0 * mu.detach() + 1,
    "minus itself": lambda mu: mu - mu + 1,
}
# ones as well, but that takes a look at values
OF_VALUES = {
    "two equal branches": lambda mu: torch.where(mu > 0, 1.0, 1.0),
    "divided by itself": lambda mu: mu.exp() / mu.exp(),
    "clamped": lambda mu: mu.clamp(1.0, 1.0),
    "a true condition": lambda mu: (mu.square() >= 0).float(),
    "read, and not used": lambda mu: ONE if mu.item() > 0 else torch.tensor(1.0),
    "weights that sum to 1": lambda mu: torch.stack([mu, 2 * mu]).softmax(0).sum(),
}
# 1 at most places, or near 1 everywhere
MOVING = {
    "beyond a threshold": lambda mu: 1 + (mu - 5).relu(),
    "below a threshold": lambda mu: 1 + (-50 - mu).relu(),
    "clamped from one side": lambda mu: mu.clamp(max=-9) + 10,
    "now and then": lambda mu: torch.where(mu > 9, 2.0, 1.0),
    "a step": lambda mu: 1 + (mu > 3).float(),
    "a little": lambda mu: 1 + 1e-2 * mu.tanh(),
    "detached": lambda mu: 1 + mu.detach().square(),
    "rounded": lambda mu: 1 + (mu / 20).round().abs(),
    "filled with a value": lambda mu: torch.empty_like(mu).fill_(mu.square() + 1),
    "full_like a value": lambda mu: torch.full_like(mu, 1.0) * mu.exp(),
    "a copy to a dtype": lambda mu: mu.exp().to(ONE),
    "a number": lambda mu: torch.tensor(1 + mu.square().item()),
    "a branch": lambda mu: ONE if mu < 4 else 2 * ONE,
    "how many": lambda mu: (
        torch.ones_like(torch.atleast_1d(mu)[torch.atleast_1d(mu) > 0]).sum() + 1
    ),
    "the length of what is left": lambda mu: torch.tensor(1.0 + len(mu.flatten().relu().nonzero())),
    "written into a tensor": lambda mu: [t := torch.ones(2), t[:1].copy_(mu.square() + 1), t][2][0],
    "set in a tensor": lambda mu: [t := torch.ones(1), t.__setitem__(0, mu.exp()), t][2][0],
    "a large factor": lambda mu: 1 + mu * 1e-3 * 1e-1,
}


def with_an_energy(make):
    def model():
        scale = make(pyro.sample("mu", dist.Normal(0.0, 1.0)))
        with pyro.plate("data", 3):
            pyro.sample("x", UnnormalizedEnergy(lambda x: scale * x.square()), obs=DATA)

    return model


def with_a_bounded_energy(make):
    def model():
        bound = make(pyro.sample("mu", dist.Normal(0.0, 1.0)))
        support = constraints.interval(-2 * bound, 2 * bound)
        with pyro.plate("data", 3):
            pyro.sample("x", UnnormalizedEnergy(torch.square, support=support), obs=DATA / 2)

    return model


def with_a_uniform(make):
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.Uniform(make(mu) - 1, make(mu)))
        pyro.sample("y", dist.Normal(mu + u, 1.0), obs=torch.tensor(1.0))

    return model


@pytest.mark.parametrize("name", OF_A_SHAPE)
@pytest.mark.parametrize("with_a", [with_an_energy, with_a_bounded_energy])
def test_energies_of_constants_are_accepted(with_a, name):
    check_normalizers(with_a(OF_A_SHAPE[name]))


@pytest.mark.parametrize("name", sorted(MOVING.keys() - {"a branch"}))  # which no start takes
@pytest.mark.parametrize("with_a", [with_an_energy, with_a_bounded_energy])
def test_energies_that_move_are_refused(with_a, name):
    pyro.set_rng_seed(0)
    with pytest.raises(NormalizerError, match="'mu'"):
        check_normalizers(with_a(MOVING[name]))


@pytest.mark.parametrize("name", OF_A_SHAPE | OF_VALUES)
def test_constant_supports_are_accepted(name):
    make = (OF_A_SHAPE | OF_VALUES)[name]
    potential = ModelPotential(with_a_uniform(make))
    assert sorted(potential.names) == ["mu", "u"]


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("seed", range(5))
def test_supports_that_move_are_refused(name, seed):
    pyro.set_rng_seed(seed)
    with pytest.raises(ValueError, match=r"the support of site 'u' depends on \['mu'\]"):
        ModelPotential(with_a_uniform(MOVING[name]))
