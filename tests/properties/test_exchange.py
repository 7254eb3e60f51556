"""Exchange moves anywhere, under light and heavy tails: what is decided is decided rightly."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from torch import Tensor

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.mcmc.exchange.kernel import ExchangeKernel
from pyro_ebm.mcmc.exchange.terms import UNDECIDED
from tests.properties.inputs import SIZES, holds

PRIORS = {
    "log-normal": lambda s: dist.LogNormal(torch.zeros_like(s), s),
    "half-Cauchy": dist.HalfCauchy,
    "half-normal": dist.HalfNormal,
    "gamma": lambda s: dist.Gamma(s, torch.ones_like(s)),
    "inverse gamma": lambda s: dist.InverseGamma(s, torch.ones_like(s)),
    "pareto": lambda s: dist.Pareto(torch.ones_like(s), s),
}


@dataclass(frozen=True)
class Posterior:
    """Rows observed through ``theta |x|^power``, with a prior of this scale."""

    prior: str
    scale: float
    power: float
    rows: int

    def terms(self, z: Tensor, other: Tensor, x: Tensor, y: Tensor) -> Any:
        """The log ratio from one position to the other, and back, with their errors."""

        def model() -> None:
            scale = torch.tensor(self.scale, dtype=x.dtype)
            theta = pyro.sample("theta", PRIORS[self.prior](scale))
            energy = UnnormalizedEnergy(lambda x: theta * x.abs() ** self.power)
            with pyro.plate("data", self.rows):
                pyro.sample("x", energy, obs=x)

        potential = ExchangeKernel(model).make_potential()
        old, new = (potential.terms(at.reshape(1, 1), {"x": y[None]}) for at in (z, other))
        nothing = torch.full((1,), torch.nan, dtype=x.dtype)
        return potential.log_ratio(new, old, nothing), potential.log_ratio(old, new, nothing)


def decisions_are_right(posterior: Posterior, z: float, other: float, moved: int) -> None:
    pyro.set_rng_seed(0)
    x = 0.1 + torch.randn(posterior.rows).double().abs()
    y = torch.where(torch.arange(posterior.rows) < moved, x + torch.randn(posterior.rows), x)
    found = {}
    for dtype in (torch.float32, torch.float64):
        inputs = (torch.tensor(z), torch.tensor(other), x, y)
        inputs = tuple(part.float().to(dtype) for part in inputs)  # the same numbers
        (forth, error), (back, same_error) = posterior.terms(*inputs)
        assert torch.equal(forth, -back)
        assert torch.equal(error, same_error)
        found[dtype] = forth.double(), error.double()
        if moved == 0:
            assert error == 0
    (single, error), (double, _) = found[torch.float32], found[torch.float64]
    if error <= UNDECIDED:
        # the rest, and the rounding of exp(z), have errors of their own
        own = 1e-5 * (10 + double.abs())
        assert (single - double).abs() <= error + own, (single, double, error)


POSITIONS = st.floats(-30.0, 30.0, width=32)
INPUTS: dict[str, dict[str, Any]] = {
    "decisions_are_right": {
        "posterior": st.builds(
            Posterior,
            prior=st.sampled_from([*PRIORS]),
            scale=st.sampled_from([0.5, 1.0, 2.5]),
            power=st.sampled_from([1.0, 2.0, 4.0]),
            rows=st.integers(1, 4),
        ),
        "z": POSITIONS,
        "other": POSITIONS,
        "moved": st.integers(0, 4),
    },
}


@SIZES
def test_decisions(many):
    holds(decisions_are_right, many, few=20, thousands=1000, **INPUTS["decisions_are_right"])
