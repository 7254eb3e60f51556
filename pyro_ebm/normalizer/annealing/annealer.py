r"""The loop of annealing: at each temperature a weight, and a transition.

Whatever happens at a temperature is one function of tensors: the change of the potential, which
goes into the weight; the gradient at the new :math:`\beta`, combined from the parts that are known
where the chains are; the proposal; and its acceptance. An
:class:`~pyro_ebm.mcmc.engine.engine.Engine` runs it as it is, or, for a kernel with
``jit_compile``, as one graph. The graph reads :math:`\beta` from the path's tensor, so that one
serves all temperatures, and random numbers are drawn outside: both ways give the same weights.
"""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.mcmc.engine.graph_guards import Dependencies
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.transition import TransitionKernel
from pyro_ebm.mcmc.potentials.base import NUM_REPEATED
from pyro_ebm.mcmc.state import State
from pyro_ebm.models.checks.fixed_density import check_repeats
from pyro_ebm.normalizer.annealing.function_path import FunctionPath
from pyro_ebm.normalizer.annealing.path import AnnealingPath, Known, Parts
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule
from pyro_ebm.ops.steps.metropolis import select


class Leap(NamedTuple):
    """What one transition leads to."""

    state: State
    known: Parts | None
    """The parts of the potential where the chains are now, where they are remembered."""
    fall: Tensor
    """By how much the potential fell when the temperature changed, shape ``(chains,)``."""
    unsure: Tensor | None
    """Whether ``known`` is not true of all chains, shape ``()``; None if it is."""


class Annealer:
    """Takes chains along a path, from its first temperature to its last or back.

    Args:
        path: the densities.
        kernel: bound to the path.
        schedule: the temperatures, and the kernel's settings at each.
        num_steps: transitions at each temperature.

    Example:
        >>> from pyro_ebm.mcmc import LangevinKernel
        >>> from pyro_ebm.normalizer import GeometricPath
        >>> p = UnnormalizedEnergy(lambda x: 2 * x**2)
        >>> path, kernel = GeometricPath.between(dist.Normal(0.0, 1.0), p), LangevinKernel()
        >>> kernel.bind(path, warmup_steps=0)
        >>> schedule = TemperatureSchedule([], torch.linspace(0, 1, 20).tolist())
        >>> log_w = Annealer(path, kernel, schedule).run(path.draw(1000))
        >>> bool((log_w.exp().mean() - (torch.pi / 2) ** 0.5).abs() < 0.1)
        True
    """

    def __init__(
        self,
        path: AnnealingPath,
        kernel: Kernel,
        schedule: TemperatureSchedule,
        num_steps: int = 1,
    ):
        self.path, self.kernel, self.schedule, self.num_steps = path, kernel, schedule, num_steps
        self.single = kernel if _moves_once(kernel, path) else None
        self.engine = Engine(
            self.leap,
            self.single is not None and not isinstance(path, FunctionPath) and kernel.jit_compile,
            Dependencies(path),
            kernel.ignore_jit_warnings,
            planned=num_steps * (len(schedule.betas) - 2),
        )
        # inside a graph of the kernel's own, evaluations of the path leave no trace
        as_graph = any(part.always_graphs for part in (kernel, *kernel.parts))
        own_graph = as_graph and self.single is None
        self.remembers = type(kernel).evaluate is Kernel.evaluate and not own_graph

    def run(self, z: Tensor, reverse: bool = False, disable_progbar: bool = True) -> Tensor:
        r"""The log weights of chains, shape ``(chains,)``.

        Args:
            z: exact draws at the first temperature, shape ``(chains, dim)``.
            reverse: whether that is the target's, and the last one the start's.
            disable_progbar: whether to show no progress.

        Raises:
            ValueError: if the energy is random: it gives other values at the same points.
        """
        path, kernel = self.path, self.kernel
        betas = self.schedule.betas[::-1] if reverse else self.schedule.betas
        with torch.no_grad():
            some = z[: NUM_REPEATED * path.targets]
            check_repeats(lambda: (path.at(1.0)(some),), lambda: "the energy")
        path.at(betas[0])
        kernel.init(z)
        z = z.contiguous()
        known = self._look(z)
        state = State(z, self._potential(z, known), None)
        log_w = torch.zeros_like(state.potential)
        name = "anneal in reverse" if reverse else "anneal"
        label = f"{name}, {len(z)} chain{'s' * (len(z) > 1)}"
        with tqdm(betas[1:], disable=disable_progbar, desc=label, delay=1.0) as bar:
            for beta in bar:
                path.at(beta)
                if beta == betas[-1]:
                    fall = state.potential - self._potential(state.z, known)
                else:
                    self.schedule.set(kernel, beta)
                    state, known, fall = self._move(state, known)
                # log w += log p~_{t}(z) - log p~_{t-1}(z) = U_{t-1}(z) - U_t(z),
                # and a weight of 0 stays 0, wherever the chain goes
                log_w = torch.where(log_w == -torch.inf, log_w, log_w + fall)
        self.engine.check()
        path.here = path.last = None
        return log_w

    def _move(self, state: State, known: Parts | None) -> tuple[State, Parts | None, Tensor]:
        """The chains after the transitions at a new temperature, and the fall of the potential."""
        falls = []
        for step in range(self.num_steps):
            draws = self.single.draw(state) if self.single else ()
            again = known is None and step > 0  # the state is one of this temperature already
            old = state if again else state._replace(grad=None)
            state, known, fall, unsure = self.engine(old, known, again, draws)
            falls.append(fall)
            if known is None or (unsure is not None and unsure):
                known = self._look(state.z)
        return state, known, falls[0]

    def leap(
        self, state: State, known: Parts | None, again: bool, draws: tuple[object, ...]
    ) -> Leap:
        """One transition at the present temperature.

        Args:
            state: of chains at the temperature before, or ``again`` at this one.
            known: the parts of the potential there, where they are remembered.
            again: whether the state need not be evaluated anew.
            draws: the kernel's random numbers.
        """
        path, kernel, z = self.path, self.kernel, state.z
        if again:
            here = state
        elif known is None:
            here = kernel.evaluate(z)
        else:
            grad = path.combine(*known.grads) if kernel.needs_grad else None
            here = State(z, path.combine(*known.values), grad)
        path.here = None if known is None else Known(z, known)
        path.last = None
        new, _ = self.single.transition(here, *draws) if self.single else kernel.step(here)
        fall, last = state.potential - here.potential, path.last
        if known is None or last is None or last.z.shape != z.shape:
            return Leap(new, None, fall, None)
        if len(last.parts.grads) < len(known.grads):
            return Leap(new, None, fall, None)
        # a kernel that is made of others may know gradients where it needs none
        after = Parts(last.parts.values, last.parts.grads[: len(known.grads)])
        # a chain is where the path was evaluated last, or, rejected, where it was before
        moved = (new.z == last.z).all(-1)
        if not self.engine.uses_graphs and moved.all():  # no branch for a graph
            return Leap(new, after, fall, None)
        unsure = ~(moved | (new.z == z).all(-1)).all()
        parts = (
            tuple(select(moved, *pair) for pair in zip(there, before, strict=True))
            for there, before in zip(after, known, strict=True)
        )
        return Leap(new, Parts(*parts), fall, unsure)

    def _look(self, z: Tensor) -> Parts | None:
        """The parts of the potential at positions, with gradients where the kernel needs them."""
        if not self.remembers:
            return None
        if self.kernel.needs_grad:
            found = self.path.gradients(z)
            return None if found is None else Parts(*found)
        with torch.no_grad():
            return Parts(self.path.parts(z), ())

    def _potential(self, z: Tensor, known: Parts | None) -> Tensor:
        with torch.no_grad():
            return self.path(z) if known is None else self.path.combine(*known.values)


def _moves_once(kernel: Kernel, path: AnnealingPath) -> TypeGuard[TransitionKernel]:
    """Whether a step of a kernel is its transition, and not several of them."""
    blocks = isinstance(kernel, GibbsKernel) and path.blocks is not None
    return (
        isinstance(kernel, TransitionKernel)
        and type(kernel).evaluate is Kernel.evaluate
        and kernel.compiled_fn == kernel.transition
        and (blocks or type(kernel).move is TransitionKernel.move)
    )
