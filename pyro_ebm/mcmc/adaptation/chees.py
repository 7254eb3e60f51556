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

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.mcmc.adaptation.warmup import to_device
from pyro_ebm.mcmc.ranks import current
from pyro_ebm.mcmc.state import State


def van_der_corput(n: int) -> float:
    """The ``n``-th number of the sequence 1/2, 1/4, 3/4, 1/8, 5/8, ...: the bits of n, mirrored.

    Example:
        >>> [van_der_corput(n) for n in range(1, 6)]
        [0.5, 0.25, 0.75, 0.125, 0.625]
    """
    mirrored = int(f"{n:b}"[::-1], 2)
    return mirrored / 2.0 ** n.bit_length()


class Learned(NamedTuple):
    """What warmup knows of the trajectory length."""

    length: Tensor
    """:math:`T`, shape ``(targets,)``."""
    log_mean: Tensor
    """A running average of its logarithm, shape ``(targets,)``."""
    recent: Tensor
    """How steep the last climbs were, shape ``(MEMORY, targets)``, those to come first and 0."""
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
    """Rows of chains, shape ``(chains per group, targets, ...)``."""
    return x.unflatten(0, (-1, targets))


def around(known: Learned, mean: Tensor) -> Tensor:
    """The mean of about the second half of all positions so far; the first one of itself alone.

    Args:
        known: what was known before.
        mean: of the positions now, shape ``(targets, dim)``.
    """
    t = known.t + 1
    return torch.lerp(known.center, mean, 1 / (t - t // 2))


def slopes(
    center: Tensor,
    start: State,
    end: State,
    momentum: Tensor,
    time: Tensor,
    weight: Tensor,
    inverse_mass_sqrt: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r"""How steep :math:`\log C(T) / T^{1/4}` is at the trajectories, and what they weigh.

    Args:
        center: the mean position, shape ``(targets, dim)``.
        start: where they started.
        end: where they ended, accepted or not.
        momentum: the momenta at their ends, shape ``(chains, dim)``.
        time: how long they took, shape ``(chains,)``.
        weight: the probabilities with which they were accepted, shape ``(chains,)``.
        inverse_mass_sqrt: the factor of the inverse mass matrix.

    Returns:
        The weighted sum of the slopes and the sum of the weights, both of shape ``(targets,)``.
    """
    targets = center.shape[0]
    z = torch.stack([start.z, end.z]).unflatten(1, (-1, targets)) - center
    w = z if inverse_mass_sqrt is None else _whiten(inverse_mass_sqrt, z)
    momentum, time, weight = (by_target(x, targets) for x in (momentum, time, weight))
    #   T^a  d/d(log T)  E(|w'|^2 - |w|^2)^2 / T^a,  where  dw'/d(log T) = t p'
    before, after = w.square().sum(-1)
    jump = after - before
    rise = time * (w[1] * momentum).sum(-1)
    slope = jump * torch.sub(rise, jump, alpha=EXPONENT / 4)  # but for a factor of 4
    known = slope.isfinite()  # a trajectory that went astray tells nothing, and weighs nothing
    slope, weight = torch.where(known, slope, 0.0), torch.where(known, weight, 0.0)
    return (weight * slope).sum(0), weight.sum(0)


def ascend(known: Learned, center: Tensor, slope: Tensor, weight: Tensor, most: Tensor) -> Learned:
    """What is known after a transition.

    Args:
        known: what was known before.
        center: the mean position now, shape ``(targets, dim)``.
        slope: the weighted sum of the slopes, shape ``(targets,)``.
        weight: the sum of the weights, shape ``(targets,)``.
        most: the longest :math:`T` that can be, shape ``(targets,)``.
    """
    length, t = known.length, known.t + 1
    slope = slope / weight.clamp_min(1e-10)
    if known.since:  # in units of how large it was of late: its own size must not weigh the average
        scale = known.recent.sum(0) / min(known.since, MEMORY)
        step = slope / scale.clamp_min(torch.finfo(slope.dtype).tiny)
        longer = (length * (step.clamp(-2, 2) * (RATE / t**0.5)).exp()).minimum(most)
        # chains that run away, as of an improper density, overflow and teach nothing
        length = torch.where(longer.isfinite(), longer, length)
    return Learned(
        length,
        torch.lerp(known.log_mean, length.log(), t**-0.75),
        torch.cat([known.recent[1:], slope.abs()[None]]),
        center,
        known.since + 1,
        t,
    )


class TrajectoryAdaptation:
    r"""The longest time :math:`T` of a trajectory, climbing :math:`C(T) / T^{1/4}` on a log scale.

    Args:
        length: the first :math:`T`, shape ``(targets,)``.
        dim: the dimension of a position.

    Attributes:
        known: what it has learned.
    """

    def __init__(self, length: Tensor, dim: int):
        recent, center = length.new_zeros(MEMORY, len(length)), length.new_zeros(len(length), dim)
        self.known = Learned(length, length.log(), recent, center, since=0, t=0)
        self.ranks = current()

    @property
    def length(self) -> Tensor:
        """:math:`T`, shape ``(targets,)``."""
        return self.known.length

    def start(self, length: Tensor) -> None:
        """Goes on from another :math:`T`, in other units."""
        self.known = self.known._replace(
            length=length,
            log_mean=length.log(),
            recent=torch.zeros_like(self.known.recent),
            since=0,
        )

    def update(
        self,
        start: State,
        end: State,
        momentum: Tensor,
        time: Tensor,
        weight: Tensor,
        inverse_mass_sqrt: Tensor | None,
        most: Tensor,
    ) -> None:
        """Learns from the trajectories of one transition: arguments as for :func:`slopes`.

        Args:
            start: see there.
            end: see there.
            momentum: see there.
            time: see there.
            weight: see there.
            inverse_mass_sqrt: see there.
            most: as for :func:`ascend`.
        """
        known, ranks = self.known, self.ranks
        center = around(known, ranks.mean(by_target(start.z, len(known.length))))
        slope, total = slopes(center, start, end, momentum, time, weight, inverse_mass_sqrt)
        if ranks.size > 1:
            slope, total = ranks.total(torch.stack([slope, total]))
        self.known = ascend(known, center, slope, total, most)

    def remeasure(self, old: Tensor, new: Tensor, usual: float) -> None:
        r"""Expresses a :math:`T` above the usual one in the units of a better factor.

        Args:
            old: the factor :math:`L`, as ``precondition`` takes it.
            new: the one in its place.
            usual: what :math:`T` will hardly be less than.
        """
        # z = L w = L' w':  |w| is up to |L^{-1} L'| times as long as |w'|
        if old.dim() == 2:
            ratio = (new / old).amax(-1)
        else:
            ratio = torch.linalg.solve_triangular(old, new, upper=False)
            ratio = torch.linalg.matrix_norm(ratio, 2)
        length = (self.length / ratio).maximum(self.length.clamp(max=usual))
        self.start(torch.where(length.isfinite(), length, self.length))

    def finish(self) -> None:
        """Settles on the average."""
        self.known = self.known._replace(length=self.known.log_mean.exp())

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, see :meth:`load_state_dict`."""
        return self.known._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one was."""
        device = self.length.device
        self.known = Learned(**{name: to_device(x, device) for name, x in state.items()})


def _whiten(inverse_mass_sqrt: Tensor, z: Tensor) -> Tensor:
    r"""The product :math:`L^{-1} z`, of ``z`` of shape ``(..., targets, dim)``."""
    if inverse_mass_sqrt.dim() == 2:
        return z / inverse_mass_sqrt
    columns = z.flatten(end_dim=-3).permute(1, 2, 0)
    solved = torch.linalg.solve_triangular(inverse_mass_sqrt, columns, upper=False)
    return solved.permute(2, 0, 1).reshape(z.shape)
