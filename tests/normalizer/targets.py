"""Densities whose log Z is known, and what it means that an estimate agrees."""

import math

import torch

from pyro_ebm import UnnormalizedEnergy
from tests.statistics import SIGMAS

DOUBLE_WELL = 10.29348  # by quadrature


def double_well(x):
    x, y = x.unbind(-1)
    return x**4 - 6 * x**2 - x / 2 + y**2 / 2


def wells(num):
    """The double well, or the product of ``num`` of them in ``2 num`` dimensions."""
    return UnnormalizedEnergy(
        lambda x: double_well(x.unflatten(-1, (num, 2))).sum(-1), event_shape=(2 * num,)
    )


def gaussian(dim, condition, dtype=torch.float32):
    """A Gaussian whose variances spread over a factor, rotated, and its log Z."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    variances = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)
    precision = ((axes / variances) @ axes.T).to(dtype)
    p = UnnormalizedEnergy(lambda x: ((x @ precision) * x).sum(-1) / 2, event_shape=(dim,))
    draws = torch.randn(4000, dim, generator=generator, dtype=torch.float64)
    draws = ((draws * variances.sqrt()) @ axes.T).to(dtype)
    return p, float((2 * math.pi * variances).log().sum() / 2), draws


def funnel(dim):
    """Neal's funnel: v ~ N(0, 9), and the others N(0, e^v) given v; and its log Z."""

    def energy(x):
        v, rest = x[..., 0], x[..., 1:]
        return v**2 / 18 + rest.square().sum(-1) * (-v).exp() / 2 + v * (dim - 1) / 2

    log_z = dim / 2 * math.log(2 * math.pi) + math.log(3.0)
    return UnnormalizedEnergy(energy, event_shape=(dim,)), log_z


def assert_agrees(estimate, truth):
    """Each value is the truth, up to 4.5 of its own stated errors."""
    truth = torch.as_tensor(truth, dtype=estimate.value.dtype)
    z = (estimate.value - truth) / estimate.std_error
    assert (z.abs() < SIGMAS).all(), f"{estimate} is {z} errors from {truth}"
    assert (estimate.std_error < 0.5).all(), "an error so large agrees with everything"
