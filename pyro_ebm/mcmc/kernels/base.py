r"""The base of every kernel: Pyro's contract around a pure transition on a batch of chains.

A kernel is used in three ways. Under :class:`pyro_ebm.MCMC` it moves many chains at once
(:meth:`Kernel.bind`, :meth:`Kernel.init`, :meth:`Kernel.step`). Under Pyro's own
``pyro.infer.MCMC`` and ``StreamingMCMC`` it moves one (:meth:`Kernel.setup`,
:meth:`Kernel.sample`). And without a model it is the kernel of ``UnnormalizedEnergy.sample`` and
of the losses.
"""

import io
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Self

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import Transform

from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.engine.engine import Engine, JitCompile, check_jit_compile
from pyro_ebm.mcmc.engine.graph_guards import Dependencies
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.potentials.function import FunctionPotential
from pyro_ebm.mcmc.potentials.lone_energy import lone_energy
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.mcmc.state import Info, State, nothing_moved
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.models.sites.site import Site, sites_of
from pyro_ebm.ops.arguments import check_callable, check_mapping, check_number
from pyro_ebm.ops.steps.metropolis import select


class Kernel(MCMCKernel):
    r"""A Markov chain Monte Carlo kernel: a pure transition, adapted during warmup.

    A new kernel says what a transition draws, and what it does with the draws. The base evaluates
    the potential, adapts the step size to ``target_accept_prob`` and the mass matrix to the
    covariance of the draws, keeps the statistics, and answers Pyro. A whole kernel, the Metropolis
    algorithm with a Gaussian random walk:

    Example:
        >>> from pyro_ebm.ops import log_uniform, metropolis_accept, precondition, select
        >>> class RandomWalk(Kernel):
        ...     needs_grad = False
        ...     def draw(self, state):
        ...         step = self.step_size_of(state)
        ...         jump = step * precondition(self.inverse_mass_sqrt, torch.randn_like(state.z))
        ...         return state.z + jump, log_uniform(state.potential)
        ...     def transition(self, state, new_z, log_u):
        ...         new = self.evaluate(new_z)
        ...         valid = new.potential.isfinite()
        ...         #            p(z') / p(z) = exp(-U(z')) / exp(-U(z))
        ...         accept_prob, ok = metropolis_accept(
        ...             state.potential - new.potential, valid, log_u)
        ...         return self.choose(ok, new, state), Info(accept_prob, ~valid)
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> from pyro.infer import MCMC
        >>> mcmc = MCMC(RandomWalk(model, target_accept_prob=0.44), 500, disable_progbar=True)
        >>> mcmc.run()
        >>> bool((mcmc.get_samples()["x"].mean() - 3).abs() < 0.5)
        True

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        step_size: the (first) step size.
        adapt_step_size: whether warmup adapts it.
        adapt_mass_matrix: whether warmup adapts the mass matrix; else it is the identity.
        full_mass: whether the mass matrix is dense or diagonal.
        target_accept_prob: the mean acceptance probability that the step size is adapted to.
        transforms: from the supports to the reals, where they should not be Pyro's.
        max_plate_nesting: as in Pyro's kernels.
        jit_compile: False, ``"capture"``, True or ``"auto"``: whether to run the transition as a
            graph, and whether to compile that, see :mod:`pyro_ebm.mcmc.engine.engine`.
        ignore_jit_warnings: whether to silence warnings of the capture.
        init_strategy: where chains start, as in Pyro's kernels.

    Raises:
        ValueError: for an argument outside its range, or both a model and a ``potential_fn``.
    """

    needs_grad = True
    has_momentum = False
    discrete = False
    """Whether it moves discrete sites; they are then not summed out."""
    samples_intractable = False
    """Whether it moves the sites on which an unknown log Z depends (in a composite, no others)."""
    checks_potential = True
    """Whether ``init`` may take its time to see that the potential suits the kernel."""
    MAX_STEP_SIZE: float | None = None
    """No step size is larger, adapted or given, if there is such a number."""
    planned_steps: int | None = None
    """How many transitions are to come, if that is known: for ``jit_compile="auto"``."""

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 0.1,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool = False,
        target_accept_prob: float = 0.574,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: JitCompile = False,
        ignore_jit_warnings: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if model is not None and potential_fn is not None:
            raise ValueError("give model or potential_fn, not both")
        check_positive("step_size", step_size)
        check_jit_compile(jit_compile)
        check_number("target_accept_prob", target_accept_prob)
        check_callable("init_strategy", init_strategy)
        if model is not None:
            check_model(model)
        if transforms is not None:
            check_mapping("transforms", transforms, Transform, "transforms")
        if not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must lie in (0, 1), got {target_accept_prob}")
        self.model, self.potential_fn = model, potential_fn
        self.transforms = transforms
        self._init_step_size = float(step_size)
        self.adapt_step_size, self.adapt_mass_matrix = adapt_step_size, adapt_mass_matrix
        self.full_mass, self.target_accept_prob = full_mass, target_accept_prob
        self._given_transforms = transforms
        self.max_plate_nesting = max_plate_nesting
        self.jit_compile: JitCompile = jit_compile
        self.ignore_jit_warnings = ignore_jit_warnings
        self.init_strategy = init_strategy
        self._given_params: Mapping[str, Tensor] | None = None
        self._shipped_params: bytes | None = None
        self._release()

    # -- the mathematics: what a new kernel writes ---------------------------------------------

    @abstractmethod
    def draw(self, state: State) -> tuple[Any, ...]:
        """Everything random or adapted that :meth:`transition` needs, drawn for all chains."""

    @abstractmethod
    def transition(self, state: State, *draws: Any) -> tuple[State, Info]:
        """The next state of all chains: a pure function of its arguments."""

    @property
    def compiled_fn(self) -> Callable[..., Any]:
        """What the engine runs: the transition, or the part of it that is repeated."""
        return self.transition

    @property
    def extra_fields(self) -> dict[str, Tensor]:
        """What else it tells of the last transition, each of shape ``()`` or ``(chains,)``."""
        return {}

    # -- what it is written with ---------------------------------------------------------------

    def evaluate(self, z: Tensor) -> State:
        """The state at the positions ``z``, shape ``(chains, dim)``."""
        if self.needs_grad:
            return State(z, *self.potential.value_and_grad(z))
        with torch.no_grad():
            return State(z, self.potential(z), None)

    @staticmethod
    def choose(accepted: Tensor, new: State, old: State) -> State:
        """The new state where accepted, the old one elsewhere."""
        grad = None if new.grad is None else select(accepted, new.grad, _not_none(old.grad))
        potential = select(accepted, new.potential, old.potential)
        return State(select(accepted, new.z, old.z), potential, grad)

    @property
    def potential(self) -> Potential:
        """What is sampled; set by :meth:`bind`."""
        if self._potential is None:
            raise RuntimeError(f"{type(self).__name__} is not bound to a potential: call setup")
        return self._potential

    @property
    def adaptation(self) -> Adaptation:
        """The step size and mass matrix; set by :meth:`bind`."""
        if self._adaptation is None:
            raise RuntimeError(f"{type(self).__name__} is not bound to a potential: call setup")
        return self._adaptation

    @property
    def inverse_mass_sqrt(self) -> Tensor | None:
        """:math:`L` of the inverse mass matrix, see :mod:`pyro_ebm.ops.steps.precondition`."""
        return self.adaptation.inverse_mass_sqrt

    @property
    def step_size(self) -> Tensor | float:
        """The step size of each target, ``(targets,)``; before setup, the first."""
        return self._init_step_size if self._adaptation is None else self.adaptation.step_size

    def step_size_of(self, state: State) -> Tensor:
        """The step size of each chain, shape ``(chains, 1)``."""
        step_size, chains = self.adaptation.step_size, state.z.shape[0]
        if self._own_step_size[0] is not step_size or len(self._own_step_size[1]) != chains:
            repeats = chains // step_size.shape[0]
            repeated = step_size if repeats == 1 else step_size.repeat(repeats)
            self._own_step_size = step_size, repeated[:, None]
        return self._own_step_size[1]

    # -- many chains ---------------------------------------------------------------------------

    def make_potential(self, *args: Any, **kwargs: Any) -> Potential:
        """The potential of the model at its arguments, or of the ``potential_fn``."""
        self._restore_params()
        if self.model is not None:
            lone = self.discrete and lone_energy(
                BoundModel(self.model, args, kwargs, self.init_strategy)
            )
            if lone:
                return EnergyPotential(lone[1], lone[0])
            return ModelPotential(
                self.model,
                args,
                kwargs,
                transforms=self._given_transforms,
                max_plate_nesting=self.max_plate_nesting,
                init_strategy=self.init_strategy,
                keep_discrete=self.discrete,
            )
        if self.potential_fn is None:
            raise ValueError(
                f"{type(self).__name__} has neither a model nor a potential_fn: give one, as in"
                f" {type(self).__name__}(model)"
            )
        if self._given_params is None:
            raise ValueError(
                "a potential_fn says nothing of its sites' names and shapes: give initial_params"
            )
        sites = sites_of(self._given_params, self._given_transforms)
        return FunctionPotential(self.potential_fn, sites)

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
        others = [site.name for site in others]
        if others:
            kind = "discrete" if self.discrete else "continuous"
            raise ValueError(
                f"{type(self).__name__} moves {kind} sites, and {others} are not: use"
                f" {'LangevinKernel' if self.discrete else 'GibbsKernel'}, or a"
                " CompositeKernel where a model has sites of both kinds"
            )

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential and forgets everything learned on another.

        Args:
            potential: what to sample.
            warmup_steps: how many of the coming steps adapt the kernel.

        Raises:
            ValueError: if the potential has sites that the kernel does not move.
        """
        self.check(potential)
        self._release()
        self._potential = potential
        self.transforms = potential.transforms
        moves = potential.dim > 0
        self._adaptation = Adaptation(
            targets=potential.targets,
            dim=potential.dim,
            warmup_steps=warmup_steps,
            step_size=self._init_step_size,
            like=torch.empty(0, dtype=potential.dtype, device=potential.device),
            adapt_step_size=self.adapt_step_size and moves,
            adapt_mass_matrix=self.adapt_mass_matrix and moves,
            full_mass=self.full_mass,
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
        if self.adaptation.update(state.z, info.accept_prob) and self.adapt_step_size:
            self._find_step_size(state)
        self._steps += 1
        return state, info

    def move(self, state: State) -> tuple[State, Info]:
        """One transition of all chains: one :meth:`transition`, or several."""
        return self._engine(state, *self.draw(state))

    def trial(self, state: State) -> tuple[State, Info]:
        """A transition that is looked at and not made, to find a first step size."""
        return self._engine(state, *self.draw(state))

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

    def state_dict(self) -> dict[str, Any]:
        """What it has learned and counted since :meth:`bind`, for :meth:`load_state_dict`.

        Numbers, strings, tensors, and dicts and lists of them. A kernel that keeps more between
        transitions adds it here, and takes it back there.
        """
        adaptation = self._adaptation
        return {
            "steps": self._steps,
            "adaptation": None if adaptation is None else adaptation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another kernel was, after :meth:`bind` to the same potential.

        Args:
            state: its :meth:`state_dict`; tensors may be on another device.
        """
        self._steps = state["steps"]
        assert self._adaptation is not None
        self._adaptation.load_state_dict(state["adaptation"])

    # -- one chain, as Pyro's MCMC runs it -------------------------------------------------------

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares one chain: potential, start, adaptation and statistics, all anew."""
        potential = self.make_potential(*args, **kwargs)
        z = self.initial_position(potential, 1)
        self.bind(potential, warmup_steps)
        self._warmup_steps = warmup_steps
        self._state = self.init(z)

    def initial_position(self, potential: Potential, num_chains: int) -> Tensor:
        """The user's ``initial_params`` if given, else what the potential draws.

        Raises:
            ValueError: if they have other names or shapes than the model's sites, or lie where
                the potential is not finite.
        """
        given = self._given_params
        return potential.initial(num_chains) if given is None else potential.at(given, num_chains)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One transition from a dict of unconstrained values to the next."""
        if self._state is None:
            raise RuntimeError(f"{type(self).__name__}.sample needs setup first")
        z = self.potential.ravel(params)[None]
        here = self.potential.ravel(self.potential.unravel(self._state.z[0]))[None]  # rounded
        state = self._state if torch.equal(z, here) else self.evaluate(z)
        self._state, info = self.step(state)
        self._mean_accept += (float(info.accept_prob) - self._mean_accept) / (self._seen + 1)
        self._seen += 1
        if self._steps == self._warmup_steps:
            self._mean_accept, self._seen = 0.0, 0
        self.last_stats = {
            self.potential.lp_name: -float(self._state.potential),
            "acceptance_rate": float(info.accept_prob),
            "step_size": float(self.adaptation.step_size.mean()),
            "diverging": bool(info.diverging),
            **{name: stat.item() for name, stat in self.extra_fields.items()},
        }
        if self._steps > self._warmup_steps:
            for name, number in self.last_stats.items():
                self._stats.setdefault(name, []).append(number)
        return {k: v.squeeze(0) for k, v in self.potential.unravel(self._state.z).items()}

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Unconstrained values at which the chain starts."""
        if self._state is None:
            return None if self._given_params is None else dict(self._given_params)
        return {k: v.squeeze(0) for k, v in self.potential.unravel(self._state.z).items()}

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._given_params = params
        self._state = None

    def logging(self) -> OrderedDict[str, str]:
        """What a progress bar shows."""
        return OrderedDict(
            [
                ("step size", f"{float(self.adaptation.step_size.mean()):.2e}"),
                ("acc. prob", f"{self._mean_accept:.3f}"),
            ]
        )

    def diagnostics(self) -> dict[str, Any]:
        """Statistics of the draws: divergent ones, mean acceptance, and all of them per draw."""
        stats = {name: torch.tensor(values) for name, values in self._stats.items()}
        diverging = stats.get("diverging", torch.zeros(0, dtype=torch.bool))
        return {
            "divergences": diverging.nonzero().flatten().tolist(),
            "acceptance rate": self._mean_accept,
            "sample_stats": stats,
        }

    def cleanup(self) -> None:
        """Drops the chain; the transforms and the learned adaptation stay to be read."""
        self._state = None

    @property
    def save_params(self) -> list[str]:
        """The sites that Pyro's MCMC stores, in the order in which it unpacks them."""
        if self._save_params is not None:
            return sorted(self._save_params)
        return sorted(self.potential.names)

    @save_params.setter
    def save_params(self, names: list[str] | None) -> None:
        self._save_params = names

    _save_params: list[str] | None = None

    # -- state that comes and goes ---------------------------------------------------------------

    def _release(self) -> None:
        self._potential: Potential | None = None
        self._adaptation: Adaptation | None = None
        self._engine: Any = None
        self._state: State | None = None
        self._own_step_size = torch.empty(0), torch.empty(0)  # of groups, and of their chains
        self._warmup_steps = 0
        self._steps = 0
        self._mean_accept, self._seen = 0.0, 0
        self._stats: dict[str, list[Any]] = {}
        self.last_stats: dict[str, Any] = {}

    def copy(self) -> Self:
        """A kernel with the same settings that has seen nothing."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new._release()
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_potential", "_adaptation", "_engine", "_state"):
            state[name] = None
        # A worker process starts with an empty parameter store: its parameters travel along.
        # (The store's own get_state() would strip the live parameters of their bookkeeping, and
        # tensors would travel as files that are closed before the worker has opened them.)
        store, buffer = pyro.get_param_store(), io.BytesIO()
        shipped = {
            name: (p.detach().clone(), store._constraints[name])
            for name, p in store._params.items()
        }
        torch.save(shipped, buffer)
        state["_shipped_params"] = buffer.getvalue()
        return state

    def _restore_params(self) -> None:
        if self._shipped_params is None:
            return
        store = pyro.get_param_store()
        shipped = torch.load(io.BytesIO(self._shipped_params), weights_only=False)
        for name, (unconstrained, constraint) in shipped.items():
            if name not in store:
                store.setdefault(name, transform_to(constraint)(unconstrained), constraint)

    def __repr__(self) -> str:
        target = "" if self.model is None else getattr(self.model, "__name__", repr(self.model))
        return f"{type(self).__name__}({target})"


def check_model(model: Any) -> None:
    """Raises a ValueError unless it may be a Pyro model; a kernel can be called too."""
    if isinstance(model, MCMCKernel):
        raise ValueError(f"model must be a Pyro model, or a distribution, got {model!r}, a kernel")
    check_callable("model", model, "a Pyro model, or a distribution")


def check_positive(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a finite number above 0."""
    check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
