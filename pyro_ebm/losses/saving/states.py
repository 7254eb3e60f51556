"""The states of the pieces of a training: what is saved, whether it fits, how it is restored."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_ebm.files import Saved
from pyro_ebm.internals.pyro_state import waiting_states
from pyro_ebm.losses.base import EnergyLoss


@runtime_checkable
class Stateful(Protocol):
    """Anything else with a state, such as a scheduler or a gradient scaler."""

    def state_dict(self) -> Saved:
        """Its state."""
        ...

    def load_state_dict(self, state_dict: Saved) -> object:
        """Restores what :meth:`state_dict` returned."""


Piece = torch.Generator | EnergyLoss | PyroOptim | Stateful


def state_of(piece: Piece) -> Saved | Tensor:
    """The state of a network, optimiser, loss, generator, or anything with ``state_dict``.

    Example:
        >>> list(state_of(torch.nn.Linear(1, 1)))
        ['weight', 'bias']
    """
    if isinstance(piece, torch.Generator):
        return piece.get_state()
    if isinstance(piece, EnergyLoss):
        return {"loss": piece.state_dict(), "steps_taken": piece.steps_taken}
    if isinstance(piece, PyroOptim):
        state = {**waiting_states(piece), **piece.get_state()}
        return {name: s for name, s in state.items() if name is not None}  # of no parameter now
    return piece.state_dict()


def differences(piece: Piece, state: Any) -> Iterator[str]:
    """The differences, in words, that keep a state from being that of the piece."""
    if isinstance(piece, nn.Module):
        yield from _differences_of_module(piece.state_dict(), state)
    elif isinstance(piece, PyroOptim):
        parameters = dict(pyro.get_param_store().named_parameters())
        unmade = sorted(state.keys() - parameters.keys())
        if unmade:
            yield f"the optimiser's parameters {unmade} are not in Pyro's store yet: give args="
        for name, moments in state.items():
            if name in parameters:
                of_torch = moments.get("optimizer", moments)
                yield from _differences_of_moments(of_torch, [parameters[name]])
    elif isinstance(piece, Optimizer):
        sizes = [len(group["params"]) for group in piece.param_groups]
        saved = [len(group["params"]) for group in state["param_groups"]]
        if sizes != saved:
            yield f"it steps groups of {saved} parameters in the file, of {sizes} here"
        else:
            parameters = [p for group in piece.param_groups for p in group["params"]]
            yield from _differences_of_moments(state, parameters)


def _differences_of_module(mine: Saved, saved: Saved) -> Iterator[str]:
    missing, unknown = sorted(mine.keys() - saved.keys()), sorted(saved.keys() - mine.keys())
    if missing:
        yield f"the file does not hold {missing}"
    if unknown:
        yield f"the file holds {unknown}, which is not here"
    yield from misfits(mine, saved)


def misfits(mine: Saved, saved: Saved, what: str = "") -> Iterator[str]:
    """The names of both whose tensors have different shapes or dtypes, and what they have.

    Args:
        mine: values by name.
        saved: those of the file.
        what: what they are called, with a space after it.
    """
    for name in sorted(mine.keys() & saved.keys()):
        a, b = saved[name], mine[name]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            continue
        if a.shape != b.shape:
            shapes = f"{tuple(a.shape)} in the file, {tuple(b.shape)} here"
            yield f"{what}{name!r} has shape {shapes}"
        elif a.dtype != b.dtype:
            yield f"{what}{name!r} is {a.dtype} in the file, {b.dtype} here"


def _differences_of_moments(state: Saved, parameters: list[Tensor]) -> Iterator[str]:
    for index, moments in state["state"].items():
        for name, value in moments.items():
            shape = parameters[index].shape
            if isinstance(value, Tensor) and value.dim() and value.shape != shape:
                yield (
                    f"{name!r} has shape {tuple(value.shape)} in the file, its parameter"
                    f" {tuple(shape)} here"
                )


def restore(piece: Piece, state: Any) -> None:
    """Loads into a piece what :func:`state_of` returned."""
    if isinstance(piece, torch.Generator):
        piece.set_state(state)
    elif isinstance(piece, EnergyLoss):
        piece.load_state_dict(state["loss"])
        piece.steps_taken = state["steps_taken"]
    elif isinstance(piece, PyroOptim):
        _restore_pyro_optim(piece, state)
    elif isinstance(piece, nn.Module | Optimizer):
        piece.load_state_dict(state)
    else:
        kinds = {key: getattr(piece, key, None) for key in state}
        # a file holds plain dicts
        counters = {k: Counter(state[k]) for k, now in kinds.items() if isinstance(now, Counter)}
        piece.load_state_dict({**state, **counters})


def _restore_pyro_optim(optim: PyroOptim, state: Saved) -> None:
    """Pyro's optimisers hold one of torch's for each parameter, made when they first step it."""
    store = pyro.get_param_store()
    named = dict(store.named_parameters())
    parameters = {name: named[name] for name in state if name in named}
    optim.optim_objs.clear()
    optim.grad_clip.clear()
    waiting = waiting_states(optim)
    waiting.clear()
    waiting.update({name: state[name] for name in state.keys() - named.keys()})
    grads = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    optim(list(parameters.values()))  # makes them; without a gradient, no parameter moves
    for name, p in parameters.items():
        p.grad = grads[name]
        mine, saved = optim.optim_objs[p], state[name]
        if hasattr(mine, "optimizer"):  # a scheduler around it
            mine.optimizer.load_state_dict(saved["optimizer"])
            mine.load_state_dict(saved["scheduler"])
        else:
            mine.load_state_dict(saved)
