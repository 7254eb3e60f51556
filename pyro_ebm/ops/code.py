"""What Python code reads from outside: the names of its globals, and whose code it is."""

import dis
import functools
import sys
import types

import torch

LIBRARIES = sys.stdlib_module_names | {"torch", "pyro", "pyro_ebm", "numpy", "zuko"}
"""Code of these packages does not change while a program runs."""

SCALARS = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
)
"""The types of values that are compared by their values."""


def outside_level() -> int:
    """The ``stacklevel`` by which a warning shows the line outside :data:`LIBRARIES` that led here.

    Example:
        >>> outside_level() > 1
        True
    """
    level, frame = 1, sys._getframe(1)
    while is_library(frame.f_globals.get("__name__")) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


@functools.lru_cache(maxsize=1024)
def is_library(name: str | None) -> bool:
    """Whether a module of this name is one of :data:`LIBRARIES`, or lies in one.

    Example:
        >>> is_library("torch.nn"), is_library("__main__")
        (True, False)
    """
    return name is not None and name.partition(".")[0] in LIBRARIES


@functools.lru_cache(maxsize=1024)
def globals_read(code: types.CodeType) -> tuple[str, ...] | None:
    """The global names that code reads, its inner functions' included.

    Returns:
        The names; None if it imports a module that is no library.

    Example:
        >>> globals_read((lambda x: len(x) + shift).__code__)
        ('len', 'shift')
    """
    names: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME" and not is_library(instruction.argval):
            return None
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = globals_read(constant)
            if inner is None:
                return None
            names.extend(inner)
    return tuple(dict.fromkeys(names))
