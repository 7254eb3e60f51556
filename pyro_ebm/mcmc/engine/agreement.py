r"""Whether a captured graph and the function that it was captured of give the same values.

They make the same operations, so that their values differ by rounding or not at all. Rounding is
some :math:`\epsilon` of the largest value; where a function makes much of it (an ill-conditioned
matrix, a chaotic recursion, a proposal on the edge of its acceptance), it makes as much of a change
of its arguments by some :math:`\epsilon`. So what differs is compared with what the graph itself
gives at arguments a few :math:`\epsilon` away: values that scatter more than they differ agree.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROUNDING = 100  # eps of the largest value: the difference that rounding makes
NUDGE = 8  # eps by which arguments are changed
NUM_NUDGES = 8
SCATTER = 16  # times as much as the graph scatters, a value may differ


def agree(
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    graph: Callable[[list[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
) -> bool:
    """Whether the values of a graph are those of its function, up to rounding.

    Args:
        found: the values of the graph.
        wanted: the values of the function.
        graph: the graph.
        tensors: its arguments.

    Example:
        >>> x = [torch.tensor([1.0, 1e6])]
        >>> def jump(x):
        ...     return [torch.where(x[0] > 1e6, 1.0, 0.0)]  # the second one is on the edge
        >>> agree(jump(x), [torch.tensor([0.0, 1.0])], jump, x)
        True
        >>> agree(jump(x), [torch.tensor([1.0, 0.0])], jump, x)
        False
    """
    if len(found) != len(wanted) or any(
        (f.shape, f.dtype) != (w.shape, w.dtype) for f, w in zip(found, wanted, strict=True)
    ):
        return False
    apart = [~_close(*pair) for pair in zip(found, wanted, strict=True)]
    if not any(map(torch.any, apart)):
        return True
    scattered = [[x] for x in found]
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_NUDGES):
        nudged = [_nudge(x, generator) for x in tensors]
        with contextlib.suppress(torch.linalg.LinAlgError):
            for values, value in zip(scattered, graph(nudged), strict=True):
                values.append(value)
    pairs = zip(apart, wanted, scattered, strict=True)
    return all(_within(want[bad], [x[bad] for x in values]) for bad, want, values in pairs)


def _close(found: Tensor, wanted: Tensor) -> Tensor:
    """Where two tensors are equal up to rounding, boolean, of their shape."""
    if not found.is_floating_point():
        return found == wanted
    finite = wanted.isfinite()
    scale = torch.where(finite, wanted, 0.0).abs().max() if wanted.numel() else 0.0
    rounding = ROUNDING * torch.finfo(wanted.dtype).eps * scale
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    return same | (finite & ((found - wanted).abs() <= rounding))


def _nudge(x: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor, each element by a few eps larger or smaller; as it is if it holds no reals."""
    if not x.is_floating_point():
        return x
    sign = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
    return x * (1 + NUDGE * torch.finfo(x.dtype).eps * sign)


def _within(wanted: Tensor, values: list[Tensor]) -> bool:
    """Whether values lie within what a graph scatters, the first value being its own."""
    if not wanted.is_floating_point():
        return bool(torch.stack([value == wanted for value in values]).any(0).all())
    all_values = torch.stack(values)
    # a value that is not finite here and there: the function is on an edge
    odd = ~all_values.isfinite()
    scatter = (all_values - all_values[0]).abs().amax(0)
    close = (wanted - all_values[0]).abs() <= SCATTER * scatter
    return bool((close | (odd.any(0) & ~odd.all(0))).all())
