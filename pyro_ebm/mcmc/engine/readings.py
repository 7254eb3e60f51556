"""What a function reads from elsewhere: for an error that says what has changed.

A captured graph refers to tensors, and holds numbers as they were. Which numbers a function reads
nobody can know for certain: here its closures, the globals of its code, the attributes of objects
and what containers hold are followed, as far as that is easy. Nothing rests on it but a sentence.
"""

import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.code import SCALARS, globals_read, is_library

MAX_OBJECTS = 5000
MAX_ITEMS = 100  # of a container that is looked into


class Readings:
    """The numbers, strings and tensors that a function reads beside its arguments, as they are now.

    Args:
        function: any callable.
        ignored: objects that are not looked into.

    Attributes:
        values: by name, of those that user code gives a name.

    Example:
        >>> scale = 2.0
        >>> def energy(x):
        ...     return scale * x**2
        >>> energy.__module__ = "__main__"  # where users write it
        >>> before = Readings(energy)
        >>> scale = 3.0
        >>> before.changes(Readings(energy))
        ['scale, which energy reads, was 2.0 and is 3.0']
    """

    def __init__(self, function: object, ignored: Iterable[object] = ()):
        self.values: dict[str, object] = {}
        self._ignored = {id(x) for x in ignored}
        self._seen: dict[int, object] = {}  # kept alive for as long as ids are compared
        self._look_at(function, "", "")
        self._seen = {}

    def changes(self, now: "Readings") -> list[str]:
        """What is another value now, in words."""
        found = []
        for name, value in self.values.items():
            if name in now.values and not _same(value, other := now.values[name]):
                if isinstance(value, Tensor) or isinstance(other, Tensor):
                    found.append(f"{name}, is another tensor")
                else:
                    found.append(f"{name}, was {shown(value)} and is {shown(other)}")
        return found

    def _look_at(self, value: Any, name: str, reader: str) -> None:
        """Looks at a value that code of ``reader`` reads as ``name``, if both are known."""
        kind = type(value)
        if kind in SCALARS or isinstance(value, Tensor):
            if name and reader:
                self.values.setdefault(f"{name}, which {reader} reads", value)
            return
        key = id(value)
        if key in self._seen or key in self._ignored or len(self._seen) >= MAX_OBJECTS:
            return
        self._seen[key] = value
        if kind is types.MethodType:
            self._look_at(value.__self__, "self", value.__func__.__qualname__)
            self._look_at(value.__func__, name, reader)
        elif kind is types.FunctionType:
            self._look_into(value)
        elif kind is functools.partial:
            for part in (value.func, *value.args, *value.keywords.values()):
                self._look_at(part, "", "")
        elif kind in (list, tuple, dict):
            items = value.items() if kind is dict else enumerate(value)
            for i, item in list(items)[:MAX_ITEMS]:
                self._look_at(item, f"{name}[{i!r}]" if name else "", reader)
        elif not isinstance(value, type | types.ModuleType) and hasattr(value, "__dict__"):
            own = "" if is_library(kind.__module__) else name or kind.__name__
            for attribute, item in list(vars(value).items()):
                self._look_at(item, f"{own}.{attribute}" if own else "", reader or kind.__name__)
            if own:
                for function in vars(kind).values():
                    if isinstance(function, types.FunctionType):
                        self._look_into(function)

    def _look_into(self, function: types.FunctionType) -> None:
        own = not is_library(function.__module__)
        reader = function.__qualname__.rpartition("<locals>.")[2] if own else ""
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                self._look_at(cell.cell_contents, name if own else "", reader)
            except ValueError:  # not assigned yet
                continue
        if own:
            for name in globals_read(function.__code__) or ():
                self._look_at(function.__globals__.get(name), name, reader)
            for name, value in (function.__kwdefaults__ or {}).items():
                self._look_at(value, name, reader)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return type(one) is type(other) and (one == other or one != one)
