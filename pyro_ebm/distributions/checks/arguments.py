"""Checks of an energy's arguments: shapes, a base, a normalizer, a power that fit each other."""

import math
from collections.abc import Iterable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_ebm.ops.arguments import shown


def checked_shape(name: str, shape: Iterable[int]) -> torch.Size:
    """The shape as a ``torch.Size``.

    Raises:
        ValueError: if it is no tuple of sizes, such as a number.
    """
    try:
        sizes = torch.Size(shape)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a tuple of sizes, such as (3,), got {shown(shape)}"
        ) from error
    if any(size < 0 for size in sizes):
        raise ValueError(f"{name} must be a tuple of sizes, none below 0, got {shown(shape)}")
    return sizes


def expands(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another.

    Example:
        >>> expands(torch.Size([3, 1]), torch.Size([3, 2])), expands((2,), torch.Size([3]))
        (True, False)
    """
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


def expanded_base(
    base: TorchDistribution, batch_shape: torch.Size, event_shape: torch.Size
) -> TorchDistribution:
    """The base with the energy's batch shape.

    Raises:
        ValueError: if its event shape is not the energy's, or its batch does not expand.
    """
    if base.event_shape != event_shape:
        hint = (
            f": write base.expand({tuple(event_shape)}).to_event({len(event_shape)})"
            if not base.event_shape
            else ""
        )
        raise ValueError(
            f"base {type(base).__name__} has event_shape={tuple(base.event_shape)}, the energy"
            f" wants {tuple(event_shape)}{hint}"
        )
    try:
        return base.expand(batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"base {type(base).__name__} has batch_shape={tuple(base.batch_shape)}, which does not"
            f" expand to the energy's {tuple(batch_shape)}"
        ) from error


def checked_normalizer(log_normalizer: Tensor | None, batch_shape: torch.Size) -> Tensor | None:
    """The normalizer, if there is one log Z for each batch element.

    Raises:
        ValueError: if its shape does not broadcast to the batch shape.
    """
    if log_normalizer is None:
        return None
    if not expands(log_normalizer.shape, batch_shape):
        raise ValueError(
            f"log_normalizer has shape {tuple(log_normalizer.shape)}, which does not broadcast to"
            f" batch_shape={tuple(batch_shape)}: there is one log Z for each batch element"
        )
    return log_normalizer


def checked_coefficient(
    name: str, value: Tensor | float, batch_shape: torch.Size, zero: bool
) -> Tensor | float:
    """A positive power of a density, one for each batch element.

    Args:
        name: what to call it.
        value: the power.
        batch_shape: that of the density.
        zero: whether 0 is allowed too.

    Raises:
        ValueError: if it is not a finite positive number, or does not broadcast.
    """
    if not isinstance(value, Tensor | float | int):
        raise ValueError(f"{name} must be a number or a tensor, got {shown(value)}")
    tensor = torch.as_tensor(value)
    if not expands(tensor.shape, batch_shape):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to batch_shape="
            f"{tuple(batch_shape)}: expand the distribution first"
        )
    if isinstance(value, Tensor):
        wrong = (
            is_validation_enabled()
            and not (tensor.isfinite() & ((tensor >= 0) if zero else (tensor > 0))).all()
        )
    else:
        wrong = not (math.isfinite(value) and (value >= 0 if zero else value > 0))
    if wrong:
        raise ValueError(
            f"{name} must be finite and {'at least 0' if zero else 'greater than 0'}, got {value}"
        )
    return value


def common_batch(what: str, *shapes: tuple[int, ...]) -> torch.Size:
    """The shape that batch shapes broadcast to.

    Args:
        what: what to call the things that have them.
        *shapes: the batch shapes.

    Raises:
        ValueError: if they do not broadcast.
    """
    try:
        return torch.Size(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise ValueError(
            f"the {what} have batch shapes that do not broadcast: {[tuple(s) for s in shapes]}"
        ) from error
