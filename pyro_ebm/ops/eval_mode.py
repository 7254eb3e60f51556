"""Modules are held in evaluation mode while a potential is evaluated.

Dropout would make the potential random, and batch norm in training mode would couple the chains
and learn from them. A module's own mode is put back afterwards.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from pyro_ebm.internals.compilers import as_written


@contextlib.contextmanager
def eval_mode(found: Iterable[nn.Module]) -> Iterator[None]:
    """Holds modules in evaluation mode (no dropout, frozen batch norm) and puts the mode back.

    Example:
        >>> net = torch.nn.Dropout()
        >>> with eval_mode([net]):
        ...     net.training
        False
        >>> net.training
        True
    """
    training = [module for module in found if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def called_in_eval_mode() -> Iterator[list[nn.Module]]:
    """Holds every module that is called within in evaluation mode, and lists them.

    It also finds those that a function reads from anywhere, and those inside of them, which a
    compiled or scripted module does not call by itself. It looks at the calls of this thread, and
    leaves modules and their hooks as they are.

    Example:
        >>> net = torch.nn.Dropout(0.9)
        >>> with called_in_eval_mode() as called:
        ...     net(torch.ones(3))
        tensor([1., 1., 1.])
        >>> net.training, called
        (True, [Dropout(p=0.9, inplace=False)])
    """
    called: dict[int, nn.Module] = {}
    training: list[nn.Module] = []

    def found(module: nn.Module) -> None:
        if id(module) in called and not module.training:
            return
        for part in module.modules():
            called[id(part)] = part
            if part.training:
                training.append(part)
                part.training = False

    modules: list[nn.Module] = []
    try:
        with as_written(), _on_call(found):
            yield modules
    finally:
        modules += called.values()
        for module in training:
            module.training = True


@contextlib.contextmanager
def _on_call(function: Callable[[nn.Module], None]) -> Iterator[None]:
    """Calls a function with each module that this thread calls, before it runs."""
    before: Any = sys.getprofile()

    def watch(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is _CALL:
            function(frame.f_locals["self"])
        if callable(before):
            before(frame, event, arg)

    pause, go_on = (getattr(before, name, None) for name in ("disable", "enable"))
    if pause is not None and not callable(before):  # Python's own profiler, which calls no function
        pause()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before if callable(before) else None)
        if go_on is not None and not callable(before):
            go_on()


_CALL = nn.Module.__call__.__code__


def unique(*found: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Each module once."""
    return tuple({id(module): module for some in found for module in some}.values())
