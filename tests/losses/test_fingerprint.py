"""Fingerprints: equal where two functions surely compute the same, and nowhere else."""

import functools
import math
import operator

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import LangevinKernel, UnnormalizedEnergy
from pyro_ebm.losses.contrastive.code_identity import CodeIdentity
from pyro_ebm.nn import MLPEnergy

W = torch.ones(())
BETA = 2.0


class Settings:
    power = 2

    def __init__(self):
        self.beta = 1.0

    def energy(self, x):
        return self.beta * helper(x) ** self.power


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.beta, self.drop = nn.Linear(2, 1), 1.0, nn.Dropout()

    def forward(self, x):
        return self.beta * self.drop(self.inner(x)).squeeze(-1)


def helper(x):
    return BETA * x


def times(w, power=2):
    return lambda x: w * x**power


def through_globals():
    return lambda x: W * math.sqrt(BETA) * helper(x)


def with_a_default(w):
    return lambda x, w=w: w * x


def unset():
    def energy(x):
        return later * x

    made = functools.partial(energy)
    if W is None:
        later = 1.0
    return made


SETTINGS, NET, TABLE = Settings(), Net(), {"w": W, "shift": 1.0}

SAME = {
    "closure": lambda: times(W),
    "globals": through_globals,
    "default": lambda: with_a_default(W),
    "partial": lambda: functools.partial(operator.mul, W),
    "method": lambda: SETTINGS.energy,
    "module": lambda: NET,
    "of a module": lambda: lambda x: NET(x) + 1,
    "library": lambda: torch.square,
    "table": lambda: lambda x: TABLE["w"] * x,
    "energy": lambda: UnnormalizedEnergy(NET, (2,)).expand([5]),
    "support": lambda: UnnormalizedEnergy(times(W), support=dist.constraints.interval(0.0, 2.0)),
    "kernel": lambda: LangevinKernel(jit_compile=True),
    "numbers": lambda: (1, 1.0, "a", None, torch.float64, torch.Size([2])),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_made_twice_it_is_the_same(make):
    one, two = CodeIdentity(make()), CodeIdentity(make())
    assert one.key is not None, one.reason
    assert one.key == two.key
    assert hash(one.key) == hash(two.key)


def test_numbers_of_other_kinds_differ():
    keys = {CodeIdentity(value).key for value in (1, 1.0, True, "1", (1,))}
    assert len(keys) == 5


@pytest.mark.parametrize(
    "other",
    [
        lambda: times(W.clone()),
        lambda: times(W, 3),
        lambda: lambda x: W * x**2,
        lambda: LangevinKernel(temperature=2.0),
        lambda: UnnormalizedEnergy(times(W)),
        lambda: UnnormalizedEnergy(times(W), support=dist.constraints.positive),
        lambda: UnnormalizedEnergy(times(W)).expand([3]),
        lambda: UnnormalizedEnergy(times(W)).expand([4]),
        lambda: UnnormalizedEnergy(times(W), base=dist.Normal(W, 1.0)),
        lambda: torch.square,
        lambda: torch.abs,
    ],
)
def test_others_differ(other):
    made = times(W)
    assert CodeIdentity(other()).key != CodeIdentity(made).key


CHANGES = {
    "a global number": ("globals", lambda patch: patch.setitem(globals(), "BETA", 3.0)),
    "a global tensor": ("globals", lambda patch: patch.setitem(globals(), "W", W.clone())),
    "a global function": ("globals", lambda patch: patch.setitem(globals(), "helper", abs)),
    "what that reads": ("method", lambda patch: patch.setitem(globals(), "BETA", 3.0)),
    "an attribute": ("method", lambda patch: patch.setattr(SETTINGS, "beta", 3.0)),
    "an attribute of the class": ("method", lambda patch: patch.setattr(Settings, "power", 3)),
    "a number of a module": ("module", lambda patch: patch.setattr(NET, "beta", 3.0)),
    "its mode": ("module", lambda patch: patch.setattr(NET.drop, "training", False)),
    "a parameter": (
        "module",
        lambda patch: patch.setitem(NET.inner._parameters, "bias", nn.Parameter(torch.zeros(1))),
    ),
    "a part": ("module", lambda patch: patch.setitem(NET._modules, "inner", nn.Linear(2, 1))),
    "its code": ("module", lambda patch: patch.setattr(Net, "forward", lambda self, x: x.sum(-1))),
    "an item": ("table", lambda patch: patch.setitem(TABLE, "shift", 2.0)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(monkeypatch, name, change):
    made = SAME[name]()
    before = CodeIdentity(made).key
    with monkeypatch.context() as patch:
        change(patch)
        assert CodeIdentity(made).key != before
        assert CodeIdentity(SAME[name]()).key != before
    assert CodeIdentity(SAME[name]()).key == before


def test_hooks_are_seen():
    net = MLPEnergy(2, hidden=(4,))
    before = CodeIdentity(net).key
    handle = net.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert CodeIdentity(net).key != before
    handle.remove()
    assert CodeIdentity(net).key == before


def test_values_changed_in_place_are_not():
    """Graphs see them."""
    before = CodeIdentity(NET).key
    with torch.no_grad():
        NET.inner.bias += 1.0
    assert CodeIdentity(NET).key == before


def test_what_it_speaks_of_stays_alive():
    fingerprint = CodeIdentity(times(torch.ones(3)))
    assert any(isinstance(held, torch.Tensor) for held in fingerprint.held)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (times(W.clone().requires_grad_().exp()), "a computed tensor"),
        (times(np.ones(2)), "an object of type ndarray"),
        (W.mul, "built-in method mul"),
        (unset(), "not assigned yet"),
        (times({W: 1.0}), "a dict with the key"),
        (times({1, (2,)}), "the set"),
        (times(pytest), "the module 'pytest'"),
    ],
)
def test_what_it_cannot_look_into_has_none(made, reason):
    fingerprint = CodeIdentity(made)
    assert fingerprint.key is None
    assert reason in fingerprint.reason
    assert fingerprint.held == []


def test_code_that_imports_has_none():
    def energy(x):
        from tests.statistics import SIGMAS

        return SIGMAS * x

    assert CodeIdentity(energy).key is None
