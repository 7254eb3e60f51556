r"""Five sets of points in the plane, each with its exact density.

Most are the usual ones of the density-estimation literature (Grathwohl et al., 2019, FFJORD), in
the same units, between about -4 and 4. Two are changed a little so that the density is a formula:
the moons are arcs with Gaussian noise (an integral over the arc, by quadrature to machine
precision), and the pinwheel turns a point by its distance from the centre, which keeps areas.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ToySet(ABC):
    """Points ``(n, 2)`` to draw, and their log density."""

    name: str

    @abstractmethod
    def sample(self, n: int) -> Tensor:
        """Draws, shape ``(n, 2)``."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log density of points ``(*batch, 2)``, shape ``(*batch)``."""


def log_normal(x: Tensor, mean: Tensor | float, sd: float) -> Tensor:
    """An isotropic normal in the plane: ``(*batch, 2) -> (*batch)``."""
    return -(x - mean).square().sum(-1) / (2 * sd**2) - math.log(2 * math.pi * sd**2)


class EightGaussians(ToySet):
    """Eight modes on a circle, eight standard deviations across from centre to mode."""

    name = "eight_gaussians"
    radius, sd = 4 / math.sqrt(2), 0.5 / math.sqrt(2)

    def __init__(self):
        angle = torch.arange(8) * math.pi / 4
        self.means = self.radius * torch.stack([angle.cos(), angle.sin()], -1)

    def sample(self, n: int) -> Tensor:
        return self.means[torch.randint(8, (n,))] + self.sd * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        terms = [log_normal(x, mean.to(x), self.sd) for mean in self.means]
        return torch.stack(terms).logsumexp(0) - math.log(8)


class TwoMoons(ToySet):
    """Two half circles that reach into each other, with noise."""

    name = "two_moons"
    sd, num_nodes = 0.2, 200

    @staticmethod
    def curve(angle: Tensor, lower: Tensor) -> Tensor:
        """The point of an arc at an angle in (0, pi)."""
        upper_moon = torch.stack([angle.cos(), angle.sin()], -1)
        lower_moon = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
        return 2 * torch.where(lower[..., None], lower_moon, upper_moon) - torch.tensor([1.0, 0.5])

    def sample(self, n: int) -> Tensor:
        angle, lower = math.pi * torch.rand(n), torch.rand(n) < 0.5
        return self.curve(angle, lower) + self.sd * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        # p(x) = 1/2 sum_moons 1/pi int_0^pi N(x; c(t), sd^2) dt, at midpoints of t: in x the nodes
        # are 0.03 apart, a sixth of the noise.
        angle = math.pi * (torch.arange(self.num_nodes) + 0.5) / self.num_nodes
        lower = torch.tensor([[False], [True]]).expand(2, self.num_nodes)
        nodes = self.curve(angle.expand(2, -1), lower).reshape(-1, 2)
        exponents = [  # (points, nodes) is large: a block of points at a time
            (-torch.cdist(block, nodes).square() / (2 * self.sd**2)).logsumexp(-1)
            for block in x.reshape(-1, 2).split(10_000)
        ]
        constant = math.log(len(nodes) * 2 * math.pi * self.sd**2)
        return torch.cat(exponents).reshape(x.shape[:-1]) - constant


class Rings(ToySet):
    """Three circles, equally likely, with noise."""

    name = "rings"
    radii, sd = (1.0, 2.0, 3.0), 0.15

    def sample(self, n: int) -> Tensor:
        radius = torch.tensor(self.radii)[torch.randint(len(self.radii), (n,))]
        angle = 2 * math.pi * torch.rand(n)
        x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
        return x + self.sd * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        # A circle of radius r blurred by N(0, s^2), at distance rho:
        #   exp(-(rho^2 + r^2) / 2 s^2) I_0(rho r / s^2) / (2 pi s^2)
        rho, variance = x.norm(dim=-1), self.sd**2
        terms = [
            -((rho - r) ** 2) / (2 * variance) + torch.special.i0e(rho * r / variance).log()
            for r in self.radii
        ]
        constant = math.log(len(self.radii) * 2 * math.pi * variance)
        return torch.stack(terms).logsumexp(0) - constant


class Checkerboard(ToySet):
    """Uniform on the eight black squares, of side 2, of a board from -4 to 4."""

    name = "checkerboard"

    def sample(self, n: int) -> Tensor:
        column = torch.randint(4, (n,))
        row = 2 * torch.randint(2, (n,)) + column % 2
        return 2 * (torch.stack([column, row], -1) + torch.rand(n, 2)) - 4

    def log_prob(self, x: Tensor) -> Tensor:
        square = ((x + 4) / 2).floor()
        black = (square.sum(-1) % 2 == 0) & ((square >= 0) & (square < 4)).all(-1)
        return torch.where(black, -math.log(32), -math.inf)


class Pinwheel(ToySet):
    r"""Five blades: a normal of standard deviations 0.6 along and 0.2 across, bent.

    With :math:`u \sim N((1, 0), diag(0.3^2, 0.1^2))`, a point is
    :math:`x = 2 R(2 \pi k / 5 + e^{|u|} / 4)\, u`. A rotation by an angle that depends on
    :math:`|u|` alone keeps areas: the density is that of :math:`u`, by 4.
    """

    name = "pinwheel"
    blades, radial_sd, tangential_sd, rate, scale = 5, 0.3, 0.1, 0.25, 2.0

    def turn(self, u: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        return torch.stack(
            [cos * u[..., 0] - sin * u[..., 1], sin * u[..., 0] + cos * u[..., 1]], -1
        )

    def sample(self, n: int) -> Tensor:
        u = torch.randn(n, 2) * torch.tensor([self.radial_sd, self.tangential_sd])
        u = u + torch.tensor([1.0, 0.0])
        blade = 2 * math.pi * torch.randint(self.blades, (n,)) / self.blades
        return self.scale * self.turn(u, blade + self.rate * u.norm(dim=-1).exp())

    def log_prob(self, x: Tensor) -> Tensor:
        y = x / self.scale
        twist = self.rate * y.norm(dim=-1).exp()
        terms = []
        for k in range(self.blades):
            u = self.turn(y, -2 * math.pi * k / self.blades - twist)
            along = (u[..., 0] - 1) / self.radial_sd
            across = u[..., 1] / self.tangential_sd
            terms.append(-(along**2 + across**2) / 2)
        constant = 2 * math.pi * self.radial_sd * self.tangential_sd * self.blades * self.scale**2
        return torch.stack(terms).logsumexp(0) - math.log(constant)


TOY_SETS: dict[str, ToySet] = {
    toy.name: toy for toy in (EightGaussians(), TwoMoons(), Rings(), Checkerboard(), Pinwheel())
}


def grid(half_width: float = 6.0, points: int = 480) -> tuple[Tensor, float]:
    """Midpoints of the cells of a square, shape ``(points, points, 2)``, and a cell's area.

    The first index goes up the second coordinate, as in a picture.
    """
    side = 2 * half_width / points
    axis = -half_width + side * (torch.arange(points) + 0.5)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1), side**2
