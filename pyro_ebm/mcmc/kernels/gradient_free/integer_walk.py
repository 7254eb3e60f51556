r"""A random walk on whole numbers: counts of a Poisson or negative binomial distribution.

A Gaussian jump :math:`w = s L \xi` becomes one of whole numbers, in one coordinate chosen at
random,

.. math:: \operatorname{sign}(w_i) \, (1 + \lfloor |w_i| \rfloor),

or, every other time, rounded in all of them, unless these are all 0. The law of a jump is symmetric
and does not depend on where the chain is: :math:`q(z' \mid z) = q(z \mid z')`. The first alone
reaches every state, the second follows what is correlated. Outside of the support nothing is
accepted.
"""

import copy

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.gradient_free.proposals import Proposal, RandomWalk, optimal_scale
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.models.sites.site import Site

_LARGEST = 1e6


class IntegerWalk(RandomWalk):
    r"""Moves sites of whole numbers: ``Poisson``, ``Geometric``, ``NegativeBinomial``, ...

    The scale :math:`s` adapts to an acceptance of 0.234 (0.44 in one dimension), which jumps of 1
    may fall short of, so that it stays above a fifth of its default; the shape :math:`L L^\top`
    adapts to the covariance of the draws.

    Args:
        scale: the (first) scale :math:`s`; by default :math:`2.38 / \sqrt{dim}`.

    Raises:
        ValueError: for a scale that is not positive and finite, or (when run) for sites of other
            values.

    Example:
        >>> from pyro_ebm.mcmc import MCMC, MHKernel
        >>> def model(y):
        ...     n = pyro.sample("n", dist.Poisson(20.0))
        ...     pyro.sample("y", dist.Binomial(n, 0.3), obs=y)
        >>> mcmc = MCMC(MHKernel(model, proposal=IntegerWalk()), 1000, num_chains=50,
        ...     disable_progbar=True)
        >>> mcmc.run(torch.tensor(5.0))
        >>> mcmc.get_samples()["n"].mean()  # 5 + 20 (1 - .3) = 19
        tensor(1...)
    """

    discrete = True
    _low: Tensor
    _high: Tensor

    def moves(self, site: Site) -> bool:
        """Whether the site holds whole numbers, without a bound or one after another."""
        support_values = site.support_values
        if support_values is None or support_values.shape[1] != 1:
            return False
        between = support_values[1:] - support_values[:-1]
        return bool((between == 1).all() and (support_values == support_values.round()).all())

    def bind(self, potential: Potential) -> Proposal:
        """This walk within the bounds of a potential's sites."""
        new, low, high = copy.copy(self), [], []
        for site, size in zip(potential.sites, potential.sizes, strict=True):
            assert site.support_values is not None
            bounds = (-torch.inf, torch.inf) if site.is_unbounded else site.support_values.aminmax()
            for ends, bound in zip((low, high), bounds, strict=True):
                ends += [float(bound)] * size
        new._low, new._high = (
            torch.tensor(ends, dtype=potential.dtype, device=potential.device)
            for ends in (low, high)
        )
        return new

    def scale_of(self, z: Tensor) -> Tensor | float:
        """The scale of a jump."""
        scale, default = super().scale_of(z), optimal_scale(z.shape[-1])
        return scale.clamp(default / 5, _LARGEST) if isinstance(scale, Tensor) else scale

    def sample(self, z: Tensor) -> Tensor:
        """Positions a jump of whole numbers away."""
        w = self.jump(z)
        one = torch.randint(z.shape[1], (z.shape[0], 1), device=z.device)
        alone = (w.sign() * (1 + w.abs().floor())).gather(1, one)
        jump = torch.zeros_like(z).scatter(1, one, alone)
        if z.shape[1] > 1:
            every = w.round()
            chosen = (torch.rand_like(z[:, :1]) < 0.5) & every.any(-1, keepdim=True)
            jump = torch.where(chosen, every, jump)
        new = z + jump
        # a walk that would leave known bounds stays: values beyond them may be indices of nothing
        inside = ((new >= self._low) & (new <= self._high)).all(-1, keepdim=True)
        return torch.where(inside, new, z)
