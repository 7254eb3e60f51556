"""Settings of an object: the arguments that it was made with, by name.

The constructor's signature is the one place where they are declared. From it follow what ``repr``
shows, what a copy is made with, and what a checkpoint compares.
"""

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from types import FunctionType
from typing import Self, Unpack, get_args, get_origin, get_type_hints

from torch import Tensor

from pyro_ebm.ops.arguments import shown

_PLAIN = (bool, int, float, str, type(None))


class HasSettings:
    """Keeps the arguments of its constructor, and shows those that differ from the defaults.

    A subclass passes on what it does not name itself as ``**kwargs``. If these are annotated by
    ``Unpack`` of a ``TypedDict``, they are its keys alone.

    Example:
        >>> class Walk(HasSettings):
        ...     def __init__(self, scale=1.0, steps=10):
        ...         pass
        >>> class Drift(Walk):
        ...     def __init__(self, slope, **kwargs):
        ...         super().__init__(**kwargs)
        >>> drift = Drift(0.5, steps=20)
        >>> drift, drift.settings
        (Drift(0.5, steps=20), {'slope': 0.5, 'scale': 1.0, 'steps': 20})
        >>> drift.copy(steps=10)
        Drift(0.5)
        >>> Drift(0.5, stepz=20)
        Traceback (most recent call last):
        TypeError: Drift: got an unexpected keyword argument 'stepz'
    """

    given_settings: dict[str, object]
    """The arguments of the constructor, defaults included."""
    initial_settings: dict[str, object]
    """The attributes of the same names, as the constructor left them."""
    __signature__: inspect.Signature

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(init := vars(cls).get("__init__"), FunctionType):
            cls.__init__ = _recorded(init)
        cls.__signature__ = inspect.Signature(list(_parameters(cls).values()))

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """An object with its settings; the constructor says what is missing."""
        new, signature = super().__new__(cls), cls.__signature__
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}") from None
        settings = {k: given.get(k, p.default) for k, p in signature.parameters.items()}
        settings = {k: v for k, v in settings.items() if v is not Parameter.empty}
        vars(new).update(given_settings=settings, initial_settings={})
        return new

    @property
    def settings(self) -> dict[str, object]:
        """Every parameter of the constructor and its value: as given, or as assigned since."""
        now, initial = vars(self), self.initial_settings
        assigned = {k: now[k] for k, x in initial.items() if not _same(now[k], x)}
        return {**self.given_settings, **assigned}

    def copy(self, **changes: object) -> Self:
        """An object with the same settings, but for the changes, and nothing else of this one."""
        return type(self)(**{**self.settings, **changes})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def _shown(self) -> list[str]:
        """The settings that differ from their defaults, the first one without its name."""
        shown, settings = [], self.settings
        for i, (name, parameter) in enumerate(self.__signature__.parameters.items()):
            value = settings.get(name, parameter.default)
            if not _same(value, parameter.default):
                shown.append(f"{name}={_text(value)}" if i else _text(value))
        return shown


def _recorded(init: FunctionType) -> Callable[..., None]:
    """The constructor, with a note of what it leaves; the outermost one writes it last."""

    @functools.wraps(init)
    def __init__(self: HasSettings, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        now = vars(self)
        now["initial_settings"] = {k: now[k] for k in self.given_settings if k in now}

    return __init__


def _parameters(cls: type) -> dict[str, Parameter]:
    """The parameters of a class's constructor, those that it passes on to its bases included."""
    found: dict[str, Parameter] = {}
    passed: set[str] | None = None  # on to the next base; None is everything
    own = True
    for base in cls.__mro__[:-1]:
        if not isinstance(init := vars(base).get("__init__"), FunctionType):
            continue
        _, *parameters = inspect.signature(init).parameters.values()
        kinds = [p.kind for p in parameters]
        for p in parameters:
            if "VAR" not in p.kind.name and (passed is None or p.name in passed):
                found.setdefault(p.name, p if own else p.replace(kind=Parameter.KEYWORD_ONLY))
        own = own and Parameter.VAR_POSITIONAL in kinds
        rest = [p.annotation for p in parameters if p.kind is Parameter.VAR_KEYWORD]
        if not rest:
            break
        if get_origin(rest[0]) is Unpack:
            named = set(get_type_hints(get_args(rest[0])[0]))
            passed = named if passed is None else passed & named
    return found


def _same(value: object, default: object) -> bool:
    plain = isinstance(value, _PLAIN) and isinstance(default, _PLAIN)
    return value is default or (plain and value == default)


def _text(value: object) -> str:
    """A value in short: functions and modules by their names, numbers to three digits."""
    if isinstance(value, list | tuple) and len(value) <= 10:
        parts = ", ".join(map(_text, value))
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    if isinstance(value, float):
        return str(float(f"{value:.4g}"))
    if isinstance(value, Tensor):
        return shown(value)
    return getattr(value, "__name__", None) or shown(value)
