"""The arguments of an estimate: which method takes which, and their numbers."""

from collections.abc import Mapping
from typing import Any

from pyro_ebm.ops.arguments import check_count, check_number

Given = dict[str, Any]
"""The arguments of a method, by name."""

COUNTS = ("num_samples", "num_chains", "num_steps", "num_temperatures", "max_units")
COUNTS += ("num_particles",)


def check_arguments(method: object, given: Given, takes: Mapping[str, set[str]]) -> None:
    """Raises a ValueError for an unknown method, or arguments that it does not take.

    Args:
        method: which one.
        given: the arguments.
        takes: those that each method takes.

    Example:
        >>> check_arguments("exact", {"betas": [0, 1]}, {"exact": set(), "ais": {"betas"}})
        Traceback (most recent call last):
        ValueError: method='exact' does not take ['betas'], of its own it has none
    """
    if not isinstance(method, str) or method not in takes:
        raise ValueError(f"method must be one of {list(takes)}, got {method!r}")
    if unknown := sorted(given.keys() - takes[method]):
        own = sorted(takes[method]) or "none"
        raise ValueError(f"method={method!r} does not take {unknown}, of its own it has {own}")
    ways = [name for name in ("betas", "num_temperatures", "ess_drop") if name in given]
    if len(ways) > 1:
        raise ValueError(f"the temperatures are given by one of {ways}, not by all")


def check_numbers(given: Given) -> None:
    """Raises a ValueError for numbers out of range."""
    least = {"num_samples": 2, "num_temperatures": 2, "num_particles": 2}
    for name in COUNTS:
        if name in given:
            given[name] = check_count(name, given[name], least.get(name, 1))
    drop = given.get("ess_drop", 0.5)
    check_number("ess_drop", drop)
    if not 0 < drop < 1:
        raise ValueError(f"ess_drop must lie in (0, 1), got {drop}")
