r"""The path of machines with hidden units: every density on it is such a machine.

Let the start draw the visible units from a product :math:`q`, of coins or of Gaussians, and the
hidden units from fair coins, independently of them. The geometric path between that and the joint
density of a machine, with the hidden units summed out, is

.. math:: \tilde p_\beta(x) = q(x)^{1 - \beta} \sum_z e^{-\beta E(x, z)}
          = q(x)^{1 - \beta}\, e^{\beta v(x)} \prod_j \big(1 + e^{\beta a_j(x)}\big),

where :math:`a(x)` are the log-odds of the hidden units and :math:`v(x)` is what of :math:`-E`
depends on :math:`x` alone. At each :math:`\beta` the layers are independent given each other, and
the sweep :math:`x \to z \to x` leaves :math:`\tilde p_\beta` invariant. :math:`Z_0 = 2^m`.

Salakhutdinov and Murray's *base-rate* machine is this start with :math:`q` at the frequencies of
the data.

Reference:
    Salakhutdinov and Murray (2008), On the quantitative analysis of deep belief networks.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal

from pyro_ebm.distributions.boltzmann.bipartite import TwoLayers, dot, softplus
from pyro_ebm.distributions.boltzmann.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.boltzmann.rbm import RBM
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.starts import WIDTH


class LayersPath(AnnealingPath):
    """From independent visible units to an :class:`~pyro_ebm.distributions.RBM`, or a Gaussian one.

    Args:
        target: the potential of the machine.
        loc: log-odds of the visible bits at the start, or means of real units, shape
            ``(*batch, n)``.
        scale: of real units at the start, their standard deviations, shape ``(*batch, n)``.

    Example:
        >>> p = RBM(torch.randn(6, 3), torch.zeros(6), torch.zeros(3))
        >>> path = LayersPath(EnergyPotential(p), torch.zeros(6))
        >>> x = path.sample(10)
        >>> torch.allclose(path.at(1.0)(x), p.free_energy(x))
        True
    """

    def __init__(self, target: EnergyPotential, loc: Tensor, scale: Tensor | None = None):
        machine = target.energy
        assert isinstance(machine, RBM | GaussianRBM)
        super().__init__(target, machine.num_hidden * math.log(2.0))
        self.machine, self.loc, self.scale = machine, loc, scale
        self.blocks = target.blocks
        if scale is None:
            units = Bernoulli(logits=loc, validate_args=False)
        else:
            units = Normal(loc, scale, validate_args=False)
        self.visible = Independent(units, 1).expand(machine.batch_shape)

    @classmethod
    def fitted(cls, target: EnergyPotential, x: Tensor) -> "LayersPath":
        """From visible units with the frequencies, or the means and deviations, of points.

        Args:
            target: the potential of the machine.
            x: points, shape ``(num, *batch, n)``.
        """
        if isinstance(target.energy, RBM):
            # the log-odds of the frequencies, half a count added to each
            ones = x.sum(0)
            return cls(target, ((ones + 0.5) / (len(x) - ones + 0.5)).log())
        scale = WIDTH * x.std(0)
        own = target.energy.scale if isinstance(target.energy, GaussianRBM) else scale
        return cls(target, x.mean(0), torch.where(scale > 0, scale, own))

    @classmethod
    def suits(cls, p: object) -> bool:
        """Whether an energy is a machine that this path leads to."""
        return isinstance(p, RBM | GaussianRBM) and isinstance(p, TwoLayers)

    @classmethod
    def starting_at(cls, proposal: object, target: EnergyPotential) -> "LayersPath | None":
        """The path from a product of Bernoulli, or normal, distributions; None from another."""
        inner = proposal.base_dist if isinstance(proposal, Independent) else None
        if isinstance(target.energy, RBM) and isinstance(inner, Bernoulli):
            return cls(target, inner.logits)
        if isinstance(target.energy, GaussianRBM) and isinstance(inner, Normal):
            return cls(target, inner.loc, inner.scale)
        return None

    def sample(self, num: int) -> Tensor:
        """Exact draws of the start, shape ``(num * targets, dim)``."""
        return self.visible.sample(torch.Size((num,))).reshape(-1, self.dim)

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """The log density of the start, :math:`v(x)`, and the hidden log-odds."""
        x = self._points(z)
        if isinstance(self.machine, GaussianRBM):
            units = (x - self.machine.visible_bias) / self.machine.scale
            visible, start = -units.square().sum(-1) / 2, self.visible.log_prob(x)
        else:
            visible = dot(x, self.machine.visible_bias)
            start = dot(x, self.loc) - softplus(self.loc).sum(-1)
        hidden = self.machine.hidden_logits(x)
        return start.reshape(-1), visible.reshape(-1), hidden.reshape(len(z), -1)

    def combine(self, *parts: Tensor) -> Tensor:
        r"""Minus the log of :math:`\tilde p_\beta`."""
        log_start, visible, hidden = parts
        beta = self.beta
        return -((1 - beta) * log_start + beta * visible + softplus(beta * hidden).sum(-1))

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions after the hidden units, then the visible ones, were drawn anew."""
        machine, own = self.machine, self.beta
        u_hidden, visible = noise
        known = self.here  # the log-odds of hidden units where the chains are
        if known is not None and known.z is z:
            logits = known.parts.values[2].reshape(u_hidden.shape)
        else:
            logits = machine.hidden_logits(self._points(z))
        hidden = (u_hidden < (own * logits).sigmoid()).to(logits.dtype)
        if isinstance(machine, GaussianRBM):
            assert self.scale is not None
            # q(x)^(1-b) e^(-b E(x, z)) is Gaussian: precisions add up, means weighted by them
            start, end = (1 - own) / self.scale.square(), own / machine.scale.square()
            mean = start * self.loc + end * machine.visible_mean(hidden)
            new = mean / (start + end) + visible / (start + end).sqrt()
        else:
            logits = (1 - own) * self.loc + own * machine.visible_logits(hidden)
            new = (visible < logits.sigmoid()).to(logits.dtype)
        return new.reshape(z.shape)

    def _points(self, z: Tensor) -> Tensor:
        x = z.reshape((-1,) + self.machine.batch_shape + self.machine.event_shape)
        return x.to(self.machine.weights.dtype)
