"""Random Pyro models: a description that prints, compares and can be called.

A model has up to three plates, of sizes 1 to 3, and a few sites. Each site stands in some of the
plates, has a family or an energy, an event of its own, perhaps a scale and a mask, and a location
that real sites before it move.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_ebm import UnnormalizedEnergy


def quartic(x: Tensor, dims: int, m: Any, event: tuple[int, ...]) -> Tensor:
    """E = sum_i (i + 1) (x_i - m)^2 / 2 + (sum_i x_i)^4 / 10, for events of these dimensions."""
    batch = x.shape[: x.dim() - dims]
    flat = x.reshape(batch + (torch.Size(event).numel(),))
    weight = torch.arange(1, flat.shape[-1] + 1, dtype=x.dtype)
    shifted = flat - (m[..., None] if isinstance(m, Tensor) else m)
    return (weight * shifted.square()).sum(-1) / 2 + flat.sum(-1) ** 4 / 10


def written(m: Tensor) -> Tensor:
    """The numbers of m, written into a tensor that vmap cannot see is each chain's own."""
    copy = torch.zeros(m.shape, dtype=m.dtype)
    copy[...] = m
    copy.data.clamp_(min=-1e6)
    return copy


@dataclass(frozen=True)
class SiteSpec:
    """One site of a model."""

    name: str
    family: str
    event: tuple[int, ...] = ()
    """Shape of what ``to_event`` adds to the family's own event."""
    plates: tuple[int, ...] = ()
    scale: float = 1.0
    mask: str = "none"
    """none, true, false, some (of the elements of the plates), inner (the distribution's), or obs
    (of an observed site: where it is observed; elsewhere it is latent)."""
    observed: bool = False
    moved: bool = False
    """Whether real sites before it move its location."""


# family: event dimensions of its own, and the distribution at a location m of the batch's shape
FAMILIES: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "normal": (0, lambda m: dist.Normal(m, torch.ones_like(m) * 1.3)),
    "student": (0, lambda m: dist.StudentT(4.0 * torch.ones_like(m), m, 0.7)),
    "laplace": (0, lambda m: dist.Laplace(m, torch.ones_like(m))),
    "written": (0, lambda m: dist.Normal(written(m), torch.ones_like(m))),
    "multivariate": (
        1,
        lambda m: dist.MultivariateNormal(
            torch.stack([m, -m], -1),
            scale_tril=torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=m.dtype),
        ),
    ),
    "lognormal": (0, lambda m: dist.LogNormal(m, torch.ones_like(m) * 0.5)),
    "gamma": (0, lambda m: dist.Gamma(2.0 + m.tanh(), torch.ones_like(m))),
    "halfnormal": (0, lambda m: dist.HalfNormal(1.5 + m.tanh())),
    "beta": (0, lambda m: dist.Beta(2.0 + m.tanh(), 2.0 * torch.ones_like(m))),
    # bounds that latents lend their shape: one that moved them would be refused
    "uniform": (0, lambda m: dist.Uniform(-torch.ones_like(m), m.new_full(m.shape, 2.0))),
    "vonmises": (0, lambda m: dist.VonMises(m, torch.ones_like(m) * 2)),
    "dirichlet": (
        1,
        lambda m: dist.Dirichlet(torch.stack([2.0 + m.tanh(), m * 0 + 1.5, m * 0 + 3.0], -1)),
    ),
    "ordered": (
        1,
        lambda m: dist.TransformedDistribution(
            dist.Normal(torch.stack([m, m * 0, m * 0 - 1], -1), torch.ones_like(m)[..., None]),
            [dist.transforms.OrderedTransform()],
        ),
    ),
    "lkj": (2, lambda m: dist.LKJCholesky(3, 1.5 + 0.5 * m.tanh())),
}
ENERGIES: dict[str, Any] = {
    "energy": {},
    "energy-positive": {"support": constraints.positive},
    "energy-unit": {"support": constraints.unit_interval},
    "energy-base": {"base": True},
    "energy-known": {"log_normalizer": 0.5},
}
DISCRETE: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "bernoulli": (0, lambda m: dist.Bernoulli(logits=m)),
    "categorical": (0, lambda m: dist.Categorical(torch.stack([m * 0 + 0.3, m * 0 + 0.7], -1))),
    "onehot": (1, lambda m: dist.OneHotCategorical(logits=torch.stack([m, -m, m * 0], -1))),
}
SPIN = "energy-binary"
REAL = {"normal", "student", "laplace", "energy"}


@dataclass(frozen=True)
class ModelSpec:
    """A model: call it to run it."""

    plates: tuple[int, ...]
    sites: tuple[SiteSpec, ...]
    double: bool = True
    factor: bool = False
    seed: int = field(default=0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    @property
    def latents(self) -> dict[str, str]:
        """The family of each latent, by the name of its site."""
        partly = {s.name + "_unobserved": s.family for s in self.sites if s.mask == "obs"}
        return {s.name: s.family for s in self.sites if not s.observed} | partly

    def batch(self, site: SiteSpec) -> torch.Size:
        """The shape that its plates give a site: plate i is at dimension -1 - i."""
        if not site.plates:
            return torch.Size()
        shape = [1] * (max(site.plates) + 1)
        for i in site.plates:
            shape[-1 - i] = self.plates[i]
        return torch.Size(shape)

    def _tensor(self, shape: torch.Size, salt: int) -> Tensor:
        """Numbers that look random; drawn by numpy, so that a graph or vmap sees constants."""
        values = np.random.default_rng(self.seed + salt).standard_normal(tuple(shape))
        return torch.as_tensor(values, dtype=self.dtype)

    def distribution(self, site: SiteSpec, m: Tensor) -> Any:
        """The distribution of a site at a location ``m`` that is one number."""
        batch, n = self.batch(site), len(site.event)
        if site.family in ENERGIES or site.family == SPIN:
            options = dict(ENERGIES.get(site.family, {"support": constraints.boolean}))
            if options.pop("base", False):
                zeros = torch.zeros(site.event, dtype=self.dtype)
                options["base"] = dist.Normal(zeros, 1.0).to_event(n)
            fixed = m.detach() if not site.moved else m
            event = site.event

            def energy(x: Tensor) -> Tensor:
                return quartic(x.to(self.dtype), n, fixed, event)

            return UnnormalizedEnergy(
                energy, event_shape=event, constant_normalizer=True, **options
            ).expand(batch)
        _, make = {**FAMILIES, **DISCRETE}[site.family]
        inner = torch.Size(site.event)
        location = 0.3 * self._tensor(batch + inner, len(site.name)) + m
        return make(location).to_event(n) if n else make(location)

    @contextlib.contextmanager
    def _around(self, site: SiteSpec) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for i in sorted(site.plates):
                stack.enter_context(pyro.plate(f"p{i}_{site.name}", self.plates[i], dim=-1 - i))
            if site.scale != 1.0:
                stack.enter_context(poutine.scale(scale=site.scale))
            mask = self.mask(site)
            if mask is not None and site.mask not in ("inner", "obs"):
                stack.enter_context(poutine.mask(mask=mask))
            yield

    def mask(self, site: SiteSpec) -> Tensor | bool | None:
        if site.mask in ("none", "true", "false"):
            return {"none": None, "true": True, "false": False}[site.mask]
        return self._tensor(self.batch(site), 17) > 0

    def value(self, site: SiteSpec, fn: Any) -> Tensor:
        """Observed data, inside the support."""
        bijection = biject_to(fn.support)
        return bijection(self._tensor(bijection.inverse_shape(fn.shape()), 5)).to(self.dtype)

    def __call__(self) -> dict[str, Tensor]:
        m, values = torch.zeros((), dtype=self.dtype), {}
        for site in self.sites:
            with self._around(site):
                fn = self.distribution(site, m if site.moved else m.detach() * 0)
                if site.mask == "inner":
                    fn = fn.mask(self.mask(site))
                obs = self.value(site, fn) if site.observed else None
                partly = {"obs_mask": self.mask(site)} if site.mask == "obs" else {}
                x = values[site.name] = pyro.sample(site.name, fn, obs=obs, **partly)
            if site.family in REAL and not site.observed:
                m = m + 0.5 * x.sum().tanh()
        if self.factor:
            pyro.factor("factor", -m.square())
        pyro.deterministic("m", m)
        return values


@st.composite
def site_specs(draw: Any, i: int, plates: tuple[int, ...], families: list[str]) -> SiteSpec:
    """A site of one of the families, in some of the plates."""
    family = draw(st.sampled_from(families))
    inside = draw(st.sets(st.sampled_from(range(len(plates))))) if plates else set()
    events = [(), (), (2,), (1,), (2, 2)]
    if family != "beta" and {**FAMILIES, **DISCRETE}.get(family, (0,))[0] == 0:
        events.append((0,))  # torch takes no empty batch of vectors
    event = draw(st.sampled_from(events))
    return SiteSpec(
        name=f"x{i}",
        family=family,
        event=event,
        plates=tuple(sorted(inside)),
        scale=draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
        mask=draw(st.sampled_from(["none", "none", "true", "false", "some", "inner"])),
        moved=draw(st.booleans()),
    )


@st.composite
def models(
    draw: Any, families: list[str] | None = None, max_latents: int = 3, partly: bool = True
) -> ModelSpec:
    """Models with one to three latents and up to two observed sites."""
    plates = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    chosen = families or [*FAMILIES, *ENERGIES]
    num_latents = draw(st.integers(1, max_latents))
    num_observed = draw(st.integers(0, 2))
    sites = [draw(site_specs(i, plates, chosen)) for i in range(num_latents)]
    for i in range(num_latents, num_latents + num_observed):
        site = draw(site_specs(i, plates, [*FAMILIES, *ENERGIES]))
        mask = draw(st.sampled_from([site.mask, site.mask, "obs" if partly else site.mask]))
        sites.append(SiteSpec(**{**vars(site), "observed": True, "mask": mask}))
    return ModelSpec(
        plates,
        tuple(sites),
        double=draw(st.booleans()),
        factor=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
