r"""Where annealing and bridges start: normalized densities on flat positions, with exact draws.

A start lives where kernels move, on the unconstrained positions :math:`z` of a potential. A
distribution over points of the support is one there,

.. math:: q(z) = q(x(z))\, \left| \det \frac{d x}{d z} \right|,

and where none is given, a Gaussian that is fitted to some positions, or, for discrete variables, a
product of independent ones.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Categorical, Distribution

from pyro_ebm.distributions.core.supports import contains, support_of
from pyro_ebm.distributions.core.wrappers import improper_part
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.mcmc.adaptation.warmup import PooledCovariance
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.score import value_and_grad
from pyro_ebm.ops.steps.precondition import precondition, precondition_transposed

WIDTH = 1.5
"""How much wider than the draws it is fitted to a start of annealing is."""


class Start(ABC):
    """A normalized density on positions ``(chains, dim)``, chain ``c`` in group ``c % targets``."""

    @abstractmethod
    def sample(self, num: int) -> Tensor:
        """Exact draws for ``num`` chains of each group, shape ``(num * targets, dim)``."""

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        r"""The potential :math:`-\log q(z)`, shape ``(chains,)``, differentiable."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        return value_and_grad(self, z)


class GaussianStart(Start):
    r"""The Gaussian :math:`N(m, L L^\top)` of each group.

    Args:
        mean: :math:`m`, shape ``(targets, dim)``.
        factor: :math:`L`, a diagonal ``(targets, dim)`` or lower triangular
            ``(targets, dim, dim)``.

    Example:
        >>> start = GaussianStart(torch.zeros(1, 2), torch.ones(1, 2))
        >>> start(torch.zeros(3, 2))  # log(2 pi)
        tensor([1.8379, 1.8379, 1.8379])
    """

    def __init__(self, mean: Tensor, factor: Tensor):
        self.mean, self.factor = mean, factor
        self.inverse = factor.reciprocal()
        diagonal = factor
        if factor.dim() == 3:
            eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            self.inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
            diagonal = factor.diagonal(dim1=-2, dim2=-1)
        self.constant = diagonal.log().sum(-1) + mean.shape[-1] / 2 * math.log(2 * math.pi)

    @classmethod
    def fitted(cls, z: Tensor, targets: int, width: float = 1.0, full: bool = False) -> "Start":
        r"""With the means of positions and ``width`` times their deviations, group by group.

        Args:
            z: positions, shape ``(chains, dim)``.
            targets: number of groups.
            width: how much wider.
            full: whether correlations are matched, or variances only.
        """
        mean, factor = deviations(z, targets, full)
        return cls(mean, width * factor)

    def sample(self, num: int) -> Tensor:
        """Exact draws, shape ``(num * targets, dim)``."""
        mean = self.mean.repeat(num, 1)
        return mean + precondition(self.factor, torch.randn_like(mean))

    def __call__(self, z: Tensor) -> Tensor:
        """The potential, shape ``(chains,)``."""
        #  |L^-1 (z - m)|^2 / 2 + log det L + (d / 2) log 2 pi
        square = precondition(self.inverse, self._centered(z)).square().sum(-1) / 2
        return square + self.constant.repeat(len(z) // len(self.constant))

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        whitened = precondition(self.inverse, self._centered(z))
        constant = self.constant.repeat(len(z) // len(self.constant))
        value = whitened.square().sum(-1) / 2 + constant
        return value, precondition_transposed(self.inverse, whitened)

    def _centered(self, z: Tensor) -> Tensor:
        targets = z.reshape((-1,) + self.mean.shape)
        return (targets - self.mean).reshape(z.shape)


def deviations(z: Tensor, targets: int, full: bool) -> tuple[Tensor, Tensor]:
    r"""The means of positions, and a factor :math:`L` of their covariances, group by group.

    Args:
        z: positions, shape ``(chains, dim)``.
        targets: number of groups.
        full: whether :math:`L` is triangular, or the diagonal of standard deviations.

    Returns:
        Shapes ``(targets, dim)``, and ``(targets, dim)`` or ``(targets, dim, dim)``.

    Example:
        >>> deviations(torch.tensor([[1.0], [3.0]]), targets=1, full=False)
        (tensor([[2.]]), tensor([[1.4142]]))
    """
    stats = PooledCovariance(targets, dense=full)
    stats.update(z)
    assert stats.mean is not None
    covariance = stats.covariance()
    variance = covariance.diagonal(dim1=-2, dim2=-1) if full else covariance
    # a coordinate that never moved has no width: 1 is as good as any
    variance = torch.where(variance > 0, variance, torch.ones_like(variance))
    if not full:
        return stats.mean, variance.sqrt()
    # shrunk a little towards the diagonal, so that it is positive definite
    n = stats.count
    covariance = (n * covariance + torch.diag_embed(variance)) / (n + 1)
    factor, info = torch.linalg.cholesky_ex(covariance)
    diagonal = torch.diag_embed(variance.sqrt())
    return stats.mean, torch.where((info == 0)[:, None, None], factor, diagonal)


class ProductStart(Start):
    """Independent discrete variables, each with a distribution over its support values.

    Args:
        support_values: the support values, shape ``(K, b)``.
        log_probs: of each group, variable and support value, shape ``(targets, n, K)``.

    Example:
        >>> bits = torch.tensor([[0.0], [1.0]])
        >>> start = ProductStart(bits, torch.zeros(1, 3, 2))
        >>> start(start.sample(2)) / torch.tensor(2.0).log()
        tensor([3., 3.])
    """

    def __init__(self, support_values: Tensor, log_probs: Tensor):
        self.support_values, self.log_probs = support_values, log_probs.log_softmax(-1)

    @classmethod
    def fitted(cls, support_values: Tensor, z: Tensor, targets: int) -> "ProductStart":
        """With the frequencies of positions, half a count added to each."""
        counts = cls._indicator(support_values, z, targets).sum(0)
        return cls(support_values, (counts + 0.5).log())

    @staticmethod
    def _indicator(support_values: Tensor, z: Tensor, targets: int) -> Tensor:
        """Which value each variable has, ``(chains per target, targets, n, K)``, as 0 and 1."""
        variables = z.reshape(
            -1, targets, z.shape[-1] // support_values.shape[1], 1, support_values.shape[1]
        )
        return (variables == support_values).all(-1).to(z.dtype)

    def sample(self, num: int) -> Tensor:
        """Exact draws, shape ``(num * targets, dim)``."""
        which = Categorical(logits=self.log_probs).sample(torch.Size((num,)))
        return self.support_values[which].reshape(num * len(self.log_probs), -1)

    def __call__(self, z: Tensor) -> Tensor:
        """The potential, shape ``(chains,)``."""
        indicator = self._indicator(self.support_values, z, len(self.log_probs))
        return -(indicator * self.log_probs).sum((-1, -2)).reshape(-1)


def uniform(potential: EnergyPotential) -> ProductStart:
    """The uniform density on the finite support of a discrete potential."""
    site = potential.sites[0]
    assert site.support_values is not None
    support_values = site.support_values.to(site.device, potential.dtype)
    variables = potential.dim // support_values.shape[1]
    return ProductStart(
        support_values, support_values.new_zeros(potential.targets, variables, len(support_values))
    )


class DistributionStart(Start):
    """A distribution over points of the support, seen on positions.

    Args:
        q: a normalized distribution with exact draws, on the support of the energy.
        potential: of the energy.

    Raises:
        ValueError: for draws outside the energy's support.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x, support=dist.constraints.positive)
        >>> start = DistributionStart(dist.Exponential(1.0), EnergyPotential(p))
        >>> start(torch.zeros(1, 1))  # of x = e^z at z = 0: e^{-x + z}
        tensor([1.])
    """

    def __init__(self, q: Any, potential: EnergyPotential):
        p = potential.energy
        self.q, self.potential = q, potential
        flat = UnnormalizedEnergy(_Zero(p.event_dim), support=p.support, base=q)
        like = torch.empty(0, dtype=potential.sites[0].dtype, device=potential.sites[0].device)
        self.density = EnergyPotential(flat, like=like)

    def sample(self, num: int) -> Tensor:
        """Exact draws, shape ``(num * targets, dim)``."""
        x = exact_draws(self.q, num)
        support = self.potential.energy.support
        if not support.check(x).all():
            raise ValueError(
                f"the proposal {type(self.q).__name__} has draws outside the support {support}, and"
                " annealing cannot start there: use a distribution on that support, or"
                ' method="importance"'
            )
        return self.potential.inner_position(x, f"the draws of {type(self.q).__name__}")

    def __call__(self, z: Tensor) -> Tensor:
        """The potential, shape ``(chains,)``."""
        return self.density(z)


class _Zero:
    """The energy that is 0 everywhere."""

    def __init__(self, event_dim: int):
        self.event_dim = event_dim

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: x.dim() - self.event_dim])


def checked_proposal(q: Any, p: UnnormalizedEnergy) -> Any:
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
    if (improper := improper_part(q)) is not None:
        raise ValueError(
            f"{name} holds a {improper}, whose log_prob is no density that integrates to 1: propose"
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
            f"{name} does not tell its support: wrap a flow as FlowDistribution(flow)"
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


def has_exact_draws(q: Any) -> bool:
    """Whether :func:`exact_draws` are draws of the distribution, not the ends of short chains."""
    if isinstance(q, ExponentialFamily):
        return q.has_rsample or q.has_enumerate_support
    return hasattr(q, "exact_sample") or find_energy(q) is None


def exact_draws(q: Any, num: int) -> Tensor:
    """Exact draws, shape ``(num, *batch, *event)``."""
    return getattr(q, "exact_sample", q.sample)(torch.Size((num,)))


def _of_guide(guide: Any) -> Any:
    """The distribution of a guide's one sample site."""
    if not callable(guide):
        raise ValueError(
            f"proposal must be a distribution, or a guide with one sample site, got {shown(guide)}"
        )
    trace = prune_subsample_sites(poutine.trace(guide).get_trace())
    latents = [trace.nodes[name] for name in trace.stochastic_nodes]
    if len(latents) != 1:
        names = [site["name"] for site in latents]
        raise ValueError(
            f"a guide that proposes must have one sample site, and this one has {names}: give its"
            " distribution as proposal="
        )
    return latents[0]["fn"]


__all__ = [
    "DistributionStart",
    "GaussianStart",
    "ProductStart",
    "Start",
    "checked_proposal",
    "deviations",
    "exact_draws",
    "has_exact_draws",
    "uniform",
]
