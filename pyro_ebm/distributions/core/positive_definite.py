r"""Symmetric positive definite matrices as a support that samplers can move in.

torch has the constraint, but no bijection from the reals onto it. Here it is the Cholesky factor
with the logarithm of its diagonal,

.. math:: X = L L^\top, \qquad L_{ii} = e^{z_{ii}}, \quad L_{ij} = z_{ij} \; (i > j), \qquad
          \log \Big| \frac{dX}{dz} \Big| = n \log 2 + \sum_{i=1}^n (n - i + 2)\, z_{ii} .

The measure on the matrices is that of their lower triangle.
"""

import math
from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import Transform


class _PositiveDefinite(type(constraints.positive_definite)):
    """torch's constraint, by a name of its own to register a bijection for."""


positive_definite = _PositiveDefinite()


class FromLowerTriangle(Transform):
    """From ``(*batch, n (n + 1) / 2)`` onto positive definite ``(*batch, n, n)``.

    Example:
        >>> FromLowerTriangle()(torch.tensor([0.0, 2.0, 0.0]))
        tensor([[1., 2.],
                [2., 5.]])
    """

    domain = constraints.real_vector
    codomain = positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FromLowerTriangle)

    def _call(self, x: Tensor) -> Tensor:
        n = (math.isqrt(1 + 8 * x.shape[-1]) - 1) // 2
        rows, columns = torch.tril_indices(n, n, device=x.device)
        x = torch.where(rows == columns, x.exp(), x)
        factor = x.new_zeros(x.shape[:-1] + (n, n))
        # out of place, so that vmap can map it
        factor = factor.flatten(-2).index_add(-1, rows * n + columns, x).unflatten(-1, (n, n))
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(y)
        factor = torch.where(info[..., None, None] > 0, torch.nan, factor)
        rows, columns = torch.tril_indices(*y.shape[-2:], device=y.device)
        x = factor[..., rows, columns]
        return torch.where(rows == columns, x.clamp(min=torch.finfo(x.dtype).tiny).log(), x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log determinant of the Jacobian, shape ``(*batch)``."""
        n = y.shape[-1]
        diagonal = torch.arange(n, device=x.device)
        diagonal = diagonal * (diagonal + 3) // 2  # where the lower triangle has its diagonal
        weights = torch.arange(n + 1, 1, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2.0) + (weights * x[..., diagonal]).sum(-1)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape ``(*batch, n, n)`` of the matrices of triangles ``(*batch, n (n + 1) / 2)``."""
        n = (math.isqrt(1 + 8 * shape[-1]) - 1) // 2
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape ``(*batch, n (n + 1) / 2)`` of the triangles of matrices ``(*batch, n, n)``.

        Raises:
            ValueError: if the matrices are not square.
        """
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(f"positive definite matrices are square, got shape {tuple(shape)}")
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


for registry in (biject_to, transform_to):
    registry.register(_PositiveDefinite)(lambda constraint: FromLowerTriangle())
