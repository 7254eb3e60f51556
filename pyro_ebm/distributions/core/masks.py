"""What a site's masks leave of it: its own, and those of its distribution."""

from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent


def unmasked(fn: Any, mask: Any) -> tuple[Any, Tensor | None, int]:
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
    while isinstance(fn, MaskedDistribution | Independent):
        if isinstance(fn, MaskedDistribution):
            inner = torch.as_tensor(fn._mask)
            mask = inner if mask is None else mask & inner
        else:
            dims = fn.reinterpreted_batch_ndims
            inner_dims += dims
            if mask is not None:
                mask = mask.reshape(mask.shape + (1,) * dims)
        fn = fn.base_dist
    return fn, mask, inner_dims
