"""log p(y_i | theta_s) of what was observed, and of nothing else."""

import warnings
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import NUTS
from pyro.infer.reparam import LocScaleReparam

from pyro_ebm import MCMC, LangevinKernel, UnnormalizedEnergy, to_arviz
from pyro_ebm.diagnostics import replay
from pyro_ebm.diagnostics.replay import Replay, energies_of
from pyro_ebm.models import over_chains

Y = torch.tensor([2.0, -1.0, 0.5])
MU = torch.linspace(-2.0, 2.0, 6)
HALF_LOG_2PI = 0.9189385


def ours(model, *args, **kwargs):
    mcmc = MCMC(LangevinKernel(model), 6, 6, num_chains=2, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def plain(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_hand(mu, y=Y):
    """log Normal(y; mu, 1), shape (num, data)."""
    return -((y - mu[:, None]) ** 2) / 2 - HALF_LOG_2PI


def density(model, *args, name="y", **draws):
    return Replay(model, args, {}, draws or {"mu": MU}).log_density([name])[name]


# -- values --------------------------------------------------------------------------------------


def test_as_by_hand():
    torch.testing.assert_close(density(plain, Y), by_hand(MU))


def test_every_draw_when_there_are_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(replay, "CHUNK_SIZE", 4)
    torch.testing.assert_close(density(plain, Y), by_hand(MU))


def count_runs(monkeypatch):
    runs = []
    trace = Replay._trace
    monkeypatch.setattr(Replay, "_trace", lambda *args: runs.append(1) or trace(*args))
    return runs


def test_all_draws_at_once(monkeypatch):
    runs = count_runs(monkeypatch)
    draws = {"mu": torch.randn(100)}
    Replay(plain, (Y,), {}, draws).log_density(["y"])
    assert len(runs) <= 6


@pytest.mark.parametrize("likelihood", [dist.Multinomial, dist.OrderedLogistic])
def test_what_vmap_refuses_is_evaluated_at_once_too(monkeypatch, likelihood):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if likelihood is dist.Multinomial:
            return pyro.sample("y", likelihood(4, x.softmax(-1)), obs=torch.tensor([1.0, 1.0, 2.0]))
        return pyro.sample("y", likelihood(x[0], x.exp().cumsum(-1)), obs=torch.tensor(2))

    runs = count_runs(monkeypatch)
    x = torch.randn(400, 3)
    found = Replay(model, (), {}, {"x": x}).log_density(["y"])["y"]
    assert len(runs) <= 20
    given = [poutine.condition(model, {"x": row}) for row in x[:5]]
    want = [poutine.trace(m).get_trace().nodes["y"] for m in given]
    want = [site["fn"].log_prob(site["value"]) for site in want]
    torch.testing.assert_close(found[:5], torch.stack(want))


def test_a_model_that_looks_at_numbers_runs_draw_by_draw(monkeypatch):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        shift = 1.0 if mu.item() > 0 else 0.0
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)

    runs = count_runs(monkeypatch)
    torch.testing.assert_close(density(model, Y), by_hand(MU + (MU > 0)))
    assert len(runs) >= len(MU)


def test_a_vectorized_value_that_differs_is_not_trusted(monkeypatch):
    zeros = {"y": torch.zeros(6, 3)}
    monkeypatch.setattr(over_chains, "vmap", lambda f, randomness: lambda d: zeros)
    torch.testing.assert_close(density(plain, Y), by_hand(MU))


def test_an_error_of_the_model_is_shown():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if Y is not y:
            raise RuntimeError("not this one")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(RuntimeError, match="not this one"):
        density(model, Y + 1)


def test_masked_elements_are_0_and_scales_are_left_out():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()), poutine.scale(scale=7.0):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([2.0, float("nan"), 0.5])
    want = by_hand(MU, y)
    want[:, 1] = 0.0
    torch.testing.assert_close(density(model, y), want)
    assert Replay(model, (y,), {}, {"mu": MU}).is_data("y")  # NaN equals NaN


def test_masks_of_the_distribution():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        mask = torch.tensor([True, False, True])
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).mask(mask), obs=y)

    want = by_hand(MU)
    want[:, 1] = 0.0
    torch.testing.assert_close(density(model, Y), want)


def test_partially_observed_sites():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=torch.tensor([1, 0, 1]).bool())

    draws = {"mu": MU, "y_unobserved": torch.randn(6, 3)}
    again = Replay(model, (Y,), {}, draws)
    assert again.observed == ["y_observed"]
    want = by_hand(MU)
    want[:, 1] = 0.0
    torch.testing.assert_close(again.log_density(["y_observed"])["y_observed"], want)


def test_modules_are_in_evaluation_mode_and_put_back():
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.9))
    energy = UnnormalizedEnergy(lambda x: net[1](x), log_normalizer=0.0)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(net(mu.expand(3, 1))[:, 0], 1.0), obs=y)
            pyro.sample("x", energy, obs=y)

    again = Replay(model, (Y,), {}, {"mu": MU}).log_density(["y", "x"])
    torch.testing.assert_close(again["y"], by_hand(net[0](MU[:, None])[:, 0].detach()))
    torch.testing.assert_close(again["x"], -Y.expand(6, 3))
    assert net[1].training
    assert not again["y"].requires_grad


def test_nothing_else_changes():
    def model(y):
        scale = pyro.param("scale", torch.tensor(2.0))
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]), obs=y)

    state = torch.get_rng_state()
    with poutine.trace() as outside:
        density(model, Y)
    assert torch.equal(torch.get_rng_state(), state)
    assert not outside.trace.nodes
    assert torch.distributions.Distribution._validate_args


# -- which sites have one ------------------------------------------------------------------------


def quartic(x):
    return (x**4).sum(-1)


def energy_model(x, y, **settings):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(quartic, event_shape=(2,), **settings), obs=x)
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def learned():
    return torch.nn.Parameter(torch.tensor(1.5))


def test_a_known_normalizer_makes_a_likelihood():
    x = torch.randn(3, 2)
    mcmc = ours(lambda x, y: energy_model(x, y, log_normalizer=1.5), x, Y)
    found = to_arviz(mcmc, log_likelihood=True)["log_likelihood"]
    assert set(found.data_vars) == {"x", "y"}
    assert found["x"].dims == ("chain", "draw", "data")
    want = (-quartic(x) - 1.5).expand(2, 6, 3)
    np.testing.assert_allclose(found["x"], want, rtol=1e-5)
    mu = torch.tensor(to_arviz(mcmc)["posterior"]["mu"].values)
    np.testing.assert_allclose(found["y"], by_hand(mu.flatten()).reshape(2, 6, 3), rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"log_normalizer": learned()}, {"constant_normalizer": True}],
    ids=["unknown", "learned", "constant"],
)
def test_an_unnormalized_site_is_left_out_aloud(settings):
    x = torch.randn(3, 2)
    mcmc = ours(lambda x, y: energy_model(x, y, **settings), x, Y)
    with pytest.warns(UserWarning, match="the log Z of site 'x' is not known"):
        found = to_arviz(mcmc, log_likelihood=True)
    assert set(found["log_likelihood"].data_vars) == {"y"}
    assert set(found["observed_data"].data_vars) == {"x", "y"}

    found = to_arviz(mcmc, log_likelihood=True, unnormalized=True, dims={"x": ["point", "xy"]})
    assert set(found["log_likelihood"].data_vars) == {"x_unnormalized", "y"}
    value = found["log_likelihood"]["x_unnormalized"]
    assert value.dims == ("chain", "draw", "point")
    want = -quartic(x) - (1.5 if "log_normalizer" in settings else 0.0)
    np.testing.assert_allclose(value, want.detach().expand(2, 6, 3), rtol=1e-5)


def test_the_warning_points_at_the_caller():
    mcmc = ours(energy_model, torch.randn(3, 2), Y)
    with pytest.warns(UserWarning, match="left out") as caught:
        to_arviz(mcmc, log_likelihood=True)
    assert [w.filename for w in caught] == [__file__]


def test_energies_within_other_distributions():
    p = UnnormalizedEnergy(torch.square)
    q = UnnormalizedEnergy(torch.square, log_normalizer=0.57)
    mask = torch.tensor([True, False])
    mixed = dist.MaskedMixture(mask, q.expand([2]), p.expand([2]))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), p.expand([2]))
    assert [e.is_normalized for e in energies_of(mixed)] == [True, False]
    assert [e.is_normalized for e in energies_of(mixture)] == [False]
    assert [e.is_normalized for e in energies_of(q.expand([2]).to_event(1).mask(False))] == [True]
    assert not list(energies_of(dist.Normal(0.0, 1.0).expand([2]).to_event(1)))


def test_factors_are_no_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.factor("bare", -mu.square().expand(3))
            pyro.factor("masked", -mu.square())
            pyro.deterministic("twice", 2 * mu)
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = to_arviz(ours(model, Y), log_likelihood=True)
    for group in ("observed_data", "log_likelihood"):
        assert list(found[group].data_vars) == ["y"]


def test_values_computed_from_latents_are_no_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("tie", UnnormalizedEnergy(torch.square), obs=mu - 1)
        pyro.sample("soft", dist.Normal(0.0, 1.0), obs=mu**3)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mcmc = ours(model, Y)
    assert list(to_arviz(mcmc)["observed_data"].data_vars) == ["y"]
    with pytest.warns(UserWarning, match="computed from latents") as caught:
        found = to_arviz(mcmc, log_likelihood=True, unnormalized=True)
    assert [w.message.args[0].split("'")[1] for w in caught] == ["tie", "soft"]
    assert list(found["log_likelihood"].data_vars) == ["y"]


def test_reparametrized_sites_are_no_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    model = poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})
    found = to_arviz(ours(model, Y), log_likelihood=True)
    assert set(found["posterior"].data_vars) == {"mu", "theta_decentered"}
    assert found["posterior"]["theta_decentered"].dims == ("chain", "draw", "data")
    assert list(found["observed_data"].data_vars) == ["y"]
    assert list(found["log_likelihood"].data_vars) == ["y"]


def test_conditioned_sites_are_data():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1.0))

    found = to_arviz(ours(poutine.condition(model, data={"y": Y})), log_likelihood=True)
    np.testing.assert_array_equal(found["observed_data"]["y"], Y)
    assert list(found["log_likelihood"].data_vars) == ["y"]


# -- there is none -------------------------------------------------------------------------------


def test_nothing_is_left():
    def model(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", UnnormalizedEnergy(torch.square), obs=x)

    with pytest.raises(ValueError, match="no log-likelihood: the log Z of site 'x'"):
        to_arviz(ours(model, torch.tensor(1.0)), log_likelihood=True)

    def nothing_observed():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the model observes no data"):
        to_arviz(ours(nothing_observed), log_likelihood=True)


def test_latents_that_were_not_kept():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", UnnormalizedEnergy(torch.square))
        pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)

    mcmc = ours(model, Y[0], save_params=["mu"])
    no_chains = mock.patch.object(UnnormalizedEnergy, "_run", side_effect=AssertionError)
    with no_chains, pytest.raises(ValueError, match=r"none of \['shift'\]"):
        to_arviz(mcmc, log_likelihood=True)
    assert set(to_arviz(mcmc)["posterior"].data_vars) == {"mu"}


def test_latents_that_were_summed_out():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            sign = pyro.sample("sign", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu * (2 * sign - 1), 1.0), obs=y)

    mcmc = infer.MCMC(NUTS(model, max_plate_nesting=1), 4, 4, disable_progbar=True)
    mcmc.run(Y)
    with pytest.raises(ValueError, match=r"none of \['sign'\].*MixtureSameFamily"):
        to_arviz(mcmc, log_likelihood=True)
    np.testing.assert_array_equal(to_arviz(mcmc)["observed_data"]["y"], Y)
