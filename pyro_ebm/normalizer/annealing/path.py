r"""Paths of densities, from one that is known to one that is not.

Annealing needs densities :math:`\tilde p_\beta`, :math:`0 \le \beta \le 1`, from a *start*
:math:`\tilde p_0` with a known :math:`\log Z_0` and exact draws to the target :math:`\tilde p_1`.
A :class:`AnnealingPath` is a potential :math:`U_\beta(z) = -\log \tilde p_\beta(z)`, as kernels
move on, that reads :math:`\beta` from a tensor which annealing changes in place.

* The *geometric* path :math:`\tilde p_\beta = q^{1 - \beta}\, \tilde p^\beta` leads from any start
  to any target.
* Along the *tempered* path :math:`\tilde p_\beta = e^{-\beta E}` a Boltzmann machine or Potts model
  stays one, and can be swept in its own blocks at every :math:`\beta`.
* The path of :mod:`~pyro_ebm.normalizer.annealing.rbm_path` does the same for machines with hidden
  units.

Reference:
    Neal (2001), Annealed importance sampling. Gelman and Meng (1998), Simulating normalizing
    constants: from importance sampling to bridge sampling to path sampling.
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.proposals import Proposal, checked_proposal
from pyro_ebm.normalizer.starts import DistributionStart, Start, uniform


class Parts(NamedTuple):
    """What the potential is made of at some positions."""

    values: tuple[Tensor, ...]
    """Each of shape ``(chains, ...)``."""
    grads: tuple[Tensor, ...]
    """Their gradients, each ``(chains, dim)``; empty where none were computed."""


class Known(NamedTuple):
    """Positions, shape ``(chains, dim)``, and what the potential is made of there."""

    z: Tensor
    parts: Parts


class AnnealingPath(Potential):
    r"""Densities :math:`\tilde p_\beta` on the positions of a target, as a potential that moves.

    A new path defines how to draw from its start, and what the potential is at :attr:`beta`: the
    expensive :meth:`parts`, which do not depend on :math:`\beta`, and how to :meth:`combine` them.
    The parts of positions where chains stand are remembered, and need not be computed again at the
    next :math:`\beta`.

    Example:
        >>> class Narrowing(AnnealingPath):  # from N(0, 1) to N(0, 1 / 100), without constants
        ...     def sample(self, num):
        ...         return torch.randn(num, self.dim)
        ...     def parts(self, z):
        ...         return (z.square().sum(-1) / 2,)
        ...     def combine(self, square):
        ...         return (1 + 99 * self.beta) * square
        >>> p = UnnormalizedEnergy(lambda x: 50 * x.square().sum(-1), event_shape=(3,))
        >>> path = Narrowing(p, log_normalizer=1.5 * torch.tensor(2 * torch.pi).log())
        >>> path.at(0.5)(torch.ones(1, 3))
        tensor([75.7500])

    Args:
        target: the energy at :math:`\beta = 1`, or the potential of an energy or of a model.
        log_normalizer: :math:`\log Z_0` of the start, broadcastable to the target's batch.
        start: a normalized density to draw from, for a path that does not override :meth:`sample`.

    Attributes:
        beta: a tensor without dimensions, changed in place.
        last: where it was evaluated last, and what was found.
        here: where the chains are that a kernel is about to move, if that is known.
    """

    start: Start

    def __init__(
        self,
        target: UnnormalizedEnergy | Potential,
        log_normalizer: Tensor | float = 0.0,
        start: Start | None = None,
    ):
        if isinstance(target, UnnormalizedEnergy):
            target = EnergyPotential(target)
        super().__init__(target.sites, target.targets)
        self.target: Potential = target
        self.dtype, self.device = target.dtype, target.device
        if start is not None:
            self.start = start
        self.modules = target.modules
        device = target.device
        self.log_normalizer = torch.as_tensor(log_normalizer, dtype=self.dtype, device=device)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.beta = torch.zeros((), dtype=exact, device=device)
        self.last: Known | None = None
        self.here: Known | None = None

    # -- what a new path writes ----------------------------------------------------------------

    def sample(self, num: int) -> Tensor:
        """Exact draws of the start, ``num`` for each target, shape ``(num * targets, dim)``."""
        return self.start.sample(num)

    @abstractmethod
    def combine(self, *parts: Tensor) -> Tensor:
        r""":math:`U_\beta` of each chain at the present :attr:`beta`, shape ``(chains,)``."""

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        r"""What :math:`U_\beta` is made of at each :math:`\beta`, tensors ``(chains, ...)``."""
        return (z,)

    def gradients(self, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """The parts and their gradients ``(chains, dim)``, where :meth:`combine` is linear.

        It then combines the gradients as it does the parts.
        """
        return None

    # -- what annealing uses -------------------------------------------------------------------

    @property
    def of_energy(self) -> EnergyPotential:
        """The target, if it is an energy's; raises a ValueError if it is a model's."""
        if isinstance(self.target, EnergyPotential):
            return self.target
        raise ValueError(
            f"{type(self).__name__} leads to a model with the sites {self.target.names}, and not to"
            " an energy"
        )

    def at(self, beta: Tensor | float) -> "AnnealingPath":
        r"""This path, with :attr:`beta` set."""
        self.beta.fill_(beta)
        return self

    def __call__(self, z: Tensor) -> Tensor:
        r"""The potential :math:`U_\beta` of each chain, ``(chains, dim) -> (chains,)``."""
        parts = self.parts(z)
        self.last = Known(z.detach(), Parts(tuple(part.detach() for part in parts), ()))
        return self.combine(*parts)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        found = self.gradients(z)
        if found is None:
            return super().value_and_grad(z)
        self.last = Known(z, Parts(*found))
        values, grads = found
        return self.combine(*values), self.combine(*grads)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "last": None, "here": None}

    def draw(self, num: int) -> Tensor:
        """Exact draws of the start, where the target has a density.

        Raises:
            ValueError: if the path returns another shape.
        """
        z = self.sample(num).to(self.dtype)
        if z.shape != (num * self.targets, self.dim):
            raise ValueError(
                f"{type(self).__name__}.sample({num}) must return positions of shape"
                f" {(num * self.targets, self.dim)}, got {tuple(z.shape)}"
            )
        return z

    def gibbs_noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a block sweep of positions ``(chains, dim)``."""
        return self.target.gibbs_noise(z)

    def _weighted(self, beta: Tensor, value: Tensor) -> Tensor:
        """``beta * value``, and 0 where beta is 0: the power 0 of a density of 0 is 1."""
        return torch.where(beta == 0, torch.zeros_like(value), beta * value)


class GeometricPath(AnnealingPath):
    r"""The path :math:`\tilde p_\beta = q^{1 - \beta}\, \tilde p^\beta` from a normalized start.

    .. math:: U_\beta(z) = -(1 - \beta) \log q(z) - \beta \log \tilde p(z)

    Args:
        target: the potential of the energy.
        start: :math:`q`.
        log_normalizer: the log of its integral, where that is not 1.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x**4)
        >>> path = GeometricPath.between(dist.Normal(0.0, 1.0), p)
        >>> path.at(1.0)(torch.tensor([[2.0]]))
        tensor([16.])
    """

    def __init__(self, target: Potential, start: Start, log_normalizer: Tensor | float = 0.0):
        super().__init__(target, log_normalizer, start)

    @classmethod
    def between(cls, proposal: Proposal, p: UnnormalizedEnergy) -> "GeometricPath":
        """From a distribution over points of the support to an energy.

        Args:
            proposal: a normalized distribution with exact draws, on the energy's support.
            p: the energy.
        """
        target = EnergyPotential(p)
        return cls(target, DistributionStart(checked_proposal(proposal, p), target))

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """The potentials of start and target."""
        return self.start(z), self.target(z)

    def combine(self, *parts: Tensor) -> Tensor:
        """Their mean with weights 1 - beta and beta."""
        u_start, u_target = parts
        return self._weighted(1 - self.beta, u_start) + self._weighted(self.beta, u_target)

    def gradients(self, z: Tensor) -> Parts:
        """The potentials of start and target, and their gradients."""
        (u_start, g_start), (u_target, g_target) = (
            part.value_and_grad(z) for part in (self.start, self.target)
        )
        return Parts((u_start, u_target), (g_start, g_target))


class TemperedPath(AnnealingPath):
    r"""The path :math:`\tilde p_\beta = e^{-\beta E}` from the uniform density on a finite set.

    Args:
        target: the potential of a discrete energy without a base. Where it has blocks at every
            temperature, the path has them too.

    Example:
        >>> from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
        >>> p = BoltzmannMachine(1.0, edges=torch.tensor([[0, 1]]))
        >>> path = TemperedPath(EnergyPotential(p))
        >>> path.log_normalizer, path.at(0.5)(torch.ones(1, 2))
        (tensor(1.3863), tensor([-0.5000]))
    """

    def __init__(self, target: EnergyPotential):
        if not target.energy.support.is_discrete or target.energy.base is not None:
            raise ValueError(
                f"a tempered path is for discrete energies without a base, got {target.energy!r}"
            )
        start = uniform(target)
        states = math.log(len(start.support_values)) * start.log_probs.shape[1]
        super().__init__(target, states, start)
        if target.blocks is not None and target.blocks.supports_tempering:
            self.blocks = target.blocks

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """The potential of the target."""
        return (self.target(z),)

    def gradients(self, z: Tensor) -> Parts:
        """The potential of the target, and its gradient."""
        value, grad = self.target.value_and_grad(z)
        return Parts((value,), (grad,))

    def combine(self, *parts: Tensor) -> Tensor:
        """Its energy times beta."""
        return self._weighted(self.beta, parts[0])

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions ``(chains, dim)`` after each block was resampled given the rest."""
        own = self.beta.to(z.dtype).expand(len(z))
        return self.target.gibbs_sweep(z, noise, own if beta is None else own * beta)
