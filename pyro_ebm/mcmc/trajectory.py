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

from pyro_ebm.mcmc.adaptation import to_device
from pyro_ebm.mcmc.engine import Engine
from pyro_ebm.mcmc.kernel import State
from pyro_ebm.mcmc.population import current


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
    """:math:`T`, shape ``(groups,)``."""
    log_mean: Tensor
    """A running average of its logarithm, shape ``(groups,)``."""
    recent: Tensor
    """How steep the last climbs were, shape ``(MEMORY, groups)``, those to come first and 0."""
    since: Tensor
    """How many there were since the last start, shape ``()``."""
    center: Tensor
    """The mean position, shape ``(groups, dim)``."""
    t: Tensor
    """The number of updates, shape ``()``."""


EXPONENT = 0.25
RATE = 0.25  # of the first update; the t-th one's is this over the root of t
MEMORY = 30  # updates


def by_group(x: Tensor, groups: int) -> Tensor:
    """Rows of chains, shape ``(chains per group, groups, ...)``."""
    return x.unflatten(0, (-1, groups))


def around(known: Learned, mean: Tensor) -> Tensor:
    """The mean of about the second half of all positions so far; the first one of itself alone.

    Args:
        known: what was known before.
        mean: of the positions now, shape ``(groups, dim)``.
    """
    t = known.t + 1
    return torch.lerp(known.center, mean, 1 / (t - (t / 2).floor()))


def slopes(
    center: Tensor,
    start: State,
    end: State,
    momentum: Tensor,
    time: Tensor,
    weight: Tensor,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r"""How steep :math:`\log C(T) / T^{1/4}` is at the trajectories, and what they weigh.

    Args:
        center: the mean position, shape ``(groups, dim)``.
        start: where they started.
        end: where they ended, accepted or not.
        momentum: the momenta at their ends, shape ``(chains, dim)``.
        time: how long they took, shape ``(chains,)``.
        weight: the probabilities with which they were accepted, shape ``(chains,)``.
        factor: the factor of the inverse mass matrix.

    Returns:
        The weighted sum of the slopes and the sum of the weights, both of shape ``(groups,)``.
    """
    groups = center.shape[0]
    center = center.repeat(start.z.shape[0] // groups, 1)
    w, new_w = (_whiten(factor, x.z - center) for x in (start, end))
    #   T^a  d/d(log T)  E(|w'|^2 - |w|^2)^2 / T^a,  where  dw'/d(log T) = t p'
    jump = new_w.square().sum(-1) - w.square().sum(-1)
    slope = 4 * jump * (new_w * momentum).sum(-1) * time - EXPONENT * jump.square()
    slope = torch.where((weight > 0) & slope.isfinite(), slope, 0.0)
    slope, weight = by_group(slope, groups), by_group(weight, groups)
    return (weight * slope).sum(0), weight.sum(0)


def ascend(known: Learned, center: Tensor, slope: Tensor, weight: Tensor, most: Tensor) -> Learned:
    """What is known after a transition.

    Args:
        known: what was known before.
        center: the mean position now, shape ``(groups, dim)``.
        slope: the weighted sum of the slopes, shape ``(groups,)``.
        weight: the sum of the weights, shape ``(groups,)``.
        most: the longest :math:`T` that can be, shape ``(groups,)``.
    """
    length, t = known.length, known.t + 1
    slope = slope / weight.clamp_min(1e-10)
    # in units of how large it was of late: its own size must not weigh the average
    scale = known.recent.sum(0) / known.since.clamp(1, MEMORY)
    step = RATE / t.sqrt() * (slope / scale.clamp_min(torch.finfo(slope.dtype).tiny)).clamp(-2, 2)
    length = torch.where(known.since > 0, (length * step.exp()).minimum(most), length)
    return Learned(
        length,
        torch.lerp(known.log_mean, length.log(), t**-0.75),
        torch.cat([known.recent[1:], slope.abs()[None]]),
        known.since + 1,
        center,
        t,
    )


def climb(
    known: Learned,
    start: State,
    end: State,
    momentum: Tensor,
    time: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    most: Tensor,
) -> Learned:
    """What is known after the trajectories of one transition, all here: a pure function.

    Args:
        known: what was known before.
        start: as the others, for :func:`slopes`.
        end: see there.
        momentum: see there.
        time: see there.
        weight: see there.
        factor: see there.
        most: as for :func:`ascend`.
    """
    center = around(known, by_group(start.z, len(known.length)).mean(0))
    slope, total = slopes(center, start, end, momentum, time, weight, factor)
    return ascend(known, center, slope, total, most)


class TrajectoryAdaptation:
    r"""The longest time :math:`T` of a trajectory, climbing :math:`C(T) / T^{1/4}` on a log scale.

    Args:
        length: the first :math:`T`, shape ``(groups,)``.
        dim: the dimension of a position.
        engine: says whether to run :func:`climb` as a graph; of chains that are shared out over
            ranks, :func:`slopes`, which is what comes before the sums over them.

    Attributes:
        known: what it has learned.
    """

    def __init__(self, length: Tensor, dim: int, engine: Engine | None = None):
        zero = length.new_zeros(())
        recent, center = length.new_zeros(MEMORY, len(length)), length.new_zeros(len(length), dim)
        self.known = Learned(length, length.log(), recent, zero, center, zero)
        self.population = current()
        function = climb if self.population.size == 1 else slopes
        self._engine = (engine or Engine(function)).sibling(function)

    @property
    def length(self) -> Tensor:
        """:math:`T`, shape ``(groups,)``."""
        return self.known.length

    def start(self, length: Tensor) -> None:
        """Goes on from another :math:`T`, in other units."""
        recent, since = torch.zeros_like(self.known.recent), torch.zeros_like(self.known.since)
        self.known = self.known._replace(
            length=length, log_mean=length.log(), recent=recent, since=since
        )

    def update(
        self,
        start: State,
        end: State,
        momentum: Tensor,
        time: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        most: Tensor,
    ) -> None:
        """Learns from the trajectories of one transition: arguments as for :func:`climb`."""
        known, over, details = self.known, self.population, (end, momentum, time, weight, factor)
        if over.size == 1:
            self.known = self._engine(known, start, *details, most)
            return
        center = around(known, over.mean(by_group(start.z, len(known.length))))
        slope, total = over.total(torch.stack(self._engine(center, start, *details)))
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
        self.start((self.length / ratio).maximum(self.length.clamp(max=usual)))

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


def _whiten(factor: Tensor | None, v: Tensor) -> Tensor:
    r"""The product :math:`L^{-1} v`, arguments as for ``precondition``."""
    if factor is None:
        return v
    grouped = v.unflatten(0, (-1, factor.shape[0]))
    if factor.dim() == 2:
        return (grouped / factor).reshape(v.shape)
    solved = torch.linalg.solve_triangular(factor, grouped.permute(1, 2, 0), upper=False)
    return solved.permute(2, 0, 1).reshape(v.shape)
