r"""The score at the data, with a weight that is 0 on the boundary of the support.

Score matching integrates by parts, which needs :math:`p(x)\, s(x)` to vanish on the boundary. A
weight :math:`w_i(x_i)` that is 0 there takes care of it.

Reference:
    Hyvarinen (2007), Some extensions of score matching (half-lines).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions.checks.boundary import boundary_error, ends_of, margins, too_many
from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.score.smoothness import refuse_jumping_score
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.score import value_and_grad

NEAR_BOUNDARY = 0.02
"""So near to the boundary, as a part of the interval or of the mean distance, is beside it."""


class WeightedScore(NamedTuple):
    """Flat points, weight and score, each ``(rows, d)``; the score can be differentiated again."""

    x: Tensor
    weight: Tensor
    s: Tensor


def weighted_score(loss: EnergyLoss, site: EnergySite) -> WeightedScore:
    """The score at the data of a site, whose mean norm the loss records.

    Raises:
        ValueError: for a support whose boundary has no known weight, data on that boundary, or an
            energy whose score jumps.
    """
    shape, d = site.x.shape, max(site.energy.event_shape.numel(), 1)
    x = loss.points(site.x.reshape(-1, d))
    _, s = value_and_grad(smooth_log_prob(loss, site, hessian=True), x, create_graph=True)
    weight = boundary_weight(site.energy.support, x.reshape(shape))
    if weight is None:
        raise ValueError(
            f"site {site.name!r}: score matching has no weight for the boundary of the support"
            f" {site.energy.support}. Use ContrastiveDivergence or NCE, or transform the data to"
            " the reals"
        )
    if not is_unbounded(site.energy.support):
        with torch.no_grad():
            _check_boundary(site)
    record_norm(loss, site, s)
    return WeightedScore(x, weight.reshape(-1, d), s)


def record_norm(loss: EnergyLoss, site: EnergySite, s: Tensor) -> None:
    """Records the mean norm of the scores ``(*batch, *event)`` or ``(rows, d)`` of a site."""
    rows = s.detach().reshape(site.batch_shape + (-1,))
    loss.record(site, score_norm=site.mean(rows.norm(dim=-1)))


def smooth_log_prob(
    loss: EnergyLoss, site: EnergySite, hessian: bool
) -> Callable[[Tensor], Tensor]:
    """The log density of flat points, ``(rows, d) -> (rows,)``, checked at some of the steps.

    Args:
        loss: whose step it is.
        site: the site.
        hessian: whether the objective needs a second derivative.

    Raises:
        ValueError: for an energy that is not smooth enough.
    """
    shape = site.x.shape

    def log_prob(flat: Tensor) -> Tensor:
        return site.energy.unnormalized_log_prob(flat.reshape(shape)).reshape(-1)

    if loss.looks_closely:
        x = site.x.reshape(-1, max(site.energy.event_shape.numel(), 1))
        refuse_jumping_score(site.name, log_prob, x, site.energy.modules, hessian)
    return log_prob


def boundary_weight(support: constraints.Constraint, x: Tensor) -> Tensor | None:
    r"""A weight that is 0 at the boundary: squared distance to it.

    Returns:
        :math:`w_i(x_i)`, the shape of x: 1 on the reals, :math:`(x - a)^2` on half-lines,
        :math:`((x - a)(b - x) / (b - a))^2` on boxes; None where no weight is known.

    Example:
        >>> boundary_weight(dist.constraints.positive, torch.tensor([2.0]))
        tensor([4.])
    """
    support = elementwise(support)
    if is_unbounded(support):
        return torch.ones_like(x)
    low, high = ends_of(support)
    if support.is_discrete or (low is None and high is None):
        return None
    if low is None:
        return (torch.as_tensor(high) - x).square()
    if high is None:
        return (x - low).square()
    return ((x - low) * (high - x) / (high - low)).square()


def _check_boundary(site: EnergySite) -> None:
    """Refuses data that pile up on the boundary, or beside it, as clamped data do.

    On it their weight is 0, and nothing is learned of them. A pile beside it is no density that
    could be integrated by parts: with :math:`w = x^2` its terms go with
    :math:`w' / w = 2 / x`.
    """
    support, x = site.energy.support, site.x
    low, high = ends_of(support)
    width = None if low is None or high is None else high - low
    bad = torch.zeros_like(x, dtype=torch.bool)
    for margin in margins(elementwise(support), x):
        rows = margin.reshape(site.batch_shape.numel(), -1)
        least = rows.amin(0)
        scale = rows.mean(0) if width is None else width * torch.ones_like(least)
        piled = (rows == least) & (least < NEAR_BOUNDARY * scale)
        piled &= piled.sum(0) > 1
        bad |= (piled | (rows == 0)).reshape(x.shape)
    if too_many(bad, len(site.batch_shape)):
        why = "or pile up beside it, where score matching gives them no weight, or a wrong one"
        ways = ["use ContrastiveDivergence(persistent=True)"]
        raise boundary_error(support, x, bad, f"the data at site {site.name!r}", why, ways)
