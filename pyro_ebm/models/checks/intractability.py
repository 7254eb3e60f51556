r"""Does an unknown constant depend on what is sampled?

A posterior over :math:`\theta` that is observed through an energy is proportional to
:math:`p(\theta)\, e^{-E_\theta(x)} / Z(\theta)`. If :math:`Z(\theta)` is unknown and left out, the
answer is the posterior of another model. This module finds such sites before anything is sampled.

A first run of the model tracks which latents each tensor was computed from
(:mod:`pyro_ebm.models.provenance`): at *fixed* points :math:`x`, does
:math:`E_\theta(x)`, the base, the support's bounds, or the site's scale or mask come from a
latent? Then further runs with other latents and the same points compare values, to catch what
tensors cannot carry, such as ``theta.item()``, a branch, a number of rows, or a weight that is
overwritten; there are more of them when the first run saw such a read, or a discrete latent, whose
values are uniform in every other run. A branch that hardly any start takes can still be missed.

Equal values at a few points do not clear an energy that comes from a latent: dead units, an even
function at 0 and a threshold beyond the points hide a dependence. Only what cannot carry a value,
such as ``torch.zeros_like(theta)``, is no dependence.

A log Z that was given is known for the density that it was made for. Where latents move that
density and not its log Z (a number, an estimate), it is as good as unknown.

The first run cannot see that a dependence cancels, as in a location family :math:`E(x - \mu)`:
there the user's word ``constant_normalizer=True`` waives the check.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.util import site_is_subsample

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.checks.elbo_guard import register_posterior_check
from pyro_ebm.distributions.core.supports import stated_support
from pyro_ebm.models.checks.fixed_density import (
    FixedLatents,
    NotFixedError,
    check_model_repeats,
)
from pyro_ebm.models.checks.scattered import FAR_OUT, init_uniform_discrete
from pyro_ebm.models.checks.suspects import Key, Suspect, same_values, suspects_at, suspects_of
from pyro_ebm.models.provenance import HostReads, OnlyValuesCount, trace_latents
from pyro_ebm.models.runs import BoundModel, latents_of, side_runs
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite

NUM_RERUNS, NUM_RERUNS_AFTER_READS = 4, 64


class NormalizerError(ValueError):
    """The posterior asked for needs a log Z that is not known."""


def check_normalizers(
    model: Model,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    init_strategy: InitStrategy = init_to_uniform,
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
    for moving in moving_normalizers(BoundModel(model, args, kwargs or {}, init_strategy)):
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


def moving_normalizers(bound: BoundModel) -> list[MovingNormalizer]:
    """The sites whose unknown or learned log Z depends on a latent.

    Example:
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Gamma(1.0, 1.0))
        ...     pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**4), obs=x)
        >>> moving = moving_normalizers(BoundModel(model, (torch.ones(()),)))
        >>> [(each.name, each.parts) for each in moving]
        [('x', {'energy': frozenset({'theta'})})]
    """
    fixed = bound.with_model(FixedLatents()(bound.model))
    reads = HostReads()
    found: dict[Key, dict[str, frozenset[str]]] = {}
    seen: dict[Key, Suspect] = {}
    was_read: set[tuple[Key, str]] = set()
    with side_runs():
        with reads, OnlyValuesCount():
            tracked = trace_latents(fixed)
            suspects = suspects_of(tracked)
            # evaluated now: the next run may overwrite the weights of a module
            first = {key: suspect.evaluate(suspect.points) for key, suspect in suspects.items()}
        for key, parts in first.items():
            for part, values in parts.items():
                if latents := get_provenance(values) - {key[0]}:
                    found.setdefault(key, {})[part] = latents
        if not found:  # else the model is refused already, for a better reason
            bound = fixed
            _check_repeats(bound, tracked)
        unknown = any(not suspect.is_known for suspect in suspects.values())
        fns = [site["fn"] for site in latents_of(tracked).values()]
        discrete = any(stated_support(fn).is_discrete for fn in fns)
        again = reads.latents or (unknown and discrete)
        same_data = poutine.replay(bound.model, trace=_subsamples(tracked))
        rare = InitMessenger(init_uniform_discrete)(same_data)
        for i in range(NUM_RERUNS_AFTER_READS if again else NUM_RERUNS):
            try:
                others = suspects_of(
                    bound.with_model(rare if i % 2 else same_data).unvalidated_trace()
                )
            except FAR_OUT as error:
                if i % 2 and not isinstance(error, NotFixedError):
                    continue  # values that are impossible together
                raise
            seen = {**others, **seen}
            for key in suspects.keys() ^ others.keys():
                if {**others, **suspects}[key].is_known:  # and may come and go
                    continue
                found.setdefault(key, {}).setdefault("presence", reads.latents - {key[0]})
            for key in suspects.keys() & others.keys():
                now = others[key].evaluate(suspects[key].points)
                for part, values in first[key].items():
                    known = part in found.get(key, {})
                    if not known and not same_values(values, now[part]):
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


def lags(site: SampleSite, other: SampleSite) -> bool:
    """Whether the density at a site differs between two runs, and its known log Z does not.

    Args:
        site: a node of a trace.
        other: the same node in another run.
    """
    for one, two in zip(suspects_at(site), suspects_at(other), strict=True):
        if one.is_known:
            values = [suspect.evaluate(one.points) for suspect in (one, two)]
            moved = {p for p in values[0] if not same_values(values[0][p], values[1][p])}
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


def _check_repeats(bound: BoundModel, trace: poutine.Trace) -> None:
    """What differs between runs at the same latents depends on noise, and not on a latent."""
    nodes = {**latents_of(trace), **_subsamples(trace).nodes}
    values = {name: detach_provenance(site["value"]) for name, site in nodes.items()}
    with (
        pyro.validation_enabled(False),
        contextlib.suppress(torch.linalg.LinAlgError),  # no density at this start
    ):
        check_model_repeats(lambda: bound.trace_at(values))


def _subsamples(trace: poutine.Trace) -> poutine.Trace:
    """The trace's choices of data, without its latents."""
    new = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site):
            new.remove_node(name)
    return new
