r"""Recovery likelihood: contrastive divergence of a density that short chains do follow.

Let :math:`\tilde x = x + s\, \xi` be a noised version of :math:`x`. Given :math:`\tilde x`, the
density of :math:`x` is

.. math:: p(x \mid \tilde x; \sigma) \propto p(x; \sigma)\, e^{-|\tilde x - x|^2 / 2 s^2},

of the same energy with a parabola around :math:`\tilde x` added: for small :math:`s` it has one
mode, however many :math:`p` has, and a few transitions from :math:`\tilde x` reach it. Its
likelihood stands for that of :math:`p`, and is denoising score matching in the limit of small
:math:`s`.

Here :math:`x` is the datum with the noise :math:`\sigma_i` of a level, and :math:`\tilde x` with
that of the next larger one, :math:`s^2 = \sigma_{i+1}^2 - \sigma_i^2`. In the coordinates
:math:`u = (x - \tilde x) / s` the conditional density is a tilt of the standard normal, which one
step size suits at all levels.

Reference:
    Gao, Song, Poole, Wu and Kingma (2021), Learning energy-based models by diffusion recovery
    likelihood.
"""

import dataclasses
import inspect
from typing import Unpack

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.distributions.core.introspection import held
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.contrastive.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.losses.contrastive.negatives import Negatives, NegativeSampler
from pyro_ebm.losses.score.denoising import refuse_bounded
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.mcmc.kernels.base import Kernel


class RecoveryLikelihood(ContrastiveDivergence):
    r"""The likelihood of data given a noisier version of them, at all levels of an energy.

    Each row draws a level :math:`\sigma_i`; with :math:`x` the row at that noise, and
    :math:`\tilde x` at the next, the gradient is that of
    :math:`\log p(x \mid \tilde x; \sigma_i)`,

    .. math:: -\nabla_\theta E_\theta(x, \sigma_i)
              + \mathbb E\, \nabla_\theta E_\theta(x', \sigma_i),
              \qquad x' \sim p(x' \mid \tilde x; \sigma_i),

    with :math:`x'` from a chain that starts at :math:`\tilde x`. (Above the largest level stands
    one more, which continues the ladder.) At its maximum each :math:`p(x; \sigma_i)` is the density
    of the data at that noise. At a small level, where chains stay near :math:`\tilde x`, it is as
    blind as score matching to the shares of far modes. :attr:`diagnostics` are those of contrastive
    divergence, in the coordinates :math:`u`.

    Args:
        kernel: any kernel, without a model; by default :class:`~pyro_ebm.mcmc.LangevinKernel`. Its
            step size is in units of :math:`s^2`.
        num_steps: transitions for each gradient.
        energy_penalty: as in :class:`~pyro_ebm.ContrastiveDivergence`.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for numbers out of range, or (when used) a site that is latent, has a
            constrained support, or whose energy has fewer than two noise levels.

    Example:
        >>> from pyro_ebm import geometric_ladder, noise_conditional
        >>> def model(x):
        ...     v = pyro.param("variance", torch.tensor(2.0), dist.constraints.positive)
        ...     energy = lambda x, sigma: x**2 / (v + sigma**2) / 2
        ...     with pyro.plate("data", len(x)):
        ...         p = noise_conditional(energy, geometric_ladder(2.0, 0.1, 6))
        ...         pyro.sample("x", p, obs=x)
        >>> from pyro.infer import SVI
        >>> optim = pyro.optim.Adam({"lr": 0.03})
        >>> svi = SVI(model, lambda x: None, optim, RecoveryLikelihood())
        >>> x = 0.5 * torch.randn(1000)
        >>> _ = [svi.step(x) for _ in range(200)]
        >>> bool((pyro.param("variance") / x.var() - 1).abs() < 0.3)
        True
    """

    trains_levels = True

    def __init__(
        self,
        kernel: Kernel | None = None,
        num_steps: int = 10,
        energy_penalty: float = 0.0,
        **kwargs: Unpack[LossSettings],
    ):
        of_contrastive = set(inspect.signature(ContrastiveDivergence).parameters)
        if others := sorted(of_contrastive & set(kwargs)):
            raise TypeError(
                f"RecoveryLikelihood takes no {', '.join(others)}: each row's chain starts at the"
                " noisier row, and follows a density of its own"
            )
        super().__init__(kernel, num_steps, energy_penalty=energy_penalty, **kwargs)
        self.negatives = _FromTheNoisier(kernel, num_steps)

    def energy_term(self, site: EnergySite) -> Tensor:
        """That of the conditional density, shape ``(*batch)``."""
        refuse_bounded(site)
        if len(site.energy.sigmas) < 2:
            raise ValueError(
                f"site {site.name!r}: the likelihood of a row given a noisier one needs at least"
                f" two noise levels, and {site.energy!r} has {len(site.energy.sigmas)}: make it by"
                " pyro_ebm.noise_conditional(energy, geometric_ladder(...))"
            )
        x, batch, event_dim = site.x, site.batch_shape, site.energy.event_dim
        levels = x.new_tensor(site.energy.sigmas).flip(0)
        above = torch.cat([levels[1:], levels[-1:].square() / levels[-2:-1]])
        row = torch.randint(len(levels), batch, device=x.device)
        sigma, s = levels[row], (above.square() - levels.square()).sqrt()[row]
        of_rows = batch + (1,) * event_dim
        u, scale = torch.randn_like(x), s.reshape(of_rows)
        noised = x + sigma.reshape(of_rows) * torch.randn_like(x)
        # x = x~ + s u, of which u is standard normal where the energy is flat
        given = _Given(site.energy.at(sigma), noised - scale * u, scale)
        flat = dist.Normal(torch.zeros_like(u), 1.0).to_event(event_dim)
        conditional = UnnormalizedEnergy(given, base=flat)
        return super().energy_term(dataclasses.replace(site, energy=conditional, x=u))

    def latent_term(self, site: EnergySite) -> Tensor:
        """Refused: the loss is for data."""
        return EnergyLoss.latent_term(self, site)


class _Given:
    """The energy of x as a function of u = (x - x~) / s, without the parabola |u|^2 / 2."""

    def __init__(self, level: UnnormalizedEnergy, noisier: Tensor, scale: Tensor):
        self.level, self.noisier, self.scale = level, noisier, scale
        self.held = held([level])
        self.__name__ = level.energy_name

    def __call__(self, u: Tensor) -> Tensor:
        """Energies ``(*sample, *batch)`` of points ``(*sample, *batch, *event)``."""
        return -self.level.unnormalized_log_prob(self.noisier + self.scale * u)


class _FromTheNoisier(NegativeSampler):
    """Chains that start at x~, where u is 0."""

    def draw(self, site: EnergySite, loss: EnergyLoss) -> Negatives:
        """The negatives of a site, see :meth:`NegativeSampler.draw`."""
        return self.run(site, site.energy, torch.zeros_like(site.x), loss)
