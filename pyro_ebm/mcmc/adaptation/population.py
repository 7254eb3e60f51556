"""Which chains are out: far above the others' potentials."""

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.state import to_device

FAR = 5.0  # deviations
WIDE = 3.0  # times the deviation of the potential of a Gaussian

TOLERATED = 0.01  # of a chain's height
HOPELESS = 20.0  # nats of height for each dimension
LEAST_RESTED = 20  # transitions


class Population:
    """Compares the potentials of the chains of each target, window by window.

    A chain is *out* if its mean potential over the last window is more than five deviations above
    the median of all chains'. The deviation is the larger of that between chains (1.48 times the
    median distance from the median) and the median of those within chains. So a cloud that comes in
    together has no chain out; a single chain is never out, nor is one of the lower half.

    It is *stranded* if it rests 20 nats for each dimension above the median: its potential, over a
    window of at least 20 transitions, scatters as in a mode, and its mean is that of the window
    before. (One that comes in, however slowly, falls all the time.) A mode there has no part of the
    distribution to speak of, unless it is wider than the others by a factor of e^20 in every
    dimension.

    Args:
        targets: number of targets.
        dim: dimension of a position.

    Attributes:
        out: whether a chain is out, boolean, shape ``(chains,)``; None before the first look.
        stranded: whether it is stranded, boolean, shape ``(chains,)``; None before the second.
        settled: whether no chain is out, and potentials differ as little as in a Gaussian.
    """

    def __init__(self, targets: int, dim: int):
        self.targets, self.dim = targets, dim
        self.out: Tensor | None = None
        self.stranded: Tensor | None = None
        self.settled = False
        self._before: Tensor | None = None  # the mean potentials of the window before
        self._center: Tensor | None = None  # the medians
        self._count = 0
        self._mean: Tensor | None = None
        self._moment: Tensor | None = None

    def add(self, potential: Tensor) -> None:
        """Adds the potentials of one transition, shape ``(chains,)``."""
        new = potential.double()
        mean = torch.zeros_like(new) if self._mean is None else self._mean
        moment = torch.zeros_like(new) if self._moment is None else self._moment
        self._count += 1
        moved = mean + (new - mean) / self._count
        self._mean, self._moment = moved, moment + (new - mean) * (new - moved)

    def look(self, ranks: ProcessGroup) -> None:
        """Judges the chains by what was added since the last look; a collective call."""
        if self._mean is None or self._moment is None:
            return
        deviation = (self._moment / self._count).sqrt().nan_to_num(torch.inf)
        own, rested = self._mean, deviation
        mean, deviation = (ranks.rows(x).reshape(-1, self.targets) for x in (self._mean, deviation))
        center = mean.median(0).values
        between = 1.4826 * (mean - center).abs().median(0).values
        spread = torch.maximum(between, deviation.median(0).values)
        farthest = (center + FAR * spread).nan_to_num(torch.inf)
        self.out = ~(self._mean.reshape(-1, self.targets) <= farthest).reshape(-1)
        usual = max(1.0, self.dim / 2) ** 0.5  # the deviation of a Gaussian's potential
        self._center, before, self.stranded = center, self._before, None
        if before is not None and len(before) == len(own) and self._count >= LEAST_RESTED:
            height = (own.reshape(-1, self.targets) - center).reshape(-1)
            rests = (rested < WIDE * usual) & ((own - before).abs() < WIDE * usual)
            self.stranded = self.out & rests & (height > HOPELESS * self.dim)
        self._before = own
        self.settled = not ranks.any(self.out | (spread > WIDE * usual).any())
        self._count, self._mean, self._moment = 0, None, None

    def forget(self, chains: Tensor) -> None:
        """Takes chains, boolean, ``(chains,)``, for new ones, whose potentials may yet fall."""
        if self._before is not None:
            self._before = torch.where(chains, torch.inf, self._before)

    def starts_anew(self, z: Tensor, first: Tensor, together: int) -> Tensor:
        """Where chains that are stranded start anew, shape ``(chains, dim)``.

        Chains of a super-chain go on from one start. One that is stranded takes the place of
        another that is not, so that it still has that start, or all of them a new one.

        Args:
            z: positions, shape ``(chains, dim)``.
            first: as many first positions, of which each super-chain takes one.
            together: how many chains of a target a super-chain has.
        """
        if self.stranded is None:
            return z
        # (super-chains, chains of one, targets)
        stranded = self.stranded.reshape(-1, together, self.targets)
        here, anew = (x.reshape(*stranded.shape, -1) for x in (z, first))
        good_ones_first = stranded.int().argsort(dim=1, stable=True)
        num_good = together - stranded.sum(1, keepdim=True)
        turn = torch.arange(together, device=z.device)[:, None] % num_good.clamp(min=1)
        other = here.take_along_dim(good_ones_first.gather(1, turn)[..., None], 1)
        return torch.where((num_good > 0)[..., None], other, anew[:, :1]).reshape(z.shape)

    def inside(self, z: Tensor) -> Tensor:
        """The weight 1 of chains that are not out, 0 of those that are, shape ``(chains,)``."""
        if self.out is None or len(self.out) != len(z):
            return z.new_ones(len(z))
        return (~self.out).to(z.dtype)

    def tolerance(self, potential: Tensor) -> Tensor:
        """The error of energy that a chain which is out may make on its way in, ``(chains,)``.

        A hundredth of its height above the median. A potential of 1e7 in single precision is known
        to 1, and that of a recursion much less well: rounding would reject all steps of a chain
        that starts there, however short they are, and shorten them for ever.
        """
        if self._center is None or self.out is None or len(self.out) != len(potential):
            return torch.zeros_like(potential)
        height = potential.reshape(-1, self.targets) - self._center.to(potential.dtype)
        return (TOLERATED * height.clamp(min=0).reshape(-1)).where(self.out, 0.0)

    def mean(self, x: Tensor, ranks: ProcessGroup) -> Tensor:
        """The mean over the chains that are not out, of ``(chains of a target, targets, ...)``."""
        rows = x.unsqueeze(-1) if x.dim() == 2 else x
        weight = self.inside(rows.flatten(0, 1)).reshape(*rows.shape[:2], 1)
        total = ranks.total(torch.cat([(weight * rows).sum(0), weight.sum(0)], -1))
        return (total[:, :-1] / total[:, -1:]).reshape(x.shape[1:])

    def state_dict(self) -> Saved:
        """What was seen so far, for :meth:`load_state_dict`."""
        return {
            "out": self.out,
            "settled": self.settled,
            "count": self._count,
            "mean": self._mean,
            "moment": self._moment,
            "center": self._center,
            "before": self._before,
        }

    def load_state_dict(self, state: Saved, device: torch.device) -> None:
        """Goes on from where another one was."""
        self._count, self.settled = state["count"], state["settled"]
        self.out, self._mean, self._moment, self._center, self._before = (
            to_device(state[name], device) for name in ("out", "mean", "moment", "center", "before")
        )
