"""An energy is a Pyro distribution: sites, plates, handlers, guides, Predictive, NUTS."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.inspect import get_model_relations
from pyro.optim import Adam
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import UnnormalizedEnergy
from tests.statistics import assert_mean


def normal_energy(mean=0.0, variance=1.0):
    return UnnormalizedEnergy(lambda x: (x - mean) ** 2 / (2 * variance))


def latent_model():
    """x has the energy of N(0, 1), y | x is N(x, 1): x | y = 3 is N(1.5, 1/2)."""
    x = pyro.sample("x", normal_energy())
    return pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0))


def joint(model, values, *args):
    return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()


def test_latent_and_observed_sites_add_their_log_prob():
    x = torch.tensor(0.7)
    assert_close(
        joint(latent_model, {"x": x}),
        -x.square() / 2 + dist.Normal(x, 1.0).log_prob(torch.tensor(3.0)),
    )
    observed = poutine.trace(latent_model).get_trace()
    assert not observed.nodes["x"]["is_observed"]

    def model(data):
        with pyro.plate("data", len(data)):
            pyro.sample("x", normal_energy(1.0), obs=data)

    data = torch.randn(5)
    assert_close(joint(model, {}, data), -(data - 1).square().sum() / 2)


def test_a_factor_on_other_latents():
    def model():
        with pyro.plate("points", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        smooth = UnnormalizedEnergy(lambda d: d.abs().sum(-1), event_shape=(3,))
        pyro.sample("smooth", smooth, obs=z.diff())

    z = torch.randn(4, requires_grad=True)
    log_joint = joint(model, {"z": z})
    assert_close(log_joint, dist.Normal(0.0, 1.0).log_prob(z).sum() - z.diff().abs().sum())
    (grad,) = torch.autograd.grad(log_joint, z)
    sign = z.diff().sign()
    want = -z - torch.cat([-sign[:1], sign[:-1] - sign[1:], sign[-1:]])
    assert_close(grad, want.detach())


def test_plates_expand_the_energy():
    def model():
        with pyro.plate("a", 3), pyro.plate("b", 2):
            return pyro.sample("x", UnnormalizedEnergy(lambda x: x.square().sum(-1), (4,)))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (2, 3, 4)
    assert site["log_prob"].shape == (2, 3)
    assert_close(site["log_prob"], -site["value"].square().sum(-1))


def test_subsampling_plates_scale():
    def model(data):
        with pyro.plate("data", len(data), subsample=torch.tensor([1, 4])) as i:
            pyro.sample("x", normal_energy(), obs=data[i])

    data = torch.arange(6.0)
    assert_close(joint(model, {}, data), torch.tensor(-(1.0 + 16.0) / 2 * 3))


def test_handlers():
    data = torch.tensor([1.0, 2.0, 3.0])

    def model(mask=None):
        with pyro.plate("data", 3):
            return pyro.sample("x", normal_energy(), infer={"note": 1})

    energies = data.square() / 2
    given = poutine.condition(model, {"x": data})

    def log_prob(model):
        return poutine.trace(model).get_trace().log_prob_sum()

    assert_close(log_prob(given), -energies.sum())
    mask = torch.tensor([True, False, True])
    assert_close(log_prob(poutine.mask(given, mask=mask)), -(energies[0] + energies[2]))
    assert_close(log_prob(poutine.scale(given, scale=0.25)), -energies.sum() / 4)
    assert "x" not in poutine.trace(poutine.block(model, hide=["x"])).get_trace().nodes
    first = poutine.trace(model).get_trace()
    assert_close(poutine.replay(model, trace=first)(), first.nodes["x"]["value"])
    pyro.set_rng_seed(1)
    again = poutine.trace(model).get_trace()
    assert not torch.equal(again.nodes["x"]["value"], first.nodes["x"]["value"])

    def learned():
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("data", 3):
            pyro.sample("x", normal_energy(mean), obs=data)

    substituted = poutine.substitute(learned, {"mean": torch.tensor(2.0)})
    assert_close(log_prob(substituted), -(data - 2).square().sum() / 2)


def test_wrapped_sites():
    def model():
        mask = torch.tensor([True, False])
        pyro.sample("event", normal_energy().expand([2]).to_event(1), obs=torch.ones(2))
        with pyro.plate("p", 2):
            pyro.sample("masked", normal_energy().mask(mask), obs=torch.ones(2))

    assert_close(joint(model, {}), torch.tensor(-1.5))


def test_prior_and_posterior_predictive():
    def model():
        x = pyro.sample("x", UnnormalizedEnergy(lambda x: (x - 2) ** 2 / (2 * 0.25)))
        with pyro.plate("data", 2):
            return pyro.sample("y", dist.Normal(x, 0.1))

    n = 200
    prior = Predictive(model, num_samples=n, parallel=True)()
    assert prior["x"].shape == (n, 1)
    assert prior["y"].shape == (n, 2)
    assert (prior["x"].mean() - 2).abs() < 5 * 0.5 / n**0.5
    assert ((prior["y"] - prior["x"]).abs() < 0.6).all()
    serial = Predictive(model, num_samples=3)()
    assert serial["x"].numel() == 3
    assert serial["x"].unique().numel() == 3
    posterior = Predictive(model, posterior_samples={"x": torch.tensor([7.0, -7.0])})()
    assert_close(posterior["y"].mean(-1), torch.tensor([7.0, -7.0]), atol=0.5, rtol=0.0)


def test_an_energy_site_can_be_predicted():
    def model(data=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        energy = UnnormalizedEnergy(lambda x: (x - mean) ** 2 / 0.02, constant_normalizer=True)
        return pyro.sample("x", energy, obs=data)

    means = torch.tensor([3.0, -3.0])
    x = Predictive(model, posterior_samples={"mean": means})()["x"]
    assert x.shape == (2,)
    assert ((x - means).abs() < 5 * 0.1).all()


def test_render_model_sees_the_relations():
    def model(data):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        x = pyro.sample("x", UnnormalizedEnergy(lambda x: z * x**2, log_normalizer=-z.log() / 2))
        with pyro.plate("data", 3):
            pyro.sample("e", UnnormalizedEnergy(lambda d: (d - x) ** 2), obs=data)

    relations = get_model_relations(model, (torch.zeros(3),))
    assert relations["sample_sample"] == {"z": [], "x": ["z"], "e": ["x"]}
    assert relations["sample_dist"] == {
        "z": "Gamma",
        "x": "UnnormalizedEnergy",
        "e": "UnnormalizedEnergy",
    }
    assert relations["plate_sample"] == {"data": ["e"]}
    drawn = str(pyro.render_model(model, (torch.zeros(3),)))
    assert all(edge in drawn for edge in ("z -> x", "x -> e"))
    assert relations["observed"] == ["e"]


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoDiagonalNormal])
def test_autoguides_fit_a_latent_energy_site(make_guide):
    guide = make_guide(latent_model)
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(latent_model, guide, Adam({"lr": 0.05}), loss)
    for _ in range(250):
        svi.step()
    x = torch.stack([guide()["x"].detach() for _ in range(1000)])
    # the posterior N(1.5, 1/2) lies in the family; the optimizer's own error is below .05
    assert (x.mean() - 1.5).abs() < 5 * (0.5 / len(x)) ** 0.5 + 0.05
    assert (x.var() - 0.5).abs() < 5 * 0.5 * (2 / len(x)) ** 0.5 + 0.05


def test_autoguide_on_a_constrained_energy_site():
    def model():
        with pyro.plate("p", 2):
            pyro.sample("x", UnnormalizedEnergy(lambda x: x, support=constraints.positive))

    guide = AutoNormal(model)
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    x = guide()["x"]
    assert x.shape == (2,)
    assert (x > 0).all()


def _run_nuts(model, num_samples=300):
    mcmc = MCMC(NUTS(model), num_samples, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    return mcmc


def test_nuts_recovers_a_closed_form_posterior():
    mcmc = _run_nuts(latent_model)
    ess = mcmc.diagnostics()["x"]["n_eff"]
    x = mcmc.get_samples()["x"]
    assert (x.mean() - 1.5).abs() < 5 * (0.5 / ess) ** 0.5
    assert (x.var() - 0.5).abs() < 5 * 0.5 * (2 / ess) ** 0.5


def test_nuts_on_a_positive_energy_site():
    def model():  # Gamma(3, 2), and a tilt of Exponential(1) that is the same
        with pyro.plate("alike", 8):
            pyro.sample(
                "x", UnnormalizedEnergy(lambda x: 2 * x - 2 * x.log(), (), constraints.positive)
            )
            base = dist.Exponential(1.0)
            pyro.sample("t", UnnormalizedEnergy(lambda x: x - 2 * x.log(), base=base))

    mcmc = MCMC(NUTS(model), 50, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    for x in mcmc.get_samples().values():
        assert_mean(x.T, 1.5)


def test_nuts_with_a_network():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor([1.0, -1.0]))

        def forward(self, x):
            return (x - self.mean).square().sum(-1) / 2

    net = Net()

    def model():
        pyro.module("net", net)
        pyro.sample("x", UnnormalizedEnergy(net, event_shape=(2,)))

    mcmc = _run_nuts(model)
    ess = mcmc.diagnostics()["x"]["n_eff"]
    error = mcmc.get_samples()["x"].mean(0) - net.mean.detach()
    assert (error.abs() < 5 / ess.sqrt()).all()


def test_a_network_that_svi_is_not_to_train_is_frozen():
    net = torch.nn.Linear(1, 1)

    def model():
        pyro.sample("x", UnnormalizedEnergy(lambda x: net(x[..., None])[..., 0] ** 2))

    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"net\.requires_grad_\(False\)"):
        svi.step()
    net.requires_grad_(False)
    assert math.isfinite(svi.step())
