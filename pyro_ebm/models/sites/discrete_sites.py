"""Discrete sites of a model, and the values that their variables take."""

from collections.abc import Collection

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions.core.discrete import support_values_of
from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.distributions.core.supports import is_any_integer, plain_support, stated_support
from pyro_ebm.distributions.core.wrappers import VIEWS, innermost
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.models.sites.latents import SampleSite


def site_support_values(name: str, fn: TorchDistribution) -> Tensor | None:
    """The support values ``(K, b)`` of the variables of a discrete site; None if it is continuous.

    They are ``UNBOUNDED``, none, where its elements are whole numbers without a bound.

    Raises:
        ValueError: for a discrete site whose elements are neither that, nor have values that all
            share.

    Example:
        >>> site_support_values("k", dist.Categorical(torch.ones(3)).expand([5]).to_event(1))
        tensor([[0],
                [1],
                [2]])
    """
    if not stated_support(fn).is_discrete:
        return None
    fn = innermost(fn, VIEWS)
    error: Exception | None = None
    if isinstance(fn, UnnormalizedEnergy) or fn.has_enumerate_support:
        try:
            if isinstance(fn, UnnormalizedEnergy):
                return support_values_of(stated_support(fn), fn.event_shape)
            size = torch.Size(fn.event_shape).numel()  # a tuple, of a SpanningTree
            return fn.enumerate_support(expand=False).reshape(-1, max(size, 1))
        except (NotImplementedError, ValueError) as raised:
            error = raised
    if is_integer(stated_support(fn)):
        return UNBOUNDED
    raise ValueError(
        f"site {name!r} ({type(fn).__name__}) has no finite set of values that all its elements"
        f" share, so that it cannot be resampled: {OTHER_WAYS}{_because(error)}"
    )


OTHER_WAYS = (
    "use a distribution that can be enumerated (Bernoulli, Categorical, Binomial with one"
    " total_count; where counts share a total, one Binomial after another), or sum it out"
)
UNBOUNDED = torch.empty(0, 1)
"""The support values of whole numbers without fixed bounds."""


def is_integer(support: constraints.Constraint) -> bool:
    """Whether the elements of a support are whole numbers, with bounds or without.

    Example:
        >>> is_integer(dist.Poisson(1.0).support), is_integer(dist.Bernoulli(0.5).support)
        (True, False)
    """
    inner = elementwise(plain_support(support))
    return support.is_discrete and (hasattr(inner, "lower_bound") or is_any_integer(inner))


def nearest_inside(support: constraints.Constraint, x: Tensor) -> Tensor:
    """The nearest whole numbers within the bounds of a support.

    Example:
        >>> nearest_inside(dist.Poisson(1.0).support, torch.tensor([-2.0, 3.0]))
        tensor([0., 3.])
    """
    inner = elementwise(plain_support(support))
    for bound, nearest in (("lower_bound", torch.maximum), ("upper_bound", torch.minimum)):
        if (end := getattr(inner, bound, None)) is not None:
            x = nearest(x, torch.as_tensor(end).to(x))
    return x


class WithinBounds(Messenger):
    """Shows a model the nearest whole number that a site may have.

    A proposal beyond the bounds is rejected, but the model is evaluated all the same, and the
    number may be an index, a size or a total.

    Args:
        names: the sites.

    Example:
        >>> model = lambda: pyro.sample("n", dist.Poisson(1.0))
        >>> WithinBounds(["n"])(pyro.poutine.condition(model, {"n": -2.0}))()
        tensor(0.)
    """

    def __init__(self, names: Collection[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: SampleSite) -> None:
        if msg["name"] in self.names:
            x = torch.as_tensor(msg["value"])
            msg["value"] = nearest_inside(stated_support(msg["fn"]), x)


def _because(error: Exception | None) -> str:
    return "" if error is None else f" ({error})"
