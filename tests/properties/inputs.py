"""How many random inputs a property is held against: a few in the suite, thousands when slow.

The inputs are the same in each run: they are derived from the property itself.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
from hypothesis import HealthCheck, Phase, given, settings

SIZES = pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])


def holds(check: Callable[..., None], many: bool, few: int, thousands: int, **inputs: Any) -> int:
    """Calls ``check`` with random inputs, each from seed 0 and an empty parameter store.

    Args:
        check: the property; it raises where it does not hold.
        many: whether to try ``thousands`` of inputs, or a ``few``.
        few: how many in the suite.
        thousands: how many when slow.
        **inputs: the strategy of each argument.

    Returns:
        How many inputs were tried.
    """
    tried = 0

    @settings(
        max_examples=thousands if many else few,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(**inputs)
    def each(**drawn: Any) -> None:
        nonlocal tried
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pyro.enable_validation(True)
        check(**drawn)
        tried += 1

    each()
    print(f"{getattr(check, '__name__', check)}: {tried} inputs")
    return tried
