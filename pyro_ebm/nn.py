r"""Small energy networks to start from.

They map points to one energy each, with smooth activations: score matching differentiates twice
in the point and once in the parameters. ``spectral_norm`` divides each layer's weight matrix by
its largest singular value (torch's own parametrization). It bounds the slope of the energy, so
scale the data to about unit size; it keeps a state, which sampling leaves alone.

Hidden weights start at the scale of He et al. (2015), which keeps the size of activations. Torch's
own default lets it shrink from layer to layer, and a smooth network then starts out so nearly
linear that contrastive losses need thousands of steps to bend it.

Reference:
    He, Zhang, Ren and Sun (2015), Delving deep into rectifiers.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as _spectral_norm

from pyro_ebm.ops.arguments import check_count, check_number, shown


class MLPEnergy(nn.Module):
    r"""A multilayer perceptron as an energy, ``(*batch, *event) -> (*batch)``.

    Args:
        event_shape: shape of a point, or its dimension.
        hidden: widths of the hidden layers.
        activation: class of the activation; smooth (SiLU) by default.
        spectral_norm: whether the weight matrix of each layer has spectral norm 1.

    Example:
        >>> net = MLPEnergy(2, hidden=(128, 128))
        >>> net(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
        spectral_norm: bool = False,
    ):
        super().__init__()
        event_shape = (event_shape,) if isinstance(event_shape, int) else event_shape
        self.event_shape = _sizes("event_shape", event_shape)
        hidden = _sizes("hidden", hidden, least=1)
        widths = [max(self.event_shape.numel(), 1), *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [_hidden(nn.Linear(before, after), spectral_norm), activation()]
        layers.append(_bounded(nn.Linear(widths[-1], 1), spectral_norm))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Energies ``(*batch)`` of points ``(*batch, *event)``."""
        batch = _batch_of(x, self.event_shape)
        return self.layers(x.reshape(batch + (max(self.event_shape.numel(), 1),))).squeeze(-1)


class NoiseConditionalMLP(nn.Module):
    r"""A perceptron as an energy of points and their noise levels, for ``noise_conditional``.

    .. math:: E(x, \sigma) = \frac{|x|^2}{2 \tau^2} + d \log \tau
              + \frac{f(x / \tau,\, \log \sigma,\, \phi(x, \sigma))}{\sqrt \sigma},
              \qquad \tau^2 = s^2 + \sigma^2

    Without :math:`f` it is a Gaussian of spread :math:`s`, and noise. Random Fourier
    features :math:`\phi = e^{-\sigma^2 |w|^2 / 2} (\cos w^\top x, \sin w^\top x)` let the network
    draw sharp edges at a small :math:`\sigma`. They are means over the noise,
    :math:`\mathbb E \cos w^\top (x + \sigma \xi)`, so that no level sees what its noise blurs.

    Args:
        event_shape: shape of a point, or its dimension.
        hidden: widths of the hidden layers.
        spread: :math:`s`, the standard deviation of the data around 0.
        num_frequencies: number of the :math:`w`.
        frequency: their standard deviation, in cycles on the length of a ``spread``.
        activation: class of the activation; smooth (SiLU) by default.

    Reference:
        Tancik et al. (2020), Fourier features let networks learn high frequency functions in low
        dimensional domains.

    Example:
        >>> net = NoiseConditionalMLP(2, spread=2.0)
        >>> net(torch.zeros(5, 3, 2), torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    frequencies: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (128, 128),
        spread: float = 1.0,
        num_frequencies: int = 64,
        frequency: float = 1.0,
        activation: type[nn.Module] = nn.SiLU,
    ):
        super().__init__()
        event_shape = (event_shape,) if isinstance(event_shape, int) else event_shape
        self.event_shape = _sizes("event_shape", event_shape)
        for name, value in (("spread", spread), ("frequency", frequency)):
            check_number(name, value)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.spread = float(spread)
        check_count("num_frequencies", num_frequencies, least=0)
        d = max(self.event_shape.numel(), 1)
        w = 2 * math.pi * float(frequency) / self.spread * torch.randn(d, num_frequencies)
        self.register_buffer("frequencies", w)
        self.net = MLPEnergy(d + 1 + 2 * num_frequencies, hidden, activation)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Energies ``(*batch)`` of points ``(*batch, *event)`` and noise levels ``(*batch)``."""
        tau, w = (self.spread**2 + sigma.square()).sqrt(), self.frequencies
        x = x.reshape(_batch_of(x, self.event_shape) + w.shape[:1])
        angles = x @ w
        damped = (-(sigma[..., None] * w.norm(dim=0)).square() / 2).exp()
        inputs = [x / tau[..., None], sigma.log()[..., None]]
        inputs += [damped * angles.cos(), damped * angles.sin()]
        gaussian = (x / tau[..., None]).square().sum(-1) / 2 + x.shape[-1] * tau.log()
        return gaussian + self.net(torch.cat(inputs, -1)) / sigma.sqrt()


class ConvEnergy(nn.Module):
    r"""A small convolutional network as an energy of images, ``(*batch, C, H, W) -> (*batch)``.

    Strided convolutions halve the image until it is at most 4 wide; a linear layer reads the rest.

    Args:
        image_shape: ``(channels, height, width)``, or ``(height, width)`` for one channel.
        channels: of the first convolution; doubled at each halving.
        activation: class of the activation; smooth (SiLU) by default.
        spectral_norm: whether the weight matrix of each layer has spectral norm 1.

    Example:
        >>> net = ConvEnergy((8, 8))
        >>> net(torch.zeros(5, 8, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int = 32,
        activation: type[nn.Module] = nn.SiLU,
        spectral_norm: bool = False,
    ):
        super().__init__()
        image_shape = _sizes("image_shape", image_shape, least=1)
        check_count("channels", channels)
        if len(image_shape) not in (2, 3):
            raise ValueError(
                f"image_shape must be (height, width) or (channels, height, width), got"
                f" {tuple(image_shape)}"
            )
        self.event_shape = torch.Size(image_shape)
        depth, height, width = ((1,) * (3 - len(image_shape)) + tuple(image_shape))[-3:]
        self._image_shape = (depth, height, width)
        layers: list[nn.Module] = [
            _hidden(nn.Conv2d(depth, channels, 3, padding=1), spectral_norm),
            activation(),
        ]
        while max(height, width) > 4:
            conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
            layers += [_hidden(conv, spectral_norm), activation()]
            height, width, channels = math.ceil(height / 2), math.ceil(width / 2), 2 * channels
        layers += [nn.Flatten(), _bounded(nn.Linear(channels * height * width, 1), spectral_norm)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Energies ``(*batch)`` of images ``(*batch, *image_shape)``."""
        batch = _batch_of(x, self.event_shape)
        return self.layers(x.reshape((batch.numel(),) + self._image_shape)).reshape(batch)


def _sizes(name: str, sizes: object, least: int = 0) -> torch.Size:
    if not isinstance(sizes, Sequence):
        raise ValueError(f"{name} must be a tuple of sizes, such as (3,), got {shown(sizes)}")
    for size in sizes:
        check_count(name, size, least)
    return torch.Size(sizes)


def _hidden(layer: nn.Linear | nn.Conv2d, spectral_norm: bool) -> nn.Module:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return _bounded(layer, spectral_norm)


def _bounded(layer: nn.Module, spectral_norm: bool) -> nn.Module:
    return _spectral_norm(layer) if spectral_norm else layer


def _batch_of(x: Tensor, event_shape: torch.Size) -> torch.Size:
    batch = x.shape[: x.dim() - len(event_shape)]
    if x.shape[len(batch) :] != event_shape:
        raise ValueError(f"points must end in {tuple(event_shape)}, got shape {tuple(x.shape)}")
    return batch
