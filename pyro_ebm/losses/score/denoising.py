r"""Denoising score matching: the score of noised data is known from their noise.

Of :math:`\tilde x = x + \sigma \xi` the conditional density :math:`N(\tilde x; x, \sigma^2 I)` has
derivatives that are known, and the mean of which over :math:`x` given :math:`\tilde x` is that of
the noised density,

.. math:: \nabla \log p_\sigma(\tilde x) = \mathbb E[ -\xi / \sigma \mid \tilde x], \qquad
          \frac{\partial \log p_\sigma(\tilde x)}{\partial \log \sigma}
          = \mathbb E[ |\xi|^2 - d \mid \tilde x] .

The first is blind to the shares of far pieces: at a small :math:`\sigma` no data lie between them.
The second ties each level to the broader ones, where the pieces are one.

Reference:
    Vincent (2011), A connection between score matching and denoising autoencoders. Wang et al.
    (2020), A Wasserstein minimum velocity approach to learning unnormalized models (control
    variates). Song and Ermon (2019), Generative modeling by estimating gradients of the data
    distribution (several levels). Guth, Kadkhodaie and Simoncelli (2025), Learning normalized image
    densities via dual score matching.
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

DEFAULT = 0.1


class DenoisingScoreMatching(EnergyLoss):
    r"""Score matching on noised data: :math:`\tilde x = x + \sigma \xi`, :math:`\xi \sim N(0, I)`.

    .. math:: J = \tfrac12 \mathbb E\, | \sigma\, s(\tilde x) + \xi |^2

    No Hessian at all: one score for each row. It fits the *noised* density
    :math:`p * N(0, \sigma^2)`, e.g. :math:`N(0, s^2 + \sigma^2)` for :math:`N(0, s^2)`. A small
    :math:`\sigma` has a variance of order :math:`1 / \sigma^2`, which the control variate removes;
    a large one blurs. With several, each row draws one of them.

    A noise-conditional energy (:func:`~pyro_ebm.noise_conditional`) is told the :math:`\sigma` of
    each row, :math:`s(\tilde x; \sigma)`, and fits the noised density of every level. Then
    ``dual=True`` adds its derivative in :math:`\sigma`, from the same backward pass,

    .. math:: \frac1{2 d}\, \mathbb E\, \Big( \frac{\partial \log \tilde p(\tilde x; \sigma)}{
              \partial \log \sigma} - (|\xi|^2 - d) \Big)^2,

    which gives far pieces their shares and all levels one and the same :math:`\log Z`.

    Args:
        sigma: the noise's standard deviation, in the units of the data, or several; by default the
            levels of a noise-conditional energy, and 0.1 for any other.
        control_variate: whether to subtract :math:`\sigma\, \xi^\top s(x)`, which has mean 0;
            costs a second score.
        dual: whether to match the derivative in :math:`\sigma` too.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for a sigma that is not positive, a constrained support, or ``dual`` with an
            energy that is not noise-conditional.

    Example:
        >>> loss = DenoisingScoreMatching(sigma=[0.1, 0.3, 1.0])
    """

    trains_levels = True

    def __init__(
        self,
        sigma: float | Sequence[float] | None = None,
        control_variate: bool = False,
        dual: bool = False,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        try:
            sigmas = torch.as_tensor(DEFAULT if sigma is None else sigma, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"sigma must be a number or several, such as [0.1, 0.5], got {shown(sigma)}"
            ) from error
        if not (sigmas.numel() and sigmas.isfinite().all() and (sigmas > 0).all()):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        self.sigma, self.control_variate, self.dual = sigma, control_variate, dual
        self._sigmas = sigmas.flatten()

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        refuse_bounded(site)
        levels = site.energy.sigmas
        if self.dual and not levels:
            raise ValueError(
                f"site {site.name!r}: dual=True matches a derivative in sigma, which"
                f" {site.energy!r} is not told: make it by pyro_ebm.noise_conditional"
            )
        if not self.dual:  # which sees the energy itself, constants and all
            smooth_log_prob(self, site, hessian=False)
        d = max(site.energy.event_shape.numel(), 1)
        x = site.x.reshape(site.batch_shape + (d,))
        sigmas = x.new_tensor(levels) if levels and self.sigma is None else self._sigmas.to(x)
        sigma = sigmas  # of one element, or one drawn for each row
        if len(sigmas) > 1:
            sigma = sigmas[torch.randint(len(sigmas), site.batch_shape + (1,), device=x.device)]
        log_sigma = sigma.log().expand(site.batch_shape + (1,))

        def log_prob(y: Tensor) -> Tensor:
            """Of points and the logarithms of their noise levels, ``(*batch, d + 1)``."""
            p = site.energy.at(y[..., -1].exp()) if levels else site.energy
            return p.unnormalized_log_prob(y[..., :-1].reshape(site.x.shape))

        def gradients(points: Tensor) -> tuple[Tensor, Tensor]:
            """In the points, ``(*batch, d)``, and in the logarithms of the levels, ``(*batch)``."""
            y = self.points(torch.cat([points, log_sigma], -1))
            grads = value_and_grad(log_prob, y, create_graph=True)[1]
            return grads[..., :-1], grads[..., -1]

        noise = torch.randn_like(x)
        s, in_log_sigma = gradients(x + sigma * noise)
        objective = (sigma * s + noise).square().sum(-1) / 2
        if self.control_variate:
            clean, _ = gradients(x)
            objective = objective - (sigma * noise * clean + noise.square() / 2).sum(-1)
        if self.dual:
            change = in_log_sigma - (noise.square().sum(-1) - d)
            self.record(site, dual=site.mean(change.square()) / (2 * d))
            objective = objective + change.square() / (2 * d)
        record_norm(self, site, s)
        return -objective


def refuse_bounded(site: EnergySite) -> None:
    """Raises a ValueError where noise on the data would leave the support."""
    if not is_unbounded(site.energy.support):
        raise ValueError(
            f"site {site.name!r}: noise would leave the support {site.energy.support}. Use"
            " ScoreMatching, which weights the boundary, or transform the data to the reals"
        )
