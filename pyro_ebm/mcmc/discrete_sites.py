"""Discrete sites of a model: which values their variables take, whether gradients see them."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor
from torch.distributions import Independent
from torch.distributions.transforms import identity_transform

from pyro_ebm.distributions.discrete import codewords
from pyro_ebm.distributions.energy import UnnormalizedEnergy, starting_points_only
from pyro_ebm.mcmc.mode import called_in_eval_mode
from pyro_ebm.mcmc.potential import Site

NUM_RERUNS = 64


def site_codes(name: str, fn: Any) -> Tensor | None:
    """The codewords ``(K, b)`` of the variables of a discrete site; None if it is continuous.

    Raises:
        ValueError: for a discrete site whose variables do not share a finite set of values.

    Example:
        >>> site_codes("k", dist.Categorical(torch.ones(3)).expand([5]).to_event(1))
        tensor([[0],
                [1],
                [2]])
    """
    if not fn.support.is_discrete:
        return None
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, UnnormalizedEnergy):
        return codewords(fn.support, fn.event_shape)
    error: Exception | None = None
    if fn.has_enumerate_support:
        try:
            return fn.enumerate_support(expand=False).reshape(-1, max(fn.event_shape.numel(), 1))
        except (NotImplementedError, ValueError) as raised:
            error = raised
    raise ValueError(
        f"site {name!r} ({type(fn).__name__}) has no finite set of values that all its elements"
        " share, so that it cannot be resampled: use a distribution that can be enumerated"
        f" (Bernoulli, Categorical, Binomial with one total_count), or sum it out{_because(error)}"
    )


def is_differentiable(fn: Any, value: Tensor) -> bool:
    """Whether the log density has a gradient in its value; that of an index has none."""
    if not value.is_floating_point():
        return False
    with torch.enable_grad(), called_in_eval_mode():
        value = value.clone().requires_grad_()
        log_prob = fn.log_prob(value).sum()
        if not log_prob.requires_grad:
            return False
        return torch.autograd.grad(log_prob, value, allow_unused=True)[0] is not None


def keeps_values(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str
) -> bool:
    """Whether a discrete site has the same values wherever the other latents are.

    Its bounds may come from a latent by broadcasting alone, as those of a ``Binomial`` do whose
    probability is one.

    Example:
        >>> def model():
        ...     b = pyro.sample("b", dist.Bernoulli(0.5))
        ...     pyro.sample("n", dist.Binomial(3, 0.2 + b / 2))
        ...     pyro.sample("m", dist.Binomial(1 + b, 0.5))
        >>> keeps_values(model, (), {}, "n"), keeps_values(model, (), {}, "m")
        (True, False)
    """
    started = InitMessenger(_anywhere)(model)
    codes = []
    with pyro.validation_enabled(False), poutine.block(), starting_points_only():
        for _ in range(NUM_RERUNS):
            with contextlib.suppress(torch.linalg.LinAlgError):  # no place to be
                nodes = poutine.trace(started).get_trace(*args, **kwargs).nodes
                codes.append(site_codes(name, nodes[name]["fn"]))
    return bool(codes) and all(c is not None and torch.equal(c, codes[0]) for c in codes)


def _anywhere(site: Any) -> Any:
    """A start that gives rare values their turn: uniform over those of a discrete site."""
    name, fn = site["name"], site["fn"]
    codes = site_codes(name, fn)
    if codes is None:
        return init_to_uniform(site)
    found = Site(name, fn.shape(), codes.dtype, identity_transform, codes.device, codes)
    return found.start(1, codes.dtype).reshape(fn.shape())


def _because(error: Exception | None) -> str:
    return "" if error is None else f" ({error})"
