r"""Linear preconditioning of batches of chains.

A sampler that knows the covariance :math:`\Sigma = L L^\top` of its target moves in the whitened
coordinates :math:`L^{-1} z`. Chains come in *groups* that share one factor :math:`L`: a Pyro model
is one group; the batch elements of a conditional energy are a group each. Groups vary fastest:
chain ``c`` belongs to group ``c % groups``.
"""

import torch
from torch import Tensor


def precondition(factor: Tensor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L v`.

    Args:
        factor: a diagonal, shape ``(groups, dim)``, or lower triangular matrices, shape
            ``(groups, dim, dim)``; ``None`` is the identity.
        v: vectors, shape ``(chains, dim)``, ``chains`` a multiple of ``groups``.

    Returns:
        Vectors, shape ``(chains, dim)``.

    Example:
        >>> precondition(torch.tensor([[2.0, 3.0]]), torch.ones(2, 2))
        tensor([[2., 3.],
                [2., 3.]])
    """
    return _apply(factor, v, "gij,cgj->cgi")


def precondition_transposed(factor: Tensor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L^\top v`; arguments as for :func:`precondition`.

    Example:
        >>> L = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
        >>> precondition_transposed(L, torch.tensor([[1.0, 1.0]]))
        tensor([[3., 1.]])
    """
    return _apply(factor, v, "gji,cgj->cgi")


def _apply(factor: Tensor | None, v: Tensor, equation: str) -> Tensor:
    if factor is None:
        return v
    grouped = v.unflatten(0, (-1, factor.shape[0]))
    if factor.dim() == 2:
        return (factor * grouped).reshape(v.shape)
    return torch.einsum(equation, factor, grouped).reshape(v.shape)
