r"""Restricted Boltzmann machines: two layers of units, each independent given the other.

Visible units :math:`x \in \{0, 1\}^n` and hidden units :math:`z \in \{0, 1\}^m` have the density

.. math:: p(x, z) \propto e^{-E(x, z)}, \qquad E(x, z) = -x^\top W z - b^\top x - c^\top z.

:class:`JointRBM` is this density, and :class:`RBM` its marginal over :math:`x`, whose energy is the
*free energy*

.. math:: F(x) = -\log \sum_z e^{-E(x, z)} = -b^\top x
          - \sum_j \operatorname{softplus}\big(c_j + (W^\top x)_j\big).

Both have the same :math:`Z = \sum_{x, z} e^{-E(x, z)}`: a sum over the states of the smaller layer
alone, with the other summed in closed form. Nothing connects the units of one layer, so that

.. math:: p(z_j = 1 \mid x) = \sigma\big(c_j + (W^\top x)_j\big), \qquad
          p(x_i = 1 \mid z) = \sigma\big(b_i + (W z)_i\big),

and the sweep :math:`x \to z \to x` of these two draws is a Gibbs sampler in two blocks.

Reference:
    Smolensky (1986), Information processing in dynamical systems: foundations of harmony theory.
    Hinton (2012), A practical guide to training restricted Boltzmann machines.
"""

from collections.abc import Callable
from typing import TypeVar, Unpack

import torch
from pyro.distributions import (
    Bernoulli,  # pyright: ignore[reportAttributeAccessIssue]
    Independent,
    constraints,
)
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ebm.distributions.boltzmann.bipartite import (
    MarginalLayers,
    TwoLayers,
    affine,
    check_weights,
    dot,
    softplus,
)
from pyro_ebm.distributions.enumerated import EnergySettings

Layers = TypeVar("Layers", bound="BinaryLayers")


class BinaryLayers(TwoLayers):
    """Two layers of bits: what :class:`RBM` and :class:`JointRBM` share."""

    def visible_given(self, z: Tensor) -> Independent:
        r"""The visible units given the hidden ones, :math:`p(x \mid z)`: independent bits."""
        logits = self.visible_logits(self.hidden_units(z))
        return Bernoulli(logits=logits, validate_args=self._validate_args).to_event(1)

    def hidden_logits(self, x: Tensor) -> Tensor:
        """The log-odds of the hidden units, ``(*sample, *batch, n) -> (*sample, *batch, m)``."""
        return affine(x, self.weights, self.hidden_bias)

    def visible_logits(self, z: Tensor) -> Tensor:
        """The log-odds of the visible units, ``(*sample, *batch, m) -> (*sample, *batch, n)``."""
        return affine(z, self.weights.mT, self.visible_bias)

    def log_hidden(self, z: Tensor) -> Tensor:
        r""":math:`\log p(z) + \log Z`, ``(*sample, *batch, m) -> (*sample, *batch)``."""
        return dot(z, self.hidden_bias) + softplus(self.visible_logits(z)).sum(-1)

    def _enumerated(self) -> "BinaryLayers":
        """The smaller layer is enumerated: where that is the visible one, exchange the two."""
        if self.num_hidden <= self.num_visible:
            return self
        mirror = RBM(self.weights.mT, self.hidden_bias, self.visible_bias, validate_args=False)
        return mirror if mirror.batch_shape == self.batch_shape else mirror.expand(self.batch_shape)

    def _sibling(self, cls: Callable[..., Layers]) -> Layers:
        """Another density of the same parameters, with the same log Z where that is known."""
        new = cls(
            self.weights,
            self.visible_bias,
            self.hidden_bias,
            kernel=self.kernel,
            num_steps=self.num_steps,
            validate_args=self._validate_args,
        )
        new = new if new.batch_shape == self.batch_shape else new.expand(self.batch_shape)
        log_z = self.log_normalizer
        return new.normalized(log_z) if self.is_normalized and log_z is not None else new

    def _sweep(
        self, x: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # z ~ p(z | x), then x ~ p(x | z), at weights and biases times beta
        u_hidden, u_visible = noise
        hidden = self.hidden_logits(x)
        hidden = hidden if beta is None else beta[..., None] * hidden
        z = (u_hidden < hidden.sigmoid()).to(x.dtype)
        visible = self.visible_logits(z)
        visible = visible if beta is None else beta[..., None] * visible
        return (u_visible < visible.sigmoid()).to(x.dtype), z

    def _validate_sample(self, value: Tensor) -> None:
        if isinstance(value, Tensor) and not bool(((value == 0) | (value == 1)).all()):
            raise ValueError(
                f"the units of {self!r} are 0 or 1, and the value holds others, between"
                f" {value.min().item():.4g} and {value.max().item():.4g}: binarize the data, as in"
                " torch.bernoulli(x) or (x > 0.5).float(), or use GaussianRBM for real values"
            )
        super()._validate_sample(value)


class RBM(BinaryLayers, MarginalLayers):
    r"""A restricted Boltzmann machine over its visible bits, the hidden ones summed out.

    .. math:: p(x) \propto e^{b^\top x} \prod_j \big(1 + e^{c_j + (W^\top x)_j}\big)

    Parameters with a batch make a batch of machines, as for a conditional machine whose biases are
    computed from a context.

    Args:
        weights: :math:`W`, shape ``(*batch, n, m)``.
        visible_bias: :math:`b`, shape ``(*batch, n)``.
        hidden_bias: :math:`c`, shape ``(*batch, m)``.
        **kwargs: ``log_normalizer``, ``kernel``, ``num_steps``, ``learned_normalizer`` and
            ``validate_args`` of :class:`~pyro_ebm.UnnormalizedEnergy`.

    Raises:
        ValueError: for parameters of the wrong type or shape, or (in ``log_prob``) values that are
            not 0 or 1.

    Reference:
        Freund and Haussler (1992), Unsupervised learning of distributions on binary vectors using
        two layer networks.

    Example:
        >>> p = RBM(torch.randn(6, 3), torch.zeros(6), torch.zeros(3))
        >>> p
        RBM(visible=6, hidden=3, log_normalizer=unknown)
        >>> p = p.normalized(p.exact_log_normalizer())
        >>> x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)  # all 64 states
        >>> torch.allclose(p.log_prob(x).exp().sum(), torch.tensor(1.0))
        True
        >>> p.hidden_given(x).mean.shape
        torch.Size([64, 3])
    """

    _way_to_temper = ": temper joint()"

    def __init__(
        self,
        weights: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        **kwargs: Unpack[EnergySettings],
    ):
        n, _ = check_weights(weights)
        super().__init__(weights, visible_bias, hidden_bias, (n,), constraints.boolean, **kwargs)

    def _energy(self, x: Tensor) -> Tensor:
        x = x.to(self.weights.dtype)
        return -dot(x, self.visible_bias) - softplus(self.hidden_logits(x)).sum(-1)

    def closed_conditionals(self, x: Tensor, blocks: Tensor) -> Tensor | None:
        r"""The log densities of single visible units given the others, hidden units summed out.

        .. math:: \log \frac{p(x_i = 1 \mid x_{-i})}{p(x_i = 0 \mid x_{-i})} = b_i + \sum_j
                  \operatorname{softplus}(a_j + (1 - x_i) W_{ij})
                  - \operatorname{softplus}(a_j - x_i W_{ij}), \qquad a = c + W^\top x

        Args:
            x: points, shape ``(*sample, *batch, n)``.
            blocks: indices of units, shape ``(G, 1)``.

        Returns:
            Shape ``(*sample, *batch, G)``; None of larger blocks.
        """
        if blocks.shape[1] > 1:
            return None
        x, units = self.broadcast(x).to(self.weights.dtype), blocks[:, 0]
        a = self.hidden_logits(x)[..., None, :]
        weights, x = self.weights[..., units, :], x[..., units]  # (*batch, G, m), (..., G)
        one = softplus(a + (1 - x)[..., None] * weights)
        zero = softplus(a - x[..., None] * weights)
        return logsigmoid((2 * x - 1) * (self.visible_bias[..., units] + (one - zero).sum(-1)))

    def joint(self) -> "JointRBM":
        r"""The density of visible and hidden units together: a known :math:`\log Z` is its too."""
        return self._sibling(JointRBM)

    def gibbs_noise(self, x: Tensor) -> tuple[Tensor, ...]:
        """The uniforms of a sweep, for the hidden and the visible units."""
        return self._uniform(x.shape[:-1] + (self.num_hidden,)), self._uniform(x.shape)

    def _visible_sweep(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        return self._sweep(x, noise)[0]


class JointRBM(BinaryLayers):
    r"""A restricted Boltzmann machine over all its bits, visible and hidden.

    .. math:: p(x, z) \propto e^{x^\top W z + b^\top x + c^\top z}

    A point is the vector :math:`(x, z)` of :math:`n + m` bits.

    Args:
        weights: :math:`W`, shape ``(*batch, n, m)``.
        visible_bias: :math:`b`, shape ``(*batch, n)``.
        hidden_bias: :math:`c`, shape ``(*batch, m)``.
        **kwargs: as in :class:`RBM`.

    Raises:
        ValueError: as :class:`RBM` does.

    Example:
        >>> p = RBM(torch.randn(6, 3), torch.zeros(6), torch.zeros(3)).joint()
        >>> p
        JointRBM(visible=6, hidden=3, log_normalizer=unknown)
        >>> xz = p.exact_sample((10,))
        >>> x, z = p.split(xz)
        >>> x.shape, z.shape
        (torch.Size([10, 6]), torch.Size([10, 3]))
        >>> torch.allclose(p.tempered(0.5).energy(xz), p.energy(xz) / 2)
        True
    """

    supports_tempering = True

    def __init__(
        self,
        weights: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        **kwargs: Unpack[EnergySettings],
    ):
        units = (sum(check_weights(weights)),)
        super().__init__(weights, visible_bias, hidden_bias, units, constraints.boolean, **kwargs)

    def split(self, xz: Tensor) -> tuple[Tensor, Tensor]:
        """The visible and the hidden units of points.

        Args:
            xz: points, shape ``(*sample, *batch, n + m)``.

        Returns:
            Shapes ``(*sample, *batch, n)`` and ``(*sample, *batch, m)``.
        """
        x, z = xz.split([self.num_visible, self.num_hidden], -1)
        return x, z

    def _energy(self, x: Tensor) -> Tensor:
        x, z = self.split(x.to(self.weights.dtype))
        return -dot(x, self.visible_bias) - (self.hidden_logits(x) * z).sum(-1)

    def closed_conditionals(self, x: Tensor, blocks: Tensor) -> Tensor | None:
        """The log densities of single units given the others, those of the other layer.

        Args:
            x: points, shape ``(*sample, *batch, n + m)``.
            blocks: indices of units, shape ``(G, 1)``.

        Returns:
            Shape ``(*sample, *batch, G)``; None of larger blocks.
        """
        if blocks.shape[1] > 1:
            return None
        xz = self.broadcast(x).to(self.weights.dtype)
        x, z = self.split(xz)
        logits = torch.cat([self.visible_logits(z), self.hidden_logits(x)], -1)
        return logsigmoid((2 * xz - 1) * logits)[..., blocks[:, 0]]

    def marginal(self) -> RBM:
        r"""The density of the visible units alone: a known :math:`\log Z` is its too."""
        return self._sibling(RBM)

    def tempered(self, beta: Tensor | float) -> "JointRBM":
        r"""The density :math:`\propto p(x, z)^\beta`: the same machine with parameters scaled.

        :math:`\log Z` is known at the numbers 0 and, if it is known here, 1.

        Args:
            beta: inverse temperature, or several that broadcast with the batch.

        Raises:
            ValueError: if it is not finite, or does not broadcast.
        """
        return self._scaled(beta, {"weights": 2, "visible_bias": 1, "hidden_bias": 1})

    def _point(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([x, z], -1)

    def gibbs_noise(self, x: Tensor) -> tuple[Tensor, ...]:
        """The uniforms of a sweep, for the hidden and the visible units."""
        u_visible, u_hidden = self.split(self._uniform(x.shape))
        return u_hidden, u_visible

    def gibbs_sweep(
        self, x: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        r"""New points: :math:`z \sim p(z \mid x)`, then :math:`x \sim p(x \mid z)`.

        The hidden units of ``x`` play no part.
        """
        visible, _ = self.split(x.to(self.weights.dtype))
        return torch.cat(self._sweep(visible, noise, beta), -1).to(x.dtype)
