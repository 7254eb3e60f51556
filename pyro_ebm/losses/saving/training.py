r"""A training in one file: saved, and gone on with exactly.

What a training is made of: parameters, in Pyro's store and in networks (a learned log Z among
them), buffers of networks, the optimiser's moments, the loss with its persistent chains and step
sizes, and the random state. All of it in one file, written whole or not at all, the one before
kept (:mod:`pyro_ebm.files`). On the same machine and the CPU, what follows a load is bit for bit
what would have followed the save. (A kernel with ``jit_compile=True`` is the exception: graphs are
no part of the file, a loss meets its energy first without one, and what is compiled rounds
differently. Then it is the same to rounding; with ``False`` and ``"capture"`` it is exact.)

In a process group every rank calls both functions, and has a file of its own
(:func:`~pyro_ebm.ops.distributed.rank_path`): chains and random states are its own. Ranks that were
stopped between one's save and the other's go back to the last save that all of them have: saves
are numbered, from 1, and a training that was loaded counts on from its file.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm import files
from pyro_ebm.files import CheckpointError
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.module import networks_of
from pyro_ebm.losses.saving.states import differences, restore, state_of
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.distributed import gathered, rank, rank_path, world_size

KIND = "training"
ABSENT, UNREADABLE = -1, -2
# What a load_state_dict raises for a state of another piece
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_saves: dict[str, int] = {}  # the number of the last save, by the file it is in


def save_training(path: str | os.PathLike[str], /, *parts: Any, **progress: Any) -> None:
    """Writes a training to one file, whole or not at all; the file before stays beside it.

    Args:
        path: where; under ``torchrun`` each rank adds its number to the name.
        *parts: what trains: an ``SVI``, with its networks, optimiser and loss; or
            ``loss(model, guide)``, alone or inside ``DistributedDataParallel``, and a torch
            optimiser; and whatever else has ``state_dict`` and ``load_state_dict`` (schedulers,
            networks, a gradient scaler), or is a ``torch.Generator``. Pyro's parameter store and
            the random state are always saved.
        **progress: numbers, strings, tensors and what they are nested in, such as ``step=100``,
            which :func:`load_training` gives back.

    Raises:
        TypeError: for a part that has no state, or progress that a file cannot hold.
        ValueError: for a network that ``pyro.module`` registered and that is not found from the
            model: give it as a part.
        OSError: if the file cannot be written; the one before is untouched.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.losses import ContrastiveDivergence
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> def start():
        ...     loss = ContrastiveDivergence(persistent=True)
        ...     return SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), loss)
        >>> x, svi = torch.randn(100), start()
        >>> _ = [svi.step(x) for _ in range(5)]
        >>> path = Path(mkdtemp()) / "training.ckpt"
        >>> save_training(path, svi, step=5)
        >>> first = [svi.step(x) for _ in range(5)]
        >>> pyro.clear_param_store()  # as in a new process
        >>> svi = start()
        >>> load_training(path, svi, args=(x,))
        {'step': 5}
        >>> [svi.step(x) for _ in range(5)] == first
        True
    """
    pieces, mine = _pieces(parts), rank_path(path)
    covered = _parameters_in(pieces)
    store = pyro.get_param_store()
    loose = {name: p for name, p in store.named_parameters() if id(p) not in covered}
    hidden = sorted({name.partition("$$$")[0] for name in loose if "$$$" in name})
    if hidden:
        raise ValueError(
            f"the networks that pyro.module registered as {hidden} are not found from the parts,"
            " and their buffers would be lost: give them too, save_training(path, ..., net)"
        )
    constraints = store.get_state()["constraints"]
    payload = {
        "pieces": [{"title": title, "state": state_of(piece)} for title, piece in pieces],
        "store": loose,
        "constraints": {name: str(constraints[name]) for name in loose},
        "random": files.random_state(),
        "steps": sum(p.steps_taken for _, p in pieces if isinstance(p, EnergyLoss)),
        "saves": _saves_at(mine) + 1,
        "progress": progress,
    }
    files.save(mine, payload, KIND)
    _saves[os.path.abspath(mine)] = payload["saves"]


def load_training(
    path: str | os.PathLike[str],
    /,
    *parts: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    missing_ok: bool = False,
) -> dict[str, Any]:
    """Takes back what :func:`save_training` wrote, into parts made as they were made before.

    Everything is compared first: nothing changes unless all of it fits. A piece that then refuses
    its state all the same has the others put back to where they were.

    Args:
        path: the file.
        *parts: as they were saved, in that order.
        args: what the model and the guide are called with, where their parameters are not made
            yet, as in a new process: they are run once to make them.
        kwargs: likewise.
        missing_ok: whether no file means a training that has not begun, ``{}``, not an error;
            so it is if the ranks were stopped within their very first save. A file that cannot
            be read is always an error.

    Returns:
        The progress that was saved.

    Raises:
        FileNotFoundError: if there is no file.
        CheckpointError: for a file that is not whole, of another number of ranks, or of another
            model, loss, optimiser or shape; it names the difference.
    """
    payload = _read(path, missing_ok)
    if payload is None:
        return {}
    _saves[os.path.abspath(rank_path(path))] = payload.get("saves", 0)
    if args or kwargs:
        _make_parameters(parts, args, kwargs or {})
    pieces = _pieces(parts)
    name = os.fspath(path)
    held = [piece["title"] for piece in payload["pieces"]]
    given = [title for title, _ in pieces]
    if held != given:
        raise CheckpointError(f"{name} holds {_listed(held)}, and given are {_listed(given)}")
    states = [piece["state"] for piece in payload["pieces"]]
    misfits = [
        f"{title}: {difference}"
        for (title, piece), state in zip(pieces, states)
        for difference in differences(piece, state)
    ]
    misfits += _differences_of_store(payload, _parameters_in(pieces))
    if misfits:
        raise CheckpointError(f"{name} does not fit: {'; '.join(misfits)}")
    with ExitStack() as undo:
        undo.callback(files.set_random_state, files.random_state())
        undo.callback(_set_store, {name: _stored()[name].clone() for name in payload["store"]})
        _set_store(payload["store"])
        for (title, piece), state in zip(pieces, states):
            undo.callback(_put_back, piece, deepcopy(state_of(piece)))
            try:
                restore(piece, state)
            except REFUSALS as error:
                raise CheckpointError(
                    f"{name} does not fit: {title} refuses its state"
                    f" ({type(error).__name__}: {error}); nothing is changed"
                ) from error
        files.set_random_state(payload["random"])
        undo.pop_all()
    return payload["progress"]


def _stored() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}


def _set_store(values: Mapping[str, Tensor]) -> None:
    store = _stored()
    for name, value in values.items():
        store[name].copy_(value)


def _put_back(piece: Any, state: Any) -> None:
    """To the state before; one that takes back nothing must not keep the others from theirs."""
    with suppress(*REFUSALS):
        restore(piece, state)


# -- what the parts are made of --------------------------------------------------------------------


def _pieces(parts: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Each thing with a state of its own, and what it is called in messages."""
    return [(_title(piece), piece) for part in parts for piece in _pieces_of(part)]


def _title(piece: Any) -> str:
    if isinstance(piece, PyroOptim):
        scheduler = getattr(piece, "pt_scheduler_constructor", None)
        made = [c for c in (scheduler, piece.pt_optim_constructor) if c is not None]
        names = [getattr(c, "__name__", type(c).__name__) for c in made]
        return f"pyro.optim.{' of '.join(names)}"
    return type(piece).__name__


def _pieces_of(part: Any) -> Iterator[Any]:
    if isinstance(part, DistributedDataParallel):
        part = part.module
    if isinstance(part, SVI):
        loss = getattr(part.loss_and_grads, "__self__", None)
        yield from networks_of(part.model, part.guide)
        yield part.optim
        if isinstance(loss, EnergyLoss):
            yield loss
    elif isinstance(part, nn.Module):
        yield part
        for inner in part.modules():  # it may be deep within, as in a LightningModule
            if isinstance(inner, ELBOModule):
                nets = networks_of(inner.model, inner.guide)
                yield from (net for net in nets if not _within(net, part))
                if isinstance(inner.elbo, EnergyLoss):
                    yield inner.elbo
    elif isinstance(part, torch.Generator) or (
        hasattr(part, "load_state_dict") or isinstance(part, PyroOptim)
    ):
        yield part
    else:
        raise TypeError(
            "a part of a training is an SVI, loss(model, guide), a network, an optimiser, a"
            f" scheduler, a torch.Generator, or has state_dict and load_state_dict;"
            f" got {shown(part)}"
        )


def _within(net: nn.Module, whole: nn.Module) -> bool:
    return any(net is module for module in whole.modules())


def _parameters_in(pieces: list[tuple[str, Any]]) -> set[int]:
    nets = [piece for _, piece in pieces if isinstance(piece, nn.Module)]
    return {id(p) for net in nets for p in net.parameters()}


def _make_parameters(parts: tuple[Any, ...], args: Any, kwargs: Any) -> None:
    """Runs models and guides once: ``pyro.param`` and lazy guides make their parameters."""
    random = files.random_state()
    for part in parts:
        if isinstance(part, SVI | ELBOModule):
            with torch.no_grad():
                trace = poutine.trace(part.guide).get_trace(*args, **kwargs)
                poutine.replay(part.model, trace=trace)(*args, **kwargs)
    files.set_random_state(random)


def _differences_of_store(payload: dict[str, Any], covered: set[int]) -> Iterator[str]:
    store = pyro.get_param_store()
    mine = {name: p for name, p in store.named_parameters() if id(p) not in covered}
    saved: dict[str, Tensor] = payload["store"]
    constraints = store.get_state()["constraints"]
    unmade = sorted(saved.keys() - mine.keys())
    if unmade:
        yield (
            f"the parameters {unmade} are not in Pyro's store: another model, or one that has not"
            " run yet (give args=..., what it is called with)"
        )
    unknown = sorted(mine.keys() - saved.keys())
    if unknown:
        yield f"Pyro's store holds the parameters {unknown}, which the file does not"
    for name in sorted(saved.keys() & mine.keys()):
        if saved[name].shape != mine[name].shape:
            yield (
                f"the parameter {name!r} has shape {tuple(saved[name].shape)} in the file,"
                f" {tuple(mine[name].shape)} here"
            )
        elif saved[name].dtype != mine[name].dtype:
            yield (
                f"the parameter {name!r} is {saved[name].dtype} in the file,"
                f" {mine[name].dtype} here"
            )
        constraint, now = payload["constraints"][name], str(constraints[name])
        if constraint != now:
            yield f"the parameter {name!r} has the constraint {constraint} in the file, {now} here"


def _listed(titles: list[str]) -> str:
    counts = Counter(titles)
    return ", ".join(f"{n} {title}" if n > 1 else title for title, n in counts.items()) or "nothing"


# -- one file for each rank ------------------------------------------------------------------------


class _Mark(NamedTuple):
    """Which save a file is of: ranks go on from files of one mark."""

    saves: int  # its number, or ABSENT or UNREADABLE
    steps: int = 0  # that the losses have taken
    previous: bool = False  # whether the file before is kept

    @property
    def save(self) -> tuple[int, int]:
        return self.saves, self.steps

    def __str__(self) -> str:
        return "none" if self.saves == ABSENT else f"save {self.saves} after {self.steps} steps"


def _read(path: str | os.PathLike[str], missing_ok: bool) -> dict[str, Any] | None:
    """The payload of this rank, of a save that all ranks have; None where no save was complete."""
    mine = rank_path(path)
    if world_size() == 1:
        if not mine.exists():
            _refuse_other_ranks(path)
        return files.load(mine, KIND) if mine.exists() or not missing_ok else None
    payload, mark = _try(mine)
    marks = _of_all_ranks(mark)
    _refuse_unreadable(path, marks)
    if max(marks).saves == ABSENT:
        _refuse_other_ranks(path)
        if missing_ok:
            return None
        raise FileNotFoundError(f"no rank has a file of its own for {os.fspath(path)}")
    if len({m.save for m in marks}) == 1:
        return payload
    target = min(m.save for m in marks)  # stopped between one rank's save and another's
    begun = target[0] != ABSENT or max(marks).saves > 1 or any(m.previous for m in marks)
    if missing_ok and not begun:  # within the first save
        mine.unlink(missing_ok=True)
        return None
    behind = mark.save == target
    if not behind:
        payload, mark = _try(files.previous(mine))
    if target[0] == ABSENT or {m.save for m in _of_all_ranks(mark)} != {target}:
        saves = ", ".join(f"rank {r} has {m}" for r, m in enumerate(marks))
        raise CheckpointError(
            f"the files of the ranks for {os.fspath(path)} are of different saves ({saves}), and no"
            " save is kept by all of them: bring back files of one save, or remove them all to"
            " start anew"
        )
    if not behind:  # all agree; else the next save would keep the newer one as the one before
        files.previous(mine).replace(mine)
    return payload


def _try(path: Path) -> tuple[dict[str, Any] | None, _Mark]:
    """A payload and its mark; a rank that raised here would leave the others waiting."""
    try:
        before = files.previous(path).exists()
        payload = files.load(path, KIND)
    except FileNotFoundError:
        return None, _Mark(ABSENT)
    except (OSError, CheckpointError):
        return None, _Mark(UNREADABLE)
    return payload, _Mark(payload.get("saves", 0), payload["steps"], before)


def _of_all_ranks(mark: _Mark) -> list[_Mark]:
    rows: list[list[int]] = gathered(torch.tensor(list(map(int, mark)))).tolist()
    return [_Mark(saves, steps, bool(previous)) for saves, steps, previous in rows]


def _saves_at(path: Path) -> int:
    """How many saves have led to a file, 0 where there is none."""
    if not path.exists():
        return 0
    known = _saves.get(os.path.abspath(path))
    return max(_try(path)[1].saves, 0) if known is None else known


def _refuse_unreadable(path: str | os.PathLike[str], marks: list[_Mark]) -> None:
    bad = [r for r, mark in enumerate(marks) if mark.saves == UNREADABLE]
    if rank() in bad:
        files.load(rank_path(path), KIND)  # says why
    if bad:
        raise CheckpointError(f"the files of ranks {bad} cannot be read: their errors say why")


def _refuse_other_ranks(path: str | os.PathLike[str]) -> None:
    """Another number of ranks has saved a training there."""
    path, mine = Path(path), rank_path(path)
    stem, suffix = glob.escape(path.stem), glob.escape(path.suffix)
    found = [path, *path.parent.glob(f"{stem}.rank*of*{suffix}")]
    others = sorted(p.name for p in found if p.exists() and p != mine)
    if others:
        raise CheckpointError(
            f"there is no {mine.name}, but there is {others[0]}: chains and random states belong to"
            " their ranks, so start as many as saved it"
        )
