r"""Kernels of one gradient a transition, whose chains come in by Hamiltonian trajectories.

A chain that starts far from the others has a long way to go, in steps of the size that fits where
it is. By steps of one gradient it diffuses, and needs as many as the square of the way is long; a
trajectory goes straight. So the warmup begins with the transitions of
:class:`~pyro_ebm.ChEESKernel`, which learn the mass matrix too, until no chain is out (or half of
the warmup is over). The rest of the warmup, and all draws, are made by the kernel itself.
"""

from typing import Any

from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.engine.engine import JitCompile
from pyro_ebm.mcmc.kernels.gradient.hmc import ChEESKernel
from pyro_ebm.mcmc.kernels.transition import TransitionKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State

LEAST_WARMUP = 100
"""Warmups of fewer transitions are the kernel's own."""
LEAST_EXPLORED = 18
"""The least number of transitions that are made by trajectories."""


class LocalKernel(TransitionKernel):
    """A kernel of one gradient a transition.

    Its arguments are those of :class:`~pyro_ebm.mcmc.TransitionKernel`.
    """

    saved = (*TransitionKernel.saved, "_explorer")
    _explorer: ChEESKernel | None = None

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential, see :meth:`Kernel.bind`."""
        super().bind(potential, warmup_steps)
        adaptation = self.adaptation
        adapts = adaptation.adapt_step_size and adaptation.adapt_mass_matrix
        explores = adapts and self.learns_from_gradients and self.temperature == 1
        if explores and warmup_steps >= LEAST_WARMUP:
            how: JitCompile = "capture" if self.jit_compile is True else self.jit_compile
            self._explorer = ChEESKernel(
                jit_compile=how, ignore_jit_warnings=self.ignore_jit_warnings
            )
            if self.planned_steps is not None:
                self._explorer.planned_steps = warmup_steps // 2
            self._explorer.starts_anew = self.starts_anew
            self._explorer.starts_together = self.starts_together
            self._explorer.bind(potential, warmup_steps)
            self._explorer.share(adaptation)

    def init(self, z: Tensor) -> State:
        """The state at the first positions, see :meth:`Kernel.init`."""
        if self._explorer is None:
            return super().init(z)
        return self._explorer.init(z)

    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what warmup learns from it."""
        explorer = self._explorer
        if explorer is None:
            return super().step(state)
        state, info = explorer.step(state)
        self._steps += 1
        if self._steps >= LEAST_EXPLORED and not self.adaptation.exploring:
            explorer.check_graphs()
            self._end_exploration()
            if self.adaptation.active:  # a Langevin step of length h^2 / 2 is a leapfrog one of h
                self.adaptation.restart(self.adaptation.step_size.square() / 2)
                self._find_step_size(state)
        return state, info

    def steps(self, state: State, n: int) -> tuple[State, State, list[Info]]:
        """So many transitions in a row, see :meth:`Kernel.steps`."""
        own = type(self).step is LocalKernel.step and type(self).move is TransitionKernel.move
        adapts = self.adaptation.active or self._explorer is not None
        if self._engine is None or adapts or not own or not self.potential.dim:
            return super().steps(state, n)
        before, state, infos = self._engine.chain(n, state, self._draw_next)
        self._engine.made = self._steps
        return before, state, infos

    def _draw_next(self, state: State) -> tuple[Any, ...]:
        draws = self.draw(state)
        self._steps += 1
        return draws

    def check_graphs(self) -> None:
        """Compares graphs with the model, those of the first trajectories too."""
        super().check_graphs()
        if self._explorer is not None:
            self._explorer.check_graphs()

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another kernel was, see :meth:`Kernel.load_state_dict`."""
        super().load_state_dict(state)
        if self._explorer is None:
            self._end_exploration()

    def _end_exploration(self) -> None:
        self._explorer = None
        self.adaptation.target_accept_prob = self.target_accept_prob
