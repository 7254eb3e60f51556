r"""A model whose likelihood is evaluated at other values of its latents than their priors.

.. math:: p(\theta) \, L\big(\hat\theta + C (\theta - \hat\theta)\big)

The model runs twice: once for its latents alone, whose values are moved, and once for its data
alone, conditioned on the moved values.
"""

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.core.supports import as_function
from pyro_ebm.models.runs import site_of
from pyro_ebm.models.sites.site import Site, to_support


class AdjustedModel:
    r"""A model whose likelihood is evaluated at :math:`\hat\theta + C (\theta - \hat\theta)`.

    Args:
        model: the model.
        sites: its latents.
        mode: :math:`\hat\theta`, unconstrained and flat, shape ``(d,)``.
        adjustment: C, shape ``(d, d)``.
    """

    def __init__(self, model: Model, sites: list[Site], mode: Tensor, adjustment: Tensor):
        self.model, self.sites = model, sites
        self.mode, self.adjustment = mode.detach(), adjustment
        self.names = frozenset(site.name for site in sites)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """A run: the latents with their priors, then the data at the moved latents."""
        drawn = poutine.trace(poutine.block(self.model, hide_fn=self._hides_prior))
        trace = drawn.get_trace(*args, **kwargs)
        z = []
        for site in self.sites:
            part = as_function(site.transform)(site_of(trace, site.name)["value"])
            if part.shape != site.shape:
                raise ValueError(
                    f"site {site.name!r} has values of shape {tuple(part.shape)}, and had"
                    f" {tuple(site.shape)}: particles of a corrected model are not vectorized"
                )
            z.append(part.flatten())
        flat = torch.cat(z)
        mode = self.mode.to(flat)
        moved = mode + self.adjustment.to(flat) @ (flat - mode)
        at_moved = poutine.condition(self.model, constrained(self.sites, moved))
        return poutine.block(at_moved, hide_fn=self._hides_data)(*args, **kwargs)

    def _hides_prior(self, site: Any) -> bool:
        shown = site["name"] in self.names or is_deterministic(site)
        return site["type"] == "sample" and not shown

    def _hides_data(self, site: Any) -> bool:
        data = site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)
        return site["name"] in self.names or not data


def constrained(sites: list[Site], z: Tensor) -> dict[str, Tensor]:
    """The values of sites at unconstrained ones, shape ``(d,)``."""
    parts = z.split([site.shape.numel() for site in sites])
    return {
        site.name: to_support(site.transform, part.reshape(site.shape))
        for site, part in zip(sites, parts, strict=True)
    }


def is_deterministic(site: Any) -> bool:
    """Whether a site is a ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))
