"""A model is one fixed density: the same latents everywhere, and the same value each time."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS

from pyro_ebm import (
    MCMC,
    ContrastiveDivergence,
    GibbsKernel,
    LangevinKernel,
    MHKernel,
    UnnormalizedEnergy,
)
from pyro_ebm.mcmc import (
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    ExchangeKernel,
    ModelPotential,
    TemperingKernel,
    check_normalizers,
)
from pyro_ebm.normalizer import estimate_log_normalizer

Y = torch.tensor(1.0)
GENERATOR = torch.Generator().manual_seed(0)


def x_latent(event=()):
    return pyro.sample("x", dist.Normal(torch.zeros(event), 1.0).to_event(len(event)))


def observe(mean):
    pyro.sample("y", dist.Normal(mean, 0.5), obs=Y)


def noise():
    observe(x_latent() + torch.randn(()))


def noise_of_a_generator():
    observe(x_latent() + torch.randn((), generator=GENERATOR))


def noise_of_numpy():
    observe(x_latent() + np.random.randn())  # noqa: NPY002


def noise_of_python():
    observe(x_latent() + random.gauss(0.0, 1.0))


def a_hidden_sample():
    x = x_latent()
    with poutine.block():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(x + z)


def functional_dropout():
    observe(F.dropout(x_latent((3,)), 0.1).sum())


def rare_noise():  # three evaluations of four are alike
    observe(x_latent() + (torch.rand(()) < 0.25))


def noise_beside_a_sum():
    x = x_latent()
    k = pyro.sample("k", dist.Bernoulli(0.5))
    observe(x + k + torch.randn(()))


def a_counter():
    COUNT[0] += 1
    x = x_latent()
    with poutine.scale(scale=min(1.0, COUNT[0] / 1000)):
        observe(x)


COUNT = [0]
RANDOM = [
    noise,
    noise_of_a_generator,
    noise_of_numpy,
    noise_of_python,
    a_hidden_sample,
    functional_dropout,
    rare_noise,
    noise_beside_a_sum,
    a_counter,
]


@pytest.mark.parametrize("num_chains", [1, 4])
@pytest.mark.parametrize("model", RANDOM, ids=lambda m: m.__name__)
def test_a_random_density_is_refused(model, num_chains):
    mcmc = MCMC(LangevinKernel(model), 10, 10, num_chains=num_chains, disable_progbar=True)
    with pytest.raises(ValueError, match=r"site 'y' is random.*one fixed density"):
        mcmc.run()


def test_under_the_runner_of_pyro():
    mcmc = PyroMCMC(LangevinKernel(noise), 10, 10, disable_progbar=True)
    with pytest.raises(ValueError, match="the log density of site 'y' is random"):
        mcmc.run()


@pytest.mark.parametrize("model", [noise, a_hidden_sample, noise_beside_a_sum, a_counter])
def test_under_nuts(model):
    mcmc = MCMC(NUTS(model, max_plate_nesting=0), 10, 10, disable_progbar=True)
    with pytest.raises(ValueError, match="the log density of site 'y' is random"):
        mcmc.run()


@pytest.mark.parametrize("name", ["in_one_branch", "in_a_rare_branch", "between_other_bounds"])
def test_latents_that_come_and_go_under_nuts(name):
    model = globals()[name]
    mcmc = MCMC(NUTS(model), 100, 100, num_chains=2, disable_progbar=True)
    with pytest.raises(ValueError, match=BRANCHES[model]):
        mcmc.run()
    assert mcmc.kernel.model is model


def test_a_random_factor():
    def model():
        pyro.factor("f", -((x_latent() + 0.1 * torch.randn(())) ** 2))

    with pytest.raises(ValueError, match="the log density of site 'f' is random"):
        ModelPotential(model)


def noisy(x):
    return x.square() / 2 + 0.1 * torch.randn(x.shape)


def noisy_spins(x):
    return (x * torch.randn(3)).sum(-1)


KERNELS = {
    "a model": lambda: LangevinKernel(lambda: pyro.sample("x", UnnormalizedEnergy(noisy))),
    "an energy": lambda: BarkerKernel(UnnormalizedEnergy(noisy)),
    "trajectories": lambda: ChEESKernel(UnnormalizedEnergy(noisy)),
    "replicas": lambda: TemperingKernel(MHKernel(noise), [1.0, 0.5]),
    "parts": lambda: CompositeKernel(noise_beside_a_sum),
    "spins": lambda: GibbsKernel(
        UnnormalizedEnergy(noisy_spins, (3,), support=dist.constraints.boolean)
    ),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_chains", [1, 4])
def test_under_every_kernel(name, num_chains):
    mcmc = MCMC(KERNELS[name](), 10, 10, num_chains=num_chains, disable_progbar=True)
    with pytest.raises(ValueError, match="is random: evaluated again"):
        mcmc.run()


def test_exchange():
    def model():
        theta = pyro.sample("theta", dist.LogNormal(0.0, 0.5))
        p = UnnormalizedEnergy(lambda x: theta * x.square() / 2)
        pyro.sample("x", p, obs=Y)
        observe(theta + torch.randn(()))

    mcmc = MCMC(ExchangeKernel(model, num_inner_steps=5), 10, 10, num_chains=4)
    with pytest.raises(ValueError, match="the log density of site 'y' is random"):
        mcmc.run()


def test_a_potential_of_ones_own():
    def potential_fn(params):
        return params["x"].square().sum() / 2 + torch.randn(())

    kernel = LangevinKernel(potential_fn=potential_fn)
    start = {"x": torch.zeros(4, 2)}
    mcmc = MCMC(kernel, 10, 10, num_chains=4, initial_params=start, disable_progbar=True)
    with pytest.raises(ValueError, match="the potential is random"):
        mcmc.run()


def test_an_energy_that_is_sampled_by_itself():
    with pytest.raises(ValueError, match="the energy of site 'x' is random"):
        UnnormalizedEnergy(noisy).sample()


def test_annealing():
    p = UnnormalizedEnergy(noisy, base=dist.Normal(0.0, 2.0))
    with pytest.raises(ValueError, match="the energy is random"):
        estimate_log_normalizer(p, "ais", num_chains=20, betas=[0.0, 0.5, 1.0])


def test_an_energy_is_not_blamed_on_latents():
    with pytest.raises(ValueError, match="the log density of site 'x' is random"):
        check_normalizers(lambda: pyro.sample("x", UnnormalizedEnergy(noisy)))


def test_estimates_by_weights():
    p = UnnormalizedEnergy(noisy, base=dist.Normal(0.0, 2.0))
    with pytest.raises(ValueError, match="the energy is random"):
        estimate_log_normalizer(p, "importance", num_samples=20)


def test_negatives():
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", UnnormalizedEnergy(noisy), obs=x)

    with pytest.raises(ValueError, match="the energy of site 'x' is random"):
        ContrastiveDivergence().loss_and_grads(model, lambda x: None, torch.randn(5))


def a_seed():
    x = x_latent()
    torch.manual_seed(3)
    observe(x + torch.randn(()))


def a_seed_of_an_energy(x):
    torch.manual_seed(3)
    return x.square() / 2


SEEDS = {
    "a model": lambda: MHKernel(a_seed),
    "stock NUTS": lambda: NUTS(a_seed),
    "an energy": lambda: LangevinKernel(UnnormalizedEnergy(a_seed_of_an_energy)),
}


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_in_the_model_is_refused(name):
    """The chains would move by the same noise at each step."""
    with pytest.raises(ValueError, match="sets the seed of torch's global random numbers"):
        MCMC(SEEDS[name](), 10, 10, disable_progbar=True).run()


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_a_seed_that_stays_in_the_model():
    def model():
        x = x_latent()
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            noise = torch.randn(())
        observe(x + noise)

    mcmc = MCMC(MHKernel(model), 10, 10, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert len(mcmc.get_samples()["x"].unique()) > 1


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_draws_that_change_no_density_are_let_be():
    def model():
        pyro.param("w", torch.randn(()))
        observe(x_latent())

    mcmc = MCMC(LangevinKernel(model), 10, 10, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (40,)


def test_the_random_stream_is_left_alone():
    def model():
        observe(x_latent())

    potential = ModelPotential(model)
    pyro.set_rng_seed(0)
    z = potential._draw(5)
    after = torch.rand(())
    pyro.set_rng_seed(0)
    torch.testing.assert_close(potential.initial(5), z, rtol=0, atol=0)
    assert torch.rand(()) == after


# -- sites that come and go --------------------------------------------------------------------


def in_one_branch():
    x = x_latent()
    observe(x + (pyro.sample("z", dist.Normal(0.0, 1.0)) if x > 0 else 0.0))


def in_a_rare_branch():  # no start lies there, between -2 and 2
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    if x > 2:
        pyro.sample("z", dist.Normal(0.0, 1.0))


def missing_in_a_rare_branch():
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    if x < 2:
        pyro.sample("z", dist.Normal(0.0, 1.0))


def observed_in_a_branch():
    x = x_latent()
    observe(x + pyro.sample("z", dist.Normal(0.0, 1.0), obs=None if x > 0 else torch.tensor(0.0)))


def rows_that_a_latent_counts():
    n = pyro.sample("n", dist.Uniform(0.0, 5.0))
    with pyro.plate("rows", 1 + int(n)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z.sum())


def on_another_support():
    x = x_latent()
    pyro.sample("z", dist.Normal(0.0, 1.0) if x > 0 else dist.Gamma(1.0, 1.0))


def between_other_bounds():
    x = x_latent()
    pyro.sample("z", dist.Uniform(0.0, 1.0 if x > 0 else 2.0))


def in_a_branch_of_a_discrete_site():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    if k == 1:
        pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(k)


BRANCHES = {
    in_one_branch: "site 'z' is in the model, as a latent, for some values",
    in_a_rare_branch: "site 'z' is in the model, as a latent, for some values",
    missing_in_a_rare_branch: "site 'z' is in the model, as a latent, for some values",
    observed_in_a_branch: "site 'z' is in the model, as a latent, for some values",
    rows_that_a_latent_counts: r"site 'z' has shape \(\d,\) for some values",
    on_another_support: "the support of site 'z' depends on",
    between_other_bounds: "the support of site 'z' depends on",
}


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
@pytest.mark.parametrize("num_chains", [1, 8])
@pytest.mark.parametrize("model", BRANCHES, ids=lambda m: m.__name__)
def test_latents_that_come_and_go(model, num_chains):
    mcmc = MCMC(MHKernel(model), 500, 100, num_chains=num_chains, disable_progbar=True)
    with pytest.raises(ValueError, match=BRANCHES[model]):
        mcmc.run()


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_in_a_branch_of_a_discrete_site():
    mcmc = MCMC(CompositeKernel(in_a_branch_of_a_discrete_site), 100, 100, disable_progbar=True)
    with pytest.raises(ValueError, match="site 'z' is in the model, as a latent, for some"):
        mcmc.run()


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_branches_of_one_density_are_sampled():
    """Observed sites may come and go, and a latent may have another distribution."""

    def model():
        x = x_latent()
        z = pyro.sample("z", dist.Normal(0.0, 1.0) if x > 0 else dist.Normal(1.0, 2.0))
        if x > 0:
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    mcmc = MCMC(MHKernel(model), 10, 10, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert sorted(mcmc.get_samples()) == ["x", "z"]


def test_the_way_out_has_the_right_posterior():
    """In front of the branch, an unused site leaves the posterior of the others as it is."""

    def model():
        x = x_latent()
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(x + torch.where(x > 0, z, 0.0))

    potential = ModelPotential(model)
    x, z = torch.linspace(-4.975, 4.975, 200), torch.linspace(-6, 6, 241)
    weights = torch.exp(-potential(torch.cartesian_prod(x, z))).reshape(200, 241).sum(1)
    torch.testing.assert_close(
        (weights * x).sum() / weights.sum(), torch.tensor(0.736), atol=3e-3, rtol=0
    )


def test_a_latent_that_a_rare_value_brings_in_is_noticed():
    def model():
        if pyro.sample("rare", dist.Bernoulli(1e-4)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", UnnormalizedEnergy(torch.square), obs=torch.zeros(3))

    with pytest.raises(ValueError, match="'z'"):
        check_normalizers(model)
