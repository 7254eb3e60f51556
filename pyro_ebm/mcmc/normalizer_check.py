r"""Does an unknown constant depend on what is sampled?

A posterior over :math:`\theta` that is observed through an energy is proportional to
:math:`p(\theta)\, e^{-E_\theta(x)} / Z(\theta)`. If :math:`Z(\theta)` is unknown and left out, the
answer is the posterior of another model. This module finds such sites before anything is sampled.

A first run of the model tracks which latents each tensor was computed from (Pyro's provenance
tensors): at a *fixed* point :math:`x`, does :math:`E_\theta(x)`, the base, or the support's bounds
come from a latent? Then further runs with other latents and the point pinned compare values, to
catch what tensors cannot carry, such as ``theta.item()``.

The first run cannot see that a dependence cancels, as in a location family :math:`E(x - \mu)`:
there the user's word ``constant_normalizer=True`` waives the check.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution

from pyro_ebm.distributions.energy import UnnormalizedEnergy, starting_points_only
from pyro_ebm.distributions.util import modules, tensors_of
from pyro_ebm.mcmc.potential import eval_mode

NUM_RERUNS = 4


class NormalizerError(ValueError):
    """The posterior asked for needs a log Z that is not known."""


def check_normalizers(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    init_strategy: Callable[..., Any] = init_to_uniform,
) -> None:
    r"""Refuses a model in which an unknown or learned log Z depends on a latent.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_strategy: gives values to the latents, as in Pyro's kernels.

    Raises:
        NormalizerError: names the site, the latents it depends on, and the ways out.

    Example:
        >>> def model(x):
        ...     precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
        ...     pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> check_normalizers(model, (torch.tensor(1.0),))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pyro_ebm.mcmc.normalizer_check.NormalizerError: site 'x': its energy depends on 'precision'...
    """
    kwargs = dict(kwargs or {})
    with torch.random.fork_rng(devices=[]), starting_points_only():
        tracked = trace_latents(model, args, kwargs, init_strategy)
        suspects = _suspects(tracked)
        for suspect in suspects.values():
            _refuse(suspect, suspect.dependencies())
        if not suspects:
            return
        for _ in range(NUM_RERUNS):
            again = _suspects(_trace(model, args, kwargs, init_strategy))
            if changed := suspects.keys() ^ again.keys():
                raise NormalizerError(
                    f"site(s) {sorted(changed)}: these energies with an unknown log Z are in the"
                    f" model for some values of the latents only{_WAYS_OUT}"
                )
            for key, suspect in suspects.items():
                if not _close(suspect.log_prob(suspect.x), again[key].log_prob(suspect.x)):
                    _refuse(
                        suspect, {"a latent whose value the model reads by .item() or the like"}
                    )


def trace_latents(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    init_strategy: Callable[..., Any],
) -> poutine.Trace:
    """A trace of the model in which every tensor knows the latents that it was computed from."""
    return _trace(_TrackLatents()(model), args, kwargs, init_strategy)


_WAYS_OUT = (
    ". Its log Z is then part of the posterior and cannot be left out. Ways out: give"
    " log_normalizer= as a function of these latents; say constant_normalizer=True if you know"
    " that Z does not depend on them (a location family); or fit them with one of the losses of"
    " pyro_ebm instead of sampling them"
)


def _refuse(suspect: "_Suspect", latents: set[str] | frozenset[str]) -> None:
    if latents := set(latents) - {suspect.name}:
        listed = ", ".join(sorted(repr(latent) for latent in latents))
        raise NormalizerError(
            f"site {suspect.name!r}: its energy depends on {listed}, and its log Z is"
            f" {suspect.energy.normalizer_state}{_WAYS_OUT}"
        )


class _TrackLatents(Messenger):
    """Marks every latent's value by the site's name; observed values keep where they came from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            value = detach_provenance(msg["value"])
            msg["value"] = track_provenance(value, frozenset({msg["name"]}))


def _trace(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    init_strategy: Callable[..., Any],
) -> poutine.Trace:
    with pyro.validation_enabled(False), poutine.block():
        return poutine.trace(InitMessenger(init_strategy)(model)).get_trace(*args, **kwargs)


@dataclasses.dataclass
class _Suspect:
    """An energy with an unknown constant, where a site's distribution holds it."""

    name: str
    energy: UnnormalizedEnergy
    x: Tensor
    """A point of the energy's support, without provenance."""
    outside: frozenset[str]
    """The latents in what surrounds the energy: its mask, its scale, the mixture it is part of."""

    def log_prob(self, x: Tensor) -> Tensor:
        with eval_mode(modules(self.energy._energy)):
            return self.energy.unnormalized_log_prob(x)

    def dependencies(self) -> frozenset[str]:
        inside = get_provenance([self.log_prob(self.x), *tensors_of(self.energy.support)])
        return self.outside | inside


def _suspects(trace: poutine.Trace) -> dict[str, _Suspect]:
    found = [
        suspect
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
        for suspect in _suspects_in(
            name,
            site["fn"],
            detach_provenance(site["value"]),
            # a scale or mask that depends on a latent says how often Z counts
            get_provenance([site["scale"], site["mask"]]),
        )
    ]
    return {f"{suspect.name}[{index}]": suspect for index, suspect in enumerate(found)}


def _suspects_in(name: str, fn: Any, x: Tensor, outside: frozenset[str]) -> Iterator[_Suspect]:
    if isinstance(fn, UnnormalizedEnergy):
        if not fn.is_normalized and not fn.constant_normalizer:
            yield _Suspect(name, fn, x, outside)
    elif isinstance(fn, Independent):
        yield from _suspects_in(name, fn.base_dist, x, outside)
    elif isinstance(fn, MaskedDistribution):
        yield from _suspects_in(name, fn.base_dist, x, outside | get_provenance(fn._mask))
    elif isinstance(fn, TransformedDistribution):  # a bijection leaves Z as it is
        for transform in reversed(fn.transforms):
            x = detach_provenance(transform.inv(x))
        yield from _suspects_in(name, fn.base_dist, x, outside)
    else:  # a mixture: its normalizer mixes those of its parts
        for attribute in ("base_dist", "_component_distribution", "component0", "component1"):
            part = getattr(fn, attribute, None)
            if part is None or not any(_energies_in(part)):
                continue
            whole = get_provenance(fn.log_prob(x))
            for energy in _energies_in(part):
                start = detach_provenance(energy.starting_points())
                yield _Suspect(name, energy, start, outside | whole)


def _energies_in(fn: Any) -> Iterator[UnnormalizedEnergy]:
    return (suspect.energy for suspect in _suspects_in("", fn, torch.empty(()), frozenset()))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
