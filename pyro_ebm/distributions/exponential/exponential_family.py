r"""Exponential families: energies that are linear in their parameters, with a known constant.

.. math:: p(x) = h(x)\, e^{\theta \cdot T(x) - \log Z(\theta)}, \qquad
          \log Z(\theta) = \log \int h(x)\, e^{\theta \cdot T(x)}\, dx

The energy is :math:`E(x) = -\theta \cdot T(x) - \log h(x)`. The data enter through the *statistic*
:math:`T` alone, and :math:`\log Z` is a convex function of the *natural parameters* :math:`\theta`
whose gradient is

.. math:: \nabla \log Z(\theta) = \mathbb E_\theta[T(x)] .

Because :math:`\log Z` is known whatever :math:`\theta` is, latents and parameters may move it: such
a site may be a likelihood, be trained by a plain ELBO, or be compared with another model.

Reference:
    Wainwright and Jordan (2008), Graphical models, exponential families, and variational inference.
"""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.arguments import checked_coefficient
from pyro_ebm.distributions.core.sampler import ChainKernel
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.exponential.families import Family, OwnFamily, family_of
from pyro_ebm.ops.score import value_and_grad


class ExponentialFamily(UnnormalizedEnergy):
    r"""A member of an exponential family, :math:`p(x) = h(x)\, e^{\theta \cdot T(x)} / Z(\theta)`.

    :math:`\log Z` comes from a formula, or, when none is given, from quadrature (one or two
    continuous dimensions) or enumeration (few discrete states). Each of them is differentiable in
    :math:`\theta`, and the density is normalized whatever :math:`\theta` is: a parameter, a latent,
    the output of a network.

    :meth:`from_distribution` and the class methods by name make members of known families. Those
    draw exactly, and their ``log_prob`` is that of Pyro's distribution at :math:`\theta`. Of a
    family of your own ``sample`` runs chains, as :class:`~pyro_ebm.UnnormalizedEnergy` does.

    The terms of :math:`\theta \cdot T(x)` and :math:`\log Z` may be large and cancel, as for a
    Gaussian that is narrow and far from 0: use double precision for its energy then.

    Args:
        statistic: :math:`T`, a callable ``(*sample, *batch, *event) -> (*sample, *batch, k)``, or a
            :class:`~pyro_ebm.distributions.exponential.families.Family`, which says all but
            :math:`\theta`.
        natural_parameters: :math:`\theta`, shape ``(*batch, k)``.
        log_base_measure: :math:`\log h`, a callable ``(*sample, *batch, *event) ->
            (*sample, *batch)`` that need not be normalized; by default :math:`h = 1`.
        log_normalizer: :math:`\log Z`, a differentiable function ``(*batch, k) -> (*batch)``, of
            this very :math:`T` and :math:`h`.
        support: where the density lives; the reals by default.
        event_shape: shape of one point.
        kernel: the kernel of ``sample``, see :class:`~pyro_ebm.UnnormalizedEnergy`.
        num_steps: transitions that ``sample`` makes.
        validate_args: whether arguments and points are checked; by default as Pyro is set. Without
            the checks, as in a sampler, a member that does not exist has a NaN density.

    Raises:
        ValueError: for a :math:`\theta` outside the natural parameter space, for which
            :math:`Z` is infinite, or shapes that do not fit; without ``log_normalizer``, for more
            than two continuous dimensions, or where quadrature finds no accurate value.

    Reference:
        Barndorff-Nielsen (1978), Information and exponential families in statistical theory.

    Example:
        >>> def quartic(x):  # T(x) = (x^2, x^4)
        ...     return torch.stack([x**2, x**4], -1)
        >>> p = ExponentialFamily(quartic, torch.tensor([1.0, -1.0]))
        >>> p
        ExponentialFamily(family=quartic, event_shape=(), log_normalizer=known)
        >>> p.log_normalizer  # by quadrature
        tensor(1.0157)
        >>> p.mean_parameters()  # E[x^2], E[x^4]
        tensor([0.5209, 0.5104])
        >>> gamma = ExponentialFamily.gamma(3.0, 2.0)
        >>> gamma.natural_parameters, gamma.log_prob(torch.tensor(1.0))
        (tensor([ 2., -2.]), tensor(-0.6137))
    """

    def __init__(
        self,
        statistic: Callable[[Tensor], Tensor] | Family,
        natural_parameters: Tensor,
        log_base_measure: Callable[[Tensor], Tensor] | None = None,
        log_normalizer: Callable[[Tensor], Tensor] | None = None,
        support: constraints.Constraint = constraints.real,
        event_shape: torch.Size | tuple[int, ...] = (),
        kernel: ChainKernel | None = None,
        num_steps: int = 100,
        validate_args: bool | None = None,
    ):
        theta = natural_parameters
        if not isinstance(theta, Tensor) or not theta.is_floating_point() or theta.dim() < 1:
            raise ValueError(
                "natural_parameters must be a floating tensor of shape (*batch, k), got"
                f" {tuple(theta.shape) if isinstance(theta, Tensor) else theta!r}"
            )
        if isinstance(statistic, Family):
            family: Family = statistic
        else:
            family = OwnFamily(statistic, log_base_measure, log_normalizer, support, event_shape)
        self.family = family
        validate = Distribution._validate_args if validate_args is None else validate_args
        batch_shape = torch.broadcast_shapes(theta.shape[:-1], family.batch_shape)
        if theta.shape[:-1] != batch_shape:
            theta = theta.expand(batch_shape + theta.shape[-1:])
        self.natural_parameters = theta
        self._member = _member(family, theta, validate)
        log_z = family.log_normalizer(theta)
        if validate and not log_z.isfinite().all():
            raise ValueError(
                f"natural_parameters lie outside the natural parameter space of {family}:"
                f" {family.complaint(theta)}"
            )
        self._callables = tuple(vars(family).values())  # for those who look for modules in here
        super().__init__(
            None,
            family.event_shape,
            family.support,
            batch_shape,
            log_normalizer=log_z,
            kernel=kernel,
            num_steps=num_steps,
            learned_normalizer=False,
            validate_args=validate_args,
        )
        self.normalized_parts = ()  # log Z is a function of the natural parameters

    # -- members of known families -----------------------------------------------------------------

    @classmethod
    def from_distribution(cls, d: Distribution) -> "ExponentialFamily":
        r"""The distribution as a member of its exponential family.

        Known are all of ``torch.distributions`` that are of one: those that torch calls so, and
        (with what is in brackets held fixed) LogNormal, HalfNormal, MultivariateNormal, Laplace
        (location), VonMises, InverseGamma, Weibull (concentration), Pareto (scale), Geometric,
        Binomial, NegativeBinomial and Multinomial (count), Categorical, OneHotCategorical. They may
        be expanded and declared ``to_event``.

        A Categorical has codes 0 to K - 1, as in Pyro, and T is their indicator: it is for
        enumeration and observation. A OneHotCategorical has unit vectors, on which its energy is
        differentiable.

        Args:
            d: a distribution of Pyro or torch.

        Raises:
            ValueError: if it is not of an exponential family that is known.

        Example:
            >>> p = ExponentialFamily.from_distribution(dist.Poisson(4.0))
            >>> p.log_prob(torch.tensor(3.0)), dist.Poisson(4.0).log_prob(torch.tensor(3.0))
            (tensor(-1.6329), tensor(-1.6329))
        """
        return d if isinstance(d, cls) else cls(*family_of(d))

    @classmethod
    def gaussian(cls, loc: Tensor | float, scale: Tensor | float) -> "ExponentialFamily":
        r"""A Gaussian: :math:`T = (x, x^2)`, :math:`\theta = (\mu, -\frac12) / \sigma^2`.

        Args:
            loc: :math:`\mu`, shape ``batch``.
            scale: :math:`\sigma`, shape ``batch``.
        """
        return cls.from_distribution(dist.Normal(loc, scale))

    @classmethod
    def exponential(cls, rate: Tensor | float) -> "ExponentialFamily":
        r"""An exponential density: :math:`T = x`, :math:`\theta = -\lambda`.

        Args:
            rate: :math:`\lambda`, shape ``batch``.
        """
        return cls.from_distribution(dist.Exponential(rate))

    @classmethod
    def gamma(cls, concentration: Tensor | float, rate: Tensor | float) -> "ExponentialFamily":
        r"""A Gamma density: :math:`T = (\log x, x)`, :math:`\theta = (a - 1, -b)`.

        Args:
            concentration: :math:`a`, shape ``batch``.
            rate: :math:`b`, shape ``batch``.
        """
        return cls.from_distribution(dist.Gamma(concentration, rate))

    @classmethod
    def bernoulli(
        cls, probs: Tensor | float | None = None, logits: Tensor | float | None = None
    ) -> "ExponentialFamily":
        r"""A coin, 0 or 1: :math:`T = x`, :math:`\theta = \log p / (1 - p)`.

        Args:
            probs: :math:`p`, shape ``batch``; or
            logits: :math:`\theta`.
        """
        return cls.from_distribution(dist.Bernoulli(probs, logits))

    @classmethod
    def categorical(
        cls, probs: Tensor | None = None, logits: Tensor | None = None
    ) -> "ExponentialFamily":
        r"""One of K codes, 0 to K - 1: :math:`T_k = [x = k]`, :math:`\theta_k = \log p_k`.

        Args:
            probs: :math:`p`, shape ``(*batch, K)``; or
            logits: :math:`\theta`.
        """
        return cls.from_distribution(dist.Categorical(probs, logits))

    def with_natural_parameters(self, theta: Tensor) -> "ExponentialFamily":
        r"""The member of this family at another :math:`\theta`.

        Args:
            theta: natural parameters, shape ``(*batch, k)``, of any batch.

        Raises:
            ValueError: if it lies outside the natural parameter space, or has another k.
        """
        k = self.natural_parameters.shape[-1]
        if theta.dim() < 1 or theta.shape[-1] != k:
            raise ValueError(
                f"the natural parameters of {self.family} have {k} components, got shape"
                f" {tuple(theta.shape)}"
            )
        return ExponentialFamily(
            self.family,
            theta,
            kernel=self.kernel,
            num_steps=self.num_steps,
            validate_args=self._validate_args,
        )

    # -- the family --------------------------------------------------------------------------------

    @property
    def statistic(self) -> Callable[[Tensor], Tensor]:
        """:math:`T`, ``(*sample, *batch, *event) -> (*sample, *batch, k)``."""
        return self.family.statistic

    @property
    def log_base_measure(self) -> Callable[[Tensor], Tensor] | None:
        r""":math:`\log h`, ``(*sample, *batch, *event) -> (*sample, *batch)``; None if h is 1."""
        return self.family.log_base_measure

    def mean_parameters(self) -> Tensor:
        r"""The expectations of the statistic, :math:`\mathbb E[T(x)] = \nabla \log Z(\theta)`.

        Returns:
            Shape ``(*batch, k)``, differentiable if :math:`\theta` is.

        Example:
            >>> ExponentialFamily.gaussian(3.0, 2.0).mean_parameters()  # E[x], E[x^2]
            tensor([ 3., 13.])
        """
        theta = self.natural_parameters
        graph = theta.requires_grad and torch.is_grad_enabled()
        mean = value_and_grad(self.family.log_normalizer, theta, create_graph=graph)[1]
        return mean.expand(self.batch_shape + mean.shape[-1:])

    def tempered(self, beta: Tensor | float) -> UnnormalizedEnergy:
        r"""This density to the power of :math:`\beta`, normalized.

        Where :math:`h = 1` it is the member of the family at :math:`\beta\, \theta`, with its
        :math:`\log Z`; elsewhere its :math:`\log Z` is unknown, see
        :meth:`~pyro_ebm.UnnormalizedEnergy.tempered`.

        Args:
            beta: a non-negative number or tensor, broadcastable to ``batch_shape``.

        Raises:
            ValueError: if the power has no finite :math:`Z`.

        Example:
            >>> hot = ExponentialFamily.gaussian(0.0, 1.0).tempered(0.25)
            >>> hot.log_prob(torch.tensor(1.0)), dist.Normal(0.0, 2.0).log_prob(torch.tensor(1.0))
            (tensor(-1.7371), tensor(-1.7371))
        """
        if self.log_base_measure is not None:
            return super().tempered(beta)
        beta = checked_coefficient("beta", beta, self.batch_shape, zero=True)
        factor = beta[..., None] if isinstance(beta, Tensor) else beta
        hot = self.with_natural_parameters(factor * self.natural_parameters)
        return hot if hot.batch_shape == self.batch_shape else hot.expand(self.batch_shape)

    # -- the density -------------------------------------------------------------------------------

    def _energy(self, x: Tensor) -> Tensor:
        return -self.family.log_density(self.natural_parameters, x)

    def _log_prob(self, value: Tensor) -> Tensor:
        if self._member is None or self.normalized_parts is None:
            return super()._log_prob(value)
        return self._member.log_prob(self.broadcast(value))

    def log_density_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        r"""The exact :math:`\log p(x) - \log p(y)`, by Pyro's distribution where there is one."""
        if self._member is None:
            return super().log_density_ratio(x, y)
        x, y = self.broadcast(x), self.broadcast(y)
        return self._member.log_prob(x) - self._member.log_prob(y)

    # -- draws -------------------------------------------------------------------------------------

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Exact draws of a known family, else the ends of short chains."""
        if self._member is None:
            return super().sample(sample_shape)
        return self._expanded_member().sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Exact draws that can be differentiated, of families that have them."""
        return self._expanded_member().rsample(torch.Size(sample_shape))

    @property
    def has_rsample(self) -> bool:
        """Whether draws can be differentiated."""
        return self._member is not None and self._member.has_rsample

    def starting_points(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Where chains start: exact draws, if there are any."""
        if self._member is None:
            return super().starting_points(sample_shape)
        return self.sample(sample_shape)

    @property
    def has_enumerate_support(self) -> bool:
        """Whether Pyro can sum the site out."""
        return self._member is not None and self._member.has_enumerate_support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values of a finite support, as Pyro's distributions list them."""
        return self._expanded_member().enumerate_support(expand)

    def _expanded_member(self) -> TorchDistribution:
        if self._member is None:
            raise NotImplementedError(f"{self.family} has no distribution of Pyro to draw from")
        return self._member.expand(self.batch_shape)

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return (
            f"{type(self).__name__}(family={self.family}{batch}, event_shape="
            f"{tuple(self.event_shape)}, log_normalizer={self.normalizer_state})"
        )


def _member(family: Family, theta: Tensor, validate: bool) -> TorchDistribution | None:
    try:
        return family.distribution(theta, validate)
    except (ValueError, torch.linalg.LinAlgError) as error:
        if not validate:
            raise
        raise ValueError(
            f"natural_parameters lie outside the natural parameter space of {family}: {error}"
        ) from error
