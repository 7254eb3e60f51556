"""All chains of a run, moved at once, from any transition on.

All that a transition reads is the kernel's state, the chains' state, and the global random number
generators. Restored as they were after some transition, they give the draws that followed it, to
the last bit.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_ebm.files import CheckpointError, Saved, random_state, set_random_state
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.function import FunctionPotential
from pyro_ebm.mcmc.running.options import Options
from pyro_ebm.mcmc.running.progress import Bar
from pyro_ebm.mcmc.running.storage.draws import DrawBuffer, Memory, Store, samples_of, statistics_of
from pyro_ebm.mcmc.running.storage.zarr_store import ZarrStore
from pyro_ebm.mcmc.state import State, to_device
from pyro_ebm.models.over_chains import saved_way
from pyro_ebm.models.sites.site import Site


class VectorizedRun:
    """The chains of a run under way, and their draws so far.

    Args:
        kernel: moves them.
        potential: of the model.
        options: what to run.
        sites: those to keep, in the order of the position.
        store: keeps the draws, if given; else the memory does.

    Attributes:
        t: transitions made so far, those of the warmup included.
        goal: how many are to be made.
        state: where the chains are.
        records: the ``"draws"``, and the ``"warmup"`` if it is kept.
    """

    def __init__(
        self,
        kernel: PyroKernel,
        potential: Potential,
        options: Options,
        sites: list[Site],
        store: ZarrStore | None = None,
    ):
        self.kernel, self.potential, self.sites = kernel, potential, sites
        self.warmup_steps, self.thinning = options.warmup_steps, options.thinning
        self.save_warmup, self.store = options.save_warmup, store
        self.device = options.draws_device or potential.device
        self.t, self.goal = 0, options.warmup_steps + options.num_samples
        given = kernel.given_params if options.initial_params is None else options.initial_params
        kernel.planned_steps, kernel.starts_anew = self.goal, given is None
        kernel.starts_together = options.num_chains // (
            options.num_superchains or options.num_chains
        )
        kernel.bind(potential, options.warmup_steps)
        self.records: dict[str, DrawBuffer] = {}

    def start(self, z: Tensor) -> None:
        """Starts at the positions ``z``, shape ``(chains, dim)``."""
        self._collect_from(self.kernel.init(z))

    def extend(self, num_samples: int) -> None:
        """Makes as many transitions more, without a warmup; the draws so far were read."""
        before = self.records["draws"]
        self.goal += num_samples
        engine = self.kernel.engine
        if engine is not None and engine.planned is not None:
            engine.planned += num_samples
        draws = self._new_draws(before.count)
        draws.seen, draws.first, draws.count = before.seen, before.count, before.count

    def _collect_from(self, state: State) -> None:
        self.state = state
        if self.save_warmup:
            memory = Memory(self.warmup_steps, self.device)
            self.records["warmup"] = self._buffer(self.warmup_steps, 1, memory)
        self._new_draws()

    def _new_draws(self, first: int = 0) -> DrawBuffer:
        num = (self.goal - self.warmup_steps) // self.thinning - first
        store = self.store or Memory(num, self.device, first)
        draws = self.records["draws"] = self._buffer(num, self.thinning, store)
        return draws

    def _buffer(self, num: int, thinning: int, store: Store) -> DrawBuffer:
        return DrawBuffer(self.potential, self.sites, num, thinning, self.state, store)

    # -- going on ------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all transitions are made."""
        return self.t == self.goal

    def advance(
        self,
        bar: Bar,
        hook_fn: Callable[..., object] | None = None,
        after: Callable[["VectorizedRun"], None] | None = None,
    ) -> None:
        """Makes all transitions that are left.

        Args:
            bar: counts them.
            hook_fn: as in :class:`~pyro_ebm.MCMC`.
            after: called with the run after each.
        """
        kernel, records = self.kernel, self.records
        while self.t < self.goal:
            stage, into, i = "Sample", records["draws"], self.t - self.warmup_steps
            if i < 0:
                stage, into, i = "Warmup", records.get("warmup"), self.t
            step_size = torch.as_tensor(kernel.step_size)
            self.state, info = kernel.step(self.state)
            if into is not None:
                into.add(self.state, info, step_size, kernel.extra_fields)
            self.t += 1
            bar.update(stage.lower(), kernel, info)
            if hook_fn is not None:
                hook_fn(kernel, self.potential.unravel(self.state.z), stage, i)
            if after is not None:
                after(self)

    # -- draws --------------------------------------------------------------------------------

    def read(
        self, record: DrawBuffer, transforms: Mapping[str, Transform]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws ``(chains, draws, *site)`` and their statistics ``(chains, draws)``."""
        record.flush()
        assert isinstance(record.store, Memory)
        rows = record.store.rows(record.store.first)
        return samples_of(rows, self.sites, transforms), statistics_of(rows)

    def forget(self) -> None:
        """Drops the draws in memory, which were read."""
        for record in self.records.values():
            if isinstance(record.store, Memory):
                record.store.clear()

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> Saved:
        """Everything that the coming transitions depend on, the random state included.

        Draws in memory are not in it, those that a store does not have yet are.

        Raises:
            GraphError: if draws are in doubt, which are better not saved.
        """
        self.kernel.check_graphs()
        potential, records = self.potential, {}
        for name, record in self.records.items():
            in_memory = isinstance(record.store, Memory)
            if in_memory:
                record.flush()
            tail = {} if in_memory else record.tail()
            records[name] = {"seen": record.seen, "first": record.first, "tail": tail}
        return {
            "t": self.t,
            "goal": self.goal,
            "state": tree_flatten(self.state)[0],
            "kernel": self.kernel.state_dict(),
            "vectorizes": potential.way if isinstance(potential, FunctionPotential) else None,
            "records": records,
            "random": random_state(),
        }

    def load_state_dict(self, state: Saved, exact: bool = False) -> None:
        """Goes on from where another run was; the draws that were in memory are to be put back.

        Args:
            state: its :meth:`state_dict`.
            exact: whether it ran on a machine and with libraries that compute what these do.

        Raises:
            CheckpointError: if the potential is another at the chains' positions.
        """
        self.t, self.goal = state["t"], state["goal"]
        if isinstance(self.potential, FunctionPotential):
            self.potential.way = saved_way(state["vectorizes"])
        device = self.potential.device
        leaves = [to_device(leaf, device) for leaf in state["state"]]
        self.kernel.load_state_dict(state["kernel"])  # it may say at which rows of the data
        here = self.kernel.evaluate(leaves[0])
        self._collect_from(tree_unflatten(leaves, tree_flatten(here)[1]))
        self._compare(here.potential, exact)
        for name, record in self.records.items():
            record.go_on(**state["records"][name])
        set_random_state(state["random"])

    def _compare(self, potential: Tensor, exact: bool) -> None:
        """Raises a CheckpointError if the potential at the saved positions is not as saved."""
        saved, eps = self.state.potential, torch.finfo(self.state.potential.dtype).eps
        # a compiled graph rounds differently from the model as it is, and so do two machines
        tolerance = (1000 * eps if exact else eps**0.5) * (1 + saved.abs())
        same = ((potential - saved).abs() <= tolerance) | (potential == saved)
        same |= potential.isnan() & saved.isnan()
        if not (same.all() if exact else same.float().mean() > 0.5):
            i = int((~same).nonzero()[0])
            raise CheckpointError(
                f"the model is another one: at the positions that were saved its potential (minus"
                f" the log density, of chain {i}) is {float(potential[i]):.6g}, and was"
                f" {float(saved[i]):.6g}. Go on with the model, the parameters and the data of the"
                " run"
            )
