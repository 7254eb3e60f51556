"""Densities with unknown constants, and all that these constants may depend on."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
)

from pyro_ebm.distributions.core.introspection import bounds_of, detached
from pyro_ebm.distributions.core.supports import as_function, uniform_start
from pyro_ebm.distributions.core.wrappers import parts_of
from pyro_ebm.distributions.energy import UnnormalizedEnergy, energies_of
from pyro_ebm.models.over_chains import is_close
from pyro_ebm.models.runs import sample_sites
from pyro_ebm.models.sites.latents import SampleSite

NUM_PROBES = 4  # further points at which energies are compared


Key = tuple[str, int]
"""A site, and which of the densities in its distribution."""
Value = Tensor | float | None


@dataclasses.dataclass
class Suspect:
    """A density with unknown constants, where a site's distribution holds it."""

    name: str
    energies: tuple[UnnormalizedEnergy, ...]
    fn: Distribution
    """The distribution that is made of them: the energy itself, or a mixture."""
    points: tuple[Tensor, ...]
    """Points of the density's support, without provenance: first that of the site."""
    counted: tuple[Value, ...]
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

    def evaluate(self, points: Iterable[Tensor]) -> dict[str, list[Value]]:
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
        if x.shape[batch_dim:] != fn.event_shape:
            return None
        try:
            torch.broadcast_shapes(x.shape[:batch_dim], fn.batch_shape)
        except RuntimeError:
            return None
        try:
            energy = isinstance(fn, UnnormalizedEnergy)
            return fn.unnormalized_log_prob(x) if energy else fn.log_prob(x)
        except torch.linalg.LinAlgError:
            return None


def suspects_of(trace: poutine.Trace) -> dict[Key, Suspect]:
    """All densities in a trace with a log Z that is unknown, or was made for one density."""
    return {
        (name, index): suspect
        for name, site in sample_sites(trace).items()
        for index, suspect in enumerate(suspects_at(site))
    }


def suspects_at(site: SampleSite) -> Iterator[Suspect]:
    """Those at one site of a trace."""
    value = detach_provenance(site["value"])
    yield from _suspects_in(site["name"], site["fn"], value, (site["scale"], site["mask"]))


def _suspects_in(
    name: str, fn: Distribution, x: Tensor, counted: tuple[Value, ...]
) -> Iterator[Suspect]:
    if isinstance(fn, UnnormalizedEnergy):
        if fn.constant_normalizer:
            return
        if fn.normalized_parts is None:
            yield Suspect(name, (fn,), fn, (x, *_probes(fn, x)), counted)
        for part in fn.rests_on:
            yield from _suspects_in(name, part, x, counted)
    elif isinstance(fn, Independent):
        yield from _suspects_in(name, fn.base_dist, x, counted)
    elif isinstance(fn, MaskedDistribution):
        yield from _suspects_in(name, fn.base_dist, x, (*counted, fn._mask))
    elif isinstance(fn, TransformedDistribution):  # a bijection leaves Z as it is
        for transform in reversed(fn.transforms):
            x = detach_provenance(as_function(transform.inv)(x))
        yield from _suspects_in(name, fn.base_dist, x, counted)
    elif energies := [p for p in energies_of(fn) if not p.constant_normalizer]:  # a mixture
        unknown = tuple(energy for energy in energies if not energy.is_normalized)
        if unknown:  # its normalizer mixes those of its parts
            yield Suspect(name, unknown, fn, (x,), counted)
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


def same_values(a: list[Value], b: list[Value]) -> bool:
    """Whether what two evaluations of a suspect gave is equal up to rounding."""
    return len(a) == len(b) and all(map(_is_close, a, b))


def _is_close(a: Value, b: Value) -> bool:
    if a is None or b is None:
        return a is b
    a, b = (torch.as_tensor(detached(x)) for x in (a, b))
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b.to(a.dtype))
    return is_close(a, b.to(a))
