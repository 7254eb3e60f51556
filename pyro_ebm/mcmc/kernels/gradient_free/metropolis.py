r"""The Metropolis-Hastings algorithm with any proposal.

A proposal is a small class: how to draw :math:`z' \sim q(\cdot \mid z)`, and, unless it is
symmetric, the log density :math:`\log q(z' \mid z)`. The kernel accepts with probability

.. math:: \min\left(1, \frac{p(z')\, q(z \mid z')}{p(z)\, q(z' \mid z)}\right).

Reference:
    Metropolis et al. (1953), Equation of state calculations by fast computing machines.
    Hastings (1970), Monte Carlo sampling methods using Markov chains and their applications.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.mcmc.engine.engine import JitCompile
from pyro_ebm.mcmc.kernels.base import Kernel, check_positive
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.models.sites.site import Site
from pyro_ebm.ops.arguments import check_mapping
from pyro_ebm.ops.steps.metropolis import log_uniform, metropolis_accept
from pyro_ebm.ops.steps.precondition import precondition


class Proposal(ABC):
    r"""A proposal :math:`q(z' \mid z)` on flat unconstrained positions ``(chains, dim)``.

    A new one writes :meth:`sample`, and either :meth:`log_prob` or ``symmetric = True``. One that
    reads the adapted step size and covariance also sets ``adaptive = True`` and overrides
    :meth:`adapted`; its attribute ``scale``, if it has one, is the first step size.

    Example:
        >>> class Laplace(Proposal):
        ...     symmetric = True
        ...     def sample(self, z):
        ...         return z + dist.Laplace(0.0, 0.5).sample(z.shape)
        >>> kernel = MHKernel(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), proposal=Laplace())
        >>> kernel
        MHKernel(<lambda>, proposal=Laplace)
    """

    symmetric = False
    adaptive = False
    discrete = False
    """Whether it moves discrete sites."""

    @abstractmethod
    def sample(self, z: Tensor) -> Tensor:
        """New positions, of the shape ``(chains, dim)`` of ``z``."""

    def log_prob(self, new: Tensor, old: Tensor) -> Tensor:
        r"""The log density :math:`\log q(new \mid old)`, shape ``(chains,)``."""
        raise NotImplementedError

    def adapted(self, step_size: Tensor, inverse_mass_sqrt: Tensor | None) -> "Proposal":
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
    """

    symmetric = True
    adaptive = True

    def __init__(self, scale: float | None = None):
        if scale is not None:
            check_positive("scale", scale)
        self.scale = scale
        self._adapted: Tensor | None = None
        self._factor: Tensor | None = None

    def sample(self, z: Tensor) -> Tensor:
        r"""Positions :math:`z + s L \xi`."""
        return z + self.scale_of(z) * precondition(self._factor, torch.randn_like(z))

    def scale_of(self, z: Tensor) -> Any:
        """The scale: the adapted one of each chain, or the first."""
        if self._adapted is not None:
            return self._adapted
        return optimal_scale(z.shape[-1]) if self.scale is None else self.scale

    def adapted(self, step_size: Tensor, inverse_mass_sqrt: Tensor | None) -> "RandomWalk":
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
        >>> def model():
        ...     return pyro.sample("scale", dist.Gamma(2.0, 1.0))
        >>> q = Independence({"scale": dist.LogNormal(0.0, 1.5)})
        >>> kernel = MHKernel(model, proposal=q)
    """

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
        self._potential: Potential | None = None

    def bind(self, potential: Potential) -> "Independence":
        """This proposal, if its names and shapes fit the sites."""
        q = self.distribution
        if isinstance(q, Mapping):
            if q.keys() != set(potential.names):
                raise ValueError(
                    f"the proposal has distributions at the sites {sorted(q)}, the model has"
                    f" {sorted(potential.names)}"
                )
            device = potential.device
            zero = torch.zeros(potential.dim, dtype=potential.dtype, device=device)
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
        transforms: dict[str, Any] = dict(potential.transforms)
        return potential.ravel({k: transforms[k](d.sample(n)) for k, d in q.items()})

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


class MHKernel(Kernel):
    r"""Metropolis-Hastings with a random walk, an independence proposal, or the user's own.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        proposal: a :class:`Proposal`; an adapted :class:`RandomWalk` by default. A distribution,
            or a dict of them, is taken as :class:`Independence`. Discrete sites are moved by
            :class:`~pyro_ebm.mcmc.Flip` or :class:`~pyro_ebm.mcmc.Swap`, whole numbers by
            :class:`~pyro_ebm.mcmc.IntegerWalk`.
        adapt_step_size: whether warmup adapts the scale of an adaptive proposal.
        adapt_mass_matrix: whether warmup adapts its shape.
        full_mass: whether the shape is a dense covariance (the default here) or a diagonal one.
        target_accept_prob: mean acceptance to adapt to; 0.234, or 0.44 in one dimension, by
            default.
        transforms: from the supports to the reals, where they should not be Pyro's.
        max_plate_nesting: as in Pyro's kernels.
        jit_compile: False, ``"capture"``, True or ``"auto"``: whether to run the transition as a
            graph, and whether to compile that (:mod:`pyro_ebm.mcmc.engine.engine`).
        ignore_jit_warnings: whether to silence warnings of the capture.
        init_strategy: where chains start, as in Pyro's kernels.

    Raises:
        ValueError: for a proposal that is neither symmetric nor has a density.

    Example:
        >>> from pyro_ebm import MCMC
        >>> def model():
        ...     return pyro.sample("p", dist.Beta(2.0, 6.0))
        >>> mcmc = MCMC(MHKernel(model), 500, num_chains=50, disable_progbar=True)
        >>> mcmc.run()
        >>> bool((mcmc.get_samples()["p"].mean() - 0.25).abs() < 0.02)
        True
    """

    needs_grad = False

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        proposal: Proposal | Distribution | Mapping[str, Distribution] | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool = True,
        target_accept_prob: float | None = None,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: JitCompile = False,
        ignore_jit_warnings: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if proposal is None:
            proposal = RandomWalk()
        elif isinstance(proposal, Distribution | Mapping):
            proposal = Independence(proposal)
        if not isinstance(proposal, Proposal):
            raise ValueError(
                f"proposal must be a Proposal, a distribution or a dict of distributions, got"
                f" {type(proposal).__name__}"
            )
        if not proposal.symmetric and not proposal.has_density:
            raise ValueError(
                f"the proposal {type(proposal).__name__} has no log_prob(new, old): write one, or"
                " set symmetric = True if q(new | old) = q(old | new)"
            )
        scale = getattr(proposal, "scale", None) if proposal.adaptive else None
        super().__init__(
            model=model,
            potential_fn=potential_fn,
            step_size=1.0 if scale is None else scale,
            adapt_step_size=adapt_step_size and proposal.adaptive,
            adapt_mass_matrix=adapt_mass_matrix and proposal.adaptive,
            full_mass=full_mass,
            target_accept_prob=0.234 if target_accept_prob is None else target_accept_prob,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            ignore_jit_warnings=ignore_jit_warnings,
            init_strategy=init_strategy,
        )
        self.proposal, self.discrete = proposal, proposal.discrete
        self._default_target = target_accept_prob is None
        self._default_scale = scale is None and proposal.adaptive

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """As every kernel; the default scale and target depend on the dimension."""
        super().bind(potential, warmup_steps)
        adaptation = self.adaptation
        if self._default_target and potential.dim == 1:
            adaptation.target_accept_prob = 0.44
        if self._default_scale:
            adaptation.restart(adaptation.step_size * optimal_scale(potential.dim))
        self._bound = self.proposal.bind(potential)

    def moves(self, site: Site) -> bool:
        """Whether its proposal does."""
        return self.proposal.moves(site)

    def _release(self) -> None:
        super()._release()
        self._bound: Proposal | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bound": None}

    def draw(self, state: State) -> tuple[Any, ...]:
        """The proposed positions, the log ratio of their densities, and the uniform."""
        assert self._bound is not None
        q = self._bound.adapted(self.step_size_of(state), self.inverse_mass_sqrt)
        new_z = q.sample(state.z)
        if new_z.shape != state.z.shape:
            raise ValueError(
                f"the proposal {type(q).__name__} must return positions of shape"
                f" {tuple(state.z.shape)}, got {tuple(new_z.shape)}"
            )
        #      q(z | z')
        # log ---------
        #      q(z' | z)
        log_q_ratio = torch.zeros_like(state.potential)
        if not q.symmetric:
            back, forth = q.log_prob(state.z, new_z), q.log_prob(new_z, state.z)
            for log_q in (back, forth):
                if log_q.shape != log_q_ratio.shape:
                    raise ValueError(
                        f"log_prob of the proposal {type(q).__name__} must have shape"
                        f" {tuple(log_q_ratio.shape)}, one density per chain, got"
                        f" {tuple(log_q.shape)}: sum over the last dimension"
                    )
            log_q_ratio = back - forth
        if q.discrete and q.adaptive:  # one that stays at its bounds has come to nothing
            log_q_ratio = log_q_ratio.masked_fill((new_z == state.z).all(-1), -torch.inf)
        return new_z.detach(), log_q_ratio.detach(), log_uniform(state.potential)

    def transition(
        self, state: State, new_z: Tensor, log_q_ratio: Tensor, log_u: Tensor
    ) -> tuple[State, Info]:
        """Accepts or rejects the proposals."""
        new = self.evaluate(new_z)
        #      p(z') q(z | z')
        # log ----------------  =  U(z) - U(z') + log q(z | z') - log q(z' | z)
        #      p(z)  q(z' | z)
        log_ratio = state.potential - new.potential + log_q_ratio
        valid = new.potential.isfinite() & ~log_ratio.isnan()
        accept_prob, accepted = metropolis_accept(log_ratio, valid, log_u)
        # a state of probability 0 is no accident on a discrete space
        diverging = ~valid & (new.potential != torch.inf) if self.discrete else ~valid
        return self.choose(accepted, new, state), Info(accept_prob, diverging)

    def __repr__(self) -> str:
        model = super().__repr__()[:-1]
        comma = "" if model.endswith("(") else ", "
        return f"{model}{comma}proposal={type(self.proposal).__name__})"
