r"""The base of every loss: an ELBO with a term of another method at energy sites.

A model's log joint density is a sum over sites, and so is the ELBO,

.. math:: \mathrm{ELBO} = \mathbb E_q \Big[ \sum_{s} \log p_s - \sum_{s} \log q_s \Big].

At an energy site :math:`\log p_s = \log h - E - \log Z` holds an unknown constant with an unknown
gradient. A loss of this package puts a term of its own in that place: one that can be computed,
and whose maximum (or zero of the gradient) is at the true energy. Every other site keeps its
ordinary term, so that plates, scales, masks, latents and guides mean what they mean to Pyro.
"""

import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self, TypedDict

import torch
from pyro import poutine
from pyro.infer.trace_elbo import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.checks.elbo_guard import normalizers_handled
from pyro_ebm.distributions.checks.energy_calls import at_site
from pyro_ebm.distributions.checks.rows import check_rows
from pyro_ebm.files import Saved
from pyro_ebm.losses.module import EnergyLossModule
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.losses.traces import (
    check_guide,
    energy_sites,
    not_finite,
    parameters_in,
    refuse_score_function,
    refuse_untrained,
    replaced_parameters,
    samples,
    traces_of,
)
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.code import outside_level
from pyro_ebm.ops.distributed import pooled_mean


class LossSettings(TypedDict, total=False):
    """What every loss takes of Pyro's ELBOs."""

    num_particles: int
    max_plate_nesting: int
    retain_graph: bool | None
    ignore_jit_warnings: bool


class EnergyLoss(Trace_ELBO):
    r"""An ELBO in which :meth:`energy_term` stands for the log density of energy sites.

    Use it as the ``loss`` of ``SVI``, or call ``loss(model, guide)`` for an ``nn.Module`` to train
    with a torch optimiser. A new loss defines what an energy site adds to the *objective*, to
    be maximised, row by row:

    Example:
        >>> class MaximumLikelihood(EnergyLoss):  # for energies with a known log Z
        ...     def energy_term(self, site):
        ...         return site.energy.log_prob(site.x)
        >>> def model(x):
        ...     mean = pyro.param("mean", torch.tensor(0.0))
        ...     p = UnnormalizedEnergy(lambda x: (x - mean) ** 2 / 2, log_normalizer=0.9189)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", p, obs=x)
        >>> x = torch.tensor([1.0, 3.0])
        >>> from pyro.infer import SVI
        >>> svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.1}), MaximumLikelihood())
        >>> _ = [svi.step(x) for _ in range(100)]
        >>> round(pyro.param("mean").item(), 3)
        2.0

    The term is written with an :class:`~pyro_ebm.losses.EnergySite`: ``site.energy``, the
    distribution, and ``site.x``, its values, shape ``(*batch, *event)``.

    * A gradient in the points is taken in ``x = self.points(site.x)``, by ``score(site.energy, x,
      create_graph=True)`` of :mod:`pyro_ebm.ops`. (The energy's own ``score`` is detached: a loss
      of it trains nothing.)
    * ``self.record(site, name=site.mean(...))`` puts a number of the step into :attr:`diagnostics`.
    * An argument of the constructor is kept as the attribute of its name, where ``repr`` and
      :attr:`settings` find it, and ``**kwargs`` are passed on.
    * With ``needs_noise = True`` on the class, the guide must have a distribution at the site, and
      ``site.guide_fn`` and ``site.guide_value`` are it and its draw.
    * What a loss remembers from step to step is in ``state_dict`` and ``load_state_dict``; while
      ``self.evaluating``, it stays as it is.

    Args:
        num_particles: draws from the guide for each gradient.
        max_plate_nesting: as in Pyro's ELBOs.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: (when used) for NaN data, an energy network that ``SVI`` would not train, an
            energy that depends on other rows of the batch, or a site that the method is not for;
            each names the site.
    """

    needs_noise = False
    """Whether the guide must have a distribution, the noise, at the observed energy sites."""
    trains_levels = False
    """Whether it trains all levels of a noise-conditional energy."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """A loss; a model and a guide are arguments of the loss, and not of its class."""
        model_and_guide = args[:2]
        if len(model_and_guide) == 2 and all(map(callable, model_and_guide)):
            name = cls.__name__
            raise ValueError(
                f"{name} is a class, and was given a model and a guide: make a loss of it first,"
                f" as in SVI(model, guide, optim, loss={name}()), or {name}()(model, guide)"
            )
        return super().__new__(cls)

    def __init__(self, num_particles: int = 1, **kwargs: Any):
        if kwargs.get("vectorize_particles"):
            raise ValueError(
                "vectorize_particles is not for energy losses: an energy would see the particles"
                " as rows; leave it out, num_particles=... runs one after another"
            )
        check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles, **kwargs)
        self.records: dict[str, dict[str, Tensor]] = {}  # of this step, by site
        self.inputs: list[Tensor] = []  # leaves that the methods differentiate in: no parameters
        self.evaluating = False
        # the ranks that train together, within their step
        self.group: torch.distributed.ProcessGroup | None = None
        self.steps_taken = 0
        self.not_finite: list[str] = []  # the sites that made the last loss NaN or infinite
        self._trained: frozenset[str] | None = None
        self._rows_seen: set[tuple[object, ...]] = set()

    # -- the mathematics: what a new loss writes -------------------------------------------------

    @abstractmethod
    def energy_term(self, site: EnergySite) -> Tensor:
        """The objective of the rows of an observed energy site, shape ``(*batch)``.

        Its gradient in every parameter, and in latents in front of the energy, is the method's.
        """

    def latent_term(self, site: EnergySite) -> Tensor:
        """The objective of a latent energy site whose log Z is not known, shape ``(*batch)``."""
        raise ValueError(
            f"site {site.name!r} is a latent energy whose log Z is {site.energy.normalizer_state}:"
            f" {type(self).__name__} is for observed energies only. Use ContrastiveDivergence, or"
            " give log_normalizer="
        )

    # -- what it is written with -----------------------------------------------------------------

    @property
    def looks_closely(self) -> bool:
        """Whether this step is one of the few at which costly checks of the energy are made."""
        return not self.evaluating and self.steps_taken in (0, 10, 100, 1000)

    def record(self, site: EnergySite, **values: Tensor) -> None:
        """Keeps numbers of this step for :attr:`diagnostics`."""
        if not self.evaluating:
            self.records.setdefault(site.name, {}).update(
                {name: value.detach() for name, value in values.items()}
            )

    def pooled(self, value: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """The mean over the ranks that train together, inside ``DistributedDataParallel``.

        Elsewhere, and in an evaluation, ``value`` itself. Statistics of its own draws by which a
        loss changes its course go through here, so that all ranks change alike.

        Args:
            value: a mean over rows of this rank, of any shape.
            weight: over how many rows, of a shape that broadcasts to that.
        """
        if self.group is None or self.evaluating:
            return value
        return pooled_mean(value, torch.as_tensor(weight), self.group)

    def points(self, x: Tensor) -> Tensor:
        """``x`` as a tensor to differentiate in; a leaf made here counts as no parameter."""
        if x.requires_grad:  # it was computed from a latent or a parameter, and stays attached
            return x
        x = x.clone().requires_grad_()
        self.inputs.append(x)
        return x

    @property
    def diagnostics(self) -> dict[str, float]:
        """Numbers of the last step: plain floats, keyed ``"site/name"`` when sites are several.

        ``gradient_norm`` is there after ``SVI.step``.
        """
        records = dict(self.records)
        overall = records.pop("", {})
        single = len(records) == 1
        result = {
            name if single else f"{site}/{name}": float(value)
            for site, values in records.items()
            for name, value in values.items()
        }
        return {**result, **{name: float(value) for name, value in overall.items()}}

    def state_dict(self) -> Saved:
        """What to save beside parameters and optimiser, to go on exactly where training stopped."""
        return {}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""

    @property
    def settings(self) -> dict[str, object]:
        """What the loss was made with, by the names of its arguments."""
        attributes = self._attributes()
        return {name: attributes[name] for name in self._defaults() if name in attributes}

    def _attributes(self) -> dict[str, object]:
        """The attributes in which its settings are found."""
        return vars(self)

    @classmethod
    def _defaults(cls) -> dict[str, object]:
        """The arguments of the loss and of its bases, with their defaults."""
        found: dict[str, object] = {}
        for kind in cls.__mro__:
            if issubclass(kind, EnergyLoss) and "__init__" in vars(kind):
                for name, parameter in inspect.signature(vars(kind)["__init__"]).parameters.items():
                    found.setdefault(name, parameter.default)
        return found

    def __repr__(self) -> str:
        defaults, settings = self._defaults(), self.settings.items()
        changed = [f"{n}={value!r}" for n, value in settings if not _equal(value, defaults[n])]
        return f"{type(self).__name__}({', '.join(changed)})"

    # -- traces ----------------------------------------------------------------------------------

    def _get_trace(
        self, model: Model, guide: Model, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[poutine.Trace, poutine.Trace]:
        model_trace, guide_trace, noise = traces_of(model, guide, args, kwargs)
        validating = is_validation_enabled()
        if validating:
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace = prune_subsample_sites(model_trace)
        guide_trace = prune_subsample_sites(guide_trace)
        sites = energy_sites(model_trace, noise)
        name = type(self).__name__
        check_guide(name, sites, guide_trace, noise.keys() - sites.keys(), self.needs_noise)
        model_trace.compute_log_prob(site_filter=lambda name, _: name not in sites)
        with normalizers_handled():
            guide_trace.compute_score_parts()
            replaced = []
            for name, site in sites.items():
                with at_site(name):
                    term = self._ordinary_term(site)
                    if term is None:
                        replaced.append(name)
                        term = self._own_term(site)
                    self._check_rows(site)
                log_prob = site.weighted(term)
                model_trace.nodes[name]["log_prob"] = log_prob
                model_trace.nodes[name]["log_prob_sum"] = log_prob.sum()
        if replaced:
            refuse_score_function(replaced, guide_trace)
        if validating:
            nesting: Any = self.max_plate_nesting  # infinite until it is known
            for trace in (model_trace, guide_trace):
                for name in samples(trace):
                    check_site_shape(trace.nodes[name], nesting)
        return model_trace, guide_trace

    def _ordinary_term(self, site: EnergySite) -> Tensor | None:
        """The log density, up to a constant, where log Z has no gradient; else None."""
        energy = site.energy
        if not site.is_observed and energy.is_normalized and not energy.lags(site.x.detach()):
            return energy.log_prob(site.x)
        # A latent, or a factor: data computed from latents. (Data have no gradient at all here.)
        moved = not site.is_observed or site.x.requires_grad
        waived = not site.is_observed and energy.constant_normalizer
        return energy.unnormalized_log_prob(site.x) if waived or (moved and site.is_fixed) else None

    def _own_term(self, site: EnergySite) -> Tensor:
        """The method's term, shape ``(*batch)``."""
        if len(site.energy.sigmas) > 1 and not self.trains_levels and self.steps_taken == 0:
            warnings.warn(
                f"site {site.name!r}: {type(self).__name__} trains the smallest noise level of"
                " the energy alone, and sample() comes down all of them. Train them by"
                " DenoisingScoreMatching or RecoveryLikelihood, or give the site p.at(sigma)",
                stacklevel=outside_level(),
            )
        try:
            term = self.energy_term(site) if site.is_observed else self.latent_term(site)
        except (RuntimeError, ValueError):
            self._check_rows(site)  # which may be the cause
            raise
        if term.shape != site.batch_shape:
            raise RuntimeError(
                f"{type(self).__name__} gave a term of shape {tuple(term.shape)} at site"
                f" {site.name!r}, the rows have {tuple(site.batch_shape)}"
            )
        return term

    def _check_rows(self, site: EnergySite) -> None:
        """Refuses, at some of the steps, an energy whose rows influence each other.

        At step 1, 2, 10, 20, 100, ...; and whenever a layer has changed its mode. It comes after
        the term, when layers that initialise themselves from their first batch have done so.
        """
        step = self.steps_taken + 1
        due = not self.evaluating and str(step).strip("0") in ("1", "2")
        key = (site.name, *(module.training for module in site.energy.modules))
        if (due or key not in self._rows_seen) and site.batch_shape.numel() > 1:
            self._rows_seen.add(key)
            what = f"the energy of site {site.name!r} ({site.energy.energy_name})"
            check_rows(site.energy, site.x, what, seed=step)

    # -- Pyro's plumbing -------------------------------------------------------------------------

    def __call__(self, model: Model, guide: Model) -> EnergyLossModule:
        """An ``nn.Module`` whose value is the loss, to train with a torch optimiser."""
        return EnergyLossModule(model, guide, self)

    def loss(self, model: Model, guide: Model, *args: object, **kwargs: object) -> float:
        """The loss, without touching gradients, chains, running averages or diagnostics."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Model, guide: Model, *args: object, **kwargs: object) -> float:
        """The loss; its gradients are added to the parameters' ``.grad``."""
        with poutine.trace(param_only=True) as capture:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        params = parameters_in(capture.trace)
        unique = list({id(p): p for p in params.values()}.values())
        if loss.requires_grad:
            names, replaced = frozenset(params), replaced_parameters(capture.trace)
            if names != self._trained or replaced:  # a new network may have old names
                refuse_untrained(loss, [*unique, *self.inputs], model, replaced=replaced)
                self._trained = names
            loss.backward(retain_graph=self.retain_graph, inputs=unique or None)
        self.inputs.clear()
        self._after_backward(params, loss)
        norms = [p.grad.norm() for p in unique if p.grad is not None]
        if norms:
            self.records[""] = {"gradient_norm": torch.stack(norms).norm()}
        return float(loss.detach())

    def _after_backward(self, params: Mapping[str, Tensor], loss: Tensor) -> None:
        """A place for losses that update one player at a time."""

    def differentiable_loss(
        self, model: Model, guide: Model, *args: object, **kwargs: object
    ) -> Tensor:
        """The loss as a tensor whose gradient is the method's.

        Under ``torch.no_grad`` it is an evaluation, and leaves chains and averages as they are.
        """
        self.evaluating = not torch.is_grad_enabled()
        if not self.evaluating:
            self.records = {}
        self.inputs.clear()
        self.not_finite = []
        total: Any = 0.0
        with torch.enable_grad():  # methods differentiate in the points, evaluating or not
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                loss, surrogate = self._differentiable_loss_particle(model_trace, guide_trace)
                surrogate = torch.as_tensor(surrogate)
                if not math.isfinite(loss):
                    self.not_finite += not_finite(model_trace, guide_trace)
                total = total + (loss + (surrogate - surrogate.detach())) / self.num_particles
        warn_if_nan(total, "loss")
        self.steps_taken += not self.evaluating
        return total.detach() if self.evaluating else total


def _equal(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
