r"""Cooperative training: chains that start at a flow, which learns from where they end.

The guide's distribution :math:`q_\phi`, a flow, drafts points; a transition kernel of the energy,
:math:`K_\theta` taken k times, revises them to negatives :math:`x'`; and both learn,

.. math:: \theta:\; -\nabla_\theta E_\theta(x) + \mathbb E\, \nabla_\theta E_\theta(x'), \qquad
          \phi:\; \mathbb E\, \nabla_\phi \log q_\phi(x'), \qquad
          x' \sim K_\theta^k q_\phi,

the energy by contrastive divergence, the flow by maximum likelihood of the negatives (*MCMC
teaching*). No gradient goes through the chains. The flow is at rest where :math:`q_\phi` is
the nearest to :math:`K_\theta^k q_\phi`, for a rich one where it is stationary: :math:`q_\phi =
p_\theta`. Then the negatives are draws of the energy, whose gradient is that of the likelihood, and
both are the density of the data. Kernels without an acceptance step bias the energy as they do
contrastive divergence, and not the flow.

Reference:
    Xie, Lu, Gao, Zhu and Wu (2018), Cooperative training of descriptor and generator networks. Xie,
    Zhu, Li and Li (2022), A tale of two flows: cooperative learning of Langevin flow and
    normalizing flow toward energy-based model.
"""

import dataclasses
from typing import Any

from torch import Tensor

from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.losses.noise.noise import check_support, checked_noise, log_density, refuse_shared
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.mcmc.kernels.base import Kernel


class CooperativeTraining(ContrastiveDivergence):
    r"""Contrastive divergence from draws of the guide, which learns from the negatives.

    The guide samples, at the name of the energy site, a distribution with parameters of its own:
    a :class:`~pyro_ebm.distributions.flow.FlowDistribution`, conditional if the energy is. A row
    adds :math:`E(x) - E(x') - \log q(x')` to the loss, with the gradients above. Afterwards
    both are usable: the energy, and the flow, whose draws a few transitions bring to the energy.
    The :attr:`diagnostics` are those of contrastive divergence, with ``distance_moved`` that from
    draft to negative, and ``log_q_negatives``, the mean :math:`\log q(x')`.

    Args:
        kernel: any kernel, without a model; by default the energy's own, else
            :class:`~pyro_ebm.mcmc.LangevinKernel`.
        num_steps: transitions for each gradient.
        **kwargs: those of :class:`~pyro_ebm.ContrastiveDivergence`, but the ones of persistent
            chains.

    Raises:
        ValueError: for numbers out of range, persistent chains, or (when used) a site that is
            latent, a guide without noise at it, noise of another shape or support or without a
            density, or a parameter that energy and noise share.

    Example:
        >>> from pyro_ebm.distributions.flow import FlowDistribution, neural_spline_flow
        >>> flow = neural_spline_flow(features=2, transforms=1)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
        >>> def model(x):
        ...     pyro.module("energy", net)
        ...     p = UnnormalizedEnergy(lambda x: net(x).squeeze(-1), (2,))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", p, obs=x)
        >>> def guide(x):
        ...     pyro.module("flow", flow)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", FlowDistribution(flow()))
        >>> from pyro.infer import SVI
        >>> loss = CooperativeTraining(num_steps=5)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        >>> _ = svi.step(torch.randn(64, 2))
        >>> loss.diagnostics["log_q_negatives"] < 0
        True
    """

    needs_noise = True

    def __init__(self, kernel: Kernel | None = None, num_steps: int = 10, **kwargs: Any):
        super().__init__(kernel, num_steps, **kwargs)
        if self.negatives.persistent:
            raise ValueError(
                "persistent chains do not start at draws of the guide: leave persistent out, or use"
                " ContrastiveDivergence"
            )

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`E(x') - E(x) + \log q(x')`, shape ``(*batch)``."""
        noise = checked_noise(site, type(self).__name__)
        assert site.guide_value is not None
        if self.looks_closely:
            check_support(noise, site, site.guide_value)
        drafts = dataclasses.replace(site, x=site.guide_value, is_observed=False)
        negatives = self.negatives.draw(drafts, self)
        log_q = log_density(noise, negatives.x, site)
        if self.looks_closely:
            refuse_shared(site, log_q)
        self.record(site, log_q_negatives=site.mean(log_q))
        return self.contrast(site, negatives) + log_q

    def latent_term(self, site: EnergySite) -> Tensor:
        """Refused: a latent's guide is its posterior."""
        return EnergyLoss.latent_term(self, site)
