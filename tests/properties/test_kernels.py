"""Every kernel on random models: shapes, dtypes, supports, seeds, and graphs against plain runs."""

import re
from typing import Any

import pyro
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch.distributions import constraints

from pyro_ebm import (
    MCMC,
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    DiscreteLangevinKernel,
    FlowKernel,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
)
from tests.properties.inputs import SIZES, holds
from tests.properties.models import DISCRETE, SPIN, ModelSpec, models

CONTINUOUS = {
    "langevin": LangevinKernel,
    "unadjusted": lambda m, **k: LangevinKernel(m, adjusted=False, step_size=0.01, **k),
    "barker": BarkerKernel,
    "chees": ChEESKernel,
    "walk": MHKernel,
    "dense": lambda m, **k: LangevinKernel(m, full_mass=True, **k),
    "flow": lambda m, **k: FlowKernel(LangevinKernel(m, **k), num_fit_steps=2),
    "tempering": lambda m, **k: TemperingKernel(LangevinKernel(m, **k), [1.0, 0.5]),
}
FINITE = {
    "gibbs": GibbsKernel,
    "gradients": GibbsWithGradientsKernel,
    "discrete": DiscreteLangevinKernel,
}


def draws(make: Any, model: ModelSpec, chains: int, **settings: Any) -> Any:
    pyro.set_rng_seed(1)
    mcmc = MCMC(make(model, **settings), 4, 3, num_chains=chains, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)


def draws_are_right(make: Any, model: ModelSpec, chains: int, jit: bool = False) -> None:
    samples, stats = draws(make, model, chains)
    nodes = poutine.trace(model).get_trace().nodes
    assert samples.keys() == model.latents.keys()
    # what is masked has the density 1, or on the reals that of the change of variables
    improper = {s.name for s in model.sites if s.mask in ("false", "some", "inner")}
    for name, x in samples.items():
        site, fn = nodes[name], nodes[name]["fn"]
        assert x.shape == (chains, 4, *fn.shape())
        assert x.dtype == site["value"].dtype
        assert not x.isnan().any()
        assert not x.requires_grad
        # off to infinity, as they should, chains meet the end of what numbers can tell apart
        assert name in improper or in_support(fn, x)
    for stat in stats.values():
        assert stat.shape == (chains, 4)
        assert not stat.isnan().any()
    assert ((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1)).all()
    same(samples, draws(make, model, chains)[0], exactly=True)
    if jit:
        graph = draws(make, model, chains, jit_compile="capture")[0]
        same(samples, graph, exactly=False)


def in_support(fn: Any, x: torch.Tensor) -> bool:
    """In the support, or its closure: of a far-out z, exp(z) is 0 in floating point."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.positive or isinstance(support, type(constraints.positive)):
        return bool((x >= support.lower_bound).all())
    return bool(fn.support.check(x).all())


def same(samples: Any, others: Any, exactly: bool) -> None:
    for name, x in samples.items():
        tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(others[name], x, **tolerance)


def continuous_draws_are_right(model: ModelSpec, kernel: str, chains: int, jit: bool) -> None:
    draws_are_right(CONTINUOUS[kernel], model, chains, jit and kernel != "tempering")


REFUSED = r"the gradient in .*'x\d|has no gradient|hold no variables"


def discrete_draws_are_right(model: ModelSpec, kernel: str, chains: int, jit: bool) -> None:
    try:
        draws_are_right(FINITE[kernel], model, chains, jit)
    except ValueError as error:  # whole numbers, one-hot or masked out: no gradient to go by
        if kernel == "gibbs" or not re.search(REFUSED, str(error)):
            raise


def mixed_draws_are_right(model: ModelSpec, chains: int) -> None:
    draws_are_right(CompositeKernel, model, chains)


CHAINS = st.sampled_from([1, 2, 5])
INPUTS: dict[str, dict[str, Any]] = {
    "continuous_draws_are_right": {
        "model": models(max_latents=2),
        "kernel": st.sampled_from([*CONTINUOUS]),
        "chains": CHAINS,
        "jit": st.integers(0, 5).map(lambda n: n == 5),
    },
    "discrete_draws_are_right": {
        "model": models([*DISCRETE, SPIN], max_latents=2, partly=False),
        "kernel": st.sampled_from([*FINITE]),
        "chains": CHAINS,
        "jit": st.integers(0, 5).map(lambda n: n == 5),
    },
    "mixed_draws_are_right": {
        "model": models(["normal", "gamma", "energy", *DISCRETE, SPIN]).filter(
            lambda model: (
                len({family in (*DISCRETE, SPIN) for family in model.latents.values()}) == 2
            )
        ),
        "chains": CHAINS,
    },
}


@SIZES
def test_continuous_draws(many):
    inputs = INPUTS["continuous_draws_are_right"]
    holds(continuous_draws_are_right, many, few=8, thousands=1500, **inputs)


@SIZES
def test_discrete_draws(many):
    inputs = INPUTS["discrete_draws_are_right"]
    holds(discrete_draws_are_right, many, few=7, thousands=1000, **inputs)


@SIZES
def test_draws_of_both_kinds(many):
    inputs = INPUTS["mixed_draws_are_right"]
    holds(mixed_draws_are_right, many, few=4, thousands=500, **inputs)
