r"""Does an unknown constant depend on what is sampled?

A posterior over :math:`\theta` that is observed through an energy is proportional to
:math:`p(\theta)\, e^{-E_\theta(x)} / Z(\theta)`. If :math:`Z(\theta)` is unknown and left out, the
answer is the posterior of another model. This module finds such sites before anything is sampled.

A first run of the model tracks which latents each tensor was computed from
(:mod:`pyro_ebm.models.provenance`): at *fixed* points :math:`x`, does
:math:`E_\theta(x)`, the base, the support's bounds, or the site's scale or mask come from a
latent? Then further runs with other latents and the same points compare values, to catch what
tensors cannot carry, such as ``theta.item()``, a branch, a number of rows, or a weight that is
overwritten; there are more of them when the first run saw such a read, or a discrete latent. A
branch that hardly any start takes can still be missed.

Equal values at a few points do not clear an energy that comes from a latent: dead units, an even
function at 0 and a threshold beyond the points hide a dependence. Only what cannot carry a value,
such as ``torch.zeros_like(theta)``, is no dependence.

A log Z that was given is known for the density that it was made for. Where latents move that
density and not its log Z (a number, an estimate), it is as good as unknown.

The first run cannot see that a dependence cancels, as in a location family :math:`E(x - \mu)`:
there the user's word ``constant_normalizer=True`` waives the check.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, TransformedDistribution

from pyro_ebm.distributions.checks.elbo_guard import register_posterior_check
from pyro_ebm.distributions.core.introspection import bounds_of
from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.distributions.core.supports import uniform_start
from pyro_ebm.distributions.core.wrappers import parts_of
from pyro_ebm.distributions.energy import UnnormalizedEnergy, energies_of
from pyro_ebm.models.checks.fixed_density import FixedLatents, check_model_repeats
from pyro_ebm.models.provenance import (
    HostReads,
    OnlyValuesCount,
    trace_latents,
    unvalidated_trace,
)
from pyro_ebm.ops.eval_mode import called_in_eval_mode

NUM_RERUNS, NUM_RERUNS_AFTER_READS = 4, 64
NUM_PROBES = 4  # further points at which energies are compared


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
        ValueError: if the model is not one fixed density
            (:mod:`pyro_ebm.models.checks.fixed_density`).
        NormalizerError: names the site, the latents it depends on, and the ways out.

    Example:
        >>> def model(x):
        ...     precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
        ...     pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> check_normalizers(model, (torch.tensor(1.0),))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pyro_ebm....NormalizerError: site 'x': its energy depends on...
    """
    for moving in moving_normalizers(model, args, kwargs, init_strategy):
        raise NormalizerError(f"{moving}{_WAYS_OUT}")


register_posterior_check(check_normalizers)


class MovingNormalizer(NamedTuple):
    """A site whose unknown log Z depends on latents."""

    name: str
    """The site."""
    parts: dict[str, frozenset[str]]
    """What depends on which latents, as far as is known: the site's ``"energy"`` (or its base),
    ``"support"``, ``"scale or mask"``, ``"shape"``, or, if it comes and goes, ``"presence"``."""
    was_read: frozenset[str]
    """The parts for which a latent's value left the tensors: by ``.item()``, a branch, ..."""
    state: str
    """What is known of log Z: ``"unknown"`` or ``"learned"``."""

    @property
    def latents(self) -> frozenset[str]:
        """All latents that are known to move it."""
        return frozenset().union(*self.parts.values())

    def __str__(self) -> str:
        part, latents = next(iter(self.parts.items()))
        if part == "presence":
            return (
                f"site {self.name!r}: an energy with an unknown log Z is in the model for some"
                f" values of {_listed(latents)} only"
            )
        how = ", read by .item(), a branch or the like" if part in self.was_read else ""
        return (
            f"site {self.name!r}: its {part} depends on {_listed(latents)}{how}, and its log Z is"
            f" {self.state}"
        )


def moving_normalizers(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    init_strategy: Callable[..., Any] = init_to_uniform,
) -> list[MovingNormalizer]:
    """The sites whose unknown or learned log Z depends on a latent.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_strategy: gives values to the latents, as in Pyro's kernels.

    Example:
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Gamma(1.0, 1.0))
        ...     pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**4), obs=x)
        >>> [(moving.name, moving.parts) for moving in moving_normalizers(model, (torch.ones(()),))]
        [('x', {'energy': frozenset({'theta'})})]
    """
    kwargs, fixed = dict(kwargs or {}), FixedLatents()(model)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    reads = HostReads()
    found: dict[_Key, dict[str, frozenset[str]]] = {}
    seen: dict[_Key, _Suspect] = {}
    was_read: set[tuple[_Key, str]] = set()
    with torch.random.fork_rng(devices), starting_points_only(), called_in_eval_mode():
        with reads, OnlyValuesCount():
            tracked = trace_latents(fixed, args, kwargs, init_strategy)
            suspects = _suspects(tracked)
            # evaluated now: the next run may overwrite the weights of a module
            first = {key: suspect.evaluate(suspect.points) for key, suspect in suspects.items()}
        for key, parts in first.items():
            for part, values in parts.items():
                if latents := get_provenance(values) - {key[0]}:
                    found.setdefault(key, {})[part] = latents
        if not found:  # else the model is refused already, for a better reason
            model = fixed
            _check_repeats(model, args, kwargs, tracked)
        unknown = any(not suspect.is_known for suspect in suspects.values())
        again = reads.latents or (unknown and _has_discrete_latents(tracked))
        same_data = poutine.replay(model, trace=_subsamples(tracked))
        for _ in range(NUM_RERUNS_AFTER_READS if again else NUM_RERUNS):
            others = _suspects(unvalidated_trace(same_data, args, kwargs, init_strategy))
            seen = {**others, **seen}
            for key in suspects.keys() ^ others.keys():
                if {**others, **suspects}[key].is_known:  # and may come and go
                    continue
                found.setdefault(key, {}).setdefault("presence", reads.latents - {key[0]})
            for key in suspects.keys() & others.keys():
                now = others[key].evaluate(suspects[key].points)
                for part, values in first[key].items():
                    known = part in found.get(key, {})
                    if not known and not _close(values, now[part]):
                        found.setdefault(key, {})[part] = reads.latents - {key[0]}
                        was_read.add((key, part))
    seen = {**seen, **suspects}
    return [
        MovingNormalizer(
            key[0],
            {part: latents for part, latents in found[key].items() if part != "log Z"},
            frozenset(part for part in found[key] if (key, part) in was_read),
            suspect.state,
        )
        for key, suspect in seen.items()
        if key in found and not suspect.follows(found[key])
    ]


def lags(site: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the density at a site is another one in another run, with the same known log Z.

    Args:
        site: a node of a trace.
        other: the same node in another run.
    """
    for one, two in zip(_suspects_at(site), _suspects_at(other), strict=True):
        if one.is_known:
            values = [suspect.evaluate(one.points) for suspect in (one, two)]
            moved = {p for p in values[0] if not _close(values[0][p], values[1][p])}
            if not one.follows(dict.fromkeys(moved, frozenset())):
                return True
    return False


_WAYS_OUT = (
    ". Its log Z is then part of the posterior and cannot be left out. Ways out: sample them with"
    " ExchangeKernel, which needs no log Z; give log_normalizer= as a function of these latents;"
    " say constant_normalizer=True if you know that Z does not depend on them (a location family);"
    " or fit them with one of the losses of pyro_ebm instead of sampling them"
)


def _listed(latents: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, latents))) or "a latent"


def _check_repeats(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], at: poutine.Trace
) -> None:
    """What differs between runs at the same latents depends on noise, and not on a latent."""
    values = {
        name: detach_provenance(cast(Tensor, site["value"]))
        for name, site in at.nodes.items()
        if site["type"] == "sample" and (not site["is_observed"] or site_is_subsample(site))
    }
    pinned = poutine.trace(poutine.condition(model, values))
    with (
        pyro.validation_enabled(False),
        poutine.block(),
        contextlib.suppress(torch.linalg.LinAlgError),  # no density at this start
    ):
        check_model_repeats(lambda: pinned.get_trace(*args, **kwargs))


def _subsamples(trace: poutine.Trace) -> poutine.Trace:
    """The trace's choices of data, without its latents."""
    new = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site):
            new.remove_node(name)
    return new


def _has_discrete_latents(trace: poutine.Trace) -> bool:
    return any(
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and site["fn"].support.is_discrete
        for site in trace.nodes.values()
    )


_Key = tuple[str, int]


@dataclasses.dataclass
class _Suspect:
    """A density with unknown constants, where a site's distribution holds it."""

    name: str
    energies: tuple[UnnormalizedEnergy, ...]
    fn: Any
    """The distribution that is made of them: the energy itself, or a mixture."""
    points: tuple[Tensor, ...]
    """Points of the density's support, without provenance: first that of the site."""
    counted: tuple[Any, ...]
    """How often the density counts: the scale and the masks around it."""

    @property
    def state(self) -> str:
        """What is known of log Z."""
        energy = self.energies[0]
        if energy.is_estimated:
            return "an estimate, made once"
        return "a constant" if self.is_known else energy.normalizer_state

    @property
    def is_known(self) -> bool:
        """Whether there is a log Z, right for the density that it was made for."""
        return all(energy.is_normalized for energy in self.energies)

    def follows(self, parts: Mapping[str, frozenset[str]]) -> bool:
        """Whether a known log Z moves with the density, by one latent at least.

        That it moves with all of them is not asked: in a location-scale family it does not.
        """
        if not self.is_known or self.energies[0].is_estimated:
            return False
        moving = [latents for part, latents in parts.items() if part != "log Z"]
        if not moving or "log Z" not in parts:
            return not moving
        log_z, density = parts["log Z"], frozenset().union(*moving)
        return not (log_z and density) or bool(log_z & density)

    def evaluate(self, points: Iterable[Tensor]) -> dict[str, list[Any]]:
        """All that the constants may depend on, at fixed points."""
        density = {
            "energy": [self._log_density(x) for x in points],
            "support": [bound for p in self.energies for bound in bounds_of(p.support)],
        }
        if self.is_known:  # right however often the density counts
            return {**density, "log Z": [p.log_normalizer for p in self.energies]}
        shape = torch.tensor(self.fn.batch_shape + self.fn.event_shape)
        return {"shape": [shape], **density, "scale or mask": list(self.counted)}

    def _log_density(self, x: Tensor) -> Tensor | None:
        """None where there is none: at a singular matrix, a point of another shape."""
        fn, batch_dim = self.fn, x.dim() - len(self.fn.event_shape)
        if x.shape[batch_dim:] != fn.event_shape or not _fit(x.shape[:batch_dim], fn.batch_shape):
            return None
        energy = isinstance(fn, UnnormalizedEnergy)
        try:
            return fn.unnormalized_log_prob(x) if energy else fn.log_prob(x)
        except torch.linalg.LinAlgError:
            return None


def _fit(*shapes: tuple[int, ...]) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


def _suspects(trace: poutine.Trace) -> dict[_Key, _Suspect]:
    return {
        (name, index): suspect
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
        for index, suspect in enumerate(_suspects_at(site))
    }


def _suspects_at(site: Mapping[str, Any]) -> Iterator[_Suspect]:
    value = detach_provenance(cast(Tensor, site["value"]))
    yield from _suspects_in(site["name"], site["fn"], value, (site["scale"], site["mask"]))


def _suspects_in(name: str, fn: Any, x: Tensor, counted: tuple[Any, ...]) -> Iterator[_Suspect]:
    if isinstance(fn, UnnormalizedEnergy):
        if fn.constant_normalizer:
            return
        if fn.normalized_parts is None:
            yield _Suspect(name, (fn,), fn, (x, *_probes(fn, x)), counted)
        for part in fn.rests_on:
            yield from _suspects_in(name, part, x, counted)
    elif isinstance(fn, Independent):
        yield from _suspects_in(name, fn.base_dist, x, counted)
    elif isinstance(fn, MaskedDistribution):
        yield from _suspects_in(name, fn.base_dist, x, (*counted, fn._mask))
    elif isinstance(fn, TransformedDistribution):  # a bijection leaves Z as it is
        for transform in reversed(fn.transforms):
            x = detach_provenance(cast(Tensor, transform.inv(x)))
        yield from _suspects_in(name, fn.base_dist, x, counted)
    elif energies := [p for p in energies_of(fn) if not p.constant_normalizer]:  # a mixture
        unknown = tuple(energy for energy in energies if not energy.is_normalized)
        if unknown:  # its normalizer mixes those of its parts
            yield _Suspect(name, unknown, fn, (x,), counted)
            return
        for part in parts_of(fn):
            point = fn._pad(x) if isinstance(fn, MixtureSameFamily) else x
            yield from _suspects_in(name, part, point, counted)


def _probes(p: UnnormalizedEnergy, x: Tensor) -> list[Tensor]:
    """Points where chains may start: a threshold may hide a dependence at the data alone."""
    if x.numel() == 0 or x.is_complex():
        return []
    like = x if p.support.is_discrete or x.is_floating_point() else x.to(p.like)
    return [detach_provenance(uniform_start(p.support, x.shape, like)) for _ in range(NUM_PROBES)]


def _close(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(_close_values, a, b))


def _close_values(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    a, b = detach_provenance(a), detach_provenance(b)
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b.to(a.dtype))
    return torch.allclose(a, b.to(a), rtol=1e-4, atol=1e-5, equal_nan=True)
