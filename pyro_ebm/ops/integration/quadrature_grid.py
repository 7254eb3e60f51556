r"""Where an integrand has its mass: the grids of :mod:`pyro_ebm.ops.integration.quadrature`.

The center :math:`c` of a grid is at the mode or near it, and the columns of :math:`B` are the
principal axes of :math:`\log f` there, as long as its standard deviations. So ridges are no harder
than balls.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_ebm.internals.functorch import in_transform

LogDensity = Callable[[Tensor], Tensor]

REACH = 1e10
"""How far out the integrand is looked at, in units of its scale if that is greater than 1."""

CHUNK = 2**18
"""How many values of the integrand are computed at once."""

LOCATE_SIZES = {1: 129, 2: 33}
"""Nodes per dimension of each step that zooms into the mode."""

MAX_CLIMBS = 2**13
"""How many suspicious nodes, of all batch elements together, are looked at more closely."""

STEEP = 8.0
"""A Gaussian peak that falls by less from node to node has them within 4 standard deviations."""


class Grid(NamedTuple):
    """The nodes of each batch element: ``size`` of them in each dimension."""

    center: Tensor
    """:math:`c`, shape ``(*batch, dim)``."""
    basis: Tensor
    """:math:`B`, shape ``(*batch, dim, dim)``."""
    low: Tensor
    """The least :math:`t`, shape ``(*batch, dim)``."""
    high: Tensor
    """The greatest :math:`t`, shape ``(*batch, dim)``."""
    size: int
    holes: bool = False
    """Whether ``log_f`` is NaN at some nodes, which do not count."""

    @property
    def dim(self) -> int:
        """The number of dimensions."""
        return self.low.shape[-1]

    @property
    def spacing(self) -> Tensor:
        r""":math:`\Delta t`, shape ``(*batch, dim)``."""
        return (self.high - self.low) / (self.size - 1)

    def positions(self) -> Tensor:
        """:math:`t` at the nodes of each dimension, shape ``(size, *batch, dim)``."""
        index = torch.arange(self.size, dtype=self.low.dtype, device=self.low.device)
        return self.low + index.reshape((-1,) + (1,) * self.low.dim()) * self.spacing

    def flat(self, values: Tensor) -> Tensor:
        """Values of all nodes, ``(size,) * dim + batch``, as ``(nodes, *batch)``."""
        return values.flatten(0, self.dim - 1)

    def log_weights(self) -> Tensor:
        r""":math:`\log |\det B| + \sum_i \log \cosh t_i + \log \Delta t_i` of each node."""
        t = self.positions().abs()
        one = t + torch.log1p(torch.exp(-2 * t)) - math.log(2.0) + self.spacing.log()
        return sum((along(one, d) for d in range(self.dim)), self.basis.det().abs().log())


def node_values(log_f: LogDensity, grid: Grid, like: Tensor) -> Tensor:
    r"""The values :math:`\log f(z)` at the nodes.

    Args:
        log_f: ``(nodes, *batch, dim) -> (nodes, *batch)``.
        grid: the nodes.
        like: a tensor of the dtype that ``log_f`` gets.

    Returns:
        Shape ``(size,) * dim + batch``, double; -inf in the holes of a grid that is known to have
        some.

    Raises:
        ValueError: if ``log_f`` returns another shape.
    """
    dim, batch, t = grid.dim, grid.low.shape[:-1], grid.positions()

    def rows(start: int, stop: int) -> Tensor:
        """Those whose first coordinate is one of the nodes from ``start`` to ``stop``."""
        z = grid.center
        for d, part in enumerate([slice(start, stop), slice(None)][:dim]):
            z = z + along(t[part].sinh(), d)[..., None] * grid.basis[..., d]
        z = z.reshape((-1,) + batch + (dim,)).to(like.dtype)
        value = log_f(z)
        got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        if got != tuple(z.shape[:-1]):
            raise ValueError(
                f"log_f must map points of shape {tuple(z.shape)} to a tensor of shape"
                f" {tuple(z.shape[:-1])}, got {got}"
            )
        if grid.holes:  # no gradient may come out of there
            hole = value.detach().isnan()
            value = log_f(torch.where(hole[..., None], grid.center.to(like.dtype), z))
            value = torch.where(hole, -torch.inf, value)
        shape = (stop - start,) + (grid.size,) * (dim - 1)
        return value.to(torch.float64).reshape(shape + batch)

    step = max(CHUNK // (grid.size ** (dim - 1) * max(math.prod(batch), 1)), 1)
    chunks = [(i, min(i + step, grid.size)) for i in range(0, grid.size, step)]
    if len(chunks) == 1:
        return rows(*chunks[0])
    if torch.is_grad_enabled() and not in_transform():
        # what a chunk computed is computed again when gradients flow back
        return torch.cat([checkpoint(rows, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([rows(*chunk) for chunk in chunks])


def along(x: Tensor, d: int) -> Tensor:
    """Coordinate d of ``(size, *batch, dim)``, as it lies in ``(size,) * dim + batch``."""
    dim = x.shape[-1]
    return x[..., d].reshape((1,) * d + (-1,) + (1,) * (dim - 1 - d) + x.shape[1:-1])


def finite(values: Tensor) -> Tensor:
    """Numbers that can be subtracted, to compare; a NaN, for others to look for, is the least."""
    return torch.where(values.isnan(), -1e300, values.clamp(-1e300, 1e300))


def largest_grid(log_f: LogDensity, start: Tensor, size: int, like: Tensor) -> Grid:
    """The grid that is centered at the mode and reaches as far out as is looked.

    Args:
        log_f: as in :func:`node_values`.
        start: zeros, shape ``(*batch, dim)``, double.
        size: nodes per dimension.
        like: as in :func:`node_values`.
    """
    center, scale = _locate(log_f, start, like)
    one_dimensional = start.shape[-1] == 1
    basis = scale[..., None] if one_dimensional else _principal_axes(log_f, center, scale, like)
    high = (REACH * basis.norm(dim=-2).reciprocal().clamp(min=1)).asinh()
    return Grid(center, basis, -high, high, size)


def _locate(log_f: LogDensity, start: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the largest value, and how far from it the largest values fall by 1 nat.

    Zooms in :math:`t = asinh z` until, in each dimension, that is some nodes away. Both are of
    shape ``(*batch, dim)``.
    """
    dim, far = start.shape[-1], math.asinh(REACH)
    size = LOCATE_SIZES[dim]
    identity = torch.diag_embed(torch.ones_like(start))
    middle, half, width = start, torch.full_like(start, far), start
    for _ in range(60):
        grid = Grid(start, identity, middle - half, middle + half, size)
        values = finite(node_values(log_f, grid, like))
        best = grid.flat(values).argmax(0)
        index = torch.stack([best // size ** (dim - 1 - d) % size for d in range(dim)], -1)
        profiles = torch.stack([values if dim == 1 else values.amax(1 - d) for d in range(dim)], -1)
        nodes = torch.arange(size, device=index.device).reshape((-1,) + (1,) * index.dim())
        fallen = profiles < profiles.amax(0) - 1.0
        away = torch.where(fallen, (nodes - index).abs(), size).amin(0)
        width = torch.minimum(away * grid.spacing, half)
        middle = (grid.low + index * grid.spacing).clamp(-far, far)
        smallest = 1e-14 * (1 + middle.abs())
        zoom = (away <= 3) & (half > smallest)
        if not zoom.any():
            break
        # at the end of the box the maximum lies outside: move on before zooming in
        outside = ((index == 0) | (index == size - 1)) & (middle.abs() < far)
        half = torch.where(zoom & ~outside, (4 * grid.spacing).maximum(smallest), half)
    return middle.sinh(), middle.cosh() * width.sinh()


def _principal_axes(log_f: LogDensity, center: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    r"""The principal axes of two dimensions, shape ``(*batch, 2, 2)``.

    In units :math:`u` of the scale :math:`\log f \approx u^\top H u / 2` by differences: the axes
    are the eigenvectors of :math:`-H`, of length :math:`1 / \sqrt{\lambda}`.
    """
    stencil = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1)]
    u = torch.tensor(stencil, dtype=center.dtype, device=center.device)
    z = center + scale * u.reshape((-1,) + (1,) * (center.dim() - 1) + (2,))
    o, e, w, n, s, ne, sw = finite(log_f(z.to(like.dtype)).to(z.dtype))
    cross = (ne + sw - e - w - n - s + 2 * o) / 2
    hessian = torch.stack([e + w - 2 * o, cross, cross, n + s - 2 * o], -1).unflatten(-1, (2, 2))
    curvature, axes = torch.linalg.eigh(-hessian)
    # where it does not fall by a nat in 1,000 units, the unit will do
    length = torch.where(curvature > 2e-6, curvature, 1.0).rsqrt()
    return torch.diag_embed(scale) @ (axes * length[..., None, :])


def beside_holes(holes: Tensor, dim: int) -> Tensor:
    """The nodes next to a hole, a node at which ``log_f`` is NaN.

    Far out numbers overflow. What lies in a hole is unknown, so ``log_f`` must have decayed beside.

    Args:
        holes: shape ``(size,) * dim + batch``.
        dim: number of dimensions.
    """
    beside = torch.zeros_like(holes)
    for d in range(dim):
        for ahead, behind in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
            index = (slice(None),) * d
            beside[(*index, ahead)] |= holes[(*index, behind)]
    return beside & ~holes


def hull(counts: Tensor, grid: Grid, domain: Grid) -> Grid:
    """The least box around all nodes that count, and one more; a larger one if they reach its end.

    Args:
        counts: which nodes count, shape ``(size,) * dim + batch``.
        grid: these nodes.
        domain: how far it may reach.
    """
    dim, last = grid.dim, grid.size - 1
    low, high = [], []
    for d in range(dim):
        nodes = (counts if dim == 1 else counts.any(1 - d)).to(torch.uint8)
        first, final = nodes.argmax(0), last - nodes.flip(0).argmax(0)
        below = torch.where(first == 0, last // 2, 1)
        above = torch.where(final == last, last // 2, 1)
        low.append(grid.low[..., d] + (first - below) * grid.spacing[..., d])
        high.append(grid.low[..., d] + (final + above) * grid.spacing[..., d])
    return grid._replace(
        low=torch.maximum(torch.stack(low, -1), domain.low),
        high=torch.minimum(torch.stack(high, -1), domain.high),
    )


def hidden_peaks(
    log_f: LogDensity, values: Tensor, grid: Grid, nats: float, like: Tensor
) -> Tensor:
    r"""How high the integrand rises between the nodes, beside those that are local maxima.

    Let :math:`v_i` be a local maximum of the nodes, and :math:`v_j` beside it. A concave peak
    between them lies below the lines through its sides: it is at most
    :math:`v_i + \max_j (v_i - v_j)`. Where that comes near the largest value, a climb decides.

    Args:
        log_f: as in :func:`node_values`.
        values: at the nodes, shape ``(size,) * dim + batch``, finite.
        grid: these nodes.
        nats: how near the largest value.
        like: as in :func:`node_values`.

    Returns:
        Of the shape of ``values``, -inf where the nodes hide nothing.
    """
    is_peak, fall = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values)
    for shifts in itertools.product((-1, 0, 1), repeat=grid.dim):
        neighbor = values.roll(shifts, tuple(range(grid.dim)))
        for d, shift in enumerate(shifts):
            if shift:  # there is none beyond the ends
                end = 0 if shift > 0 else -1
                neighbor.select(d, end).copy_(values.select(d, end))
        is_peak &= values >= neighbor
        if sum(map(abs, shifts)) == 1:
            fall = torch.maximum(fall, values - neighbor)
    bound = torch.where(is_peak & (fall > STEEP), values + fall, -torch.inf)
    flat = grid.flat(bound)
    suspects = flat > grid.flat(values).amax(0) - nats
    most = int(suspects.sum(0).max())
    if 0 < most * suspects[0].numel() <= MAX_CLIMBS:
        nodes = flat.topk(most, 0).indices
        flat = flat.scatter(0, nodes, _climb(log_f, grid, nodes, grid.flat(values), like))
    return torch.where(suspects, flat, -torch.inf).reshape(values.shape)


def _climb(log_f: LogDensity, grid: Grid, nodes: Tensor, flat: Tensor, like: Tensor) -> Tensor:
    """The top of the hill between each of the nodes, ``(n, *batch)``, and those around it."""
    dim = grid.dim
    index = torch.stack([nodes // grid.size ** (dim - 1 - d) % grid.size for d in range(dim)], -1)
    t, half = grid.low + index * grid.spacing, grid.spacing
    line = torch.linspace(-1, 1, 7, dtype=t.dtype, device=t.device)
    offsets = torch.cartesian_prod(*[line] * dim).reshape((-1,) + (1,) * (t.dim() - 1) + (dim,))
    start = top = finite(log_f(_points(grid, t).to(like.dtype)).to(t.dtype))
    for _ in range(40):
        tries = t + half * offsets
        value = log_f(_points(grid, tries.flatten(0, 1)).to(like.dtype)).to(t.dtype)
        value = finite(value).unflatten(0, tries.shape[:2])
        height, best = value.max(0)
        t = tries.gather(0, best[None, ..., None].expand((1,) + t.shape))[0]
        top, half = torch.maximum(top, height), half / 2
        if (height - value.amin(0) < 1.0).all():
            break
    return flat.gather(0, nodes) + top - start


def _points(grid: Grid, t: Tensor) -> Tensor:
    """The points z at positions t, both of shape ``(n, *batch, dim)``."""
    return grid.center + (grid.basis @ t.sinh()[..., None])[..., 0]


def at_ends(values: Tensor, grid: Grid) -> Tensor:
    r"""The log of the integrand per :math:`dt` at the ends, shape ``(*batch, dim, 2)``.

    Where it falls as :math:`e^{-k |t|}` it is :math:`k` times what lies beyond.

    Args:
        values: at the nodes, shape ``(size,) * dim + batch``.
        grid: these nodes.
    """
    faces = []
    for d in range(grid.dim):
        ends = [values.select(d, end).reshape((-1,) + grid.low.shape[:-1]) for end in (0, -1)]
        log_dt = grid.spacing[..., d].log()
        faces.append(torch.stack([face.logsumexp(0) - log_dt for face in ends], -1))
    return torch.stack(faces, -2)
