r"""Kernels as a pure transition, run as it is or as a graph, and adapted during warmup."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.internals.lookup import Operation
from pyro_ebm.mcmc.adaptation.metric import FullMass, check_full_mass, kind_of
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.engine.engine import Engine, JitCompile, check_jit_compile
from pyro_ebm.mcmc.engine.graph_guards import Dependencies
from pyro_ebm.mcmc.kernels.accept import choose
from pyro_ebm.mcmc.kernels.pyro_contract import DiscreteSettings, ModelSettings, PyroKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State, nothing_moved
from pyro_ebm.models.sites.site import Site
from pyro_ebm.ops.arguments import check_number
from pyro_ebm.ops.steps.precondition import Factor


class GraphSettings(DiscreteSettings, total=False):
    """Settings that every kernel of one transition takes."""

    jit_compile: JitCompile
    ignore_jit_warnings: bool


class TransitionSettings(ModelSettings, GraphSettings, total=False):
    """Settings that every such kernel of continuous sites takes."""


class AdaptationSettings(TransitionSettings, total=False):
    """Settings of the adaptation to these."""

    adapt_step_size: bool
    adapt_mass_matrix: bool
    full_mass: FullMass


class TransitionKernel(PyroKernel):
    r"""A kernel that is a pure transition, adapted during warmup.

    A new kernel says what a transition draws, and what it does with the draws. This class evaluates
    the potential, adapts the step size to ``target_accept_prob`` and the mass matrix to positions
    and gradients, keeps the statistics, and runs under Pyro. A whole kernel, the
    Metropolis algorithm with a Gaussian random walk:

    Example:
        >>> from pyro_ebm.mcmc import accept
        >>> from pyro_ebm.ops import log_uniform, precondition
        >>> class RandomWalk(TransitionKernel):
        ...     needs_grad = False
        ...     def draw(self, state):
        ...         step = self.step_size_of(state)
        ...         jump = step * precondition(self.inverse_mass_sqrt, torch.randn_like(state.z))
        ...         return state.z + jump, log_uniform(state.potential)
        ...     def transition(self, state, new_z, log_u):
        ...         new = self.evaluate(new_z)
        ...         #            p(z') / p(z) = exp(-U(z')) / exp(-U(z))
        ...         return accept(state, new, state.potential - new.potential, log_u)
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> from pyro.infer import MCMC
        >>> mcmc = MCMC(RandomWalk(model, target_accept_prob=0.44), 500, disable_progbar=True)
        >>> mcmc.run()
        >>> bool((mcmc.get_samples()["x"].mean() - 3).abs() < 0.5)
        True

    A constructor of its own passes on what it does not name: ``super().__init__(model, **kwargs)``.
    Without ``needs_grad = False`` on the class, ``state.grad`` holds the gradient of the potential.
    The transition may run as a graph: the step size, the mass matrix and all else that changes
    between steps come to it from ``draw``, as arguments; settings it may read off ``self``.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        step_size: the (first) step size.
        adapt_step_size: whether warmup adapts it.
        adapt_mass_matrix: whether warmup adapts the mass matrix; else it is the identity.
        full_mass: of which kind the mass matrix is: True is dense, False diagonal, ``"low_rank"``
            diagonal but for some directions, and ``"auto"`` dense up to 200 dimensions and low rank
            above (diagonal where there is a matrix for each of many targets). It is learned from
            positions and gradients (:mod:`pyro_ebm.mcmc.adaptation.fisher`), or, without
            gradients, from positions alone; then ``"auto"`` is diagonal above.
        target_accept_prob: the mean acceptance probability that the step size is adapted to.
        jit_compile: False, ``"capture"``, True or ``"auto"``: whether to run the transition as a
            graph, and whether to compile that, which takes seconds. ``"auto"`` does what pays, by
            the length of the run and the size of the graph (:mod:`pyro_ebm.mcmc.engine.engine`).
        ignore_jit_warnings: whether to silence warnings of the capture.
        **kwargs: ``transforms`` from the supports to the reals, where they should not be Pyro's;
            ``max_plate_nesting`` as in Pyro's kernels; ``init_strategy``, where chains start, as in
            Pyro's kernels, but by default uniformly between -1 and 1 on the unconstrained space
            (discrete sites start at a draw of their prior).

    Raises:
        ValueError: for an argument outside its range, or both a model and a ``potential_fn``.
    """

    MAX_STEP_SIZE: float | None = None
    """No step size is larger, adapted or given, if there is such a number."""
    saved = (*PyroKernel.saved, "_adaptation")
    _adaptation: Adaptation | None = None
    _repeated: tuple[Tensor, Tensor] | None = None  # step sizes of targets, and of their chains

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 0.1,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = "auto",
        target_accept_prob: float = 0.574,
        jit_compile: JitCompile = "auto",
        ignore_jit_warnings: bool = False,
        **kwargs: Unpack[ModelSettings],
    ):
        super().__init__(model, potential_fn, **kwargs)
        check_positive("step_size", step_size)
        check_jit_compile(jit_compile)
        check_number("target_accept_prob", target_accept_prob)
        if not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must lie in (0, 1), got {target_accept_prob}")
        self.first_step_size = float(step_size)
        self.adapt_step_size, self.adapt_mass_matrix = adapt_step_size, adapt_mass_matrix
        self.full_mass: FullMass = check_full_mass(full_mass, self.needs_grad)
        self.target_accept_prob = target_accept_prob
        self.jit_compile, self.ignore_jit_warnings = jit_compile, ignore_jit_warnings

    # -- the mathematics: what a new kernel writes ---------------------------------------------

    @abstractmethod
    def draw(self, state: State) -> tuple[Any, ...]:
        """Everything random or adapted that :meth:`transition` needs, drawn for all chains."""

    @abstractmethod
    def transition(self, state: State, *draws: Any) -> tuple[State, Info]:
        """The next state of all chains: a pure function of its arguments."""

    @property
    def compiled_fn(self) -> Operation:
        """The function that the engine runs: the transition, or the part of it that is repeated."""
        return self.transition

    # -- what it is written with ---------------------------------------------------------------

    @property
    def adaptation(self) -> Adaptation:
        """The step size and mass matrix; set by :meth:`bind`."""
        if self._adaptation is None:
            raise RuntimeError(f"{type(self).__name__} is not bound to a potential: call setup")
        return self._adaptation

    @property
    def inverse_mass_sqrt(self) -> Factor | None:
        """:math:`L` of the inverse mass matrix, see :mod:`pyro_ebm.ops.steps.precondition`."""
        return self.adaptation.inverse_mass_sqrt

    @property
    def step_size(self) -> Tensor | float:
        """The step size of each target, ``(targets,)``; before setup, the first."""
        return self.first_step_size if self._adaptation is None else self.adaptation.step_size

    def step_size_of(self, state: State) -> Tensor:
        """The step size of each chain, shape ``(chains, 1)``."""
        step_size, chains = self.adaptation.step_size, state.z.shape[0]
        known = self._repeated
        if known is None or known[0] is not step_size or len(known[1]) != chains:
            repeats = chains // step_size.shape[0]
            repeated = step_size if repeats == 1 else step_size.repeat(repeats)
            self._repeated = known = step_size, repeated[:, None]
        return known[1]

    # -- many chains ---------------------------------------------------------------------------

    def moves(self, site: Site) -> bool:
        """Whether it moves sites like this one."""
        return (site.support_values is not None) == self.discrete and not site.is_unbounded

    def check(self, potential: Potential) -> None:
        """Raises a ValueError if the potential has sites that the kernel does not move."""
        others = [site for site in potential.sites if not self.moves(site)]
        if names := [site.name for site in others if site.is_unbounded and self.discrete]:
            raise ValueError(
                f"{type(self).__name__} moves sites of finitely many values, and those of {names}"
                " are whole numbers without fixed bounds: use MHKernel(proposal=IntegerWalk()), in"
                " a CompositeKernel where a model has other sites too"
            )
        if names := [s.name for s in others if self.discrete and s.support_values is not None]:
            raise ValueError(
                f"{self!r} does not move sites of the values of {names}: use GibbsKernel, in a"
                " CompositeKernel where a model has other sites too"
            )
        if names := [site.name for site in others]:
            kind = "discrete" if self.discrete else "continuous"
            raise ValueError(
                f"{type(self).__name__} moves {kind} sites, and {names} are not: use"
                f" {'LangevinKernel' if self.discrete else 'GibbsKernel'}, or a"
                " CompositeKernel where a model has sites of both kinds"
            )

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential and makes the adaptation and the engine, see :meth:`Kernel.bind`."""
        super().bind(potential, warmup_steps)
        moves, has_grad = potential.dim > 0, self.needs_grad and self.learns_from_gradients
        full_mass = self.full_mass
        if full_mass == "auto" and self.needs_grad and not has_grad:
            full_mass = False
        self._adaptation = Adaptation(
            targets=potential.targets,
            dim=potential.dim,
            warmup_steps=warmup_steps,
            step_size=self.first_step_size,
            like=torch.empty(0, dtype=potential.dtype, device=potential.device),
            adapt_step_size=self.adapt_step_size and moves,
            adapt_mass_matrix=self.adapt_mass_matrix and moves,
            kind=kind_of(full_mass, potential.targets, potential.dim, has_grad),
            from_gradients=has_grad,
            target_accept_prob=self.target_accept_prob,
            max_step_size=self.MAX_STEP_SIZE,
        )
        self._engine = Engine(
            self.compiled_fn,
            self.jit_compile,
            Dependencies(potential),
            self.ignore_jit_warnings,
            self.planned_steps,
        )

    def share(self, adaptation: Adaptation) -> None:
        """Adapts, with the target of this kernel, what is another's."""
        adaptation.target_accept_prob = self.target_accept_prob
        self._adaptation = adaptation

    def init(self, z: Tensor) -> State:
        """The state at the first positions, shape ``(chains, dim)``; finds a first step size."""
        state = self.evaluate(z)
        if self.adaptation.adapt_step_size and self.adaptation.active:
            self.adaptation.start(z.shape[0])
            self._find_step_size(state)
        return state

    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what warmup learns from it."""
        state, info = self.move(state) if self.potential.dim else (state, nothing_moved(state))
        renewed = False
        if self.adaptation.active:
            # without log Z(theta) potentials do not tell which chains are out
            potential = None if self.samples_intractable else state.potential / self.temperature
            renewed = self.adaptation.update(state.z, info.accept_prob, potential, state.grad)
        if renewed and self.starts_anew and self.adaptation.exploring:
            state = self._start_anew(state)
        if renewed and self.adapt_step_size:
            self._find_step_size(state)
        self._steps += 1
        if self._engine is not None:
            self._engine.made = self._steps
        return state, info

    def run_fn(self, *inputs: object) -> Any:
        """The value of :attr:`compiled_fn`, by its graph if it has one."""
        assert self._engine is not None
        return self._engine(*inputs)

    def move(self, state: State) -> tuple[State, Info]:
        """One transition of all chains: one :meth:`transition`, or several."""
        return self.run_fn(state, *self.draw(state))

    def trial(self, state: State) -> tuple[State, Info]:
        """A transition whose acceptance is looked at, to find a first step size."""
        return self.run_fn(state, *self.draw(state))

    def _start_anew(self, state: State) -> State:
        """Gives chains that are stranded a first position again, or one of their super-chain."""
        adaptation = self.adaptation
        stranded = adaptation.population.stranded
        if stranded is None or not adaptation.ranks.any(stranded):
            return state
        adaptation.population.forget(stranded)
        adaptation.num_restarts += int(adaptation.ranks.total(stranded.sum()))
        first = self.potential.initial(len(state.z))
        anew = adaptation.population.starts_anew(state.z, first, self.starts_together)
        return choose(stranded, self.evaluate(anew), state)

    def _find_step_size(self, state: State) -> None:
        """Doubles or halves each step size until the acceptance crosses the target."""
        adaptation = self.adaptation
        direction: Tensor | None = None
        for _ in range(60):
            _, info = self.trial(state)
            mean = adaptation.pooled(info.accept_prob)
            now = torch.where(mean > adaptation.target_accept_prob, 1.0, -1.0)
            direction = now if direction is None else torch.where(now == direction, direction, 0.0)
            if not adaptation.ranks.any(direction != 0):
                break
            adaptation.step_size = adaptation.step_size * 2.0**direction
        adaptation.restart(adaptation.step_size)

    @property
    def learned(self) -> list[str]:
        """The step size, and of which kind the mass matrix is."""
        adaptation = self._adaptation
        if adaptation is None or adaptation.t == 0:
            return []
        found = [f"step_size={float(adaptation.step_size.mean()):.3g}"]
        if not adaptation.adapt_step_size:
            found = []
        if adaptation.inverse_mass_sqrt is not None:
            found.append(f"{adaptation.kind.replace('_', '-')} mass matrix")
        if adaptation.num_restarts:
            found.append(f"{adaptation.num_restarts} new starts in the warmup")
        return found


def check_positive(name: str, value: float) -> None:
    """Raises a ValueError unless ``value`` is a finite number above 0."""
    check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
