r"""Sequential Monte Carlo: a population that is taken from the prior to the posterior.

A Markov chain that starts in one of several modes stays there. A population that is spread out
while the density is still flat, and is reweighted, resampled and moved as the density becomes what
it is, has particles in all of them, each with its share; and what the weights add up to is the
evidence. The path, and the kernels that move along it, are those of annealed importance sampling
(:mod:`pyro_ebm.evidence.model_path`); the difference is the resampling, which drops particles that
have become unlikely and copies the others.

The temperatures are chosen as the particles go: each step costs a given share of the conditional
effective sample size (:mod:`pyro_ebm.evidence.smc.particles`, where the error of the estimate is
derived too). Kernels are tuned to the population at each temperature, and move it until it has
forgotten where it was (:mod:`pyro_ebm.evidence.smc.moves`).

With fixed temperatures and kernels :math:`\hat Z` is unbiased for any number :math:`N` of
particles. As temperatures and tuning follow the particles, it has a bias of the order
:math:`1 / N`, below its error, which is of the order :math:`1 / \sqrt N`.

Reference:
    Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers. Chopin (2002), A sequential
    particle filter method for static models. Beskos, Jasra, Kantas and Thiery (2016), On the
    convergence of adaptive sequential Monte Carlo methods (the bias of adaptation). Dai, Heng,
    Jacob and Whiteley (2022), An invitation to sequential Monte Carlo samplers.
"""

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.diagnostics.arviz import to_arviz
from pyro_ebm.diagnostics.convergence import Finding, warn
from pyro_ebm.diagnostics.results import Results, select
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.evidence.contents import looked_at, names_of
from pyro_ebm.evidence.model_path import ModelPath
from pyro_ebm.evidence.model_starts import Guide
from pyro_ebm.evidence.result import EvidenceEstimate
from pyro_ebm.evidence.smc.checkpoint import SMCCheckpoint
from pyro_ebm.evidence.smc.findings import findings_of
from pyro_ebm.evidence.smc.particles import effective_sample_size
from pyro_ebm.evidence.smc.run import Temperature, TemperedRun
from pyro_ebm.files import PathLike
from pyro_ebm.mcmc.kernels.base import Kernel, checked_kernel
from pyro_ebm.mcmc.kernels.gradient.hmc import ChEESKernel
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel, check_model
from pyro_ebm.mcmc.ranks import ProcessGroup, binding_to, process_group_of
from pyro_ebm.mcmc.running.run_settings import RunSettings, fingerprint, of_sites
from pyro_ebm.mcmc.running.storage.checkpoint import checked_every
from pyro_ebm.models.checks.fixed_density import check_repeats
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.normalizer.annealing.choices import kernel_of, path_of
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, log_mean_exp, stated_error
from pyro_ebm.normalizer.proposals import Proposal
from pyro_ebm.ops.arguments import check_count, check_number, shown

RESAMPLED = 0.7
"""The share of effective particles below which they are resampled."""
PLANNED = 400
"""Transitions that are expected, by which ``jit_compile="auto"`` decides."""


class SMC:
    r"""Sequential Monte Carlo along a path of temperatures, with the evidence.

    .. math:: \tilde p_\beta(z) \propto p(z)\, p(y \mid z)^\beta, \qquad
              \hat p(y) = \prod_t \sum_i W_{t-1}^i
              \frac{\tilde p_{\beta_t}(z^i)}{\tilde p_{\beta_{t-1}}(z^i)}

    The particles are draws of the posterior, all of equal weight, in the order of their ancestors:
    relatives are neighbours, so that the effective sample sizes of :meth:`summary` and of ArviZ
    count them as what they are. A posterior of several modes has its shares right up to the Monte
    Carlo error of as many draws as there are ancestors.

    Args:
        model: a Pyro model, or an :class:`~pyro_ebm.UnnormalizedEnergy` (without a batch), whose
            :math:`\log Z` is then the evidence.
        kernel: moves the particles, a kernel without a model: by default
            :class:`~pyro_ebm.ChEESKernel`, and Gibbs sweeps for discrete energies. Discrete latents
            are summed out, unless a discrete kernel moves them (in a
            :class:`~pyro_ebm.mcmc.CompositeKernel`).
        num_particles: how many.
        guide: where to start, instead of at the prior: a Pyro guide with a density over the latents
            (``AutoNormal``, ``AutoMultivariateNormal``, or written by hand), fitted or not; of an
            energy a normalized distribution. It should be wider than the posterior.
        num_moves: transitions at each temperature; by default as many as the particles need to
            forget where they were, up to 50.
        ess_drop: the share of the conditional effective sample size that a temperature may cost:
            less of it is more temperatures.
        shared_improper: latents whose prior may be improper; they need a guide. The evidence is
            then known up to a factor, see :func:`~pyro_ebm.log_evidence`.
        disable_progbar: whether to show no progress.
        checkpoint: the file to which the particles are saved on their way, for :meth:`resume`.
        checkpoint_every: how often: a number of temperatures, or a time.
        check_convergence: whether to warn if the draws may be wrong.
        distributed: whether the ranks of the process group share the particles. All make the same
            calls and get the same results.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x.abs(), 0.3), obs=y)
        >>> smc = SMC(model, num_particles=500, disable_progbar=True)
        >>> smc.run(torch.tensor(1.0))
        >>> smc.log_evidence  # log N(1; 0, 1.09) + log 2 = -0.728
        EvidenceEstimate(log evidence = -0.6... +- 0.0..., method=smc, ESS=..., temperatures=...)
        >>> x = smc.get_samples()["x"]  # two modes, of equal shares
        >>> bool(((x > 0).float().mean() - 0.5).abs() < 0.1)
        True
    """

    def __init__(
        self,
        model: Model | UnnormalizedEnergy,
        kernel: Kernel | None = None,
        num_particles: int = 1000,
        guide: Guide | Proposal | None = None,
        *,
        num_moves: int | None = None,
        ess_drop: float = 0.5,
        shared_improper: Collection[str] = (),
        disable_progbar: bool = False,
        checkpoint: PathLike | None = None,
        checkpoint_every: int | datetime.timedelta = datetime.timedelta(minutes=1),
        check_convergence: bool = True,
        distributed: bool = False,
    ):
        check_model(model)
        if kernel is not None and getattr(checked_kernel(kernel), "has_model", False):
            raise ValueError(
                f"give model (and arguments) to SMC, and a kernel without them, not {kernel!r}"
            )
        if isinstance(model, UnnormalizedEnergy) and model.batch_shape.numel() != 1:
            raise ValueError(
                f"the energies of a batch need temperatures of their own, and {model!r} has"
                f" batch_shape={tuple(model.batch_shape)}: run one at a time"
            )
        self.model, self.kernel, self.guide = model, kernel, guide
        self.num_particles = check_count("num_particles", num_particles, 10)
        self.num_moves = None if num_moves is None else check_count("num_moves", num_moves, 1)
        check_number("ess_drop", ess_drop)
        if not 0 < ess_drop < 1:
            raise ValueError(f"ess_drop must lie in (0, 1), got {ess_drop}")
        self.ess_drop, self.shared_improper = float(ess_drop), names_of(shared_improper)
        self.disable_progbar, self.distributed = disable_progbar, distributed
        self.checkpoint, self.checkpoint_every = checkpoint, checked_every(checkpoint_every)
        self.check_convergence = check_convergence
        self.path_settings: Mapping[str, Any] = {}
        self._results: Results | None = None
        self._estimate: NormalizerEstimate | None = None
        self._temperatures: tuple[Temperature, ...] = ()

    # -- running -------------------------------------------------------------------------------

    @poutine.block
    def run(self, *args: object, **kwargs: object) -> None:
        """Takes the particles from the start to the model; the arguments go to it.

        Raises:
            NormalizerError: for an energy whose log Z is unknown, learned, or moves with a latent,
                or a composite likelihood.
            CheckpointError: if a checkpoint is there already.
            ValueError: for an improper prior, a guide that does not suit the model, or weights that
                are no numbers.

        Warns:
            ConvergenceWarning: if the draws, or the error of the evidence, may be wrong.
        """
        ranks = process_group_of(self.num_particles, self.distributed)
        ranks.seed(alike=True)
        run, checkpoint = self._new_run(ranks, args, kwargs)
        if checkpoint is not None:
            with ranks.fail_together("the check of the run"):
                checkpoint.refuse_to_replace()
        ranks.seed()
        with ranks.fail_together("the start of the particles"):
            run.start()
        some = ranks.from_first(run.z[: min(4, ranks.num_chains // ranks.size)])
        ranks.check_alike(run.path.at(1.0)(some).detach(), "the log density of the model")
        self._go_on(run, checkpoint, args, kwargs)

    @poutine.block
    def resume(self, *args: object, **kwargs: object) -> None:
        """Goes on from the last checkpoint, as if the run had never stopped.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            CheckpointError: if it is of another run.
            RuntimeError: without a ``checkpoint``.
        """
        if self.checkpoint is None:
            raise RuntimeError(
                'there is nothing to resume from: give a file, as in SMC(..., checkpoint="a.ckpt")'
            )
        ranks = process_group_of(self.num_particles, self.distributed)
        ranks.seed(alike=True)
        run, checkpoint = self._new_run(ranks, args, kwargs)
        assert checkpoint is not None
        checkpoint.load(run)
        self._go_on(run, checkpoint, args, kwargs)

    def _new_run(
        self, ranks: ProcessGroup, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[TemperedRun, SMCCheckpoint | None]:
        self._results = self._estimate = None
        with ranks.fail_together("the check of the model"):
            path = self._path(args, kwargs)
            kernel = self.kernel
            if kernel is None and path.blocks is None and not _has_discrete(path):
                kernel = ChEESKernel()
            kernel = kernel_of(kernel, None, path)
        kernel.planned_steps = PLANNED
        with binding_to(ranks):
            kernel.bind(path, warmup_steps=0)
        number = self.num_particles
        run = TemperedRun(path, kernel, ranks, number, self.ess_drop, RESAMPLED, self.num_moves)
        if self.checkpoint is None:
            return run, None
        settings: RunSettings = of_sites(path)
        for name in ("num_particles", "num_moves", "ess_drop"):
            settings |= fingerprint(getattr(self, name), name)
        settings |= fingerprint(kernel, "the kernel")
        settings |= fingerprint(args, "argument") | fingerprint(kwargs, "argument")
        return run, SMCCheckpoint(self.checkpoint, self.checkpoint_every, settings, ranks)

    def _path(self, args: tuple[object, ...], kwargs: dict[str, object]) -> AnnealingPath:
        if isinstance(self.model, UnnormalizedEnergy):
            if args or kwargs:
                raise ValueError(f"an energy takes no arguments, got {shown(args or kwargs)}")
            return path_of(self.model, self.guide)
        settings: dict[str, Any] = {}
        if isinstance(self.kernel, PyroKernel):
            settings = {
                "transforms": self.kernel.given_transforms,
                "max_plate_nesting": self.kernel.max_plate_nesting,
                "init_strategy": self.kernel.init_strategy,
                "keep_discrete": self.kernel.discrete or self.kernel.keep_discrete,
            }
        settings |= {k: v for k, v in self.path_settings.items() if v is not None}
        return ModelPath.of_model(
            self.model, args, kwargs, self.guide, improper=self.shared_improper, **settings
        )

    def _go_on(
        self,
        run: TemperedRun,
        checkpoint: SMCCheckpoint | None,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        path, ranks = run.path, run.ranks
        with torch.no_grad():
            check_repeats(lambda: (path.at(1.0)(run.z[:4]),), lambda: "the model")
        if checkpoint is not None:
            checkpoint.save(run)
        silent = self.disable_progbar or ranks.rank > 0
        label = f"SMC, {self.num_particles} particles"
        with tqdm(total=1.0, initial=run.beta, disable=silent, desc=label) as bar:
            while not run.done:
                before = run.beta
                run.advance()
                last = run.temperatures[-1]
                bar.update(run.beta - before)
                bar.set_postfix_str(
                    f"temperature {len(run.temperatures)}, acceptance {last.acceptance:.2f},"
                    f" {last.ancestors} ancestors",
                    refresh=False,
                )
                if checkpoint is not None:
                    checkpoint.save(run)
        with ranks.fail_together("the end of the run"):
            run.kernel.check_graphs()
        self._keep(run, args, kwargs)

    def _keep(self, run: TemperedRun, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        path, log_w = run.path, run.log_weights
        self._temperatures = tuple(run.temperatures)
        ess = effective_sample_size(log_w)
        value = log_mean_exp(log_w) + path.log_normalizer.double().reshape(())
        betas = [0.0, *(t.beta for t in run.temperatures)]
        estimate = NormalizerEstimate(
            value=value,
            std_error=stated_error(log_w),
            method="smc",
            ess=ess,
            log_weights=log_w + path.log_normalizer.double().reshape(()),
            lower=value,
            zeros=(log_w == -torch.inf).double().mean(),
            betas=torch.tensor(betas, dtype=torch.float64),
        )
        self._estimate = self._of_model(estimate, args, kwargs)
        z = run.ranks.rows(run.z)
        with torch.no_grad():
            lp = -run.ranks.rows(path.at(1.0)(run.z))
        samples = {name: x[None] for name, x in path.constrain(z).items()}
        fields = {path.target.lp_name: lp[None], "ancestor": run.ancestors[None]}
        found = findings_of(run) if self.check_convergence else []
        self._results = Results(
            samples,
            fields,
            reported=[{"divergences": [], "acceptance rate": run.temperatures[-1].acceptance}],
            transforms=path.transforms,
            model=self.model,
            args=args,
            kwargs=kwargs,
            requested=(1, self.num_particles),
            findings=found,
        )
        warn(found, stacklevel=4)

    def _of_model(
        self, estimate: NormalizerEstimate, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> NormalizerEstimate:
        if isinstance(self.model, UnnormalizedEnergy):
            return estimate
        _, num_data = looked_at(BoundModel(self.model, args, kwargs), self.shared_improper)
        kept = {field.name: getattr(estimate, field.name) for field in fields(NormalizerEstimate)}
        return EvidenceEstimate(**kept, shared_improper=self.shared_improper, num_data=num_data)

    # -- reading -------------------------------------------------------------------------------

    @property
    def results(self) -> Results:
        """The draws, and what the model was called with; raises a RuntimeError before a run."""
        if self._results is None:
            raise RuntimeError("there are no draws yet: call run first")
        return self._results

    @property
    def log_evidence(self) -> NormalizerEstimate:
        r"""The estimate of :math:`\log p(y)`, with its error.

        Its ``ess`` is the effective number of ancestors.
        """
        if self._estimate is None:
            raise RuntimeError("there is no estimate yet: call run first")
        return self._estimate

    @property
    def temperatures(self) -> Sequence[Temperature]:
        """What happened at each temperature of the last run."""
        return self._temperatures

    @property
    def findings(self) -> Sequence[Finding]:
        """What is wrong with the run, as its warning said it."""
        return self.results.findings

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        """The particles, draws of the posterior, in the supports of their sites.

        Args:
            num_samples: if given, this many are resampled with replacement.
            group_by_chain: whether to lead with a chain: all are of one.

        Returns:
            Each site's draws, shape ``(num_particles, *site)`` or ``(1, num_particles, *site)``.
        """
        return select(self.results.samples, num_samples, group_by_chain)

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Of each particle ``lp``, the log density, and ``ancestor``, the draw it descends from."""
        return select(self.results.fields, None, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample size of each site, and what happened at each temperature."""
        found = self.results.diagnostics()
        return {**found, "temperatures": [t._asdict() for t in self.temperatures]}

    def summary(self, prob: float = 0.9) -> None:
        """Prints mean, sd, median, interval and ESS of every site, the evidence, and findings."""
        self.results.summary(prob)
        print(self.log_evidence)  # noqa: T201

    def to_arviz(self, **kwargs: Any) -> Any:
        """The particles as ArviZ data; the arguments are those of :func:`pyro_ebm.to_arviz`."""
        return to_arviz(self, **kwargs)

    def __repr__(self) -> str:
        state = "not run yet" if self._estimate is None else repr(self._estimate)
        kernel = "" if self.kernel is None else f"{self.kernel!r}, "
        return f"SMC({kernel}num_particles={self.num_particles}): {state}"


def _has_discrete(path: AnnealingPath) -> bool:
    return any(site.support_values is not None for site in path.sites)
