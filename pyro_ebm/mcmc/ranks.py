r"""The chains of a run: all in one process, or shared out over the ranks of a process group.

What warmup learns it learns from all chains: means of acceptance probabilities, medians of step
sizes, covariances of positions. Of chains that are shared out each of these is a *collective call*
(:mod:`pyro_ebm.ops.distributed`), in which every rank takes part. All ranks make the same calls in
the same order: none may depend on what a rank's own chains do. And all get the same numbers, to the
last bit, so that a step size, a mass matrix or a trajectory length is one for all chains.

A kernel asks for its population once, when it is bound to a potential (:func:`current`).
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_ebm.ops.distributed import RankError, gathered, rank, rank_seed, world_size


class ProcessGroup:
    """Chains that are all in this process; the base of :class:`RankedPopulation`.

    Attributes:
        size: the number of ranks.
        rank: which of them this is.
    """

    size, rank = 1, 0

    def here(self, num_chains: int) -> slice:
        """Which of this many chains are in this process."""
        return slice(0, num_chains)

    def any(self, x: Tensor) -> bool:
        """Whether any element of any rank is true."""
        return bool(x.any())

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the rows of all ranks, of shape ``(*shape)`` for rows ``(n, *shape)``."""
        return x.mean(0)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, elementwise."""
        return x

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all chains, shape ``(rows of all, *shape)``, of those here."""
        return x

    def to_first(self, x: Tensor) -> Tensor | None:
        """The rows of all chains on rank 0, of those here; elsewhere None."""
        return x

    def from_first(self, x: Tensor) -> Tensor:
        """What rank 0 has, of the shape and dtype of what is here."""
        return x

    def seed(self, alike: bool = False) -> None:
        """Seeds the ranks from one number of rank 0: each its own way, or all alike."""

    def check_alike(self, x: Tensor, what: str) -> None:
        """Raises a ValueError if ``x`` is not the same on all ranks, up to rounding."""

    @contextlib.contextmanager
    def fail_together(self, what: str) -> Iterator[None]:
        """An error within it, on one rank, is one on all; there are no collective calls in it.

        Args:
            what: what they do there.

        Raises:
            RankError: on the others; it names the rank.
        """
        yield


class RankedPopulation(ProcessGroup):
    """Chains that are shared out over the ranks of a process group, evenly and in order.

    Args:
        num_chains: how many chains there are.

    Raises:
        ValueError: for fewer chains than ranks.
    """

    def __init__(self, num_chains: int):
        self.num_chains, self.size, self.rank = num_chains, world_size(), rank()
        if num_chains < self.size:
            raise ValueError(
                f"num_chains={num_chains} cannot be shared out over {self.size} ranks: give each at"
                " least one"
            )
        self._shares = shares(num_chains, self.size)

    def here(self, num_chains: int) -> slice:
        """Which of this many chains are on this rank."""
        parts = shares(num_chains, self.size)
        first = sum(parts[: self.rank])
        return slice(first, first + parts[self.rank])

    def any(self, x: Tensor) -> bool:
        """As every population's."""
        return bool(self.total(x.any().float()) > 0)

    def mean(self, x: Tensor) -> Tensor:
        """As every population's."""
        #   sum_r sum_i x_ri  /  sum_r n_r
        total = self.total(torch.cat([x.sum(0).flatten(), x.new_tensor([len(x)])]))
        return (total[:-1] / total[-1]).reshape(x.shape[1:])

    def total(self, x: Tensor) -> Tensor:
        """As every population's."""
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = x.detach().to(where, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.to(x.device)

    def rows(self, x: Tensor) -> Tensor:
        """As every population's."""
        counts = self._counts(x)
        padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
        return torch.cat([part[:n] for part, n in zip(gathered(padded), counts, strict=True)])

    def to_first(self, x: Tensor) -> Tensor | None:
        """The rows of all chains on rank 0, of those here; elsewhere None."""
        counts = self._counts(x)
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mine = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])]).to(where)
        parts = [torch.empty_like(mine) for _ in counts] if self.rank == 0 else None
        dist.gather(mine.contiguous(), parts)
        if parts is None:
            return None
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(x.device)

    def from_first(self, x: Tensor) -> Tensor:
        """As every population's."""
        return self.total(x if self.rank == 0 else torch.zeros_like(x))

    def seed(self, alike: bool = False) -> None:
        """As every population's."""
        number = int(self.from_first(torch.randint(2**62, ())))
        pyro.set_rng_seed(rank_seed(number, of=0 if alike else self.rank))

    def check_alike(self, x: Tensor, what: str) -> None:
        """As every population's."""
        first = self.from_first(x)
        tolerance = torch.finfo(x.dtype).eps ** 0.5
        if self.any(~torch.isclose(x, first, tolerance, tolerance, equal_nan=True)):
            raise ValueError(
                f"the ranks differ in {what}. All have to make the same calls, with the same model,"
                " data and parameters: build networks from one seed, or load them on each rank"
            )

    @contextlib.contextmanager
    def fail_together(self, what: str) -> Iterator[None]:
        """As every population's."""
        failed = True
        try:
            yield
            failed = False
        finally:
            everywhere = gathered(torch.tensor(failed).long())
        ranks = tuple(everywhere.nonzero().flatten().tolist())
        if ranks:
            names = ", ".join(map(str, ranks))
            raise RankError(f"{what} failed on rank{'s' * (len(ranks) > 1)} {names}", ranks)

    def _counts(self, x: Tensor) -> list[int]:
        """How many rows each rank has: as many for each chain as here."""
        each = len(x) // self._shares[self.rank]
        return [n * each for n in self._shares]


def shares(num_chains: int, size: int) -> list[int]:
    """How many chains each rank has.

    Example:
        >>> shares(64, 3)
        [22, 21, 21]
    """
    return [num_chains // size + (r < num_chains % size) for r in range(size)]


def process_group_of(num_chains: int, distributed: bool) -> ProcessGroup:
    """The chains of a run; those of a process on its own are all in it, ``distributed`` or not.

    Args:
        num_chains: how many chains there are.
        distributed: whether to share them out over the ranks of the process group.

    Raises:
        RuntimeError: under ``torchrun`` without a process group.
        ValueError: for fewer chains than ranks.

    Example:
        >>> process_group_of(64, distributed=True).size
        1
    """
    if not distributed:
        return ALONE
    if world_size() > 1:
        return RankedPopulation(num_chains)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        raise RuntimeError(
            "distributed=True needs the process group that torchrun starts, and this process has"
            " not joined it: call pyro_ebm.ops.distributed.join_group() first"
        )
    return ALONE


ALONE = ProcessGroup()
_current: ContextVar[ProcessGroup] = ContextVar("ranks", default=ALONE)


def current() -> ProcessGroup:
    """The population of kernels that are bound now, see :func:`binding_to`.

    Example:
        >>> current().size
        1
    """
    return _current.get()


@contextlib.contextmanager
def binding_to(ranks: ProcessGroup) -> Iterator[None]:
    """Kernels that are bound within it, and those inside of them, learn from this population."""
    token = _current.set(ranks)
    try:
        yield
    finally:
        _current.reset(token)
