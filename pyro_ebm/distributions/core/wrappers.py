"""Distributions inside distributions: ``to_event``, ``mask``, ``expand``, transforms, mixtures.

Pyro and torch wrap one distribution in another, which keeps it in an attribute. All code that
looks inside goes through this module.
"""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from pyro.distributions import Delta, ImproperUniform
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

T = TypeVar("T")
WRAPPED = ("base_dist", "_component_distribution", "component0", "component1")
"""The attributes that hold distributions of the same or of transformed points."""
PARTS = (*WRAPPED, "base", "_mixture_distribution", "_dirichlet")  # the last is of Beta
"""All attributes that hold distributions."""
VIEWS = (Independent, MaskedDistribution, ExpandedDistribution)
"""The wrappers that leave the points as they are."""


def layers(fn: object, wrappers: type | tuple[type, ...] = object) -> Iterator[object]:
    """A distribution, the one that it wraps, the one inside that, and so on.

    Args:
        fn: the distribution.
        wrappers: the kinds of wrappers to look through; by default all, transforms included.

    Example:
        >>> p = dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(True)
        >>> [type(layer).__name__ for layer in layers(p)]
        ['MaskedDistribution', 'Independent', 'Normal']
    """
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None) if isinstance(fn, wrappers) else None


def innermost(fn: object, wrappers: type | tuple[type, ...] = object) -> Any:
    """The last of :func:`layers`.

    Example:
        >>> innermost(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        Normal(loc: torch.Size([3]), scale: torch.Size([3]))
    """
    *_, last = layers(fn, wrappers)
    return last


def parts_of(fn: object) -> Iterator[Distribution]:
    """The distributions that one holds directly: the wrapped one, or the parts of a mixture."""
    for name in WRAPPED:
        if (part := getattr(fn, name, None)) is not None:
            yield part


def walk(fn: object) -> Iterator[object]:
    """A distribution and all that it is made of, at any depth.

    Example:
        >>> parts = dist.Normal(torch.zeros(2), 1.0)
        >>> p = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
        >>> [type(part).__name__ for part in walk(p.mask(True))]
        ['MaskedDistribution', 'MixtureSameFamily', 'Normal']
    """
    yield fn
    for part in parts_of(fn):
        yield from walk(part)


def improper_part(fn: object) -> str | None:
    """The name of a part without a density: masked, a point mass, improper, or composite.

    Example:
        >>> improper_part(dist.Normal(0.0, 1.0).mask(False))
        'MaskedDistribution'
    """
    without = (MaskedDistribution, Delta, ImproperUniform)
    found = (part for part in walk(fn) if isinstance(part, without))
    return next((type(part).__name__ for part in (*found, composite_part(fn)) if part), None)


def composite_part(fn: object) -> Distribution | None:
    """The part of a distribution whose ``log_prob`` is a composite log likelihood, or None.

    Such a part has the attribute ``is_composite = True``: its ``log_prob`` is a sum of the log
    densities of parts of a point given others, and no log density of the point. A posterior may be
    sampled with it knowingly; evidence, and a draw of the point, are not to be had from it.

    Example:
        >>> class Composite(dist.Normal):
        ...     is_composite = True
        >>> p = Composite(torch.zeros(2), 1.0)
        >>> composite_part(p.to_event(1).mask(True)) is p, composite_part(dist.Normal(0.0, 1.0))
        (True, None)
    """
    parts = (part for part in walk(fn) if isinstance(part, Distribution))
    return next((part for part in parts if getattr(part, "is_composite", False)), None)


def inside_event(fn: object, dims: int) -> Any:
    """The distribution inside ``to_event(dims)``, as far as there is one.

    Example:
        >>> inside_event(dist.Normal(torch.zeros(3, 2), 1.0).to_event(2), 1).batch_shape
        torch.Size([3])
    """
    while dims > 0 and isinstance(fn, Independent):
        inner, base = fn.reinterpreted_batch_ndims, fn.base_dist
        fn = base if inner <= dims else Independent(base, inner - dims)
        dims -= min(inner, dims)
    return fn


def unmasked(fn: object, mask: Tensor | bool | None) -> tuple[Any, Tensor | None, int]:
    """The distribution inside ``mask`` and ``to_event``, all masks together, and what was summed.

    Args:
        fn: a site's distribution.
        mask: the site's own mask.

    Returns:
        The innermost distribution; which elements of its batch count, a boolean tensor that
        broadcasts to its batch shape, or None if all do; and over how many dimensions of its batch
        ``to_event`` sums.

    Example:
        >>> p = dist.Normal(torch.zeros(3, 2), 1.0).mask(torch.tensor([True, False])).to_event(1)
        >>> unmasked(p, torch.tensor([True, True, False]))
        (Normal(loc: torch.Size([3, 2]), scale: torch.Size([3, 2])), tensor([[ True, False],
                [ True, False],
                [False, False]]), 1)
    """
    mask, inner_dims = None if mask is None else torch.as_tensor(mask), 0
    for layer in layers(fn, (MaskedDistribution, Independent)):
        fn = layer
        if isinstance(fn, MaskedDistribution):
            inner = torch.as_tensor(fn._mask)
            mask = inner if mask is None else mask & inner
        elif isinstance(fn, Independent):
            inner_dims += fn.reinterpreted_batch_ndims
            if mask is not None:
                mask = mask.reshape(mask.shape + (1,) * fn.reinterpreted_batch_ndims)
    return fn, mask, inner_dims


def unvalidated(fn: T) -> T:
    """A distribution that checks no values: a point outside the support has no density, no error.

    Samplers propose such points and must see the density there, not an exception; and checks
    branch on values, which ``vmap`` forbids.

    Example:
        >>> p = dist.Normal(0.0, 1.0, validate_args=True).expand([2]).to_event(1)
        >>> unvalidated(p).log_prob(torch.full((2,), float("nan")))
        tensor(nan)
    """
    new: Any = copy.copy(fn)
    for part in PARTS:
        inner = vars(new).get(part)
        if inner is not None:
            setattr(new, part, unvalidated(inner))
    if hasattr(new, "_validate_args"):  # after the parts: Independent passes it on to its base
        new._validate_args = False
    return new
