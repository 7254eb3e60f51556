"""What an energy's helpers find in callables, supports and wrapped distributions."""

import functools

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions.core.introspection import (
    bounds_of,
    first_tensor,
    modules,
    sources,
    tensors_of,
)
from pyro_ebm.distributions.core.supports import lift_support, uniform_start
from pyro_ebm.distributions.core.wrappers import unvalidated

GLOBAL_NET = nn.Sequential(nn.Linear(2, 1), nn.Dropout())


def _helper(x):
    return GLOBAL_NET(x)


def _through_a_helper(x):
    return [_helper(part) for part in x]


class _Callable:
    def __init__(self, net):
        self.parts = {"net": [net]}

    def __call__(self, x):
        return self.parts["net"][0](x)

    def method(self, x):
        return self(x)


NET = nn.Linear(2, 2)


def _closure(net):
    def inner(x):
        return net(x)

    return lambda x: inner(x) + 1


def _with_defaults(x, net=NET, *, scale=1.0):
    return net(x) * scale


@functools.wraps(_with_defaults)
def _wrapped(x):
    return x


@pytest.mark.parametrize(
    "energy",
    [
        NET,
        NET.forward,
        _closure(NET),
        functools.partial(torch.add, other=NET),
        functools.partial(_closure(NET)),
        _Callable(NET),
        _Callable(NET).method,
        _with_defaults,
        _wrapped,
    ],
)
def test_modules_are_found_however_they_are_held(energy):
    assert modules(energy) == (NET,)


def test_modules_of_the_global_scope_are_found():
    want = {GLOBAL_NET, *GLOBAL_NET}
    assert set(modules(lambda x: GLOBAL_NET(x))) == want
    assert set(modules(_helper)) == want
    assert set(modules(_through_a_helper)) == want


def test_a_module_is_found_once():
    net = nn.Sequential(NET, NET)
    assert sorted(map(id, modules(lambda x: net(x) + NET(x)))) == sorted([id(net), id(NET)])


def test_an_unassigned_variable_is_no_source():
    def energy(x):
        return later * x

    assert not list(sources(energy))
    later = torch.ones(())
    assert list(sources(energy)) == [later]


def test_recursion_ends():
    def energy(x, depth=0):
        return x if depth > 2 else energy(x, depth + 1)

    assert modules(energy) == ()


def test_first_tensor_is_floating():
    whole, half = torch.arange(3), torch.ones(2, dtype=torch.float64)
    assert first_tensor(lambda x: x[whole] * half) is half
    assert first_tensor(None, lambda x: x, whole) is None
    buffered = nn.BatchNorm1d(2, affine=False, dtype=torch.float64)
    assert first_tensor(buffered) is buffered.running_mean


@pytest.mark.parametrize(
    ("support", "event_shape", "event_dim"),
    [
        (constraints.real, (), 0),
        (constraints.real, (2, 3), 2),
        (constraints.real_vector, (3,), 1),
        (constraints.simplex, (2, 3), 2),
        (constraints.interval(0.0, torch.ones(3)), (3,), 1),
    ],
)
def test_lift_support(support, event_shape, event_dim):
    lifted = lift_support(support, torch.Size(event_shape))
    assert lifted.event_dim == event_dim


def test_bounds_and_tensors():
    low, high = torch.zeros(2), torch.ones(2)
    support = constraints.independent(constraints.interval(low, high), 1)
    assert [bound is t for bound, t in zip(tensors_of(support), (low, high), strict=True)]
    assert bounds_of(constraints.interval(0, 2.5)) == [0, 2.5]
    assert tensors_of(constraints.real) == []
    stacked = constraints.stack([constraints.greater_than(low), constraints.real])
    assert tensors_of(stacked)[0] is low


def test_uniform_start_is_uniform_before_the_bijection():
    x = uniform_start(constraints.positive, torch.Size([20_000]), torch.empty(()))
    z = x.log()
    assert z.abs().max() <= 2
    sd = 4 / 12**0.5
    assert z.mean().abs() < 5 * sd / len(z) ** 0.5
    # Var((z - 0)^2) = E z^4 - (E z^2)^2 = 16/5 - 16/9
    assert (z.square().mean() - 4 / 3).abs() < 5 * (16 / 5 - 16 / 9) ** 0.5 / len(z) ** 0.5


@pytest.mark.parametrize(
    ("support", "values"),
    [
        (constraints.boolean, {0.0, 1.0}),
        (constraints.independent(constraints.boolean, 1), {0.0, 1.0}),
        (constraints.integer_interval(-1, 2), {-1.0, 0.0, 1.0, 2.0}),
    ],
)
def test_uniform_start_takes_every_discrete_value(support, values):
    x = uniform_start(support, torch.Size([4000]), torch.empty((), dtype=torch.float64))
    assert x.dtype == torch.float64
    assert set(x.tolist()) == values
    p = 1 / len(values)
    for value in values:
        share = (x == value).double().mean()
        assert (share - p).abs() < 5 * (p * (1 - p) / len(x)) ** 0.5


def test_unvalidated_reaches_every_part_and_leaves_the_original():
    outside = torch.tensor([-1.0, 1.0])
    p = UnnormalizedEnergy(
        lambda x: x, support=constraints.positive, base=dist.Gamma(2.0, 1.0), batch_shape=(2,)
    )
    wrapped = [
        p,
        p.to_event(1),
        p.mask(torch.tensor([True, False])),
        dist.Gamma(2.0, 1.0).expand([2]).to_event(1),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.ones(2), 1.0)),
    ]
    for fn in wrapped:
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(outside)
        unvalidated(fn).log_prob(outside)
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(outside)
    assert_close(unvalidated(p).log_prob(outside.abs()), p.log_prob(outside.abs()))
