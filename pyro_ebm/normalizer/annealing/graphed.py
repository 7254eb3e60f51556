r"""Annealing by graphs: one temperature, with its weight and its transition, as one function.

With a kernel that runs as a graph (:mod:`pyro_ebm.mcmc.engine.engine`), what happens at a
temperature is captured as a whole: the change of the potential that goes into the weight, the
gradient at the new :math:`\beta`, combined from what is known where the chains are, the proposal,
and its acceptance. The graph reads :math:`\beta` from the path's tensor, so that one serves all
temperatures; the random numbers are drawn outside, and are those of a run without graphs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.state import State
from pyro_ebm.normalizer.annealing.path import AnnealingPath, Known
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule
from pyro_ebm.ops.steps.metropolis import select

Parts = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""What the potential is made of where the chains are, and its gradients."""


class GraphedAnnealing:
    """What annealing does at a temperature, as a graph.

    Args:
        path: the densities.
        kernel: bound to the path, with ``jit_compile``.
        planned: how many transitions to expect.
    """

    def __init__(self, path: AnnealingPath, kernel: Kernel, planned: int):
        self.path, self.kernel = path, kernel
        self.engine = Engine(
            self.leap,
            kernel.jit_compile,
            kernel._engine.state,
            kernel.ignore_jit_warnings,
            planned,
        )

    @classmethod
    def of(cls, path: AnnealingPath, kernel: Kernel, planned: int) -> "GraphedAnnealing | None":
        """The graphs of a kernel on a path, those of an earlier run among them.

        None if it asks for none, could not be captured, or does more than one transition.
        """
        blocks = isinstance(kernel, GibbsKernel) and path.blocks is not None
        plain = type(kernel).evaluate is Kernel.evaluate and kernel.compiled_fn == kernel.transition
        if not kernel.jit_compile or not plain or not (blocks or type(kernel).move is Kernel.move):
            return None
        kept = path.graphed
        if not isinstance(kept, cls) or kept.kernel is not kernel:
            kept = path.graphed = cls(path, kernel, planned)
        return kept if kept.engine.jit_compile else None

    def run(
        self,
        schedule: TemperatureSchedule,
        z: Tensor,
        betas: Sequence[float],
        num_steps: int,
        bar: Iterable[float],
    ) -> Tensor | None:
        """The log weights of chains, shape ``(chains,)``, as of a run without graphs.

        None if chains ended a transition neither where they were nor where they were evaluated
        last, so that what is known there is not true.

        Args:
            schedule: the kernel's settings at each temperature.
            z: exact draws at the first temperature, shape ``(chains, dim)``.
            betas: the temperatures.
            num_steps: transitions at each.
            bar: the temperatures but the first, as they are to be gone through.
        """
        path, kernel = self.path, self.kernel
        path.at(betas[0])
        z = z.contiguous()
        known = self._known(z)
        potential = self._potential(z, known)
        log_w = torch.zeros_like(potential)
        astray = torch.zeros_like(potential, dtype=torch.bool)
        for beta in bar:
            path.at(beta)
            last = beta == betas[-1]
            fall = potential - self._potential(z, known) if last else torch.zeros_like(potential)
            schedule.set(kernel, beta)
            for step in range(0 if last else num_steps):
                draws = kernel.draw(State(z, potential, None))
                z, potential, known, change, away = self.engine(z, potential, known, draws)
                fall, astray = change if step == 0 else fall, astray | away
            # log w += log p~_{t}(z) - log p~_{t-1}(z) = U_{t-1}(z) - U_t(z),
            # and a weight of 0 stays 0, wherever the chain goes
            log_w = torch.where(log_w == -torch.inf, log_w, log_w + fall)
        return None if astray.any() else log_w

    def leap(
        self, z: Tensor, potential: Tensor, known: Parts | None, draws: Any
    ) -> tuple[Any, ...]:
        """One transition at the present temperature.

        Args:
            z: positions, shape ``(chains, dim)``.
            potential: their potential before, shape ``(chains,)``.
            known: what is known there.
            draws: the kernel's.

        Returns:
            The same three after it; by how much the potential fell when the temperature changed;
            and whether what is known is not true of all chains.
        """
        path, kernel = self.path, self.kernel
        if known is None:
            here = kernel.evaluate(z)
        else:
            grad = path.combine(*known[1]) if kernel.needs_grad else None
            here = State(z, path.combine(*known[0]), grad)
        path.know(None if known is None else Known(z, known[0], known[1] or None))
        new, _ = kernel.transition(here, *draws)
        change, last = potential - here.potential, path.know(None)
        if known is None:
            return new.z, new.potential, None, change, torch.zeros_like(change, dtype=torch.bool)
        assert last is not None
        moved = (new.z == last.z).all(-1)
        now = last.parts, last.grads or ()
        known = tuple(  # pyright: ignore[reportAssignmentType]
            tuple(select(moved, new, old) for new, old in zip(*pair, strict=True))
            for pair in zip(now, known, strict=True)
        )
        return new.z, new.potential, known, change, ~(moved | (new.z == z).all(-1))

    def _known(self, z: Tensor) -> Parts | None:
        if self.kernel.needs_grad:
            return self.path.gradients(z)
        with torch.no_grad():
            return self.path.parts(z), ()

    def _potential(self, z: Tensor, known: Parts | None) -> Tensor:
        with torch.no_grad():
            return self.path(z) if known is None else self.path.combine(*known[0])


__all__ = ["GraphedAnnealing"]
