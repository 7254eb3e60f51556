"""Files of which every rank of a process group has its own, read back from one and the same save.

Ranks that were stopped between one's save and the other's go back to the last save that all of
them have: each keeps the file before its last one (:mod:`pyro_ebm.files`).
"""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import torch

from pyro_ebm import files
from pyro_ebm.files import CheckpointError, PathLike, Saved
from pyro_ebm.ops.distributed import fail_together, gathered, rank, rank_path

Mark = tuple[int, int]
"""Which save a file is of: its number (0 if saves have none), and the steps made until then."""

ABSENT, UNREADABLE = (-1, 0), (-2, 0)


def load_common(
    path: PathLike, kind: str, mark: Callable[[Saved], Mark], missing_ok: bool = False
) -> Saved | None:
    """This rank's file, of the last save that all ranks have.

    Where it is the file before the last one, it takes the place of the last one. A collective call.

    Args:
        path: the file; that of a rank is at :func:`~pyro_ebm.ops.distributed.rank_path`.
        kind: what it holds, see :func:`pyro_ebm.files.load`.
        mark: says of what the file holds which save it is.
        missing_ok: whether None is returned, not an error raised, where no rank has a file, or
            where the ranks were stopped within their very first save.

    Raises:
        FileNotFoundError: if no rank has a file.
        CheckpointError: if a file cannot be read, no save is kept by all ranks, or the files are
            those of another number of ranks.
    """
    mine = rank_path(path)
    payload, here = _read(mine, kind, mark)
    marks = _of_all_ranks(here)
    if bad := [r for r, m in enumerate(marks) if m == UNREADABLE]:
        if rank() in bad:
            files.load(mine, kind)  # raises, and says why
        raise CheckpointError(f"the files of ranks {bad} cannot be read: their errors say why")
    if max(marks) == ABSENT:
        _refuse_other_ranks(Path(path), mine)
        if missing_ok:
            return None
        raise FileNotFoundError(f"there is no file {mine}")
    if len(set(marks)) == 1:
        return payload
    earlier, before = _read(files.previous(mine), kind, mark)
    all_before = _of_all_ranks(before)
    kept = [set(pair) - {ABSENT, UNREADABLE} for pair in zip(marks, all_before)]
    if common := set.intersection(*kept):
        with fail_together("going back to the file before"):
            if here != max(common):
                payload = earlier
                files.previous(mine).replace(mine)
        return payload
    first_save = ABSENT in marks and max(marks)[0] <= 1 and set(all_before) == {ABSENT}
    if missing_ok and first_save:
        mine.unlink(missing_ok=True)
        return None
    saves = ", ".join(f"rank {r} has {_in_words(m)}" for r, m in enumerate(marks))
    raise CheckpointError(
        f"the files of the ranks for {os.fspath(path)} are of different saves ({saves}), and no"
        " save is kept by all of them: bring back files of one save, or remove them all to start"
        " anew"
    )


def _read(path: Path, kind: str, mark: Callable[[Saved], Mark]) -> tuple[Saved | None, Mark]:
    """A payload and its mark; a rank that raised here would leave the others waiting."""
    try:
        payload = files.load(path, kind)
        return payload, mark(payload)
    except FileNotFoundError:
        return None, ABSENT
    except (OSError, CheckpointError):
        return None, UNREADABLE


def _of_all_ranks(mark: Mark) -> list[Mark]:
    return [(number, steps) for number, steps in gathered(torch.tensor(mark)).tolist()]


def _in_words(mark: Mark) -> str:
    if mark == ABSENT:
        return "none"
    return f"{f'save {mark[0]}' if mark[0] else 'the save'} after {mark[1]} steps"


def _refuse_other_ranks(path: Path, mine: Path) -> None:
    """Raises a CheckpointError if another number of ranks has files there."""
    stem, suffix = glob.escape(path.stem), glob.escape(path.suffix)
    found = [path, *path.parent.glob(f"{stem}.rank*of*{suffix}")]
    others = sorted(p.name for p in found if p.exists() and p != mine)
    if others:
        raise CheckpointError(
            f"there is no {mine.name}, but there is {others[0]}: chains and random states belong to"
            " their ranks, so start as many as saved it"
        )


__all__ = ["load_common"]
