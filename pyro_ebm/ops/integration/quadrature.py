r"""Integrals of unnormalized densities over one or two dimensions.

The integral :math:`I = \int e^{\log f(z)}\, dz` over :math:`\mathbb R^d`, :math:`d \le 2`, is a sum
over nodes that are equally spaced in :math:`t`, with

.. math:: z = c + B \sinh t, \qquad
          I \approx \sum_{\text{nodes}} \exp\Big( \log f(z) + \log |\det B|
          + \sum_i \log (\cosh t_i\, \Delta t_i) \Big) .

Near the mode :math:`c` the nodes are :math:`\Delta t` standard deviations apart, far out they thin
out in proportion to their distance, so that a few hundred of them reach :math:`10^{10}`: heavy
tails, tiny and huge scales, far locations and narrow ridges cost alike. For an analytic integrand
that has decayed at both ends this rule, the trapezoid rule, converges faster than any power of the
spacing.

Every batch element has a grid of its own:

1. *Locate* the mode by zooming in, and the principal axes there, :math:`c` and :math:`B`.
2. *Bound.* Where might the integrand come within 45 nats of its maximum? A peak that is narrow
   beside the spacing shows as a low local maximum with steep sides. If these point high enough,
   the grid is left to climb to its top, and the top counts, not the node.
3. *Refine.* Halve the spacing, and bound again, until two successive sums agree, no such peak is
   left, and the integrand has decayed at the ends.

The grid is chosen without gradients; the sum over it is differentiable in whatever :math:`\log f`
is made of, and the gradient of :math:`\log I` is the expectation of that of :math:`\log f`.

A far spike that no node sees, much narrower than the main peak or on its flank, is missed, as by
every rule that looks at values.

Reference:
    Trefethen and Weideman (2014), The exponentially convergent trapezoidal rule. Takahasi and Mori
    (1974), Double exponential formulas for numerical integration.
"""

import math

import torch
from torch import Tensor

from pyro_ebm.ops.arguments import check_callable, check_number
from pyro_ebm.ops.integration.quadrature_grid import (
    Grid,
    LogDensity,
    at_ends,
    beside_holes,
    finite,
    hidden_peaks,
    hull,
    largest_grid,
    node_values,
)

MAX_EVALUATIONS = 2**24
"""How many values of the integrands one sum may take by default."""

_NATS = 45.0  # e^-45 is less than a double's precision
_SIZES = {1: (1025, 2**13 + 1, 65), 2: (129, 257, 33)}
"""Nodes per dimension: to bound, at least and at most, and to refine at least."""
_SCOUTS = 2**15  # values to bound all batch elements with, between these

ZERO, INFINITE, UNDEFINED, IMPROPER, UNCONVERGED = range(1, 6)
_MESSAGES = {
    ZERO: "is -inf wherever it was looked at",
    INFINITE: "is +inf at a node",
    UNDEFINED: "is NaN, or beyond the numbers, where it has not decayed as far as rtol asks",
    IMPROPER: "has not decayed far out: the density is improper, or its tails are too heavy",
    UNCONVERGED: "is too narrow, too rough, or has too many far modes for the nodes allowed: two"
    " successive sums do not agree. Raise rtol or max_evaluations, or rescale",
}


class NoIntegralError(ValueError):
    """There is no accurate value of an integral.

    Args:
        why: what is wrong, as :func:`failure_message` says it.
        improper: whether the integrand has not decayed far out.
    """

    def __init__(self, why: str, improper: bool):
        super().__init__(f"log_f has no integral: it {why}")
        self.why, self.improper = why, improper


def log_integral(
    log_f: LogDensity,
    dim: int,
    batch_shape: torch.Size | tuple[int, ...] = (),
    rtol: float | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
    like: Tensor | None = None,
) -> Tensor:
    r"""The log of an integral, :math:`\log \int_{\mathbb R^d} e^{\log f(z)}\, dz`.

    Differentiable in whatever ``log_f`` is made of, as often as that is. It looks at values, so
    that ``torch.func.vmap`` cannot map it: give a batch instead.

    An integral over another support is one over the reals after a bijection, with its Jacobian.

    Args:
        log_f: the log of the integrand, ``(nodes, *batch, dim) -> (nodes, *batch)``.
        dim: 1 or 2.
        batch_shape: shape of a batch of integrands.
        rtol: relative accuracy of the integral; by default the square root of the precision of
            the nodes' dtype.
        max_evaluations: how many values of ``log_f``, of all batch elements together, one sum may
            take.
        like: a tensor that tells dtype and device of the nodes; double precision by default.

    Returns:
        Shape ``(*batch)``.

    Raises:
        ValueError: if ``dim`` is not 1 or 2, ``log_f`` returns another shape, or for some batch
            element there is no accurate value: the integrand is NaN, infinite or zero, has not
            decayed far out (an improper density), or the sums do not converge.

    Example:
        >>> log_integral(lambda z: -z.square().sum(-1) / 2, dim=2)  # log 2 pi
        tensor(1.8379, dtype=torch.float64)
        >>> log_integral(lambda z: -z[..., 0].abs().log1p(), dim=1)  # 1 / (1 + |z|)
        Traceback (most recent call last):
        pyro_ebm.ops.integration.quadrature.NoIntegralError: log_f has no integral: it has not ...
    """
    like = torch.empty((), dtype=torch.float64) if like is None else like
    check_callable("log_f", log_f)
    if rtol is not None:
        check_number("rtol", rtol)
        if not 0 < rtol < 1:
            raise ValueError(f"rtol must lie in (0, 1), got {rtol}")
    grid, failure = find_grid(log_f, dim, batch_shape, rtol, max_evaluations, like)
    if failure.any():
        improper = int(failure[failure > 0][0]) == IMPROPER
        raise NoIntegralError(failure_message(failure, grid), improper)
    return log_sum(log_f, grid, like)


def failure_message(failure: Tensor, grid: Grid) -> str:
    """What :func:`find_grid` found wrong, of its first batch element that failed."""
    where = tuple(failure.nonzero()[0].tolist())
    element = f" (batch element {where})" if where else ""
    near = [float(f"{c:.4g}") for c in grid.center[where].tolist()]
    return f"{_MESSAGES[int(failure[where])]}{element}; its largest value is near z = {near}"


def log_sum(log_f: LogDensity, grid: Grid, like: Tensor) -> Tensor:
    """The log of the sum over the nodes of a grid, shape ``(*batch)``, differentiable.

    Args:
        log_f: as in :func:`log_integral`.
        grid: nodes, from :func:`find_grid`.
        like: a tensor that tells the dtype of the nodes.
    """
    values = node_values(log_f, grid, like) + grid.log_weights()
    return grid.flat(values).logsumexp(0).to(like.dtype)


@torch.no_grad()
def find_grid(
    log_f: LogDensity,
    dim: int,
    batch_shape: torch.Size | tuple[int, ...],
    rtol: float | None,
    max_evaluations: int,
    like: Tensor,
) -> tuple[Grid, Tensor]:
    """The grid on which the integral of :func:`log_integral` has its accuracy.

    Args:
        log_f: as there, and so are the others.
        dim: 1 or 2.
        batch_shape: shape of a batch of integrands.
        rtol: relative accuracy.
        max_evaluations: values of ``log_f`` for one sum.
        like: a tensor that tells dtype and device of the nodes.

    Returns:
        The grid, and what is wrong with each batch element, a code, 0 for nothing, ``(*batch)``.

    Raises:
        ValueError: if ``dim`` is not 1 or 2, or ``log_f`` returns another shape.
    """
    if not isinstance(dim, int) or dim not in _SIZES:
        raise ValueError(
            f"dim must be 1 or 2, got {dim}: in more dimensions estimate the integral, by annealed"
            " importance sampling for one"
        )
    batch_shape = torch.Size(batch_shape)
    rows = max(batch_shape.numel(), 1)
    least, most, fewest = _SIZES[dim]
    size = min(max(int((_SCOUTS / rows) ** (1 / dim)), least), most)
    if size**dim * rows > max_evaluations:
        raise ValueError(
            f"max_evaluations={max_evaluations} is too small for a batch of {rows} integrals in"
            f" {dim} dimension(s), which take at least {size**dim * rows}: raise it, or split the"
            " batch"
        )
    precision = torch.finfo(like.dtype).eps
    tolerance = precision**0.5 if rtol is None else rtol
    nats = -math.log(tolerance)
    start = torch.zeros(batch_shape + (dim,), dtype=torch.float64, device=like.device)
    grid = largest_grid(log_f, start, size, like)
    domain, last = grid, None
    failure = torch.zeros(batch_shape, dtype=torch.long, device=like.device)
    done = failure > 0
    while True:
        values = node_values(log_f, grid, like)
        holes = values.isnan()
        heights = finite(values)
        lost = beside_holes(holes, dim) & (heights >= grid.flat(heights).amax(0) - nats)
        undefined = grid.flat(holes).all(0)
        if last is not None:
            undefined |= grid.flat(lost).any(0)
        values = torch.where(holes, -torch.inf, values) + grid.log_weights()
        heights = finite(values)
        highest = grid.flat(heights).amax(0)
        total = grid.flat(values).logsumexp(0)
        hidden = hidden_peaks(log_f, heights, grid, _NATS, like)
        resolved = ~grid.flat(hidden > highest - nats).any(0)
        high_ends = ~(at_ends(values, grid) < (total - nats)[..., None, None])
        of_domain = torch.stack([grid.low <= domain.low, grid.high >= domain.high], -1)
        cut_off = (high_ends & of_domain).flatten(-2).any(-1)
        for code, found in {
            UNDEFINED: undefined,
            ZERO: total == -torch.inf,
            INFINITE: total == torch.inf,
            IMPROPER: resolved & cut_off,
        }.items():
            failure = torch.where(found & ~done & (failure == 0), code, failure)
        done = done | (failure > 0)
        if last is not None:
            # as accurate as asked for, or as the numbers themselves
            agree = (total - last).abs() <= tolerance + 4 * precision * total.abs()
            done = done | (agree & resolved & ~high_ends.flatten(-2).any(-1))
        if done.all():
            return grid._replace(holes=bool(holes.any())), failure
        counts = torch.maximum(heights, hidden) > highest - _NATS
        box = hull(counts, grid, domain)
        # half the spacing where it is not done, no greater one where it is
        widths = ((box.high - box.low) / (grid.high - grid.low)).amax(-1)
        growth = float(torch.where(done, 1.0, 2 * widths).max())
        size = max(math.ceil((grid.size - 1) * growth) + 1, fewest)
        if size**dim * rows > max_evaluations:
            code = torch.where(cut_off, IMPROPER, UNCONVERGED)
            return grid, torch.where(done, failure, code)
        low = torch.where(done[..., None], grid.low, box.low)
        high = torch.where(done[..., None], grid.high, box.high)
        last, grid = total, grid._replace(low=low, high=high, size=size)
