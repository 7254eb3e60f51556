r"""A path that is given as a function from :math:`\beta` to an energy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.core.supports import same_support
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.proposals import Proposal, checked_proposal
from pyro_ebm.normalizer.starts import DistributionStart


class FunctionPath(AnnealingPath):
    r"""A path given as a function from :math:`\beta` to an energy.

    The function is called anew for each :math:`\beta`. At 0 it must have exact draws and a known
    :math:`\log Z_0`: those of ``proposal``, which it must then be proportional to, or of its
    ``base``, or its own ``exact_sample`` and ``exact_log_normalizer``.

    Args:
        function: from a tensor without dimensions to an energy on the target's support.
        target: the potential of the energy that it must lead to.
        proposal: the normalized distribution that it starts at.

    Raises:
        ValueError: if the function returns no such energies.

    Example:
        >>> def widen(beta):
        ...     return UnnormalizedEnergy(lambda x: x**2 / (2 + 6 * beta))
        >>> path = FunctionPath(widen, EnergyPotential(widen(1.0)), dist.Normal(0.0, 1.0))
        >>> path.log_normalizer
        tensor(0.9189)
    """

    def __init__(
        self,
        function: Callable[[Tensor], UnnormalizedEnergy],
        target: EnergyPotential,
        proposal: Proposal | None = None,
    ):
        super().__init__(target)
        self.function = function
        self.now = self._energy_at(0.0)
        self._start(self.now.energy, proposal)
        self._check_end()
        self.at(0.0)

    def at(self, beta: Tensor | float) -> "AnnealingPath":
        r"""This path, with the energy at :math:`\beta`."""
        super().at(beta)
        self.now = self._energy_at(beta)
        self.blocks = self.now.blocks
        return self

    def _energy_at(self, beta: Tensor | float) -> EnergyPotential:
        p, target = self.function(self.beta.detach().clone().fill_(beta)), self.of_energy.energy
        want = (target.batch_shape, target.event_shape)
        if (
            not isinstance(p, UnnormalizedEnergy)
            or (p.batch_shape, p.event_shape) != want
            or not same_support(p.support, target.support)
        ):
            raise ValueError(
                f"path must map beta to energies with the shapes and the support of {target!r}, and"
                f" at beta={float(beta):.3g} gave {p!r}"
            )
        like = torch.empty(0, dtype=self.sites[0].dtype, device=self.sites[0].device)
        return EnergyPotential(p, like=like)

    def _start(self, p: Any, proposal: Proposal | None) -> None:
        q = p.base if proposal is None else proposal
        if q is None:
            if not hasattr(p, "exact_sample"):
                raise ValueError(
                    f"a path must start at a density with a known log Z and exact draws, and {p!r}"
                    " has neither: give the normalized distribution that it starts at as proposal="
                )
            q = p.normalized(p.exact_log_normalizer())
        self.start = DistributionStart(q := checked_proposal(q, p), self.of_energy)
        with torch.no_grad():
            # log p~_0(x) = log q(x) + log Z_0
            z = self.start.sample(64)
            constant = (self.start(z) - self.now(z)).reshape(64, -1)
        spread = (constant - constant[0]).abs().amax(0)
        if not (spread <= 1e-3 * (1 + constant[0].abs())).all():
            raise ValueError(
                f"the path does not start at {type(q).__name__}: at beta=0 their log densities"
                f" differ by up to {float(spread.max()):.3g} nats and a constant. The start must be"
                " known exactly: give it as proposal="
            )
        batch = self.of_energy.energy.batch_shape
        self.log_normalizer = constant.double().mean(0).to(self.dtype).reshape(batch)

    def _check_end(self) -> None:
        end = self._energy_at(1.0)
        with torch.no_grad():
            z = self.start.sample(64)
            got, want = end(z), self.target(z)
        gap = torch.where(want.isfinite(), got - want, 0.0).abs()
        if not (gap <= 1e-3 * (1 + want.abs())).all():
            raise ValueError(
                "at beta=1 the path must be the energy whose log Z is estimated, constants"
                f" included, and differs from it by up to {float(gap.max()):.3g} nats"
            )

    def combine(self, *parts: Tensor) -> Tensor:
        """The potential of the present energy."""
        return self.now(parts[0])

    def gibbs_noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a block sweep of positions ``(chains, dim)``."""
        return self.now.gibbs_noise(z)

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions ``(chains, dim)`` after each block was resampled given the rest."""
        return self.now.gibbs_sweep(z, noise, beta)
