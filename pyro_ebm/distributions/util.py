"""Small helpers for energy sites: their tensors, their wrappers, their supports."""

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn


def lift_support(
    support: constraints.Constraint, event_shape: torch.Size
) -> constraints.Constraint:
    """The support of a whole event: an elementwise constraint holds for every element.

    Args:
        support: a constraint with ``event_dim`` at most ``len(event_shape)``.
        event_shape: the shape of one event.

    Raises:
        ValueError: if the support has more event dimensions than the event, or if no tensor of
            ``event_shape`` can lie in it.

    Example:
        >>> from torch.distributions import constraints
        >>> lift_support(constraints.positive, torch.Size([3])).event_dim
        1
    """
    missing = len(event_shape) - support.event_dim
    if missing < 0:
        raise ValueError(
            f"the support {support} is of events with {support.event_dim} dimension(s), but"
            f" event_shape={tuple(event_shape)} has {len(event_shape)}: give event_shape="
            " a shape with that many dimensions, or an elementwise support"
        )
    return constraints.independent(support, missing) if missing else support


def sources(function: Any, _depth: int = 4) -> Iterator[Tensor | nn.Module]:
    """The modules and tensors that a callable holds: as a module, in a closure, partial or method.

    The answer is used to follow an energy's device and dtype, and to find its modules; a tensor
    that a function reads from the global scope is not seen.

    Example:
        >>> scale = torch.tensor(2.0)
        >>> list(sources(lambda x: scale * x))
        [tensor(2.)]
    """
    if isinstance(function, nn.Module | Tensor):
        yield function
    elif _depth > 0:
        for part in _parts(function):
            yield from sources(part, _depth - 1)


def _parts(function: Any) -> Iterator[Any]:
    """What a callable, a container or a constraint refers to."""
    if isinstance(function, list | tuple):
        yield from function
    elif isinstance(function, dict):
        yield from function.values()
    elif isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, types.MethodType):
        yield from (function.__self__, function.__func__)
    elif isinstance(function, types.FunctionType):
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that is not assigned yet
                yield cell.cell_contents
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield getattr(function, "__wrapped__", None)
    elif callable(function) or isinstance(function, constraints.Constraint):
        yield from getattr(function, "__dict__", {}).values()


def modules(function: Callable[..., Any]) -> tuple[nn.Module, ...]:
    """Every module reachable from a callable, submodules included."""
    found = {id(m): m for s in sources(function) if isinstance(s, nn.Module) for m in s.modules()}
    return tuple(found.values())


def first_tensor(*functions: Any) -> Tensor | None:
    """The first floating tensor among the sources of the arguments: it tells dtype and device."""
    for function in functions:
        for source in sources(function):
            tensors = (
                [source]
                if isinstance(source, Tensor)
                else [*source.parameters(), *source.buffers()]
            )
            for tensor in tensors:
                if tensor.is_floating_point():
                    return tensor
    return None


def tensors_of(support: Any) -> list[Tensor]:
    """The tensors that a constraint is made of: its bounds.

    Example:
        >>> tensors_of(dist.constraints.independent(dist.constraints.greater_than(torch.ones(1)), 1))
        [tensor([1.])]
    """
    if isinstance(support, Tensor):
        return [support]
    parts = support if isinstance(support, list | tuple) else vars(support).values()
    return [
        tensor
        for part in parts
        if isinstance(part, Tensor | list | tuple | constraints.Constraint)
        for tensor in tensors_of(part)
    ]


def unvalidated(fn: Any) -> Any:
    """A distribution that checks no values: a point outside the support has no density, no error.

    Samplers propose such points and must see the density there, not an exception; and checks
    branch on values, which ``vmap`` forbids.

    Example:
        >>> p = dist.Normal(0.0, 1.0, validate_args=True).expand([2]).to_event(1)
        >>> unvalidated(p).log_prob(torch.full((2,), float("nan")))
        tensor(nan)
    """
    new = copy.copy(fn)
    if hasattr(new, "_validate_args"):
        new._validate_args = False
    for part in ("base_dist", "base", "_component_distribution", "_mixture_distribution"):
        inner = vars(new).get(part)
        if inner is not None:
            setattr(new, part, unvalidated(inner))
    return new
