"""Checks of arguments, whose errors name the argument, what it got and what it wanted.

A wrong argument is an error where it is given, and not one of Python's or torch's in the middle of
a computation.
"""

import math
import operator
import reprlib
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor


class _Short(reprlib.Repr):
    """Representations of at most a line or two: arrays by their shape, a class as what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.maxstring = 200

    def repr_instance(self, x: object, level: int) -> str:
        if isinstance(x, type):
            return f"the class {x.__name__} (make one: {x.__name__}(...))"
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and math.prod(shape) > 10:
            text, dtype = f"{type(x).__name__} of shape {tuple(shape)}", getattr(x, "dtype", None)
            return text if dtype is None else f"{text} and dtype {dtype}"
        return super().repr_instance(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """A value as an error shows it: its ``repr`` where that is short.

    Example:
        >>> print(shown("wide"), shown(torch.zeros(2)), shown(torch.zeros(5, 100)))
        'wide' tensor([0., 0.]) Tensor of shape (5, 100) and dtype torch.float32
        >>> print(shown([1.0] * 100), shown(dict))
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...] the class dict (make one: dict(...))
    """
    return _SHORT.repr(value)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _as_tensor(value: object) -> str:
    """A hint for numbers that are no tensor, else nothing."""
    return "" if isinstance(value, Tensor) or not is_array(value) else ": use torch.as_tensor"


def is_array(value: object) -> bool:
    """Whether it holds numbers as NumPy or lists do, or tensors.

    Example:
        >>> is_array([1.0, 2.0]), is_array("wide")
        (True, False)
    """
    return isinstance(value, list | tuple) or hasattr(value, "__array__")


def check_number(name: str, value: object) -> None:
    """Raises a ValueError unless it is a number, or a tensor of one; NaN is one, True is not.

    Example:
        >>> check_number("width", 1.5)
        >>> check_number("width", "wide")
        Traceback (most recent call last):
        ...
        ValueError: width must be a number, got 'wide'
    """
    number = isinstance(value, Real) and not isinstance(value, bool)  # NumPy's are real too
    if isinstance(value, Tensor):
        number = value.numel() == 1 and not value.is_complex()
    if not number:
        raise ValueError(f"{name} must be a number, got {shown(value)}{_as_tensor(value)}")


def check_count(name: str, value: object, least: int = 1) -> int:
    """The value as an ``int``; raises a ValueError unless it is an integer of at least ``least``.

    Example:
        >>> check_count("num_steps", torch.tensor(3))
        3
        >>> check_count("num_steps", 0)
        Traceback (most recent call last):
        ...
        ValueError: num_steps must be an integer of at least 1, got 0
    """
    try:
        number = operator.index(value) if isinstance(value, SupportsIndex) else None
    except TypeError:  # a tensor of several numbers, or of real ones
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    return number


def check_callable(name: str, value: object, what: str = "a function") -> None:
    """Raises a ValueError unless it can be called, and is not a class.

    Example:
        >>> check_callable("init_strategy", 3)
        Traceback (most recent call last):
        ...
        ValueError: init_strategy must be a function, got 3
    """
    if not isinstance(value, Callable) or isinstance(value, type):
        raise ValueError(f"{name} must be {what}, got {shown(value)}")


def check_names(name: str, value: object) -> None:
    """Raises a ValueError unless it is a collection of names.

    Example:
        >>> check_names("names", "x")
        Traceback (most recent call last):
        ...
        ValueError: names must hold names of sites, as ["x"], got 'x'
    """
    # a tensor without dimensions cannot be iterated over
    given = value if isinstance(value, Collection) and not isinstance(value, str | Tensor) else None
    if given is None or not all(isinstance(each, str) for each in given):
        raise ValueError(f'{name} must hold names of sites, as ["x"], got {shown(value)}')


def check_mapping(name: str, value: object, of: type = object, what: str = "values") -> None:
    """Raises a ValueError unless it is a dict, from names to things of a type.

    Example:
        >>> check_mapping("initial_params", {"x": 1.0}, Tensor, "tensors")
        Traceback (most recent call last):
        ...
        ValueError: initial_params must be a dict from names to tensors, got {'x': 1.0}
    """
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) and isinstance(each, of) for key, each in value.items()
    ):
        raise ValueError(f"{name} must be a dict from names to {what}, got {shown(value)}")


def check_tensor(name: str, value: object, what: str = "a tensor of real numbers") -> None:
    """Raises a ValueError unless it is a tensor, and not of complex numbers.

    Example:
        >>> check_tensor("data", [1.0, 2.0])
        Traceback (most recent call last):
        ...
        ValueError: data must be a tensor of real numbers, got [1.0, 2.0]: use torch.as_tensor
    """
    if not isinstance(value, Tensor) or value.is_complex():
        raise ValueError(f"{name} must be {what}, got {shown(value)}{_as_tensor(value)}")


def checked_device(name: str, value: torch.device | str | int | None) -> torch.device | None:
    """The value as a ``torch.device``; None stays None.

    Example:
        >>> checked_device("draws_device", "nowhere")
        Traceback (most recent call last):
        ...
        ValueError: draws_device must be a device, such as "cpu", got 'nowhere'
    """
    if value is None:
        return None
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f'{name} must be a device, such as "cpu", got {shown(value)}') from error
