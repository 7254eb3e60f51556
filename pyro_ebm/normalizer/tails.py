r"""Does a density have a finite Z, as far as its tails show?

An estimate of :math:`\log Z` is a finite number also where :math:`Z` is not: draws come from where
the density is large, and what lies far out, little at each place and without end, is missed. So the
density itself is looked at, far out. Along a line :math:`z + r e` it falls like a power of r,

.. math:: \tilde p(z + r e) \sim r^{a}, \qquad \int^\infty r^{a}\, dr = \infty
          \iff a \ge -1 .

If that is so on lines through a set of points of positive measure, then :math:`Z = \infty`, by
Fubini. The same holds in :math:`d` dimensions at once, along the rays of a cone, if
:math:`a \ge -d`. Of a latent that is positive, :math:`x = e^z`, the density of :math:`z` must fall
exponentially, and :math:`Z = \infty` if it does not fall.

Lines go along the coordinates; along :math:`(1, \dots, 1)` of each site, since energies of
differences alone leave their sum free; and along the diagonal :math:`(\pm 1, \dots, \pm 1)` in
which the points spread most. Powers are measured from a million to a billion times the spread of
some points, along diagonals up to a hundred thousand times. A heavy tail that is proper passes,
such as Student's with more than .02 degrees of freedom. What overflows so far out is not judged,
nor are other directions, and planes of some of many dimensions: no warning is no proof.
"""

import math

import torch
from torch import Tensor
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    Transform,
)

from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.normalizer.estimate_result import warn

DECADES = (6.0, 7.0, 8.0, 9.0)
"""How far out, in powers of ten of the spread."""

DIAGONAL_DECADES = (2.0, 3.0, 4.0, 5.0)
"""The same along diagonals, where differences must be left of what is so far out."""

SHIFTS = (14.0, 16.0, 18.0, 20.0)
"""How far out of the log of a positive variable: from 1e6 to 5e8 times as large."""

SLACK = 0.02
"""How much faster than the limit a tail must fall at least to pass."""

MAX_LINES = 16
NUM_RAYS = 8
NUM_POINTS = 2
"""Through how many points of each target lines go."""


@torch.no_grad()
def warn_if_improper(target: Potential, z: Tensor, what: str) -> None:
    r"""Warns of a density whose tails have no finite integral.

    Args:
        target: :math:`-\log \tilde p`.
        z: points that are as far spread as the density or a start of it, shape ``(chains, dim)``.
        what: which estimate of its log Z was made.

    Example:
        >>> from pyro_ebm.mcmc.potentials.energy import EnergyPotential
        >>> p = UnnormalizedEnergy(lambda x: (1 + x**2).log() / 2)  # falls like 1 / |x|
        >>> warn_if_improper(EnergyPotential(p), torch.randn(100, 1), "annealing")
        Traceback (most recent call last):
        pyro_ebm.normalizer.estimate_result.UnreliableEstimateWarning: annealing: the density has...
    """
    found = _slow_line(target, z) or _slow_diagonal(target, z) or _slow_ray(target, z)
    if found is not None:
        warn(
            f"{what}: the density has no finite Z, as far as its tail shows: {found}. The estimate"
            " is then a number that grows with the draws, the temperatures and the width of the"
            " start, and its error means nothing. Check the energy; base= makes any bounded one"
            " proper"
        )


def _slow_line(target: Potential, z: Tensor) -> str | None:
    """A coordinate along which the density does not fall fast enough, in words."""
    columns = _columns(target)
    lines = max(min(MAX_LINES, 1024 // target.targets), 1)
    some = range(0, len(columns), max(math.ceil(len(columns) / lines), 1))
    spread, points = _spread(z, target.targets), z[: NUM_POINTS * target.targets]
    for column, site, bounded in (columns[i] for i in some):
        if bounded:
            measure, least = torch.tensor(SHIFTS).to(z), -SLACK / 4
            far = measure[:, None]
        else:
            measure, least = math.log(10) * torch.tensor(DECADES).to(z), -1 - SLACK
            far = measure.exp()[:, None] * spread[column].repeat(NUM_POINTS)[: len(points)]
        for sign in (1.0, -1.0):
            there = points.repeat(len(measure), 1, 1)
            there[..., column] += sign * far
            slopes = _slopes(target, there, measure)
            slow = (slopes >= least).all(0).reshape(-1, target.targets).all(0)
            if slow.any():
                power = float(slopes[-1].reshape(-1, target.targets)[:, slow].amax())
                if bounded:
                    end = "upper" if sign > 0 else "lower"
                    return f"towards the {end} end of site {site!r} it falls no faster than 1 / x"
                end = "large" if sign > 0 else "far negative"
                return f"at {end} values of site {site!r} it goes like |x|^{power:.3g}"
    return None


def _slow_diagonal(target: Potential, z: Tensor) -> str | None:
    """A diagonal along which the density does not fall fast enough, in words."""
    columns = [(c, site) for c, site, bounded in _columns(target) if not bounded]
    rows = z.reshape(-1, target.targets, target.dim)
    if len(columns) < 2 or len(rows) < 2 or not z.isfinite().all():
        return None
    here = torch.tensor([c for c, _ in columns], device=z.device)
    ways = []
    for site in dict.fromkeys(of for _, of in columns):
        way = z.new_zeros(target.dim)
        way[[c for c, of in columns if of == site]] = 1.0
        ways.append((f"as all elements of site {site!r} move together", way))
    x = rows[..., here] - rows[..., here].mean(0)
    #  the sign of each element along the direction of most variance, of the first target
    way = z.new_zeros(target.dim)
    way[here] = torch.linalg.svd(x[:, 0] / x.abs().amax().clamp(min=1e-30)).Vh[0].sign()
    ways.append(("along the diagonal in which the points spread most", way))
    decades = torch.tensor(DIAGONAL_DECADES).to(z)
    points, spread = z[: NUM_POINTS * target.targets], _spread(z, target.targets)[here].amax(0)
    far = 10 ** decades[:, None, None] * spread.repeat(NUM_POINTS)[: len(points), None]
    for what, way in ways:
        for sign in (1.0, -1.0):
            slopes = _slopes(target, points + sign * far * way, math.log(10) * decades)
            slow = (slopes >= -1 - SLACK).all(0).reshape(-1, target.targets).all(0)
            if slow.any():
                power = float(slopes[-1].reshape(-1, target.targets)[:, slow].amax())
                return f"{what}, it goes like |x|^{power:.2g}"
    return None


def _slow_ray(target: Potential, z: Tensor) -> str | None:
    """Whether it does not fall fast enough away from its middle, in words."""
    columns = torch.tensor([c for c, _, bounded in _columns(target) if not bounded])
    dim, targets = len(columns), target.targets
    if dim < 2 or len(z) < 2 * targets:
        return None
    generator = torch.Generator().manual_seed(0)
    rays = torch.randn(min(NUM_RAYS, max(1024 // targets, 1)), dim, generator=generator)
    decades = torch.tensor(DECADES).to(z)
    far = 10 ** decades[:, None, None, None] * rays.to(z)[:, None]
    there = z[:targets].repeat(len(decades), len(rays), 1, 1)  # (decades, rays, targets, dim)
    there[..., columns] += far * _spread(z, targets)[columns].T
    slopes = _slopes(target, there.flatten(1, 2), math.log(10) * decades)
    slow = (slopes >= -dim - SLACK).all(0).reshape(-1, targets).all(0)
    if not slow.any():
        return None
    power = float(slopes[-1].reshape(-1, targets)[:, slow].amax())
    return f"away from its middle it goes like |x|^{power:.3g} in {dim} dimensions"


def _slopes(target: Potential, there: Tensor, measure: Tensor) -> Tensor:
    """How the log density changes from distance to distance, ``(distances - 1, chains)``.

    Args:
        target: the potential.
        there: positions, shape ``(distances, chains, dim)``.
        measure: of the distances.
    """
    value = target(there.flatten(0, 1)).reshape(there.shape[:2]).double()
    return -value.diff(dim=0) / measure.double().diff()[:, None]


def _columns(target: Potential) -> list[tuple[int, str, bool]]:
    """The elementwise columns of a position: which, of which site, and whether of ends."""
    found, start = [], 0
    for site in target.sites:
        size = site.shape.numel()
        bounded = _has_ends(site.transform.inv) if site.support_values is None else None
        if bounded is not None:
            found += [(start + i, site.name, bounded) for i in range(size)]
        start += size
    return found


def _has_ends(bijection: Transform) -> bool | None:
    """Whether ends of a support are approached like e^z; None for supports that are no intervals.

    Example:
        >>> from torch.distributions import biject_to
        >>> c = dist.constraints
        >>> [_has_ends(biject_to(each)) for each in (c.real, c.greater_than(2.0), c.simplex)]
        [False, True, None]
    """
    if isinstance(bijection, IndependentTransform):
        return _has_ends(bijection.base_transform)
    if isinstance(bijection, ComposeTransform):
        kinds = [_has_ends(part) for part in bijection.parts]
        return None if None in kinds else any(kinds)
    if isinstance(bijection, ExpTransform | SigmoidTransform):
        return True
    return False if isinstance(bijection, AffineTransform) else None


def _spread(z: Tensor, targets: int) -> Tensor:
    """Of each column and target, half the distance between the quartiles, ``(dim, targets)``."""
    rows = z.reshape(-1, targets, z.shape[-1])
    low, high = rows.quantile(0.25, 0), rows.quantile(0.75, 0)
    spread = (high - low) / 2
    return torch.where((spread > 0) & spread.isfinite(), spread, torch.ones_like(spread)).T
