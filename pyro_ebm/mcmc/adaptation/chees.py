r"""How long Hamiltonian trajectories should be, learned from many chains.

A trajectory that is too short walks at random; one that is too long comes back. Let
:math:`w = L^{-1} (z - \mathrm{E} z)` be a position in whitened coordinates, and :math:`w'` the one
where its trajectory ends after a time :math:`t`. ChEES, the *change in the estimator of the
expected square*, measures how far the squared radius moves,

.. math:: C(T) = \mathrm{E} \left( |w'|^2 - |w|^2 \right)^2, \qquad t \sim U(0, T),

and warmup climbs :math:`C(T) / T^{1/4}` by stochastic gradients over all chains, of all ranks
where they are shared out. (:math:`C` alone is flat where trajectories turn back, so that :math:`T`
would wander off; :math:`C / T` makes them so short that means suffer. On a standard normal the
exponents 0, 1/4, 1/2, 1 give :math:`T` = 2.25, 2.09, 1.93, 1.57.) The times are not drawn but
follow the van der Corput sequence, which spreads evenly over :math:`(0, T)` in any run of
transitions; each transition by itself leaves the target invariant.

Reference:
    Hoffman, Radul and Sountsov (2021), An adaptive MCMC scheme for setting trajectory lengths in
    Hamiltonian Monte Carlo. Sountsov and Hoffman (2022), Focusing on difficult directions for
    learning HMC trajectory lengths (the quotient by :math:`T`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.population import Population
from pyro_ebm.mcmc.ranks import current
from pyro_ebm.mcmc.state import State, to_device
from pyro_ebm.ops.steps.precondition import Factor, LowRank, whiten


def van_der_corput(n: int) -> float:
    """The ``n``-th number of the sequence 1/2, 1/4, 3/4, 1/8, 5/8, ...: the bits of n, mirrored.

    Example:
        >>> [van_der_corput(n) for n in range(1, 6)]
        [0.5, 0.25, 0.75, 0.125, 0.625]
    """
    mirrored = int(f"{n:b}"[::-1], 2)
    return mirrored / 2.0 ** n.bit_length()


class Learned(NamedTuple):
    """The state of the search for a trajectory length."""

    length: Tensor
    """:math:`T`, shape ``(targets,)``."""
    log_mean: Tensor
    """A running average of its logarithm, shape ``(targets,)``."""
    recent: Tensor
    """The sizes of the last slopes, shape ``(MEMORY, targets)``, those to come first and 0."""
    center: Tensor
    """The mean position, shape ``(targets, dim)``."""
    since: int
    """The number of updates since the last start."""
    t: int
    """The number of all updates."""


EXPONENT = 0.25
RATE = 0.25  # of the first update; the t-th one's is this over the root of t
MEMORY = 30  # updates


def by_target(x: Tensor, targets: int) -> Tensor:
    """Chains ``(chains, ...)`` as rows, one of each target: shape ``(rows, targets, ...)``."""
    return x.unflatten(0, (-1, targets))


def updated_center(learned: Learned, mean: Tensor) -> Tensor:
    """The mean of about the second half of all positions so far, shape ``(targets, dim)``.

    Args:
        learned: the state before.
        mean: of the positions now, shape ``(targets, dim)``.
    """
    t = learned.t + 1
    return torch.lerp(learned.center, mean, 1 / (t - t // 2))


def slopes(
    center: Tensor,
    start: State,
    end: State,
    momentum: Tensor,
    time: Tensor,
    weight: Tensor,
    inverse_mass_sqrt: Factor | None,
) -> tuple[Tensor, Tensor]:
    r"""The slope of :math:`\log C(T) / T^{1/4}`, from the trajectories of one transition.

    Args:
        center: the mean position, shape ``(targets, dim)``.
        start: the states where they started.
        end: the states where they ended, accepted or not.
        momentum: the momenta at their ends, shape ``(chains, dim)``.
        time: their lengths :math:`t`, shape ``(chains,)``.
        weight: the probabilities with which they were accepted, shape ``(chains,)``.
        inverse_mass_sqrt: :math:`L` of the inverse mass matrix.

    Returns:
        The weighted sum of the slopes and the sum of the weights, both of shape ``(targets,)``.
    """
    targets = center.shape[0]
    z = torch.stack([start.z, end.z]).unflatten(1, (-1, targets)) - center
    w = whiten(inverse_mass_sqrt, z.flatten(0, 2)).reshape(z.shape)
    momentum, time, weight = (by_target(x, targets) for x in (momentum, time, weight))
    #   T^a  d/d(log T)  E(|w'|^2 - |w|^2)^2 / T^a,  where  dw'/d(log T) = t p'
    before, after = w.square().sum(-1)
    jump = after - before
    rise = time * (w[1] * momentum).sum(-1)
    slope = jump * torch.sub(rise, jump, alpha=EXPONENT / 4)  # but for a factor of 4
    finite = slope.isfinite()  # a trajectory that diverged has no weight
    slope, weight = torch.where(finite, slope, 0.0), torch.where(finite, weight, 0.0)
    return (weight * slope).sum(0), weight.sum(0)


def ascend(
    learned: Learned, center: Tensor, slope: Tensor, weight: Tensor, most: Tensor
) -> Learned:
    """The state after one more transition.

    Args:
        learned: the state before.
        center: the mean position now, shape ``(targets, dim)``.
        slope: the weighted sum of the slopes, shape ``(targets,)``.
        weight: the sum of the weights, shape ``(targets,)``.
        most: the longest :math:`T` that can be, shape ``(targets,)``.
    """
    length, t = learned.length, learned.t + 1
    slope = slope / weight.clamp_min(1e-10)
    if learned.since:  # in units of its recent size, so that no single slope decides the average
        scale = learned.recent.sum(0) / min(learned.since, MEMORY)
        step = slope / scale.clamp_min(torch.finfo(slope.dtype).tiny)
        longer = (length * (step.clamp(-2, 2) * (RATE / t**0.5)).exp()).minimum(most)
        # chains that run away, as of an improper density, overflow: then it stays
        length = torch.where(longer.isfinite(), longer, length)
    return Learned(
        length,
        torch.lerp(learned.log_mean, length.log(), t**-0.75),
        torch.cat([learned.recent[1:], slope.abs()[None]]),
        center,
        learned.since + 1,
        t,
    )


class TrajectoryAdaptation:
    r"""The longest time :math:`T` of a trajectory, climbing :math:`C(T) / T^{1/4}` on a log scale.

    Args:
        length: the first :math:`T`, shape ``(targets,)``.
        dim: the dimension of a position.

    Attributes:
        learned: the state of the search.
    """

    def __init__(self, length: Tensor, dim: int):
        recent, center = length.new_zeros(MEMORY, len(length)), length.new_zeros(len(length), dim)
        self.learned = Learned(length, length.log(), recent, center, since=0, t=0)
        self.ranks = current()

    @property
    def length(self) -> Tensor:
        """:math:`T`, shape ``(targets,)``."""
        return self.learned.length

    def start(self, length: Tensor) -> None:
        """Goes on from another :math:`T`, in other units."""
        self.learned = self.learned._replace(
            length=length,
            log_mean=length.log(),
            recent=torch.zeros_like(self.learned.recent),
            since=0,
        )

    def update(
        self,
        start: State,
        end: State,
        momentum: Tensor,
        time: Tensor,
        weight: Tensor,
        inverse_mass_sqrt: Factor | None,
        most: Tensor,
        population: Population | None = None,
    ) -> None:
        """Takes a step up the slope that the trajectories of one transition have.

        Args:
            start: as for :func:`slopes`.
            end: as for :func:`slopes`.
            momentum: as for :func:`slopes`.
            time: as for :func:`slopes`.
            weight: as for :func:`slopes`.
            inverse_mass_sqrt: as for :func:`slopes`.
            most: as for :func:`ascend`.
            population: tells which chains are out, and have no part in the mean position.
        """
        learned, ranks = self.learned, self.ranks
        z = by_target(start.z, len(learned.length))
        mean = ranks.mean(z) if population is None else population.mean(z, ranks)
        center = updated_center(learned, mean)
        slope, total = slopes(center, start, end, momentum, time, weight, inverse_mass_sqrt)
        if ranks.size > 1:
            slope, total = ranks.total(torch.stack([slope, total]))
        self.learned = ascend(learned, center, slope, total, most)

    def remeasure(self, old: Factor, new: Factor, usual: float) -> None:
        r"""Expresses a :math:`T` above the usual one in the units of a new mass matrix.

        Of low rank it stays as it is.

        Args:
            old: :math:`L` of the inverse mass matrix so far.
            new: :math:`L` of the new one.
            usual: :math:`T` is not made shorter than this.
        """
        # z = L w = L' w':  |w| is up to |L^{-1} L'| times as long as |w'|
        if isinstance(old, LowRank) or isinstance(new, LowRank):
            ratio = torch.ones_like(self.length)
        elif old.dim() == 2:
            ratio = (new / old).amax(-1)
        else:
            ratio = torch.linalg.solve_triangular(old, new, upper=False)
            ratio = torch.linalg.matrix_norm(ratio, 2)
        length = (self.length / ratio).maximum(self.length.clamp(max=usual))
        self.start(torch.where(length.isfinite(), length, self.length))

    def finish(self) -> None:
        r"""Sets :math:`T` to its running average."""
        self.learned = self.learned._replace(length=self.learned.log_mean.exp())

    def state_dict(self) -> Saved:
        """The state of the search, for :meth:`load_state_dict`."""
        return self.learned._asdict()

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another one was."""
        device = self.length.device
        self.learned = Learned(**{name: to_device(x, device) for name, x in state.items()})
