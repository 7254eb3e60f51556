r"""Does an unknown constant depend on what is sampled?

A posterior over :math:`\theta` that is observed through an energy is proportional to
:math:`p(\theta)\, e^{-E_\theta(x)} / Z(\theta)`. If :math:`Z(\theta)` is unknown and left out, the
answer is the posterior of another model. This module finds such sites before anything is sampled.

A first run of the model tracks which latents each tensor was computed from (Pyro's provenance
tensors): at a *fixed* point :math:`x`, does :math:`E_\theta(x)`, the base, the support's bounds, or
the site's scale or mask come from a latent? Then further runs with other latents and the point
pinned compare values, to catch what tensors cannot carry, such as ``theta.item()`` or a branch;
there are more of them when the first run saw such a read. A branch that hardly any start takes
can still be missed.

The first run cannot see that a dependence cancels, as in a location family :math:`E(x - \mu)`:
there the user's word ``constant_normalizer=True`` waives the check.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution
from torch.overrides import TorchFunctionMode

from pyro_ebm.distributions.energy import UnnormalizedEnergy, starting_points_only
from pyro_ebm.distributions.util import bounds_of
from pyro_ebm.mcmc.mode import called_in_eval_mode
from pyro_ebm.mcmc.starts import trace_from_start

NUM_RERUNS, NUM_RERUNS_AFTER_READS = 4, 64


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
        pyro_ebm.mcmc.normalizer_check.NormalizerError: site 'x': its energy depends on...
    """
    kwargs = dict(kwargs or {})
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    reads = _HostReads()
    with torch.random.fork_rng(devices), starting_points_only(), called_in_eval_mode():
        with reads:
            tracked = trace_latents(model, args, kwargs, init_strategy)
            suspects = _suspects(tracked)
            for suspect in suspects.values():
                _refuse(suspect, get_provenance(suspect.evaluate(suspect.x)))
        same_data = poutine.replay(model, trace=_subsamples(tracked))
        for _ in range(NUM_RERUNS_AFTER_READS if reads.latents else NUM_RERUNS):
            again = _suspects(_trace(same_data, args, kwargs, init_strategy))
            if changed := suspects.keys() ^ again.keys():
                names = ", ".join(sorted({repr(name) for name, _ in changed}))
                raise NormalizerError(
                    f"site(s) {names}: an energy with an unknown log Z is in the model for some"
                    f" values of {_listed(reads.latents)} only{_WAYS_OUT}"
                )
            for key, suspect in suspects.items():
                x = suspect.x
                if not _close(suspect.evaluate(x), again[key].evaluate(x)):
                    _refuse(suspect, reads.latents, how=", read by .item(), a branch or the like")


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


def _refuse(suspect: "_Suspect", latents: Iterable[str], how: str = "") -> None:
    latents = set(latents) - {suspect.name}
    if latents or how:
        raise NormalizerError(
            f"site {suspect.name!r}: its energy depends on {_listed(latents)}{how}, and its log Z"
            f" is {suspect.energies[0].normalizer_state}{_WAYS_OUT}"
        )


def _listed(latents: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, latents))) or "a latent"


class _HostReads(TorchFunctionMode):
    """Notes the latents whose values leave the tensors, where provenance is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.latents: frozenset[str] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _READS:
            self.latents |= get_provenance([args, kwargs])
        return func(*args, **kwargs)


_READS = {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"} | {
    f"__{name}__" for name in ("array", "bool", "complex", "contains", "float", "index", "int")
}


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
        return trace_from_start(model, args, kwargs, init_strategy)


def _subsamples(trace: poutine.Trace) -> poutine.Trace:
    """The trace's choices of data, without its latents."""
    new = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site):
            new.remove_node(name)
    return new


@dataclasses.dataclass
class _Suspect:
    """A density with unknown constants, where a site's distribution holds it."""

    name: str
    energies: tuple[UnnormalizedEnergy, ...]
    density: Callable[[Tensor], Tensor]
    x: Tensor
    """A point of the density's support, without provenance."""
    counted: tuple[Any, ...]
    """How often the density counts: the scale and the masks around it."""

    def evaluate(self, x: Tensor) -> list[Any]:
        """All that the constants may depend on, at a fixed point."""
        bounds = [bound for p in self.energies for bound in bounds_of(p.support)]
        return [self.density(x), *bounds, *self.counted]


def _suspects(trace: poutine.Trace) -> dict[tuple[str, int], _Suspect]:
    return {
        (name, index): suspect
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
        for index, suspect in enumerate(
            _suspects_in(
                name,
                site["fn"],
                detach_provenance(cast(Tensor, site["value"])),
                (site["scale"], site["mask"]),
            )
        )
    }


def _suspects_in(name: str, fn: Any, x: Tensor, counted: tuple[Any, ...]) -> Iterator[_Suspect]:
    if isinstance(fn, UnnormalizedEnergy):
        if not fn.is_normalized and not fn.constant_normalizer:
            yield _Suspect(name, (fn,), fn.unnormalized_log_prob, x, counted)
    elif isinstance(fn, Independent):
        yield from _suspects_in(name, fn.base_dist, x, counted)
    elif isinstance(fn, MaskedDistribution):
        yield from _suspects_in(name, fn.base_dist, x, (*counted, fn._mask))
    elif isinstance(fn, TransformedDistribution):  # a bijection leaves Z as it is
        for transform in reversed(fn.transforms):
            x = detach_provenance(cast(Tensor, transform.inv(x)))
        yield from _suspects_in(name, fn.base_dist, x, counted)
    elif energies := tuple(_energies_in(fn)):  # a mixture: its normalizer mixes those of its parts
        yield _Suspect(name, energies, fn.log_prob, x, counted)


def _energies_in(fn: Any) -> Iterator[UnnormalizedEnergy]:
    for attribute in ("base_dist", "_component_distribution", "component0", "component1"):
        part = getattr(fn, attribute, None)
        if part is not None:
            for suspect in _suspects_in("", part, torch.empty(()), ()):
                yield from suspect.energies


def _close(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(_close_values, a, b))


def _close_values(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b.to(a.dtype))
    return torch.allclose(a, b.to(a), rtol=1e-4, atol=1e-5, equal_nan=True)
