r"""Linear preconditioning of batches of chains.

With the covariance :math:`\Sigma = L L^\top` of its target, a sampler moves in the whitened
coordinates :math:`L^{-1} z`. Chains of one *target* share one factor :math:`L`: a Pyro model is one
target; the batch elements of a conditional energy are one each. Targets vary fastest: chain ``c``
has the target ``c % targets``.

A factor is a diagonal, a triangular matrix, or a :class:`LowRank` one, with which a product costs
:math:`O(d k)` in place of :math:`O(d^2)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    r"""The factor :math:`L = D\, (I + U (S - I)\, U^\top)`, a diagonal one but for few directions.

    Its inverse is :math:`(I + U (S^{-1} - I)\, U^\top)\, D^{-1}`.

    Example:
        >>> along = torch.tensor([[[0.6], [0.8]]])
        >>> factor = LowRank(torch.ones(1, 2), along, torch.tensor([[11.0]]))
        >>> precondition(factor, torch.tensor([[0.6, 0.8], [0.8, -0.6]])).round(decimals=3)
        tensor([[ 6.6000,  8.8000],
                [ 0.8000, -0.6000]])
    """

    diagonal: Tensor
    """:math:`D`, shape ``(targets, dim)``."""
    directions: Tensor
    """Orthonormal columns :math:`U`, shape ``(targets, dim, rank)``."""
    stretch: Tensor
    """The diagonal of :math:`S`, shape ``(targets, rank)``; 1 where a direction is not used."""

    def trimmed(self) -> "Factor":
        """The same without directions that no target uses; the diagonal if none is."""
        used = (self.stretch != 1).any(0)
        if not used.any():
            return self.diagonal
        directions = self.directions.mT[:, used].contiguous().mT  # each of them in one piece
        return LowRank(self.diagonal, directions, self.stretch[:, used])


Factor = Tensor | LowRank
"""A factor :math:`L`: a diagonal ``(targets, dim)``, lower triangular matrices
``(targets, dim, dim)``, or :class:`LowRank`."""


def precondition(factor: Factor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L v`.

    Args:
        factor: :math:`L`, see :data:`Factor`; ``None`` is the identity.
        v: vectors, shape ``(chains, dim)``, ``chains`` a multiple of ``targets``.

    Returns:
        Vectors, shape ``(chains, dim)``.

    Example:
        >>> precondition(torch.tensor([[2.0, 3.0]]), torch.ones(2, 2))
        tensor([[2., 3.],
                [2., 3.]])
    """
    if isinstance(factor, LowRank):
        return precondition(factor.diagonal, _stretched(factor, v, factor.stretch))
    return _apply(factor, v, "gij,cgj->cgi")


def precondition_transposed(factor: Factor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L^\top v`; arguments as for :func:`precondition`.

    Example:
        >>> L = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
        >>> precondition_transposed(L, torch.tensor([[1.0, 1.0]]))
        tensor([[3., 1.]])
    """
    if isinstance(factor, LowRank):
        return _stretched(factor, precondition(factor.diagonal, v), factor.stretch)
    return _apply(factor, v, "gji,cgj->cgi")


def whiten(factor: Factor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L^{-1} v`; arguments as for :func:`precondition`.

    Example:
        >>> L = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
        >>> whiten(L, torch.tensor([[1.0, 3.0]]))
        tensor([[1., 1.]])
    """
    if factor is None:
        return v
    if isinstance(factor, LowRank):
        return _stretched(factor, whiten(factor.diagonal, v), 1 / factor.stretch)
    rows = v.unflatten(0, (-1, factor.shape[0]))
    if factor.dim() == 2:
        return (rows / factor).reshape(v.shape)
    columns = torch.linalg.solve_triangular(factor, rows.permute(1, 2, 0), upper=False)
    return columns.permute(2, 0, 1).reshape(v.shape)


def _stretched(factor: LowRank, v: Tensor, stretch: Tensor) -> Tensor:
    """``v`` with its components along the directions multiplied."""
    rows = v.unflatten(0, (-1, stretch.shape[0])).transpose(0, 1)
    along = torch.bmm(rows, factor.directions) * (stretch - 1)[:, None]
    return torch.baddbmm(rows, along, factor.directions.mT).transpose(0, 1).reshape(v.shape)


def _apply(factor: Tensor | None, v: Tensor, equation: str) -> Tensor:
    if factor is None:
        return v
    rows = v.unflatten(0, (-1, factor.shape[0]))
    if factor.dim() == 2:
        return (factor * rows).reshape(v.shape)
    return torch.einsum(equation, factor, rows).reshape(v.shape)
