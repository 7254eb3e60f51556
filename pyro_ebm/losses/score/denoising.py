r"""Denoising score matching: the score of noised data is known from their noise.

Reference:
    Vincent (2011), A connection between score matching and denoising autoencoders. Wang et al.
    (2020), A Wasserstein minimum velocity approach to learning unnormalized models (control
    variates).
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.score.weighted_score import record_norm, smooth_log_prob
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.score import value_and_grad


class DenoisingScoreMatching(EnergyLoss):
    r"""Score matching on noised data: :math:`\tilde x = x + \sigma \xi`, :math:`\xi \sim N(0, I)`.

    .. math:: J = \tfrac12 \mathbb E\, | \sigma\, s(\tilde x) + \xi |^2

    No Hessian at all: one score for each row. It fits the *noised* density
    :math:`p * N(0, \sigma^2)`, e.g. :math:`N(0, s^2 + \sigma^2)` for :math:`N(0, s^2)`. A small
    :math:`\sigma` has a variance of order :math:`1 / \sigma^2`, which the control variate removes;
    a large one blurs. With several, each row draws one of them.

    Args:
        sigma: the noise's standard deviation, in the units of the data, or several.
        control_variate: whether to subtract :math:`\sigma\, \xi^\top s(x)`, which has mean 0;
            costs a second score.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for a sigma that is not positive, or a constrained support.

    Example:
        >>> loss = DenoisingScoreMatching(sigma=[0.1, 0.3, 1.0])
    """

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.1,
        control_variate: bool = False,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        try:
            sigmas = torch.as_tensor(sigma, dtype=torch.float64).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"sigma must be a number or several, such as [0.1, 0.5], got {shown(sigma)}"
            ) from error
        if not (sigmas.numel() and sigmas.isfinite().all() and (sigmas > 0).all()):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        self.sigma, self.control_variate = sigma, control_variate
        self._sigmas = sigmas

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        if not is_unbounded(site.energy.support):
            raise ValueError(
                f"site {site.name!r}: noise would leave the support {site.energy.support}. Use"
                " ScoreMatching, which weights the boundary, or transform the data to the reals"
            )
        smooth_log_prob(self, site, hessian=False)
        x = site.x
        rows = site.batch_shape + (1,) * site.energy.event_dim
        sigmas = self._sigmas.to(x)
        sigma = sigmas  # of one element, or one drawn for each row
        if len(sigmas) > 1:
            sigma = sigmas[torch.randint(len(sigmas), rows, device=x.device)]
        noise = torch.randn_like(x)
        log_prob = site.energy.unnormalized_log_prob
        _, s = value_and_grad(log_prob, self.points(x + sigma * noise), create_graph=True)
        objective = (sigma * s + noise).square() / 2
        if self.control_variate:
            _, clean = value_and_grad(log_prob, self.points(x), create_graph=True)
            objective = objective - sigma * noise * clean - noise.square() / 2
        objective = objective.reshape(site.batch_shape + (-1,)).sum(-1)
        record_norm(self, site, s)
        return -objective
