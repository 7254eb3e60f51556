r"""The chains of a run: all in one process, or shared out over the ranks of a process group.

What warmup learns it learns from all chains: means of acceptance probabilities, medians of step
sizes, covariances of positions. Of chains that are shared out each of these is a *collective call*
(:mod:`pyro_ebm.ops.distributed`), in which every rank takes part. All ranks make the same calls in
the same order: none may depend on what a rank's own chains do. And all get the same numbers, to the
last bit, so that a step size, a mass matrix or a trajectory length is one for all chains.

A kernel reads its group once, when it is bound to a potential (:func:`current`).
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_ebm.ops.distributed import fail_together, gathered, rank, rank_seed, world_size


class ProcessGroup:
    """The ranks that share out the chains of a run, evenly and in order; by default one has all.

    Every method but :meth:`here` is a collective call where there are several ranks.

    Args:
        num_chains: how many chains there are.
        size: the number of ranks.
        rank: which of them this is.

    Raises:
        ValueError: for fewer chains than ranks.
    """

    def __init__(self, num_chains: int = 1, size: int = 1, rank: int = 0):
        if num_chains < size:
            raise ValueError(
                f"num_chains={num_chains} cannot be shared out over {size} ranks: give each at"
                " least one"
            )
        self.num_chains, self.size, self.rank = num_chains, size, rank
        self._shares = shares(num_chains, size)

    def here(self, num_chains: int) -> slice:
        """Which of this many chains are on this rank."""
        parts = shares(num_chains, self.size)
        first = sum(parts[: self.rank])
        return slice(first, first + parts[self.rank])

    def any(self, x: Tensor) -> bool:
        """Whether any element of any rank is true."""
        return bool(self.total(x.any().float()) > 0) if self.size > 1 else bool(x.any())

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the rows of all ranks, of shape ``(*shape)`` for rows ``(n, *shape)``."""
        if self.size == 1:
            return x.mean(0)
        #   sum_r sum_i x_ri  /  sum_r n_r
        total = self.total(torch.cat([x.sum(0).flatten(), x.new_tensor([len(x)])]))
        return (total[:-1] / total[-1]).reshape(x.shape[1:])

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, elementwise."""
        if self.size == 1:
            return x
        total = x.detach().to(_transport(), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.to(x.device)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all chains, shape ``(rows of all, *shape)``, of those here."""
        if self.size == 1:
            return x
        parts = gathered(self._padded(x))
        return torch.cat([part[:n] for part, n in zip(parts, self._counts(x), strict=True)])

    def to_first(self, x: Tensor) -> Tensor | None:
        """The rows of all chains on rank 0, of those here; elsewhere None."""
        if self.size == 1:
            return x
        mine, counts = self._padded(x).to(_transport()), self._counts(x)
        parts = [torch.empty_like(mine) for _ in counts] if self.rank == 0 else None
        dist.gather(mine.contiguous(), parts)
        if parts is None:
            return None
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(x.device)

    def from_first(self, x: Tensor) -> Tensor:
        """What rank 0 has, of the shape and dtype of what is here."""
        return self.total(x if self.rank == 0 else torch.zeros_like(x))

    def seed(self, alike: bool = False) -> None:
        """Seeds the ranks from one number of rank 0: each its own way, or all alike."""
        if self.size == 1:
            return
        number = int(self.from_first(torch.randint(2**62, ())))
        pyro.set_rng_seed(rank_seed(number, of=0 if alike else self.rank))

    def check_alike(self, x: Tensor, what: str) -> None:
        """Raises a ValueError if ``x`` is not the same on all ranks, up to rounding."""
        if self.size == 1:
            return
        first = self.from_first(x)
        tolerance = torch.finfo(x.dtype).eps ** 0.5
        if self.any(~torch.isclose(x, first, tolerance, tolerance, equal_nan=True)):
            raise ValueError(
                f"the ranks differ in {what}. All have to make the same calls, with the same model,"
                " data and parameters: build networks from one seed, or load them on each rank"
            )

    def fail_together(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Within it an error on one rank is one on all, a ``RankError`` that names it."""
        return fail_together(what) if self.size > 1 else contextlib.nullcontext()

    def _counts(self, x: Tensor) -> list[int]:
        """How many rows each rank has: as many for each chain as here."""
        each = len(x) // self._shares[self.rank]
        return [n * each for n in self._shares]

    def _padded(self, x: Tensor) -> Tensor:
        """The rows here, with zeros up to as many as the rank with most has."""
        return torch.cat([x, x.new_zeros(max(self._counts(x)) - len(x), *x.shape[1:])])


def _transport() -> str:
    """The kind of device on which the ranks exchange tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def shares(num_chains: int, size: int) -> list[int]:
    """How many chains each rank has.

    Example:
        >>> shares(64, 3)
        [22, 21, 21]
    """
    return [num_chains // size + (r < num_chains % size) for r in range(size)]


def process_group_of(
    num_chains: int, distributed: bool, num_superchains: int | None = None
) -> ProcessGroup:
    """The chains of a run; those of a process on its own are all in it, ``distributed`` or not.

    Args:
        num_chains: how many chains there are.
        distributed: whether to share them out over the ranks of the process group.
        num_superchains: how many super-chains they form; each is on one rank.

    Raises:
        RuntimeError: under ``torchrun`` without a process group.
        ValueError: for fewer chains than ranks, or super-chains that cannot be shared out evenly.

    Example:
        >>> process_group_of(64, distributed=True).size
        1
    """
    if not distributed:
        return ALONE
    if world_size() > 1:
        if num_superchains is not None and num_superchains % world_size():
            raise ValueError(
                f"num_superchains={num_superchains} must be a multiple of the {world_size()} ranks,"
                " so that the chains of a super-chain start on one of them"
            )
        return ProcessGroup(num_chains, world_size(), rank())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        raise RuntimeError(
            "distributed=True needs the process group that torchrun starts, and this process has"
            " not joined it: call pyro_ebm.ops.distributed.join_group() first"
        )
    return ALONE


ALONE = ProcessGroup()
_current: ContextVar[ProcessGroup] = ContextVar("ranks", default=ALONE)


def current() -> ProcessGroup:
    """The group of kernels that are bound now, see :func:`binding_to`.

    Example:
        >>> current().size
        1
    """
    return _current.get()


@contextlib.contextmanager
def binding_to(ranks: ProcessGroup) -> Iterator[None]:
    """Kernels that are bound within it, and those inside of them, learn from all these ranks."""
    token = _current.set(ranks)
    try:
        yield
    finally:
        _current.reset(token)
