"""An energy site of a trace, without the wrappers of its distribution."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.distributions.core.wrappers import unmasked
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.ops.arguments import check_tensor


@dataclasses.dataclass
class EnergySite:
    """One energy site of a trace.

    Rows are the elements of the energy's batch, its plates among them.
    """

    name: str
    energy: UnnormalizedEnergy
    x: Tensor
    """Values, shape ``(*batch, *event)``; rows masked out hold some point of the support."""
    mask: Tensor | None
    """Which rows count, boolean, shape ``batch``; None if all do."""
    inner_dims: int
    """How many batch dimensions the site's ``to_event`` sums over."""
    scale: float
    """The site's scale, from its plates and ``poutine.scale``; a tensor in some models."""
    is_observed: bool
    latents: tuple[Tensor, ...] = ()
    """The other latents of the model that a gradient may reach."""
    nodes: Mapping[str, SampleSite] = dataclasses.field(default_factory=dict, repr=False)
    """All sample sites of the model, by name."""
    guide_fn: TorchDistribution | None = None
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
        """The mean over the rows that count, NaN if none does; ``value`` is ``(..., *batch)``."""
        value = value.detach()
        if self.mask is None:
            return value.mean()
        mask = self.mask.expand(value.shape)
        return torch.where(mask, value, 0.0).sum() / mask.sum()

    @property
    def kind(self) -> str:
        """What its values are called."""
        return "data" if self.is_observed else "draws"

    @property
    def num_rows(self) -> Tensor:
        """How many rows count."""
        rows = torch.tensor(self.batch_shape.numel(), device=self.x.device)
        return rows if self.mask is None else self.mask.sum()

    @property
    def is_fixed(self) -> bool:
        """Whether no parameter and no latent moves the density, but its own value alone."""
        return not self.energy.unnormalized_log_prob(self.x.detach()).requires_grad

    def has_latent_in(self, tensor: Tensor | None) -> bool:
        """Whether a tensor was computed from a latent in front of the energy."""
        if tensor is None or not tensor.requires_grad or not self.latents:
            return False
        grads = torch.autograd.grad(
            tensor.sum(), self.latents, retain_graph=True, allow_unused=True
        )
        return any(grad is not None for grad in grads)


def find_site(
    name: str,
    site: SampleSite,
    noise: SampleSite | None = None,
    latents: Iterable[Tensor] = (),
    nodes: Mapping[str, SampleSite] | None = None,
) -> EnergySite:
    """An energy site, without the wrappers of its distribution.

    Args:
        name: its name.
        site: its node in the model's trace.
        noise: its node in the guide's trace, if the site is observed.
        latents: values of the other latents that a gradient may reach.
        nodes: all sample sites of the model.

    Raises:
        ValueError: for NaN data or data outside the support, or a wrapper whose meaning for an
            energy is not known.
    """
    x = site["value"]
    fn, mask, inner_dims = unmasked(site["fn"], site["mask"])
    if not isinstance(fn, UnnormalizedEnergy):
        raise ValueError(
            f"site {name!r} is an energy inside {type(fn).__name__}, which the losses do not"
            " look through: transform the data, or write the energy of what is observed"
        )
    if site["is_observed"]:
        _check_dtype(name, fn, x)
    x = fn.broadcast(x)
    batch = x.shape[: x.dim() - fn.event_dim]
    if mask is not None:
        mask = mask.to(x.device).expand(batch)
        rows = mask.reshape(batch + (1,) * fn.event_dim)
        x = torch.where(rows, x, fn.starting_points((1,))[0].detach().to(x))
    if site["is_observed"]:
        _check_data(name, fn, x)
    return EnergySite(
        name=name,
        energy=fn,
        x=x,
        mask=mask,
        inner_dims=inner_dims,
        scale=site["scale"],
        is_observed=site["is_observed"],
        latents=tuple(latents),
        nodes=nodes or {},
        guide_fn=None if noise is None else noise["fn"],
        guide_value=None if noise is None else noise["value"],
    )


def _check_dtype(name: str, energy: UnnormalizedEnergy, x: Tensor) -> None:
    check_tensor(f"the data at site {name!r}", x)
    if x.layout != torch.strided:
        raise ValueError(f"the data at site {name!r} are {x.layout}: use x.to_dense()")
    if x.is_floating_point() or energy.support.is_discrete:
        return
    what = "true or false" if x.dtype == torch.bool else "integers"
    raise ValueError(
        f"the data at site {name!r} are {what} ({x.dtype}), the energy lives on"
        f" {energy.support}: use x.float() (and for a density of pixels add noise, scaled down),"
        " or give the energy a discrete support"
    )


def _check_data(name: str, energy: UnnormalizedEnergy, x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(
            f"the data at site {name!r} hold NaN or infinite values: mask those rows"
            " (poutine.mask) or drop them"
        )
    if not (is_unbounded(energy.support) or energy.support.check(x).all()):
        try:
            energy.check_values(x)  # its own message may be better
        except ValueError as error:
            raise ValueError(
                f"the data at site {name!r} leave the energy's support {energy.support}: {error}"
            ) from error
        raise ValueError(
            f"the data at site {name!r} leave the energy's support {energy.support}: give the"
            " support that they live on"
        )
