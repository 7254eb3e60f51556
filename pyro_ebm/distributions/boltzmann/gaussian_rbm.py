r"""Restricted Boltzmann machines with real visible units.

Visible units :math:`x \in \mathbb R^n` with scales :math:`s`, hidden units
:math:`z \in \{0, 1\}^m`, and the energy

.. math:: E(x, z) = \sum_i \frac{(x_i - b_i)^2}{2 s_i^2}
          - \sum_{ij} \frac{x_i}{s_i^2} W_{ij} z_j - \sum_j c_j z_j.

The scale stands squared under :math:`x W z` as under the quadratic term, so that a hidden unit
moves the mean of the visible ones by its column of :math:`W`, whatever their scale:

.. math:: x_i \mid z \sim N\big(b_i + (W z)_i,\, s_i^2\big), \qquad
          p(z_j = 1 \mid x) = \sigma\Big(c_j + \sum_i W_{ij} x_i / s_i^2\Big).

(Krizhevsky's :math:`x_i / s_i`, with :math:`W_{ij}` in units of the scale, is the same machine with
:math:`W_{ij} = s_i W'_{ij}`.) The marginal is a mixture of :math:`2^m` Gaussians, and

.. math:: \log Z = \sum_i \log \sqrt{2 \pi s_i^2} + \log \sum_z
          \exp \Big( c^\top z + \sum_i (W z)_i \frac{b_i + (W z)_i / 2}{s_i^2} \Big).

Reference:
    Cho, Ilin and Raiko (2011), Improved learning of Gaussian-Bernoulli restricted Boltzmann
    machines. Krizhevsky (2009), Learning multiple layers of features from tiny images.
"""

import math
from typing import Unpack

import torch
from pyro.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,  # pyright: ignore[reportAttributeAccessIssue]
    Normal,
    constraints,
)
from torch import Tensor

from pyro_ebm.distributions.boltzmann.bipartite import (
    MarginalLayers,
    affine,
    check_beside,
    check_weights,
    dot,
    softplus,
    times,
)
from pyro_ebm.distributions.enumerated import EnergySettings
from pyro_ebm.ops.arguments import check_number
from pyro_ebm.ops.integration.enumerate import states, values_of_states


class GaussianRBM(MarginalLayers):
    r"""A restricted Boltzmann machine over real visible units, the hidden bits summed out.

    .. math:: p(x) \propto \prod_i e^{-(x_i - b_i)^2 / 2 s_i^2}
              \prod_j \big(1 + e^{c_j + \sum_i W_{ij} x_i / s_i^2}\big)

    It is proper whatever the parameters, and its density is normalized by
    :meth:`exact_log_normalizer` where the hidden units can be enumerated.

    Args:
        weights: :math:`W`, in units of x, shape ``(*batch, n, m)``.
        visible_bias: :math:`b`, in units of x, shape ``(*batch, n)``.
        hidden_bias: :math:`c`, shape ``(*batch, m)``.
        scale: :math:`s > 0`, in units of x, a number or a tensor of shape ``()`` or
            ``(*batch, n)``.
        **kwargs: ``log_normalizer``, ``kernel``, ``num_steps``, ``learned_normalizer`` and
            ``validate_args`` of :class:`~pyro_ebm.UnnormalizedEnergy`.

    Raises:
        ValueError: for parameters of the wrong type or shape, or a scale that is not positive.

    Example:
        >>> p = GaussianRBM(torch.randn(5, 3), torch.zeros(5), torch.zeros(3), scale=0.5)
        >>> p
        GaussianRBM(visible=5, hidden=3, log_normalizer=unknown)
        >>> x = p.exact_sample((100,))
        >>> q = p.normalized(p.exact_log_normalizer())
        >>> torch.allclose(q.log_prob(x), p.mixture().log_prob(x), atol=1e-4)
        True
    """

    arg_constraints = {
        **MarginalLayers.arg_constraints,
        "scale": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self,
        weights: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        scale: Tensor | float = 1.0,
        **kwargs: Unpack[EnergySettings],
    ):
        n, _ = check_weights(weights)
        if not isinstance(scale, Tensor):
            check_number("scale", scale)
            if not math.isfinite(scale):
                raise ValueError(f"scale must be finite, got {scale}")
            scale = torch.tensor(scale, dtype=weights.dtype, device=weights.device)
        if scale.dim() == 0:
            scale = scale.expand(n)
        check_beside(weights, "scale", scale, n)
        self.scale = scale
        super().__init__(
            weights,
            visible_bias,
            hidden_bias,
            (n,),
            constraints.real,
            batch_shape=scale.shape[:-1],
            **kwargs,
        )

    def _energy(self, x: Tensor) -> Tensor:
        x = x.to(self.weights.dtype)
        quadratic = ((x - self.visible_bias) / self.scale).square().sum(-1) / 2
        return quadratic - softplus(self.hidden_logits(x)).sum(-1)

    def hidden_logits(self, x: Tensor) -> Tensor:
        """The log-odds of the hidden units, ``(*sample, *batch, n) -> (*sample, *batch, m)``."""
        return affine(x / self.scale.square(), self.weights, self.hidden_bias)

    def visible_mean(self, z: Tensor) -> Tensor:
        """The mean of the visible units, ``(*sample, *batch, m) -> (*sample, *batch, n)``."""
        return affine(z, self.weights.mT, self.visible_bias)

    def visible_given(self, z: Tensor) -> Independent:
        r"""The visible units given the hidden ones, :math:`N(b + W z, s^2)`: independent."""
        mean = self.visible_mean(self.hidden_units(z))
        return Normal(mean, self.scale, validate_args=self._validate_args).to_event(1)

    def log_hidden(self, z: Tensor) -> Tensor:
        r""":math:`\log p(z) + \log Z`, ``(*sample, *batch, m) -> (*sample, *batch)``."""
        # -(x - b)^2 / 2 + x Wz = -(x - b - Wz)^2 / 2 + Wz (b + Wz / 2), in units of s
        shift = times(z, self.weights.mT)
        square = shift * (self.visible_bias + shift / 2) / self.scale.square()
        log_width = self.scale.log() + math.log(2 * math.pi) / 2
        return dot(z, self.hidden_bias) + (square + log_width).sum(-1)

    def mixture(self, max_units: int = 12) -> MixtureSameFamily:
        r"""The same distribution as a mixture of :math:`2^m` Gaussians.

        .. math:: p(x) = \sum_z p(z)\, N(x; b + W z, s^2)

        Its log density is normalized, and it has moments. For many draws, :meth:`exact_sample`
        does not draw from every component.

        Args:
            max_units: how many hidden units may be enumerated.

        Raises:
            ValueError: if there are more.
        """
        batch, enumeration = self.unexpanded.batch_shape, self._enumeration(max_units)
        logits = values_of_states(*enumeration, max_states=2**max_units).movedim(0, -1)
        logits = logits.expand(batch + logits.shape[-1:])
        z = states(enumeration.support_values, self.num_hidden)
        z = z.reshape((len(z),) + (1,) * len(batch) + (-1,))
        mean = self.visible_mean(z).expand((len(z),) + batch + (self.num_visible,))
        components = Normal(mean.movedim(0, -2), self.scale[..., None, :])
        mixture = MixtureSameFamily(Categorical(logits=logits), Independent(components, 1))
        return mixture.expand(self.batch_shape)

    def starting_points(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        r"""Where chains start: :math:`x \sim p(x \mid z)` at hidden units that are fair coins."""
        shape = torch.Size(sample_shape) + self.batch_shape + (self.num_hidden,)
        with torch.no_grad():
            return self.visible_given(self._uniform(shape).round()).sample()

    def gibbs_noise(self, x: Tensor) -> tuple[Tensor, ...]:
        """The uniforms of a sweep for the hidden units, and the normals for the visible ones."""
        shape, like = x.shape[:-1] + (self.num_hidden,), self.weights
        normal = torch.randn(x.shape, dtype=like.dtype, device=like.device)
        return self._uniform(shape), normal

    def _visible_sweep(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        uniform, normal = noise
        z = (uniform < self.hidden_logits(x).sigmoid()).to(x.dtype)
        return self.visible_mean(z) + self.scale * normal
