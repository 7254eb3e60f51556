"""Estimates of log Z on random energies whose log Z is known."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm import UnnormalizedEnergy, estimate_log_normalizer
from pyro_ebm.normalizer import UnreliableEstimateWarning
from tests.properties.inputs import SIZES, holds

ERRORS = 6.0  # of thousands of inputs none should lie farther out


@dataclass(frozen=True)
class Tractable:
    """A batch of energies, a sum over the elements of the event, each of known log Z."""

    family: str
    event: tuple[int, ...]
    batch: tuple[int, ...]
    double: bool
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Two positive numbers for each element, ``(*batch, *event)``."""
        generator = torch.Generator().manual_seed(self.seed)
        u = torch.rand((2, *self.batch, *self.event), generator=generator, dtype=torch.float64)
        a, b = (0.5 + 2 * u).to(self.dtype)
        return a, b

    def terms(self) -> tuple[Any, Any, Any, Tensor]:
        """The energy of an element, its support and base, and log Z of each element."""
        a, b = self.parameters()
        if self.family == "gaussian":
            log_z = (b.square() / a + (2 * math.pi / a).log()) / 2
            return lambda x: a * x.square() / 2 - b * x, constraints.real, None, log_z
        if self.family == "tilt":
            log_z = (b.square() / (1 + a) - (1 + a).log()) / 2
            base = dist.Normal(torch.zeros_like(a), 1.0)
            return lambda x: a * x.square() / 2 - b * x, constraints.real, base, log_z
        if self.family == "gamma":
            log_z = (1 + a).lgamma() - (1 + a) * b.log()
            return lambda x: b * x - a * x.log(), constraints.positive, None, log_z
        if self.family == "beta":
            log_z = (1 + a).lgamma() + (1 + b).lgamma() - (2 + a + b).lgamma()
            return (
                lambda x: -a * x.log() - b * (1 - x).log(),
                constraints.unit_interval,
                None,
                log_z,
            )
        return lambda x: -(a - b) * x, constraints.boolean, None, (a - b).exp().log1p()

    def energy(self) -> UnnormalizedEnergy:
        element, support, base, _ = self.terms()
        dims = len(self.event)

        def energy(x: Tensor) -> Tensor:
            each = element(x)
            return each.reshape(each.shape[: each.dim() - dims] + (-1,)).sum(-1) if dims else each

        if base is not None:
            base = base.to_event(dims)
        return UnnormalizedEnergy(energy, self.event, support, self.batch, base)

    def log_z(self) -> Tensor:
        each = self.terms()[-1]
        return each.reshape((*self.batch, -1)).sum(-1)

    def draws(self, n: int) -> Tensor:
        """Exact draws ``(n, *batch, *event)``."""
        a, b = self.parameters()
        exact = {
            "gaussian": lambda: dist.Normal(b / a, a.rsqrt()),
            "tilt": lambda: dist.Normal(b / (1 + a), (1 + a).rsqrt()),
            "gamma": lambda: dist.Gamma(1 + a, b),
            "beta": lambda: dist.Beta(1 + a, 1 + b),
            "boolean": lambda: dist.Bernoulli(logits=a - b),
        }
        return exact[self.family]().sample((n,))


def options(method: str, case: Tractable) -> dict[str, Any]:
    """The arguments of a method, small enough to be quick."""
    if method == "importance":
        if case.family == "tilt":
            return {"num_samples": 1000}
        a, _ = case.parameters()
        wide: dict[str, Any] = {
            "gaussian": lambda: dist.Normal(torch.zeros_like(a), 6.0),
            "gamma": lambda: dist.Exponential(0.15 * torch.ones_like(a)),
            "beta": lambda: dist.Uniform(torch.zeros_like(a), 1.0),
            "boolean": lambda: dist.Bernoulli(0.5 * torch.ones_like(a)),
        }
        proposal = wide[case.family]().to_event(len(case.event))
        return {"proposal": proposal, "num_samples": 2000}
    if method == "ais":
        return {"num_chains": 100, "num_temperatures": 30, "disable_progbar": True}
    if method == "bridge":
        return {"samples": case.draws(1000), "num_samples": 1000}
    return {}


SUITS = {
    "exact": lambda family, numel: family == "boolean",
    "quadrature": lambda family, numel: family != "boolean" and numel in (1, 2),
    "importance": lambda family, numel: True,
    "ais": lambda family, numel: True,
    "bridge": lambda family, numel: True,
}


def estimate_is_near_the_truth(method: str, case: Tractable) -> None:
    numel = torch.Size(case.event).numel()
    if not SUITS[method](case.family, numel):
        method = "ais"
    p = case.energy()
    if 0 in p.batch_shape + p.event_shape:
        with pytest.raises(ValueError, match="nothing to integrate over"):
            estimate_log_normalizer(p, method)
        return
    truth = case.log_z()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreliableEstimateWarning)
        estimate = estimate_log_normalizer(p, method, **options(method, case))
    assert estimate.value.shape == estimate.std_error.shape == case.batch
    assert estimate.value.dtype == case.dtype
    assert not estimate.value.isnan().any()
    assert not estimate.std_error.isnan().any()
    assert (estimate.std_error >= 0).all()
    if caught:
        return  # it says itself that its error is not to be trusted
    error = (estimate.value - truth).abs()
    rounding = 1e-6 if case.double else 2e-4
    assert (error <= ERRORS * estimate.std_error + rounding * (1 + truth.abs())).all(), (
        estimate.value,
        estimate.std_error,
        truth,
    )


CASES = st.builds(
    Tractable,
    family=st.sampled_from(["gaussian", "tilt", "gamma", "beta", "boolean"]),
    event=st.sampled_from([(), (1,), (2,), (2, 1), (2, 2), (0,)]),
    batch=st.sampled_from([(), (1,), (2,), (2, 3), (0,)]),
    double=st.booleans(),
    seed=st.integers(0, 10_000),
)
INPUTS = {"estimate_is_near_the_truth": {"method": st.sampled_from([*SUITS]), "case": CASES}}


@SIZES
def test_an_estimate_is_near_the_truth(many):
    inputs = INPUTS["estimate_is_near_the_truth"]
    holds(estimate_is_near_the_truth, many, few=25, thousands=2000, **inputs)
