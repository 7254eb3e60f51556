r"""The Metropolis-Hastings algorithm with any proposal.

A proposal :math:`z' \sim q(\cdot \mid z)` (:mod:`pyro_ebm.mcmc.kernels.gradient_free.proposals`)
is accepted with probability

.. math:: \min\left(1, \frac{p(z')\, q(z \mid z')}{p(z)\, q(z' \mid z)}\right).

Reference:
    Metropolis et al. (1953), Equation of state calculations by fast computing machines.
    Hastings (1970), Monte Carlo sampling methods using Markov chains and their applications.
"""

from collections.abc import Callable, Mapping
from typing import Unpack

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.adaptation.metric import FullMass
from pyro_ebm.mcmc.kernels.accept import accept
from pyro_ebm.mcmc.kernels.gradient_free.proposals import (
    Independence,
    Proposal,
    RandomWalk,
    optimal_scale,
)
from pyro_ebm.mcmc.kernels.pyro_contract import ModelSettings
from pyro_ebm.mcmc.kernels.transition import TransitionKernel, TransitionSettings
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.models.sites.site import Site
from pyro_ebm.ops.steps.metropolis import log_uniform


class ProposalSettings(ModelSettings, total=False):
    """Settings of a kernel of proposals, but for those of its graph."""

    proposal: Proposal | Distribution | Mapping[str, Distribution] | None
    adapt_step_size: bool
    adapt_mass_matrix: bool
    full_mass: bool
    target_accept_prob: float | None


class MHKernel(TransitionKernel):
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
        **kwargs: ``jit_compile``, ``ignore_jit_warnings``, ``transforms``, ``max_plate_nesting``
            and ``init_strategy`` of :class:`~pyro_ebm.mcmc.TransitionKernel`.

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
    max_divergences = 1.0  # a proposal of density 0 is rejected, and no more
    _bound: Proposal | None = None

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        proposal: Proposal | Distribution | Mapping[str, Distribution] | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = "auto",
        target_accept_prob: float | None = None,
        **kwargs: Unpack[TransitionSettings],
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
        scale = proposal.scale if proposal.adaptive else None
        super().__init__(
            model,
            potential_fn,
            step_size=1.0 if scale is None else scale,
            adapt_step_size=adapt_step_size and proposal.adaptive,
            adapt_mass_matrix=adapt_mass_matrix and proposal.adaptive,
            full_mass=full_mass,
            target_accept_prob=0.234 if target_accept_prob is None else target_accept_prob,
            **kwargs,
        )
        self.proposal, self.discrete = proposal, proposal.discrete
        self.default_target = target_accept_prob is None
        self.default_scale = scale is None and proposal.adaptive

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential, on whose dimension the default scale and target depend."""
        super().bind(potential, warmup_steps)
        adaptation = self.adaptation
        if self.default_target and potential.dim == 1:
            adaptation.target_accept_prob = 0.44
        if self.default_scale:
            adaptation.restart(adaptation.step_size * optimal_scale(potential.dim))
        self._bound = self.proposal.bind(potential)

    def moves(self, site: Site) -> bool:
        """Whether its proposal moves sites like this one."""
        return self.proposal.moves(site)

    def draw(self, state: State) -> tuple[Tensor, ...]:
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
        if q.discrete and q.adaptive:  # a proposal to stay, at a bound, is a rejected one
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
        return accept(state, new, log_ratio, log_u, discrete=self.discrete)
