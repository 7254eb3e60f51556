"""Exponential families as latents, likelihoods whose log Z moves, guides."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import MCMC, LangevinKernel
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from tests.statistics import assert_mean

# torch draws a Wishart again when rounding has made it singular, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")

of = ExponentialFamily.from_distribution


def d(*values):
    """A double tensor."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def powers(x):
    """T(x) = (x^2, x^4)."""
    return torch.stack([x**2, x**4], -1)


QUARTIC = ExponentialFamily(powers, d(1.0, -1.0))


DATA = torch.tensor([0.3, -0.9, 0.5, 1.4, -0.2, 0.8, -0.6, 0.1])


def precision_model(data):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", ExponentialFamily.gaussian(0.0, tau.rsqrt()), obs=data)


def precision_model_by_quadrature(data):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    p = ExponentialFamily(squared, -tau[..., None] / 2)
    with pyro.plate("data", len(data)):
        pyro.sample("x", p, obs=data)


def squared(x):
    return x.square()[..., None]


@pytest.mark.parametrize("model", [precision_model, precision_model_by_quadrature])
def test_a_likelihood_whose_log_z_moves(model):
    # conjugate: Gamma(2 + n / 2, 1 + sum x^2 / 2). All chains at once, quadrature too: a fallback
    # to one after another would warn
    mcmc = MCMC(LangevinKernel(model), 50, 50, num_chains=50, disable_progbar=True)
    mcmc.run(DATA)
    tau = mcmc.get_samples(group_by_chain=True)["tau"].double()
    a, b = 2 + len(DATA) / 2, 1 + DATA.square().sum().item() / 2
    assert_mean(tau, a / b)
    assert_mean((tau - a / b).square(), a / b**2)


def test_nuts_agrees():
    def model(data):
        with pyro.plate("alike", 16):
            precision_model(data[:, None].expand(-1, 16))

    mcmc = PyroMCMC(NUTS(model), 50, warmup_steps=40, disable_progbar=True)
    mcmc.run(DATA)
    a, b = 2 + len(DATA) / 2, 1 + DATA.square().sum().item() / 2
    assert_mean(mcmc.get_samples()["tau"].T.double(), a / b)


def latent_model(num=1):
    with pyro.plate("alike", num):
        pyro.sample("own", QUARTIC)
        with pyro.plate("two", 2):
            pyro.sample("gamma", ExponentialFamily.gamma(3.0, 2.0))
        mu = pyro.sample("mu", ExponentialFamily.gaussian(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.full((num,), 3.0))


def test_as_latents():
    mcmc = MCMC(LangevinKernel(latent_model), 50, 80, num_chains=100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert_mean(powers(draws["own"][..., 0].double()), QUARTIC.mean_parameters())
    assert_mean(draws["gamma"].double(), 1.5)
    assert_mean(draws["mu"].double(), 1.5)


def test_as_latents_of_nuts():
    mcmc = PyroMCMC(NUTS(latent_model), 25, warmup_steps=25, disable_progbar=True)
    mcmc.run(16)
    draws = {name: x.movedim(-1, 0).double() for name, x in mcmc.get_samples().items()}
    assert_mean(powers(draws["own"]), QUARTIC.mean_parameters())
    assert_mean(draws["gamma"], 1.5)


def test_a_plain_elbo_trains_theta_to_match_the_statistic():
    # maximum likelihood in an exponential family: E[T] is the mean of T over the data
    data = QUARTIC.sample((500,)).float()

    def model():
        a = pyro.param("a", torch.tensor(0.0))
        b = pyro.param("b", torch.tensor(0.5), constraints.positive)
        with pyro.plate("data", len(data)):
            pyro.sample("x", ExponentialFamily(powers, torch.stack([a, -b])), obs=data)

    svi = SVI(model, lambda: None, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step()
    p = ExponentialFamily(powers, torch.stack([pyro.param("a"), -pyro.param("b")]))
    assert_close(p.mean_parameters().detach(), powers(data).mean(0), atol=2e-3, rtol=2e-3)


def test_a_categorical_is_summed_out():
    locs = torch.tensor([-2.0, 0.0, 3.0])
    data = torch.tensor([-1.0, 2.5])
    probs = torch.tensor([0.2, 0.3, 0.5])

    def model(prior):
        with pyro.plate("data", 2):
            k = pyro.sample("k", prior, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=data)

    def loss(prior):
        return TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda prior: None, prior)

    want = dist.MixtureSameFamily(dist.Categorical(probs), dist.Normal(locs, 1.0))
    assert loss(ExponentialFamily.categorical(probs)) == pytest.approx(
        -want.log_prob(data).sum().item(), abs=1e-5
    )


def test_as_a_guide_and_in_predictive():
    def model():
        x = pyro.sample("x", ExponentialFamily.gaussian(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraints.positive)
        pyro.sample("x", ExponentialFamily.gaussian(loc, scale))

    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(64, vectorize_particles=True))
    for _ in range(200):
        svi.step()
    # posterior N(1.5, 1/2); reparametrised draws, so the noise of the last steps is small
    assert pyro.param("loc").item() == pytest.approx(1.5, abs=0.1)
    assert pyro.param("scale").item() == pytest.approx(0.5**0.5, abs=0.1)
    x = Predictive(model, num_samples=500)()["x"]
    assert_mean(x.reshape(1, -1), 0.0)


def test_plates_subsample_and_masks():
    p = ExponentialFamily.gaussian(torch.tensor([0.0, 1.0, 2.0]), 1.0)
    q = dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0)
    x = torch.tensor([0.5, 0.5, 0.5])
    for wrap in (
        lambda p: p.to_event(1),
        lambda p: p.mask(torch.tensor([True, False, True])),
        lambda p: p.expand([2, 3]),
    ):
        assert_close(wrap(p).log_prob(x), wrap(q).log_prob(x))
    assert p.rsample((4,)).shape == (4, 3)
    assert p.starting_points((4,)).shape == (4, 3)


def wishart_model():
    pyro.sample("x", of(dist.Wishart(d(5.0), d([[2.0, 0.5], [0.5, 1.0]]))))


def test_a_wishart_latent():
    mcmc = MCMC(LangevinKernel(wishart_model), 50, 80, num_chains=100, disable_progbar=True)
    mcmc.run()
    assert_mean(mcmc.get_samples(group_by_chain=True)["x"].double()[..., 0, 0], 10.0)
