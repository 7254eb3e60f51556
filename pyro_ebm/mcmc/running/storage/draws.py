"""The draws of many chains at once, collected block by block and kept in memory or a store."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.models.sites.site import Site, to_support

BLOCK_BYTES = 2**22  # collected before a store has to take them
TOGETHER = 32  # draws written at once: a copy costs less than its call
POSITION = "z"


class DrawBuffer:
    """Positions and statistics of all chains, flat and unconstrained, collected block by block.

    Args:
        potential: of the model, with its sites.
        sites: those to keep, in the order of the position.
        num_draws: how many draws will be added at most.
        thinning: every ``thinning``-th transition is a draw.
        state: of the chains, at their start.
        store: takes a block when it is full.

    Attributes:
        seen: transitions so far.
        count: draws so far.
        first: how many of them the store has.
    """

    def __init__(
        self,
        potential: Potential,
        sites: Sequence[Site],
        num_draws: int,
        thinning: int,
        state: State,
        store: "Store",
    ):
        self.thinning, self.store = thinning, store
        self.seen = self.count = self.first = 0
        chains = state.z.shape[0]
        self.columns: Tensor | None = None
        if len(sites) < len(potential.sites):
            columns = torch.arange(potential.dim, device=state.z.device).split(potential.sizes)
            of_site = dict(zip(potential.names, columns, strict=True))
            self.columns = torch.cat([of_site[site.name] for site in sites])
        dim = sum(site.shape.numel() for site in sites)
        z = state.z.new_empty(0, chains, dim)
        self.size = min(num_draws, draws_in_a_block(z))
        self.block = {POSITION: state.z.new_empty(self.size, chains, dim)}
        self.lp_name = potential.lp_name
        for name in (self.lp_name, "acceptance_rate", "step_size"):
            self.block[name] = state.potential.new_empty(self.size, chains)
        diverging = torch.empty_like(self.block["step_size"], dtype=torch.bool)
        self.block["diverging"] = diverging
        self._unwritten: list[tuple[Tensor, ...]] = []
        self._rows = 0  # written in the block
        self.store.put(self.tail())

    def add(self, state: State, info: Info, step_size: Tensor, own: Mapping[str, Tensor]) -> None:
        """Takes what a transition gave; the step size is that it was made with."""
        self.seen += 1
        if self.seen % self.thinning:
            return
        # references, written later: a kernel makes new tensors, and changes none
        z = state.z if self.columns is None else state.z[:, self.columns]
        for name, value in own.items():
            if name not in self.block:
                self.block[name] = value.new_empty(self.block["step_size"].shape)
        values = (z, state.potential, info.accept_prob, step_size, info.diverging, *own.values())
        if self._unwritten and self._unwritten[-1][3].shape != step_size.shape:
            self._write()  # chains had step sizes of their own until now
        self._unwritten.append(values)
        self.count += 1
        if self.count - self.first == self.size:
            self.flush()
        elif len(self._unwritten) == TOGETHER:
            self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        start, stop = self._rows, self._rows + len(self._unwritten)
        columns = zip(*self._unwritten, strict=True)
        for (name, rows), values in zip(self.block.items(), columns, strict=True):
            stacked = torch.stack(values)
            rows[start:stop] = -stacked if name == self.lp_name else stacked
        self._rows, self._unwritten = stop, []
        self.count = self.first + stop  # an interrupt may have come before it was counted

    def tail(self) -> dict[str, Tensor]:
        """The draws that the store does not have yet, each of shape ``(draws, chains, ...)``."""
        self._write()
        return {name: rows[: self._rows] for name, rows in self.block.items()}

    def flush(self) -> None:
        """Gives them to the store."""
        if self.count > self.first:
            self.store.put(self.tail())
            self.first, self._rows = self.count, 0

    def go_on(self, seen: int, first: int, tail: Mapping[str, Tensor]) -> None:
        """Goes on from where other draws were, whose first ones the store has."""
        self.seen, self.first = seen, first
        self._rows = len(tail[POSITION]) if tail else 0
        self.count = first + self._rows
        for name, rows in tail.items():
            if name not in self.block:
                shape = self.block["step_size"].shape
                device = self.block["step_size"].device
                self.block[name] = torch.empty(shape, dtype=rows.dtype, device=device)
            self.block[name][: len(rows)] = rows.to(self.block[name].device)


def draws_in_a_block(z: Tensor) -> int:
    """How many draws are collected at a time, of positions ``(draws, chains, dim)``."""
    _, chains, dim = z.shape
    return max(1, BLOCK_BYTES // (chains * (dim + 4) * z.element_size()))


class Store(Protocol):
    """Where draws are kept."""

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Appends draws, each of shape ``(draws, chains, ...)``."""


class Memory:
    """Draws in the memory of a device.

    Args:
        num_draws: how many there will be.
        device: where.
        first: how many draws came before, which are kept elsewhere.
    """

    def __init__(self, num_draws: int, device: torch.device, first: int = 0):
        self.num_draws, self.device = num_draws, device
        self.first = self.count = first
        self.values: dict[str, Tensor] = {}

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Appends draws, each of shape ``(draws, chains, ...)``."""
        here, num = self.count - self.first, len(rows[POSITION])
        for name, value in rows.items():
            if name not in self.values:
                shape = (self.num_draws, *value.shape[1:])
                self.values[name] = torch.empty(shape, dtype=value.dtype, device=self.device)
            self.values[name][here : here + num] = value
        self.count += num

    def clear(self) -> None:
        """Forgets the draws, which were read."""
        self.first, self.values = self.count, {}

    def rows(self, first: int) -> dict[str, Tensor]:
        """The draws from this one on, each of shape ``(draws, chains, ...)``."""
        part = slice(first - self.first, self.count - self.first)
        return {name: value[part] for name, value in self.values.items()}


def samples_of(
    rows: Mapping[str, Tensor], sites: Sequence[Site], transforms: Mapping[str, Transform]
) -> dict[str, Tensor]:
    """Each site's draws in its support, shape ``(chains, draws, *site)``.

    Args:
        rows: what :class:`DrawBuffer` collected.
        sites: those that were kept, in the order of the position.
        transforms: from the supports to the reals.
    """
    z = rows[POSITION].transpose(0, 1)
    parts = z.split([site.shape.numel() for site in sites], -1)
    found = {}
    for site, part in zip(sites, parts, strict=True):
        value = part.reshape(z.shape[:-1] + site.shape).to(site.dtype)
        transform = transforms.get(site.name)
        found[site.name] = value if transform is None else to_support(transform, value)
    return dict(sorted(found.items()))


def statistics_of(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of each draw, shape ``(chains, draws)``."""
    return {name: stat.T.contiguous() for name, stat in rows.items() if name != POSITION}
