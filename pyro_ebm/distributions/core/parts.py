"""The parts of a combined density: energies and ordinary distributions, checked and named."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_ebm.distributions.checks.arguments import lift_support
from pyro_ebm.distributions.core.discrete import support_values_of
from pyro_ebm.distributions.core.introspection import sources
from pyro_ebm.distributions.energy import UnnormalizedEnergy, _name_of
from pyro_ebm.ops.arguments import shown

_WITHOUT_DENSITY = (MaskedDistribution, dist.ImproperUniform, dist.Delta)
_INNER = ("base_dist", "_component_distribution", "component0", "component1")


def as_part(name: str, fn: Any) -> Distribution:
    """A part of a combined density: an energy, or a normalized ordinary distribution.

    An energy inside ``to_event`` is an energy of larger events.

    Args:
        name: what to call the part in errors.
        fn: what the user gave.

    Raises:
        ValueError: if it is no distribution, has no density, or hides an unnormalized energy.

    Example:
        >>> as_part("a", UnnormalizedEnergy(torch.square).expand([3]).to_event(1))
        UnnormalizedEnergy(energy=square, event_shape=(3,), log_normalizer=unknown)
    """
    if not isinstance(fn, Distribution):
        raise ValueError(f"{name} must be an energy or another distribution, got {shown(fn)}")
    if isinstance(fn, UnnormalizedEnergy):
        return fn
    if isinstance(fn, Independent):
        inner = as_part(name, fn.base_dist)
        return _to_event(inner, fn) if isinstance(inner, UnnormalizedEnergy) else fn
    _refuse_without_density(name, fn)
    return fn


def _refuse_without_density(name: str, fn: Any) -> None:
    if isinstance(fn, _WITHOUT_DENSITY):
        raise ValueError(
            f"{name} is or holds a {type(fn).__name__}, which has no density to combine: mask the"
            " site of the whole instead, and leave out what is improper or a point mass"
        )
    if isinstance(fn, UnnormalizedEnergy) and not fn.is_normalized:
        raise ValueError(
            f"{name} hides {fn!r}, whose log Z is {fn.normalizer_state}, in a transform or a"
            " mixture of torch: combine the energies first, by product() or mixture(), and"
            " transform the result"
        )
    for attribute in _INNER:
        if (inner := getattr(fn, attribute, None)) is not None:
            _refuse_without_density(name, inner)


def _to_event(p: UnnormalizedEnergy, fn: Independent) -> UnnormalizedEnergy:
    """The energy of ``p.to_event(n)``: energies, log densities and log Z add up."""
    n = fn.reinterpreted_batch_ndims
    log_z = p.log_normalizer
    whole = UnnormalizedEnergy(
        SummedEnergy(p, n),
        fn.event_shape,
        fn.support,
        fn.batch_shape,
        None if p.base is None else dist.Independent(p.base, n),
        None if log_z is None else _sum(log_z.expand(p.batch_shape), n),
        kernel=p.kernel,
        num_steps=p.num_steps,
        constant_normalizer=p.constant_normalizer,
        learned_normalizer=p.normalizer_state == "learned",
    )
    if p.is_normalized:
        whole._normalized_parts = (p,)
    return whole


class SummedEnergy:
    """The sum of energies over the rightmost batch dimensions.

    Args:
        p: a batch of energies.
        num_dims: how many dimensions.
    """

    def __init__(self, p: UnnormalizedEnergy, num_dims: int):
        self.p, self.num_dims = p, num_dims
        self.held = held([p])
        self.__name__ = name_of(p)

    def __call__(self, x: Tensor) -> Tensor:
        """Energies ``(*sample, *batch)`` of points ``(*sample, *batch, *event)``."""
        return _sum(self.p.energy(x), self.num_dims)


def _sum(x: Tensor, num_dims: int) -> Tensor:
    """The sum over the rightmost dimensions."""
    return x.flatten(x.dim() - num_dims).sum(-1) if num_dims else x


def held(parts: Iterable[Any]) -> tuple[Tensor | nn.Module, ...]:
    """The modules and tensors of distributions and tensors, each once.

    A callable that keeps them in an attribute shows them to
    :func:`~pyro_ebm.distributions.core.introspection.sources`, however deep its parts are nested.

    Example:
        >>> held([dist.Normal(torch.tensor(1.0), 2.0)])
        (tensor(1.), tensor(2.))
    """
    found = {}
    for part in parts:
        inside = [part]
        if isinstance(part, Distribution):  # those of torch are no callables
            inside = [getattr(part, "_energy", None), vars(part)]
        found.update({id(source): source for function in inside for source in sources(function)})
    return tuple(found.values())


def name_of(fn: Any) -> str:
    """A name for a distribution: that of the energy function, else its class."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return _name_of(fn._energy) if type(fn) is UnnormalizedEnergy else type(fn).__name__


def support_of(fn: Distribution) -> constraints.Constraint:
    """The support of a whole event."""
    support: Any = fn.support
    return lift_support(support, fn.event_shape)


def is_normalized(fn: Distribution) -> bool:
    """Whether ``log_prob`` is the log of a density, as that of ordinary distributions is."""
    return fn.is_normalized if isinstance(fn, UnnormalizedEnergy) else True


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


def check_shapes(
    whole: str, parts: Sequence[Distribution], *batch_shapes: tuple[int, ...]
) -> torch.Size:
    """The batch shape of a whole whose parts have one event shape.

    Args:
        whole: what to call the whole.
        parts: its parts.
        *batch_shapes: further batch shapes.

    Raises:
        ValueError: if event shapes differ, or batch shapes do not broadcast.
    """
    event_shape = tuple(parts[0].event_shape)
    for i, part in enumerate(parts):
        if part.event_shape != event_shape:
            one, other = sorted((event_shape, tuple(part.event_shape)), key=len)
            hint = f": write d.expand({other}).to_event({len(other)})" if one == () else ""
            raise ValueError(
                f"the parts of {whole} must have one event_shape, got {event_shape} and, in"
                f" place {i}, {tuple(part.event_shape)}{hint}"
            )
    shapes = [*(tuple(part.batch_shape) for part in parts), *map(tuple, batch_shapes)]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ValueError(f"the batch shapes of {whole} do not broadcast: {shapes}") from error


def checked_coefficient(
    name: str, value: Tensor | float, batch_shape: torch.Size, zero: bool
) -> Tensor | float:
    """A positive power of a density, one for each batch element.

    Args:
        name: what to call it.
        value: the power.
        batch_shape: that of the density.
        zero: whether 0 is allowed too.

    Raises:
        ValueError: if it is not a finite positive number, or does not broadcast.
    """
    if not isinstance(value, Tensor | float | int):
        raise ValueError(f"{name} must be a number or a tensor, got {shown(value)}")
    tensor = torch.as_tensor(value)
    try:
        fits = torch.broadcast_shapes(tensor.shape, batch_shape) == batch_shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to batch_shape="
            f"{tuple(batch_shape)}: expand the distribution first"
        )
    if isinstance(value, Tensor):
        wrong = (
            is_validation_enabled()
            and not (tensor.isfinite() & ((tensor >= 0) if zero else (tensor > 0))).all()
        )
    else:
        wrong = not (math.isfinite(value) and (value >= 0 if zero else value > 0))
    if wrong:
        raise ValueError(
            f"{name} must be finite and {'at least 0' if zero else 'greater than 0'}, got {value}"
        )
    return value


__all__ = [
    "SummedEnergy",
    "as_part",
    "check_shapes",
    "checked_coefficient",
    "held",
    "is_finite",
    "is_normalized",
    "name_of",
    "support_of",
]
