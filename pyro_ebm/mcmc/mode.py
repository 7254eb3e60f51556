"""Modules are held in evaluation mode while a potential is evaluated.

Dropout would make the potential random, and batch norm in training mode would couple the chains
and learn from them. A module's own mode is put back afterwards.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


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
    """Holds every module that is called within in evaluation mode, and tells which they were.

    It also finds those that a function reads from the global scope.

    Example:
        >>> net = torch.nn.Dropout(0.9)
        >>> with called_in_eval_mode() as called:
        ...     net(torch.ones(3))
        tensor([1., 1., 1.])
        >>> net.training, called
        (True, [Dropout(p=0.9, inplace=False)])
    """
    called: list[nn.Module] = []
    training: list[nn.Module] = []

    def before_forward(module: nn.Module, args: Any) -> None:
        called.append(module)
        if module.training:
            training.append(module)
            module.training = False

    handle = nn.modules.module.register_module_forward_pre_hook(before_forward)
    try:
        yield called
    finally:
        handle.remove()
        for module in training:
            module.training = True


def unique(*found: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Each module once."""
    return tuple({id(module): module for some in found for module in some}.values())
