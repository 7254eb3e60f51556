r"""Proposals of the Metropolis-Hastings algorithm.

A proposal is a small class: how to draw :math:`z' \sim q(\cdot \mid z)`, and, unless it is
symmetric, the log density :math:`\log q(z' \mid z)`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.core.supports import as_function
from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.mcmc.kernels.transition import check_positive
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.models.sites.site import Site
from pyro_ebm.ops.arguments import check_mapping
from pyro_ebm.ops.settings import HasSettings
from pyro_ebm.ops.steps.precondition import Factor, precondition


class Proposal(HasSettings, ABC):
    r"""A proposal :math:`q(z' \mid z)` on flat unconstrained positions ``(chains, dim)``.

    A new one writes :meth:`sample`, and either :meth:`log_prob` or ``symmetric = True``. One that
    reads the adapted step size and covariance also sets ``adaptive = True`` and overrides
    :meth:`adapted`; its attribute ``scale``, if it has one, is the first step size.

    Example:
        >>> class Laplace(Proposal):
        ...     symmetric = True
        ...     def sample(self, z):
        ...         return z + dist.Laplace(0.0, 0.5).sample(z.shape)
        >>> from pyro_ebm.mcmc import MHKernel
        >>> MHKernel(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), proposal=Laplace())
        MHKernel(<lambda>, proposal=Laplace())
    """

    symmetric = False
    r"""Whether :math:`q(z' \mid z) = q(z \mid z')`, so that no density is needed."""
    adaptive = False
    """Whether it reads the adapted step size and covariance."""
    discrete = False
    """Whether it moves discrete sites."""
    scale: float | None = None
    """The first step size of an adaptive one; by default that of a random walk."""

    @abstractmethod
    def sample(self, z: Tensor) -> Tensor:
        """New positions, of the shape ``(chains, dim)`` of ``z``."""

    def log_prob(self, new: Tensor, old: Tensor) -> Tensor:
        r"""The log density :math:`\log q(new \mid old)`, shape ``(chains,)``."""
        raise NotImplementedError

    def adapted(self, step_size: Tensor, inverse_mass_sqrt: Factor | None) -> "Proposal":
        """This proposal with the adapted scale ``(chains, 1)`` and factor of the covariance."""
        return self

    def bind(self, potential: Potential) -> "Proposal":
        """This proposal for the sites of a potential."""
        return self

    def moves(self, site: Site) -> bool:
        """Whether it moves sites like this one."""
        return (site.support_values is not None) == self.discrete and not site.is_unbounded

    @property
    def has_density(self) -> bool:
        """Whether ``log_prob`` is there to be called."""
        return type(self).log_prob is not Proposal.log_prob


def optimal_scale(dim: int) -> float:
    r"""The scale :math:`2.38 / \sqrt{dim}` of the best random walk, in units of the target's."""
    return 2.38 / max(dim, 1) ** 0.5


class RandomWalk(Proposal):
    r"""A Gaussian random walk :math:`z' = z + s L \xi`, with :math:`\xi \sim N(0, I)`.

    The scale :math:`s` adapts to an acceptance of 0.234 (0.44 in one dimension), the shape
    :math:`L L^\top` to the covariance of the draws.

    Args:
        scale: the (first) scale :math:`s`; by default :math:`2.38 / \sqrt{dim}`.

    Raises:
        ValueError: for a scale that is not positive and finite.

    Reference:
        Roberts, Gelman and Gilks (1997), Weak convergence and optimal scaling of random walk
        Metropolis algorithms.

    Example:
        >>> from pyro_ebm import MCMC, MHKernel
        >>> p = UnnormalizedEnergy(lambda x: x**2 / 2)
        >>> kernel = MHKernel(p, proposal=RandomWalk(scale=1.0))
        >>> mcmc = MCMC(kernel, 200, num_chains=20, disable_progbar=True)
        >>> mcmc.run()
        >>> bool(0.2 < mcmc.get_extra_fields()["acceptance_rate"].mean() < 0.8)
        True
    """

    symmetric = True
    adaptive = True
    _adapted: Tensor | None = None
    _factor: Factor | None = None

    def __init__(self, scale: float | None = None):
        if scale is not None:
            check_positive("scale", scale)
        self.scale = scale

    def sample(self, z: Tensor) -> Tensor:
        r"""Positions :math:`z + s L \xi`."""
        return z + self.jump(z)

    def jump(self, z: Tensor) -> Tensor:
        r"""The jumps :math:`s L \xi`."""
        return self.scale_of(z) * precondition(self._factor, torch.randn_like(z))

    def scale_of(self, z: Tensor) -> Tensor | float:
        """The scale: the adapted one of each chain, or the first."""
        if self._adapted is not None:
            return self._adapted
        return optimal_scale(z.shape[-1]) if self.scale is None else self.scale

    def adapted(self, step_size: Tensor, inverse_mass_sqrt: Factor | None) -> "RandomWalk":
        """A walk of this scale and shape."""
        new = copy.copy(self)
        new._adapted, new._factor = step_size, inverse_mass_sqrt
        return new


class Independence(Proposal):
    r"""A proposal that ignores where the chain is: :math:`q(z' \mid z) = q(z')`.

    It should have heavier tails than the target, or chains stick where it has too little mass.

    Args:
        distribution: either one distribution over the flat *unconstrained* position (event shape
            ``(dim,)``; any Pyro, torch or zuko flow distribution with ``sample`` and
            ``log_prob``), or a dict from site names to distributions over the site's *constrained*
            value (as in a guide), each with the site's batch and event shape.

    Raises:
        ValueError: if names or shapes do not fit the model.

    Example:
        >>> from pyro_ebm.mcmc import MHKernel
        >>> def model():
        ...     return pyro.sample("scale", dist.Gamma(2.0, 1.0))
        >>> q = Independence({"scale": dist.LogNormal(0.0, 1.5)})
        >>> kernel = MHKernel(model, proposal=q)
    """

    _potential: Potential | None = None

    def __init__(self, distribution: Distribution | Mapping[str, Distribution]):
        whole = isinstance(distribution, Distribution)
        if not whole and not isinstance(distribution, Mapping):
            raise ValueError(
                f"the distribution of a proposal must be one, or a dict of them by site, got"
                f" {distribution!r}"
            )
        if not whole:
            name = "the distribution of a proposal"
            check_mapping(name, distribution, Distribution, "distributions")
        self.distribution = distribution

    def bind(self, potential: Potential) -> "Independence":
        """This proposal, if its names and shapes fit the sites."""
        q = self.distribution
        if isinstance(q, Mapping):
            if q.keys() != set(potential.names):
                raise ValueError(
                    f"the proposal has distributions at the sites {sorted(q)}, the model has"
                    f" {sorted(potential.names)}"
                )
            zero = torch.zeros(potential.dim, dtype=potential.dtype, device=potential.device)
            values = potential.constrain(zero)
            for name, value in values.items():
                got = q[name].batch_shape + q[name].event_shape
                if got != value.shape:
                    raise ValueError(
                        f"the proposal of site {name!r} has shape {tuple(got)}, the site has"
                        f" {tuple(value.shape)}"
                    )
        elif q.event_shape != (potential.dim,) or q.batch_shape:
            raise ValueError(
                f"the distribution of a proposal must have batch_shape=() and event_shape="
                f"({potential.dim},), the flat position, got {tuple(q.batch_shape)} and"
                f" {tuple(q.event_shape)}"
            )
        # a chain may stand where q has no density: that is a ratio of 0, not an error
        new = copy.copy(self)
        mapping = isinstance(q, Mapping)
        new.distribution = {k: unvalidated(v) for k, v in q.items()} if mapping else unvalidated(q)
        new._potential = potential
        return new

    def sample(self, z: Tensor) -> Tensor:
        """Draws of the distribution, one for each chain."""
        n, q, potential = z.shape[:1], self.distribution, self._potential
        if not isinstance(q, Mapping):
            return q.sample(n)
        assert potential is not None
        # a transform of one tensor gives one
        maps = {name: as_function(potential.transforms[name]) for name in q}
        drawn = {name: maps[name](p.sample(n)) for name, p in q.items()}
        return potential.ravel(drawn)

    def log_prob(self, new: Tensor, old: Tensor) -> Tensor:
        r"""The log density :math:`\log q(new)` on the unconstrained space."""
        q, potential = self.distribution, self._potential
        if not isinstance(q, Mapping):
            return q.log_prob(new)
        assert potential is not None
        # q(z) = q(x(z)) |dx/dz|, and the transform maps x to z
        total = new.new_zeros(new.shape[0])
        unconstrained = potential.unravel(new)
        for name, x in potential.constrain(new).items():
            jacobian = potential.transforms[name].log_abs_det_jacobian(x, unconstrained[name])
            for term, sign in ((q[name].log_prob(x), 1), (jacobian, -1)):
                total = total + sign * term.reshape(new.shape[0], -1).sum(-1)
        return total
