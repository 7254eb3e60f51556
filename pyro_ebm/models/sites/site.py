"""One latent of a model, as a kernel's flat position holds it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import Transform, identity_transform

from pyro_ebm.distributions.core.supports import as_function
from pyro_ebm.models.sites.given_transforms import check_from_reals


class Site(NamedTuple):
    """One latent of a model, as a kernel's position holds it."""

    name: str
    shape: torch.Size
    """Unconstrained shape of one chain's value."""
    dtype: torch.dtype
    transform: Transform
    """The map from the support to the reals, as in Pyro's ``kernel.transforms``."""
    device: torch.device = torch.device("cpu")
    support_values: Tensor | None = None
    """The values ``(K, b)`` of each variable of ``b`` numbers of a discrete site; none,
    ``(0, 1)``, where they are whole numbers without fixed bounds."""

    @property
    def is_unbounded(self) -> bool:
        """Whether its values are whole numbers without fixed bounds, as of a Poisson."""
        return self.support_values is not None and not len(self.support_values)

    def objection(self, values: Tensor) -> str | None:
        """What values ``(..., size)`` of a discrete site must hold, in words, if they do not."""
        if self.support_values is None:
            return None
        if self.is_unbounded:
            return None if (values == values.round()).all() else "whole numbers"
        support_values = self.support_values.to(values)
        variables = values.reshape(-1, 1, support_values.shape[-1])
        if (variables == support_values).all(-1).any(-1).all():
            return None
        return f"the values {support_values.tolist()} of a discrete site, and holds others"

    def start(self, num_chains: int, dtype: torch.dtype) -> Tensor:
        """Random positions ``(num_chains, size)``: uniform on (-2, 2), or on the support values."""
        size = self.shape.numel()
        if self.support_values is None:
            z = torch.empty(num_chains, size, dtype=dtype, device=self.device)
            return z.uniform_(-2.0, 2.0)
        k, b = self.support_values.shape
        if not k:
            return torch.zeros(num_chains, size, dtype=dtype, device=self.device)
        which = torch.randint(k, (num_chains, size // b), device=self.device)
        return self.support_values.to(self.device, dtype)[which].reshape(num_chains, size)


def to_support(transform: Transform, z: Tensor) -> Tensor:
    """The point of the support at the unconstrained ``z``; ``transform`` goes the other way."""
    return as_function(transform.inv)(z)


def sites_of(
    params: Mapping[str, Tensor], transforms: Mapping[str, Transform] | None = None
) -> list[Site]:
    """The sites of a dict of one chain's unconstrained values."""
    transforms = transforms or {}
    if unknown := sorted(transforms.keys() - params.keys()):
        raise ValueError(f"transforms= names {unknown}, but the sites are {sorted(params)}")
    for name, transform in transforms.items():
        check_from_reals(name, transform, params[name].detach())
    return [
        Site(name, value.shape, value.dtype, transforms.get(name, identity_transform), value.device)
        for name, value in params.items()
    ]
