"""A state in which a distribution of the model does not exist is rejected."""

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer.mcmc.api as pyro_api
import pytest
import torch
from pyro.infer import NUTS
from torch import tensor

from pyro_ebm import MCMC, GibbsKernel, LangevinKernel, MHKernel
from pyro_ebm.mcmc import ChEESKernel, CompositeKernel, ModelPotential, TemperingKernel
from tests.statistics import assert_moments

Y = tensor(0.5)


def a_latent():
    return pyro.sample("a", dist.Normal(1.0, 1.0))


def observed(make, y=Y):
    def model():
        pyro.sample("y", make(a_latent()), obs=y)

    return model


def item():
    pyro.sample("y", dist.Gamma(a_latent().item(), 1.0), obs=Y)


def summed_out():
    a, k = a_latent(), pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Gamma(a - k, 1.0), obs=Y)


def in_a_plate():
    a = a_latent()
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Gamma(a, torch.ones(3)), obs=torch.full((3,), 0.5))


def of_a_latent():
    pyro.sample("b", dist.Gamma(a_latent(), 1.0))


def gamma_model():
    pyro.sample("y", dist.Gamma(a_latent(), 1.0), obs=Y)


def three_of(fn: Any):
    return fn.expand([3]).to_event(1)


def two(a):
    return torch.stack([a, torch.ones_like(a)])


MODELS = {
    "gamma": gamma_model,
    "beta": observed(lambda a: dist.Beta(a, 1.0)),
    "dirichlet": observed(lambda a: dist.Dirichlet(two(a)), tensor([0.3, 0.7])),
    "weibull": observed(lambda a: dist.Weibull(1.0, a)),
    "negative binomial": observed(lambda a: dist.NegativeBinomial(a, tensor(0.5)), tensor(3.0)),
    "bernoulli": observed(lambda a: dist.Bernoulli(a), tensor(1.0)),
    "categorical": observed(lambda a: dist.Categorical(two(a)), tensor(1)),
    "multinomial": observed(lambda a: dist.Multinomial(3, two(a)), tensor([1.0, 2.0])),
    "pareto": observed(lambda a: dist.Pareto(tensor(0.1), a)),
    "half normal": observed(lambda a: dist.HalfNormal(a)),
    "log-normal": observed(lambda a: dist.LogNormal(0.0, a)),
    "transformed": observed(
        lambda a: dist.TransformedDistribution(
            dist.Gamma(a, 1.0), [dist.transforms.ExpTransform()]
        ),
        tensor(1.5),
    ),
    "independent": observed(lambda a: dist.Gamma(a, torch.ones(3)).to_event(1), torch.ones(3)),
    "expanded": observed(lambda a: three_of(dist.Gamma(a, 1.0)), torch.ones(3)),
    "masked": observed(lambda a: dist.Gamma(a, 1.0).mask(True)),
    "mixture": observed(
        lambda a: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(two(a), 1.0))
    ),
    "weights": observed(
        lambda a: dist.MixtureSameFamily(dist.Categorical(two(a)), dist.Gamma(torch.ones(2), 1.0))
    ),
    "zero-inflated": observed(lambda a: dist.ZeroInflatedPoisson(tensor(1.0), gate=a), tensor(0.0)),
    "value": lambda: pyro.sample("y", dist.Exponential(1.0), obs=a_latent()),
    "bound": observed(lambda a: dist.Pareto(0.6 - a, 1.0), tensor(0.5)),
    "summed out": summed_out,
    "in a plate": in_a_plate,
    "of a latent": of_a_latent,
    "item": item,
}


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
@pytest.mark.parametrize("name", MODELS)
def test_an_invalid_state_has_no_density(name):
    good, bad = (0.3, -0.6) if name == "bound" else (0.9, -0.6)
    if name == "bound":
        bad = 0.0  # scale .6 above the value .5
    potential = ModelPotential(MODELS[name])
    z = tensor([[good], [bad], [good], [bad]]).repeat(1, potential.dim)
    for chains in (z[[0, 2, 1, 3]], z[:1], z[1:2]):  # two good ones first: they are compared
        value, _ = potential.value_and_grad(chains)
        assert value.isfinite().tolist() == (chains[:, 0] == good).tolist()


def test_valid_states_have_the_density_that_they_had():
    model = MODELS["gamma"]
    z = tensor([[0.7], [1.5]])
    log_p = dist.Normal(1.0, 1.0).log_prob(z[:, 0]) + dist.Gamma(z[:, 0], 1.0).log_prob(Y)
    torch.testing.assert_close(ModelPotential(model)(z), -log_p)


def moments(log_density):
    a = torch.linspace(1e-4, 8.0, 20_000, dtype=torch.float64)
    weight = torch.exp(log_density(a)) * torch.exp(-((a - 1) ** 2) / 2)
    mean = (weight * a).sum() / weight.sum()
    return float(mean), float((weight * (a - mean) ** 2).sum() / weight.sum()) ** 0.5


KERNELS = {
    "langevin": lambda m: LangevinKernel(m),
    "captured": lambda m: LangevinKernel(m, jit_compile="capture"),
    "walk": lambda m: MHKernel(m),
    "trajectories": lambda m: ChEESKernel(m),
    "replicas": lambda m: TemperingKernel(LangevinKernel(m), [1.0, 0.6]),
    "in turn": lambda m: CompositeKernel(m, [GibbsKernel(), LangevinKernel()]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_posterior(name):
    mcmc = MCMC(KERNELS[name](MODELS["gamma"]), 50, 80, num_chains=400, disable_progbar=True)
    mcmc.run()
    a = mcmc.get_samples(group_by_chain=True)["a"]
    assert (a > 0).all()
    mean, sd = moments(lambda a: dist.Gamma(a, 1.0).log_prob(Y.double()))
    assert_moments(a, mean, sd**2)


@pytest.mark.parametrize("method", ["sequential", pytest.param("parallel", marks=pytest.mark.slow)])
def test_under_nuts(method, monkeypatch):
    monkeypatch.setattr(pyro_api.mp, "cpu_count", lambda: 8)
    kernel = NUTS(gamma_model)
    mcmc = MCMC(kernel, 100, 30, num_chains=2, disable_progbar=True, chain_method=method)
    mcmc.run()
    assert (mcmc.get_samples()["a"] > 0).all()
    assert kernel.model is gamma_model


def test_constant_arguments_are_not_looked_at():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
        pyro.sample("y", dist.Normal(0.0, scale - 1), obs=Y)

    checked = ModelPotential(model).checked
    assert {name: sorted(c.arguments or ()) for name, c in checked.items()} == {"y": ["scale"]}


def test_a_positive_latent_may_be_a_scale():
    """What has the latent's own values needs no check; what is computed from them does."""

    def model(scale_of, prior=None):
        scale = scale_of(pyro.sample("scale", prior or dist.HalfCauchy(1.0)))
        pyro.sample("y", dist.LogNormal(torch.zeros(3), scale).to_event(1), obs=torch.ones(3))

    def checked(*args):
        return sorted(ModelPotential(model, args).checked)

    assert checked(lambda scale: scale) == []
    assert checked(lambda scale: scale[None].expand(3)) == []
    assert checked(lambda scale: scale, three_of(dist.Gamma(2.0, 1.0))) == []
    assert checked(lambda scale: scale, dist.Uniform(0.0, 1.0)) == []
    assert checked(lambda scale: scale, dist.Uniform(-1.0, 1.0)) == ["y"]
    assert checked(lambda scale: scale, dist.Normal(2.0, 1.0)) == ["y"]
    assert checked(lambda scale: scale - 1) == ["y"]
    assert checked(lambda scale: torch.where(scale > 3, scale - 4, scale)) == ["y"]


def test_what_is_told_not_to_validate_is_left_alone():
    potential = ModelPotential(observed(lambda a: dist.Gamma(a, 1.0, validate_args=False)))
    assert potential(tensor([[-0.5]])).isfinite()
    potential = ModelPotential(
        observed(
            lambda a: dist.Gamma(a, torch.ones(2), validate_args=False).to_event(1),
            tensor([1.0, 1.0]),
        )
    )
    assert potential(tensor([[-0.5]])).isfinite()


def test_simplices_of_many_parts_are_valid():
    """Their sum is 1 up to rounding only."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(5000), 1.0).to_event(1))
        pyro.sample("y", dist.Dirichlet(torch.ones(5000)), obs=x.softmax(-1))

    assert ModelPotential(model)(torch.randn(1, 5000)).isfinite()


def test_masked_rows_may_be_invalid():
    def model():
        a = pyro.sample("a", dist.Normal(torch.ones(2), 1.0).to_event(1))
        mask: Any = tensor([True, False])
        with pyro.plate("rows", 2), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Gamma(a, 1.0), obs=torch.ones(2))
        pyro.sample("z", dist.Gamma(a, 1.0).mask(mask).to_event(1), obs=torch.ones(2))

    value = ModelPotential(model)(tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert value[0].isfinite()
    assert value[1] == torch.inf


def test_a_start_in_an_invalid_state_is_explained():
    start = {"a": tensor(-0.5)}
    mcmc = MCMC(LangevinKernel(MODELS["gamma"]), 10, 10, initial_params=start)
    with pytest.raises(ValueError, match="site 'y' is infinite, as the argument concentration of"):
        mcmc.run()
