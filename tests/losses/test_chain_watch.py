"""The chains of contrastive divergence are watched: numbers of each gradient, and two warnings."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import ContrastiveDivergence, LangevinKernel, UnnormalizedEnergy, fit
from pyro_ebm.losses.contrastive import chain_watch
from pyro_ebm.losses.contrastive.chain_watch import ChainWatch, chain_numbers
from pyro_ebm.nn import MLPEnergy

SIGMAS = 4.5


def still(**settings):
    """A loss whose chains stand still."""
    kernel = LangevinKernel(step_size=1e-12, adapt_step_size=False)
    return ContrastiveDivergence(kernel, **settings)


def gradient(loss, x, base=None, precision=1.0):
    def model(x):
        p = UnnormalizedEnergy(lambda x: precision * x.square().sum(-1) / 2, (2,), base=base)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    loss(model, lambda x: None)(x)
    return loss.diagnostics


def wide(scale):
    return dist.Normal(torch.zeros(2), scale).to_event(1)


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_spread_and_distance_are_as_written(dtype):
    data = torch.tensor([[0, 0], [4, 0], [0, 2]]).to(dtype)
    start = torch.tensor([[1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]).to(dtype)
    end = start + torch.tensor([[0, 0], [3, 4], [1, 0], [0, -2], [30, 40]]).to(dtype)

    def variance(x):
        x = x.double()
        return (x - x.mean(0)).square().sum() / (len(x) - 1)

    numbers = chain_numbers(data, start, end)
    assert float(numbers["spread"] ** 2) == pytest.approx(float(variance(end) / variance(data)))
    moved = 2 / float(variance(data)) ** 0.5  # 0, 1, 2, 5, 50
    assert float(numbers["distance_moved"]) == pytest.approx(moved)
    assert chain_numbers(data[:1], start, end) == chain_numbers(data, start[:1], end[:1]) == {}


def test_chains_from_the_data_or_of_their_own():
    x = torch.randn(2000, 2)
    numbers = gradient(still(), x)
    assert numbers["spread"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < numbers["distance_moved"] < 1e-5
    assert not {"restarted", "step_size_trend"} & set(numbers)
    numbers = gradient(still(persistent=True, num_chains=2000), x, wide(3.0))
    # each root of a variance has the relative error 1 / sqrt(4 n)
    assert abs(numbers["spread"] - 3) < SIGMAS * 3 * (2 / (4 * 2000)) ** 0.5


def test_how_many_chains_start_again():
    loss, x = still(persistent=True, num_chains=4000, restart_prob=0.2), torch.randn(5, 2)
    assert gradient(loss, x)["restarted"] == 1
    loss.chains["x"] = torch.full((4000, 2), 100.0)
    numbers = gradient(loss, x)
    restarted = (loss.chains["x"] < 50).all(-1).double().mean()
    assert numbers["restarted"] == pytest.approx(float(restarted))
    assert abs(numbers["restarted"] - 0.2) < SIGMAS * (0.2 * 0.8 / 4000) ** 0.5
    assert numbers["distance_moved"] < 1e-4  # of those that go on
    loss = still(persistent=True)
    assert [gradient(loss, x)["restarted"] for _ in range(2)] == [1, 0]


def test_masked_rows_do_not_count():
    x = torch.randn(50, 2)
    x[25:] *= 100

    def model(x):
        with pyro.plate("data", 50), pyro.poutine.mask(mask=torch.arange(50) < 25):
            pyro.sample("x", UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, (2,)), obs=x)

    for settings in ({}, {"persistent": True, "num_chains": 30}):
        loss = still(**settings)
        loss(model, lambda x: None)(x)
        of_data = x[:25].var(0).sum().sqrt()
        end = loss.chains["x"] if settings else x[:25]
        want = end.var(0).sum().sqrt() / of_data
        assert loss.diagnostics["spread"] == pytest.approx(float(want), rel=1e-4)


def test_the_history_of_a_fit_holds_them():
    def model(x):
        lam = pyro.param("lam", torch.tensor(1.0))
        with pyro.plate("data", 50, subsample_size=len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2), obs=x)

    loss = ContrastiveDivergence(persistent=True)
    result = fit(
        model, lambda x: None, loss, torch.randn(50), 20, batch_size=10, disable_progbar=True
    )
    for name in ("spread", "distance_moved", "restarted", "step_size_trend"):
        assert len(result.history[name]) == 20
    steps = torch.tensor(result.history["step_size"])
    trend = torch.tensor(result.history["step_size_trend"])
    torch.testing.assert_close(trend, steps / steps.cummax(0).values)


# -- a step size that collapses ------------------------------------------------------------------


def messages(watch, path, distance_moved=0.3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step_size in path:
            watch.trend("x", step_size, distance_moved)
    return [str(warning.message) for warning in caught]


def falling(count, power=1.5):
    return [0.1 * max(1.0, n / 50) ** -power for n in range(1, count)]


def test_a_step_size_that_goes_on_falling_is_named_once():
    (message,) = messages(ChainWatch(), falling(1000))
    assert "site 'x': the step size of the chains has fallen from 0.1 to 0.00" in message
    assert "less than 0.3 of the data's spread" in message
    assert "energy_penalty" in message


def test_the_advice_is_for_the_energy():
    def advice(energy, base=None):
        p = UnnormalizedEnergy(energy, (2,), base=base)
        watch = ChainWatch()
        with pytest.warns(UserWarning, match="half of them do not move at a gradient") as caught:
            _ = [watch.trend("x", step_size, 0.0, p) for step_size in falling(1000)]
        assert caught[0].filename == __file__
        return str(caught[0].message)

    layer = torch.nn.Linear(2, 1)
    plain = advice(lambda x: x.square().sum(-1), wide(3.0))
    assert not any(word in plain for word in ("a base", "spectral", "MLPEnergy"))
    assert "a base" in advice(layer)
    assert "torch.nn.utils.parametrizations.spectral_norm" in advice(layer)
    assert "spectral" not in advice(MLPEnergy(2, (4,), spectral_norm=True))


@pytest.mark.parametrize("slow", [1, 20])
def test_a_step_size_that_settles_is_none(slow):
    """High while the energy is flat, it falls to a level: a thirteenth here, at any rate."""
    path = [0.07 + 0.9 * math.exp(-n / (200 * slow)) for n in range(1, 1500 * slow)]
    assert messages(ChainWatch(), path) == []
    assert messages(ChainWatch(), falling(1000), distance_moved=0.9) == []  # they still move
    assert messages(ChainWatch(), falling(200)) == []  # not yet a tenth


def test_what_is_kept_in_mind_goes_on():
    whole, half = ChainWatch(), ChainWatch()
    path = falling(1000)
    (message,) = messages(whole, path)
    before = messages(half, path[:150])
    again = ChainWatch()
    again.load_state_dict(half.state_dict())
    assert [*before, *messages(again, path[150:])] == [message]
    assert again.state_dict() == whole.state_dict()
    after = ChainWatch()
    after.load_state_dict(whole.state_dict())
    assert messages(after, path) == []


def test_an_energy_that_grows_too_steep():
    loss = ContrastiveDivergence(persistent=True, num_chains=100)
    x = torch.randn(100, 2)

    def train():
        for step in range(400):
            gradient(loss, x, precision=1.015 ** max(0, step - 100))

    with pytest.warns(UserWarning, match="site 'x': the step size of the chains has fallen"):
        train()
    assert 0.3 < loss.diagnostics["acceptance_rate"] < 0.7  # which tells nothing
    assert loss.diagnostics["step_size_trend"] < 0.1


# -- negatives apart from the data ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "message"), [(10.0, "Take a base that is nearer"), (0.1, "sit on")]
)
def test_negatives_apart_from_the_data_for_long(monkeypatch, scale, message):
    monkeypatch.setattr(chain_watch, "LONG", 5)
    loss, x = still(persistent=True, num_chains=100), torch.randn(100, 2)
    for _ in range(4):
        gradient(loss, x, wide(scale))
    with pytest.warns(UserWarning, match=rf"site 'x': for 5 gradients in a row.*{message}"):
        gradient(loss, x, wide(scale))
    gradient(loss, x, wide(scale))  # once


def test_only_in_a_row_and_only_far():
    watch = ChainWatch()
    for _ in range(3):
        for spread in [3.0] * (chain_watch.LONG - 1) + [1.9]:
            watch.compare("x", spread)
    for spread in [0.6, 1.9, math.nan] * chain_watch.LONG:
        watch.compare("x", spread)
    for site in "ab":
        with pytest.warns(UserWarning, match=f"'{site}'.*at last 3 times.*Give the energy a base"):
            _ = [watch.compare(site, 3.0) for _ in range(chain_watch.LONG)]
