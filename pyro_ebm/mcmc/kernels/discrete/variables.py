r"""The discrete variables of a position, and the moves that change one of them.

A flat position :math:`z` of discrete sites is a row of *variables*, each of which holds one of the
support values of its site (:mod:`pyro_ebm.distributions.core.discrete`). A *move* gives one
variable another support value. All moves of a position, of all its variables and support values,
are laid side by side: ``(chains, moves)``, where a site of :math:`n` variables with :math:`K`
support values has :math:`n K`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.models.sites.site import Site


class Moves(NamedTuple):
    """What each move of a position would do, all of shape ``(chains, moves)``."""

    change: Tensor
    r"""The first-order change :math:`\nabla \log p(z)^\top (z' - z)` of the log density."""
    distance: Tensor
    """The squared distance :math:`|z' - z|^2`."""
    stays: Tensor
    """Whether it would leave its variable as it is, boolean."""


class Variables:
    """The variables of discrete sites.

    Args:
        sites: the sites, in the order of the flat position, all discrete.
        like: a tensor of the dtype and device of positions.

    Example:
        >>> from torch.distributions.transforms import identity_transform
        >>> support_values = torch.tensor([[0.0], [1.0], [2.0]])
        >>> site = Site("k", torch.Size([2]), torch.float32, identity_transform,
        ...     support_values=support_values)
        >>> variables = Variables([site], torch.empty(()))
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> variables.moves(z, torch.tensor([[1.0, -1.0]])).distance
        tensor([[0., 1., 4., 4., 1., 0.]])
        >>> variables.after(z, torch.tensor([[False, True, False, False, False, False]]))
        tensor([[1., 2.]])
    """

    def __init__(self, sites: Sequence[Site], like: Tensor):
        self.support_values = [_support_values(site).to(like) for site in sites]
        self.sizes = [site.shape.numel() for site in sites]
        self.counts = [
            size // support_values.shape[1]
            for size, support_values in zip(self.sizes, self.support_values, strict=True)
        ]
        self.num_moves = sum(
            n * len(c) for n, c in zip(self.counts, self.support_values, strict=True)
        )

    def _parts(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each site's variables ``(chains, n, b)`` and its support values ``(K, b)``."""
        return [
            (part.reshape(z.shape[0], n, support_values.shape[1]), support_values)
            for part, n, support_values in zip(
                z.split(self.sizes, -1), self.counts, self.support_values, strict=True
            )
        ]

    def moves(self, z: Tensor, grad: Tensor) -> Moves:
        r"""What each move would do to first order.

        Args:
            z: positions, shape ``(chains, dim)``.
            grad: the gradient of the potential :math:`U = -\log p` there, shape ``(chains, dim)``.
        """
        change, distance, stays = [], [], []
        for (x, support_values), (g, _) in zip(self._parts(z), self._parts(grad), strict=True):
            #  -g . (c - x)   and   |c - x|^2
            change.append((g * x).sum(-1, keepdim=True) - g @ support_values.T)
            if support_values.shape[1] == 1:
                square = (support_values[:, 0] - x).square()
            else:  # |c|^2 - 2 c . x + |x|^2: exact for unit vectors, and one number a move
                square = support_values.square().sum(-1) + x.square().sum(-1, keepdim=True)
                square = square - 2 * x @ support_values.T
            distance.append(square)
            stays.append(square == square.amin(-1, keepdim=True))
        return Moves(self.flat(change), self.flat(distance), self.flat(stays))

    def after(self, z: Tensor, chosen: Tensor) -> Tensor:
        """Positions after the chosen moves, at most one for each variable.

        Args:
            z: positions, shape ``(chains, dim)``.
            chosen: boolean, shape ``(chains, moves)``.
        """
        new = []
        for (x, support_values), choice in zip(
            self._parts(z), self.by_variable(chosen), strict=True
        ):
            moved = support_values[choice.long().argmax(-1)]
            new.append(torch.where(choice.any(-1, keepdim=True), moved, x).flatten(1))
        return torch.cat(new, -1)

    def by_variable(self, moves: Tensor) -> list[Tensor]:
        """``(chains, moves)`` as one tensor ``(chains, n, K)`` for each site."""
        widths = [
            n * len(support_values)
            for n, support_values in zip(self.counts, self.support_values, strict=True)
        ]
        return [
            part.reshape(moves.shape[0], n, len(support_values))
            for part, n, support_values in zip(
                moves.split(widths, -1), self.counts, self.support_values, strict=True
            )
        ]

    def flat(self, by_variable: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`by_variable`."""
        return torch.cat([part.flatten(1) for part in by_variable], -1)

    def columns(self) -> list[tuple[Tensor, Tensor]]:
        """The columns ``(b,)`` of the position and the support values of each variable.

        Variables with a single support value, which nothing can move, are left out.
        """
        found, start = [], 0
        for size, n, support_values in zip(
            self.sizes, self.counts, self.support_values, strict=True
        ):
            columns = torch.arange(start, start + size, device=support_values.device)
            rows = columns.reshape(n, support_values.shape[1])
            found += [(row, support_values) for row in rows if len(support_values) > 1]
            start += size
        return found


def gumbel(shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard Gumbel noise: the largest of logits + noise is a categorical draw.

    Example:
        >>> round(gumbel((100_000,), torch.empty(())).mean().item(), 1)  # Euler's constant
        0.6
    """
    noise = like.new_empty(tuple(shape))  # of each chain its own, under vmap
    return -noise.exponential_().log()


def _support_values(site: Site) -> Tensor:
    assert site.support_values is not None
    return site.support_values
