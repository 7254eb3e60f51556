"""The base of every kernel: a transition of a batch of chains, on any potential."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.metric import FullMass
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.engine.engine import Engine, JitCompile
from pyro_ebm.mcmc.kernels.accept import choose
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State, to_device
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.settings import HasSettings


class Kernel(HasSettings, ABC):
    r"""A Markov chain Monte Carlo kernel on flat positions ``(chains, dim)``.

    A run calls :meth:`bind` with a potential, :meth:`init` with the first positions, and
    :meth:`step` as often as it likes. A new kernel subclasses
    :class:`~pyro_ebm.mcmc.TransitionKernel`, which does most of it.

    The arguments of the constructor are the kernel's *settings*; ``repr``, :meth:`copy` and
    checkpoints read them there. What a run leaves on a kernel has a name that begins with an
    underscore and a default on the class: such attributes are dropped by the next :meth:`bind`,
    and neither copied nor pickled.
    """

    needs_grad = True
    """Whether a state holds the gradient of the potential."""
    discrete = False
    """Whether it moves discrete sites; they are then not summed out."""
    samples_intractable = False
    """Whether it moves the sites on which an unknown log Z depends (in a composite, no others)."""
    learns_from_gradients = True
    """Whether warmup sees the gradients, and learns the mass matrix from them too."""
    checks_potential = True
    """Whether ``init`` may take its time to see that the potential suits the kernel."""
    max_divergences: float = 0.05
    """Which share of diverging transitions is harmless: more of them are a finding of a run."""
    temperature: float = 1.0
    """T: the target is the density to the power of 1 / T."""
    planned_steps: int | None = None
    """How many transitions are to come, which a run says: for ``jit_compile="auto"``."""
    starts_together: int = 1
    """How many chains, one after another, start at the same point: those of a super-chain."""
    starts_anew: bool = False
    """Whether a chain that is stranded in the warmup may start anew, where the potential draws."""
    adapt_step_size: bool = False
    adapt_mass_matrix: bool = False
    full_mass: FullMass = False
    jit_compile: JitCompile = False
    ignore_jit_warnings: bool = False
    saved: tuple[str, ...] = ("_steps",)
    """The attributes that a checkpoint holds: values, or objects with a ``state_dict``."""
    _potential: Potential | None = None
    _engine: Engine | None = None
    _steps = 0
    _warmup_steps = 0

    @property
    def potential(self) -> Potential:
        """The potential that is sampled; set by :meth:`bind`."""
        if self._potential is None:
            raise RuntimeError(f"{type(self).__name__} is not bound to a potential: call setup")
        return self._potential

    @property
    def engine(self) -> Engine | None:
        """Runs the transition, perhaps as a graph; None for a kernel that is made of others."""
        return self._engine

    @property
    @abstractmethod
    def adaptation(self) -> Adaptation:
        """The step size and mass matrix that warmup adapts; set by :meth:`bind`."""

    @property
    def step_size(self) -> Tensor | float:
        """The step size of each target, ``(targets,)``; of each chain early in the warmup."""
        return self.adaptation.step_size

    @property
    def mean_step_size(self) -> float:
        """The mean of the step sizes of all targets."""
        return float(torch.as_tensor(self.step_size).mean())

    @property
    def parts(self) -> "tuple[Kernel, ...]":
        """The kernels that it is made of, if it is."""
        return ()

    @property
    def blocks(self) -> "Sequence[Kernel]":
        """The bound kernels that move, each its own sites: itself, or those that take turns."""
        return (self,)

    def turns(self, state: State) -> "Iterator[tuple[Kernel, State, Info]]":
        """One transition of all chains, as :meth:`step` makes it, kernel by kernel.

        Args:
            state: where the chains are.

        Yields:
            Each of :attr:`blocks`, the state after its transition, and what that has told.
        """
        state, info = self.step(state)
        yield self, state, info

    @property
    def extra_fields(self) -> dict[str, Tensor]:
        """Further statistics of the last transition, each of shape ``()`` or ``(chains,)``."""
        return {}

    @property
    def learned(self) -> list[str]:
        """What the warmup has learned, in words."""
        return []

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the run that it made, beside what the draws show."""
        return []

    @property
    def causes(self) -> list[Finding]:
        """Why its chains may not agree: findings where they do not, and nothing wrong elsewhere."""
        return []

    @property
    def notes(self) -> list[str]:
        """What a reader of a summary of its draws is to know of them, whatever they are."""
        return []

    @property
    def always_graphs(self) -> bool:
        """Whether transitions are to run as graphs however few they are."""
        return self.jit_compile not in (False, "auto")

    def check(self, potential: Potential) -> None:
        """Raises a ValueError if the potential has sites that the kernel does not move."""

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential and forgets everything learned on another.

        Args:
            potential: what to sample.
            warmup_steps: how many of the coming steps adapt the kernel.

        Raises:
            ValueError: if the potential has sites that the kernel does not move.
        """
        self.check(potential)
        for name in [name for name in vars(self) if name.startswith("_")]:
            delattr(self, name)
        self._potential, self._warmup_steps = potential, warmup_steps

    @abstractmethod
    def init(self, z: Tensor) -> State:
        """The state at the first positions, shape ``(chains, dim)``."""

    def evaluate(self, z: Tensor) -> State:
        """The state at the positions ``z``, shape ``(chains, dim)``."""
        if self.needs_grad:
            return State(z, *self.potential.value_and_grad(z))
        with torch.no_grad():
            return State(z, self.potential(z), None)

    @abstractmethod
    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what warmup learns from it."""

    def steps(self, state: State, n: int) -> tuple[State, State, list[Info]]:
        """So many transitions in a row, at least one, between which no parameter changes.

        Returns:
            The states before the last transition and after it, and what each has told.
        """
        before, infos = state, []
        for _ in range(n):
            before, (state, info) = state, self.step(state)
            infos.append(info)
        return before, state, infos

    def placed(self, state: State, new: State, chosen: Tensor) -> State:
        """The state with some chains elsewhere, put there by another kernel.

        Args:
            state: where the chains are.
            new: other positions, with potentials, and gradients if states have them.
            chosen: which chains are put there, boolean, shape ``(chains,)``.
        """
        return choose(chosen, new, state)

    def check_graphs(self) -> None:
        """Compares the graphs that run for the model with the model as it is.

        Raises:
            GraphError: if they give other values, since the model reads something that has changed.
        """
        if self._engine is not None:
            self._engine.check()

    def state_dict(self) -> Saved:
        """What was learned and counted since :meth:`bind`, for :meth:`load_state_dict`.

        Numbers, strings, tensors, and dicts and lists of them: the attributes of :attr:`saved`. A
        kernel that keeps more between transitions adds to these.
        """
        values = {name.removeprefix("_"): getattr(self, name) for name in self.saved}
        found = {k: x.state_dict() if hasattr(x, "state_dict") else x for k, x in values.items()}
        engine = self._engine
        if engine is None:
            return found
        return {**found, "calls": engine.calls, "compiles": engine.compiles}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another kernel was, after :meth:`bind` to the same potential.

        Args:
            state: its :meth:`state_dict`; tensors may be on another device.
        """
        if self._engine is not None:  # older files do not have the calls
            self._engine.calls, self._engine.made = state.get("calls", 0), state["steps"]
            self._engine.compiles = state.get("compiles", False)
        for name in self.saved:
            value, saved = getattr(self, name), state[name.removeprefix("_")]
            if hasattr(value, "load_state_dict") and saved is not None:
                value.load_state_dict(saved)
            else:
                setattr(self, name, to_device(saved, self.potential.device))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __repr__(self) -> str:
        learned = f" [learned {', '.join(self.learned)}]" if self.learned else ""
        return super().__repr__() + learned


def checked_kernel(value: object) -> Kernel:
    """The value, if it is a kernel of this package; else raises a TypeError."""
    if isinstance(value, Kernel):
        return value
    raise TypeError(
        f"kernel must be a pyro_ebm.mcmc.Kernel, such as LangevinKernel(), got {shown(value)}"
    )


def refuse_temperature(kernel: Kernel, why: str) -> None:
    """Refuses a kernel that samples at another temperature than 1, or is made of such ones.

    Args:
        kernel: any kernel.
        why: the reason, as it ends the error's sentence.

    Raises:
        ValueError: names the kernel, its temperature, and the reason.
    """
    for part in (kernel, *kernel.parts):
        if part.temperature != 1:
            name = type(part).__name__
            raise ValueError(f"{name} has temperature={part.temperature}, but {why}: leave it at 1")
