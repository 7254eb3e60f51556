r"""How far apart two samples are, where neither needs a density.

Draws of a fitted energy and data that were held out, say: no likelihood and no :math:`\log Z`.
Both functions work on points ``(*batch, n, d)`` and ``(*batch, m, d)``, of different numbers too,
and are differentiable; images are flattened first.
"""

import torch
from torch import Tensor

from pyro_ebm.ops.arguments import check_count, check_number, check_tensor, is_array, shown


def mmd(x: Tensor, y: Tensor, bandwidths: Tensor | list[float] | float | None = None) -> Tensor:
    r"""The squared maximum mean discrepancy, without bias.

    .. math:: \frac1{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac1{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
              - \frac2{nm} \sum_{i, j} k(x_i, y_j), \qquad
              k(a, b) = \frac1K \sum_k e^{-|a - b|^2 / 2 s_k^2}

    Its expectation is 0 where both samples have one law, and positive elsewhere; itself it may be
    negative. It holds :math:`K (n + m)^2` numbers at once.

    Args:
        x: points, shape ``(*batch, n, d)``.
        y: points, shape ``(*batch, m, d)``.
        bandwidths: :math:`s_k`, one or several; by default one, the median distance of all pairs of
            ``x`` and ``y`` together, for each element of the batch. Values are comparable at equal
            bandwidths alone.

    Returns:
        Shape ``(*batch)``.

    Raises:
        ValueError: for shapes that do not fit, fewer than two points, points that are not finite,
            a bandwidth that is not positive, or a median distance of 0.

    Reference:
        Gretton, Borgwardt, Rasch, Schoelkopf and Smola (2012), A kernel two-sample test.

    Example:
        >>> x, y = torch.randn(500, 2), torch.randn(500, 2)
        >>> print(f"{mmd(x, y, 1.0).abs():.2f} {mmd(x, y + 1, 1.0):.2f}")
        0.00 0.20
    """
    x, y = _checked(x, y, least=2)
    n, m = x.shape[-2], y.shape[-2]
    z = torch.cat([x, y], -2)
    # |a - b| itself: |a|^2 - 2 ab + |b|^2 would lose digits
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    if bandwidths is None:
        s = _median(distance.detach())[..., None, None, None]
        if not (s > 0).all():
            raise ValueError("at least half of all pairs of points coincide: give bandwidths")
    else:
        if not is_array(bandwidths):
            check_number("bandwidths", bandwidths)
        s = torch.as_tensor(bandwidths).to(z).reshape(-1, 1, 1)
        if not (s.numel() and (s > 0).all()):
            raise ValueError(f"bandwidths must be positive, got {shown(bandwidths)}")
    k = (-(distance[..., None, :, :] / s).square() / 2).exp().mean(-3)
    within_x, within_y = k[..., :n, :n].sum((-1, -2)) - n, k[..., n:, n:].sum((-1, -2)) - m
    between = k[..., :n, n:].mean((-1, -2))
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between


def sliced_wasserstein(x: Tensor, y: Tensor, num_projections: int = 100, p: float = 2.0) -> Tensor:
    r"""The sliced Wasserstein distance: that of projections on random directions.

    .. math:: \Big( \frac1L \sum_{l=1}^L W_p^p(\theta_l^T x, \theta_l^T y) \Big)^{1/p}, \qquad
              W_p^p(u, v) = \int_0^1 |F_u^{-1}(t) - F_v^{-1}(t)|^p \, dt

    The directions :math:`\theta_l` are uniform on the unit sphere, drawn by torch's own generator,
    and the same for the whole batch. On each line the coupling of quantiles is exact, and so is the
    distance in one dimension, where one direction is all there is. Samples of one law are apart,
    too, by their noise: compare with the distance of two halves of the data.

    Args:
        x: points, shape ``(*batch, n, d)``.
        y: points, shape ``(*batch, m, d)``.
        num_projections: :math:`L`.
        p: the order, at least 1.

    Returns:
        Shape ``(*batch)``. Where it is 0 it has no gradient.

    Raises:
        ValueError: for shapes that do not fit, no points or such that are not finite, or a ``p``
            below 1.

    Reference:
        Bonneel, Rabin, Peyre and Pfister (2015), Sliced and Radon Wasserstein barycenters of
        measures.

    Example:
        >>> x = torch.randn(500, 2)
        >>> moved = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), 1000) ** 2
        >>> print(f"{moved:.0f}")  # its mean is |v|^2 / d where y is x moved by v
        12
    """
    x, y = _checked(x, y, least=1)
    check_number("p", p)
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    directions = x.new_ones(1, 1)
    if (d := x.shape[-1]) > 1:
        directions = torch.randn(check_count("num_projections", num_projections), d).to(x)
        directions = directions / directions.norm(dim=-1, keepdim=True)
    u, v = ((points @ directions.mT).mT.sort(-1).values for points in (x, y))
    # In units of 1 / nm, the quantile function of x steps at multiples of m, that of y at those
    # of n; between two steps both are constant.
    n, m = x.shape[-2], y.shape[-2]
    ends = torch.cat([m * torch.arange(n + 1), n * torch.arange(m + 1)]).unique().to(x.device)
    begin, length = ends[:-1], ends.diff().to(x) / (n * m)
    gap = (u[..., begin // m] - v[..., begin // n]).abs()
    return (gap.pow(p) * length).sum(-1).mean(-1).pow(1 / p)


def _checked(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in one dtype and batch."""
    for name, points in (("x", x), ("y", y)):
        check_tensor(name, points)
        if points.dim() < 2 or points.shape[-2] < least or points.shape[-1] < 1:
            raise ValueError(
                f"{name} must hold at least {least} point(s), (*batch, n, d), got the shape"
                f" {tuple(points.shape)}"
            )
        if not points.isfinite().all():
            raise ValueError(f"{name} holds points that are NaN or infinite")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"points of x have {x.shape[-1]} numbers and those of y {y.shape[-1]}: the last"
            " dimension must be the same"
        )
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError as error:
        raise ValueError(
            f"the batches of x and y do not broadcast: {tuple(x.shape)}, {tuple(y.shape)}"
        ) from error
    dtype = torch.promote_types(x.dtype, y.dtype)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    x, y = (points.to(dtype).expand(batch + points.shape[-2:]) for points in (x, y))
    return x, y


def _median(distance: Tensor) -> Tensor:
    """The (lower) median of all pairs, from matrices ``(*batch, N, N)``."""
    # Sorted, a matrix is N zeros of the diagonal, then each of N (N - 1) / 2 distances twice.
    size = distance.shape[-1]
    pairs = size * (size - 1) // 2
    return distance.flatten(-2).kthvalue(size + 2 * ((pairs - 1) // 2) + 1).values
