"""Contrastive divergence with a likelihood to watch."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI

from pyro_ebm import ContrastiveDivergence, UnnormalizedEnergy
from pyro_ebm.normalizer import estimate_log_normalizer


def model(x):
    precision = pyro.param("precision", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)


def train(steps=25, **kwargs):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = ContrastiveDivergence(num_steps=3, **kwargs)
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), loss)
    x, told = 0.5 * torch.randn(200), []
    for _ in range(steps):
        before = pyro.param("precision").item() if told else 1.0
        svi.step(x)
        told.append((before, dict(loss.diagnostics)))
    return x, told, pyro.param("precision").item()


@pytest.mark.parametrize("persistent", [False, True])
def test_a_likelihood_every_so_many_steps(persistent):
    x, told, _ = train(monitor=estimate_log_normalizer, monitor_every=10, persistent=persistent)
    for step, (_, diagnostics) in enumerate(told):
        precision = told[step - step % 10][0]  # as it was when the monitor last ran
        log_z = math.log(2 * math.pi / precision) / 2
        assert diagnostics["log_normalizer"] == pytest.approx(log_z, abs=1e-4)
        want = -precision * x.square().mean().item() / 2 - log_z
        assert diagnostics["log_likelihood"] == pytest.approx(want, abs=1e-4)


def test_training_goes_on_as_without_it():
    def noisy(p):
        return estimate_log_normalizer(p, "ais", num_chains=100, disable_progbar=True)

    assert train(monitor=noisy, monitor_every=5)[2] == train()[2]


def test_it_is_off_by_default():
    assert "log_likelihood" not in train(1)[1][0][1]


def test_evaluation_does_not_run_it():
    calls = []
    loss = ContrastiveDivergence(monitor=lambda p: calls.append(p) or 0.0)
    loss.loss(model, lambda x: None, torch.zeros(3))
    assert calls == []


def test_a_conditional_energy_has_the_likelihood_of_each_row():
    mean = torch.tensor([0.0, 5.0])

    def conditional(x):
        scale = pyro.param("scale", torch.tensor(2.0))
        with pyro.plate("data", 2):
            pyro.sample(
                "x",
                UnnormalizedEnergy(lambda x: ((x - mean) / scale) ** 2 / 2, batch_shape=(2,)),
                obs=x,
            )

    loss = ContrastiveDivergence(monitor=estimate_log_normalizer)
    SVI(conditional, lambda x: None, pyro.optim.Adam({"lr": 0.0}), loss).step(mean + 1)
    want = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(1.0))
    assert loss.diagnostics["log_likelihood"] == pytest.approx(float(want), abs=1e-4)


def test_wrong_settings():
    with pytest.raises(TypeError, match="monitor must be a function of an energy"):
        ContrastiveDivergence(monitor="ais")
    with pytest.raises(ValueError, match="monitor_every must be an integer of at least 1"):
        ContrastiveDivergence(monitor_every=0)
