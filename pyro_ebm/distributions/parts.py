"""The parts of a combined density: energies and ordinary distributions, checked and named."""

from collections.abc import Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_ebm.distributions.checks.arguments import common_batch
from pyro_ebm.distributions.core.introspection import held
from pyro_ebm.distributions.core.linear import name_of
from pyro_ebm.distributions.core.noise_levels import on_ladder
from pyro_ebm.distributions.core.wrappers import improper_part
from pyro_ebm.distributions.energy import UnnormalizedEnergy, energies_of
from pyro_ebm.ops.arguments import shown


def as_part(name: str, fn: object) -> Distribution:
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
    if (improper := improper_part(fn)) is not None:
        raise ValueError(
            f"{name} is or holds a {improper}, which has no density to combine: mask the"
            " site of the whole instead, and leave out what is improper or a point mass"
        )
    for p in energies_of(fn):
        if not p.is_normalized:
            raise ValueError(
                f"{name} hides {p!r}, whose log Z is {p.normalizer_state}, in a transform or a"
                " mixture of torch: combine the energies first, by product() or mixture(), and"
                " transform the result"
            )
    return fn


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
        whole.normalized_parts = (p,)
    return on_ladder(whole, [p], partial(_levels_to_event, fn), p.noised)


def _levels_to_event(fn: Independent, parts: list[UnnormalizedEnergy]) -> UnnormalizedEnergy:
    return _to_event(parts[0], fn)


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


def is_normalized(fn: Distribution) -> bool:
    """Whether ``log_prob`` is the log of a density, as that of ordinary distributions is."""
    return fn.is_normalized if isinstance(fn, UnnormalizedEnergy) else True


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
    shapes = (part.batch_shape for part in parts)
    return common_batch(f"parts of {whole}", *shapes, *batch_shapes)
