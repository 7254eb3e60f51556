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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.state import State
from pyro_ebm.normalizer.proposals import (
    DistributionStart,
    Start,
    checked_proposal,
    uniform,
)
from pyro_ebm.ops.steps.metropolis import select


class Known(NamedTuple):
    """What was computed at some positions."""

    z: Tensor
    """Shape ``(chains, dim)``."""
    parts: tuple[Tensor, ...]
    grads: tuple[Tensor, ...] | None


class AnnealingPath(Potential):
    r"""Densities :math:`\tilde p_\beta` on the positions of a target, as a potential that moves.

    A new path says how to draw from its start, and what the potential is at :attr:`beta`: the
    expensive :meth:`parts`, which do not depend on :math:`\beta`, and how to :meth:`combine` them.
    The parts of positions where chains stand are remembered, and need not be computed again at the
    next :math:`\beta`.

    Example:
        >>> class Narrowing(AnnealingPath):  # from N(0, 1) to N(0, 1 / 100), both without a
        constant ...     def sample(self, num):
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
        target: the energy at :math:`\beta = 1`.
        log_normalizer: :math:`\log Z_0` of the start, broadcastable to the target's batch.

    Attributes:
        beta: a tensor without dimensions, changed in place.
        graphed: the graphs of a kernel on it, see :mod:`pyro_ebm.normalizer.annealing.graphed`.
    """

    def __init__(self, target: UnnormalizedEnergy | EnergyPotential, log_normalizer: Any = 0.0):
        if isinstance(target, UnnormalizedEnergy):
            target = EnergyPotential(target)
        super().__init__(target.sites, target.targets)
        self.target, self.dtype = target, target.dtype
        self._modules = target._modules
        device = target.sites[0].device
        self.log_normalizer = torch.as_tensor(log_normalizer, dtype=self.dtype, device=device)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.beta = torch.zeros((), dtype=exact, device=device)
        self._last: Known | None = None
        self._here: Known | None = None
        self.graphed: Any = None

    # -- what a new path writes ----------------------------------------------------------------

    @abstractmethod
    def sample(self, num: int) -> Tensor:
        """Exact draws of the start, ``num`` for each group, shape ``(num * targets, dim)``."""

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

    def at(self, beta: Tensor | float) -> "AnnealingPath":
        r"""This path, with :attr:`beta` set."""
        self.beta.fill_(beta)
        return self

    def __call__(self, z: Tensor) -> Tensor:
        r"""The potential :math:`U_\beta` of each chain, ``(chains, dim) -> (chains,)``."""
        parts = self.parts(z)
        self._last = Known(z.detach(), tuple(part.detach() for part in parts), None)
        return self.combine(*parts)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        known = self.gradients(z)
        if known is None:
            return super().value_and_grad(z)
        self._last = Known(z, *known)
        return self.combine(*known[0]), self.combine(*known[1])

    def follow(self, z: Tensor, needs_grad: bool) -> "Known | None":
        """What is known of positions where chains are after a transition.

        Each is the last one that was evaluated, or, if that was rejected, the one before.
        """
        known, last, before = None, self._last, self._here
        if last is not None and last.z.shape == z.shape and (last.grads or not needs_grad):
            moved = (z == last.z).all(-1)
            if moved.all():
                known = Known(z, last.parts, last.grads)
            elif before is not None and (moved | (z == before.z).all(-1)).all():
                parts = zip(last.parts, before.parts, strict=True)
                grads = zip(last.grads or (), before.grads or (), strict=False)
                known = Known(
                    z,
                    tuple(select(moved, new, old) for new, old in parts),
                    tuple(select(moved, new, old) for new, old in grads) or None,
                )
        self._here = known
        return known

    def know(self, here: "Known | None") -> "Known | None":
        """Takes what is known of positions where chains are; returns what was evaluated last."""
        last, self._last, self._here = self._last, None, here
        return last

    def state(self, kernel: Kernel, z: Tensor) -> Any:
        r"""A kernel's state at the present :attr:`beta`, for positions that were followed."""
        known = self._here
        if known is None or known.z is not z or type(kernel).evaluate is not Kernel.evaluate:
            state = kernel.evaluate(z)
            self._here = None if kernel.jit_compile else self._last
            return state
        grad = self.combine(*known.grads) if kernel.needs_grad and known.grads else None
        return State(z, self.combine(*known.parts), grad)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_here": None, "graphed": None}

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

    def _weighted(self, beta: Tensor, value: Tensor) -> Tensor:
        """``beta * value``, and 0 where beta is 0: the power 0 of a density of 0 is 1."""
        return torch.where(beta == 0, torch.zeros_like(value), beta * value)


class GeometricPath(AnnealingPath):
    r"""The path :math:`\tilde p_\beta = q^{1 - \beta}\, \tilde p^\beta` from a normalized start.

    .. math:: U_\beta(z) = -(1 - \beta) \log q(z) - \beta \log \tilde p(z)

    Args:
        target: the potential of the energy.
        start: :math:`q`.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x**4)
        >>> path = GeometricPath.between(dist.Normal(0.0, 1.0), p)
        >>> path.at(1.0)(torch.tensor([[2.0]]))
        tensor([16.])
    """

    def __init__(self, target: EnergyPotential, start: Start):
        super().__init__(target)
        self.start = start

    @classmethod
    def between(cls, proposal: Any, p: UnnormalizedEnergy) -> "GeometricPath":
        """From a distribution over points of the support to an energy.

        Args:
            proposal: a normalized distribution with exact draws, on the energy's support.
            p: the energy.
        """
        target = EnergyPotential(p)
        return cls(target, DistributionStart(checked_proposal(proposal, p), target))

    def sample(self, num: int) -> Tensor:
        """Exact draws of the start, shape ``(num * targets, dim)``."""
        return self.start.sample(num)

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """The potentials of start and target."""
        return self.start(z), self.target(z)

    def combine(self, *parts: Tensor) -> Tensor:
        """Their mean with weights 1 - beta and beta."""
        u_start, u_target = parts
        return self._weighted(1 - self.beta, u_start) + self._weighted(self.beta, u_target)

    def gradients(self, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The potentials of start and target, and their gradients."""
        (u_start, g_start), (u_target, g_target) = (
            part.value_and_grad(z) for part in (self.start, self.target)
        )
        return (u_start, u_target), (g_start, g_target)


class TemperedPath(AnnealingPath):
    r"""The path :math:`\tilde p_\beta = e^{-\beta E}` from the uniform density on a finite set.

    Args:
        target: the potential of a discrete energy without a base. Where it knows blocks at every
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
        self.start = uniform(target)
        states = math.log(len(self.start.support_values)) * self.start.log_probs.shape[1]
        super().__init__(target, states)
        if target.blocks is not None and target.blocks.supports_tempering:
            self.blocks = target.blocks

    def sample(self, num: int) -> Tensor:
        """Uniform states, shape ``(num * targets, dim)``."""
        return self.start.sample(num)

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """The potential of the target."""
        return (self.target(z),)

    def gradients(self, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The potential of the target, and its gradient."""
        value, grad = self.target.value_and_grad(z)
        return (value,), (grad,)

    def combine(self, *parts: Tensor) -> Tensor:
        """Its energy times beta."""
        return self._weighted(self.beta, parts[0])

    def gibbs_noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a block sweep of positions ``(chains, dim)``."""
        return self.target.gibbs_noise(z)

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions ``(chains, dim)`` after each block was resampled given the rest."""
        own = self.beta.to(z.dtype).expand(len(z))
        return self.target.gibbs_sweep(z, noise, own if beta is None else own * beta)


__all__ = ["AnnealingPath", "GeometricPath", "Known", "TemperedPath"]
