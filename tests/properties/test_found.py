"""What random inputs found, each by itself."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    MCMC,
    ChEESKernel,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
    UnnormalizedEnergy,
    estimate_log_normalizer,
    fisher_divergence,
)
from pyro_ebm.losses import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    ScoreMatching,
    gaussian_noise,
)
from pyro_ebm.mcmc import Independence, ModelPotential
from pyro_ebm.ops.pareto import pareto_k


def run(kernel):
    mcmc = MCMC(kernel, 3, 2, num_chains=2, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: dist.Laplace(m, 1.0),
        lambda m: dist.Cauchy(m, 1.0),
        lambda m: dist.Exponential(m.exp()),
    ],
)
def test_a_latent_may_move_noise_that_torch_makes_by_new(make):
    """Pyro's tracking hands ``Tensor.new(shape)`` a tuple, which it takes for values."""

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", make(m * torch.ones(2, 5)).to_event(2))

    assert ModelPotential(model).dim == 11
    assert run(LangevinKernel(model))["x"].shape == (2, 3, 2, 5)


@pytest.mark.parametrize(
    "make",
    [
        MHKernel,
        ChEESKernel,
        lambda model: ChEESKernel(model, full_mass=True),
        lambda model: TemperingKernel(LangevinKernel(model), [1.0, 0.5]),
    ],
)
def test_sites_without_elements(make):
    def model():
        pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))

    assert run(make(model))["none"].shape == (2, 3, 0)


def test_discrete_sites_without_elements():
    def none():
        pyro.sample("none", dist.Bernoulli(torch.zeros(0)).to_event(1))

    def some():
        none()
        pyro.sample("b", dist.Bernoulli(0.5))

    assert run(GibbsKernel(some))["none"].shape == (2, 3, 0)
    with pytest.raises(ValueError, match="hold no variables"):
        run(GibbsWithGradientsKernel(none))


def test_an_energy_of_an_empty_event_has_points_and_positions():
    p = UnnormalizedEnergy(lambda x: x.sum(-1), (0,))
    assert p.sample((4,)).shape == (4, 0)


def test_weights_of_which_most_are_the_largest_are_bounded():
    weights = torch.cat([torch.zeros(900), -torch.rand(100)])
    ties = torch.cat([torch.zeros(120), torch.full((880,), -1.0)])
    assert pareto_k(weights) == pareto_k(ties) == -math.inf


@pytest.mark.parametrize(("event", "batch"), [((0,), ()), ((), (0,))])
def test_nothing_to_integrate_over(event, batch):
    with pytest.raises(ValueError, match="nothing to integrate over"):
        estimate_log_normalizer(UnnormalizedEnergy(torch.square, event, batch_shape=batch))


def test_denoising_with_a_sigma_as_precise_as_the_data():
    """sigma = 0.2 was kept in single precision, 1.5e-8 off."""
    assert DenoisingScoreMatching(sigma=0.2)._sigmas.double().item() == 0.2


def model():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LangevinKernel("model"), "model must be a Pyro model"),
        (lambda: LangevinKernel(torch.distributions.Normal(0.0, 1.0)), "model must be a Pyro"),
        (lambda: LangevinKernel(model, target_accept_prob="x"), "target_accept_prob must be a num"),
        (lambda: LangevinKernel(model, step_size=torch.ones(2)), "step_size must be a number"),
        (lambda: LangevinKernel(model, transforms=["x"]), "transforms must be a dict"),
        (lambda: run(LangevinKernel(model, init_strategy=lambda site: 1.0)), "init_strategy must"),
        (lambda: MCMC(LangevinKernel(model), 2, save_params=[]), "save_params must be a list"),
        (lambda: MCMC(LangevinKernel(model), 2, draws_device="nowhere"), "draws_device must be"),
        (lambda: MCMC(LangevinKernel(model), 2, hook_fn=3), "hook_fn must be a function"),
        (lambda: Independence({"x": 1}), "distribution of a proposal must be a dict"),
        (lambda: ScoreMatching(num_particles=0), "num_particles must be an integer of at least 1"),
        (lambda: ContrastiveDivergence(energy_penalty=None), "energy_penalty must be a number"),
        (lambda: gaussian_noise([1.0, 2.0]), "data must be a tensor"),
        (lambda: UnnormalizedEnergy(torch.square).energy(1.0), "x must be a tensor"),
        (lambda: UnnormalizedEnergy(torch.square, (-1,)), "event_shape must be a tuple of sizes"),
        (lambda: UnnormalizedEnergy(torch.square, log_normalizer="x"), "log_normalizer must be a"),
        (lambda: fisher_divergence(abs, abs, torch.ones(2), 3), "event_dim must be an integer"),
        (lambda: estimate_log_normalizer(3), "p must be an UnnormalizedEnergy"),
        (lambda: estimate_log_normalizer(UnnormalizedEnergy(torch.square), 3), "method must be"),
    ],
)
def test_a_wrong_argument_is_an_error_where_it_is_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
