r"""The parameters of restricted Boltzmann machines as modules, centered or not.

A call of the module gives the machine of its current parameters, to be sampled or observed in a
model that registers the module:

.. code-block:: python

    def model(data):
        rbm = pyro.module("rbm", net)
        with pyro.plate("data", len(data)):
            pyro.sample("x", rbm(), obs=data)

What a gradient makes of a machine depends on how its bits are coded: :math:`x` and :math:`1 - x`
are equally good data, but the plain gradient learns them differently well. *Centering* takes this
away. With offsets :math:`\mu` of the visible and :math:`\lambda` of the hidden units, near their
means, the energy is written

.. math:: E(x, z) = -(x - \mu)^\top W (z - \lambda) - b^\top x - c^\top z,

up to a constant the plain machine :math:`(W,\; b - W \lambda,\; c - W^\top \mu)`. The module holds
:math:`W, b, c` and returns that plain machine, so that autograd finds the centered gradient

.. math:: \nabla_W \log p(x) = \big\langle (x - \mu)(z - \lambda)^\top \big\rangle_{z \mid x}
          - \big\langle (x - \mu)(z - \lambda)^\top \big\rangle_{x, z}.

For real visible units, :math:`\mu / s^2` stands in place of :math:`\mu`.

Reference:
    Montavon and Müller (2012), Deep Boltzmann machines and the centering trick. Melchior, Fischer
    and Wiskott (2016), How to center deep Boltzmann machines. Hinton (2012), A practical guide to
    training restricted Boltzmann machines (the start of the parameters).
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from pyro_ebm.distributions.boltzmann.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.boltzmann.rbm import RBM
from pyro_ebm.distributions.enumerated import EnergySettings
from pyro_ebm.ops.arguments import check_count, check_number, check_tensor


class RBMModule(nn.Module):
    r"""The parameters of an :class:`~pyro_ebm.distributions.boltzmann.rbm.RBM`.

    Weights start at small normal numbers, hidden biases at 0, and visible biases at the log-odds of
    the data, :math:`\log \frac{k + 1}{N - k + 1}` for :math:`k` ones among :math:`N` bits, which
    is finite even where all are equal. A conditional machine adds to these parameters what it
    computes from its context: ``RBM(net.weights, net.visible_bias + bias(context), ...)``.

    Args:
        num_visible: n, how many visible units.
        num_hidden: m, how many hidden units.
        data: bits, shape ``(num, n)``; they also tell dtype and device. Without data the visible
            biases start at 0.
        centered: whether the parameters are centered. The offsets start at the means of the data
            (without data 0.5) and at 0.5; see :meth:`recenter`.
        weight_scale: standard deviation of the weights at the start.
        generator: source of those weights, a CPU generator; by default torch's own.

    Raises:
        ValueError: for sizes below 1, or data of another shape or with values other than 0 and 1.

    Example:
        >>> data = torch.bernoulli(torch.full((100, 6), 0.3))
        >>> net = RBMModule(6, 4, data, centered=True)
        >>> net()
        RBM(visible=6, hidden=4, log_normalizer=unknown)
        >>> before = net().free_energy(data)
        >>> net.recenter(data, rate=0.5)
        >>> after = net().free_energy(data)  # the same density, with other parameters
        >>> torch.allclose(after - after[0], before - before[0], atol=1e-5)
        True
    """

    visible_offset: Tensor
    hidden_offset: Tensor

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        data: Tensor | None = None,
        centered: bool = False,
        weight_scale: float = 0.01,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_count("num_visible", num_visible)
        check_count("num_hidden", num_hidden)
        check_number("weight_scale", weight_scale)
        data = self._checked(data, num_visible)
        weights = weight_scale * torch.randn(
            num_visible, num_hidden, generator=generator, dtype=data.dtype
        )
        mean = data.mean(0) if len(data) else data.new_full((num_visible,), self._center)
        zeros, self.centered = data.new_zeros(num_hidden), centered
        self.weights = nn.Parameter(weights.to(data.device))
        self.visible_bias = nn.Parameter(self._bias_of(data))
        self.hidden_bias = nn.Parameter(zeros)
        self.register_buffer("visible_offset", mean if centered else torch.zeros_like(mean))
        self.register_buffer("hidden_offset", zeros + 0.5 if centered else zeros.clone())

    def forward(self, **kwargs: Unpack[EnergySettings]) -> RBM:
        """The machine of the current parameters.

        Args:
            **kwargs: ``log_normalizer``, ``kernel`` and others of
                :class:`~pyro_ebm.distributions.boltzmann.rbm.RBM`.
        """
        return RBM(*self.plain_parameters(), **kwargs)

    def extra_repr(self) -> str:
        """How many units there are, and whether the parameters are centered."""
        visible, hidden = self.weights.shape
        return f"visible={visible}, hidden={hidden}" + ", centered=True" * self.centered

    def plain_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Weights and biases without offsets, :math:`(W,\, b - W \lambda,\, c - W^\top \mu)`."""
        return (
            self.weights,
            self.visible_bias - self.weights @ self.hidden_offset,
            self.hidden_bias - self._drive(self.visible_offset) @ self.weights,
        )

    def refresh(self, machine: RBM | GaussianRBM) -> None:
        """Gives a machine that this module made the present parameters."""
        machine.weights, machine.visible_bias, machine.hidden_bias = self.plain_parameters()

    @torch.no_grad()
    def recenter(self, x: Tensor, rate: float = 0.01) -> None:
        r"""Moves the offsets towards the means over a batch, and leaves the density as it is.

        .. math:: \mu' = (1 - r) \mu + r \bar x, \qquad
                  \lambda' = (1 - r) \lambda + r\, \overline{p(z = 1 \mid x)}, \qquad
                  b' = b + W (\lambda' - \lambda), \qquad c' = c + W^\top (\mu' - \mu)

        Call it between steps of the optimizer.

        Args:
            x: data, shape ``(*batch, n)``.
            rate: :math:`r`, in [0, 1].

        Raises:
            ValueError: if the module is not centered, for another rate, or for values that are no
                visible units.
        """
        if not self.centered:
            raise ValueError("only a module made with centered=True has offsets to move")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {rate}")
        machine = self()
        machine.check_values(x)
        x = x.to(self.weights.dtype).reshape(-1, machine.num_visible)
        self.move_offsets(x.mean(0), machine.hidden_logits(x).sigmoid().mean(0), rate)

    def move_offsets(self, visible_mean: Tensor, hidden_mean: Tensor, rate: float) -> None:
        """:meth:`recenter` where the means over the batch are known, ``(n,)`` and ``(m,)``."""
        visible = rate * (visible_mean - self.visible_offset)
        hidden = rate * (hidden_mean - self.hidden_offset)
        self.visible_bias += self.weights @ hidden
        self.hidden_bias += self._drive(visible) @ self.weights
        self.visible_offset += visible
        self.hidden_offset += hidden

    @torch.no_grad()
    def cd_gradient(self, x: Tensor, negatives: Tensor) -> dict[str, Tensor]:
        r"""The gradient of contrastive divergence in closed form, without autograd.

        That of the contrast :math:`\overline{F(x)} - \overline{F(x')}` of mean free energies,

        .. math:: \Big\langle (x - \mu) (p - \lambda)^\top \Big\rangle_{x'}
                  - \Big\langle (x - \mu) (p - \lambda)^\top \Big\rangle_x, \qquad
                  \langle x \rangle_{x'} - \langle x \rangle_x, \qquad
                  \langle p \rangle_{x'} - \langle p \rangle_x

        in :math:`W`, :math:`b` and :math:`c`, with :math:`p = p(z = 1 \mid x)`.

        Args:
            x: data, shape ``(num, n)``.
            negatives: where the chains are, shape ``(num_chains, n)``.

        Returns:
            The gradients, by the names of the parameters.

        Example:
            >>> net = RBMModule(6, 4, centered=True)
            >>> x, negatives = torch.bernoulli(torch.full((2, 50, 6), 0.3))
            >>> (net().energy(x).mean() - net().energy(negatives).mean()).backward()
            >>> gradient = net.cd_gradient(x, negatives)["weights"]
            >>> torch.allclose(gradient, net.weights.grad, atol=1e-6)
            True
        """
        machine = self()
        x, negatives = x.to(self.weights.dtype), negatives.to(self.weights.dtype)
        p, q = (machine.hidden_logits(units).sigmoid() for units in (x, negatives))
        return self.cd_gradient_of(x, p, negatives, q)

    def cd_gradient_of(
        self, x: Tensor, p: Tensor, negatives: Tensor, q: Tensor
    ) -> dict[str, Tensor]:
        """:meth:`cd_gradient` where the means ``p``, ``q`` of the hidden units are known."""
        x, negatives = self._drive(x), self._drive(negatives)
        # with D f = <f>_negatives - <f>_data, and d = x, or x / s^2 for real units:
        #   D[(d - mu)(p - lambda)^T] = D[d p^T] - mu D[p]^T - D[d] lambda^T
        visible, hidden = negatives.mean(0) - x.mean(0), q.mean(0) - p.mean(0)
        both = torch.addmm(x.mT @ p, negatives.mT, q, beta=-1 / len(x), alpha=1 / len(negatives))
        both.addr_(self._drive(self.visible_offset), hidden, alpha=-1)
        both.addr_(visible, self.hidden_offset, alpha=-1)
        return {"weights": both, "visible_bias": visible, "hidden_bias": hidden}

    # -- what depends on the kind of visible units ---------------------------------------------

    _center = 0.5  # the visible offset without data

    def _drive(self, x: Tensor) -> Tensor:
        """What of the visible units the weights multiply."""
        return x

    def _bias_of(self, data: Tensor) -> Tensor:
        ones = data.sum(0)
        return ((ones + 1) / (len(data) - ones + 1)).log()

    def _checked(self, data: Tensor | None, num_visible: int) -> Tensor:
        """The data as floating numbers, without rows if there are none."""
        if data is None:
            return torch.empty(0, num_visible)
        check_tensor("data", data)
        if data.dim() != 2 or data.shape[1] != num_visible or not len(data):
            raise ValueError(
                f"data must have shape (num, {num_visible}), got {tuple(data.shape)}: flatten"
                " images, as in data.flatten(1)"
            )
        self._check_values(data)
        return data if data.is_floating_point() else data.to(torch.get_default_dtype())

    def _check_values(self, data: Tensor) -> None:
        if not ((data == 0) | (data == 1)).all():
            raise ValueError(
                "data must be bits, 0 or 1: binarize them, as in torch.bernoulli(data) or"
                " (data > 0.5).float(), or use GaussianRBMModule for real values"
            )


class GaussianRBMModule(RBMModule):
    r"""The parameters of a :class:`~pyro_ebm.distributions.boltzmann.gaussian_rbm.GaussianRBM`.

    Visible biases start at the mean of the data, scales at their standard deviation, and weights
    at small normal numbers times the scale, which is their unit. Gradients have units too: one
    learning rate suits all units of data that have been standardized.

    Args:
        num_visible: n, how many visible units.
        num_hidden: m, how many hidden units.
        data: points, shape ``(num, n)``; they also tell dtype and device. Without data the machine
            starts at mean 0 and scale 1.
        centered: whether the parameters are centered, see :class:`RBMModule`; the visible offset
            without data is 0.
        weight_scale: standard deviation of the weights at the start, in units of the scale.
        generator: source of those weights, a CPU generator; by default torch's own.
        learn_scale: whether the scale is a parameter, through its log, or stays.

    Raises:
        ValueError: for sizes below 1, or data of another shape, not finite, or with a constant
            column.

    Example:
        >>> net = GaussianRBMModule(3, 2, 5 + torch.randn(100, 3))
        >>> net()
        GaussianRBM(visible=3, hidden=2, log_normalizer=unknown)
        >>> [name for name, _ in net.named_parameters()]
        ['weights', 'visible_bias', 'hidden_bias', 'log_scale']
    """

    log_scale: Tensor

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        data: Tensor | None = None,
        centered: bool = False,
        weight_scale: float = 0.01,
        generator: torch.Generator | None = None,
        learn_scale: bool = True,
    ):
        super().__init__(num_visible, num_hidden, data, centered, weight_scale, generator)
        scale = torch.ones_like(self.visible_bias)
        if data is not None:
            scale = self._checked(data, num_visible).std(0, correction=0)
            if not (scale > 0).all():
                columns = (scale == 0).nonzero().flatten().tolist()
                raise ValueError(
                    f"columns {columns} of the data are constant and have no scale: drop them"
                )
        with torch.no_grad():
            self.weights *= scale[:, None]
        log_scale = scale.log().detach()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, **kwargs: Unpack[EnergySettings]) -> GaussianRBM:
        """The machine of the current parameters.

        Args:
            **kwargs: ``log_normalizer``, ``kernel`` and others of
                :class:`~pyro_ebm.distributions.boltzmann.gaussian_rbm.GaussianRBM`.
        """
        return GaussianRBM(*self.plain_parameters(), scale=self.log_scale.exp(), **kwargs)

    def refresh(self, machine: RBM | GaussianRBM) -> None:
        """Gives a machine that this module made the present parameters, the scale too."""
        assert isinstance(machine, GaussianRBM)
        super().refresh(machine)
        machine.scale = self.log_scale.exp()

    def cd_gradient_of(
        self, x: Tensor, p: Tensor, negatives: Tensor, q: Tensor
    ) -> dict[str, Tensor]:
        """The gradients of :meth:`RBMModule.cd_gradient_of`, and that of the log of the scale."""
        grads = super().cd_gradient_of(x, p, negatives, q)
        # -dF / d log s = (x - b')^2 / s^2 - 2 sum_j W_j (x - mu) p_j / s^2, where b' = b - W lambda
        bias = self.visible_bias - self.weights @ self.hidden_offset
        square = (negatives - bias).square().mean(0) - (x - bias).square().mean(0)
        both = grads["weights"].addr(grads["visible_bias"], self.hidden_offset)
        interaction = (self.weights * both).sum(1)
        grads["log_scale"] = square * (-2 * self.log_scale).exp() - 2 * interaction
        return grads

    _center = 0.0

    def _drive(self, x: Tensor) -> Tensor:
        return x * (-2 * self.log_scale).exp()  # x / s^2

    def _bias_of(self, data: Tensor) -> Tensor:
        return data.mean(0) if len(data) else data.new_zeros(data.shape[1])

    def _check_values(self, data: Tensor) -> None:
        if not data.isfinite().all():
            raise ValueError("the data hold NaN or infinite values: drop those rows")
