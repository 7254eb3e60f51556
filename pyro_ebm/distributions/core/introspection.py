"""The tensors and modules that callables, distributions and supports hold."""

import contextlib
import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator

import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.internals.functorch import is_wrapped
from pyro_ebm.internals.tracing import is_capturing


def sources(function: object, _depth: int = 4) -> Iterator[Tensor | nn.Module]:
    """The modules and tensors that a callable holds: as a module, in a closure, partial or method.

    Globals that a function names are among them, and those of the functions of its own file that
    it calls. The answer is used to follow an energy's device and dtype, and to find its modules.

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


def _parts(function: object) -> Iterator[object]:
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
        for name in _globals_read(function.__code__):
            value = function.__globals__.get(name)
            own = getattr(value, "__globals__", None) is function.__globals__
            if own or isinstance(value, nn.Module | Tensor):
                yield value
    elif callable(function) or isinstance(function, constraints.Constraint):
        yield from getattr(function, "__dict__", {}).values()


@functools.lru_cache(maxsize=1024)
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function's code loads, its inner functions' included."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.extend(_globals_read(constant))
    return tuple(dict.fromkeys(names))


def modules(function: Callable[..., object]) -> tuple[nn.Module, ...]:
    """Every module reachable from a callable, submodules included."""
    found = {id(m): m for s in sources(function) if isinstance(s, nn.Module) for m in s.modules()}
    return tuple(found.values())


def first_tensor(*functions: object) -> Tensor | None:
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


def held(parts: Iterable[object]) -> tuple[Tensor | nn.Module, ...]:
    """The modules and tensors of distributions and tensors, each once.

    A callable that keeps them in an attribute shows them to :func:`sources`, however deep its parts
    are nested.

    Example:
        >>> held([dist.Normal(torch.tensor(1.0), 2.0)])
        (tensor(1.), tensor(2.))
    """
    inside = [  # the distributions of torch are no callables
        x for p in parts for x in (vars(p).values() if isinstance(p, Distribution) else [p])
    ]
    return tuple({id(source): source for x in inside for source in sources(x)}.values())


def name_of_function(function: object) -> str:
    """The name of a callable, or of its class.

    Example:
        >>> name_of_function(torch.square), name_of_function(lambda x: x)
        ('square', 'lambda')
    """
    name = getattr(function, "__name__", None)
    return type(function).__name__ if name is None else name.replace("<lambda>", "lambda")


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values of a tensor.

    Example:
        >>> readable(torch.ones(2))
        True
        >>> seen = []
        >>> _ = torch.vmap(lambda x: seen.append(readable(x)) or x)(torch.ones(2))
        >>> seen
        [False]
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not is_wrapped(tensor)
        and not is_capturing()
        and not torch.jit.is_tracing()
    )


def elementwise(support: constraints.Constraint) -> constraints.Constraint:
    """The constraint of the smallest part of an event.

    Example:
        >>> elementwise(dist.constraints.independent(dist.constraints.positive, 2))
        GreaterThan(lower_bound=0.0)
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def bounds_of(support: object) -> list[Tensor | float]:
    """The tensors and numbers that a constraint is made of.

    Example:
        >>> from pyro.distributions.constraints import greater_than, independent
        >>> bounds_of(independent(greater_than(torch.ones(1)), 1))
        [tensor([1.]), 1]
    """
    if isinstance(support, Tensor | int | float):
        return [support]
    if isinstance(support, constraints.Constraint):
        support = vars(support).values()
    elif not isinstance(support, list | tuple):
        return []
    return [bound for part in support for bound in bounds_of(part)]


def detached(x: Tensor | float) -> Tensor | float:
    """A tensor without its provenance; a number as it is."""
    return detach_provenance(x) if isinstance(x, Tensor) else x


def tensors_of(support: object) -> list[Tensor]:
    """The tensors that a constraint is made of: its bounds."""
    return [bound for bound in bounds_of(support) if isinstance(bound, Tensor)]
