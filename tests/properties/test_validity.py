"""A state has a density where torch's validation lets it be, and nowhere else."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from torch import Tensor, tensor

from pyro_ebm.mcmc import ModelPotential
from tests.properties.inputs import SIZES, holds

# an argument that a latent moves, and a value that is in the support wherever it is valid
FAMILIES: dict[str, Any] = {
    "gamma": (lambda a: dist.Gamma(a, 1.0), 0.5),
    "rate": (lambda a: dist.Gamma(1.0, a), 0.5),
    "beta": (lambda a: dist.Beta(a, 2.0), 0.5),
    "weibull": (lambda a: dist.Weibull(1.0, a), 0.5),
    "normal": (lambda a: dist.Normal(0.0, a), 0.5),
    "half normal": (lambda a: dist.HalfNormal(a), 0.5),
    "log-normal": (lambda a: dist.LogNormal(0.0, a), 0.5),
    "student": (lambda a: dist.StudentT(a), 0.5),
    "bernoulli": (lambda a: dist.Bernoulli(a), 1.0),
    "logits": (lambda a: dist.Bernoulli(logits=a), 1.0),
    "binomial": (lambda a: dist.Binomial(3, a), 2.0),
    "geometric": (lambda a: dist.Geometric(a), 2.0),
    "poisson": (lambda a: dist.Poisson(a), 2.0),
    "negative binomial": (lambda a: dist.NegativeBinomial(a, tensor(0.5)), 2.0),
    "beta-binomial": (lambda a: dist.BetaBinomial(a, 1.0, 3), 2.0),
    "zero-inflated": (lambda a: dist.ZeroInflatedPoisson(tensor(1.0), gate=a), 0.0),
    "location": (lambda a: dist.Normal(a, 1.0), 0.5),
}


WRAPPERS: dict[str, Any] = {
    "event": lambda fn: fn.to_event(1),
    "row": lambda fn: fn.expand([2, 2]).to_event(1),
    "events": lambda fn: fn.expand([2, 2]).to_event(2),
    "masked": lambda fn: fn.mask(True).to_event(1),
    "mixture": lambda fn: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), fn),
    "doubled": lambda fn: dist.TransformedDistribution(
        fn, [dist.transforms.AffineTransform(0.0, 2.0)]
    ).to_event(1),
}


def rejected_where_torch_raises(family: str, wrapper: str, values: list[list[float]]) -> None:
    (make, value), wrap = FAMILIES[family], WRAPPERS[wrapper]
    y = tensor(2 * value if wrapper == "doubled" else value)

    def fn(a: Tensor) -> Any:
        return wrap(make(a))

    y = y.expand(fn(torch.full((2,), 0.5)).shape())

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate_stack("plates", fn(a).batch_shape):
            pyro.sample("y", fn(a), obs=y)

    start = {"a": torch.full((2,), 0.5)}
    with pyro.validation_enabled(False):
        potential = ModelPotential(model, init_strategy=lambda site: start[site["name"]])
    potential(torch.full((2, 2), 0.5))  # where chains are compared
    found = potential(tensor(values)).isfinite()
    for row, finite in zip(tensor(values), found, strict=True):
        try:
            with pyro.validation_enabled(True):
                fn(row)
            valid = True
        except ValueError:
            valid = False
        assert bool(finite) == valid, (row, finite)


NUMBERS = st.sampled_from([0.25, 0.5, 0.75, -0.5, -1.25])
INPUTS = {
    "rejected_where_torch_raises": {
        "family": st.sampled_from([*FAMILIES]),
        "wrapper": st.sampled_from([*WRAPPERS]),
        "values": st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=1, max_size=4),
    }
}


@SIZES
def test_invalid_states_are_rejected(many):
    holds(
        rejected_where_torch_raises,
        many,
        few=40,
        thousands=2000,
        **INPUTS["rejected_where_torch_raises"],
    )
