r"""Two layers of units, the hidden ones bits, each layer independent given the other.

The machines of this family have an energy that is linear in the hidden units
:math:`z \in \{0, 1\}^m`, so that

.. math:: p(x, z) \propto e^{-E(x, z)}, \qquad
          p(z \mid x) = \prod_j p(z_j \mid x), \qquad p(x \mid z) = \prod_i p(x_i \mid z).

Each layer given the other is known in closed form, and so is :math:`\sum_x e^{-E(x, z)} = Z p(z)`.
Hence :math:`Z` is a sum over the states of one layer, and an exact draw is one of :math:`z` from a
table of its states, then one of :math:`x` given :math:`z`.

Parameters may have a batch, as those of a conditional machine do, whose biases (or weights) are
computed from a context: each batch element is then a machine of its own, with its own :math:`Z`.
"""

from abc import abstractmethod
from typing import Unpack

import torch
from pyro.distributions import (
    Bernoulli,  # pyright: ignore[reportAttributeAccessIssue]
    Independent,
    constraints,
)
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import softplus as _softplus

from pyro_ebm.distributions.checks.arguments import common_batch
from pyro_ebm.distributions.enumerated import EnergySettings, EnumeratedEnergy, Enumeration

NUMBERS_PER_CHUNK = 2**21
"""How many preactivations an enumeration holds at once."""


class TwoLayers(EnumeratedEnergy):
    r"""What all machines of the family share: parameters, hidden bits, the sum over their states.

    A member says what its visible units are: :meth:`visible_given`, :meth:`hidden_logits`, and
    :meth:`log_hidden`, with the visible units summed or integrated out.

    Args:
        weights: :math:`W`, shape ``(*batch, n, m)``.
        visible_bias: :math:`b`, shape ``(*batch, n)``.
        hidden_bias: :math:`c`, shape ``(*batch, m)``.
        event_shape: shape of one point.
        support: where points live.
        batch_shape: the batch of further parameters.
        **kwargs: passed to
            :class:`~pyro_ebm.distributions.enumerated.EnumeratedEnergy`.

    Raises:
        ValueError: for parameters that are not floating tensors of one dtype and fitting shapes.
    """

    arg_constraints = {
        "weights": constraints.independent(constraints.real, 2),
        "visible_bias": constraints.real_vector,
        "hidden_bias": constraints.real_vector,
    }

    def __init__(
        self,
        weights: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        event_shape: tuple[int, ...],
        support: constraints.Constraint,
        batch_shape: tuple[int, ...] = (),
        **kwargs: Unpack[EnergySettings],
    ):
        n, m = check_weights(weights)
        check_beside(weights, "visible_bias", visible_bias, n)
        check_beside(weights, "hidden_bias", hidden_bias, m)
        self.weights, self.visible_bias, self.hidden_bias = weights, visible_bias, hidden_bias
        batch_shape = common_batch(
            "parameters",
            weights.shape[:-2],
            visible_bias.shape[:-1],
            hidden_bias.shape[:-1],
            batch_shape,
        )
        super().__init__(event_shape, support, batch_shape, **kwargs)

    @property
    def num_visible(self) -> int:
        """The number n of visible units."""
        return self.weights.shape[-2]

    @property
    def num_hidden(self) -> int:
        """The number m of hidden units."""
        return self.weights.shape[-1]

    # -- one layer given the other -----------------------------------------------------------

    def hidden_given(self, x: Tensor) -> Independent:
        r"""The hidden units given the visible ones, :math:`p(z \mid x)`: independent bits.

        Args:
            x: visible units, shape ``(*sample, *batch, n)``.

        Returns:
            A Bernoulli distribution over events of shape ``(m,)``.
        """
        logits = self.hidden_logits(self.visible_units(x))
        return Bernoulli(logits=logits, validate_args=self._validate_args).to_event(1)

    @abstractmethod
    def visible_given(self, z: Tensor) -> Independent:
        r"""The visible units given the hidden ones, :math:`p(x \mid z)`: independent.

        Args:
            z: hidden units, shape ``(*sample, *batch, m)``.

        Returns:
            A distribution over events of shape ``(n,)``.
        """

    @abstractmethod
    def hidden_logits(self, x: Tensor) -> Tensor:
        """The log-odds of the hidden units, ``(*sample, *batch, n) -> (*sample, *batch, m)``."""

    @abstractmethod
    def log_hidden(self, z: Tensor) -> Tensor:
        r""":math:`\log p(z) + \log Z`, ``(*sample, *batch, m) -> (*sample, *batch)``."""

    def visible_units(self, x: Tensor) -> Tensor:
        """Visible units ``(..., n)`` broadcast against the batch, in the weights' precision."""
        return self._layer("visible", x, self.num_visible)

    def hidden_units(self, z: Tensor) -> Tensor:
        """Hidden units ``(..., m)`` broadcast against the batch, in the weights' precision."""
        return self._layer("hidden", z, self.num_hidden)

    def _layer(self, name: str, units: Tensor, size: int) -> Tensor:
        if units.shape[-1:] != (size,):
            raise ValueError(
                f"{name} units of {self!r} must have shape (*sample, *batch, {size}), got"
                f" {tuple(units.shape)}"
            )
        batch = common_batch(f"{name} units and batch", units.shape[:-1], self.batch_shape)
        return units.to(self.weights.dtype).expand(batch + (size,))

    _modules = ()  # parameters are tensors, and no network hides among them

    @property
    def like(self) -> Tensor:
        """A tensor of the parameters' dtype and device."""
        return self.weights.detach()

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, dtype=self.weights.dtype, device=self.weights.device)

    # -- sums over all states ----------------------------------------------------------------

    def _point(self, x: Tensor, z: Tensor) -> Tensor:
        """The point of the distribution that has these layers: by default the visible units."""
        return x

    def _enumerated(self) -> "TwoLayers":
        """The machine whose hidden layer is enumerated in place of this one's."""
        return self

    def _completed(self, s: Tensor) -> Tensor:
        enumerated = self._enumerated()
        x = enumerated.visible_given(s).sample()
        return self._point(x, s) if enumerated is self else self._point(s, x)

    def _enumeration(self, max_units: int) -> Enumeration:
        machine = self._enumerated()
        m = machine.num_hidden
        if m > max_units:
            raise ValueError(
                f"the layer to enumerate has {m} units, 2^{m} states, and max_units={max_units}:"
                " use an estimate of log Z (annealed importance sampling), or raise max_units if"
                " you can wait"
            )
        batch = self.unexpanded.batch_shape
        inner = (1,) * len(batch)
        chunk_size = max(NUMBERS_PER_CHUNK // (machine.num_visible * max(batch.numel(), 1)), 256)

        def log_f(z: Tensor) -> Tensor:  # (chunk, m) -> (chunk, *batch)
            return machine.log_hidden(z.reshape((len(z),) + inner + (m,)))

        return Enumeration(log_f, bits_like(self.weights), m, chunk_size)

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return (
            f"{type(self).__name__}(visible={self.num_visible}, hidden={self.num_hidden}{batch},"
            f" log_normalizer={self.normalizer_state})"
        )


class MarginalLayers(TwoLayers):
    """The visible units of two layers, the hidden bits summed out."""

    supports_tempering = False  # of e^{-beta F} the layers are not independent given each other
    _way_to_temper = ""

    def free_energy(self, x: Tensor) -> Tensor:
        r"""The energy :math:`F(x) = -\log \sum_z e^{-E(x, z)}`.

        Args:
            x: visible units, shape ``(*sample, *batch, n)``.

        Returns:
            Shape ``(*sample, *batch)``.
        """
        return self.energy(x)

    def gibbs_sweep(
        self, x: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        r"""New visible units: :math:`z \sim p(z \mid x)`, then :math:`x \sim p(x \mid z)`.

        Raises:
            ValueError: if ``beta`` is not None.
        """
        if beta is not None:
            raise ValueError(
                f"a sweep of {type(self).__name__} leaves e^{{-F}} invariant, not e^{{-beta F}},"
                " whose layers are not independent given each other" + self._way_to_temper
            )
        return self._visible_sweep(x.to(self.weights.dtype), noise).to(x.dtype)

    @abstractmethod
    def _visible_sweep(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        """New visible units, in the weights' precision."""


def check_weights(weights: Tensor) -> tuple[int, int]:
    """The numbers of visible and hidden units.

    Raises:
        ValueError: if the weights are no floating tensor of shape ``(*batch, n, m)``.
    """
    _check_floating("weights", weights)
    if weights.dim() < 2 or 0 in weights.shape[-2:]:
        raise ValueError(
            "weights must have shape (*batch, n, m), for n visible and m hidden units, got"
            f" {tuple(weights.shape)}"
        )
    return weights.shape[-2], weights.shape[-1]


def check_beside(weights: Tensor, name: str, value: Tensor, size: int) -> None:
    """Raises a ValueError unless a parameter has shape ``(*batch, size)`` and the same dtype."""
    _check_floating(name, value)
    if value.shape[-1:] != (size,):
        raise ValueError(
            f"{name} must have shape (*batch, {size}) beside weights of shape"
            f" {tuple(weights.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype != weights.dtype:
        raise ValueError(f"{name} has dtype {value.dtype}, the weights have {weights.dtype}")


def _check_floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of floating numbers, got {got}")


def times(x: Tensor, weights: Tensor) -> Tensor:
    """The products ``x W``, ``(*sample, *batch, n)`` with ``(*batch, n, m)``."""
    if weights.dim() == 2:
        return x @ weights
    return torch.einsum("...n,...nm->...m", x, weights)  # never a copy of W for each sample


def affine(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """``x W + b``, ``(*sample, *batch, n)`` with ``(*batch, n, m)`` and ``(*batch, m)``."""
    if weights.dim() == 2 and bias.dim() == 1:
        return linear(x, weights.mT, bias)
    return bias + times(x, weights)


def dot(x: Tensor, bias: Tensor) -> Tensor:
    """The inner products, ``(*sample, *batch, n)`` with ``(*batch, n)``."""
    return x @ bias if bias.dim() == 1 else (x * bias).sum(-1)


def softplus(a: Tensor) -> Tensor:
    """``log(1 + e^a)``, exact in float64 too: torch's own threshold, 20, leaves out 2e-9."""
    return _softplus(a, threshold=40.0)


def bits_like(like: Tensor) -> Tensor:
    """The support values of a bit, shape ``(2, 1)``, of the dtype and device of a tensor."""
    return torch.tensor([[0.0], [1.0]], dtype=like.dtype, device=like.device)
