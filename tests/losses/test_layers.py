"""Training machines and networks without a loop of one's own."""

import math

import pyro
import pytest
import torch

from pyro_ebm import ContrastiveDivergence
from pyro_ebm.distributions import (
    DeepBeliefNetwork,
    GaussianRBMModule,
    RBMModule,
)
from pyro_ebm.losses import fit_layers, fit_rbm
from pyro_ebm.losses.contrastive import fit_rbm as layers
from pyro_ebm.losses.contrastive.rbm_gradient import ClosedFormStep
from pyro_ebm.mcmc import GibbsKernel, LangevinKernel


def patterns(n):
    """Two patterns of six bits, with an eighth of the bits wrong: pixels alone say nothing."""
    x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])[torch.randint(2, (n,))]
    return torch.where(torch.rand(n, 6) < 0.125, 1 - x, x)


def log_likelihood(machine, x):
    machine = machine.normalized(machine.exact_log_normalizer())
    with torch.no_grad():
        return machine.log_prob(x).mean().item()


def entropy():
    """Of the patterns, in nats: the ceiling of the log-likelihood, by enumeration."""
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    a = torch.tensor([1.0, 1, 1, 0, 0, 0])
    wrong = (x - a).abs().sum(-1)
    p = 0.5 * (0.125**wrong * 0.875 ** (6 - wrong) + 0.125 ** (6 - wrong) * 0.875**wrong)
    return -(p * p.log()).sum().item()


@pytest.mark.parametrize("centered", [True, False])
def test_a_machine_learns_the_patterns(centered):
    train, test = patterns(2000), patterns(5000)
    net = RBMModule(6, 2, train, centered=centered)
    before = log_likelihood(net(), test)
    history = fit_rbm(net, train, num_epochs=30, disable_progbar=True)
    assert len(history) == 30
    found = log_likelihood(net(), test)
    assert before < -4.0  # independent pixels: 6 log 2 = 4.16
    assert found > -entropy() - 0.06  # 3.0 nats; 0.02 of it is that the test set is a sample
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_the_parameter_store_is_left_alone():
    pyro.param("weights", torch.tensor(3.0))
    fit_rbm(RBMModule(6, 2), patterns(100), num_epochs=1, disable_progbar=True)
    assert list(pyro.get_param_store()) == ["weights"]
    assert pyro.param("weights") == 3.0


def test_probabilities_are_drawn_anew():
    # data of one row of probabilities: the machine must learn these frequencies, not that row
    p = torch.tensor([0.2, 0.9, 0.5])
    net = RBMModule(3, 1)
    fit_rbm(net, p.expand(1000, 3), num_epochs=60, disable_progbar=True)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    machine = net()
    with torch.no_grad():
        states = machine.normalized(machine.exact_log_normalizer()).log_prob(x).exp()
    torch.testing.assert_close((states[:, None] * x).sum(0), p, atol=0.03, rtol=0.0)


def test_a_gaussian_machine_learns_too():
    centers = torch.tensor([[3.0, 3.0], [-3.0, -3.0]])
    x = centers[torch.randint(2, (2000,))] + torch.randn(2000, 2)
    x = (x - x.mean(0)) / x.std(0)
    net = GaussianRBMModule(2, 2, x, centered=True)
    before = log_likelihood(net(), x)
    fit_rbm(net, x, num_epochs=60, lr=0.02, disable_progbar=True)
    assert log_likelihood(net(), x) > before + 0.5


def test_callbacks_and_layers():
    data, seen = patterns(200), []
    net = DeepBeliefNetwork([RBMModule(6, 4, data), RBMModule(4, 2)])
    history = fit_layers(
        net,
        data,
        callback=lambda machine, epoch, found: seen.append(
            (machine, epoch, "energy_data" in found)
        ),
        num_epochs=2,
        disable_progbar=True,
    )
    assert seen == [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True)]
    assert [len(epochs) for epochs in history] == [2, 2]


@pytest.mark.parametrize("means", [True, False])
def test_layers_raise_the_bound(means):
    train, test = patterns(2000), patterns(2000)
    machines = [RBMModule(6, 3, train, centered=True), RBMModule(3, 3, centered=True)]
    net = DeepBeliefNetwork(machines)
    fit_layers(net, train, means=means, num_epochs=40, disable_progbar=True)
    assert net.lower_bound(test).mean() > -entropy() - 0.25
    # the second machine has seen the first one's hidden units: a fresh one knows nothing
    fresh = DeepBeliefNetwork([machines[0], RBMModule(3, 3)])
    assert net.lower_bound(test).mean() > fresh.lower_bound(test).mean() + 0.2


def test_own_loss_is_used():
    loss = ContrastiveDivergence(num_steps=3, persistent=True, num_chains=7)
    fit_rbm(RBMModule(6, 2), patterns(50), 1, 10, loss=loss, disable_progbar=True)
    assert loss.chains["x"].shape == (7, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"lr": 0.0}, "lr must be positive and finite"),
        ({"data": torch.zeros(5, 4)}, r"data must have shape \(num, 6\), got \(5, 4\)"),
        ({"data": torch.full((5, 6), 1.5)}, r"some leave \[0, 1\]"),
        ({"data": torch.full((5, 6), torch.nan)}, r"some leave \[0, 1\]"),
        ({"center_rate": 1.5}, r"center_rate must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input(change, message):
    arguments = {"data": patterns(20), "num_epochs": 1, **change}
    with pytest.raises(ValueError, match=message):
        fit_rbm(RBMModule(6, 2), disable_progbar=True, **arguments)


# -- steps in closed form ------------------------------------------------------------------------

SETTINGS = {
    "CD-1": {},
    "CD-3": {"num_steps": 3, "kernel": GibbsKernel()},
    "persistent": {"persistent": True},
    "restarted": {"persistent": True, "num_chains": 7, "restart_prob": 0.3, "num_steps": 2},
}


def trained(family, centered, settings, **kwargs):
    pyro.set_rng_seed(3)
    data = torch.randn(50, 6).double() if family is GaussianRBMModule else patterns(50).double()
    net = family(6, 4, data, centered=centered, weight_scale=0.5)
    loss = ContrastiveDivergence(**settings)
    seen = []
    history = fit_rbm(
        net,
        kwargs.pop("data", data),
        num_epochs=4,
        batch_size=16,
        loss=loss,
        callback=lambda epoch, now: seen.append(net.weights.detach().clone()),
        disable_progbar=True,
        **kwargs,
    )
    return net, loss, history, torch.stack(seen)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("family", [RBMModule, GaussianRBMModule])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_in_closed_form_are_those_of_the_loss(monkeypatch, settings, family, centered):
    """The same draws, and after every epoch the same parameters, chains and diagnostics."""
    assert ClosedFormStep.of(family(6, 4), ContrastiveDivergence(**settings)) is not None
    net, loss, history, path = trained(family, centered, settings)
    monkeypatch.setattr(ClosedFormStep, "of", lambda *args: None)
    net_, loss_, history_, path_ = trained(family, centered, settings)
    torch.testing.assert_close(path, path_, rtol=1e-9, atol=1e-12)
    assert (path[1:] - path[:-1]).abs().amax((1, 2)).min() > 1e-3  # and they move
    torch.testing.assert_close(net.state_dict(), net_.state_dict(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.chains, loss_.chains, rtol=1e-9, atol=1e-9)
    assert loss.steps_taken == loss_.steps_taken == 4 * (50 // 16)
    for one, other in zip(history, history_, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_probabilities_and_whole_numbers_as_data(monkeypatch):
    """Bits are drawn, or cast, as they are for the loss."""
    for data in (torch.rand(50, 6), patterns(50).to(torch.uint8), patterns(50).bool()):
        with monkeypatch.context() as patch:
            *_, path = trained(RBMModule, True, {"persistent": True}, data=data)
            patch.setattr(ClosedFormStep, "of", lambda *args: None)
            *_, path_ = trained(RBMModule, True, {"persistent": True}, data=data)
        torch.testing.assert_close(path, path_, rtol=1e-9, atol=1e-12)


class Tied(RBMModule):
    """A machine whose hidden biases are all alike."""

    def plain_parameters(self):
        w, b, c = super().plain_parameters()
        return w, b, c.mean() + torch.zeros_like(c)


def hooked():
    net = RBMModule(6, 4)
    net.weights.register_hook(lambda grad: 0 * grad)
    return net


@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (Tied(6, 4), {}),
        (hooked(), {}),
        (torch.nn.utils.parametrizations.weight_norm(RBMModule(6, 4), "weights"), {}),
        (RBMModule(6, 4), {"energy_penalty": 0.1}),
        (RBMModule(6, 4), {"num_particles": 2}),
        (RBMModule(6, 4), {"monitor": lambda p: p.exact_log_normalizer()}),
        (GaussianRBMModule(6, 4), {"kernel": LangevinKernel()}),
    ],
    ids=["subclass", "hook", "parametrized", "penalty", "particles", "monitor", "kernel"],
)
def test_what_has_no_closed_form_is_left_to_the_loss(net, settings):
    loss = ContrastiveDivergence(**settings)
    assert ClosedFormStep.of(net, loss) is None
    before = net.weights.detach().clone()
    (last,) = fit_rbm(net, patterns(100), 1, loss=loss, disable_progbar=True)
    assert all(math.isfinite(value) for value in last.values())
    still = bool(net.weights._backward_hooks)
    assert torch.equal(net.weights, before) == still


def test_frozen_parameters_stay(monkeypatch):
    ends = []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr(layers.ClosedFormStep, "of", lambda *args: None)
        pyro.set_rng_seed(0)
        net = RBMModule(6, 4).double()
        net.visible_bias.requires_grad_(False)
        fit_rbm(net, patterns(100).double(), 3, 20, disable_progbar=True)
        assert not net.visible_bias.any()
        ends.append(net.weights.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_parameters_that_are_no_numbers_are_refused():
    net = RBMModule(6, 2)
    with pytest.raises(ValueError, match="Expected parameter weights"):
        fit_rbm(
            net,
            patterns(200),
            num_epochs=3,
            callback=lambda *now: net.weights.data.fill_(torch.nan),
            disable_progbar=True,
        )


def test_real_data_must_be_finite():
    data = torch.tensor([[0.0, 1.0], [torch.inf, 2.0]])
    with pytest.raises(ValueError, match="hold NaN or infinite values"):
        fit_rbm(GaussianRBMModule(2, 2), data, 1, disable_progbar=True)


def test_layers_take_no_loss():
    net = DeepBeliefNetwork([RBMModule(6, 2)])
    with pytest.raises(ValueError, match="a loss holds the chains of one machine"):
        fit_layers(net, patterns(20), loss=ContrastiveDivergence())


def test_bars_and_stripes_to_a_tenth_of_the_ceiling():
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    bars = bits[:, :, None].expand(16, 4, 4).reshape(16, 16)
    stripes = bits[:, None, :].expand(16, 4, 4).reshape(16, 16)
    data = torch.cat([bars, stripes]).unique(dim=0)
    assert len(data) == 30
    net = RBMModule(16, 24, data, centered=True, weight_scale=0.1)
    # many chains, some of them started anew: the energy must not outrun them
    settings = {"persistent": True, "num_chains": 2000, "restart_prob": 0.02}
    loss = ContrastiveDivergence(num_steps=10, **settings)
    fit_rbm(net, data, num_epochs=400, loss=loss, disable_progbar=True)
    ceiling = -102.036  # 30 log(1/30)
    assert 1.1 * ceiling < 30 * log_likelihood(net(), data) < ceiling
