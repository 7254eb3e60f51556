"""Whether rows influence each other: what is found, what is not mistaken for it, what is left."""

import random

import pytest
import torch
from torch import nn

from pyro_ebm.ops.rows import buffers_put_back, rows_interact


def centered(x):
    return (x - x.mean(0)).square().sum(-1)


def scaled(x):
    return (x / x.std(0)).square().sum(-1)


def softmax(x):
    return x[..., 0].softmax(0)


def attention(x):
    return ((x @ x.mT).softmax(-1) @ x).sum(-1)


def nearest(x):
    distance = torch.cdist(x, x) + 1e9 * torch.eye(len(x))
    return distance.amin(-1)


def before(x):
    return x.sum(-1) + 0.1 * x.sum(-1).roll(1)


def without_mean(x):
    energy = x.square().sum(-1)
    return energy - energy.mean()


def through_the_largest(x):
    return (x - x.amax(0)).square().sum(-1)


COUPLED = [centered, scaled, softmax, attention, nearest, before, without_mean, through_the_largest]


@pytest.mark.parametrize("function", COUPLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_functions_that_couple_rows(function, dtype, seed):
    x = torch.randn(20, 3, dtype=dtype)
    assert rows_interact(function, x, event_dim=1, seed=seed)
    assert not rows_interact(torch.func.vmap(lambda x: x.square().sum()), x, event_dim=1)


@pytest.mark.parametrize("dim", [0, 1])
def test_each_dimension_of_the_batch(dim):
    x = torch.randn(6, 4, 3)
    assert rows_interact(lambda x: (x - x.mean(dim, keepdim=True)).sum(-1).square(), x, 1)


def own_noise():
    generator = torch.Generator().manual_seed(0)
    return lambda x: x.square().sum(-1) + torch.randn(len(x), generator=generator)


class FirstBatch(nn.Module):
    """Takes its scale from the first batch that it meets."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("met", torch.tensor(False))

    def forward(self, x):
        if not self.met:
            self.scale.data, self.met = 1 / x.std(0), torch.tensor(True)
        return (self.scale * x).square().sum(-1)


def network(*middle):
    return nn.Sequential(nn.Linear(3, 16), *middle, nn.SiLU(), nn.Linear(16, 1), nn.Flatten(-2))


def met():
    layer = FirstBatch()
    layer(torch.randn(20, 3))
    return layer


def functional_noise():
    net = network()
    return lambda x: nn.functional.dropout(net(x), 0.5) + torch.rand(len(x)) + random.random()


def spectral():
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 16)), nn.SiLU(), norm(nn.Linear(16, 1)), nn.Flatten(-2))


def differentiated():
    net = network()

    def energy(x):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return slope.square().sum(-1)

    return energy


def of_each_row():
    y = torch.randn(20, 3)
    return lambda x: (x - y).square().sum(-1)


SINGLE = {
    "network": network,
    "dropout": lambda: network(nn.Dropout(0.5)),
    "functional noise": functional_noise,
    "noise of its own": own_noise,
    "layer norm": lambda: network(nn.LayerNorm(16)),
    "group norm": lambda: network(nn.GroupNorm(4, 16)),
    "batch norm in evaluation mode": lambda: network(nn.BatchNorm1d(16)).eval(),
    "spectral norm": spectral,
    "a scale of the first batch": met,
    "differentiates inside": differentiated,
    "a datum of each row": of_each_row,
    "infinite": lambda: lambda x: torch.where(x[:, 0] > 0, torch.inf, x[:, 1]),
    "nan": lambda: lambda x: torch.where(x[:, 0] > 0, torch.nan, x[:, 1]),
    "whole numbers": lambda: lambda x: (x > 0).sum(-1),
    "large": lambda: lambda x: 1e6 + x.square().sum(-1),
}


@pytest.mark.parametrize("name", SINGLE)
def test_functions_of_single_rows(name):
    function = SINGLE[name]()
    modules = list(function.modules()) if isinstance(function, nn.Module) else ()
    assert not rows_interact(function, torch.randn(20, 3), 1, modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = torch.randn(20, 3, dtype=dtype)
    assert not rows_interact(network().to(dtype), x, event_dim=1)
    assert rows_interact(network(nn.BatchNorm1d(16)).to(dtype), x, event_dim=1)


def test_it_leaves_no_trace():
    net = network(nn.BatchNorm1d(16), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(20, 3)
    states = torch.get_rng_state(), random.getstate()
    assert rows_interact(net, x, 1, list(net.modules()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_buffers_that_a_module_replaces_come_back():
    layer = FirstBatch()
    with buffers_put_back([layer]):
        layer(torch.randn(20, 3))
        assert layer.met
    assert not layer.met


@pytest.mark.parametrize("shape", [(1, 3), (0, 3)])
def test_too_few_rows_say_nothing(shape):
    assert not rows_interact(centered, torch.zeros(shape), event_dim=1)
