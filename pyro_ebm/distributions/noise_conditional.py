r"""Noise-conditional energies: one function for a density and all its blurred versions.

Data with noise, :math:`\tilde x = x + \sigma \xi` with :math:`\xi \sim N(0, I)`, have the density

.. math:: p_\sigma = p * N(0, \sigma^2 I), \qquad p(\tilde x; \sigma) \propto
          h(\tilde x)\, e^{-E(\tilde x, \sigma)} .

At the largest :math:`\sigma` of a ladder it is one broad hill, which chains cross, and whose shape
tells how much of the mass is where; at the smallest it is nearly that of the data. Every level is
a function of the one before: :math:`p_\sigma` solves the heat equation,

.. math:: \frac{\partial p_\sigma}{\partial \sigma} = \sigma\, \Delta p_\sigma .

A sum of such energies, :math:`E_1(x, \sigma) + E_2(x, \sigma)`, is the energy of
:math:`p_{1,\sigma}\, p_{2,\sigma}`, which is *not* the noised product
:math:`(p_1 p_2) * N(0, \sigma^2 I)`: the two agree only as :math:`\sigma` goes to 0. So the levels
of a sum lead chains to it, and are no target of their own; draws are made at the smallest
:math:`\sigma`, by a kernel that leaves that density invariant.

Reference:
    Song and Ermon (2019), Generative modeling by estimating gradients of the data distribution.
    Du et al. (2023), Reduce, reuse, recycle: compositional generation with energy-based diffusion
    models and MCMC.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypedDict, Unpack

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_ebm.distributions.core.introspection import name_of_function
from pyro_ebm.distributions.core.sampler import ChainKernel
from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.ops.arguments import check_callable, check_count, check_number, shown

NoisyEnergy = Callable[[Tensor, Tensor], Tensor]


class LevelSettings(TypedDict, total=False):
    """What all levels share, of :class:`~pyro_ebm.UnnormalizedEnergy`."""

    event_shape: torch.Size | tuple[int, ...] | None
    batch_shape: torch.Size | tuple[int, ...] | None
    base: TorchDistribution | None
    kernel: ChainKernel | None
    num_steps: int
    validate_args: bool | None


def geometric_ladder(largest: float, smallest: float, num_levels: int) -> tuple[float, ...]:
    """Noise levels from the largest to the smallest, of one ratio.

    Args:
        largest: about the largest distance of two data points.
        smallest: the blur that the density may keep.
        num_levels: at least 2; steps to 0.7 of the level before keep neighbours close.

    Raises:
        ValueError: unless ``largest > smallest > 0``.

    Example:
        >>> geometric_ladder(4.0, 0.5, 4)
        (4.0, 2.0, 1.0, 0.5)
    """
    check_count("num_levels", num_levels, 2)
    for name, value in (("largest", largest), ("smallest", smallest)):
        check_number(name, value)
    if not 0 < smallest < largest < math.inf:
        raise ValueError(f"a ladder goes down from largest={largest} to smallest={smallest} > 0")
    ratio = (smallest / largest) ** (1 / (num_levels - 1))
    return (*(largest * ratio**i for i in range(num_levels - 1)), float(smallest))


def noise_conditional(
    energy: NoisyEnergy, sigmas: Iterable[float], **kwargs: Unpack[LevelSettings]
) -> UnnormalizedEnergy:
    r"""A density at every noise level of a ladder.

    .. math:: p(x; \sigma) = \frac{h(x)\, e^{-E(x, \sigma)}}{Z(\sigma)}

    It *is* the density at the smallest of its levels, ``p.sigmas``, and
    :meth:`~pyro_ebm.UnnormalizedEnergy.at` is that at any other.
    :class:`~pyro_ebm.DenoisingScoreMatching` and :class:`~pyro_ebm.RecoveryLikelihood` train it at
    all levels, and ``sample`` leads chains through them (:func:`~pyro_ebm.mcmc.annealed_langevin`)
    before it draws at the smallest.
    Products, ratios and tempered versions are noise-conditional too; all else that is made of it
    is made of the density at the smallest level.

    Args:
        energy: :math:`E`, a callable of points ``(*sample, *batch, *event)`` and their noise levels
            ``(*sample, *batch)``, which returns energies ``(*sample, *batch)``.
        sigmas: the noise levels, see :func:`geometric_ladder`. The largest is about as wide as the
            data, unless a ``base`` is.
        **kwargs: ``event_shape``, ``batch_shape``, ``base``, ``kernel``, ``num_steps`` and
            ``validate_args`` of :class:`~pyro_ebm.UnnormalizedEnergy`. Where there is no base,
            chains start from :math:`N(0, \sigma_{\max}^2 I)`.

    Raises:
        ValueError: for levels that are not positive, or a base that is not on the reals.
        TypeError: for other settings: log Z is another at each level.

    Reference:
        Song and Ermon (2019), Generative modeling by estimating gradients of the data distribution.

    Example:
        >>> means, log_shares = torch.tensor([-4.0, 4.0]), torch.tensor([0.8, 0.2]).log()
        >>> def two_modes(x, sigma):  # .8 N(-4, .5^2) + .2 N(4, .5^2), and noise
        ...     modes = dist.Normal(means, (0.25 + sigma[..., None] ** 2).sqrt())
        ...     return -(log_shares + modes.log_prob(x[..., None])).logsumexp(-1)
        >>> p = noise_conditional(two_modes, geometric_ladder(8.0, 0.01, 20))
        >>> p
        UnnormalizedEnergy(energy=two_modes, event_shape=(), sigmas=8 to 0.01 (20 levels),
            log_normalizer=unknown)
        >>> bool(((p.sample((1000,)) < 0).float().mean() - 0.8).abs() < 0.05)
        True
    """
    check_callable("energy", energy, "a function of points and their noise levels")
    try:
        levels = sorted({float(sigma) for sigma in sigmas}, reverse=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"sigmas must be noise levels, such as geometric_ladder(4.0, 0.05, 10), got"
            f" {shown(sigmas)}"
        ) from error
    if not levels or not all(0 < sigma < math.inf for sigma in levels):
        raise ValueError(f"sigmas must be positive and finite, got {shown(sigmas)}")
    if others := sorted(set(kwargs) - set(LevelSettings.__annotations__)):
        raise TypeError(
            f"noise_conditional takes no {', '.join(others)}: all levels are on the reals, each"
            " with a log Z of its own (p.normalized(log_z) holds that of the smallest)"
        )
    p = _level(energy, dict(kwargs), levels[-1])
    if not is_unbounded(p.support):
        raise ValueError(f"noise leads out of the support {p.support} of the base: use the reals")
    p.sigmas, p._at = tuple(levels), partial(_level, energy, dict(kwargs))
    if p.base is None:
        wide = dist.Normal(p.like.new_zeros(p.event_shape), levels[0])
        p.starts = UnnormalizedEnergy(_Zero(p.event_dim), base=wide.to_event(p.event_dim))
    return p


def _level(
    energy: NoisyEnergy, kwargs: dict[str, Any], sigma: Tensor | float
) -> UnnormalizedEnergy:
    """The density at a noise level."""
    known = dict(kwargs)
    if isinstance(sigma, Tensor) and sigma.dim():
        base, batch = kwargs.get("base"), kwargs.get("batch_shape")
        batch = batch if batch is not None else () if base is None else base.batch_shape
        known["batch_shape"] = torch.broadcast_shapes(batch, sigma.shape)
    told = _Told(energy, sigma)
    p = UnnormalizedEnergy(told, **known)
    told.event_dim = p.event_dim
    return p


class _Told:
    """An energy of points alone: the noise level is held."""

    event_dim = 0

    def __init__(self, energy: NoisyEnergy, sigma: Tensor | float):
        self.energy, self.sigma = energy, sigma
        self.__name__ = name_of_function(energy)

    def __call__(self, x: Tensor) -> Tensor:
        """Energies ``(*sample, *batch)`` of points ``(*sample, *batch, *event)``."""
        sigma = self.sigma.to(x) if isinstance(self.sigma, Tensor) else x.new_full((), self.sigma)
        return self.energy(x, sigma.expand(x.shape[: x.dim() - self.event_dim]))


class _Zero:
    """The energy 0 of all points."""

    def __init__(self, event_dim: int):
        self.event_dim = event_dim

    def __call__(self, x: Tensor) -> Tensor:
        """Zeros ``(*batch)`` of points ``(*batch, *event)``."""
        return x.new_zeros(x.shape[: x.dim() - self.event_dim])
