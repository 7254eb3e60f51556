r"""Where annealing and bridges start: normalized densities on flat positions, with exact draws.

A start lives where kernels move, on the unconstrained positions :math:`z` of a potential. A
distribution over points of the support is one there,

.. math:: q(z) = q(x(z))\, \left| \det \frac{d x}{d z} \right|,

and where none is given, a Gaussian that is fitted to some positions, or, for discrete variables, a
product of independent ones.
"""

import math
from abc import ABC, abstractmethod

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.adaptation.metric import PooledCovariance
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.proposals import exact_draws
from pyro_ebm.ops.score import value_and_grad
from pyro_ebm.ops.steps.precondition import precondition, precondition_transposed

WIDTH = 1.5
"""How much wider than the draws it is fitted to a start of annealing is."""


class Start(ABC):
    """A normalized density on positions ``(chains, dim)``; chain c is of target ``c % targets``."""

    @abstractmethod
    def sample(self, num: int) -> Tensor:
        """Exact draws for ``num`` chains of each target, shape ``(num * targets, dim)``."""

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        r"""The potential :math:`-\log q(z)`, shape ``(chains,)``, differentiable."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        return value_and_grad(self, z)


class GaussianStart(Start):
    r"""The Gaussian :math:`N(m, L L^\top)` of each target.

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
        r"""With the means of positions and ``width`` times their deviations, target by target.

        Args:
            z: positions, shape ``(chains, dim)``.
            targets: number of targets.
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
    r"""The means of positions, and a factor :math:`L` of their covariances, target by target.

    Args:
        z: positions, shape ``(chains, dim)``.
        targets: number of targets.
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
    assert stats.count is not None
    mean, covariance = stats.mean.to(z.dtype), stats.covariance().to(z.dtype)
    variance = covariance.diagonal(dim1=-2, dim2=-1) if full else covariance
    # a coordinate that never moved has no width: 1 is as good as any
    variance = torch.where(variance > 0, variance, torch.ones_like(variance))
    if not full:
        return mean, variance.sqrt()
    # shrunk a little towards the diagonal, so that it is positive definite
    n = stats.count.to(z.dtype)[:, None, None]
    covariance = (n * covariance + torch.diag_embed(variance)) / (n + 1)
    factor, info = torch.linalg.cholesky_ex(covariance)
    diagonal = torch.diag_embed(variance.sqrt())
    return mean, torch.where((info == 0)[:, None, None], factor, diagonal)


class ProductStart(Start):
    """Independent discrete variables, each with a distribution over its support values.

    Args:
        support_values: the support values, shape ``(K, b)``.
        log_probs: of each target, variable and support value, shape ``(targets, n, K)``.

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
    if site.is_unbounded:
        raise ValueError(
            f"annealing on {potential.energy.support} has no uniform density to start at: give the"
            " energy a base=, or proposal=, a normalized distribution with exact draws on this"
            " support, such as dist.Poisson(4.0)"
        )
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

    def __init__(self, q: TorchDistribution, potential: EnergyPotential):
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
