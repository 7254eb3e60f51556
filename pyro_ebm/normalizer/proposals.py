"""Proposals: normalized distributions with exact draws that cover the support of an energy."""

from collections.abc import Callable

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.core.supports import contains, support_of
from pyro_ebm.distributions.core.wrappers import improper_part
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.models.runs import site_of
from pyro_ebm.ops.arguments import shown

Proposal = TorchDistribution | Callable[[], object]
"""A normalized distribution, or a guide with one sample site."""


def checked_proposal(q: Proposal, p: UnnormalizedEnergy) -> TorchDistribution:
    """A normalized distribution that can be drawn from exactly and covers the energy's support.

    Args:
        q: a distribution, or a guide with one sample site.
        p: the energy.

    Returns:
        The distribution, with the energy's batch shape.

    Raises:
        ValueError: if it is not such a distribution.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x**2 / 2)
        >>> checked_proposal(dist.Exponential(1.0), p)
        Traceback (most recent call last):
        ValueError: the proposal Exponential lives on GreaterThanEq(lower_bound=0.0), which does ...
    """
    if not isinstance(q, Distribution):
        q = _of_guide(q)
    name = f"the proposal {type(q).__name__}"
    energy = find_energy(q)
    if energy is not None and not energy.is_normalized:
        raise ValueError(
            f"{name} is an energy whose log Z is {energy.normalizer_state}: propose from a"
            " normalized distribution"
        )
    if (part := improper_part(q)) is not None:
        raise ValueError(
            f"{name} holds a {part}, whose log_prob is no density that integrates to 1: propose"
            " from the distribution without it"
        )
    if not has_exact_draws(q):
        raise ValueError(
            f"{name} is an energy whose draws are the ends of short chains: propose from a"
            " distribution with exact draws"
        )
    if q.event_shape != p.event_shape:
        hint = (
            f": write d.expand({tuple(p.event_shape)}).to_event({p.event_dim})"
            if not q.event_shape
            else ""
        )
        raise ValueError(
            f"{name} has event_shape={tuple(q.event_shape)}, the energy has"
            f" {tuple(p.event_shape)}{hint}"
        )
    try:
        support = support_of(q)
    except NotImplementedError as error:
        raise ValueError(
            f"{name} has no support property: wrap a flow as FlowDistribution(flow)"
        ) from error
    if support.is_discrete != p.support.is_discrete or not contains(support, p.support):
        raise ValueError(
            f"{name} lives on {support}, which does not cover the support {p.support} of the"
            " energy: the mass outside would be missing from Z"
        )
    try:
        return q if q.batch_shape == p.batch_shape else q.expand(p.batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} has batch_shape={tuple(q.batch_shape)}, which does not expand to the energy's"
            f" {tuple(p.batch_shape)}"
        ) from error


def has_exact_draws(q: Distribution) -> bool:
    """Whether :func:`exact_draws` are draws of the distribution, not the ends of short chains."""
    if isinstance(q, ExponentialFamily):
        return q.has_rsample or q.has_enumerate_support
    return hasattr(q, "exact_sample") or find_energy(q) is None


def exact_draws(q: Distribution, num: int) -> Tensor:
    """Exact draws, shape ``(num, *batch, *event)``."""
    return getattr(q, "exact_sample", q.sample)(torch.Size((num,)))


def _of_guide(guide: Callable[[], object]) -> TorchDistribution:
    """The distribution of a guide's one sample site."""
    if not callable(guide):
        raise ValueError(
            f"proposal must be a distribution, or a guide with one sample site, got {shown(guide)}"
        )
    trace = prune_subsample_sites(poutine.trace(guide).get_trace())
    latents = [site_of(trace, name) for name in trace.stochastic_nodes]
    if len(latents) != 1:
        names = [site["name"] for site in latents]
        raise ValueError(
            f"a guide that proposes must have one sample site, and this one has {names}: give its"
            " distribution as proposal="
        )
    return latents[0]["fn"]
