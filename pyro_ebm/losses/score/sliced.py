r"""Sliced score matching: score matching along random directions.

Reference:
    Song et al. (2019), Sliced score matching: a scalable approach to density and score estimation.
"""

from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.score.weighted_score import weighted_score
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.score import draw_probes, projected_divergence


class SlicedScoreMatching(EnergyLoss):
    r"""Score matching along random directions :math:`v`.

    .. math:: J = \mathbb E\, v^\top (\nabla s)\, v + \tfrac12 (v^\top s)^2,

    or, with ``variance_reduced``, the closed form :math:`\frac12 |s|^2` of the last term's mean
    (for probes with unit covariance). One backward pass for each projection, in any dimension.

    Args:
        num_projections: number of directions for each row.
        variance_reduced: whether to use the closed form.
        distribution: of the directions: ``"rademacher"``, ``"gaussian"``, or ``"sphere"`` (of
            radius :math:`\sqrt d`).
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for an unknown distribution, a support with a boundary that no weight is known
            for, or (when used) an energy whose score jumps.

    Example:
        >>> loss = SlicedScoreMatching(num_projections=2)
    """

    def __init__(
        self,
        num_projections: int = 1,
        variance_reduced: bool = True,
        distribution: str = "rademacher",
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        check_count("num_projections", num_projections)
        draw_probes(distribution, (), torch.zeros(1, 1))
        self.num_projections, self.distribution = num_projections, distribution
        self.variance_reduced = variance_reduced

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        x, weight, s = weighted_score(self, site)
        probes = draw_probes(self.distribution, (self.num_projections,), x)
        divergence, _ = projected_divergence(weight * s, x, probes)
        if self.variance_reduced:
            square = (weight * s.square()).sum(-1)
        else:
            square = (probes * weight.sqrt() * s).sum(-1).square()
        return -(divergence + square / 2).mean(0).reshape(site.batch_shape)
