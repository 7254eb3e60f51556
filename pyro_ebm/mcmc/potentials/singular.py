"""Batched functions that meet a singular matrix in some chains."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.internals.tracing import is_capturing


def nan_where_singular(
    function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, targets: int = 1
) -> tuple[Tensor, ...]:
    """Calls a batched function that may meet a singular matrix: NaN for the chains that do.

    torch raises for the whole batch, and names the first matrix to blame: the chain of that place
    is tried alone, those before it together, and those after it, or all where torch names none, in
    halves. Those to blame get a potential of NaN, which is never accepted, and a gradient of 0, so
    that a trajectory goes straight on; the others get what they would have got anyway.

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
    except torch.linalg.LinAlgError as error:
        if is_capturing():  # a graph is being captured, and would split for ever
            raise
        rows = z.shape[0] // targets
        if rows <= 1:  # a potential, and a gradient where one is wanted
            return z.new_full(z.shape[:1], torch.nan), torch.zeros_like(z)
        named = _NAMED.search(str(error))
    row = int(named[1]) // targets if named else rows
    rest = rows - row - 1 if row < rows else rows
    sizes = [(rest + 1) // 2, rest // 2]
    if row < rows:
        sizes = [row, 1, *sizes]
    split = [part for part in z.split([n * targets for n in sizes]) if len(part)]
    parts = [nan_where_singular(function, part, targets) for part in split]
    return tuple(torch.cat(part) for part in zip(*parts, strict=False))


_NAMED = re.compile(r"Batch element (\d+)")
