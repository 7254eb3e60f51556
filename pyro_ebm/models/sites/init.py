"""Where the latents of a model start."""

import functools

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_ebm.distributions.core.introspection import bounds_of, elementwise, tensors_of
from pyro_ebm.distributions.core.supports import uniform_start
from pyro_ebm.models.sites.discrete_sites import is_integer
from pyro_ebm.models.sites.joint_start import JointStart
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite, support_of, transform_of
from pyro_ebm.ops.arguments import shown


def started(init_strategy: InitStrategy) -> InitStrategy:
    """An ``init_strategy`` that also has values for sites for which one of Pyro's has none.

    A site whose distribution cannot be sampled starts uniformly on (-2, 2) before its bijection;
    one without a bijection, at a draw.
    """
    return functools.partial(_start, init_strategy)


def _start(init_strategy: InitStrategy, site: SampleSite) -> object:
    name, fn = site["name"], site["fn"]
    support, restated = support_of(name, fn)
    if isinstance(init_strategy, JointStart):
        if (value := init_strategy.of_draw(site)) is not None:
            return value
        init_strategy = init_strategy.otherwise
    if support.is_discrete:
        try:
            return init_to_sample(site)
        except NotImplementedError as error:
            if is_integer(support):
                lowest = next(iter(bounds_of(elementwise(support))), 0)
                return torch.as_tensor(lowest, dtype=torch.get_default_dtype()).expand(fn.shape())
            raise ValueError(
                f"the discrete site {name!r} starts at a draw, and {type(fn).__name__} cannot be"
                " drawn from: use another distribution"
            ) from error
    given = {**site, "fn": _Restated(fn, support)} if restated else site
    try:
        start = init_strategy(given)
    except NotImplementedError:
        try:
            start = init_to_sample(given)
        except NotImplementedError:
            transform_of(name, fn)  # which says so if there is no bijection either
            like = (tensors_of(support) or [torch.empty(())])[0]
            start = uniform_start(support, fn.batch_shape + fn.event_shape, like)
    if not (start is None or isinstance(start, Tensor)):
        raise ValueError(
            f"init_strategy must return a tensor for site {name!r}, or None, got {shown(start)}"
        )
    return start


class _Restated:
    """A distribution with an equal support that ``biject_to`` has a bijection for."""

    def __init__(self, fn: TorchDistribution, support: constraints.Constraint):
        self._fn, self.support = fn, support

    def __getattr__(self, name: str) -> object:
        return getattr(self._fn, name)
