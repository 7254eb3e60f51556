r"""The base of every loss: an ELBO whose energy sites are judged by another method.

A model's log joint density is a sum over sites, and so is the ELBO,

.. math:: \mathrm{ELBO} = \mathbb E_q \Big[ \sum_{s} \log p_s - \sum_{s} \log q_s \Big].

At an energy site :math:`\log p_s = \log h - E - \log Z` holds an unknown constant with an unknown
gradient. A loss of this package puts a term of its own in that place: one that can be computed,
and whose maximum (or zero of the gradient) is at the true energy. Every other site keeps its
ordinary term, so that plates, scales, masks, latents and guides mean what they mean to Pyro.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import is_identically_zero, scale_and_mask, sum_rightmost
from pyro.infer.trace_elbo import Trace_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import Independent

from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy, starting_points_only
from pyro_ebm.distributions.util import modules


@dataclasses.dataclass
class EnergySite:
    """One energy site of a trace, looked at through its wrappers.

    Rows are the elements of the energy's batch, its plates among them.
    """

    name: str
    energy: UnnormalizedEnergy
    x: Tensor
    """Values, shape ``(*batch, *event)``; rows that are masked out hold some point of the support."""
    mask: Tensor | None
    """Which rows count, boolean, shape ``batch``; None if all do."""
    inner_dims: int
    """How many batch dimensions the site's ``to_event`` sums over."""
    scale: Any
    """The site's scale, from its plates and ``poutine.scale``."""
    is_observed: bool
    guide_fn: Any = None
    """The guide's distribution at an observed site: the noise."""
    guide_value: Tensor | None = None
    """The guide's draw from it, shape ``(*batch, *event)``."""

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the rows."""
        return self.x.shape[: self.x.dim() - self.energy.event_dim]

    def weighted(self, term: Tensor) -> Tensor:
        """A term of shape ``(*batch)``, masked, summed over inner dimensions, and scaled."""
        if self.mask is not None:
            term = torch.where(self.mask, term, term.new_zeros(()))
        return scale_and_mask(sum_rightmost(term, self.inner_dims), self.scale)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the rows that count, for diagnostics; ``value`` is ``(..., *batch)``."""
        value = value.detach()
        if self.mask is None:
            return value.mean()
        mask = self.mask.expand(value.shape)
        return torch.where(mask, value, 0.0).sum() / mask.sum()


class EnergyLoss(Trace_ELBO):
    r"""An ELBO in which energy sites are judged by :meth:`energy_term`.

    Use it as the ``loss`` of ``SVI``, or call ``loss(model, guide)`` for an ``nn.Module`` to train
    with a torch optimiser. A new loss says what an energy site contributes to the *objective*, to
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

    Args:
        num_particles: draws from the guide for each gradient.
        max_plate_nesting: as in Pyro's ELBOs.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: (when used) for NaN data, an energy network that ``SVI`` would not train, or a
            site that the method cannot judge; each names the site.
    """

    needs_noise = False

    def __init__(self, num_particles: int = 1, **kwargs: Any):
        if kwargs.get("vectorize_particles"):
            raise ValueError(
                "vectorize_particles is not for energy losses: an energy would see the particles"
                " as rows; leave it out, num_particles=... runs one after another"
            )
        super().__init__(num_particles=num_particles, **kwargs)
        self._records: dict[str, dict[str, Tensor]] = {}
        self._checked: frozenset[str] | None = None
        self._points: list[Tensor] = []
        self._evaluating = False

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
            f" {type(self).__name__} judges observed energies only. Use ContrastiveDivergence, or"
            " give log_normalizer="
        )

    # -- what it is written with -----------------------------------------------------------------

    def record(self, site: EnergySite, **values: Tensor) -> None:
        """Keeps numbers of this step for :attr:`diagnostics`."""
        self._records.setdefault(site.name, {}).update(
            {name: value.detach() for name, value in values.items()}
        )

    def points(self, x: Tensor) -> Tensor:
        """A detached copy of ``x`` to differentiate in; it counts as no parameter."""
        x = x.detach().clone().requires_grad_()
        self._points.append(x)
        return x

    @property
    def diagnostics(self) -> dict[str, float]:
        """Numbers of the last step: plain floats, keyed ``"site/name"`` when sites are several.

        ``gradient_norm`` is there after ``SVI.step``.
        """
        records = dict(self._records)
        overall = records.pop("", {})
        single = len(records) == 1
        result = {
            name if single else f"{site}/{name}": float(value)
            for site, values in records.items()
            for name, value in values.items()
        }
        return {**result, **{name: float(value) for name, value in overall.items()}}

    @property
    def evaluating(self) -> bool:
        """Whether this is ``evaluate_loss``, which must leave chains and averages as they are."""
        return self._evaluating

    # -- traces ----------------------------------------------------------------------------------

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        with starting_points_only():  # a latent energy takes its value from the guide
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        noise = {
            name: guide_trace.nodes[name]
            for name, site in model_trace.nodes.items()
            if _is_sample(site) and site["is_observed"] and name in guide_trace
        }
        for name in noise:
            guide_trace.remove_node(name)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace = prune_subsample_sites(model_trace)
        guide_trace = prune_subsample_sites(guide_trace)
        sites = {
            name: find_site(name, site, noise.pop(name, None))
            for name, site in model_trace.nodes.items()
            if _is_sample(site) and find_energy(site["fn"]) is not None
        }
        if noise:
            raise ValueError(
                f"the guide samples {sorted(noise)}, which the model observes and which are no"
                " energy sites: a guide holds latents, and the noise of energy sites"
            )
        model_trace.compute_log_prob(site_filter=lambda name, _: name not in sites)
        guide_trace.compute_score_parts()
        self._check(sites, guide_trace)
        for name, site in sites.items():
            log_prob = site.weighted(self._term(site))
            model_trace.nodes[name]["log_prob"] = log_prob
            model_trace.nodes[name]["log_prob_sum"] = log_prob.sum()
        if is_validation_enabled():
            for trace in (model_trace, guide_trace):
                for site in trace.nodes.values():
                    if site["type"] == "sample":
                        check_site_shape(site, self.max_plate_nesting)
        return model_trace, guide_trace

    def _term(self, site: EnergySite) -> Tensor:
        energy = site.energy
        with torch.enable_grad():  # evaluate_loss runs under no_grad
            if site.is_observed:
                term = self.energy_term(site)
            elif energy.is_normalized or energy.constant_normalizer:
                term = energy.log_prob(site.x)
            else:
                term = self.latent_term(site)
        if term.shape != site.batch_shape:
            raise RuntimeError(
                f"{type(self).__name__}.energy_term gave shape {tuple(term.shape)} at site"
                f" {site.name!r}, the rows have {tuple(site.batch_shape)}"
            )
        return term

    def _check(self, sites: Mapping[str, EnergySite], guide_trace: Any) -> None:
        for name, site in sites.items():
            if site.guide_fn is not None and not self.needs_noise:
                raise ValueError(
                    f"the guide samples the observed site {name!r}: {type(self).__name__} needs no"
                    " noise. Use NCE or FlowNCE, or take it out of the guide"
                )
        unknown = [n for n, s in sites.items() if not s.energy.is_normalized]
        for name, node in guide_trace.nodes.items():
            if (
                unknown
                and _is_sample(node)
                and not is_identically_zero(node["score_parts"].score_function)
            ):
                raise ValueError(
                    f"the guide's site {name!r} has no reparametrized draws, and the gradient of"
                    f" its score function needs the log Z of {unknown}: use a distribution with"
                    " rsample there, or give log_normalizer="
                )

    # -- Pyro's plumbing -------------------------------------------------------------------------

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, without touching gradients, chains or running averages."""
        self._evaluating = True
        try:
            return float(super().loss(model, guide, *args, **kwargs))
        finally:
            self._evaluating = False

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; its gradients are added to the parameters' ``.grad``."""
        self._records = {}
        with poutine.trace(param_only=True) as capture:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        params = {
            name: site["value"].unconstrained()
            for name, site in capture.trace.nodes.items()
            if site["type"] == "param"
        }
        if loss.requires_grad:
            self._check_registered(loss, params, model)
            loss.backward(retain_graph=self.retain_graph, inputs=list(params.values()) or None)
        self._points.clear()
        self._after_backward(params, loss)
        norms = [p.grad.norm() for p in params.values() if p.grad is not None]
        if norms:
            self._records[""] = {"gradient_norm": torch.stack(norms).norm()}
        return torch_item(loss)

    def _after_backward(self, params: Mapping[str, Tensor], loss: Tensor) -> None:
        """A place for losses that update one player at a time."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor whose gradient is the method's."""
        self._points.clear()
        total: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            loss, surrogate = self._differentiable_loss_particle(model_trace, guide_trace)
            surrogate = torch.as_tensor(surrogate)
            total = total + (loss + (surrogate - surrogate.detach())) / self.num_particles
        warn_if_nan(total, "loss")
        return total

    def _check_registered(self, loss: Tensor, params: Mapping[str, Tensor], model: Any) -> None:
        """SVI trains what its trace holds: refuse a leaf of the graph that it does not hold."""
        names = frozenset(params)
        if names == self._checked:
            return
        held = {id(p) for p in (*params.values(), *self._points)}
        for leaf in leaves(loss):
            if id(leaf) not in held:
                raise ValueError(
                    f"a parameter of shape {tuple(leaf.shape)}{_where(leaf, model)} takes part in"
                    " the loss, but SVI does not see it and would never train it: write"
                    ' pyro.module("name", net) in the model, or detach it; or train'
                    " loss(model, guide) with a torch optimiser"
                )
        self._checked = names


def find_site(name: str, site: Any, noise: Any = None) -> EnergySite:
    """Looks through the wrappers of an energy site.

    Raises:
        ValueError: for NaN data, or a wrapper whose meaning for an energy is not known.
    """
    fn, x = site["fn"], site["value"]
    mask, inner_dims = site["mask"], 0
    mask = None if mask is None else torch.as_tensor(mask)
    while not isinstance(fn, UnnormalizedEnergy):
        if isinstance(fn, MaskedDistribution):
            inner = torch.as_tensor(fn._mask)
            mask = inner if mask is None else mask & inner
        elif isinstance(fn, Independent):
            dims = fn.reinterpreted_batch_ndims
            inner_dims += dims
            if mask is not None:
                mask = mask.reshape(mask.shape + (1,) * dims)
        else:
            raise ValueError(
                f"site {name!r} is an energy inside {type(fn).__name__}, which the losses do not"
                " look through: transform the data, or write the energy of what is observed"
            )
        fn = fn.base_dist
    batch = x.shape[: x.dim() - fn.event_dim]
    if mask is not None:
        mask = mask.to(x.device).expand(batch)
        rows = mask.reshape(batch + (1,) * fn.event_dim)
        x = torch.where(rows, x, fn.starting_points((1,))[0].detach().to(x))
    if site["is_observed"] and not x.isfinite().all():
        raise ValueError(
            f"the data at site {name!r} hold NaN or infinite values: mask those rows"
            " (poutine.mask) or drop them"
        )
    return EnergySite(
        name=name,
        energy=fn,
        x=x,
        mask=mask,
        inner_dims=inner_dims,
        scale=site["scale"],
        is_observed=site["is_observed"],
        guide_fn=None if noise is None else noise["fn"],
        guide_value=None if noise is None else noise["value"],
    )


def _is_sample(site: Any) -> bool:
    return site["type"] == "sample"


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The leaf tensors of an autograd graph that require gradients."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parent for parent, _ in node.next_functions)


def _where(leaf: Tensor, model: Any) -> str:
    for module in modules(model):
        for name, parameter in module.named_parameters():
            if parameter is leaf:
                return f" ({name!r} of {type(module).__name__})"
    return ""
