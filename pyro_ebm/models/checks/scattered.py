r"""Runs of a model at latents far and wide, which show what it does where hardly any chain starts.

Run :math:`i` of four starts near 0, at draws from the prior, which have a site's scale, or at
unconstrained values of one magnitude from .1 to 1,000, with all elements on one side of 0 or on
both. Values of discrete sites are uniform, so that rare ones have their turn.
"""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_sample,
    init_to_uniform,
)
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.distributions.core.supports import stated_support
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.models.sites.discrete_sites import site_support_values
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite
from pyro_ebm.models.sites.site import Site

# what arithmetic, indices and a user's own assertions may raise at values that no chain has
FAR_OUT = (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError)


def scattered_trace(bound: BoundModel, i: int) -> poutine.Trace | None:
    """Run number ``i`` of a model; None if it raises, as it well may far out.

    Example:
        >>> bound = BoundModel(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> runs = [scattered_trace(bound, i) for i in range(64)]
        >>> bool(max(run.nodes["x"]["value"] for run in runs) > 100)
        True
    """
    scattered = InitMessenger(_scattered(i))(bound.model)
    with pyro.validation_enabled(False), poutine.block(), starting_points_only():
        try:
            return poutine.trace(scattered).get_trace(*bound.args, **bound.kwargs)
        except FAR_OUT:
            return None


def _scattered(i: int) -> InitStrategy:
    scale, side = 10 ** (4 * torch.rand(()) - 1), (i % 3 - 1) * 2.0

    def start(site: Any) -> Any:
        fn = site["fn"]
        if fn.support.is_discrete:
            return init_uniform_discrete(site)
        if i % 4 == 0:
            return init_to_uniform(site)
        if i % 4 == 1:
            return init_to_sample(site)
        try:
            bijection = biject_to(fn.support)
        except NotImplementedError:
            return init_to_sample(site)
        like: Any = init_to_sample(site)
        z = scale * (side + torch.randn(bijection.inverse_shape(fn.shape())))
        return bijection(z.to(like))

    return start


def init_uniform_discrete(site: SampleSite) -> Tensor | None:
    """A uniform draw of the values of a discrete site, so that rare ones have their turn.

    Returns:
        The draw, or None for a continuous site and where the draw is impossible.
    """
    name, fn = site["name"], site["fn"]
    if not stated_support(fn).is_discrete:
        return None
    try:
        support_values = site_support_values(name, fn)
    except ValueError:  # without a finite set of values
        return None
    assert support_values is not None
    if not len(support_values):
        return fn()
    dtype, device = support_values.dtype, support_values.device
    shape = torch.Size(fn.shape())
    whole = Site(name, shape, dtype, identity_transform, device, support_values)
    value = whole.start(1, dtype).reshape(shape)
    return value if fn.log_prob(value).isfinite().all() else None
