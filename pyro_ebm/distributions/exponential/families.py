r"""Exponential families: the :math:`T`, :math:`h` and :math:`\log Z` of the named distributions.

A family is all the densities

.. math:: p(x) = h(x)\, e^{\theta \cdot T(x) - \log Z(\theta)}

of one statistic :math:`T`, base measure :math:`h` and support; :math:`\theta` picks a member. Here
:math:`h` is 1 wherever it can be, and :math:`\log Z` is that of these very :math:`T` and :math:`h`:
the :math:`\sqrt{2 \pi}` of a Gaussian is in its :math:`Z`. Where :math:`h = 1`, natural parameters
add when densities multiply.

What a family holds fixed (the location of a Laplace, the count of a binomial) is part of its
identity.

Reference:
    Barndorff-Nielsen (1978), Information and exponential families in statistical theory.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistribution
from torch import Tensor
from torch import distributions as td

from pyro_ebm.distributions.checks.arguments import checked_shape
from pyro_ebm.distributions.core.discrete import support_values_of
from pyro_ebm.distributions.core.introspection import name_of_function
from pyro_ebm.distributions.core.supports import lift_support, same_support
from pyro_ebm.distributions.exponential.formulas import FORMULAS, Formula
from pyro_ebm.distributions.exponential.quadrature import (
    Integrand,
    check_dimensions,
    differentiable_log_integral,
)
from pyro_ebm.ops.integration.enumerate import log_sum_over_states
from pyro_ebm.ops.integration.quadrature import failure_message


class Family:
    r"""An exponential family: :math:`T`, :math:`h`, the support and :math:`\log Z(\theta)`.

    To add one, write what is in its formula. What it holds fixed are its attributes; families are
    equal if these are.

    Example:
        >>> from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
        >>> class Rayleigh(Family):  # x exp(theta x^2) on the positive numbers
        ...     support = dist.constraints.positive
        ...     def statistic(self, x):
        ...         return x.square()[..., None]
        ...     def log_base_measure(self, x):
        ...         return x.log()
        ...     def log_normalizer(self, theta):
        ...         return -(-2 * theta[..., 0]).log()
        >>> p = ExponentialFamily(Rayleigh(), torch.tensor([-0.5]))
        >>> p.log_prob(torch.tensor(1.0))  # sigma = 1
        tensor(-0.5000)
    """

    support: constraints.Constraint = constraints.real
    event_shape = torch.Size()
    batch_shape = torch.Size()
    """The batch shape of what the family holds fixed."""

    def statistic(self, x: Tensor) -> Tensor:
        """:math:`T(x)`, ``(*sample, *batch, *event) -> (*sample, *batch, k)``."""
        raise NotImplementedError

    log_base_measure: Callable[[Tensor], Tensor] | None = None
    r""":math:`\log h(x)`, ``(*sample, *batch, *event) -> (*sample, *batch)``; None if h is 1."""

    def log_normalizer(self, theta: Tensor) -> Tensor:
        r""":math:`\log Z(\theta)`, ``(*batch, k) -> (*batch)``."""
        raise NotImplementedError

    def distribution(self, theta: Tensor, validate: bool) -> TorchDistribution | None:
        """The member as a Pyro distribution, which can draw; None if there is none.

        With ``validate`` it raises a ValueError for a member that does not exist.
        """
        return None

    def log_density(self, theta: Tensor, x: Tensor) -> Tensor:
        r""":math:`\log h(x) + \theta \cdot T(x)`, shape ``(*sample, *batch)``."""
        if not x.is_floating_point():
            x = x.to(theta.dtype)
        value = inner(theta, self.statistic(x))
        log_h = self.log_base_measure
        return value if log_h is None else value + log_h(x)

    def complaint(self, theta: Tensor) -> str:
        r"""What is wrong with a :math:`\theta` at which :math:`\log Z` is not finite."""
        return f"log Z would be {self.log_normalizer(theta).detach()}"

    def __eq__(self, other: object) -> bool:
        mine, others = vars(self), getattr(other, "__dict__", {})
        return type(self) is type(other) and all(_same(mine[key], others.get(key)) for key in mine)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return type(self).__name__


def inner(theta: Tensor, statistic: Tensor) -> Tensor:
    r""":math:`\theta \cdot T`, shape ``(*sample, *batch)``, with :math:`0 \cdot \infty = 0`.

    A component of :math:`\theta` that is 0 makes the factor :math:`e^{\theta_i T_i} = 1`, whatever
    :math:`T_i`; one that is :math:`-\infty` rules a point out only where :math:`T_i` is not 0.

    Args:
        theta: natural parameters, shape ``(*batch, k)``.
        statistic: :math:`T(x)`, shape ``(*sample, *batch, k)``.

    Example:
        >>> inner(torch.tensor([0.0, -1.0]), torch.tensor([float("-inf"), 3.0]))
        tensor(-3.)
    """
    if statistic.shape[-1] != theta.shape[-1]:
        raise ValueError(
            f"the statistic has {statistic.shape[-1]} components (its last dimension), and the"
            f" natural parameters have {theta.shape[-1]}"
        )
    if not statistic.is_floating_point():
        statistic = statistic.to(theta.dtype)
    zero = (theta == 0) & statistic.isinf() | theta.isinf() & (statistic == 0)
    return (torch.where(zero, 0.0, theta) * torch.where(zero, 0.0, statistic)).sum(-1)


def _same(one: object, other: object) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # those that are equal now, but move apart with the next gradient, are not the same
        fixed = not (one.requires_grad or other.requires_grad)
        return one is other or (fixed and torch.equal(one, other))
    if isinstance(one, constraints.Constraint) and isinstance(other, constraints.Constraint):
        return same_support(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


class Named(Family):
    """A family of the table.

    Args:
        name: its name there.
        support: its support.
        event_shape: shape of a point.
        fixed: what it holds fixed.
    """

    def __init__(
        self,
        name: str,
        support: constraints.Constraint,
        event_shape: torch.Size,
        fixed: tuple[object, ...],
    ):
        self.name, self.support, self.event_shape, self.fixed = name, support, event_shape, fixed

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of what the family holds fixed."""
        shapes = [part.shape for part in self.fixed if isinstance(part, Tensor)]
        return torch.broadcast_shapes(*shapes)

    @property
    def formula(self) -> Formula:
        """Its formulas in the table."""
        return FORMULAS[self.name]

    def statistic(self, x: Tensor) -> Tensor:
        """:math:`T(x)`, ``(*sample, *batch, *event) -> (*sample, *batch, k)``."""
        return _stacked(self.formula.statistic(x, *self.fixed))

    @property
    def log_base_measure(self) -> Callable[[Tensor], Tensor] | None:
        r""":math:`\log h`, ``(*sample, *batch, *event) -> (*sample, *batch)``; None if h is 1."""
        log_h = self.formula.log_h
        return None if log_h is None else lambda x: log_h(x, *self.fixed)

    def log_normalizer(self, theta: Tensor) -> Tensor:
        r""":math:`\log Z(\theta)`, ``(*batch, k) -> (*batch)``."""
        return self.formula.log_z(*self._arguments(theta))

    def distribution(self, theta: Tensor, validate: bool) -> TorchDistribution:
        """The member as Pyro's distribution; raises a ValueError if asked to validate it."""
        parameters = self.formula.parameters(*self._arguments(theta))
        return self.formula.make(**parameters, validate_args=validate)

    def _arguments(self, theta: Tensor) -> tuple[object, ...]:
        components = (theta,) if self.formula.vector else theta.unbind(-1)
        return (*components, *self.fixed)

    def __repr__(self) -> str:
        return self.name


class Repeated(Family):
    """The family of independent draws side by side, as ``to_event`` makes them.

    Args:
        family: the family of one draw.
        shape: how many there are.
    """

    def __init__(self, family: Family, shape: torch.Size):
        self.family, self.shape = family, shape
        self.event_shape = shape + family.event_shape
        self.support = lift_support(family.support, self.event_shape)
        self.batch_shape = family.batch_shape[: -len(shape)]

    def statistic(self, x: Tensor) -> Tensor:
        """The statistics of all draws, flat."""
        return self.family.statistic(x).flatten(-1 - len(self.shape))

    @property
    def log_base_measure(self) -> Callable[[Tensor], Tensor] | None:
        """The sum of the log base measures of the draws."""
        log_h, n = self.family.log_base_measure, len(self.shape)
        return None if log_h is None else lambda x: log_h(x).flatten(-n).sum(-1)

    def log_normalizer(self, theta: Tensor) -> Tensor:
        """The sum of the log normalizers of the draws."""
        log_z = self.family.log_normalizer(self._unflat(theta))
        return log_z.flatten(-len(self.shape)).sum(-1)

    def distribution(self, theta: Tensor, validate: bool) -> TorchDistribution | None:
        """The members, ``to_event``."""
        d = self.family.distribution(self._unflat(theta), validate)
        return None if d is None else d.to_event(len(self.shape))

    def _unflat(self, theta: Tensor) -> Tensor:
        return theta.unflatten(-1, (*self.shape, -1))

    def __repr__(self) -> str:
        return f"{self.family!r}{tuple(self.shape)}"


class OwnFamily(Family):
    r"""A family of the user's own, its :math:`\log Z` a function, an integral or a sum over states.

    Args:
        statistic: :math:`T`, ``(*sample, *batch, *event) -> (*sample, *batch, k)``.
        log_base_measure: :math:`\log h`, ``(*sample, *batch, *event) -> (*sample, *batch)``, or
            None.
        log_normalizer: :math:`\log Z`, ``(*batch, k) -> (*batch)``; or None, for an integral over
            at most two dimensions, or a sum over a finite support.
        support: where the densities live.
        event_shape: shape of one point.

    Raises:
        ValueError: if they are not callable, or there is no way to :math:`\log Z`.
    """

    def __init__(
        self,
        statistic: Callable[[Tensor], Tensor],
        log_base_measure: Callable[[Tensor], Tensor] | None,
        log_normalizer: Callable[[Tensor], Tensor] | None,
        support: constraints.Constraint,
        event_shape: torch.Size | tuple[int, ...],
    ):
        for name, function in [
            ("statistic", statistic),
            ("log_base_measure", log_base_measure),
            ("log_normalizer", log_normalizer),
        ]:
            if not callable(function) and (function is not None or name == "statistic"):
                raise ValueError(f"{name} must be callable, got {type(function).__name__}")
        self.event_shape = checked_shape("event_shape", event_shape)
        self.support = lift_support(support, self.event_shape)
        self._statistic, self._log_normalizer = statistic, log_normalizer
        self.log_base_measure = log_base_measure
        if log_normalizer is None and self._support_values() is None:
            check_dimensions(self.support, self.event_shape, torch.Size(), f"log Z of {self}")

    def statistic(self, x: Tensor) -> Tensor:
        """The statistic of the user, with its shape checked."""
        t = self._statistic(x)
        want = x.shape[: x.dim() - len(self.event_shape)]
        if not isinstance(t, Tensor) or t.dim() != len(want) + 1 or t.shape[:-1] != want:
            raise ValueError(
                f"the statistic {self} must map points of shape {tuple(x.shape)} with event_shape="
                f"{tuple(self.event_shape)} to a tensor of shape {(*want, 'k')}, got"
                f" {tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__}: stack its k"
                " components in a last dimension, also when k is 1"
            )
        return t

    def log_normalizer(self, theta: Tensor) -> Tensor:
        """The function of the user, else the integral or the sum; NaN where there is none."""
        if self._log_normalizer is not None:
            log_z = self._log_normalizer(theta)
            if log_z.shape != theta.shape[:-1]:
                raise ValueError(
                    f"log_normalizer must map natural parameters of shape {tuple(theta.shape)} to a"
                    f" tensor of shape {tuple(theta.shape[:-1])}, got {tuple(log_z.shape)}"
                )
            return log_z
        support_values = self._support_values()
        if support_values is None:
            return differentiable_log_integral(self._integrand, theta)[0]
        shape = (1,) * (theta.dim() - 1) + tuple(self.event_shape)
        return log_sum_over_states(
            lambda states: self.log_density(theta, states.reshape((-1, *shape))),
            support_values.to(theta),
            self.event_shape.numel() // support_values.shape[1],
        )

    def complaint(self, theta: Tensor) -> str:
        """Why quadrature fails, or the value of log Z."""
        if self._log_normalizer is None and self._support_values() is None:
            _, failure, grid = differentiable_log_integral(self._integrand, theta)
            return f"the density {failure_message(failure, grid)}"
        return super().complaint(theta)

    def _integrand(self, theta: Tensor) -> Integrand:
        log_density = partial(self.log_density, theta)
        return Integrand(log_density, self.support, self.event_shape, theta.shape[:-1])

    def _support_values(self) -> Tensor | None:
        return support_values_of(self.support, self.event_shape)

    def __repr__(self) -> str:
        return name_of_function(self._statistic)


def family_of(d: td.Distribution) -> tuple[Family, Tensor]:
    r"""The exponential family of a distribution of Pyro or torch, and its :math:`\theta` there.

    Args:
        d: the distribution, which may be wrapped by ``expand`` and ``to_event``.

    Returns:
        The family, and natural parameters of shape ``(*batch, k)``.

    Raises:
        ValueError: if it is of none, or of none that is known.

    Example:
        >>> family_of(dist.Gamma(3.0, 2.0))
        (Gamma, tensor([ 2., -2.]))
    """
    if isinstance(d, td.Independent):
        family, theta = family_of(d.base_dist)
        n = d.reinterpreted_batch_ndims
        if n:
            family = Repeated(family, d.event_shape[:n])
            theta = theta.flatten(-1 - n)
        return family, theta
    if isinstance(d, ExpandedDistribution):
        family, theta = family_of(d.base_dist)
        return family, theta.expand(d.batch_shape + theta.shape[-1:])
    for name, formula in FORMULAS.items():
        if isinstance(d, formula.source):
            theta = _stacked(formula.natural(d))
            support = formula.support or cast(constraints.Constraint, d.support)
            family = Named(name, support, d.event_shape, formula.fixed(d))
            return family, theta.expand(d.batch_shape + theta.shape[-1:])
    raise ValueError(
        f"{d!r} is not of an exponential family that is known here. Known are"
        f" {', '.join(FORMULAS)}, and these expanded or to_event. Of another family, give its"
        " statistic: ExponentialFamily(statistic, natural_parameters, ...). For a density of none,"
        " such as a Cauchy or a mixture: UnnormalizedEnergy(lambda x: -d.log_prob(x),"
        " log_normalizer=0.0), or the distribution itself"
    )


def _stacked(components: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(components, -1) if isinstance(components, tuple) else components
