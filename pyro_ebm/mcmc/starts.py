"""Runs of a model that start where an ``init_strategy`` says."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.util import site_is_subsample
from torch import Tensor

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
    started = InitMessenger(functools.partial(_start, init_strategy))(model)
    for _ in range(MAX_TRIES - 1):
        try:
            return poutine.trace(started).get_trace(*args, **kwargs)
        except torch.linalg.LinAlgError:
            continue
    return poutine.trace(started).get_trace(*args, **kwargs)


def latents_of(trace: poutine.Trace) -> dict[str, Any]:
    """The sites of a trace that are neither observed nor choices of data."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


def _start(init_strategy: Callable[..., Any], site: Any) -> Any:
    start = init_to_sample(site) if site["fn"].support.is_discrete else init_strategy(site)
    if not (start is None or isinstance(start, Tensor)):
        raise ValueError(
            f"init_strategy must return a tensor for site {site['name']!r}, or None,"
            f" got {shown(start)}"
        )
    return start
