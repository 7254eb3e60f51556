"""Small data sets to learn on and to judge by.

``planar`` holds densities in the plane, distributions with exact draws and an exact ``log_prob``,
and ``draws`` a function for each that gives points of it. ``images`` holds handwritten digits,
clothes, and the spins of an Ising model.
"""

from pyro_ebm.datasets.draws import (
    checkerboard,
    eight_gaussians,
    pinwheel,
    rings,
    swiss_roll,
    two_moons,
)
from pyro_ebm.datasets.images import LabelledImages, digits, fashion_mnist, ising
from pyro_ebm.datasets.planar import (
    Checkerboard,
    EightGaussians,
    Pinwheel,
    PlanarDistribution,
    Rings,
    SwissRoll,
    TwoMoons,
)

__all__ = [
    "Checkerboard",
    "EightGaussians",
    "LabelledImages",
    "Pinwheel",
    "PlanarDistribution",
    "Rings",
    "SwissRoll",
    "TwoMoons",
    "checkerboard",
    "digits",
    "eight_gaussians",
    "fashion_mnist",
    "ising",
    "pinwheel",
    "rings",
    "swiss_roll",
    "two_moons",
]
