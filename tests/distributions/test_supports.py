"""Which supports are the same, and which lies within which."""

import pickle

import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions.core.supports import contains, same_support


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (constraints.real, constraints.positive),
        (constraints.real, constraints.boolean),
        (constraints.real_vector, constraints.simplex),
        (constraints.independent(constraints.real, 2), constraints.positive_definite),
        (constraints.positive, constraints.interval(1.0, 2.0)),
        (constraints.less_than(3.0), constraints.interval(torch.zeros(2), torch.ones(2))),
        (constraints.nonnegative_integer, constraints.boolean),
        (constraints.integer_interval(-1, 4), constraints.integer_interval(0, 4)),
        (constraints.independent(constraints.positive, 1), constraints.unit_interval),
    ],
)
def test_one_lies_within_the_other(wide, narrow):
    assert contains(wide, narrow)
    assert not contains(narrow, wide)
    assert not same_support(narrow, wide)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (constraints.unit_interval, constraints.greater_than(0.5)),
        (constraints.positive, constraints.less_than(0.0)),
        (constraints.nonnegative, constraints.nonnegative_integer),
        (constraints.simplex, constraints.corr_cholesky),
        (constraints.interval(torch.tensor([0.0, 1.0]), 2.0), constraints.interval(0.5, 2.0)),
        (
            constraints.cat([constraints.positive, constraints.real], 0, [1, 1]),
            constraints.cat([constraints.real, constraints.positive], 0, [1, 1]),
        ),
    ],
)
def test_neither_lies_within_the_other(one, other):
    assert not contains(one, other)
    assert not contains(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (constraints.positive, constraints.nonnegative),  # an endpoint has no mass
        (constraints.unit_interval, constraints.interval(0, 1)),
        (constraints.unit_interval, pickle.loads(pickle.dumps(constraints.unit_interval))),
        (constraints.interval(torch.zeros(3), 1.0), constraints.interval(0.0, torch.ones(()))),
        (constraints.simplex, pickle.loads(pickle.dumps(constraints.simplex))),
        (constraints.boolean, constraints.integer_interval(0, 1)),
        (
            constraints.cat([constraints.positive, constraints.real], 0, [1, 1]),
            constraints.cat([constraints.positive, constraints.real], 0, [1, 1]),
        ),
    ],
)
def test_the_same_points(one, other):
    assert same_support(one, other)
    assert same_support(other, one)
