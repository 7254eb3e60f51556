r"""Densities in the plane, between about -4 and 4 on both axes.

They are the usual ones of the density-estimation literature (Grathwohl et al., 2019, FFJORD), in
the same units. Of some the literature has draws alone; here each density is a formula. The moons
and the swiss roll are curves with Gaussian noise, an integral along the curve, by quadrature to
rounding error. The pinwheel turns a point by its distance from the centre, which keeps areas.

``TwoMoons()`` is a distribution, ``two_moons(n)`` of :mod:`pyro_ebm.datasets.draws` gives
``n`` points of it. Points have torch's
default dtype and lie on its default device, or on that of the generator.

Reference:
    Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud (2019), FFJORD.
"""

import math
from abc import abstractmethod
from functools import partial

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Generator, Tensor

from pyro_ebm.ops.arguments import check_count, check_number


class PlanarDistribution(TorchDistribution):
    """A density in the plane with exact draws.

    A member writes ``_draw`` and ``_log_density``.

    Example:
        >>> class Square(PlanarDistribution):
        ...     def _draw(self, n, **like):
        ...         return torch.rand(n, 2, **like)
        ...     def _log_density(self, value):
        ...         inside = ((value >= 0) & (value <= 1)).all(-1)
        ...         return torch.where(inside, 0.0, -torch.inf)
        >>> Square().sample((5, 3)).shape
        torch.Size([5, 3, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support: constraints.Constraint = constraints.real_vector
    has_rsample = False

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size((2,)))

    def draw(self, n: int, generator: Generator | None = None) -> Tensor:
        """Points, shape ``(n, 2)``.

        Args:
            n: how many.
            generator: the random numbers; by default torch's own, which ``pyro.set_rng_seed``
                seeds.
        """
        n = check_count("n", n, least=0)
        device = None if generator is None else generator.device
        with torch.no_grad():
            return self._draw(n, generator=generator, device=device)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Points, shape ``(*sample_shape, 2)``."""
        shape = torch.Size(sample_shape)
        return self.draw(shape.numel()).reshape(shape + (2,))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of points ``(*sample, 2)``, shape ``(*sample)``."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value)

    @abstractmethod
    def _draw(self, n: int, **like) -> Tensor:
        """Points ``(n, 2)``; ``like`` holds the generator and its device."""

    @abstractmethod
    def _log_density(self, value: Tensor) -> Tensor:
        """The log density of points ``(*sample, 2)``, shape ``(*sample)``."""


class EightGaussians(PlanarDistribution):
    r"""Eight normals on a circle of radius :math:`r = 4 / \sqrt 2`.

    .. math:: p(x) = \tfrac18 \sum_{k=0}^7 N(x; r (\cos \tfrac{k \pi}4, \sin \tfrac{k \pi}4), s^2 I)

    Args:
        noise: :math:`s`; by default the centre is eight of it from each mode.

    Example:
        >>> p = EightGaussians()
        >>> p.log_prob(torch.zeros(2))
        tensor(-31.7584)
    """

    radius = 4 / math.sqrt(2)

    def __init__(self, noise: float = 0.5 / math.sqrt(2)):
        self.noise = _positive("noise", noise)
        super().__init__()

    def _draw(self, n: int, **like) -> Tensor:
        angle = math.pi / 4 * torch.randint(8, (n,), **like)
        return self.radius * _on_circle(angle) + self.noise * torch.randn(n, 2, **like)

    def _log_density(self, value: Tensor) -> Tensor:
        means = self.radius * _on_circle(math.pi / 4 * torch.arange(8).to(value))
        return _log_mean_normal(value, means, self.noise)


class _NoisyCurves(PlanarDistribution):
    r"""Curves :math:`c_k(t)`, each as likely, with noise.

    .. math:: p(x) = \frac1K \sum_k \int_0^1 N(x; c_k(t), s^2 I) \, dt
    """

    max_speed: float
    """The largest :math:`|c_k'(t)|`."""

    def __init__(self, noise: float):
        self.noise = _positive("noise", noise)
        super().__init__()

    @abstractmethod
    def _curves(self, t: Tensor) -> Tensor:
        """Points of all curves at ``t``, shapes ``(n,) -> (K, n, 2)``."""

    def _draw(self, n: int, **like) -> Tensor:
        curves = self._curves(torch.rand(n, **like))
        which = (len(curves) * torch.rand(n, **like)).long()
        points = curves[which, torch.arange(n, device=which.device)]
        return points + self.noise * torch.randn(n, 2, **like)

    def _log_density(self, value: Tensor) -> Tensor:
        # Sixteen Gauss-Legendre nodes on each piece, along which the curve moves by 4 s at most.
        pieces = math.ceil(self.max_speed / (4 * self.noise))
        nodes, weights = np.polynomial.legendre.leggauss(16)
        t = (np.arange(pieces)[:, None] + (nodes + 1) / 2) / pieces
        centres = self._curves(torch.as_tensor(t.ravel()).to(value))
        log_weights = torch.as_tensor(np.log(weights / (2 * pieces))).to(value)
        log_weights = log_weights.repeat(len(centres) * pieces) - math.log(len(centres))
        return _log_mean_normal(value, centres.reshape(-1, 2), self.noise, log_weights)


class TwoMoons(_NoisyCurves):
    r"""Two half circles of radius 2 that reach into each other, with noise.

    .. math:: p(x) = \tfrac12 \sum_{k=0}^1 \int_0^1 N(x; c_k(t), s^2 I) \, dt, \quad
              c_0(t) = (2 \cos \pi t - 1, 2 \sin \pi t - \tfrac12), \quad c_1(t) = -c_0(t)

    Args:
        noise: :math:`s`; .2 is ``noise=0.1`` of scikit-learn's ``make_moons``, of half the size.

    Example:
        >>> p = TwoMoons()
        >>> p.log_prob(torch.tensor([[0.0, 0.0], [-1.0, 1.5]]))
        tensor([-10.5779,  -1.8393])
    """

    max_speed = 2 * math.pi

    def __init__(self, noise: float = 0.2):
        super().__init__(noise)

    def _curves(self, t: Tensor) -> Tensor:
        upper = 2 * _on_circle(math.pi * t) - t.new_tensor([1.0, 0.5])
        return torch.stack([-upper, upper])


class SwissRoll(_NoisyCurves):
    r"""A spiral of one and a half turns, with noise.

    .. math:: p(x) = \int_0^1 N(x; \tfrac15 a (\cos a, \sin a), s^2 I) \, dt, \qquad
              a = \tfrac32 \pi (1 + 2 t)

    Args:
        noise: :math:`s`; .2 is ``noise=1.0`` of scikit-learn's ``make_swiss_roll``, of a fifth of
            the size.

    Example:
        >>> p = SwissRoll()
        >>> p.log_prob(torch.tensor([[0.0, 0.0], [0.0, -0.9]]))
        tensor([-13.5567,  -2.2706])
    """

    max_speed = 0.6 * math.pi * math.sqrt(1 + (4.5 * math.pi) ** 2)

    def __init__(self, noise: float = 0.2):
        super().__init__(noise)

    def _curves(self, t: Tensor) -> Tensor:
        a = 1.5 * math.pi * (1 + 2 * t)
        return (a[:, None] / 5 * _on_circle(a))[None]


class Rings(PlanarDistribution):
    r"""Circles around the origin, each as likely, with noise.

    .. math:: p(x) = \frac1K \sum_k \frac1{2 \pi s^2} \exp\Big( -\frac{|x|^2 + r_k^2}{2 s^2} \Big)
              I_0\Big( \frac{|x| r_k}{s^2} \Big)

    with :math:`I_0` the modified Bessel function.

    Args:
        noise: :math:`s`.
        radii: :math:`r_k`.

    Example:
        >>> p = Rings()
        >>> p.log_prob(torch.tensor([[1.0, 0.0], [1.5, 0.0]]))
        tensor([-1.9555, -7.1803])
    """

    def __init__(self, noise: float = 0.15, radii: tuple[float, ...] = (1.0, 2.0, 3.0)):
        self.noise = _positive("noise", noise)
        self.radii = tuple(_positive("radii", radius) for radius in radii)
        super().__init__()

    def _draw(self, n: int, **like) -> Tensor:
        which = torch.randint(len(self.radii), (n,), **like)
        radius = torch.tensor(self.radii, device=which.device)[which]
        angle = 2 * math.pi * torch.rand(n, **like)
        return radius[:, None] * _on_circle(angle) + self.noise * torch.randn(n, 2, **like)

    def _log_density(self, value: Tensor) -> Tensor:
        # exp(-(rho^2 + r^2) / 2 s^2) I_0(rho r / s^2), where i0e(z) = exp(-z) I_0(z)
        rho, variance = value.norm(dim=-1, keepdim=True), self.noise**2
        radii = torch.tensor(self.radii).to(value)
        terms = torch.special.i0e(rho * radii / variance).log()
        terms = terms - (rho - radii).square() / (2 * variance)
        return terms.logsumexp(-1) - math.log(len(radii) * 2 * math.pi * variance)


class Checkerboard(PlanarDistribution):
    r"""Uniform on the eight dark squares, of side 2, of a board from -4 to 4.

    .. math:: p(x) = \tfrac1{32} \text{ on dark squares}, \quad 0 \text{ elsewhere}

    Example:
        >>> p = Checkerboard()
        >>> p.log_prob(torch.tensor([[-3.0, -3.0], [-1.0, -3.0]]))
        tensor([-3.4657,    -inf])
    """

    def _draw(self, n: int, **like) -> Tensor:
        column = torch.randint(4, (n,), **like)
        row = 2 * torch.randint(2, (n,), **like) + column % 2
        return 2 * (torch.stack([column, row], -1) + torch.rand(n, 2, **like)) - 4

    def _log_density(self, value: Tensor) -> Tensor:
        square = ((value + 4) / 2).floor()
        dark = (square.sum(-1) % 2 == 0) & ((square >= 0) & (square < 4)).all(-1)
        return torch.where(dark, -math.log(32), value.new_tensor(-math.inf))


class Pinwheel(PlanarDistribution):
    r"""Bent blades around the origin.

    With :math:`u \sim N((1, 0), \mathrm{diag}(.3^2, .1^2))` and a blade :math:`k` of :math:`K`, all
    as likely, a point is :math:`x = 2 R(2 \pi k / K + e^{|u|} / 4)\, u`. A rotation :math:`R` by an
    angle that depends on :math:`|u|` alone keeps areas, and so

    .. math:: p(x) = \frac1{4 K} \sum_k N(R(-2 \pi k / K - e^{|x| / 2} / 4)\, x / 2;
              (1, 0), \mathrm{diag}(.3^2, .1^2)) .

    Args:
        num_blades: :math:`K`.

    Reference:
        Johnson, Duvenaud, Wiltschko, Datta and Adams (2016), Composing graphical models with neural
        networks for structured representations and fast inference.

    Example:
        >>> p = Pinwheel()
        >>> p.log_prob(torch.zeros(2))
        tensor(-5.2732)
    """

    radial_sd, tangential_sd, rate, scale = 0.3, 0.1, 0.25, 2.0

    def __init__(self, num_blades: int = 5):
        self.num_blades = check_count("num_blades", num_blades)
        super().__init__()

    def _draw(self, n: int, **like) -> Tensor:
        u = torch.randn(n, 2, **like)
        u = u * u.new_tensor([self.radial_sd, self.tangential_sd]) + u.new_tensor([1.0, 0.0])
        blade = torch.randint(self.num_blades, (n,), **like)
        angle = 2 * math.pi * blade / self.num_blades + self.rate * u.norm(dim=-1).exp()
        return self.scale * _turned(u, angle)

    def _log_density(self, value: Tensor) -> Tensor:
        y = value[..., None, :] / self.scale
        blades = 2 * math.pi * torch.arange(self.num_blades).to(value) / self.num_blades
        u = _turned(y, -blades - self.rate * y.norm(dim=-1).exp())
        along, across = (u[..., 0] - 1) / self.radial_sd, u[..., 1] / self.tangential_sd
        area = 2 * math.pi * self.radial_sd * self.tangential_sd * self.scale**2
        total = (-(along.square() + across.square()) / 2).logsumexp(-1)
        return total - math.log(self.num_blades * area)


def _positive(name: str, value: float) -> float:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _on_circle(angle: Tensor) -> Tensor:
    """Points of the unit circle, ``(*batch) -> (*batch, 2)``."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def _turned(u: Tensor, angle: Tensor) -> Tensor:
    """Points ``(*batch, 2)`` turned by angles ``(*batch)``."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * u[..., 0] - sin * u[..., 1], sin * u[..., 0] + cos * u[..., 1]], -1)


def _log_mean_normal(
    x: Tensor, means: Tensor, sd: float, log_weights: Tensor | None = None
) -> Tensor:
    """The log of a mixture of normals at ``means``, ``(k, 2)``, all of one sd."""
    weights = torch.zeros_like(means[:, 0]) - math.log(len(means))
    weights = weights if log_weights is None else log_weights
    # |x - m| itself: |x|^2 - 2 x m + |m|^2 would lose digits that a small sd needs
    distance = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    exponents = [  # (points, k) is large: a block of points at a time
        (weights - distance(block, means).square() / (2 * sd**2)).logsumexp(-1)
        for block in x.reshape(-1, 2).split(max(2**20 // len(means), 1))
    ]
    return torch.cat(exponents).reshape(x.shape[:-1]) - math.log(2 * math.pi * sd**2)
