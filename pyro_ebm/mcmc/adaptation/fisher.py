r"""The inverse mass matrix that positions and gradients tell of.

Of all linear maps :math:`z = L w`, the one in whose coordinates the target is nearest to
:math:`N(0, I)` in *Fisher divergence*, the mean square of the difference of the scores,

.. math:: \mathrm{E}\, \big| L^\top \nabla U(z) - L^{-1} (z - \mu) \big|^2,

has :math:`\Sigma = L L^\top` with :math:`\Sigma B\, \Sigma = A`, where
:math:`A = \mathrm{cov}(z)` and :math:`B = \mathrm{cov}(\nabla U(z))`. So :math:`\Sigma` is the
geometric mean of :math:`A` and :math:`B^{-1}`. For a Gaussian of precision :math:`P` the gradient
is :math:`P (z - \mu)`, hence :math:`B = P A P` and :math:`\Sigma = P^{-1}` *whatever* :math:`A`
is: chains that are far from converged, after a few steps, already tell the exact one. The
covariance of positions by itself needs draws from the target.

Reference:
    Seyboldt, Carlson and Carpenter (2026), Preconditioning Hamiltonian Monte Carlo by minimizing
    Fisher divergence. Bhatia (2007), Positive definite matrices (the geometric mean).
"""

import torch
from torch import Tensor

from pyro_ebm.ops.steps.precondition import LowRank

SMALL = 1e-5  # of a variance, relative to the others'
MOST = 1e4  # a scale changes by at most this factor at a time
SUBSPACE_ITERATIONS = 6
UNLIKE_ONE = 2.0  # variances within this factor of 1 are not worth a direction


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    r"""The geometric mean of :math:`A` and :math:`B^{-1}`.

    It is the positive solution of :math:`\Sigma B\, \Sigma = A`,

    .. math:: \Sigma = A^{1/2} \big( A^{1/2} B A^{1/2} \big)^{-1/2} A^{1/2}

    Args:
        a: positive definite matrices, shape ``(..., n, n)``.
        b: positive definite matrices, shape ``(..., n, n)``.

    Example:
        >>> geometric_mean(torch.tensor([[4.0]]), torch.tensor([[9.0]]))  # the root of 4 / 9
        tensor([[0.6667]])
    """
    root = _power(a, 0.5)
    return _symmetric(root @ _power(_symmetric(root @ b @ root), -0.5) @ root)


def diagonal_scales(a: Tensor, b: Tensor) -> Tensor:
    r"""The diagonal :math:`L`: :math:`\sigma_i^2 = \sqrt{A_{ii} / B_{ii}}`.

    Args:
        a: variances of positions, shape ``(..., dim)``.
        b: variances of gradients, shape ``(..., dim)``.

    Returns:
        :math:`\sigma`, shape ``(..., dim)``; 1 where nothing moved or was felt.

    Example:
        >>> diagonal_scales(torch.tensor([4.0, 0.0]), torch.tensor([0.25, 0.0]))
        tensor([2., 1.])
    """
    ratio = (a / b).nan_to_num(1.0, MOST**4, MOST**-4)
    return ratio.clamp(MOST**-4, MOST**4) ** 0.25


def dense_covariance(a: Tensor, b: Tensor, count: Tensor) -> Tensor:
    r"""The dense :math:`\Sigma`, in coordinates in which the one so far is the identity.

    While there are fewer than two rows for a dimension, both matrices are shrunk towards their
    mean variance: directions that no row tells of keep the common scale.

    Args:
        a: covariances of positions, shape ``(targets, dim, dim)``.
        b: covariances of gradients, shape ``(targets, dim, dim)``.
        count: of how many rows, shape ``(targets,)``.
    """
    dim = a.shape[-1]
    weight = torch.where(count < 2 * dim, SMALL, SMALL**2).to(a)[:, None, None]
    return geometric_mean(_shrunk(a, weight), _shrunk(b, weight))


def low_rank_factor(z: Tensor, grad: Tensor, rank: int) -> LowRank:
    r"""The diagonal and the few directions of which the rows tell.

    The diagonal has the scales of :func:`diagonal_scales`. In its coordinates :math:`\Sigma` is
    computed within the span of the leading principal directions of positions and of gradients; the
    directions whose variance is not within a factor of 2 of 1 are kept, those farthest from it
    first.

    Args:
        z: centered positions, shape ``(rows, dim)``; rows of weight 0 are 0.
        grad: centered gradients, shape ``(rows, dim)``.
        rank: the number of directions.

    Returns:
        The factor of one target.
    """
    dim = z.shape[1]
    scale = diagonal_scales(z.square().sum(0), grad.square().sum(0))
    z, grad = z / scale, grad * scale
    spanning = torch.cat([_leading(z, rank), _leading(grad, rank)], -1)
    basis = torch.linalg.qr(spanning)[0]
    a, b = ((x @ basis).mT @ (x @ basis) for x in (z, grad))
    variance, vectors = torch.linalg.eigh(geometric_mean(_shrunk(a, SMALL), _shrunk(b, SMALL)))
    unlike = variance.log().abs()
    best = unlike.topk(min(rank, len(unlike))).indices
    stretch = torch.where(unlike[best] > torch.tensor(UNLIKE_ONE).log(), variance[best], 1.0).sqrt()
    directions = basis @ vectors[:, best]
    missing = rank - len(best)
    if missing:
        directions = torch.cat([directions, directions.new_zeros(dim, missing)], -1)
        stretch = torch.cat([stretch, stretch.new_ones(missing)])
    return LowRank(scale[None], directions[None], stretch[None])


def _leading(rows: Tensor, rank: int) -> Tensor:
    """About the leading principal directions of rows, as orthonormal columns ``(dim, rank)``."""
    basis = rows[:rank].mT
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis))[0]
    return basis


def _shrunk(matrix: Tensor, weight: Tensor | float) -> Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + weight * (mean * identity - matrix)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of positive semidefinite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    least = values[..., -1:] * torch.finfo(values.dtype).eps
    return (vectors * values.clamp_min(least)[..., None, :] ** exponent) @ vectors.mT
