"""Runs all chains at once: from a start, from a checkpoint, and on from the end of a run."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.diagnostics.results import Results
from pyro_ebm.diagnostics.targets import Target
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.ranks import ProcessGroup, binding_to
from pyro_ebm.mcmc.running.chains import VectorizedRun
from pyro_ebm.mcmc.running.distributed import RankSync, check_alike
from pyro_ebm.mcmc.running.options import Runner
from pyro_ebm.mcmc.running.progress import Bar, cut_short
from pyro_ebm.mcmc.running.run_settings import RunSettings, fingerprint, of_sites
from pyro_ebm.mcmc.running.storage.checkpoint import Checkpoint, read_checkpoint
from pyro_ebm.mcmc.running.storage.zarr_store import ZarrStore, thinned_draws
from pyro_ebm.ops.distributed import rank_path

READ_AT_ONCE = 2**25
"""Of so many numbers in a store the effective sample size is taken."""
COMPARED = ("num_samples", "warmup_steps", "num_chains", "thinning", "save_warmup")


@dataclass
class VectorizedRunner(Runner):
    """Runs the chains of this rank, and brings the draws of all ranks to rank 0.

    Args:
        ranks: share out the chains.

    Attributes:
        chains: those that were run, None before.
        transforms: from the supports to the reals.
        checkpoint: where the run is saved, if it is.
        results: all that was drawn.
        target: of :meth:`run_until`.
    """

    kernel: PyroKernel
    ranks: ProcessGroup
    chains: VectorizedRun | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    results: Results | None = None
    target: Target | None = None

    def run(self) -> Results:
        """The draws of a run from its start."""
        options, ranks = self.options, self.ranks
        ranks.seed()
        with ranks.fail_together("the start of the chains"):
            potential, z = self._potential_and_start()
            chains = self._new_chains(potential)
        check_alike(ranks, chains, z, options.num_chains)
        chains.start(z)
        with ranks.fail_together("the first checkpoint"):
            if self.checkpoint is not None:
                self.checkpoint.start(chains)
            if chains.store is not None:
                chains.store.open()
        return self._go_on(chains)

    def resume(self) -> Results:
        """The draws of a run that goes on from its last checkpoint."""
        options, ranks = self.options, self.ranks
        assert options.checkpoint is not None
        payload = read_checkpoint(options.checkpoint, ranks)
        with ranks.fail_together("going on from the checkpoint"):
            chains = self._new_chains(self._potential_and_start(start=False)[0], payload["store"])
            assert self.checkpoint is not None
            self.checkpoint.compare(payload)
            self.checkpoint.load(chains, payload)
        return self._go_on(chains)

    def extend(self, num_samples: int) -> Results:
        """The draws of the run, and of ``num_samples`` transitions more.

        Raises:
            RuntimeError: if the run was interrupted, or the kernel was used for another since.
        """
        chains, checkpoint = self.chains, self.checkpoint
        assert chains is not None
        if not chains.done:
            raise RuntimeError(
                "the run was interrupted, within a transition: resume it from a checkpoint, or run"
                " anew"
            )
        if self.kernel.potential is not chains.potential:
            raise RuntimeError(f"{self.kernel!r} was used for another run since: run anew")
        if checkpoint is not None and not checkpoint.has_all(chains):
            checkpoint.save(chains)  # which failed at the end of the run
        chains.extend(num_samples)
        if checkpoint is not None:  # which from now on speaks of the longer run
            with self.ranks.fail_together("the checkpoint of the extension"):
                checkpoint.save(chains)
        return self._go_on(chains)

    def run_until(
        self, target: Target, start: Callable[[], Results]
    ) -> tuple[Results, list[Finding]]:
        """The draws of a run that is extended until a target is met.

        Args:
            target: what to meet.
            start: makes the first draws, :meth:`run` or :meth:`resume`.

        Returns:
            The draws, and what they miss.
        """
        self.target, since = target, time.monotonic()
        results, pace = start(), math.inf  # seconds for each draw
        chains = self.chains
        assert chains is not None
        while chains.done:
            num, now = chains.records["draws"].count, time.monotonic()
            samples = self._some_of_all(results)
            gaps = target.gaps(samples, self.options.num_superchains) if samples else []
            # one answer for all ranks: that of the clock and the draws of the first
            plan = torch.tensor([target.more(gaps, num, now - since, pace), bool(gaps)])
            more, missed = map(int, self.ranks.from_first(plan.double()))
            if more == 0:
                spent = time.monotonic() - since
                return results, [target.missed(gaps, num, spent)] if gaps and missed else []
            results = self.extend(more * self.options.thinning)
            pace = (time.monotonic() - now) / more
        return results, []

    def _some_of_all(self, results: Results) -> dict[str, Tensor]:
        """On the first rank draws of all chains in the sites that count, elsewhere none."""
        names = None if self.target is None else self.target.names
        if results.store is None:
            return {k: x for k, x in results.samples.items() if names is None or k in names}
        here = thinned_draws(results.store, names, READ_AT_ONCE // self.ranks.size)
        of_all = {name: self.ranks.to_first(x) for name, x in here.items()}
        return {name: x for name, x in of_all.items() if x is not None}

    def _potential_and_start(self, start: bool = True) -> tuple[Potential, Tensor]:
        """The potential, and where the chains of this rank start, shape ``(chains, dim)``."""
        kernel, options, given = self.kernel, self.options, self.options.initial_params
        with self.starts():
            if given is not None:  # one chain's values say what the sites are
                kernel.initial_params = self.start_of(0)
            potential = kernel.make_potential(*self.args, **self.kwargs)
            if not start:
                return potential, torch.empty(0)
            here = self.ranks.here(options.num_chains)
            if given is not None:
                shared_out = self.ranks.size > 1
                kernel.initial_params = {k: v[here] if shared_out else v for k, v in given.items()}
            num = here.stop - here.start
            if options.num_superchains is None or given is not None:
                return potential, kernel.initial_position(potential, num)
            starts = options.num_superchains // self.ranks.size
            z = kernel.initial_position(potential, starts)  # (starts * targets, dim)
            together = z.reshape(starts, -1, z.shape[-1]).repeat_interleave(num // starts, 0)
            return potential, together.flatten(0, 1)

    def _new_chains(self, potential: Potential, of_run: str | None = None) -> VectorizedRun:
        """Chains that have not started, and their checkpoint and store (of the run ``of_run``)."""
        options, given = self.options, self.options.given_transforms
        self.transforms = potential.transforms if given is None else given
        keep = self.kept_sites(potential.names)
        if self.target is not None:
            self.target.check(keep)
        if options.checkpoint is not None:
            path, settings = rank_path(options.checkpoint), self._settings(potential, keep)
            self.checkpoint = Checkpoint(path, options.checkpoint_every, settings)
        store, sites = None, [site for site in potential.sites if site.name in keep]
        if options.store is not None:
            path, num = rank_path(options.store), self._superchains_kept
            store = ZarrStore(path, sites, self.transforms, of_run, num)
        with binding_to(self.ranks):
            return VectorizedRun(self.kernel, potential, options, sites, store)

    @property
    def _superchains_kept(self) -> int | None:
        """How many super-chains are in the results: all, or in a store those of this rank."""
        num, options = self.options.num_superchains, self.options
        return num // self.ranks.size if num and options.store is not None else num

    def _settings(self, potential: Potential, keep: list[str]) -> RunSettings:
        """Everything that a run must have in common with the one that it goes on from."""
        options = self.options
        settings = {name: getattr(options, name) for name in COMPARED}
        if options.num_superchains is not None:
            settings["num_superchains"] = options.num_superchains
        given = options.given_transforms or {}  # others follow from the model
        settings |= {
            "save_params": keep,
            "store": options.store is not None,
            "transforms": {name: repr(t) for name, t in given.items()},
            "the kernel": self.kernel,
        }
        found = of_sites(potential)
        for name, value in settings.items():
            found |= fingerprint(value, name)
        return found | fingerprint(self.args, "argument") | fingerprint(self.kwargs, "argument")

    def _go_on(self, chains: VectorizedRun) -> Results:
        """Makes the transitions that are left, and returns all draws."""
        ranks, options, checkpoint = self.ranks, self.options, self.checkpoint
        after = None if checkpoint is None else checkpoint.after_transition
        if ranks.size > 1:
            after = RankSync(ranks, checkpoint)
        silent = options.disable_progbar or ranks.rank > 0
        try:
            with Bar(chains.goal, options.num_chains, silent, done=chains.t) as bar:
                chains.advance(bar, options.hook_fn, after)
        except KeyboardInterrupt:
            draws = chains.records["draws"]
            if draws.count == 0 or ranks.size > 1:  # where each rank was at another transition
                raise
            cut_short(draws.count, (chains.goal - options.warmup_steps) // options.thinning)
        with ranks.fail_together("the end of the run"):
            self.kernel.check_graphs()
        results = self._collect(chains)
        self.chains, self.results = chains, results
        if checkpoint is None or checkpoint.has_all(chains):
            chains.forget()
        return results

    def _collect(self, chains: VectorizedRun) -> Results:
        """The draws so far, of all ranks on the first; those in a store stay there."""
        records, parts = chains.records, {}
        if "warmup" in records and self.results is None:
            parts["warmup_samples"], parts["warmup_fields"] = self._read(chains, "warmup")
        samples, fields = {}, {}
        if chains.store is None:
            samples, fields = self._read(chains, "draws")
        else:
            records["draws"].flush()
            parts["store"] = chains.store.path
        parts |= {"model": self.kernel.model, "args": self.args, "kwargs": self.kwargs}
        parts |= {"transforms": self.transforms, "num_superchains": self._superchains_kept}
        results = Results(samples, fields, **parts)
        if self.results is not None:
            results = self.results.followed_by(results)
        if not results.fields:
            return results
        common = {k: v for k, v in self.kernel.diagnostics().items() if k != "sample_stats"}
        rates = results.fields["acceptance_rate"].mean(1).tolist()
        reported = [
            {**common, "divergences": bad.nonzero().flatten().tolist(), "acceptance rate": rate}
            for bad, rate in zip(results.fields["diverging"], rates, strict=True)
        ]
        return replace(results, reported=reported)

    def _read(self, chains: VectorizedRun, name: str) -> list[dict[str, Tensor]]:
        """Samples and statistics of all ranks on the first, none elsewhere."""
        read = chains.read(chains.records[name], self.transforms)
        on_first = [{k: self.ranks.to_first(v) for k, v in part.items()} for part in read]
        return [{k: v for k, v in part.items() if v is not None} for part in on_first]
