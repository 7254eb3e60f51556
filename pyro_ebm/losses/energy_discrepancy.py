r"""Energy discrepancy: a datum against points that diffused away from it and back.

Let a diffusion run for a time :math:`t`, from :math:`x` to :math:`y \sim q_t(y \mid x)`. The
*contrastive potential* :math:`U_t(y) = -\log \int q_t(y \mid x')\, e^{-E(x')}\, dx'` is minus the
log density of a diffused draw of the model, less the same :math:`\log Z`, so that

.. math:: \mathrm{ED}_t = \mathbb E_{data}\, \mathbb E_{y \mid x} [E(x) - U_t(y)]
          = KL(p_{data} \,\|\, p_\theta) - KL(q_t\, p_{data} \,\|\, q_t\, p_\theta) + \text{const}

needs no :math:`\log Z`, no score and no chain, and is least where the model is the data's density.
For :math:`t \to 0`, :math:`\mathrm{ED}_t / t` is score matching; for :math:`t \to \infty` it is
maximum likelihood. As :math:`q_t` is symmetric, :math:`e^{-U_t(y)}` is a mean over draws
:math:`x'_j \sim q_t(\cdot \mid y)`.

Reference:
    Schroder et al. (2023), Energy discrepancies: a score-independent loss for energy-based models.
"""

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions.core.discrete import spin
from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count, check_number


class EnergyDiscrepancy(EnergyLoss):
    r"""Energy discrepancy with :math:`M` contrastive points for each row, as a loss for ``SVI``.

    .. math:: J = \log \Big( \frac wM + \frac1M \sum_{j=1}^M e^{E(x) - E(x'_j)} \Big), \qquad
              x'_j = x + \sqrt t\, (\xi + \xi'_j), \quad \xi, \xi'_j \sim N(0, I)

    On the reals the diffusion is Brownian motion. Of two values, 0 and 1 or the -1 and 1 of spins,
    each element flips at rate 1, and so it is flipped with probability
    :math:`(1 - e^{-2t}) / 2`: an infinite time forgets the datum and is maximum likelihood, with
    :math:`\log Z` from :math:`M` uniform points. With few points the mean over them is biased,
    which :math:`w` makes up for in part: it bounds the variance where no point has a low energy.

    Args:
        time: :math:`t`, on the reals in the squared units of the data. :math:`\sqrt{2t}` should
            reach from one part of the data to the next, and :math:`M` points fill that distance.
        num_samples: :math:`M`, evaluations of the energy for each row beside its own.
        stabilization: :math:`w`, at least 0.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for numbers out of range, or a support other than the reals, 0 and 1, or spins.

    Example:
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> from pyro.infer import SVI
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), EnergyDiscrepancy(0.1))
        >>> x = 0.5 * torch.randn(1000)
        >>> _ = [svi.step(x) for _ in range(300)]
        >>> bool((pyro.param("precision") * x.var() - 1).abs() < 0.2)
        True
    """

    def __init__(
        self,
        time: float = 1.0,
        num_samples: int = 4,
        stabilization: float = 1.0,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        check_number("time", time)
        if not time > 0:
            raise ValueError(f"time must be positive, got {time}")
        check_number("stabilization", stabilization)
        if not 0 <= stabilization < math.inf:
            raise ValueError(f"stabilization must be finite and >= 0, got {stabilization}")
        self.time, self.stabilization = time, stabilization
        self.num_samples = check_count("num_samples", num_samples)

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        away = self._diffused(site, site.x[None])
        back = self._diffused(site, away.expand(self.num_samples, *site.x.shape))
        log_p = site.energy.unnormalized_log_prob(torch.cat([site.x[None], back]))
        log_ratio = log_p[1:] - log_p[0]
        self.record(site, log_density_gap=-site.mean(log_ratio))
        log_w = torch.full_like(log_ratio[:1], self.stabilization).log()
        return math.log(self.num_samples) - torch.cat([log_w, log_ratio]).logsumexp(0)

    def _diffused(self, site: EnergySite, x: Tensor) -> Tensor:
        r"""Draws of :math:`q_t(\cdot \mid x)`, of the shape of ``x``."""
        support = site.energy.support
        if is_unbounded(support) and math.isfinite(self.time):
            return x + math.sqrt(self.time) * torch.randn_like(x)
        binary = isinstance(elementwise(support), type(constraints.boolean))
        if binary or isinstance(elementwise(support), type(spin)):
            flips = torch.rand(x.shape, device=x.device) < -math.expm1(-2 * self.time) / 2
            return torch.where(flips, x.logical_not().to(x.dtype) if binary else -x, x)
        if is_unbounded(support):
            raise ValueError(f"site {site.name!r}: an infinite time is for data of two values")
        raise ValueError(
            f"site {site.name!r}: a diffusion would leave the support {support}. Use"
            " ContrastiveDivergence"
            + ("" if support.is_discrete else " or NCE, or transform the data to the reals")
        )
