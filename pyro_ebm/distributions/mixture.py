r"""Mixtures of densities: soft minima of energies.

.. math::

    p(x) = \sum_k w_k\, p_k(x) = e^{-E(x)}, \qquad
    E(x) = -\log \sum_k e^{\log w_k + \log h_k(x) - E_k(x) - \log Z_k} .

A point is likely if *one* component finds it likely, where a product wants all of them to. A
weight is the share of its component only where the component is normalized: a mixture needs every
:math:`Z_k`, or it is one of unnormalized densities.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from pyro.distributions import constraints
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Categorical, Distribution

from pyro_ebm.distributions.core.introspection import first_tensor, held
from pyro_ebm.distributions.core.linear import name_of
from pyro_ebm.distributions.core.supports import same_support, support_of
from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.parts import as_part, check_shapes, is_normalized
from pyro_ebm.ops.arguments import shown


def mixture(
    weights: Tensor | Sequence[float],
    components: Sequence[Distribution],
    unnormalized_weights: bool = False,
    constant_normalizer: bool = False,
) -> "Mixture":
    r"""A mixture of densities: what one of the components allows.

    .. math:: p(x) = \sum_k w_k\, p_k(x)

    That :math:`w_k` is the share of component :math:`k` takes normalized components, and then
    :math:`\log Z = 0`. With ``unnormalized_weights`` the weights multiply
    :math:`h_k e^{-E_k}` instead,

    .. math:: p(x) \propto \sum_k w_k\, h_k(x)\, e^{-E_k(x)},

    the share of a component is :math:`w_k Z_k / \sum_j w_j Z_j`, and
    :math:`\log Z = \log \sum_k w_k Z_k` is known only if every :math:`Z_k` is.

    Where the shares are known, ``sample`` picks a component and draws from it: each mode gets its
    share, and draws are exact if those of the components are. Elsewhere it runs chains, which
    start in the components in proportion to the weights and do not cross between far modes.

    Args:
        weights: :math:`w_k`, positive, shape ``(*batch, K)``. As the ``probs`` of a
            ``Categorical`` they are divided by their sum, but for ``unnormalized_weights``.
        components: K distributions of one event shape and support, with batch shapes that
            broadcast with that of the weights: energies or ordinary distributions.
        unnormalized_weights: whether weights multiply unnormalized densities.
        constant_normalizer: True says that :math:`Z` of the mixture does not depend on any latent,
            the weights included.

    Raises:
        ValueError: if the :math:`\log Z` of a component is not known (and not waived by
            ``unnormalized_weights``), weights are not K positive numbers, or components have other
            event shapes or supports, batch shapes that do not broadcast, or no density.

    Reference:
        Du and Mordatch (2019), Implicit generation and modeling with energy-based models.

    Example:
        >>> left, right = dist.Normal(-5.0, 1.0), dist.Normal(5.0, 1.0)
        >>> p = mixture([0.2, 0.8], [left, right])
        >>> p.log_prob(torch.tensor(5.0)).exp()  # .8 / sqrt(2 pi)
        tensor(0.3192)
        >>> (p.sample((1000,)) > 0).float().mean()
        tensor(0.8010)
    """
    if isinstance(components, Tensor) or not isinstance(components, Iterable):
        raise ValueError(f"components must be a list of distributions, got {shown(components)}")
    checked = [as_part(f"component {k}", part) for k, part in enumerate(components)]
    if not checked:
        raise ValueError("mixture needs at least one component")
    weights = _checked_weights(weights, checked)
    check_shapes("the mixture", checked, weights.shape[:-1])
    support = support_of(checked[0])
    for k, component in enumerate(checked):
        if not same_support(support, support_of(component)):
            raise ValueError(
                f"component {k} of the mixture has the support {support_of(component)}, component 0"
                f" {support}: they must be the same"
            )
        if not (is_normalized(component) or unnormalized_weights):
            assert isinstance(component, UnnormalizedEnergy)
            raise ValueError(
                f"the log Z of component {k} of the mixture, {component!r}, is"
                f" {component.normalizer_state}, and a weight is not a share without it: give"
                " component.normalized(log_z), or say unnormalized_weights=True, where weights"
                " multiply e^{-E} and the share of a component is w_k Z_k / sum_j w_j Z_j"
            )
    return Mixture(weights, checked, support, unnormalized_weights, constant_normalizer)


class Mixture(UnnormalizedEnergy):
    """What :func:`mixture` returns: an energy with components that can be drawn from.

    Args:
        weights: positive, shape ``(*batch, K)``.
        components: K distributions that fit.
        support: their support.
        unnormalized_weights: as in :func:`mixture`.
        constant_normalizer: as in :func:`mixture`.
    """

    def __init__(
        self,
        weights: Tensor,
        components: Sequence[Distribution],
        support: constraints.Constraint,
        unnormalized_weights: bool,
        constant_normalizer: bool,
    ):
        self.components = tuple(components)
        logits = weights.log()
        if not unnormalized_weights:
            logits = logits - logits.logsumexp(-1, keepdim=True)
        energy = MixtureEnergy(logits, components, unnormalized_weights)
        log_z = None
        self._has_shares = all(map(is_normalized, components))
        if self._has_shares:
            if unnormalized_weights:  # log w_k Z_k
                logits = logits + _log_normalizers(components, like=logits)
            #   Z = sum_k w_k Z_k, and of normalized weights and components Z = 1
            log_z = logits.logsumexp(-1)
            log_z = log_z if unnormalized_weights else torch.zeros_like(log_z)
        self._logits = logits
        kernels = [getattr(p, "kernel", None) for p in components]
        super().__init__(
            energy,
            components[0].event_shape,
            support,
            torch.broadcast_shapes(logits.shape[:-1], *(p.batch_shape for p in components)),
            log_normalizer=log_z,
            kernel=next((kernel for kernel in kernels if kernel is not None), None),
            num_steps=max(getattr(p, "num_steps", 100) for p in components),
            constant_normalizer=constant_normalizer,
            learned_normalizer=False,
        )
        if self._has_shares:
            self.normalized_parts = self.components

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws of components picked by their shares; the ends of chains if these are unknown.

        ``sample_with_diagnostics`` runs chains in any case.
        """
        if not self._has_shares:
            return super().sample(sample_shape)
        return self._picked([p.sample for p in self._expanded()], sample_shape)

    def starting_points(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Where chains start: where those of the components do, in proportion to the weights."""
        starts = [getattr(p, "starting_points", p.sample) for p in self._expanded()]
        return self._picked(starts, sample_shape)

    def _expanded(self) -> list[Distribution]:
        return [p.expand(self.batch_shape) for p in self.components]

    @torch.no_grad()
    def _picked(
        self, draws: Sequence[Callable[..., Tensor]], sample_shape: tuple[int, ...]
    ) -> Tensor:
        """Draws of all components, and of these one for each point."""
        sample_shape = torch.Size(sample_shape)
        logits = self._logits.expand(self.batch_shape + self._logits.shape[-1:])
        picks = Categorical(logits=logits).sample(sample_shape)
        x = torch.stack([draw(sample_shape) for draw in draws])
        picks = picks.reshape((1,) + picks.shape + (1,) * self.event_dim).expand_as(x[:1])
        return x.gather(0, picks)[0]


class MixtureEnergy:
    r"""The energy :math:`E(x) = -\log \sum_k e^{\ell_k + f_k(x)}` of log densities.

    Args:
        logits: :math:`\ell_k`, shape ``(*batch, K)``.
        components: K distributions.
        unnormalized: whether :math:`f_k` is ``unnormalized_log_prob`` or ``log_prob``.
    """

    def __init__(self, logits: Tensor, components: Sequence[Distribution], unnormalized: bool):
        self.logits = logits
        parts = [unvalidated(p) for p in components]
        self.log_densities = tuple(
            p.unnormalized_log_prob
            if unnormalized and isinstance(p, UnnormalizedEnergy)
            else p.log_prob
            for p in parts
        )
        self.held = held([*parts, logits])
        self.__name__ = f"mixture of {', '.join(name_of(p) for p in parts)}"

    def __call__(self, x: Tensor) -> Tensor:
        """Energies ``(*sample, *batch)`` of points ``(*sample, *batch, *event)``."""
        values = torch.stack([f(x) for f in self.log_densities], -1)
        return -(self.logits + values).logsumexp(-1)


def _checked_weights(weights: object, components: Sequence[Distribution]) -> Tensor:
    """The weights as a floating tensor ``(*batch, K)``."""
    if not isinstance(weights, Tensor):
        like = first_tensor(held(components))
        like = torch.empty(()) if like is None else like.detach()
        try:
            weights = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"weights must be numbers, got {shown(weights)}") from error
    elif not weights.is_floating_point():
        weights = weights.to(torch.get_default_dtype())
    if weights.dim() == 0 or weights.shape[-1] != len(components):
        raise ValueError(
            f"weights must be of shape (*batch, {len(components)}), one for each component, got"
            f" {tuple(weights.shape)}"
        )
    if is_validation_enabled() and not ((weights > 0) & weights.isfinite()).all():
        raise ValueError(
            f"weights must be finite and greater than 0, got {weights}: leave a component without"
            " weight out"
        )
    return weights


def _log_normalizers(components: Sequence[Distribution], like: Tensor) -> Tensor:
    """Log Z of each component, 0 of ordinary ones, shape ``(*batch, K)``."""
    log_z = [getattr(p, "log_normalizer", None) for p in components]
    values = [like.new_zeros(()) if value is None else value for value in log_z]
    return torch.stack(torch.broadcast_tensors(*values), -1)
