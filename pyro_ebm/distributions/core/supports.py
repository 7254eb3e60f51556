"""Which supports are the same, which lies within which, and which have a bijection in disguise."""

import copy
import math
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.distributions.exponential.positive_definite import positive_definite


def plain_support(support: constraints.Constraint) -> constraints.Constraint:
    """A support in words that ``biject_to`` knows, where it is only their wording it does not.

    A mixture lives where its components do, on the least interval that holds theirs; an interval
    up to infinity is a half-line; positive definite matrices have a bijection of ours.

    Example:
        >>> from torch.distributions import MixtureSameFamily
        >>> parts = dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
        >>> mixture = MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
        >>> plain_support(mixture.support)
        Interval(lower_bound=0.0, upper_bound=3.0)
    """
    if isinstance(support, MixtureSameFamilyConstraint):
        inner = plain_support(support.base_constraint)
        return _hull(inner, -1 - inner.event_dim)
    if isinstance(support, constraints.independent):
        inner = plain_support(support.base_constraint)
        same = inner is support.base_constraint
        return (
            support if same else constraints.independent(inner, support.reinterpreted_batch_ndims)
        )
    if type(support) is type(constraints.positive_definite):
        return positive_definite
    if type(support) is type(constraints.interval(0, 1)):
        low, high = support.lower_bound, support.upper_bound
        if _is_infinite(high) and not _is_infinite(low):
            return constraints.greater_than(low)
    return support


def _is_infinite(bound: Any) -> bool:
    """Whether a bound is infinite everywhere, as far as may be read: a latent's may not."""
    if isinstance(bound, Tensor):
        return readable(bound) and bool(bound.isinf().all())
    return math.isinf(bound)


def _hull(support: constraints.Constraint, dim: int) -> constraints.Constraint:
    """The least half-line or interval around those that lie side by side along a dimension."""
    if isinstance(support, constraints.independent):
        inner = _hull(support.base_constraint, dim)
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    bounds = {
        name: bound
        for name in ("lower_bound", "upper_bound")
        if isinstance(bound := getattr(support, name, None), Tensor) and bound.dim() >= -dim
    }
    if not bounds or support.is_discrete:
        return support
    hull = copy.copy(support)
    for name, bound in bounds.items():
        setattr(hull, name, bound.amin(dim) if name == "lower_bound" else bound.amax(dim))
    return hull


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


def _at_most(one: Any, other: Any) -> bool:
    # a look of ours is no read of the model's
    one, other = detach_provenance(one), detach_provenance(other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool((torch.as_tensor(one) <= torch.as_tensor(other)).all())
    return one <= other


__all__ = ["contains", "plain_support", "same_support"]
