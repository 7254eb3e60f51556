"""Modules of restricted Boltzmann machines: their start, centering, and training."""

import copy
import itertools
import pickle

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.testing import assert_close

from pyro_ebm import ContrastiveDivergence
from pyro_ebm.distributions.boltzmann.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.boltzmann.rbm import RBM
from pyro_ebm.distributions.boltzmann.rbm_module import GaussianRBMModule, RBMModule


def all_bits(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)


def bars():
    """The patterns of 2 x 3 pixels that are bars: one row, or one column."""
    rows = [torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 1])]
    columns = [torch.tensor([1, 0, 0] * 2).roll(k) for k in range(3)]
    return torch.stack(rows + columns).double()


def log_likelihood(net, data):
    p = net()
    return p.normalized(p.exact_log_normalizer()).log_prob(data).mean()


def ascend(net, data, steps, lr=1.0, recenter=0.0):
    """Ascent of the exact gradient; the log-likelihood after each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr, maximize=True)
    values = []
    for _ in range(steps):
        if recenter:
            net.recenter(data, recenter)
        optimizer.zero_grad()
        log_likelihood(net, data).backward()
        optimizer.step()
        values.append(log_likelihood(net, data).item())
    return values


# -- the gradient in closed form -----------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("family", [RBMModule, GaussianRBMModule])
def test_the_cd_gradient_is_that_of_autograd(family, centered):
    torch.manual_seed(0)
    x, negatives = torch.randn(30, 5).double(), 2 * torch.randn(41, 5).double()
    if family is RBMModule:
        x, negatives = (x > 0).double(), (negatives > 1).double()
    net = family(5, 3, x, centered=centered, weight_scale=0.7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    if centered:
        net.recenter(x, 0.3)
    (net().energy(x).mean() - net().energy(negatives).mean()).backward()
    found = net.cd_gradient(x, negatives)
    assert found.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        assert_close(found[name], parameter.grad)
        assert not found[name].requires_grad


def test_a_machine_is_refreshed():
    for net in (RBMModule(5, 3, centered=True), GaussianRBMModule(5, 3, centered=True)):
        machine, x = net(), torch.bernoulli(torch.full((7, 5), 0.5))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        assert not torch.allclose(machine.energy(x), net().energy(x))
        net.refresh(machine)
        assert_close(machine.energy(x), net().energy(x))
        assert_close(machine.hidden_logits(x), net().hidden_logits(x))


# -- the start -----------------------------------------------------------------------------------


def test_repr():
    assert repr(RBMModule(4, 3)) == "RBMModule(visible=4, hidden=3)"
    centered = GaussianRBMModule(4, 3, centered=True)
    assert repr(centered) == "GaussianRBMModule(visible=4, hidden=3, centered=True)"


def test_start():
    data = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    net = RBMModule(3, 1000, data)
    assert isinstance(net, RBMModule)
    # (ones + 1) / (zeros + 1): finite for pixels that never change
    assert_close(net.visible_bias.exp(), torch.tensor([4.0, 0.25, 2 / 3]))
    assert_close(net.hidden_bias, torch.zeros(1000))
    assert 0.009 < net.weights.std() < 0.011
    assert isinstance(net(), RBM)
    assert_close(net().weights, net.weights)
    assert_close(net().visible_bias, net.visible_bias)
    assert_close(net().hidden_bias, net.hidden_bias)
    assert not net.visible_offset.any()
    assert_close(RBMModule(3, 2).visible_bias, torch.zeros(3))


def test_offsets_start_at_the_means():
    data = bars()
    net = RBMModule(6, 2, data, centered=True)
    assert_close(net.visible_offset, data.mean(0))
    assert_close(net.hidden_offset, torch.full((2,), 0.5).double())
    assert_close(RBMModule(6, 2, centered=True).visible_offset, torch.full((6,), 0.5))
    assert_close(GaussianRBMModule(6, 2, data, centered=True).visible_offset, data.mean(0))
    assert not GaussianRBMModule(6, 2, centered=True).visible_offset.any()


def test_weights_come_from_a_seed():
    def weights(seed):
        generator = torch.Generator().manual_seed(seed)
        return RBMModule(3, 2, weight_scale=1.0, generator=generator).weights

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    pyro.set_rng_seed(3)
    first = RBMModule(3, 2).weights
    pyro.set_rng_seed(3)
    assert torch.equal(first, RBMModule(3, 2).weights)


def test_dtype_follows_the_data():
    data = bars()
    assert RBMModule(6, 2, data).weights.dtype == torch.float64
    for dtype in [torch.bool, torch.uint8, torch.float32]:
        net = RBMModule(6, 2, data.to(dtype), centered=True)
        assert {v.dtype for v in net.state_dict().values()} == {torch.float32}
    assert net.double()().weights.dtype == torch.float64


def test_gaussian_start():
    data = 5 + torch.randn(100, 3).double() * torch.tensor([0.1, 1.0, 10.0])
    net = GaussianRBMModule(3, 500, data)
    p = net()
    assert isinstance(net, GaussianRBMModule)
    assert isinstance(p, GaussianRBM)
    assert_close(p.visible_bias, data.mean(0))
    assert_close(p.scale, data.std(0, correction=0))
    ratio = net.weights.std(1) / (0.01 * p.scale)  # weights have the units of x
    assert ((ratio > 0.8) & (ratio < 1.2)).all()
    assert_close(GaussianRBMModule(3, 2)().scale, torch.ones(3))
    fixed = GaussianRBMModule(3, 2, data, learn_scale=False)
    assert "log_scale" not in dict(fixed.named_parameters())
    assert_close(fixed().scale, p.scale)
    assert "log_scale" in fixed.state_dict()


# -- centering -----------------------------------------------------------------------------------


def centered_net(seed=0, n=4, m=3):
    """A centered module with parameters and offsets anywhere."""
    net = RBMModule(n, m, torch.ones(1, n).double(), centered=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator)
        net.visible_offset.uniform_(generator=generator)
        net.hidden_offset.uniform_(generator=generator)
    return net


def test_centered_energy():
    # E = -(x - mu)' W (z - lambda) - b'x - c'z, up to a constant
    net = centered_net()
    x, z = all_bits(7).split([4, 3], 1)
    want = -(((x - net.visible_offset) @ net.weights) * (z - net.hidden_offset)).sum(1)
    want = want - x @ net.visible_bias - z @ net.hidden_bias
    got = net().joint().energy(all_bits(7))
    assert_close(got - got[0], want - want[0])


def test_centered_gradient():
    net, data = centered_net(), all_bits(4)[[3, 7, 7, 8]]
    log_likelihood(net, data).backward()
    with torch.no_grad():
        p, x, z = net(), all_bits(4), all_bits(3)
        joint = (-p.joint().energy(all_bits(7))).softmax(0).reshape(16, 8)
        mu, lam, hidden = net.visible_offset, net.hidden_offset, p.hidden_given(data).mean
        want = (data - mu).T @ (hidden - lam) / 4 - (x - mu).T @ joint @ (z - lam)
        assert_close(net.weights.grad, want)
        assert_close(net.visible_bias.grad, data.mean(0) - joint.sum(1) @ x)
        assert_close(net.hidden_bias.grad, hidden.mean(0) - joint.sum(0) @ z)


def test_recentering_changes_offsets_and_not_the_density():
    net, data = centered_net(), all_bits(4)[[3, 7, 7, 8]]
    before, mu, lam = net(), net.visible_offset.clone(), net.hidden_offset.clone()
    before = RBM(*(t.detach().clone() for t in (net.plain_parameters())))
    net.recenter(data.reshape(2, 2, 4), rate=0.25)
    after = net()
    for name in ["weights", "visible_bias", "hidden_bias"]:
        assert_close(getattr(after, name), getattr(before, name))
    assert_close(net.visible_offset, 0.75 * mu + 0.25 * data.mean(0))
    assert_close(net.hidden_offset, 0.75 * lam + 0.25 * before.hidden_given(data).mean.mean(0))
    net.recenter(data.bool(), rate=1.0)
    assert_close(net.visible_offset, data.mean(0))
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("learn_scale", [True, False])
def test_gaussian_recentering_leaves_the_density(learn_scale):
    data = 5 + 3 * torch.randn(50, 3, dtype=torch.float64)
    net = GaussianRBMModule(3, 2, data, centered=True, weight_scale=0.5, learn_scale=learn_scale)
    other = 2 + torch.randn(50, 3, dtype=torch.float64)
    before = net().mixture().log_prob(data).detach()
    net.recenter(other, rate=0.5)
    assert_close(net().mixture().log_prob(data), before)
    assert_close(net.visible_offset, (data.mean(0) + other.mean(0)) / 2)


def test_gaussian_centered_gradient():
    # d/dW log p = E[(x - mu)(z - lambda)' / s^2 | data] - E[...] of the model
    data = torch.randn(6, 2, dtype=torch.float64)
    net = GaussianRBMModule(2, 2, data, centered=True, weight_scale=1.0)
    with torch.no_grad():
        net.visible_offset += torch.tensor([0.3, -2.0])
        net.hidden_offset += torch.tensor([0.2, -0.1])
    net().mixture().log_prob(data).mean().backward()
    with torch.no_grad():
        p, z = net(), all_bits(2)
        mu, lam, s2 = net.visible_offset, net.hidden_offset, p.scale.square()[:, None]
        positive = (data - mu).T @ (p.hidden_given(data).mean - lam) / len(data)
        weights = p.mixture().mixture_distribution.probs
        mean = p.visible_given(z).mean
        negative = torch.einsum("k,ki,kj->ij", weights, mean - mu, z - lam)
        assert_close(net.weights.grad, (positive - negative) / s2)


@pytest.mark.parametrize("recenter", [0.0, 0.1])
def test_flipped_data_are_learned_the_same_way_when_centered(recenter):
    data = bars()
    net = RBMModule(6, 3, data, centered=True, weight_scale=0.5)
    flipped = RBMModule(6, 3, 1 - data, centered=True)
    with torch.no_grad():
        flipped.weights.copy_(-net.weights)  # the mirror image of the same machine
    values = ascend(net, data, 100, recenter=recenter)
    assert values[-1] > values[0] + 1.0
    assert_close(ascend(flipped, 1 - data, 100, recenter=recenter), values)
    assert_close(flipped.weights, -net.weights)
    assert_close(flipped.visible_bias, -net.visible_bias)
    assert_close(flipped.hidden_bias, net.hidden_bias)


def test_flipped_data_are_learned_differently_when_not_centered():
    data = bars()
    # one start, whatever the seed: from some, both climb as far
    net = RBMModule(6, 3, data, weight_scale=0.5, generator=torch.Generator().manual_seed(0))
    flipped = RBMModule(6, 3, 1 - data)
    with torch.no_grad():
        # x' W z = -(1 - x)' W z + 1' W z
        flipped.weights.copy_(-net.weights)
        flipped.hidden_bias.copy_(net.weights.sum(0))
    assert_close(log_likelihood(flipped, 1 - data), log_likelihood(net, data))
    values, mirrored = ascend(net, data, 300), ascend(flipped, 1 - data, 300)
    assert abs(values[-1] - mirrored[-1]) > 0.1


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
def test_trains_in_a_model_by_exact_likelihood(centered):
    data = bars().float().repeat(4, 1)
    net = RBMModule(6, 6, data, centered=centered)

    def model(x):
        rbm = pyro.module("rbm", net)
        p = rbm()
        with pyro.plate("data", len(x)):
            pyro.sample("x", p.normalized(p.exact_log_normalizer()), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        loss = svi.step(data)
        if centered:
            net.recenter(data)
    assert set(pyro.get_param_store()) == {
        "rbm$$$weights",
        "rbm$$$visible_bias",
        "rbm$$$hidden_bias",
    }
    # the best is log(1/5) for each pattern
    assert loss / len(data) == pytest.approx(-log_likelihood(net, data).item(), abs=0.05)
    assert log_likelihood(net, data) > torch.tensor(1 / 5).log() - 0.15


@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trains_by_contrastive_divergence(persistent):
    source = torch.Generator().manual_seed(0)  # the truth is one machine, whatever the seed
    w, b, c = (torch.randn(shape, generator=source).double() for shape in [(4, 2), (4,), (2,)])
    truth = RBM(2 * w, b - w.sum(1), c - w.sum(0))
    truth = truth.normalized(truth.exact_log_normalizer())
    data, every = truth.exact_sample((2000,)), all_bits(4)
    net = RBMModule(4, 3, data, centered=True)

    def divergence():
        p = net()
        p = p.normalized(p.exact_log_normalizer())
        log_ratio = truth.log_prob(every) - p.log_prob(every)
        return (truth.log_prob(every).exp() * log_ratio).sum()

    def model(x):
        rbm = pyro.module("rbm", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", rbm(), obs=x)

    start = divergence()
    loss = ContrastiveDivergence(num_steps=5, persistent=persistent)
    for lr in (0.03, 0.003):
        svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": lr}), loss)
        for _ in range(300):
            svi.step(data)
            net.recenter(data)
    # 15 free probabilities learned from 2000 draws: 2 * 2000 * divergence is chi-square of 15,
    # which is below 52 at 4.5 sigmas
    assert start > 0.1
    assert divergence() < 52 / 4000


def test_gray_data_are_refused_by_the_losses():
    net = RBMModule(4, 3)

    def model(x):
        rbm = pyro.module("rbm", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", rbm(), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({}), ContrastiveDivergence())
    with pytest.raises(ValueError, match=r"data at site 'x' leave the energy's support"):
        svi.step(torch.full((5, 4), 0.5))


def test_state_dict_holds_the_offsets():
    net, data = centered_net(), all_bits(4)[:5]
    net.recenter(data, 0.5)
    state = net.state_dict()
    assert {"visible_offset", "hidden_offset"} < set(state)
    for other in [RBMModule(4, 3, centered=True).double(), RBMModule(4, 3).double()]:
        other.load_state_dict(state)
        assert_close(other().energy(data), net().energy(data))


@pytest.mark.parametrize("family", [RBMModule, GaussianRBMModule])
def test_pickles_and_copies(family):
    data = torch.bernoulli(torch.full((20, 4), 0.5))
    net = family(4, 3, data, centered=True)
    for clone in [pickle.loads(pickle.dumps(net)), copy.deepcopy(net)]:
        assert_close(clone().energy(data), net().energy(data))
        clone.recenter(data)


def test_conditional_use():
    # biases computed from a context make a batch of machines
    net, context = RBMModule(4, 3), torch.randn(10, 2)
    bias = torch.nn.Linear(2, 4)
    p = RBM(net.weights, net.visible_bias + bias(context), net.hidden_bias)
    assert p.batch_shape == (10,)
    p.energy(torch.ones(10, 4)).sum().backward()
    assert bias.weight.grad is not None
    assert net.weights.grad is not None


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.zeros(5, 3), r"data must have shape \(num, 4\), got \(5, 3\)"),
        (torch.zeros(5, 2, 2), r"data must have shape .* flatten images"),
        (torch.zeros(0, 4), r"data must have shape"),
        (torch.full((5, 4), 0.5), r"data must be bits, 0 or 1: binarize"),
        (torch.full((5, 4), torch.nan), r"data must be bits"),
    ],
)
def test_bad_data(data, says):
    with pytest.raises(ValueError, match=says):
        RBMModule(4, 3, data)


def test_bad_gaussian_data():
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        GaussianRBMModule(4, 3, torch.full((5, 4), torch.inf))
    data = torch.randn(5, 4)
    data[:, 2] = 1
    with pytest.raises(ValueError, match=r"columns \[2\] of the data are constant"):
        GaussianRBMModule(4, 3, data)


def test_bad_calls():
    with pytest.raises(ValueError, match=r"num_visible must be an integer of at least 1, got 0"):
        RBMModule(0, 3)
    with pytest.raises(ValueError, match=r"centered=True"):
        RBMModule(4, 3).recenter(torch.ones(5, 4))
    net = RBMModule(4, 3, centered=True)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 2"):
        net.recenter(torch.ones(5, 4), rate=2.0)
    with pytest.raises(ValueError, match=r"0 or 1"):
        net.recenter(torch.full((5, 4), 0.5))
    with pytest.raises(ValueError, match=r"event_shape"):
        net.recenter(torch.ones(5, 3))
