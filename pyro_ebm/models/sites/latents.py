"""What a latent site must have to be sampled: a density on a support that the reals map onto."""

from collections.abc import Callable
from math import pi
from typing import Any, TypedDict

from pyro.distributions import (
    Delta,
    ProjectedNormal,
    SineBivariateVonMises,
    SineSkewed,
    constraints,
)
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import VonMises, biject_to
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.core.supports import plain_support, stated_support
from pyro_ebm.distributions.core.wrappers import VIEWS, innermost

InitStrategy = Callable[..., object]
"""Gives a site its first value."""


class SampleSite(TypedDict):
    """A sample site of a trace, or its message: Pyro's type of it is that of all kinds of sites."""

    name: str
    fn: TorchDistribution
    value: Tensor
    is_observed: bool
    args: tuple[object, ...]
    kwargs: dict[str, object]
    infer: dict[str, object]
    scale: Any  # a number or a tensor
    mask: Tensor | bool | None
    score_parts: ScoreParts
    log_prob: Tensor
    log_prob_sum: Tensor
    cond_indep_stack: tuple[CondIndepStackFrame, ...]


def init_near_zero(site: SampleSite) -> object:
    """Where chains start: uniformly between -1 and 1, on the unconstrained space.

    Twice as far out, as Pyro's kernels start, rates and scales of a regression or a recursion are
    so extreme that some of many chains do not come back.
    """
    uniform: InitStrategy = init_to_uniform
    return uniform(site, radius=1.0)


def support_of(name: str, fn: TorchDistribution) -> tuple[constraints.Constraint, bool]:
    """The support of a latent site, as a constraint that ``biject_to`` has a bijection for if any.

    Returns:
        The support, and whether it is another object than the distribution's own.

    Raises:
        ValueError: if its distribution has none.

    Example:
        >>> support_of("scale", dist.Wishart(torch.tensor(3.0), torch.eye(2)))
        (PositiveDefinite(), True)
    """
    try:
        support = stated_support(fn)  # a new object each time
    except NotImplementedError as error:
        raise ValueError(
            f"the distribution {type(fn).__name__} of site {name!r} has no support, so"
            " no kernel can move it: use another distribution, or give its class a support"
        ) from error
    if isinstance(innermost(fn, VIEWS), VonMises | SineBivariateVonMises | SineSkewed):
        # they say the reals, where their periodic density has no finite integral
        return constraints.independent(constraints.interval(-pi, pi), fn.event_dim), True
    plain = plain_support(support)
    return plain, plain is not support


def transform_of(name: str, fn: TorchDistribution) -> Transform:
    """From the support of a continuous latent site to the reals.

    Raises:
        ValueError: if the site is a point mass, or no bijection is known.

    Example:
        >>> transform_of("x", dist.LogNormal(0.0, 1.0))(torch.tensor(1.0))
        tensor(0.)
        >>> transform_of("x", dist.Delta(torch.tensor(1.0)))
        Traceback (most recent call last):
        ...
        ValueError: site 'x' is a Delta, a point without a density: ...
    """
    kind = innermost(fn, VIEWS)
    if isinstance(kind, Delta):
        raise ValueError(
            f"site {name!r} is a Delta, a point without a density: write"
            f" pyro.deterministic({name!r}, ...)"
        )
    support, _ = support_of(name, fn)
    try:
        return biject_to(support).inv
    except NotImplementedError as error:
        reparam = f"poutine.reparam(model, {{{name!r}: ProjectedNormalReparam()}})"
        way = reparam if isinstance(kind, ProjectedNormal) else "sites on other supports"
        raise ValueError(
            "torch.distributions.biject_to has no bijection from the reals onto the support"
            f" {type(support).__name__.lstrip('_')} of site {name!r} ({type(kind).__name__}):"
            f" write the model as {way}, or give the kernel transforms={{{name!r}: ...}}, a"
            " Transform from the support to the reals (with init_strategy=init_to_value(...), if"
            " the distribution cannot be drawn from)"
        ) from error
