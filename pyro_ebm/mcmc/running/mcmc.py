"""Runs kernels: ``pyro.infer.MCMC`` with all chains in one batch.

``chain_method="vectorized"`` (the default for this package's kernels) moves every chain at once:
one evaluation of the model per transition, however many chains. ``"sequential"`` runs one chain
after another and ``"parallel"`` one in each worker process, as Pyro does; they take any Pyro
kernel, ``NUTS`` and ``HMC`` among them. Ranks of a process group can share vectorized chains.
"""

import datetime
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.files import PathLike
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.mcmc.ranks import binding_to, process_group_of
from pyro_ebm.mcmc.running.checkpoint import Checkpoint, checked_every
from pyro_ebm.mcmc.running.distributed import RankSync, check_alike, check_call, common_checkpoint
from pyro_ebm.mcmc.running.draws import Bar, cut_short
from pyro_ebm.mcmc.running.run_settings import fingerprint, of_sites
from pyro_ebm.mcmc.running.sequential import ChainByChain, check_run
from pyro_ebm.mcmc.running.vectorized import VectorizedRun
from pyro_ebm.mcmc.running.zarr_store import ZarrStore
from pyro_ebm.models.checks.intractability import check_normalizers
from pyro_ebm.ops.arguments import check_count, checked_device, shown
from pyro_ebm.ops.distributed import rank_path

CHAIN_METHODS = ("vectorized", "sequential", "parallel")
COMPARED = ("num_samples", "warmup_steps", "num_chains", "thinning", "save_warmup")


class MCMC(ChainByChain):
    r"""A drop-in for ``pyro.infer.MCMC`` that runs many chains at once.

    A model whose unknown log Z depends on a latent is refused before sampling
    (:class:`~pyro_ebm.mcmc.NormalizerError`), and so is one that is not a fixed density: random
    numbers inside it, latents that come and go. The model is validated once, when it is traced;
    proposals outside a support, or at which an argument of a distribution is not valid, are then
    rejected, not raised. Ctrl-C keeps the draws made so far (but in parallel, where the worker
    processes hold them).

    Args:
        kernel: any kernel of this package, or of Pyro (one chain at a time).
        num_samples: transitions of each chain after warmup.
        warmup_steps: transitions before; as many as ``num_samples`` by default.
        initial_params: unconstrained starting values, each of shape ``(num_chains, *site)``, or
            ``site`` for a single chain.
        num_chains: number of chains; any number when vectorized.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after every transition, with the
            stages ``"Warmup"`` and ``"Sample"``, followed by the chain, as in ``"Sample [0]"``,
            when several run one after another; vectorized, ``params`` holds all of them.
        mp_context: how worker processes start when parallel, ``"spawn"`` by default.
        disable_progbar: whether to show no progress.
        disable_validation: as in Pyro, for its own kernels.
        transforms: from the supports to the reals, for kernels on a ``potential_fn``; the
            kernel's own by default.
        save_params: the sites to keep; all by default.
        chain_method: ``"vectorized"``, ``"sequential"`` or ``"parallel"``.
        thinning: keep every ``thinning``-th draw, ``num_samples // thinning`` in all.
        save_warmup: whether to keep the warmup too (not in parallel).
        draws_device: where vectorized draws are kept, as ``"cpu"`` while the chains are on a GPU;
            by default where the chains are.
        store: the folder of a Zarr store that vectorized draws are streamed to, in place of the
            memory; :meth:`to_arviz` opens it. Needs the package ``zarr``.
        checkpoint: the file to which the state of vectorized chains is saved as they run, for
            :meth:`resume`; draws go to a folder beside it.
        checkpoint_every: how often: a number of transitions, or a time. It is also saved before
            the first transition and after the last.
        distributed: whether the ranks of the process group share vectorized chains, and all make
            the same calls: warmup learns from all chains, the draws come to rank 0, and each rank
            has files of its own. Without a group it changes nothing.

    Raises:
        ValueError: for numbers out of range, or a chain method that the kernel cannot do.

    Example:
        >>> from pyro_ebm import LangevinKernel, UnnormalizedEnergy
        >>> p = UnnormalizedEnergy(lambda x: x.abs())
        >>> mcmc = MCMC(LangevinKernel(p), 100, num_chains=20, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([20, 100])
        >>> sorted(mcmc.get_extra_fields())
        ['acceptance_rate', 'diverging', 'lp', 'step_size']
    """

    def __init__(
        self,
        kernel: MCMCKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., Any] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: dict[str, Transform] | None = None,
        save_params: list[str] | None = None,
        *,
        chain_method: str | None = None,
        thinning: int = 1,
        save_warmup: bool = False,
        draws_device: torch.device | str | None = None,
        store: PathLike | None = None,
        checkpoint: PathLike | None = None,
        checkpoint_every: int | datetime.timedelta = datetime.timedelta(minutes=1),
        distributed: bool = False,
    ):
        if not isinstance(kernel, MCMCKernel):
            raise ValueError(
                f"kernel must be an MCMC kernel, as in MCMC(LangevinKernel(model), ...), got"
                f" {shown(kernel)}"
            )
        if chain_method is None:
            chain_method = "vectorized" if isinstance(kernel, Kernel) else "sequential"
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        num_samples = check_count("num_samples", num_samples, 1)
        warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        num_chains = check_count("num_chains", num_chains, 1)
        thinning = check_count("thinning", thinning, 1)
        if thinning > num_samples:
            raise ValueError(f"thinning={thinning} leaves none of num_samples={num_samples}")
        if chain_method not in CHAIN_METHODS:
            raise ValueError(f"chain_method must be one of {CHAIN_METHODS}, got {chain_method!r}")
        if chain_method == "vectorized" and not isinstance(kernel, Kernel):
            raise ValueError(
                f"{type(kernel).__name__} moves one chain at a time: use"
                ' chain_method="sequential" or "parallel", or a kernel of pyro_ebm'
            )
        if chain_method == "parallel" and save_warmup:
            raise ValueError(
                'worker processes keep no warmup: use save_warmup with "vectorized" or "sequential"'
            )
        if chain_method != "vectorized":
            given = {"checkpoint": checkpoint, "store": store, "draws_device": draws_device}
            given["distributed"] = distributed or None
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(
                    f'{names[0]}= needs chain_method="vectorized", got {chain_method!r}'
                    f" for {type(kernel).__name__}"
                )
        check_run(initial_params, num_chains, hook_fn, transforms, save_params)
        super().__init__(kernel, num_chains, transforms)
        self._given_transforms = transforms
        self.num_samples, self.warmup_steps = num_samples, warmup_steps
        self.initial_params, self.hook_fn, self.mp_context = initial_params, hook_fn, mp_context
        self.disable_progbar, self.disable_validation = disable_progbar, disable_validation
        self.save_params = save_params
        self.chain_method, self.thinning, self.save_warmup = chain_method, thinning, save_warmup
        self.draws_device = checked_device("draws_device", draws_device)
        self.store, self.checkpoint = store, checkpoint
        self.checkpoint_every = checked_every(checkpoint_every)
        self.distributed = distributed
        self._validate_kernel(initial_params)
        self._run: VectorizedRun | None = None
        self._checkpoint: Checkpoint | None = None

    # -- running -------------------------------------------------------------------------------

    @poutine.block
    def run(self, *args: Any, **kwargs: Any) -> None:
        """Draws the chains, from the start; the arguments go to the model.

        Raises:
            NormalizerError: if an unknown or learned log Z depends on a latent.
            CheckpointError: if a checkpoint or store is there already: :meth:`resume` goes on from
                it.
            ValueError: if no finite starting point is found, or ``initial_params`` do not fit.
        """
        self._start_anew(args, kwargs)
        check_call(self._ranks, "run")
        with self._ranks.fail_together("the check of the run"):
            self._check(args, kwargs)
        run = {"vectorized": self._run_vectorized, "sequential": self._run_sequential}
        with self._checked_model(args, kwargs):
            run.get(self.chain_method, self._run_parallel)(args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what cannot be run."""
        if self.checkpoint is not None:
            Checkpoint.refuse_to_replace(self._own(self.checkpoint))
        if self.store is not None:
            ZarrStore.refuse_to_replace(self._own(self.store))
        model = getattr(self.kernel, "model", None)
        # the kernels of this package check for themselves, but too late in a worker process
        ours = isinstance(self.kernel, Kernel) and self.chain_method != "parallel"
        if model is not None and not ours:
            if getattr(self.kernel, "samples_intractable", False):
                self.kernel.make_potential(*args, **kwargs)  # which refuses what does not cancel
            else:
                check_normalizers(model, args, kwargs)
            if self.initial_params is not None:  # Pyro's kernels take any names and shapes
                if isinstance(self.kernel, Kernel):
                    potential = self.kernel.make_potential(*args, **kwargs)
                else:
                    potential = ModelPotential(model, args, kwargs)
                potential.at(self.initial_params, self.num_chains)

    @poutine.block
    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Goes on from the last checkpoint, as if the run had never stopped.

        The kernel, the settings and the model's arguments are to be those of the run. Draws and
        statistics are then the same as without the interruption, on a CPU to the last bit, and so
        is the global random state afterwards. A run that was finished gives its draws again; one
        that was killed while it was extended goes on to the end of that. Never does ``resume``
        start anew.

        Args:
            *args: of the model.
            **kwargs: of the model.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            CheckpointError: if it cannot be read, or is that of another model, other data or other
                settings; it names the difference.
            RuntimeError: without a ``checkpoint``.
        """
        if self.checkpoint is None:
            raise RuntimeError(
                'there is nothing to resume from: give a file, as in MCMC(..., checkpoint="a.ckpt")'
            )
        ranks = self._ranks = process_group_of(self.num_chains, self.distributed)
        check_call(ranks, "resume")
        payload = common_checkpoint(ranks, self._own(self.checkpoint))
        self._start_anew(args, kwargs)
        with ranks.fail_together("going on from the checkpoint"):
            potential, _ = self._potential_and_start(args, kwargs, start=False)
            run = self._new_run(potential)
            checkpoint = self._new_checkpoint(run, args, kwargs)
            assert checkpoint is not None
            checkpoint.compare(payload)
            if self.store is not None:
                path = self._own(self.store)
                run.store = ZarrStore(path, run.sites, self._transforms, payload["store"])
            checkpoint.load(run, payload)
        self._go_on(run, checkpoint)

    @poutine.block
    def extend(self, num_samples: int) -> None:
        """Adds draws to a finished run, without another warmup.

        (:meth:`run` starts anew, as Pyro's does.) In a new process, :meth:`resume` the finished run
        first.

        Args:
            num_samples: how many transitions more of each chain.

        Raises:
            RuntimeError: before a run is finished, or if its chains were not vectorized.

        Example:
            >>> from pyro_ebm import LangevinKernel, UnnormalizedEnergy
            >>> p = UnnormalizedEnergy(torch.square)
            >>> mcmc = MCMC(LangevinKernel(p), 100, num_chains=20, disable_progbar=True)
            >>> mcmc.run()
            >>> mcmc.extend(50)
            >>> mcmc.get_samples(group_by_chain=True)["x"].shape
            torch.Size([20, 150])
        """
        run, num_samples = self._run, check_count("num_samples", num_samples, 1)
        if run is None:
            raise RuntimeError(
                "only a finished run of vectorized chains can be extended: call run, or resume,"
                " first"
            )
        if not run.done:
            raise RuntimeError(
                "the run was interrupted, within a transition: resume it from a checkpoint, or run"
                " anew"
            )
        if run.kernel._potential is not run.potential:
            raise RuntimeError(f"{run.kernel!r} was used for another run since: run anew")
        if self._checkpoint is not None and not self._checkpoint.has_all(run):
            self._checkpoint.save(run)  # which failed at the end of the run
        run.extend(num_samples)
        if self._checkpoint is not None:  # which from now on speaks of the longer run
            with self._ranks.fail_together("the checkpoint of the extension"):
                self._checkpoint.save(run)
        self._go_on(run, self._checkpoint)

    def _start_anew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clear()
        self._ranks = process_group_of(self.num_chains, self.distributed)
        self._run = self._checkpoint = None
        self._args, self._kwargs = args, kwargs
        self.transforms = self._given_transforms

    def _run_vectorized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ranks = self._ranks
        ranks.seed()
        with ranks.fail_together("the start of the chains"):
            potential, z = self._potential_and_start(args, kwargs)
            run = self._new_run(potential)
            if self.store is not None:
                run.store = ZarrStore(self._own(self.store), run.sites, self._transforms)
            checkpoint = self._new_checkpoint(run, args, kwargs)
        check_alike(ranks, run, z, self.num_chains)
        run.start(z)
        with ranks.fail_together("the first checkpoint"):
            if checkpoint is not None:
                checkpoint.start(run)
            if run.store is not None:
                run.store.open()
        self._go_on(run, checkpoint)

    def _own(self, path: PathLike) -> PathLike:
        """Where this rank keeps its part."""
        return rank_path(path)

    def _potential_and_start(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], start: bool = True
    ) -> tuple[Potential, Tensor]:
        kernel = self.kernel
        assert isinstance(kernel, Kernel)
        with self._starts(kernel):
            if self.initial_params is not None:  # one chain's values say what the sites are
                kernel.initial_params = self._start_of(0)
            potential = kernel.make_potential(*args, **kwargs)
            if not start:
                return potential, torch.empty(0)
            here = self._ranks.here(self.num_chains)
            if self.initial_params is not None:
                shared_out, given = self._ranks.size > 1, self.initial_params
                kernel.initial_params = {k: v[here] if shared_out else v for k, v in given.items()}
            return potential, kernel.initial_position(potential, here.stop - here.start)

    def _new_run(self, potential: Potential) -> VectorizedRun:
        assert isinstance(self.kernel, Kernel)
        if self.transforms is None:
            self.transforms = potential.transforms
        with binding_to(self._ranks):
            return VectorizedRun(
                self.kernel,
                potential,
                self.num_samples,
                self.warmup_steps,
                self.thinning,
                self._kept(potential.names),
                self.save_warmup,
                self.draws_device,
            )

    @property
    def _transforms(self) -> dict[str, Transform]:
        assert self.transforms is not None
        return dict(self.transforms)

    def _new_checkpoint(
        self, run: VectorizedRun, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        settings = {name: getattr(self, name) for name in COMPARED}
        settings = {**settings, "save_params": run.keep, "store": self.store is not None}
        given = self._given_transforms or {}  # others follow from the model
        settings["transforms"] = {name: repr(t) for name, t in given.items()}
        described = [fingerprint(value, name) for name, value in settings.items()]
        described += [of_sites(run.potential), fingerprint(self.kernel, "the kernel")]
        described += [fingerprint(args, "argument"), fingerprint(kwargs, "argument")]
        settings = {name: value for part in described for name, value in part.items()}
        return Checkpoint(self._own(self.checkpoint), self.checkpoint_every, settings)

    def _go_on(self, run: VectorizedRun, checkpoint: Checkpoint | None) -> None:
        ranks, draws = self._ranks, run.records["draws"]
        after = None if checkpoint is None else checkpoint.after_transition
        if ranks.size > 1:
            after = RankSync(ranks, checkpoint)
        silent = self.disable_progbar or ranks.rank > 0
        try:
            with Bar(run.goal, self.num_chains, silent, done=run.t) as bar:
                run.advance(bar, self.hook_fn, after)
        except KeyboardInterrupt:
            if draws.count == 0 or ranks.size > 1:  # where each rank was at another transition
                raise
            cut_short(draws.count, (run.goal - self.warmup_steps) // self.thinning)
        self._run, self._checkpoint = run, checkpoint
        self._take(run, self._transforms)
        if checkpoint is None or checkpoint.has_all(run):
            run.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_checkpoint": None}
