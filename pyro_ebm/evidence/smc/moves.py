r"""The moves at a temperature: a kernel that is tuned to the population, until it has moved enough.

The population itself says what the kernel needs: its positions and gradients are the mass matrix
(:mod:`pyro_ebm.mcmc.adaptation.metric`), and after each transition the step size goes where the
mean acceptance of all particles comes nearer to the kernel's target.

After resampling many particles are copies. Transitions are repeated until the particles have
forgotten where they were: until the correlation of each coordinate, and of the potential, with its
value before the first of them is below .4, or falls no more. (Far modes do not mix, and the mean
position of a particle stays that of its mode however long it moves. That is what the weights are
for; within a mode the potential says whether the particles have moved.)

Reference:
    Fearnhead and Taylor (2013), An adaptive sequential Monte Carlo sampler. Buchholz, Chopin and
    Jacob (2021), Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.evidence.smc.particles import ess_share
from pyro_ebm.mcmc.adaptation.metric import first_factor, new_window
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.composed.composite import BlockPotential
from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.state import State

FORGOTTEN = 0.4
"""A correlation with the start from which on it is forgotten."""
STALLED = 0.95
"""It falls no more if two transitions leave this share of it."""
MIN_MOVES, MAX_MOVES = 3, 50
FIRST_MOVES = 15
"""Transitions at the first temperature, which find the step size."""


class Moved(NamedTuple):
    """What the transitions at a temperature did."""

    state: State
    moves: int
    acceptance: float
    """The mean acceptance probability of the kernel that accepts least, at the last transition."""
    correlation: float
    """The correlation of the potential with its start that was left."""


class Mover:
    """Moves a population at one temperature after another.

    Args:
        kernel: bound to the path, without a warmup.
        ranks: share out the particles.
        num_moves: how many transitions to make at a temperature; None until enough.
    """

    def __init__(self, kernel: Kernel, ranks: ProcessGroup, num_moves: int | None):
        self.kernel, self.ranks, self.num_moves = kernel, ranks, num_moves
        for block in kernel.blocks:
            if block.adapt_mass_matrix and (dim := block.potential.dim):
                adaptation, like = block.adaptation, block.potential
                ones = torch.ones(1, dim, dtype=like.dtype, device=like.device)
                adaptation.inverse_mass_sqrt = first_factor(adaptation.kind, ones)

    def __call__(self, z: Tensor, log_w: Tensor, first: bool) -> Moved:
        """Tunes the kernel to weighted particles, and moves them.

        Args:
            z: positions of those here, shape ``(here, dim)``.
            log_w: their log weights, shape ``(here,)``.
            first: whether the step size is yet to be found.
        """
        kernel = self.kernel
        state = kernel.init(z)
        self._learn_metric(state, log_w)
        wanted = self.num_moves
        least, most = (
            (wanted, wanted) if wanted else (FIRST_MOVES if first else MIN_MOVES, MAX_MOVES)
        )
        start, history = self._features(state), []
        moves, lowest = 0, 1.0
        while moves < most:
            lowest = 1.0
            turns = list(kernel.turns(state))
            for block, _, info in turns:
                rate = block.adaptation.pooled(info.accept_prob)
                lowest = min(lowest, float(rate))
                if block.adapt_step_size:
                    gap = rate - block.adaptation.target_accept_prob
                    factor = (2 / (1 + moves) ** 0.5 * gap).exp()
                    block.adaptation.step_size = block.adaptation.step_size * factor
            state, moves = turns[-1][1], moves + 1
            history.append(self._correlation(start, self._features(state)))
            if moves >= least and self._enough(history):
                break
        return Moved(state, moves, lowest, float(history[-1][-1]) if history else 0.0)

    def _learn_metric(self, state: State, log_w: Tensor) -> None:
        whole = self.ranks.rows(log_w)
        # as many positions as the particles are worth
        num_effective = ess_share(whole) * len(whole)
        weight = num_effective * whole.softmax(0)[self.ranks.here(len(whole))]
        for block in self.kernel.blocks:
            potential, adaptation = block.potential, block.adaptation
            if not block.adapt_mass_matrix or not potential.dim:
                continue
            here = state
            if isinstance(potential, BlockPotential):
                potential.hold(state.z)
                here = block.evaluate(state.z[:, potential.columns])
            window = new_window(adaptation.kind, 1, potential.dim, 1)
            window.add(here.z, here.grad if block.learns_from_gradients else None, weight)
            assert adaptation.inverse_mass_sqrt is not None
            adaptation.inverse_mass_sqrt = window.factor(adaptation.inverse_mass_sqrt, self.ranks)

    def _features(self, state: State) -> Tensor:
        """What is to be forgotten: positions and potentials, shape ``(here, dim + 1)``."""
        return torch.cat([state.z, state.potential[:, None]], -1).double()

    def _correlation(self, a: Tensor, b: Tensor) -> Tensor:
        """Of each feature; 0 where one does not vary, shape ``(dim + 1,)``."""
        mean = self.ranks.mean
        a, b = a - mean(a), b - mean(b)
        size = (mean(a.square()) * mean(b.square())).sqrt()
        found = mean(a * b) / size
        return torch.where((size > 0) & found.isfinite(), found, 0.0)

    def _enough(self, history: list[Tensor]) -> bool:
        """Whether each feature is forgotten, or is not being forgotten any more."""
        done = history[-1] < FORGOTTEN
        if len(history) > 2:
            done |= history[-1] > STALLED * history[-3]
        return bool(done.all())
