r"""Collective calls of processes that compute together, and errors that name a missing one.

``torch.distributed`` calls them *ranks* of a process group. A script that ``torchrun`` starts has
a group after :func:`join_group`, or ``torch.distributed.init_process_group()``; outside one there
is one rank, and everything here answers at once.

A rank that dies is reported by ``torchrun``, which names it and stops or restarts them all. A rank
that *hangs* is not: the others wait, and end with a timeout that names no one.
:func:`naming_ranks` names it. On a group of its own, every rank that is left sends one number to
every other and waits for theirs; a rank that sends none is missing.
"""

import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_ebm.ops.arguments import first_line


class RankError(RuntimeError):
    """A rank of the process group is gone or hangs; the message names it.

    Args:
        message: what happened.
        ranks: the missing ranks.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def join_group(timeout: float = 600.0, backend: str | None = None) -> None:
    """Joins the process group that ``torchrun`` starts; in a script on its own it does nothing.

    As ``torch.distributed.init_process_group``, but that it works when ``torchrun`` starts the
    ranks of one machine again. (They meet at a store that ``torchrun`` keeps, and would find the
    addresses of the dead there. Over several machines, start ``torchrun`` with
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` in its environment.)

    Args:
        timeout: seconds after which a collective call fails, when another rank does not take part.
        backend: ``"gloo"``, ``"nccl"``, or what torch chooses for the machine's devices.

    Example:
        >>> join_group()
        >>> world_size()
        1
    """
    if "RANK" not in os.environ or _in_group():
        return
    env, wait = os.environ, datetime.timedelta(seconds=timeout)
    me, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    kept = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (kept and env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]):
        dist.init_process_group(backend, timeout=wait)
        return
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False, timeout=wait)
    attempt = f"attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # of its own for each
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=wait)


def world_size(group: "dist.ProcessGroup | None" = None) -> int:
    """How many ranks compute together; 1 outside a process group.

    Args:
        group: a ``torch.distributed`` process group; by default that of all ranks.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size(group) if _in_group() else 1


def rank(group: "dist.ProcessGroup | None" = None) -> int:
    """Which of them this process is, from 0; 0 outside a process group.

    Args:
        group: a ``torch.distributed`` process group; by default that of all ranks.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank(group) if _in_group() else 0


def rank_seed(seed: int, of: int | None = None) -> int:
    """A seed for each rank, all from one: streams of random numbers that differ.

    Build networks before, from one seed; what then draws noise or moves chains must not draw the
    same numbers on every rank.

    Args:
        seed: the seed of the whole run.
        of: the rank; by default this one.

    Returns:
        An integer in :math:`[0, 2^{32})`, as ``pyro.set_rng_seed`` takes it.

    Example:
        >>> pyro.set_rng_seed(rank_seed(0))
        >>> rank_seed(0, of=0) == rank_seed(0, of=1)
        False
    """
    of = rank() if of is None else of
    digest = hashlib.sha256(f"pyro_ebm/{int(seed)}/{of}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def gathered(value: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The values of all ranks, detached; a collective call, of one shape and dtype everywhere.

    Args:
        value: shape ``(*shape)``.
        group: a ``torch.distributed`` process group; by default that of all ranks.

    Returns:
        Shape ``(ranks, *shape)``; outside a process group ``(1, *shape)``.

    Example:
        >>> gathered(torch.tensor([1.0, 2.0]))
        tensor([[1., 2.]])
    """
    value, device = value.detach(), value.device
    size = world_size(group)
    if size == 1:
        return value[None].clone()
    if dist.get_backend(group) == "nccl":  # which takes tensors on its devices only
        value = value.cuda()
    parts = value.new_zeros((size,) + value.shape)  # a sum over ranks, each in a row of its own:
    parts[rank(group)] = value  # the one collective that every backend has on every device
    dist.all_reduce(parts, group=group)
    return parts.to(device)


def pooled_mean(value: Tensor, weight: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    r"""The weighted mean over the ranks, :math:`\sum_r w_r v_r / \sum_r w_r`, elementwise.

    A value of weight 0 does not count, whatever it is; where all weights are 0 it is NaN.

    Args:
        value: means that each rank took, shape ``(*shape)``, floating.
        weight: how many numbers each was taken over, of a shape that broadcasts to it.
        group: a ``torch.distributed`` process group; by default that of all ranks.

    Example:
        >>> pooled_mean(torch.tensor([0.5, float("nan")]), torch.tensor([10, 0]))
        tensor([0.5000,    nan])
    """
    weight = weight.to(value).expand(value.shape)
    pair = torch.stack([torch.where(weight > 0, weight * value, 0.0), weight])
    total, weights = gathered(pair, group).sum(0)
    return total / weights


def rank_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path of this rank's own file: ``path`` itself outside a process group.

    Example:
        >>> rank_path("run.ckpt").name  # on rank 0 of 2: run.rank0of2.ckpt
        'run.ckpt'
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{name} must be a path of a file, got {path!r}")
    path = Path(path)
    if world_size() == 1:
        return path
    return path.with_name(f"{path.stem}.rank{rank()}of{world_size()}{path.suffix}")


@contextlib.contextmanager
def fail_together(what: str) -> Iterator[None]:
    """Within it, an error on one rank is one on all; there are no collective calls in it.

    Args:
        what: what the ranks do there, for the message.

    Raises:
        RankError: on the others; it names the rank.

    Example:
        >>> with fail_together("reading the data"):
        ...     data = torch.zeros(3)
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        everywhere = gathered(torch.tensor(failed).long())
    if ranks := tuple(everywhere.nonzero().flatten().tolist()):
        names = ", ".join(map(str, ranks))
        raise RankError(f"{what} failed on rank{'s' * (len(ranks) > 1)} {names}", ranks)


@contextlib.contextmanager
def naming_ranks(timeout: float) -> Iterator[None]:
    """Within it, a collective call that fails ends with an error that names the missing ranks.

    Every rank enters it together, after ``init_process_group(timeout=...)``. When a rank dies or
    hangs, the others' collective calls fail: at once if its connection closes, else after the
    group's timeout. They then wait, at most ``timeout`` more, to hear from each other. A rank that
    is merely slow arrives in that time if it is at least the group's timeout. (Under nccl a
    watchdog ends the process first, unless ``TORCH_NCCL_BLOCKING_WAIT=1`` is in its environment.)

    Args:
        timeout: seconds to wait for the other ranks, once a collective call has failed.

    Raises:
        RankError: from the failed call's own error; ``ranks`` says which are missing.

    Example:
        >>> with naming_ranks(timeout=60):  # outside a process group it does nothing
        ...     pass
    """
    if world_size() == 1:
        yield
        return
    wait = datetime.timedelta(seconds=timeout)
    spare = dist.new_group(backend="gloo", timeout=wait)  # the failed one is of no use any more
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not _is_of_transport(error):
            raise
        missing = _roll_call(spare, timeout)
        if not missing:
            raise RankError(
                f"a collective call failed on rank {rank()} of {world_size()}, though every rank"
                f" answers: one of them came more than the group's timeout later than the others"
                f" ({first_line(error)}). Give init_process_group(timeout=...) more"
            ) from error
        names = ", ".join(map(str, missing))
        raise RankError(
            f"rank{'s' * (len(missing) > 1)} {names} of {world_size()} died or hang"
            f"{'s' * (len(missing) == 1)}: no answer to rank {rank()} within {timeout:g} seconds,"
            f" after a collective call failed ({first_line(error)})",
            missing,
        ) from error


def _is_of_transport(error: RuntimeError) -> bool:
    """Whether a collective call failed, not the program: torch has no one class for that."""
    kinds = (dist.DistError,) if hasattr(dist, "DistError") else ()
    return isinstance(error, kinds) or "gloo" in str(error).lower()


def _roll_call(group: Any, timeout: float) -> tuple[int, ...]:
    """The ranks that do not answer: each sends a number to every other and waits for theirs."""
    me, missing, waiting = rank(), set(), []
    for other in range(world_size()):
        if other == me:
            continue
        answer = torch.tensor(-1)
        try:
            sent = dist.isend(torch.tensor(me), other, group=group)
            received = dist.irecv(answer, other, group=group)
            waiting.append((other, answer, received, sent))
        except RuntimeError:  # its connection is closed: it is dead
            missing.add(other)
    end = time.monotonic() + timeout
    for other, answer, *works in waiting:
        try:
            for work in works:  # who leaves before its number has arrived would be missed in turn
                assert work is not None
                left = max(end - time.monotonic(), 0.05)
                work.wait(datetime.timedelta(seconds=left))
        except RuntimeError:
            if answer != other:
                missing.add(other)
    return tuple(sorted(missing))
