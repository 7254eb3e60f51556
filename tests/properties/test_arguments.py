"""Any argument at all either works or is an error of ours that names it."""

import math
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import pyro_ebm
from tests.properties.inputs import SIZES, holds
from tests.properties.targets import Target
from tests.properties.targets_to_fit import TARGETS

PACKAGE = str(Path(pyro_ebm.__file__).parent)


def constant(*args: Any, **kwargs: Any) -> float:
    return 1.0


ODD = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 0.0, 1.0, 2.5, math.nan, math.inf, -math.inf, 1e30,
    -1e30, 1e-30, 1j, "", "x", b"x", (), (1,), (-1,), (0,), (2, 3), ("x",), (0.5,), [], [None],
    ["x"], [1.0, 0.5], [math.nan], {}, {"x": 1}, {"x": torch.zeros(3)}, {1, 2},
    constant,
    torch.empty(0), torch.zeros(()), torch.ones(2), torch.zeros(3), torch.ones(2, 3),
    torch.zeros(3, 2), torch.full((2,), math.nan), torch.tensor(math.inf), torch.tensor(-1.0),
    torch.tensor([1, 2]), torch.tensor([True, False]), torch.ones(2, dtype=torch.complex64),
    torch.zeros(1, 0), torch.ones(2, dtype=torch.float64),
    torch.distributions.Normal(0.0, 1.0), torch.distributions.constraints.positive,
]  # fmt: skip


# what an error may call an argument instead
ALSO = {
    "x": "points",
    "p": "the function",
    "q": "the function",
    "value": "points",
    "event_shape": "points must end in",
    "image_shape": "points must end in",
    "a": "part",
    "b": "part",
    "components": "component",
    "proposal": "proposed",
    "weight": "natural_parameters",  # of the difference of two Gaussians
    "scale": "the potential is",  # at every start
    "num_visible": "(num,",
    "field": "bias",
    "source": "init_to_draws wants",
    "guide": "init_to_guide",
    "shared_improper": "is improper",
}


def is_ours(error: BaseException) -> bool:
    """Whether we raised it, or torch, which checks a distribution's parameters and values."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return where.startswith(PACKAGE) or where == torch.distributions.distribution.__file__


def names(error: BaseException, name: str) -> bool:
    told = str(error).lower()
    also = ALSO.get(name, name)
    return any(each in told for each in (name, name.replace("_", " "), also))


def works_or_says_why(case: tuple[Target, str], value: Any) -> None:
    target, name = case
    if isinstance(target.good[name], bool) and isinstance(value, torch.Tensor):
        return  # a flag is whatever has a truth value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target(**{name: value})
        except (ValueError, TypeError, RuntimeError) as error:
            if not (is_ours(error) and names(error, name)):
                raise AssertionError(f"no clear error of ours: {error!r}") from error


CASES = [(target, name) for target in TARGETS for name in target.good]
INPUTS = {"works_or_says_why": {"case": st.sampled_from(CASES), "value": st.sampled_from(ODD)}}


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_good_arguments_work(target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target()


@SIZES
def test_an_argument_works_or_is_an_error_that_names_it(many):
    inputs = INPUTS["works_or_says_why"]
    holds(works_or_says_why, many, few=300, thousands=10_000, **inputs)
