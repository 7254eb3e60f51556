"""Points of the densities of :mod:`pyro_ebm.datasets.planar`.

Each function takes the number ``n`` of points, the settings of the density, and a generator; by
default random numbers are torch's own, which ``pyro.set_rng_seed`` seeds.
"""

import math

from torch import Generator, Tensor

from pyro_ebm.datasets.planar import (
    Checkerboard,
    EightGaussians,
    Pinwheel,
    Rings,
    SwissRoll,
    TwoMoons,
)


def eight_gaussians(
    n: int, noise: float = 0.5 / math.sqrt(2), generator: Generator | None = None
) -> Tensor:
    """Points ``(n, 2)`` of :class:`EightGaussians`.

    Example:
        >>> eight_gaussians(1000).shape
        torch.Size([1000, 2])
    """
    return EightGaussians(noise).draw(n, generator)


def two_moons(n: int, noise: float = 0.2, generator: Generator | None = None) -> Tensor:
    """Points ``(n, 2)`` of :class:`TwoMoons`.

    Example:
        >>> x = two_moons(1000, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(x, two_moons(1000, generator=torch.Generator().manual_seed(0)))
        True
    """
    return TwoMoons(noise).draw(n, generator)


def swiss_roll(n: int, noise: float = 0.2, generator: Generator | None = None) -> Tensor:
    """Points ``(n, 2)`` of :class:`SwissRoll`.

    Example:
        >>> swiss_roll(1000).shape
        torch.Size([1000, 2])
    """
    return SwissRoll(noise).draw(n, generator)


def rings(n: int, noise: float = 0.15, generator: Generator | None = None) -> Tensor:
    """Points ``(n, 2)`` of :class:`Rings`.

    Example:
        >>> rings(1000).shape
        torch.Size([1000, 2])
    """
    return Rings(noise).draw(n, generator)


def checkerboard(n: int, generator: Generator | None = None) -> Tensor:
    """Points ``(n, 2)`` of :class:`Checkerboard`.

    Example:
        >>> checkerboard(1000).abs().max() < 4
        tensor(True)
    """
    return Checkerboard().draw(n, generator)


def pinwheel(n: int, num_blades: int = 5, generator: Generator | None = None) -> Tensor:
    """Points ``(n, 2)`` of :class:`Pinwheel`.

    Example:
        >>> pinwheel(1000).shape
        torch.Size([1000, 2])
    """
    return Pinwheel(num_blades).draw(n, generator)
