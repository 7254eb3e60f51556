"""Runs of a model that start where an ``init_strategy`` says."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm.distributions.core.introspection import bounds_of, tensors_of
from pyro_ebm.distributions.core.supports import uniform_start
from pyro_ebm.models.sites.discrete_sites import is_integer
from pyro_ebm.models.sites.latents import support_of, transform_of
from pyro_ebm.ops.arguments import shown

MAX_TRIES = 20


def trace_from_start(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    init_strategy: Callable[..., Any],
) -> poutine.Trace:
    """A trace of the model at a start; discrete latents, which have none, are drawn.

    A start at which a matrix of the model is singular is drawn again.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_strategy: gives values to the latents, as in Pyro's kernels.

    Example:
        >>> def model():
        ...     k = pyro.sample("k", dist.Bernoulli(0.5))
        ...     return pyro.sample("x", dist.Normal(k, 1.0))
        >>> from pyro.infer.autoguide.initialization import init_to_median
        >>> trace_from_start(model, (), {}, init_to_median).nodes["k"]["value"] in (0.0, 1.0)
        True
    """
    run = InitMessenger(started(init_strategy))(model)
    for _ in range(MAX_TRIES - 1):
        try:
            return poutine.trace(run).get_trace(*args, **kwargs)
        except torch.linalg.LinAlgError:
            continue
    return poutine.trace(run).get_trace(*args, **kwargs)


def started(init_strategy: Callable[..., Any]) -> Callable[..., Any]:
    """An ``init_strategy`` that knows what to do where Pyro's have no value for a site.

    A site whose distribution cannot be sampled starts uniformly on (-2, 2) before its bijection;
    one without a bijection, at a draw.
    """
    return functools.partial(_start, init_strategy)


def latents_of(trace: poutine.Trace) -> dict[str, Any]:
    """The sites of a trace that are neither observed nor choices of data."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


def _start(init_strategy: Callable[..., Any], site: Any) -> Any:
    name, fn = site["name"], site["fn"]
    support, restated = support_of(name, fn)
    if support.is_discrete:
        try:
            return init_to_sample(site)
        except NotImplementedError as error:
            if is_integer(support):
                (lowest,) = bounds_of(support)[:1]
                return torch.as_tensor(lowest, dtype=torch.get_default_dtype()).expand(fn.shape())
            raise ValueError(
                f"the discrete site {name!r} starts at a draw, and {type(fn).__name__} cannot be"
                " drawn from: use another distribution"
            ) from error
    if restated:
        site = {**site, "fn": _Restated(fn, support)}
    try:
        start = init_strategy(site)
    except NotImplementedError:
        try:
            start = init_to_sample(site)
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
    """A distribution whose support is told in other words."""

    def __init__(self, fn: Any, support: constraints.Constraint):
        self._fn, self.support = fn, support

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fn, name)
