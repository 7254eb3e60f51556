"""Discrete sites of a model: which values their variables take, whether gradients see them."""

from typing import Any

from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyro_ebm.distributions.discrete import codewords
from pyro_ebm.distributions.energy import UnnormalizedEnergy


def site_codes(name: str, fn: Any) -> Tensor | None:
    """The codewords ``(K, b)`` of the variables of a discrete site; None if it is continuous.

    Raises:
        ValueError: for a discrete site whose variables do not share a finite set of values.

    Example:
        >>> site_codes("k", dist.Categorical(torch.ones(3)).expand([5]).to_event(1))
        tensor([[0],
                [1],
                [2]])
    """
    if not fn.support.is_discrete:
        return None
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, UnnormalizedEnergy):
        return codewords(fn.support, fn.event_shape)
    error: Exception | None = None
    if fn.has_enumerate_support:
        try:
            return fn.enumerate_support(expand=False).reshape(-1, max(fn.event_shape.numel(), 1))
        except (NotImplementedError, ValueError) as raised:
            error = raised
    raise ValueError(
        f"site {name!r} ({type(fn).__name__}) has no finite set of values that all its elements"
        " share, so that it cannot be resampled: use a distribution that can be enumerated"
        f" (Bernoulli, Categorical, Binomial with one total_count), or sum it out{_because(error)}"
    )


def _because(error: Exception | None) -> str:
    return "" if error is None else f" ({error})"
