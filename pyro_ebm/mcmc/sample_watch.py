r"""What ``UnnormalizedEnergy.sample`` can say of its chains at no further cost.

From the moments of each of its chains, kept as the chains go, comes

.. math:: \hat R = \sqrt{\frac{N - 1}{N} + \frac{\operatorname{var} \bar z_c}{W}},

with :math:`\bar z_c` the means of the chains and W the mean of their variances. Chains of a hundred
steps that mix have 1 to 1.1, a few that mix badly 2 or 3, so that a limit of ten says nothing of
those. Where the chains sit in modes that are k widths apart it is about k / 2.

Where chains left the region of their starts far behind, the density further out on the rays from
it through the chains is looked at. If it falls no faster than :math:`r^{-d}` there, it has no
finite integral on these rays, as :mod:`pyro_ebm.normalizer.tails` explains: chains go on for ever.

Reference:
    Gelman and Rubin (1992), Inference from iterative simulation using multiple sequences.
"""

import math

import torch
from torch import Tensor

from pyro_ebm.diagnostics.convergence import FINITE_Z, Finding
from pyro_ebm.mcmc.potentials.base import Potential

LIMIT = 10.0
"""R-hat above it is told."""
MIN_DRAWS, MIN_CHAINS = 20, 4
"""Of fewer draws of each chain, or fewer chains, R-hat tells nothing."""
FAR = 20.0
"""Chains are far out if they are so many times as far from the middle of their starts as those."""
OUTWARDS = (10.0, 100.0)
"""How many times further out the density is looked at."""


class SampleWatch:
    """Looks at the chains of ``sample``.

    Args:
        potential: of the energy.
        z: where chains start, shape ``(chains, dim)``, ``targets`` of them in a row.

    Example:
        >>> from pyro_ebm.mcmc.potentials.energy import EnergyPotential
        >>> z = torch.linspace(-2, 2, 8)[:, None]
        >>> watch = SampleWatch(EnergyPotential(UnnormalizedEnergy(lambda x: -(x**2))), z)
        >>> [finding.kind for finding in watch.findings(100 * z)]
        ['run_off']
    """

    def __init__(self, potential: Potential, z: Tensor):
        self.potential, self.start = potential, z
        self.mean, self.square, self.num = torch.zeros_like(z), torch.zeros_like(z), 0

    def add(self, z: Tensor) -> None:
        """Counts a draw of each chain, shape ``(chains, dim)``."""
        self.num += 1
        step = z - self.mean
        self.mean = self.mean + step / self.num
        self.square = self.square + step * (z - self.mean)

    def findings(self, z: Tensor, compare: bool = True) -> list[Finding]:
        """What is wrong with the last states of the chains.

        Args:
            z: the states, shape ``(chains, dim)``.
            compare: whether chains are compared by R-hat.
        """
        found = self._run_off(z) or (self._r_hat() if compare else None)
        return [] if found is None else [found]

    def _r_hat(self) -> Finding | None:
        shape = (-1, self.potential.targets, self.mean.shape[-1])
        mean, square = self.mean.reshape(shape), self.square.reshape(shape)
        if self.num < MIN_DRAWS or len(mean) < MIN_CHAINS:
            return None
        within = square.mean(0) / (self.num - 1)
        between = mean.var(0)
        r_hat = torch.where(within > 0, (between / within + 1 - 1 / self.num).sqrt(), 0.0)
        worst = float(r_hat.nan_to_num(0.0).max())
        if not worst > LIMIT:
            return None
        return Finding(
            "r_hat",
            f"R-hat is {worst:.3g}: the chains do not agree, each stays in a part of the density,"
            " and how many draws a part has depends on where chains start",
            [
                "more steps (num_steps=)",
                "base= that has the parts in about their shares",
                "MCMC with TemperingKernel, which crosses between far modes",
                "noise_conditional, whose chains come down noise levels",
            ],
        )

    def _run_off(self, z: Tensor) -> Finding | None:
        middle = self.start.median(0).values
        ray, wide = z - middle, (self.start - middle).abs().max().clamp(min=1.0)
        far = ~(ray.abs().amax(-1) <= FAR * wide)
        if not far.any():
            return None
        near, there = (self.potential(middle + times * ray) for times in OUTWARDS)
        least = z.shape[-1] * math.log(OUTWARDS[1] / OUTWARDS[0])
        slow = (there - near < least) | (there == -math.inf)
        slow = slow | ~(max(OUTWARDS) * ray).isfinite().all(-1)  # out of the numbers
        if not (slow & far).sum() > far.sum() / 2:
            return None
        return Finding(
            "run_off",
            f"{int(far.sum())} of {len(far)} chains ran off, to {float(z.abs().max()):.2g}, and the"
            " density does not fall further out: the energy may have no finite Z",
            [FINITE_Z],
        )
