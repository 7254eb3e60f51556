"""Calls of an energy function, and errors that say which energy failed at which points, and why.

An energy takes points with any number of batch dimensions, none included: MCMC, ``sample`` and the
losses call it at points of different shapes. A network that takes one batch dimension, or numbers
of its own dtype alone, fails in the middle of its layers, with an error that does not mention the
energy. At a single point it is called again with a batch of one; else at the same points in another
shape and dtype, to see whether it takes those.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn

from pyro_ebm.internals.pyro_runtime import weights_are_samples, with_random_weights
from pyro_ebm.internals.tracing import is_capturing
from pyro_ebm.ops.arguments import first_line

NARROW = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16})
"""Dtypes of pixels and flags, in which the arithmetic of an energy overflows in silence."""

_OF_SHAPES = re.compile(
    r"\bshapes?\b|\bsizes?\b|\bdim(ension)?s?\b|\belements?\b|\bchannels?\b", re.I
)


class EnergyCallError(ValueError):
    """An energy cannot be called at points of this shape, dtype or device."""


@contextlib.contextmanager
def at_site(name: str) -> Iterator[None]:
    """Errors of an energy that is called within this context name the site.

    Example:
        >>> with at_site("x"):
        ...     raise EnergyCallError("the energy failed")
        Traceback (most recent call last):
        ...
        pyro_ebm.distributions.checks.energy_calls.EnergyCallError: site 'x': the energy failed
    """
    try:
        yield
    except EnergyCallError as error:
        error.args = (f"site {name!r}: {error}",)
        raise
    except Exception as error:
        error.add_note(f"(at site {name!r})")
        raise


class _RefuseSampling(Messenger):
    def _pyro_sample(self, msg: Message) -> None:
        raise RuntimeError(
            f"the energy draws its weight {msg['name']!r} (a PyroSample) anew whenever it is"
            " evaluated: read the weight in the model and give the energy its value, as in"
            " w = net.weight; UnnormalizedEnergy(lambda x: f(x, w))"
        )


@contextlib.contextmanager
def fixed_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context reading a ``PyroSample`` of a module is an error.

    ``log_prob`` is called when the model has returned. A ``PyroSample`` read there is a fresh draw
    from its prior, not the value in the trace.

    Raises:
        RuntimeError: at such a read.
    """
    random = with_random_weights(modules)
    if not random:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_RefuseSampling())
        for module in random:  # an active context turns the read into a sample statement
            stack.enter_context(weights_are_samples(module))
        yield


def of_batch_of_one(energy: Callable[[Tensor], Any], x: Tensor) -> Tensor | None:
    """The energy of a single point, of a function that takes points in one batch dimension alone.

    Many networks do, and Pyro shows a model one point at a time. None of one that does not.

    Args:
        energy: the function.
        x: a point, shape ``(*event)``.

    Example:
        >>> of_batch_of_one(lambda x: x.square().sum(1), torch.ones(3))
        tensor(3.)
    """
    try:
        value = energy(x[None])
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    return value[0] if isinstance(value, Tensor) and value.shape == (1,) else None


def explain(
    error: Exception,
    energy: Callable[[Tensor], object],
    name: str,
    x: Tensor,
    event_shape: torch.Size,
    like: Tensor,
) -> None:
    """Raises an error that says more than the one that an energy raised, or adds a note to that.

    Args:
        error: what it raised.
        energy: the function.
        name: what to call it.
        x: the points, shape ``(*sample, *batch, *event)``.
        event_shape: of the energy.
        like: a tensor of the energy's dtype and device.

    Raises:
        EnergyCallError: if the shape, dtype or device of the points is to blame.
    """
    if isinstance(error, EnergyCallError | torch.linalg.LinAlgError | torch.OutOfMemoryError):
        return
    if is_capturing():  # a graph is being captured
        return
    failed = f"the energy {name} failed at points of shape {tuple(x.shape)}"
    if isinstance(error, RuntimeError | ValueError | TypeError | IndexError):
        said = first_line(error)
        if other := _of_another_kind(energy, x, like):
            raise EnergyCallError(f"{failed} ({said}): {other}") from error
        if (shape := _another_shape(energy, x, event_shape)) is not None:
            raise EnergyCallError(
                f"{failed} ({said}), though not at shape {tuple(shape)}: an energy must take any"
                " number of batch dimensions, none included, and sum over those of the event."
                f" Use MLPEnergy or ConvEnergy of pyro_ebm.nn, or wrap it: {_wrapped(event_shape)}"
            ) from error
        hint = missing_event_shape(x.shape[1:] or (8, 8)) if not event_shape else ""
        if type(error) in (RuntimeError, ValueError, IndexError) and _OF_SHAPES.search(said):
            raise EnergyCallError(
                f"{failed}, with event_shape={tuple(event_shape)} ({said}): event_shape is the"
                " shape of one point, and an energy must map points (*batch, *event), with any"
                f" number of batch dimensions, none included, to energies (*batch){hint}"
            ) from error
    error.add_note(f"({failed}, with event_shape={tuple(event_shape)})")


def missing_event_shape(shape: tuple[int, ...]) -> str:
    """What an error says of an energy that was given none, at points that may have this shape."""
    say = f"such as event_shape={tuple(shape)}"
    return f". () is the shape of a number: for points of another give it, {say}"


def _of_another_kind(energy: Callable[[Tensor], object], x: Tensor, like: Tensor) -> str | None:
    """In words, whether it takes these points with its own dtype or on its own device."""
    if x.device != like.device and _takes(energy, x.to(like.device, like.dtype)):
        return f"the points are on {x.device}, the energy is on {like.device}: move one of them"
    if x.dtype == like.dtype or not _takes(energy, x.to(like.dtype)):
        return None
    if not x.is_floating_point():
        return f"the points are of {x.dtype}, no real numbers: use {_cast(like.dtype)}"
    return (
        f"the points are of {x.dtype}, the energy computes in {like.dtype}: use"
        f" {_cast(like.dtype)}, or turn the network by net.to({x.dtype})"
    )


def _cast(dtype: torch.dtype) -> str:
    return "x.float()" if dtype == torch.float32 else f"x.to({dtype})"


def _another_shape(
    energy: Callable[[Tensor], object], x: Tensor, event_shape: torch.Size
) -> torch.Size | None:
    """The shape, with one batch dimension or with none, at which it takes the same points."""
    if x.numel() == 0:
        return None
    flat = x.reshape((-1,) + event_shape)
    for points, batch in ((flat, flat.shape[:1]), (flat[0], ())):
        if points.shape != x.shape and _takes(energy, points, torch.Size(batch)):
            return points.shape
    return None


def _takes(energy: Callable[[Tensor], object], x: Tensor, want: torch.Size | None = None) -> bool:
    """Whether it maps these points to anything, or to a tensor of this shape."""
    try:
        value = energy(x)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return want is None or (isinstance(value, Tensor) and value.shape == want)


def _wrapped(event_shape: torch.Size) -> str:
    """Code that flattens the batch before a network and puts it back behind."""
    inner = "".join(f", {size}" for size in event_shape)
    outer = f"[:-{len(event_shape)}]" if event_shape else ""
    return f"lambda x: net(x.reshape(-1{inner})).reshape(x.shape{outer})"
