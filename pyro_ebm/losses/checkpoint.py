r"""A training in one file: saved, and gone on with exactly.

What a training is made of: parameters, in Pyro's store and in networks (a learned log Z among
them), buffers of networks, the optimiser's moments, the loss with its persistent chains and step
sizes, and the random state. All of it in one file, written whole or not at all, the one before
kept (:mod:`pyro_ebm.files`). On the same machine and the CPU, what follows a load is bit for bit
what would have followed the save.

In a process group every rank calls both functions, and has a file of its own
(:func:`~pyro_ebm.ops.distributed.rank_path`): chains and random states are its own. Ranks that were
stopped between one's save and the other's go back to the last step that all of them have.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from pyro_ebm.losses.states import differences, restore, state_of
from pyro_ebm.ops.distributed import gathered, rank, rank_path, world_size

KIND = "training"
ABSENT, UNREADABLE = -1, -2


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
    pieces = _pieces(parts)
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
        "progress": progress,
    }
    files.save(rank_path(path), payload, KIND)


def load_training(
    path: str | os.PathLike[str],
    /,
    *parts: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    missing_ok: bool = False,
) -> dict[str, Any]:
    """Takes back what :func:`save_training` wrote, into parts made as they were made before.

    Everything is compared first: nothing changes unless all of it fits.

    Args:
        path: the file.
        *parts: as they were saved, in that order.
        args: what the model and the guide are called with, where their parameters are not made
            yet, as in a new process: they are run once to make them.
        kwargs: likewise.
        missing_ok: whether no file means a training that has not begun, ``{}``, not an error. A
            file that cannot be read is always one.

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
    if args or kwargs:
        _make_parameters(parts, args, kwargs or {})
    pieces = _pieces(parts)
    name = os.fspath(path)
    held = [piece["title"] for piece in payload["pieces"]]
    given = [title for title, _ in pieces]
    if held != given:
        raise CheckpointError(f"{name} holds {_listed(held)}, and given are {_listed(given)}")
    states = [piece["state"] for piece in payload["pieces"]]
    told = [
        f"{title}: {difference}"
        for (title, piece), state in zip(pieces, states)
        for difference in differences(piece, state)
    ]
    told += _differences_of_store(payload, _parameters_in(pieces))
    if told:
        raise CheckpointError(f"{name} does not fit: {'; '.join(told)}")
    store = dict(pyro.get_param_store().named_parameters())
    with torch.no_grad():
        for key, value in payload["store"].items():
            store[key].copy_(value)
    for (_, piece), state in zip(pieces, states):
        restore(piece, state)
    files.set_random_state(payload["random"])
    return payload["progress"]


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
            f" scheduler, a torch.Generator, or has state_dict and load_state_dict; got {part!r}"
        )


def _within(net: nn.Module, whole: nn.Module) -> bool:
    return any(net is module for module in whole.modules())


def _parameters_in(pieces: list[tuple[str, Any]]) -> set[int]:
    nets = [piece for _, piece in pieces if isinstance(piece, nn.Module)]
    return {id(p) for net in nets for p in net.parameters()}


def _make_parameters(parts: tuple[Any, ...], args: Any, kwargs: Any) -> None:
    """Runs models and guides once: ``pyro.param`` and lazy guides make their parameters."""
    for part in parts:
        if isinstance(part, SVI | ELBOModule):
            with torch.no_grad():
                trace = poutine.trace(part.guide).get_trace(*args, **kwargs)
                poutine.replay(part.model, trace=trace)(*args, **kwargs)


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
        constraint, now = payload["constraints"][name], str(constraints[name])
        if constraint != now:
            yield f"the parameter {name!r} has the constraint {constraint} in the file, {now} here"


def _listed(titles: list[str]) -> str:
    counts = Counter(titles)
    return ", ".join(f"{n} {title}" if n > 1 else title for title, n in counts.items()) or "nothing"


# -- one file for each rank ------------------------------------------------------------------------


def _read(path: str | os.PathLike[str], missing_ok: bool) -> dict[str, Any] | None:
    """The payload of this rank, of a step that all ranks have; None where no rank has a file."""
    mine = rank_path(path)
    if world_size() == 1:
        if not mine.exists():
            _refuse_other_ranks(path)
        return files.load(mine, KIND) if mine.exists() or not missing_ok else None
    payload, steps = _try(mine)
    all_steps: list[int] = gathered(torch.tensor(steps)).tolist()
    _refuse_unreadable(path, all_steps)
    if max(all_steps) == ABSENT:
        _refuse_other_ranks(path)
        if missing_ok:
            return None
        raise FileNotFoundError(f"no rank has a file of its own for {os.fspath(path)}")
    if len(set(all_steps)) > 1:  # stopped between one rank's save and another's
        target = min(all_steps)
        if steps != target:
            payload, steps = _try(files.previous(mine))
        at: list[int] = gathered(torch.tensor(steps)).tolist()
        if target == ABSENT or at != [target] * len(at):
            raise CheckpointError(
                f"the files of the ranks for {os.fspath(path)} are of different steps"
                f" ({_by_rank(all_steps)}), and no step is kept by all of them: bring back files"
                " of one step, or remove them all to start anew"
            )
    return payload


def _try(path: Path) -> tuple[dict[str, Any] | None, int]:
    """A payload and its number of steps; a rank that raised here would leave the others waiting."""
    try:
        payload = files.load(path, KIND)
    except FileNotFoundError:
        return None, ABSENT
    except CheckpointError:
        return None, UNREADABLE
    return payload, payload["steps"]


def _refuse_unreadable(path: str | os.PathLike[str], all_steps: list[int]) -> None:
    bad = [r for r, steps in enumerate(all_steps) if steps == UNREADABLE]
    if rank() in bad:
        files.load(rank_path(path), KIND)  # says why
    if bad:
        raise CheckpointError(f"the files of ranks {bad} cannot be read: their errors say why")


def _refuse_other_ranks(path: str | os.PathLike[str]) -> None:
    """Another number of ranks has saved a training there."""
    path = Path(path)
    mine = rank_path(path)
    found = [path, *path.parent.glob(f"{path.stem}.rank*of*{path.suffix}")]
    others = sorted(p.name for p in found if p.exists() and p != mine)
    if others:
        raise CheckpointError(
            f"there is no {mine.name}, but there is {others[0]}: chains and random states belong to"
            " their ranks, so start as many as saved it"
        )


def _by_rank(steps: list[int]) -> str:
    return ", ".join(
        f"rank {r} has {'none' if n == ABSENT else f'step {n}'}" for r, n in enumerate(steps)
    )
