r"""Ranking noise-contrastive estimation: pick the datum out among its noise.

Reference:
    Ma and Collins (2018), Noise contrastive estimation and negative sampling for conditional
    models (ranking).
"""

from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.losses.base import LossSettings
from pyro_ebm.losses.noise.noise import Noise, NoiseLoss
from pyro_ebm.losses.sites import EnergySite


class RankingNCE(NoiseLoss):
    r"""Ranking NCE: pick the datum out among its noise points, without any log Z.

    .. math:: \mathbb E \log \frac{e^{g(x)}}{e^{g(x)} + \sum_{j=1}^K e^{g(\tilde x_j)}},
              \qquad g = -E - \log q

    The constant of each row cancels, so a conditional energy :math:`E(x \mid c)` needs no
    :math:`\log Z(c)`; none is learned either. The guide samples the noise at the site's name.

    Args:
        noise_ratio: :math:`K`, noise points for each datum; more is better.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for a guide without noise at the site's name, noise of another shape or support,
            or noise that cannot be scored.

    Example:
        >>> loss = RankingNCE(noise_ratio=16)
    """

    def __init__(self, noise_ratio: int = 10, **kwargs: Unpack[LossSettings]):
        super().__init__(noise_ratio, **kwargs)

    def classify(self, site: EnergySite, noise: Noise) -> Tensor:
        """The log-probability of the datum among its noise, shape ``(*batch)``."""
        log_p = site.energy.unnormalized_log_prob(torch.cat([site.x[None], noise.x]))
        logits = log_p - torch.cat([noise.log_q_data[None], noise.log_q])  # the datum's first
        self.record(site, accuracy=site.mean((logits[0] > logits[1:].amax(0)).float()))
        return logits[0] - logits.logsumexp(0)
