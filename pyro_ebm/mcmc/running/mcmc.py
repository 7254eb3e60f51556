"""Runs kernels: ``pyro.infer.MCMC`` with all chains in one batch.

``chain_method="vectorized"`` (the default for this package's kernels) moves every chain at once:
one evaluation of the model per transition, however many chains. ``"sequential"`` runs one chain
after another and ``"parallel"`` one in each worker process, as Pyro does; they take any Pyro
kernel, ``NUTS`` and ``HMC`` among them. Ranks of a process group can share vectorized chains.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from pyro import poutine
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.diagnostics.convergence import Finding, warn
from pyro_ebm.diagnostics.results import Results
from pyro_ebm.diagnostics.superchains import check_superchains
from pyro_ebm.diagnostics.targets import Target
from pyro_ebm.files import PathLike
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.mcmc.ranks import process_group_of
from pyro_ebm.mcmc.running.convergence import with_findings
from pyro_ebm.mcmc.running.distributed import check_call
from pyro_ebm.mcmc.running.options import Runner, check_chain_method, check_run
from pyro_ebm.mcmc.running.reading import ReadableRun
from pyro_ebm.mcmc.running.sequential import ParallelRunner, SequentialRunner
from pyro_ebm.mcmc.running.storage.checkpoint import checked_every, refuse_to_replace
from pyro_ebm.mcmc.running.storage.zarr_store import ZarrStore
from pyro_ebm.mcmc.running.vectorized import VectorizedRunner
from pyro_ebm.models.checks.intractability import check_normalizers
from pyro_ebm.ops.arguments import check_count, checked_device, shown
from pyro_ebm.ops.distributed import rank_path


class MCMC(ReadableRun):
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
        check_convergence: whether to look at the draws at the end, and to warn if they may be
            wrong (:mod:`pyro_ebm.diagnostics.convergence`).
        num_superchains: how many groups the chains form, of equally many chains that start
            together before the warmup; R-hat is then the nested one
            (:mod:`pyro_ebm.diagnostics.superchains`). For many short, vectorized chains.
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
        hook_fn: Callable[..., object] | None = None,
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
        check_convergence: bool = True,
        num_superchains: int | None = None,
        distributed: bool = False,
    ):
        if not isinstance(kernel, MCMCKernel):
            raise ValueError(
                f"kernel must be an MCMC kernel, as in MCMC(LangevinKernel(model), ...), got"
                f" {shown(kernel)}"
            )
        only_vectorized = {"checkpoint": checkpoint, "store": store, "draws_device": draws_device}
        only_vectorized |= {"distributed": distributed or None, "num_superchains": num_superchains}
        self.chain_method = check_chain_method(chain_method, kernel, only_vectorized)
        self.num_samples = check_count("num_samples", num_samples, 1)
        warmup_steps = self.num_samples if warmup_steps is None else warmup_steps
        self.warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        num_chains = check_count("num_chains", num_chains, 1)
        self.thinning = check_count("thinning", thinning, 1)
        if thinning > num_samples:
            raise ValueError(f"thinning={thinning} leaves none of num_samples={num_samples}")
        if self.chain_method == "parallel" and save_warmup:
            raise ValueError(
                'worker processes keep no warmup: use save_warmup with "vectorized" or "sequential"'
            )
        if num_superchains is not None:
            check_superchains(num_superchains, num_chains, num_samples // thinning)
        self.num_superchains = num_superchains
        check_run(initial_params, num_chains, hook_fn, transforms, save_params, num_superchains)
        super().__init__(kernel, num_chains, transforms)
        self.num_chains: int = num_chains
        self.given_transforms: Mapping[str, Transform] | None = transforms
        self.initial_params, self.hook_fn, self.mp_context = initial_params, hook_fn, mp_context
        self.disable_progbar, self.disable_validation = disable_progbar, disable_validation
        self.save_params, self.save_warmup = save_params, save_warmup
        self.draws_device = checked_device("draws_device", draws_device)
        self.store, self.checkpoint = store, checkpoint
        self.checkpoint_every = checked_every(checkpoint_every)
        self.check_convergence, self.distributed = check_convergence, distributed
        self._validate_kernel(initial_params)
        self.runner: Runner | None = None

    # -- running -------------------------------------------------------------------------------

    @poutine.block
    def run(self, *args: object, **kwargs: object) -> None:
        """Draws the chains, from the start; the arguments go to the model.

        Raises:
            NormalizerError: if an unknown or learned log Z depends on a latent.
            CheckpointError: if a checkpoint or store is there already: :meth:`resume` goes on from
                it.
            ValueError: if no finite starting point is found, or ``initial_params`` do not fit.

        Warns:
            ConvergenceWarning: if the draws may be wrong.
        """
        runner = self._new_runner("run", args, kwargs)
        with self._ranks.fail_together("the check of the run"):
            self._check(args, kwargs)
        self._keep(runner.run())

    def _new_runner(self, call: str, args: tuple[object, ...], kwargs: dict[str, object]) -> Runner:
        """The runner of a run that starts anew, without the draws of the last one."""
        self._results, self.transforms = None, self.given_transforms
        self._args, self._kwargs = args, kwargs  # which arviz.from_pyro reads
        self._ranks = process_group_of(self.num_chains, self.distributed, self.num_superchains)
        if self.chain_method == "vectorized":
            assert isinstance(self.kernel, PyroKernel)
            runner = VectorizedRunner(self.kernel, self, args, kwargs, self._ranks)
        else:
            kind = SequentialRunner if self.chain_method == "sequential" else ParallelRunner
            runner = kind(self.kernel, self, args, kwargs)
        self.runner = runner
        check_call(self._ranks, call)
        return runner

    def _keep(self, results: Results, missed: Sequence[Finding] = ()) -> None:
        self.transforms = dict(results.transforms)
        found = with_findings(results, self.kernel) if self.check_convergence else results
        self._results = replace(found, findings=(*found.findings, *missed))
        warn(self._results.findings, stacklevel=4)  # at the call of run, resume or extend

    def _check(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Refuses what cannot be run."""
        if self.checkpoint is not None:
            refuse_to_replace(rank_path(self.checkpoint, "checkpoint"))
        if self.store is not None:
            ZarrStore.refuse_to_replace(rank_path(self.store, "store"))
        kernel, model = self.kernel, getattr(self.kernel, "model", None)
        ours = isinstance(kernel, PyroKernel)
        # the kernels of this package check for themselves, but too late in a worker process
        if model is None or (ours and self.chain_method != "parallel"):
            return
        if ours and kernel.samples_intractable:
            kernel.make_potential(*args, **kwargs)  # which refuses what does not cancel
        else:
            check_normalizers(model, args, kwargs)
        if self.initial_params is not None:  # Pyro's kernels take any names and shapes
            potential = (
                kernel.make_potential(*args, **kwargs)
                if ours
                else ModelPotential(model, args, kwargs)
            )
            potential.at(self.initial_params, self.num_chains)

    @poutine.block
    def resume(self, *args: object, **kwargs: object) -> None:
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
        runner = self._new_runner("resume", args, kwargs)
        assert isinstance(runner, VectorizedRunner)
        self._keep(runner.resume())

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
        num_samples = check_count("num_samples", num_samples, 1)
        if not isinstance(self.runner, VectorizedRunner) or self.runner.chains is None:
            raise RuntimeError(
                "only a finished run of vectorized chains can be extended: call run, or resume,"
                " first"
            )
        self._keep(self.runner.extend(num_samples))

    @poutine.block
    def run_until(
        self,
        *args: object,
        ess: float = 1000.0,
        rhat: float = 1.01,
        max_draws: int | None = None,
        max_seconds: float | None = None,
        names: Sequence[str] | None = None,
        **kwargs: object,
    ) -> None:
        """Runs, and extends the run until enough is known of every quantity.

        ``num_samples`` transitions come first. While the effective sample size of an element, or
        its R-hat, as :meth:`diagnostics` has them, is not what it should be, as many draws follow
        as are expected to do, between a tenth and all of those that there are. The draws are those
        of one run of that length; given the seed so is their number, but for ``max_seconds``.

        With a ``checkpoint`` that is there already the run goes on from it, as by :meth:`resume`.
        Of draws in a ``store`` that are too many for the memory some are looked at, evenly spaced:
        their effective number is at most that of all.

        Args:
            *args: of the model.
            ess: the least effective sample size, of all chains together.
            rhat: the largest R-hat; nested with ``num_superchains``.
            max_draws: the most draws of each chain, by default 100 times those of ``num_samples``.
            max_seconds: the most time; the warmup and the first ``num_samples`` are not cut short.
            names: the sites that count; all that are kept by default.
            **kwargs: of the model.

        Raises:
            ValueError: for a target out of range, or names that are not kept.
            RuntimeError: if its chains are not vectorized.

        Warns:
            ConvergenceWarning: if it stopped before: which target was missed, where.

        Example:
            >>> from pyro_ebm import ChEESKernel
            >>> normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            >>> mcmc = MCMC(ChEESKernel(normal), 20, 60, num_chains=10, disable_progbar=True)
            >>> mcmc.run_until(ess=2000)
            >>> bool(mcmc.diagnostics()["x"]["n_eff"].min() >= 2000)
            True
        """
        if self.chain_method != "vectorized":
            raise RuntimeError(
                f'run_until extends vectorized chains, and these are "{self.chain_method}": use a'
                ' kernel of pyro_ebm, with chain_method="vectorized", its default'
            )
        most = 100 * (self.num_samples // self.thinning) if max_draws is None else max_draws
        if check_count("max_draws", most, 1) < self.num_samples // self.thinning:
            raise ValueError(
                f"max_draws={most} is less than the first num_samples={self.num_samples}"
                f" (thinning={self.thinning}) make"
            )
        target = Target(ess, rhat, names, most, max_seconds)
        there = self.checkpoint is not None and rank_path(self.checkpoint, "checkpoint").exists()
        runner = self._new_runner("resume" if there else "run", args, kwargs)
        assert isinstance(runner, VectorizedRunner)
        if not there:
            with self._ranks.fail_together("the check of the run"):
                self._check(args, kwargs)
        self._keep(*runner.run_until(target, runner.resume if there else runner.run))
