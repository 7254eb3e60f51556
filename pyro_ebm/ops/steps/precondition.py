r"""Linear preconditioning of batches of chains.

With the covariance :math:`\Sigma = L L^\top` of its target, a sampler moves in the whitened
coordinates :math:`L^{-1} z`. Chains of one *target* share one factor :math:`L`: a Pyro model is one
target; the batch elements of a conditional energy are one each. Targets vary fastest: chain ``c``
has the target ``c % targets``.
"""

import torch
from torch import Tensor


def precondition(inverse_mass_sqrt: Tensor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L v`.

    Args:
        inverse_mass_sqrt: a diagonal, shape ``(targets, dim)``, or lower triangular matrices, shape
            ``(targets, dim, dim)``; ``None`` is the identity.
        v: vectors, shape ``(chains, dim)``, ``chains`` a multiple of ``targets``.

    Returns:
        Vectors, shape ``(chains, dim)``.

    Example:
        >>> precondition(torch.tensor([[2.0, 3.0]]), torch.ones(2, 2))
        tensor([[2., 3.],
                [2., 3.]])
    """
    return _apply(inverse_mass_sqrt, v, "gij,cgj->cgi")


def precondition_transposed(inverse_mass_sqrt: Tensor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L^\top v`; arguments as for :func:`precondition`.

    Example:
        >>> L = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
        >>> precondition_transposed(L, torch.tensor([[1.0, 1.0]]))
        tensor([[3., 1.]])
    """
    return _apply(inverse_mass_sqrt, v, "gji,cgj->cgi")


def _apply(inverse_mass_sqrt: Tensor | None, v: Tensor, equation: str) -> Tensor:
    if inverse_mass_sqrt is None:
        return v
    rows = v.unflatten(0, (-1, inverse_mass_sqrt.shape[0]))
    if inverse_mass_sqrt.dim() == 2:
        return (inverse_mass_sqrt * rows).reshape(v.shape)
    return torch.einsum(equation, inverse_mass_sqrt, rows).reshape(v.shape)
