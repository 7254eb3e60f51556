r"""Whether two functions, made at different times, compute the same.

A model makes its energy anew whenever it runs, often from a ``lambda``. A graph that was captured
of the first may serve the second only if both compute the same from the same tensors. An
*identity* is equal for two values only if they are made of the same code, the same tensors and
modules, and equal numbers. It follows closures, defaults, attributes, and the globals that code
reads. Where there is something that it cannot follow, a value has no identity.
"""

import functools
import types
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from pyro_ebm.ops.code import SCALARS, globals_read, is_library
from pyro_ebm.ops.settings import HasSettings

IGNORED = {"_unexpanded", "_modules", "kernel", "num_steps", "_validate_args"}
"""Attributes of an energy that its density does not depend on."""


class _UnsureError(Exception):
    """A value has no identity that could be compared."""


class CodeIdentity:
    """A key that is equal for values that compute the same.

    Attributes:
        key: equal for values that compute the same; None where there is none.
        held: the objects that the key compares by ``id``, kept alive.
        reason: why there is no key.

    Args:
        *values: functions, energies, kernels.

    Example:
        >>> def made(w, power):
        ...     return lambda x: w * x**power
        >>> w = torch.ones(())
        >>> CodeIdentity(made(w, 2)).key == CodeIdentity(made(w, 2)).key
        True
        >>> CodeIdentity(made(w, 2)).key == CodeIdentity(made(w, 4)).key
        False
        >>> CodeIdentity(made(w, 2)).key == CodeIdentity(made(w.clone(), 2)).key
        False
    """

    def __init__(self, *values: object):
        self.held: list[object] = []
        self._parts: list[object] = []
        self._seen: dict[int, int] = {}
        self.key: Hashable = None
        self.reason = ""
        try:
            for value in values:
                self._add(value)
        except _UnsureError as error:
            self.held, self.reason = [], str(error)
        else:
            self.key = tuple(self._parts)

    def _add(self, value: object) -> None:
        kind = type(value)
        if kind in SCALARS:
            self._parts += (kind, value)
        elif isinstance(value, Tensor):
            if value.grad_fn is not None:
                raise _UnsureError("it reads a computed tensor, which is another one at each step")
            if value._is_view():  # of the same memory, seen in the same way
                self._same(value._base)
                self._parts += (value.storage_offset(), value.stride())
            else:
                self._same(value)
            self._parts += (value.shape, value.dtype, value.device)
        elif id(value) in self._seen:
            self._parts.append(self._seen[id(value)])
        else:
            self._seen[id(value)] = -1 - len(self._seen)
            self.held.append(value)
            self._look_into(value, kind)

    def _same(self, value: object) -> None:
        self.held.append(value)
        self._parts.append(id(value))

    def _look_into(self, value: Any, kind: type) -> None:
        if kind is tuple:
            self._parts += (kind, len(value))
            for part in value:
                self._add(part)
        elif isinstance(value, list | dict):
            self._same(value)
            self._attributes(value if isinstance(value, dict) else dict(enumerate(value)))
        elif kind in (set, frozenset):
            if any(type(part) not in SCALARS for part in value):
                raise _UnsureError(f"it reads the set {value!r}")
            self._parts.append(frozenset((type(part), part) for part in value))
        elif kind is types.FunctionType:
            self._function(value)
        elif kind is types.MethodType:
            self._add(value.__self__)
            self._add(value.__func__)
        elif kind is functools.partial:
            for part in (value.func, tuple(value.args)):
                self._add(part)
            self._attributes(value.keywords)
        elif isinstance(value, type):
            self._class(value)
        elif kind is types.ModuleType:
            if not is_library(value.__name__):
                raise _UnsureError(f"it reads the module {value.__name__!r}")
            self._same(value)
        elif kind is types.BuiltinFunctionType:
            if not isinstance(value.__self__, types.ModuleType | type | None):
                raise _UnsureError(f"it reads {value!r}")
            self._same(value)
        elif isinstance(value, HasSettings):
            self._class(kind)
            self._attributes(value.settings)
        elif isinstance(value, Distribution | Constraint | Transform):
            # made anew, and not changed once made
            self._class(kind)
            self._attributes({k: v for k, v in vars(value).items() if k not in IGNORED})
        elif hasattr(value, "__dict__"):
            self._same(value)
            self._class(kind)
            self._attributes(vars(value))
        else:
            raise _UnsureError(f"it reads an object of type {kind.__name__}")

    def _attributes(self, values: Mapping[Any, object]) -> None:
        self._parts.append(len(values))
        for name, value in values.items():
            if type(name) not in SCALARS:
                raise _UnsureError(f"it reads a dict with the key {name!r}")
            kind = type(value)
            if kind in SCALARS:
                self._parts += (name, kind, value)
            elif isinstance(value, list | dict | set) and not value:
                self._parts += (name, kind)
            else:
                self._parts.append(name)
                self._add(value)

    def _function(self, function: types.FunctionType) -> None:
        names = () if is_library(function.__module__) else globals_read(function.__code__)
        if names is None:
            raise _UnsureError(f"{function.__qualname__} imports a module")
        self._same(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self._add(cell.cell_contents)
            except ValueError as error:
                raise _UnsureError("it reads a variable that is not assigned yet") from error
        self._add(function.__defaults__)
        self._attributes(function.__kwdefaults__ or {})
        self._attributes(vars(function))
        for name in names:
            if name in function.__globals__:
                self._parts.append(name)
                self._add(function.__globals__[name])

    def _class(self, kind: type) -> None:
        self._same(kind)
        for base in _own_bases(kind):
            if id(base) in self._seen and base is not kind:
                continue
            self._seen[id(base)] = -1 - len(self._seen)
            for name, value in vars(base).items():
                inner = getattr(value, "__func__", getattr(value, "fget", value))
                bookkeeping = name.startswith(("__", "_abc_"))
                if isinstance(inner, types.FunctionType) or not bookkeeping:
                    self._add(inner)


@functools.lru_cache(maxsize=1024)
def _own_bases(kind: type) -> tuple[type, ...]:
    """The class and its bases, but for those of libraries."""
    return tuple(base for base in kind.__mro__ if not is_library(base.__module__))
