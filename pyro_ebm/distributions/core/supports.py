"""Supports: those of whole events, their bijections, which lies within which, points of them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyro_ebm.distributions.core.discrete import support_values_of
from pyro_ebm.distributions.core.introspection import detached, elementwise, readable
from pyro_ebm.distributions.core.positive_definite import positive_definite
from pyro_ebm.ops.arguments import shown


def plain_support(support: constraints.Constraint) -> constraints.Constraint:
    """The same support as a constraint that ``biject_to`` takes, where there is one.

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


def _is_infinite(bound: Tensor | float) -> bool:
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


def lift_support(
    support: constraints.Constraint, event_shape: torch.Size
) -> constraints.Constraint:
    """The support of a whole event: an elementwise constraint holds for every element.

    Args:
        support: a constraint with ``event_dim`` at most ``len(event_shape)``.
        event_shape: the shape of one event.

    Raises:
        ValueError: if it is no constraint, or has more event dimensions than the event.

    Example:
        >>> from torch.distributions import constraints
        >>> lift_support(constraints.positive, torch.Size([3])).event_dim
        1
    """
    if not isinstance(support, constraints.Constraint):
        raise ValueError(
            "support must be a constraint, such as pyro.distributions.constraints.positive, got"
            f" {shown(support)}"
        )
    support = plain_support(support)
    missing = len(event_shape) - support.event_dim
    if missing < 0:
        raise ValueError(
            f"the support {support} is of events with {support.event_dim} dimension(s), but"
            f" event_shape={tuple(event_shape)} has {len(event_shape)}: give event_shape="
            " a shape with that many dimensions, or an elementwise support"
        )
    return constraints.independent(support, missing) if missing else support


def check_bijection(support: constraints.Constraint, event_shape: torch.Size) -> None:
    """Raises a ValueError unless the reals map onto the support, with events of this shape."""
    try:
        biject_to(support).inverse_shape(event_shape)
    except NotImplementedError as error:
        raise ValueError(
            f"no bijection from the reals onto the support {support} is known to"
            " torch.distributions.biject_to: register one, or use another support"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"event_shape={tuple(event_shape)} does not fit the support {support}: {error}"
        ) from error


def support_of(fn: Distribution) -> constraints.Constraint:
    """The support of a whole event."""
    return lift_support(stated_support(fn), fn.event_shape)


def stated_support(fn: Distribution) -> constraints.Constraint:
    """What a distribution says of its support; by its type, that might be None."""
    support: Any = fn.support
    return support


def as_function(transform: Transform) -> Callable[[Tensor], Tensor]:
    """A transform itself; by its type, its values might be None."""
    function: Any = transform
    return function


def is_unbounded(support: constraints.Constraint) -> bool:
    """Whether every finite point lies in the support.

    Example:
        >>> is_unbounded(dist.constraints.real_vector), is_unbounded(dist.constraints.positive)
        (True, False)
    """
    return elementwise(support) is constraints.real


def is_finite(support: constraints.Constraint, event_shape: torch.Size) -> bool:
    """Whether a support is a finite set.

    Example:
        >>> is_finite(dist.constraints.boolean, torch.Size([3]))
        True
        >>> is_finite(dist.constraints.nonnegative_integer, torch.Size([]))
        False
    """
    try:
        return support_values_of(support, event_shape) is not None
    except ValueError:
        return False


def is_any_integer(support: constraints.Constraint) -> bool:
    """Whether a support is that of all whole numbers, below 0 too.

    Example:
        >>> is_any_integer(dist.constraints.integer), is_any_integer(dist.Poisson(1.0).support)
        (True, False)
    """
    return isinstance(elementwise(support), type(constraints.integer))


def uniform_start(support: constraints.Constraint, shape: torch.Size, like: Tensor) -> Tensor:
    """Points of the support: uniform on (-2, 2) before the bijection, or over discrete values.

    Of whole numbers above a bound, over the five least; without bounds, from -2 to 2.

    Args:
        support: the support of a whole event.
        shape: ``(*sample, *batch, *event)``.
        like: a tensor that tells dtype and device.

    Raises:
        ValueError: for another discrete support that is not a finite set.

    Example:
        >>> uniform_start(dist.constraints.positive, torch.Size([3]), torch.empty(())) > 0
        tensor([True, True, True])
    """
    if not support.is_discrete:
        bijection = biject_to(support)
        z = torch.empty(bijection.inverse_shape(shape), dtype=like.dtype, device=like.device)
        return bijection(z.uniform_(-2.0, 2.0))
    inner = elementwise(support)
    lower = -2 if is_any_integer(inner) else getattr(inner, "lower_bound", None)
    if lower is not None and not hasattr(inner, "upper_bound"):  # whole numbers
        return torch.randint(5, shape, device=like.device).to(like) + lower
    try:
        support_values = support_values_of(support, shape)
    except ValueError as error:
        raise ValueError(
            f"{error}; or, where the bounds must differ, give base=, whose draws are points to"
            " start at"
        ) from error
    assert support_values is not None
    support_values = support_values.to(like)
    variables = shape[: len(shape) - (support_values.shape[1] > 1)]
    return support_values[
        torch.randint(len(support_values), variables, device=like.device)
    ].reshape(shape)


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
    wide, narrow = elementwise(wide), elementwise(narrow)
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


def _same(one: object, other: object) -> bool:
    """Whether two constraints are of one type and have the same parts."""
    if one is other:
        return True
    if isinstance(one, Tensor | int | float) and isinstance(other, Tensor | int | float):
        return _at_most(one, other) and _at_most(other, one)
    if type(one) is not type(other):
        return False
    if isinstance(one, constraints.Constraint):
        return _same(vars(one), vars(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _bounds(support: constraints.Constraint) -> tuple[Tensor | float, Tensor | float] | None:
    """The least and the greatest value of an interval; None for other supports."""
    if isinstance(support, type(constraints.boolean)):
        return 0, 1
    low, high = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    if support.event_dim > 0 or (low is None and high is None):
        return None
    return -math.inf if low is None else low, math.inf if high is None else high


def _at_most(one: Tensor | float, other: Tensor | float) -> bool:
    # a look of ours is no read of the model's
    one, other = detached(one), detached(other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool((torch.as_tensor(one) <= torch.as_tensor(other)).all())
    return one <= other
