"""What a run of many chains keeps, and what it shows while it runs."""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions.transforms import Transform
from tqdm.auto import tqdm

from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.models.sites.site import Site, to_support

BLOCK_BYTES = 2**22  # collected before a store has to take them
TOGETHER = 32  # draws written at once: a copy costs less than its call
POSITION = "z"


class DrawBuffer:
    """Positions and statistics of all chains, flat and unconstrained, collected block by block.

    Args:
        potential: tells the sites.
        keep: the names of the sites to keep.
        num_draws: how many draws will be added at most.
        thinning: every ``thinning``-th transition is a draw.
        state: of the chains, tells their number.
        store: takes a block when it is full.

    Attributes:
        seen: transitions so far.
        count: draws so far.
        first: how many of them the store has.
    """

    def __init__(
        self,
        potential: Potential,
        keep: list[str],
        num_draws: int,
        thinning: int,
        state: State,
        store: "Store",
    ):
        self.thinning, self.store = thinning, store
        self.seen = self.count = self.first = 0
        chains = state.z.shape[0]
        sites = [site for site in potential.sites if site.name in keep]
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
        """As every :class:`Store`."""
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


class Chain:
    """The unconstrained draws of one chain that runs by itself."""

    def __init__(self) -> None:
        self.warmup: list[dict[str, Tensor]] = []
        self.warmup_stats: list[dict[str, Any]] = []
        self.draws: list[dict[str, Tensor]] = []


def stack(
    chains: list[list[dict[str, Tensor]]], transforms: Mapping[str, Transform] | None
) -> dict[str, Tensor]:
    """Each site's draws in its support, shape ``(chains, draws, *site)``."""
    if not chains[0]:
        return {}
    found = {}
    for name in chains[0][0]:
        z = torch.stack([torch.stack([params[name] for params in chain]) for chain in chains])
        transform = (transforms or {}).get(name)
        found[name] = z if transform is None else to_support(transform, z)
    return found


def warmup_fields_of(chains: list[Chain]) -> dict[str, Tensor]:
    """The statistics of each warmup step, shape ``(chains, steps)``; none of Pyro's own kernels."""
    names = chains[0].warmup_stats[0] if chains[0].warmup_stats else {}
    return {
        name: torch.tensor([[stats[name] for stats in chain.warmup_stats] for chain in chains])
        for name in names
    }


def fields_of(
    diagnostics: list[dict[str, Any]], num_draws: int, thinning: int
) -> dict[str, Tensor]:
    """The statistics of each draw from what the kernel of each chain says at its end.

    Args:
        diagnostics: one dict for each chain, with all ``"sample_stats"``, or ``"divergences"``.
        num_draws: how many draws there are after thinning; an interrupt may leave a statistic more.
        thinning: every ``thinning``-th transition is a draw.

    Returns:
        Shapes ``(chains, draws)``.
    """
    thin = slice(thinning - 1, thinning * num_draws, thinning)
    if all("sample_stats" in reported for reported in diagnostics):
        stats = [reported["sample_stats"] for reported in diagnostics]
        return {name: torch.stack([s[name][thin] for s in stats]) for name in stats[0]}
    if all("divergences" in reported for reported in diagnostics):
        steps = torch.arange(thinning * num_draws)
        rows = [
            torch.isin(steps, torch.tensor(reported["divergences"])) for reported in diagnostics
        ]
        return {"diverging": torch.stack(rows)[:, thin]}
    return {}


def cut_short(got: int, wanted: int, what: str = "draws per chain") -> None:
    """Warns that a run was cut short."""
    warnings.warn(f"interrupted: {got} of {wanted} {what} are kept", stacklevel=3)


class Bar:
    """A progress bar that asks the chains for numbers only when it redraws.

    Args:
        total: number of transitions.
        num_chains: how many chains each of them moves.
        disable: whether to show nothing.
        chain: the chain, if they run one after another.
        done: how many of them were made before.
    """

    EVERY = 0.2
    """Seconds between two looks at the chains."""

    def __init__(
        self, total: int, num_chains: int, disable: bool, chain: int | None = None, done: int = 0
    ):
        self.label = f"{num_chains} chain{'s' * (num_chains > 1)}"
        if chain is not None:
            self.label = f"chain {chain}"
        self.bar = tqdm(
            total=total, disable=disable, desc=self.label, mininterval=self.EVERY, initial=done
        )
        self.shown = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def update(self, stage: str, kernel: MCMCKernel, info: Info | None = None) -> None:
        """Counts a transition; without its ``info``, the kernel's ``logging`` is shown."""
        self.bar.update()
        if self.bar.disable:
            return
        now, last = time.monotonic(), self.bar.n == self.bar.total
        if now - self.shown < self.EVERY and not last:
            return
        self.shown = now
        self.bar.set_description(f"{stage}, {self.label}", refresh=False)
        if info is None:
            text = ", ".join(f"{name} {value}" for name, value in (kernel.logging() or {}).items())
        else:
            assert isinstance(kernel, Kernel)
            rate = float(info.accept_prob.mean())
            step_size = float(kernel.adaptation.step_size.mean())
            text = f"acceptance {rate:.2f}, step size {step_size:.2e}"
        self.bar.set_postfix_str(text, refresh=last)
