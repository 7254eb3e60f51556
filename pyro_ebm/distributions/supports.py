"""Which supports are the same, and which lies within which."""

import math
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor


def contains(wide: constraints.Constraint, narrow: constraints.Constraint) -> bool:
    r"""Whether the points of one support are points of another, as far as is known.

    The reals contain every support, discrete ones too. Intervals are compared by their bounds, and
    endpoints of continuous ones, which have no mass, do not count.

    Args:
        wide: the support of a whole event, or an elementwise constraint.
        narrow: the same, of events of the same shape.

    Example:
        >>> real, positive = dist.constraints.real, dist.constraints.positive
        >>> contains(real, positive), contains(positive, real)
        (True, False)
        >>> contains(dist.constraints.nonnegative, positive), contains(positive, positive)
        (True, True)
    """
    wide, narrow = _elementwise(wide), _elementwise(narrow)
    if isinstance(wide, type(constraints.real)) or _same(wide, narrow):
        return True
    outer, inner = _bounds(wide), _bounds(narrow)
    if outer is None or inner is None or wide.is_discrete != narrow.is_discrete:
        return False
    return _at_most(outer[0], inner[0]) and _at_most(inner[1], outer[1])


def same_support(one: constraints.Constraint, other: constraints.Constraint) -> bool:
    """Whether two supports hold the same points, but for endpoints without mass.

    Example:
        >>> same_support(dist.constraints.interval(0, 1), dist.constraints.unit_interval)
        True
    """
    return contains(one, other) and contains(other, one)


def _elementwise(support: constraints.Constraint) -> constraints.Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _same(one: Any, other: Any) -> bool:
    """Whether two constraints are of one type and have the same parts."""
    if one is other:
        return True
    if isinstance(one, Tensor | int | float) and isinstance(other, Tensor | int | float):
        return _at_most(one, other) and _at_most(other, one)
    if type(one) is not type(other):
        return False
    if isinstance(one, constraints.Constraint):
        return _same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _bounds(support: constraints.Constraint) -> tuple[Any, Any] | None:
    """The least and the greatest value of an interval; None for other supports."""
    if isinstance(support, type(constraints.boolean)):
        return 0, 1
    low, high = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    if support.event_dim > 0 or (low is None and high is None):
        return None
    return -math.inf if low is None else low, math.inf if high is None else high


def _at_most(one: Tensor | float, other: Tensor | float) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool((torch.as_tensor(one) <= torch.as_tensor(other)).all())
    return one <= other


__all__ = ["contains", "same_support"]
