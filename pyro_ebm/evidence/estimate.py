r"""The evidence of the data under a Pyro model, by one function.

A model is an energy: over its latents :math:`z` in unconstrained coordinates the joint density
:math:`p(z, y)` integrates to the evidence,

.. math:: Z = p(y) = \int p(y \mid z)\, p(z)\, dz .

Which method for which model:

=================  =============================================================================
``"bridge"``       where there are good draws of the posterior: the least error for its cost
``"smc"``          without draws, and for posteriors of several modes
``"ais"``          the same for single chains; a lower bound in expectation
``"reverse_ais"``  from draws back to the prior: with ``"ais"``, a sandwich
``"importance"``   where a guide is close to the posterior, and as wide
=================  =============================================================================
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_ebm.diagnostics.results import Results
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.evidence.bridge import bridge
from pyro_ebm.evidence.contents import looked_at, names_of
from pyro_ebm.evidence.draws import draws_of, positions_of
from pyro_ebm.evidence.model_path import ModelPath
from pyro_ebm.evidence.model_starts import Guide, GuideStart
from pyro_ebm.evidence.proper import check_proper
from pyro_ebm.evidence.result import EvidenceEstimate
from pyro_ebm.evidence.smc.sampler import SMC
from pyro_ebm.mcmc.kernels.base import Kernel, checked_kernel
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.normalizer.annealing.ais import annealed_along
from pyro_ebm.normalizer.annealing.choices import kernel_of
from pyro_ebm.normalizer.arguments import check_arguments, check_numbers
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, estimate_of
from pyro_ebm.normalizer.tails import warn_if_improper
from pyro_ebm.ops.arguments import check_callable, check_mapping

_ANNEALING = {"guide", "draws", "kernel", "num_chains", "num_steps", "betas", "num_temperatures"}
_ANNEALING |= {"ess_drop", "distributed", "exact_draws"}
TAKES = {
    "bridge": {"draws", "guide", "num_samples"},
    "ais": _ANNEALING,
    "reverse_ais": _ANNEALING,
    "importance": {"guide", "num_samples"},
    "smc": {"guide", "kernel", "num_particles", "num_steps", "ess_drop", "distributed"},
}
"""The arguments that each method takes."""

OPTIONS = set().union(*TAKES.values())


def log_evidence(
    model: Model | AbstractMCMC,
    *args: object,
    method: str | None = None,
    draws: object = None,
    guide: Guide | None = None,
    kernel: Kernel | None = None,
    num_samples: int | None = None,
    num_chains: int | None = None,
    num_particles: int | None = None,
    num_steps: int | None = None,
    betas: Sequence[float] | Tensor | None = None,
    num_temperatures: int | None = None,
    ess_drop: float | None = None,
    exact_draws: bool = False,
    shared_improper: Collection[str] = (),
    keep_discrete: bool | None = None,
    max_plate_nesting: int | None = None,
    kwargs: Mapping[str, object] | None = None,
    disable_progbar: bool = False,
    distributed: bool = False,
) -> EvidenceEstimate:
    r"""Estimates the log evidence :math:`\log p(y)` of data under a Pyro model, with an error.

    * ``"bridge"``: the optimal bridge between ``draws`` of the posterior and a Gaussian (with
      frequencies of discrete sites), or ``guide``. The first half of each chain fits the Gaussian,
      and the second half enters the bridge; its autocorrelation is in the error.
    * ``"ais"``: annealed importance sampling from the prior, or ``guide``, to the joint density: a
      stochastic *lower* bound. With ``draws`` the reverse runs too.
    * ``"reverse_ais"``: annealing from ``draws`` back, a stochastic *upper* bound if those are
      exact draws of the posterior.
    * ``"importance"``: from ``guide``, or the prior.
    * ``"smc"``: a population of particles from the prior, or ``guide``, which is resampled on its
      way; :class:`~pyro_ebm.SMC` gives its draws too.

    Without a ``method`` it is ``"bridge"`` where there are draws, and else ``"ais"``.

    Discrete latents are summed out, or sampled (``keep_discrete``). An energy in the model needs a
    known :math:`\log Z`. Observed values that are computed from latents, and each ``pyro.factor``,
    count as they are: nothing can tell whether a factor is a likelihood.

    Args:
        model: a Pyro model; or a run of it, as ``log_evidence(mcmc)``, whose draws and arguments
            are then taken.
        *args: positional arguments of the model.
        method: see above.
        draws: of the posterior: a :class:`~pyro_ebm.MCMC` or ``pyro.infer.MCMC`` after its run,
            ArviZ data with a ``posterior``, or tensors ``(chains, draws, *site)`` by site.
        guide: where to start, or to propose from, instead of the prior or the Gaussian.
        kernel: of annealing or ``"smc"``, without a model: by default
            :class:`~pyro_ebm.LangevinKernel`, or :class:`~pyro_ebm.ChEESKernel` of ``"smc"``, and
            Gibbs sweeps of discrete sites.
        num_samples: points of ``"importance"`` (2,000 by default), or draws of the start of a
            bridge (as many as the draws that enter it).
        num_chains: chains of annealing, 1,000 by default; in reverse as many evenly spaced draws.
        num_particles: of ``"smc"``, 1,000 by default.
        num_steps: transitions of each at each temperature: 1 by default, and of ``"smc"`` as many
            as its particles need to forget where they were.
        betas: the inverse temperatures, rising from 0 to 1.
        num_temperatures: how many; a pilot run spaces them.
        ess_drop: see :func:`~pyro_ebm.estimate_log_normalizer`.
        exact_draws: whether the ``draws`` are exact, independent draws of the posterior, as of
            parameters with which the data were simulated.
        shared_improper: latents whose prior is improper, and the same in all models that are to be
            compared: a ``dist.ImproperUniform`` (with a ``pyro.factor``, if it is not flat), a
            masked site, or an energy without :math:`Z`. The evidence is then one up to the common
            factor of that prior, and means nothing alone. Such models have no prior to start at:
            use ``"bridge"``, or give a ``guide``.
        keep_discrete: whether discrete latents are sampled, and not summed out; by default where
            there are draws of them.
        max_plate_nesting: as in Pyro's kernels; needed where discrete latents are summed out.
        kwargs: keyword arguments of the model.
        disable_progbar: whether long runs show no progress.
        distributed: whether the ranks of a process group share the chains, or particles.

    Raises:
        NormalizerError: for an energy whose log Z is unknown, learned, or moves, or a composite
            likelihood; it names the site.
        ValueError: for an improper prior, a scaled one, arguments that the method does not take,
            and draws that are not of this model.

    Warns:
        UnreliableEstimateWarning: if the stated error is not to be trusted.
        ConvergenceWarning: the same, of ``"smc"``.

    Reference:
        Gronau et al. (2017), A tutorial on bridge sampling. Neal (2001), Annealed importance
        sampling. Grosse, Ancha and Roy (2016), Measuring the reliability of MCMC inference with
        bidirectional Monte Carlo.

    Example:
        >>> from pyro_ebm import MCMC, ChEESKernel
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([0.5, 1.5, 1.0])  # log N(y; 0, I + 1 1') = -4.0750
        >>> mcmc = MCMC(ChEESKernel(model), 500, num_chains=10, disable_progbar=True)
        >>> mcmc.run(y)
        >>> log_evidence(mcmc)
        EvidenceEstimate(log evidence = -4.07... +- 0.00..., method=bridge, ESS=...)
        >>> log_evidence(model, y, method="ais", draws=mcmc, disable_progbar=True)
        EvidenceEstimate(log evidence = -4.0... +- 0.0..., method=ais, ..., lower bound ...)
    """
    if isinstance(run := model, AbstractMCMC):
        model, args, kwargs = _of_run(run, args, kwargs, draws)
        draws = run
    given = {name: value for name, value in locals().items() if name in OPTIONS}
    given = {name: value for name, value in given.items() if not (value is None or value is False)}
    check_callable("model", model, "a Pyro model, or a run of one")
    check_numbers(given)
    check_mapping("kwargs", {} if kwargs is None else kwargs)
    if kernel is not None:
        checked_kernel(kernel)
    if method is None:
        method = "bridge" if "draws" in given else "ais"
    check_arguments(method, given, TAKES)
    if exact_draws and "draws" not in given:
        raise ValueError("exact_draws=True says that the draws are exact ones: give draws=")
    posterior = draws_of(given.pop("draws")) if "draws" in given else None
    improper = names_of(shared_improper)
    bound = BoundModel(model, args, dict(kwargs or {}))
    discrete, num_data = looked_at(bound, improper)
    if keep_discrete is None:
        sampled = {name for name in discrete if posterior is not None and name in posterior}
        keep_discrete = bool(sampled) or (kernel is not None and _moves_discrete(kernel))
    settings = {"max_plate_nesting": max_plate_nesting, "keep_discrete": keep_discrete}
    one = _Run(bound, settings, improper, posterior, given.pop("guide", None))
    estimate = one.estimate(method, given, disable_progbar)
    kept = {field.name: getattr(estimate, field.name) for field in fields(NormalizerEstimate)}
    return EvidenceEstimate(**kept, shared_improper=improper, num_data=num_data)


class _Run:
    """One estimate.

    Args:
        bound: the model.
        settings: of its potential.
        improper: the latents whose prior may be improper.
        posterior: draws of its latents, if there are any.
        guide: where to start, if not at the prior.
    """

    def __init__(
        self,
        bound: BoundModel,
        settings: Mapping[str, Any],
        improper: Collection[str],
        posterior: Mapping[str, Tensor] | None,
        guide: Guide | None,
    ):
        self.bound, self.settings, self.improper = bound, settings, improper
        self.posterior, self.guide = posterior, guide

    def estimate(self, method: str, given: dict[str, Any], disable_progbar: bool) -> Any:
        """The estimate by a method, with its own arguments."""
        if self.posterior is None and method in ("bridge", "reverse_ais"):
            raise ValueError(
                f"method={method!r} needs draws of the posterior: give draws=, a run of MCMC or"
                ' ArviZ data; or use method="smc" or "ais"'
            )
        if method == "smc":
            return self._tempered(**given, disable_progbar=disable_progbar)
        if method == "bridge":
            target = self._target()
            if target.dim == 0:
                return self._exact(target)
            start = None if self.guide is None else GuideStart(target, self.guide)
            return bridge(target, self._positions(target), start, **given)
        path = self._path()
        if path.dim == 0:
            return self._exact(path.model)
        if method == "importance":
            return importance(path, **given)
        return self._annealed(path, method, **given, disable_progbar=disable_progbar)

    def _target(self) -> ModelPotential:
        bound = self.bound
        target = ModelPotential(bound.model, bound.args, bound.kwargs, **self.settings)
        check_proper(target, self.improper)
        return target

    def _path(self) -> ModelPath:
        if self.improper and self.guide is None:
            raise ValueError(
                f"the prior of site(s) {list(self.improper)} is improper, and cannot be drawn from:"
                ' give a guide= to start at, or use method="bridge" with draws='
            )
        bound, settings = self.bound, {**self.settings, "improper": self.improper}
        return ModelPath.of_model(bound.model, bound.args, bound.kwargs, self.guide, **settings)

    def _positions(self, target: ModelPotential) -> Tensor:
        assert self.posterior is not None
        return positions_of(self.posterior, target)

    @staticmethod
    def _exact(target: ModelPotential) -> NormalizerEstimate:
        """Without a latent, or with all summed out, the model is the evidence."""
        with torch.no_grad():
            value = -target(torch.empty(1, 0, dtype=target.dtype, device=target.device))[0]
        return NormalizerEstimate(value, torch.zeros_like(value), "exact", lower=value, upper=value)

    def _tempered(self, num_steps: int | None = None, **given: Any) -> NormalizerEstimate:
        bound, improper = self.bound, self.improper
        smc = SMC(
            bound.model, guide=self.guide, num_moves=num_steps, shared_improper=improper, **given
        )
        smc.path_settings = self.settings
        smc.run(*bound.args, **bound.kwargs)
        return smc.log_evidence

    def _annealed(
        self,
        path: ModelPath,
        method: str,
        kernel: Kernel | None = None,
        num_chains: int = 1000,
        exact_draws: bool = False,
        **given: Any,
    ) -> NormalizerEstimate:
        ends = None
        if self.posterior is not None:
            z = self._positions(path.model).flatten(0, 1)
            some = torch.linspace(0, len(z) - 1, min(num_chains, len(z))).round().long()
            ends = z[some]
        chains = num_chains if method == "ais" else None
        kernel = kernel_of(kernel, None, path)
        with torch.no_grad():
            return annealed_along(path, kernel, chains, ends, exact_samples=exact_draws, **given)


@torch.no_grad()
def importance(path: ModelPath, num_samples: int = 2000) -> NormalizerEstimate:
    """``method="importance"`` of :func:`log_evidence`: the path in one leap."""
    z = path.at(0.0).draw(num_samples)
    log_w = path.at(0.0)(z) - path.at(1.0)(z) + path.log_normalizer
    warn_if_improper(path.target, z, "importance sampling")
    remedy = "use a guide that is wider and nearer to the posterior, or another method"
    return estimate_of(log_w, "importance", "importance sampling", remedy)


def _of_run(
    mcmc: AbstractMCMC, args: tuple[object, ...], kwargs: object, draws: object
) -> tuple[Model, tuple[object, ...], Mapping[str, object]]:
    """The model of a run, and the arguments that it was called with."""
    if args or kwargs or draws is not None:
        raise ValueError(
            "a run knows its arguments and its draws: write log_evidence(mcmc), or give the model"
            " itself, as log_evidence(model, *args, draws=mcmc)"
        )
    results = Results.of(mcmc)
    if results.model is None:
        raise ValueError(
            "the run is of a potential function, of which nothing is known but its values: give"
            " the model, as log_evidence(model, *args, draws=mcmc)"
        )
    return results.model, results.args, results.kwargs


def _moves_discrete(kernel: Kernel) -> bool:
    return any(getattr(part, "discrete", False) for part in (kernel, *kernel.parts))
