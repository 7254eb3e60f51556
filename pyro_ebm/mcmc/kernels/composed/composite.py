r"""Metropolis within Gibbs: kernels that take turns, each on some of the sites.

Let a position be :math:`z = (a, b)`. A transition that leaves :math:`p(a \mid b)` invariant leaves
:math:`p(a, b)` invariant too, and so does one after another. The potential of a block given the
rest is the whole potential, seen as a function of the block.

Reference:
    Tierney (1994), Markov chains for exploring posterior distributions.
"""

from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.kernels.composed.tempering import TemperingKernel
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.kernels.pyro_contract import ModelSettings, PyroKernel
from pyro_ebm.mcmc.kernels.transition import TransitionKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State, to_device
from pyro_ebm.ops.arguments import shown


class BlockPotential(Potential):
    """A potential as a function of some of its sites, the others held where they are.

    Args:
        whole: the potential.
        names: the sites of the block.

    Attributes:
        rest: whole positions ``(chains, dim)``; the block's own columns in it are not read.
    """

    def __init__(self, whole: Potential, names: Sequence[str]):
        super().__init__([site for site in whole.sites if site.name in names], whole.targets)
        self.dtype, self.device, self.whole = whole.dtype, whole.device, whole
        columns = torch.arange(whole.dim, device=whole.device)
        parts = zip(whole.names, columns.split(whole.sizes), strict=True)
        self.columns = torch.cat([columns[:0], *(part for name, part in parts if name in names)])
        self.rest = torch.empty(0, whole.dim)
        self.modules = whole.modules

    def hold(self, z: Tensor) -> None:
        """Takes whole positions; in place, since a captured graph refers to this very tensor."""
        if self.rest.shape == z.shape and self.rest.dtype == z.dtype:
            self.rest.copy_(z)
        else:
            self.rest = z.clone()

    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each chain, ``(chains, block dim) -> (chains,)``, differentiable."""
        return self.whole(self.insert(z))

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient in the block, detached."""
        value, grad = self.whole.value_and_grad(self.insert(z))
        return value, grad[:, self.columns]

    def insert(self, z: Tensor) -> Tensor:
        """Whole positions with the block's columns replaced; ``z`` may be several for each."""
        rest = self.rest.repeat(z.shape[0] // self.rest.shape[0], 1)
        return rest.index_copy(1, self.columns, z)


class CompositeKernel(PyroKernel):
    """Kernels that take turns: discrete ones on discrete sites, the others on continuous ones.

    One transition is one of each, in the order given. A model with a ``Categorical`` and a
    ``Normal`` is moved by Gibbs and Langevin in turn:

    Args:
        model: a Pyro model.
        kernels: kernels without a model, as ``[GibbsKernel(), LangevinKernel()]`` (the default).
            All discrete sites are moved by each discrete kernel, all continuous sites by each
            other. With an :class:`~pyro_ebm.mcmc.ExchangeKernel` among them, it alone moves the
            sites on which an unknown log Z depends, and no others.
        **kwargs: ``transforms``, ``max_plate_nesting`` and ``init_strategy`` of
            :class:`~pyro_ebm.mcmc.TransitionKernel`.

    The statistics ``acceptance_rate`` and ``step_size`` are those of the last kernel.

    Raises:
        ValueError: for a kernel with a model or transforms of its own, one that is itself made of
            others, kernels of different temperatures, or (when run) sites that no kernel moves.

    Example:
        >>> from pyro_ebm.mcmc import MCMC
        >>> def model(y):
        ...     k = pyro.sample("k", dist.Bernoulli(0.3))
        ...     x = pyro.sample("x", dist.Normal(4 * k, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> mcmc = MCMC(CompositeKernel(model), 200, 50, num_chains=20, disable_progbar=True)
        >>> mcmc.run(torch.tensor(2.5))
        >>> sorted(mcmc.get_samples())
        ['k', 'x']
    """

    needs_grad = False
    """A state has no gradient: the other sites move in between."""
    discrete = True
    _bound: "Sequence[tuple[TransitionKernel, BlockPotential]]" = ()

    def __init__(
        self,
        model: Model | None = None,
        kernels: Sequence[TransitionKernel] | None = None,
        **kwargs: Unpack[ModelSettings],
    ):
        super().__init__(model, **kwargs)
        kernels = [GibbsKernel(), LangevinKernel()] if kernels is None else kernels
        if not isinstance(kernels, Sequence) or not kernels:
            raise ValueError("kernels must hold at least one kernel, as [GibbsKernel()]")
        for kernel in kernels:
            if isinstance(kernel, TemperingKernel):  # its replicas need the rest at their own place
                raise ValueError(
                    "replicas are of all sites: write TemperingKernel(CompositeKernel(model, ...),"
                    f" betas), not {kernel!r} inside a CompositeKernel"
                )
            if isinstance(kernel, CompositeKernel):
                raise ValueError(f"give the kernels of {kernel!r} in one list")
            if not isinstance(kernel, TransitionKernel):
                raise ValueError(
                    f"kernels must be kernels of pyro_ebm, such as LangevinKernel(),"
                    f" got {shown(kernel)}"
                )
            if kernel.has_model:
                raise ValueError(
                    f"give model and transforms to CompositeKernel, not to {kernel!r}:"
                    " CompositeKernel(model, [GibbsKernel(), LangevinKernel()])"
                )
        temperatures = [kernel.temperature for kernel in kernels]
        if len(set(temperatures)) > 1:
            raise ValueError(
                f"{list(kernels)} have the temperatures {temperatures}: kernels that take turns"
                " must have one, else they leave neither p nor p^(1/T) invariant (GibbsKernel has"
                " 1)"
            )
        self.kernels = list(kernels)
        exchanges = [kernel for kernel in kernels if kernel.samples_intractable]
        if len(exchanges) > 1:
            raise ValueError("one ExchangeKernel moves all sites on which an unknown log Z depends")
        self.samples_intractable = bool(exchanges)

    @property
    def parts(self) -> tuple[TransitionKernel, ...]:
        """The kernels that take turns."""
        return tuple(self.kernels)

    @property
    def _exchange(self) -> TransitionKernel | None:
        return next((kernel for kernel in self.kernels if kernel.samples_intractable), None)

    def make_potential(self, *args: object, **kwargs: object) -> Potential:
        """The potential of the model at its arguments."""
        if (exchange := self._exchange) is None:
            return super().make_potential(*args, **kwargs)
        names = ("model", "transforms", "max_plate_nesting", "init_strategy")
        kernel = exchange.copy(**{name: self.settings[name] for name in names})
        kernel.keep_discrete = True
        return kernel.make_potential(*args, **kwargs)

    def check(self, potential: Potential) -> None:
        """Raises a ValueError if no kernel moves one of the sites."""
        if self._exchange is not None and not potential.intractable_sites:
            raise ValueError(
                f"{self._exchange!r} draws auxiliaries from the model, and the kernel that it is"
                " a part of cannot be a part of another"
            )
        moved = {name for kernel in self.kernels for name in self._names(potential, kernel)}
        for discrete in (True, False):
            sites = [
                site for site in potential.sites if (site.support_values is not None) == discrete
            ]
            if names := [site.name for site in sites if site.name not in moved]:
                kind = "discrete" if discrete else "continuous"
                kernel = "GibbsKernel()" if discrete else "LangevinKernel()"
                if any(site.is_unbounded for site in sites if site.name in names):
                    kernel = "MHKernel(proposal=IntegerWalk())"
                raise ValueError(
                    f"no kernel of this CompositeKernel moves the {kind} sites {names}: add a"
                    f" {kernel}"
                )

    @staticmethod
    def _names(potential: Potential, kernel: TransitionKernel) -> list[str]:
        return [
            site.name
            for site in potential.sites
            if kernel.moves(site)
            and (site.name in potential.intractable_sites) == kernel.samples_intractable
        ]

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Binds a copy of each kernel to the block of sites that it moves.

        Of a model without latents the last kernel has all sites, which are none.
        """
        super().bind(potential, warmup_steps)
        self._bound = bound = []
        for kernel in self.kernels:
            names = self._names(potential, kernel)
            if names or (kernel is self.kernels[-1] and not potential.sites):
                kernel, block = kernel.copy(), BlockPotential(potential, names)
                kernel.planned_steps = self.planned_steps
                kernel.bind(block, warmup_steps)
                bound.append((kernel, block))

    def init(self, z: Tensor) -> State:
        """The state at the first positions; each kernel finds its first step size."""
        for kernel, block in self._bound:
            block.hold(z)
            kernel.checks_potential = self.checks_potential
            kernel.init(z[:, block.columns])
        return self.evaluate(z)

    def move(self, state: State) -> tuple[State, Info]:
        """A transition of each kernel in turn."""
        turns = [(after, info) for _, after, info in self.turns(state)]
        state, last = turns[-1]
        diverging = torch.stack([info.diverging for _, info in turns]).any(0)
        return state, Info(last.accept_prob, diverging)

    @property
    def blocks(self) -> Sequence[TransitionKernel]:
        """The bound kernels that take turns, each on its own sites."""
        return [kernel for kernel, _ in self._bound]

    def turns(self, state: State) -> Iterator[tuple[TransitionKernel, State, Info]]:
        """A transition of each kernel in turn, see :meth:`Kernel.turns`."""
        for kernel, block in self._bound:
            block.hold(state.z)
            z = state.z[:, block.columns]
            inner = kernel.evaluate(z) if kernel.needs_grad else State(z, state.potential, None)
            inner, now = kernel.step(inner)
            state = State(state.z.index_copy(1, block.columns, inner.z), inner.potential, None)
            yield kernel, state, now

    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains; each kernel learns from its own."""
        state, info = self.move(state)
        self._steps += 1
        return state, info

    def check_graphs(self) -> None:
        """Compares the graphs of each kernel, see :meth:`Kernel.check_graphs`."""
        for kernel, _ in self._bound:
            kernel.check_graphs()

    def state_dict(self) -> Saved:
        """What each kernel has learned, and the positions that it saw last."""
        parts = [{"kernel": k.state_dict(), "rest": block.rest.clone()} for k, block in self._bound]
        return {**super().state_dict(), "parts": parts}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another kernel was, see :meth:`Kernel.load_state_dict`."""
        super().load_state_dict(state)
        for (kernel, block), part in zip(self._bound, state["parts"], strict=True):
            kernel.load_state_dict(part["kernel"])
            block.hold(to_device(part["rest"], block.columns.device))

    @property
    def adaptation(self) -> Adaptation:
        """The step size and mass matrix of the last kernel."""
        kernel = self._bound[-1][0] if self._bound else self.kernels[-1]
        return kernel.adaptation

    @property
    def step_size(self) -> Tensor | float:
        """The step size of the last kernel."""
        return self._bound[-1][0].step_size if self._bound else self.kernels[-1].step_size

    @property
    def learned(self) -> list[str]:
        """What each of the kernels has learned, in words."""
        return [f"{type(k).__name__} {text}" for k, _ in self._bound for text in k.learned]
