r"""A training in one file: saved, and continued exactly.

A training consists of parameters, in Pyro's store and in networks (a learned log Z among them),
buffers of networks, the optimiser's moments, the loss with its persistent chains and step sizes,
and the random state. All of it goes to one file, written whole or not at all, and the file before
is kept (:mod:`pyro_ebm.files`). On the same machine and the CPU, what follows a load is bit for bit
what would have followed the save. (A kernel with ``jit_compile=True`` is the exception: graphs are
no part of the file, a loss first evaluates its energy without one, and compiled code rounds
differently. Then it is the same to rounding; with ``False`` and ``"capture"`` it is exact.)

In a process group every rank calls both functions, and has a file of its own
(:func:`~pyro_ebm.ops.distributed.rank_path`): chains and random states are its own. Ranks that were
stopped between one's save and the other's go back to the last save that all of them have: saves
are numbered, from 1, and a training that was loaded counts on from its file.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm import files
from pyro_ebm.files import CheckpointError, Saved
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.module import networks_of
from pyro_ebm.losses.saving.states import Piece, differences, misfits, restore, state_of
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.distributed import rank_path
from pyro_ebm.ops.rank_files import load_common

KIND = "training"
# What a load_state_dict raises for a state of another piece
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_saves: dict[str, int] = {}  # the number of the last save, by the file it is in


def save_training(path: str | os.PathLike[str], /, *parts: object, **progress: object) -> None:
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
    *parts: object,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    missing_ok: bool = False,
) -> Saved:
    """Loads what :func:`save_training` wrote, into parts made as they were made before.

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
    payload = load_common(path, KIND, _mark, missing_ok)
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
    found = [
        f"{title}: {difference}"
        for (title, piece), state in zip(pieces, states)
        for difference in differences(piece, state)
    ]
    found += _differences_of_store(payload, _parameters_in(pieces))
    if found:
        raise CheckpointError(f"{name} does not fit: {'; '.join(found)}")
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


def _put_back(piece: Piece, state: object) -> None:
    """Restores the state before; a piece that refuses it must not keep the others from theirs."""
    with suppress(*REFUSALS):
        restore(piece, state)


# -- what the parts are made of --------------------------------------------------------------------


def _pieces(parts: tuple[object, ...]) -> list[tuple[str, Piece]]:
    """Each piece with a state of its own, and its name in messages."""
    return [(_title(piece), piece) for part in parts for piece in _pieces_of(part)]


def _title(piece: Piece) -> str:
    if isinstance(piece, PyroOptim):
        scheduler = getattr(piece, "pt_scheduler_constructor", None)
        made = [c for c in (scheduler, piece.pt_optim_constructor) if c is not None]
        names = [getattr(c, "__name__", type(c).__name__) for c in made]
        return f"pyro.optim.{' of '.join(names)}"
    return type(piece).__name__


def _pieces_of(part: object) -> Iterator[Piece]:
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
    elif isinstance(part, Piece):
        yield part
    else:
        raise TypeError(
            "a part of a training is an SVI, loss(model, guide), a network, an optimiser, a"
            f" scheduler, a torch.Generator, or has state_dict and load_state_dict;"
            f" got {shown(part)}"
        )


def _within(net: nn.Module, whole: nn.Module) -> bool:
    return any(net is module for module in whole.modules())


def _parameters_in(pieces: list[tuple[str, Piece]]) -> set[int]:
    nets = [piece for _, piece in pieces if isinstance(piece, nn.Module)]
    return {id(p) for net in nets for p in net.parameters()}


def _make_parameters(
    parts: tuple[object, ...], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> None:
    """Runs models and guides once: ``pyro.param`` and lazy guides make their parameters."""
    random = files.random_state()
    for part in parts:
        if isinstance(part, SVI | ELBOModule):
            with torch.no_grad():
                trace = poutine.trace(part.guide).get_trace(*args, **kwargs)
                poutine.replay(part.model, trace=trace)(*args, **kwargs)
    files.set_random_state(random)


def _differences_of_store(payload: Saved, covered: set[int]) -> Iterator[str]:
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
    yield from misfits(mine, saved, "the parameter ")
    for name in sorted(saved.keys() & mine.keys()):
        constraint, now = payload["constraints"][name], str(constraints[name])
        if constraint != now:
            yield f"the parameter {name!r} has the constraint {constraint} in the file, {now} here"


def _listed(titles: list[str]) -> str:
    counts = Counter(titles)
    return ", ".join(f"{n} {title}" if n > 1 else title for title, n in counts.items()) or "nothing"


def _mark(payload: Saved) -> tuple[int, int]:
    """Which save it is: its number, and the steps that the losses have taken."""
    return payload.get("saves", 0), payload["steps"]


def _saves_at(path: Path) -> int:
    """How many saves have led to a file, 0 where there is none, or none that can be read."""
    if path.exists() and (known := _saves.get(os.path.abspath(path))) is not None:
        return known
    with suppress(OSError, CheckpointError):
        return files.load(path, KIND).get("saves", 0)
    return 0
