r"""Kernels that run as graphs, kept from gradient to gradient.

Capturing a transition takes as long as a few hundred of them, and compiling it seconds. One graph
serves a whole training run, since it reads the parameters where the optimiser changes them. But a
model makes its energy anew at each step, and a graph of another energy would be silently wrong:
the graph is used again only where a
:class:`~pyro_ebm.losses.contrastive.code_identity.CodeIdentity` shows that the energy computes the
same, and captured only when an energy has come a second time; with ``"auto"``, after as many
transitions as a capture takes.

Graphs are no state, but that there are some is: a training that was loaded captures its energies
anew, at once, and goes on to the last bit. A captured graph gives what a run without one does, to
rounding where it runs on fewer threads, or solves triangular systems, and else to the last bit; a
compiled one, ``jit_compile=True``, to rounding.
"""

import copy
import warnings
from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.files import Saved
from pyro_ebm.internals.tracing import is_capturing
from pyro_ebm.losses.contrastive.code_identity import CodeIdentity
from pyro_ebm.mcmc.engine.costs import WORTH_CAPTURING
from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.ops.code import outside_level

MAX_KEPT = 8
MAX_MISSES = 20
"""How many energies in a row, none of them seen before, before a warning."""


class _Kept(NamedTuple):
    """A kernel with a graph, its state when new, and what its key holds by identity."""

    kernel: Kernel
    potential: "KeptPotential"
    fresh: Saved
    held: list[object]


class KeptKernels:
    """Kernels bound to energies, and kept for those that come again.

    Example:
        >>> from pyro_ebm.mcmc import LangevinKernel
        >>> kernels, template = KeptKernels(), LangevinKernel(jit_compile="capture")
        >>> w, x = torch.ones(()), torch.zeros(5)
        >>> def bound():
        ...     energy = UnnormalizedEnergy(lambda x: w * x**2)
        ...     return kernels.bound(template, energy, x, "x")[0]
        >>> first, second, third = (bound() for _ in range(3))
        >>> first is second, second is third
        (False, True)
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[object] | _Kept] = {}
        self._misses = self._steps = self._at_once = 0

    def bound(
        self,
        template: Kernel,
        energy: UnnormalizedEnergy,
        start: Tensor,
        name: str,
        num_steps: int = 1,
    ) -> tuple[Kernel, EnergyPotential]:
        """A new kernel with the settings of a template, bound to an energy, and its potential.

        Args:
            template: the kernel to copy.
            energy: what to bind it to.
            start: points of the dtype and on the device to use.
            name: the site's.
            num_steps: how many transitions are to come.
        """
        self._steps += num_steps
        if not (runs_as_graph(template) or self._has_paid(template)):
            return _bound(template.copy(), EnergyPotential(energy, like=start, targets=1))
        identity = CodeIdentity(template, energy)
        key = (identity.key, start.dtype, start.device)
        kept = None if identity.key is None else self._seen.get(key)
        if isinstance(kept, _Kept):
            kept.kernel.load_state_dict(kept.fresh)
            kept.potential.use_graph(kept.kernel)
            return kept.kernel, kept.potential
        if kept is None and identity.key is not None and self._at_once:
            self._at_once -= 1
        elif kept is None:
            self._register(key, identity, name, runs_as_graph(template))
            return _bound(_eager(template), EnergyPotential(energy, like=start, targets=1))
        self._seen.pop(key, None)
        self._make_room()
        potential = KeptPotential(energy, like=start, targets=1)
        kernel, _ = _bound(template.copy(), potential)
        if kernel.engine is not None and kernel.engine.jit_compile == "auto":
            kernel.engine.jit_compile = "capture"  # which it does without a warning
        if kept is None:
            potential.use_graph(kernel)
        fresh = copy.deepcopy(kernel.state_dict())
        self._seen[key] = _Kept(kernel, potential, fresh, identity.held)
        self._misses = 0
        return kernel, potential

    def _has_paid(self, template: Kernel) -> bool:
        """Whether ``"auto"`` is to be a graph by now: of energies that come again, if it can be."""
        if template.jit_compile != "auto" or template.parts or self._misses >= MAX_MISSES:
            return False
        return self._steps > WORTH_CAPTURING

    def _make_room(self) -> None:
        while len(self._seen) >= MAX_KEPT:
            del self._seen[next(iter(self._seen))]

    def _register(self, key: Hashable, identity: CodeIdentity, name: str, asked: bool) -> None:
        """Remembers an energy that comes for the first time; warns where a graph was asked for."""
        if identity.key is not None:
            self._make_room()
            self._seen[key] = identity.held
        self._misses += 1
        if self._misses == MAX_MISSES and asked:
            why = identity.reason or "it reads other numbers or tensors at each step"
            warnings.warn(
                f"the energy of site {name!r} is another one at each step ({why}), so no graph of"
                " it can be kept, and the kernel's jit_compile has no effect: write the energy as"
                " a function of modules and of parameters that change in place",
                stacklevel=outside_level(),
            )

    def state_dict(self) -> Saved:
        """How many transitions there were, and whether the energies of these come again."""
        comes_again = bool(self._seen) and self._misses < MAX_MISSES
        return {"steps": self._steps, "comes_again": self._at_once > 0 or comes_again}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from :meth:`state_dict`: energies that came again are captured at once."""
        self._seen.clear()
        self._misses, self._steps = 0, state["steps"]
        self._at_once = MAX_KEPT if state["comes_again"] else 0

    def __getstate__(self) -> dict[str, object]:
        return {"_seen": {}, "_misses": 0, "_steps": 0, "_at_once": 0}


class KeptPotential(EnergyPotential):
    """A potential whose gradient runs as a graph of its own, outside the graph of a kernel."""

    _graph: Engine | None = None

    def use_graph(self, kernel: Kernel) -> None:
        """Captures the gradient, if the transitions of a kernel bound to it could be captured."""
        engine = kernel.engine
        if self._graph is None and engine is not None and engine.jit_compile:
            gradient = super().value_and_grad
            how = engine.jit_compile
            self._graph = Engine(gradient, how, engine.state, kernel.ignore_jit_warnings)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        if self._graph is None or is_capturing():
            return super().value_and_grad(z)
        return self._graph(z)


def runs_as_graph(kernel: Kernel) -> bool:
    """Whether a kernel, or one inside it, is to be captured however few transitions it makes.

    Example:
        >>> from pyro_ebm.mcmc import LangevinKernel
        >>> runs_as_graph(LangevinKernel(jit_compile="capture")), runs_as_graph(LangevinKernel())
        (True, False)
    """
    return kernel.always_graphs or any(map(runs_as_graph, kernel.parts))


def _eager(template: Kernel) -> Kernel:
    if template.parts:
        return template.copy(kernels=[_eager(part) for part in template.parts])
    return template.copy(jit_compile=False)


def _bound(kernel: Kernel, potential: EnergyPotential) -> tuple[Kernel, EnergyPotential]:
    kernel.bind(potential, warmup_steps=0)
    return kernel, potential
