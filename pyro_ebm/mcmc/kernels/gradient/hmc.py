r"""Hamiltonian Monte Carlo for many chains, without a tree.

A transition draws a momentum :math:`p \sim N(0, I)`, follows Hamiltonian dynamics for a time
:math:`t` in leapfrog steps (:mod:`pyro_ebm.ops.steps.leapfrog`), and accepts where it ends,
:math:`(z', p')`, with probability

.. math:: \min\left(1,\ e^{H(z, p) - H(z', p')}\right), \qquad H = U(z) + \tfrac12 |p|^2 .

NUTS builds a tree to learn when each trajectory turns back, and a batch of chains waits for the
deepest one. Here all chains share the time :math:`t`, a different one in each transition, between 0
and a :math:`T` that warmup learns from what the chains do (:mod:`pyro_ebm.mcmc.adaptation.chees`).

Where the density is narrower than in most places, a step size that suits the most is too large for
leapfrog to be stable, and a chain that comes there would stand still, unseen in the mean acceptance
of the others. So every third transition with an adapted step size takes twice as many steps of half
the size (a fixed cycle of kernels leaves the target invariant, as each of them does).

Reference:
    Duane, Kennedy, Pendleton and Roweth (1987), Hybrid Monte Carlo. Hoffman, Radul and Sountsov
    (2021), An adaptive MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo. Neal
    (2011), MCMC using Hamiltonian dynamics, section 4.2 (several step sizes).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.internals.lookup import Operation
from pyro_ebm.mcmc.adaptation.chees import TrajectoryAdaptation, van_der_corput
from pyro_ebm.mcmc.kernels.accept import MAX_ENERGY_ERROR, choose, decide
from pyro_ebm.mcmc.kernels.transition import AdaptationSettings, TransitionKernel, check_positive
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.steps.leapfrog import drift, energy_change, kick
from pyro_ebm.ops.steps.metropolis import log_uniform
from pyro_ebm.ops.steps.precondition import Factor

MAX_EXPLORING = 256
"""The most leapfrog steps of a trajectory that brings chains in."""
HALVED_EVERY = 3
"""Of so many transitions one takes steps of half the size. No multiple of 2, by whose powers the
lengths of trajectories go round."""


class ChEESKernel(TransitionKernel):
    r"""Hamiltonian Monte Carlo, with a trajectory length that all chains share and learn.

    The step size adapts to ``target_accept_prob``, the mass matrix to positions and gradients,
    and the trajectory length to the ChEES criterion (:mod:`pyro_ebm.mcmc.adaptation.chees`), all
    pooled over the chains. It works with one chain, and learns faster with many; after warmup
    nothing changes any more. A transition is as many gradients as ``n_steps`` says, two thirds of
    ``trajectory_length / step_size`` in the mean: every third one takes steps of half an adapted
    size, for places where the density is narrow.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        step_size: the length :math:`h` of a leapfrog step, in units of :math:`L`, the first one
            when it is adapted. (A Langevin step of length :math:`\varepsilon` is one of
            :math:`h = \sqrt{2 \varepsilon}`.)
        trajectory_length: the longest time :math:`T` of a trajectory, in units of :math:`L`; when
            adapted, it starts from two steps, and goes on from this once :math:`L` is known. 2 is
            about the best on a standard normal.
        adapt_trajectory_length: whether warmup adapts :math:`T`.
        target_accept_prob: mean acceptance probability to adapt to.
        max_steps: the most leapfrog steps of one trajectory.
        **kwargs: ``adapt_step_size``, ``adapt_mass_matrix``, ``full_mass``, ``jit_compile`` (of a
            leapfrog step), ``ignore_jit_warnings``, ``transforms``, ``max_plate_nesting`` and
            ``init_strategy`` of :class:`~pyro_ebm.mcmc.TransitionKernel`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> from pyro_ebm import MCMC
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        >>> mcmc = MCMC(ChEESKernel(model), 200, num_chains=50, disable_progbar=True)
        >>> mcmc.run(torch.full((3,), 2.0))
        >>> x = mcmc.get_samples()["x"]  # the posterior is N(1, 1/2)
        >>> bool((x.mean() - 1).abs() < 0.02), bool((x.var() - 0.5).abs() < 0.02)
        (True, True)
        >>> bool(mcmc.get_extra_fields()["n_steps"].float().mean() < 4)
        True
    """

    max_divergences = 0.005
    saved = (*TransitionKernel.saved, "_trajectory", "_most_steps", "_explores")
    _trajectory: TrajectoryAdaptation | None = None
    _most_steps: list[float] | None = None
    _explores: bool | None = None
    _num_steps: Tensor | None = None

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 0.1,
        trajectory_length: float = 2.0,
        adapt_trajectory_length: bool = True,
        target_accept_prob: float = 0.8,
        max_steps: int = 1000,
        **kwargs: Unpack[AdaptationSettings],
    ):
        check_positive("trajectory_length", trajectory_length)
        super().__init__(
            model, potential_fn, step_size, target_accept_prob=target_accept_prob, **kwargs
        )
        self.first_trajectory_length = float(trajectory_length)
        self.adapt_trajectory_length = adapt_trajectory_length
        self.max_steps = check_count("max_steps", max_steps)

    # -- the mathematics -----------------------------------------------------------------------

    def draw(self, state: State) -> tuple[Tensor, Factor | None, Tensor, Tensor, Sequence[int]]:
        """Step size, inverse mass matrix, momentum, uniform, and each target's number of steps."""
        return (
            self.step_size_of(state),
            self.inverse_mass_sqrt,
            torch.randn_like(state.z),
            log_uniform(state.potential),
            self._draw_num_steps(),
        )

    def transition(
        self,
        state: State,
        step_size: Tensor,
        inverse_mass_sqrt: Factor | None,
        momentum: Tensor,
        log_u: Tensor,
        num_steps: Sequence[int],
    ) -> tuple[State, Info]:
        """A trajectory, and the acceptance or rejection of its end."""
        end, _, accepted, info = self.trajectory(
            state, step_size, inverse_mass_sqrt, momentum, log_u, num_steps
        )
        return choose(accepted, end, state), info

    def trajectory(
        self,
        state: State,
        step_size: Tensor,
        inverse_mass_sqrt: Factor | None,
        momentum: Tensor,
        log_u: Tensor,
        num_steps: Sequence[int],
    ) -> tuple[State, Tensor, Tensor, Info]:
        r"""Follows a trajectory, and decides whether its end is accepted.

        Args:
            state: where it starts.
            step_size: :math:`h`, shape ``(chains, 1)``.
            inverse_mass_sqrt: :math:`L` of the inverse mass matrix.
            momentum: the momentum that it starts with, shape ``(chains, dim)``.
            log_u: :math:`\log u` of the acceptance, shape ``(chains,)``.
            num_steps: how many leapfrog steps the chains of each target make.

        Returns:
            The state and the momentum at the end, whether it is accepted, and its statistics.
        """
        most, end = max(num_steps), (state, momentum)
        first = self.adaptation.lenient(state.potential)
        fixed = inverse_mass_sqrt, first, momentum, log_u
        if min(num_steps) == most and self._engine is not None:
            return self._engine.iterate(most, end, step_size, *fixed)
        counts = _of_chains(num_steps, state)[:, None]
        found: Any = None
        for i in range(most):
            # a step of size 0 stands still, as chains do that have arrived before the others
            found = self.run_fn(*end, torch.where(i < counts, step_size, 0.0), *fixed)
            end = found[:2]
        return found

    def leap(
        self,
        state: State,
        momentum: Tensor,
        step_size: Tensor,
        inverse_mass_sqrt: Factor | None,
        first_potential: Tensor,
        first_momentum: Tensor,
        log_u: Tensor,
    ) -> tuple[State, Tensor, Tensor, Info]:
        """A leapfrog step, and the acceptance or rejection of the trajectory if it ends there.

        One graph holds both. The acceptance is a few numbers for each chain and costs little; a
        graph of its own would have to be compiled too.

        Args:
            state: where the step starts.
            momentum: the momentum there.
            step_size: as for :meth:`trajectory`.
            inverse_mass_sqrt: as for :meth:`trajectory`.
            first_potential: the potential where the trajectory started, shape ``(chains,)``.
            first_momentum: the momentum there, shape ``(chains, dim)``.
            log_u: as for :meth:`trajectory`.
        """
        assert state.grad is not None
        momentum = kick(momentum, state.grad, step_size / 2, inverse_mass_sqrt)
        state = self.evaluate(drift(state.z, momentum, step_size, inverse_mass_sqrt))
        assert state.grad is not None
        momentum = kick(momentum, state.grad, step_size / 2, inverse_mass_sqrt)
        change = energy_change(first_potential, first_momentum, state.potential, momentum)
        #   p(z') N(p')     exp(-U(z') - |p'|^2 / 2)
        #   -----------  =  ------------------------
        #   p(z)  N(p)      exp(-U(z)  - |p|^2  / 2)
        # where a gradient is not finite, neither are the momentum and the ratio
        end = state._replace(grad=None)
        accepted, info = decide(end, -change, log_u, MAX_ENERGY_ERROR)
        return state, momentum, accepted, info

    @property
    def compiled_fn(self) -> Operation:
        """One leapfrog step with its acceptance, however many a transition makes."""
        return self.leap

    # -- what warmup learns ----------------------------------------------------------------------

    @property
    def trajectory_length(self) -> Tensor | float:
        """The longest time :math:`T`, shape ``(targets,)``; before setup, the first."""
        if self._trajectory is None:
            return self.first_trajectory_length
        return self._trajectory.length

    @property
    def extra_fields(self) -> dict[str, Tensor]:
        """The number of leapfrog steps."""
        return {} if self._num_steps is None else {"n_steps": self._num_steps}

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential and starts the adaptation, see :meth:`Kernel.bind`."""
        super().bind(potential, warmup_steps)
        like = self.adaptation.step_size
        length = torch.full_like(like, self.first_trajectory_length)
        self._trajectory = TrajectoryAdaptation(length, potential.dim)

    def init(self, z: Tensor) -> State:
        """The state at the first positions; a length that is learned starts from two steps."""
        state = super().init(z)
        if self._learns:
            self._learner.start(2 * self.adaptation.typical_step_size())
        self._most_steps = None  # it was counted in steps of the first size
        return state

    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what warmup learns from it."""
        active, learns, old = self.adaptation.active, self._learns, self.inverse_mass_sqrt
        state, info = super().step(state)
        new = self.inverse_mass_sqrt
        if learns and new is not old:
            usual = self.first_trajectory_length
            explored, self._explores = self._explores, self.adaptation.exploring
            if old is None or new is None or explored is None or (explored and not self._explores):
                self._learner.start(torch.full_like(self._learner.length, usual))
            else:
                self._learner.remeasure(old, new, usual)
        if learns and not self.adaptation.active:
            self._learner.finish()
        if active:
            self._most_steps = None
        return state, info

    def move(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what the trajectory length learns from it."""
        step_size, inverse_mass_sqrt, momentum, log_u, num_steps = self.draw(state)
        if self._halves_steps:
            step_size, num_steps = step_size / 2, [min(2 * n, self.max_steps) for n in num_steps]
        end, end_momentum, accepted, info = self.trajectory(
            state, step_size, inverse_mass_sqrt, momentum, log_u, num_steps
        )
        self._num_steps = _of_chains(num_steps, state)
        if self._learns:
            population, exploring = self.adaptation.population, self.adaptation.exploring
            most = min(self.max_steps, MAX_EXPLORING) if exploring else self.max_steps
            weight = info.accept_prob
            if not exploring:  # until then, long trajectories are to bring in those that are out
                weight = weight * population.inside(state.z)
            self._learner.update(
                state,
                end,
                end_momentum,
                self._num_steps * step_size[:, 0],
                weight,
                inverse_mass_sqrt,
                most * self.adaptation.typical_step_size(),
                population,
            )
        return choose(accepted, end, state), info

    def trial(self, state: State) -> tuple[State, Info]:
        """A trajectory of one step, to find a first step size."""
        step_size, inverse_mass_sqrt, momentum, log_u, num_steps = self.draw(state)
        one = [1] * len(num_steps)
        return self.transition(state, step_size, inverse_mass_sqrt, momentum, log_u, one)

    @property
    def learned(self) -> list[str]:
        """The step size, the kind of the mass matrix and the trajectory length."""
        found = super().learned
        if found and self.adapt_trajectory_length:
            found.append(f"trajectory_length={float(self._learner.length.mean()):.3g}")
        return found

    @property
    def _learner(self) -> TrajectoryAdaptation:
        if self._trajectory is None:
            raise RuntimeError("ChEESKernel is not bound to a potential: call setup")
        return self._trajectory

    @property
    def _halves_steps(self) -> bool:
        """Whether this transition takes twice as many steps of half the size."""
        shared = self.adapt_step_size and not self.adaptation.own_step_sizes
        return shared and self._steps % HALVED_EVERY == HALVED_EVERY - 1

    @property
    def _learns(self) -> bool:
        return self.adapt_trajectory_length and self.adaptation.active

    def _draw_num_steps(self) -> list[int]:
        most = self._most_steps
        if most is None:  # reads numbers from the device: in each warmup step, and once after
            ratio = self._learner.length / self.adaptation.typical_step_size()
            most = self._most_steps = ratio.clamp(max=self.max_steps).tolist()
        fraction = van_der_corput(self._steps + 1)
        return [max(1, math.ceil(fraction * m)) for m in most]


def _of_chains(num_steps: Sequence[int], state: State) -> Tensor:
    """The number of steps of each chain, shape ``(chains,)``, given that of each target."""
    chains, device = state.z.shape[0], state.z.device
    if len(num_steps) == 1:  # filled on the device, where a list would be copied to it
        return torch.full((chains,), num_steps[0], device=device)
    return torch.tensor(num_steps, device=device).repeat(chains // len(num_steps))
