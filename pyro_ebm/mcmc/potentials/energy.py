"""An energy by itself as a potential: no model around it, all chains in one call."""

import math
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

from pyro_ebm.distributions.checks.boundary import check_inside
from pyro_ebm.distributions.checks.rows import check_function
from pyro_ebm.distributions.core.discrete import BlockGibbs
from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.singular import nan_where_singular
from pyro_ebm.models.sites.discrete_sites import nearest_inside, site_support_values
from pyro_ebm.models.sites.joint_start import JointStart
from pyro_ebm.models.sites.site import Site
from pyro_ebm.ops.eval_mode import eval_mode

CHAINS_COMPARED = 8


class EnergyPotential(Potential):
    r"""The potential of an energy, all chains in one call of the energy.

    There are ``chains_per_group`` x ``batch_shape`` chains; each batch element is a group.

    Args:
        energy: the distribution.
        name: what to call its site.
        like: a point of the support, of the dtype and device wanted; else one is drawn.
        targets: number of groups, where the batch elements should share their adaptation.
        joint_start: has draws of the site, where chains should not start at draws of the energy.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x, support=dist.constraints.positive)
        >>> EnergyPotential(p)(torch.zeros(1, 1))  # E(exp z) - z
        tensor([1.])
    """

    def __init__(
        self,
        energy: UnnormalizedEnergy,
        name: str = "x",
        like: Tensor | None = None,
        targets: int | None = None,
        joint_start: JointStart | None = None,
    ):
        self.joint_start = joint_start
        self.energy: UnnormalizedEnergy = unvalidated(energy)
        start = energy.starting_points() if like is None else like
        support_values = site_support_values(name, energy)
        # the support of a discrete event is what it is: positions are its points, as numbers
        self.bijection: Any = (
            identity_transform if support_values is not None else biject_to(energy.support)
        )
        # of batch and event together: the bounds of a support may have the batch's shape
        shape = self.bijection.inverse_shape(energy.batch_shape + energy.event_shape)
        shape = torch.Size(shape[len(energy.batch_shape) :])
        site = Site(name, shape, start.dtype, self.bijection.inv, start.device, support_values)
        self._rows = max(energy.batch_shape.numel(), 1)
        super().__init__([site], targets=self._rows if targets is None else targets)
        if not start.is_floating_point():  # as precise as the energy
            self.dtype = torch.promote_types(self.dtype, energy.like.dtype)
        self.modules = energy.modules
        if isinstance(self.energy, BlockGibbs):
            self.blocks = self.energy

    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each chain, ``(chains, dim) -> (chains,)``, differentiable."""
        return nan_where_singular(lambda z: (self._value(z),), z, self._rows)[0]

    def _value(self, z: Tensor) -> Tensor:
        unconstrained = self._grouped(z)
        if unconstrained.shape[0] == 1:  # one chain per row: the energy is called at the rows
            unconstrained = unconstrained[0]
        x = self.bijection(unconstrained).to(self.sites[0].dtype)  # whole numbers may be indices
        inside = None
        if self.sites[0].is_unbounded:  # a proposal may lie beyond a bound
            inside = self.energy.support.check(x)
            x = nearest_inside(self.energy.support, x)
        # an energy may be made of distributions, which would raise at a far-out proposal
        with pyro.validation_enabled(False), eval_mode(self.modules):
            log_prob = self.energy.unnormalized_log_prob(x)
        if self.bijection is not identity_transform:
            jacobian = self.bijection.log_abs_det_jacobian(unconstrained, x)
            batch_dim = x.dim() - self.energy.event_dim
            log_prob = log_prob + jacobian.reshape(jacobian.shape[:batch_dim] + (-1,)).sum(-1)
        if inside is not None:
            log_prob = torch.where(inside, log_prob, -torch.inf)
        return -log_prob.reshape(-1).to(z.dtype)

    def initial(self, num_chains: int) -> Tensor:
        """Starting positions ``(num_chains, dim)``, drawn from the energy.

        Raises:
            ValueError: if chains influence each other, or none of 100 draws is a start.
        """
        z = super().initial(num_chains)
        some = z[: CHAINS_COMPARED * self._rows].detach()
        check_function(self, some, 1, self.modules, f"the energy {self.energy!r}", eval_mode=True)
        return z

    def gibbs_noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a block sweep of positions ``(chains, dim)``."""
        assert self.blocks is not None
        return self.blocks.gibbs_noise(self._grouped(z))

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions ``(chains, dim)`` after each block was resampled given the rest."""
        assert self.blocks is not None
        if beta is not None:
            beta = beta.reshape((-1,) + self.energy.batch_shape)
        return self.blocks.gibbs_sweep(self._grouped(z), noise, beta).reshape(z.shape)

    def to_position(self, x: Tensor) -> Tensor:
        """Positions ``(chains, dim)`` of points ``(n, *batch, *event)``."""
        z = self.bijection.inv(x)
        chains = math.prod(z.shape[: z.dim() - len(self.sites[0].shape)])
        return z.reshape(chains, self.dim).to(self.dtype)

    def inner_position(self, x: Tensor, what: str, otherwise: str | None = None) -> Tensor:
        """Positions ``(chains, dim)`` of points that must lie inside the support.

        Args:
            x: points ``(n, *batch, *event)``.
            what: names them, as in "the data at site 'x'".
            otherwise: another way out than to move them.

        Raises:
            ValueError: for points on the boundary, see
                :func:`~pyro_ebm.distributions.checks.boundary.check_inside`.
        """
        check_inside(self.energy.support, x, what, otherwise)
        return self.to_position(x)

    def to_points(self, z: Tensor) -> Tensor:
        """Points ``(n, *batch, *event)`` of positions ``(chains, dim)``."""
        return self.bijection(self._grouped(z)).to(self.sites[0].dtype)

    def _grouped(self, z: Tensor) -> Tensor:
        chains = math.prod(z.shape[:-1]) // self._rows
        return z.reshape((chains,) + self.energy.batch_shape + self.sites[0].shape)

    def random_part(self, z: Tensor) -> str:
        """What of a random potential is random at positions ``(chains, dim)``, in words."""
        return f"the energy of site {self.sites[0].name!r}"

    def _draw(self, num_chains: int) -> Tensor:
        if self.joint_start is not None:
            (site,) = self.sites
            self.joint_start.check_sites({site.name: self.energy})
            x = self.joint_start.draw(num_chains)[site.name].to(site.device, site.dtype)
            self.joint_start.check_values(site.name, x, self.energy.shape(), self.energy.support)
            return self.to_position(x)
        return self.to_position(self.energy.starting_points((num_chains // self._rows,)))
