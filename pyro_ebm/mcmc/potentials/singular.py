"""Batched functions that meet a singular matrix in some chains."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.internals.tracing import is_capturing


def nan_where_singular(
    function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, targets: int = 1
) -> tuple[Tensor, ...]:
    """Calls a batched function that may meet a singular matrix: NaN for the chains that do.

    torch raises for the whole batch; halving it finds the chains to blame. They get a potential
    of NaN, which is never accepted, and the others what they would have got anyway.

    Args:
        function: maps positions to potentials, or to potentials and gradients.
        z: positions, shape ``(chains, dim)``.
        targets: the least number of chains that can be evaluated at once.

    Example:
        >>> def function(z):
        ...     return (torch.linalg.cholesky(z[:, :, None])[:, 0, 0],)
        >>> nan_where_singular(function, torch.tensor([[1.0], [-1.0], [4.0]]))
        (tensor([1., nan, 2.]),)
    """
    try:
        return function(z)
    except torch.linalg.LinAlgError:
        if is_capturing():  # a graph is being captured, and would split for ever
            raise
        rows = z.shape[0] // targets
        if rows <= 1:  # a potential, and a gradient where one is wanted
            return z.new_full(z.shape[:1], torch.nan), torch.full_like(z, torch.nan)
    halves = z.split((rows + 1) // 2 * targets)
    parts = [nan_where_singular(function, half, targets) for half in halves]
    return tuple(torch.cat(part) for part in zip(*parts, strict=False))
