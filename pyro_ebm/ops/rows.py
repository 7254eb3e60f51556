r"""Whether the rows of a batch influence each other in a function that should take them one by one.

An energy maps a batch of points to a batch of energies, and that of a row must be a function of
its own point, :math:`E_i = E(x_i)`. A layer that normalises over the batch makes it
:math:`E(x_i; x_1, \dots, x_n)`: data, draws and noise then have energies of different functions.

The test keeps some rows where they are and replaces all others. Shapes, and whatever else a
function holds for each row, stay as they are. The others become copies of one point: to exchange
them among each other would change no mean over the batch.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.files import random_state, set_random_state
from pyro_ebm.internals.compilers import as_written

ROUNDING = 100
"""Differences of so many units in the last place of the largest value are no influence,"""
MAX_RELATIVE = 0.05
"""nor are, in low precision, those of so large a part of it."""


def rows_interact(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    event_dim: int = 0,
    modules: Iterable[nn.Module] = (),
    seed: int = 0,
) -> bool:
    """Whether the value of some row changes with other rows of the batch.

    Every evaluation draws the same random numbers and starts from the same buffers, so that
    dropout and layers with a state of their own do not count as influence. Random state and
    buffers are put back.

    Args:
        function: maps ``(*batch, *event)`` to ``(*batch)``.
        x: points, shape ``(*batch, *event)``; with fewer than two rows nothing can be said.
        event_dim: number of event dimensions.
        modules: the modules that the function evaluates, whose buffers are to be put back.
        seed: chooses the rows that are kept.

    Example:
        >>> x = torch.randn(5, 2)
        >>> rows_interact(lambda x: x.square().sum(-1), x, event_dim=1)
        False
        >>> rows_interact(lambda x: (x - x.mean(0)).square().sum(-1), x, event_dim=1)
        True
    """
    x = x.detach().clone()
    batch = x.shape[: x.dim() - event_dim]
    if batch.numel() < 2 or x.numel() == 0:
        return False
    modules = tuple(modules)

    def at(points: Tensor) -> Tensor:
        return evaluated(function, points, modules)

    try:
        value = at(x)
        floating = [t.dtype for t in (x, value) if t.is_floating_point()]
        eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
        scale = 1 + float(value.double().abs().masked_fill(~value.isfinite(), 0).max())
        tolerance = min(ROUNDING * eps, MAX_RELATIVE) * scale
        half = _half(batch, seed).to(x.device)
        for kept in (half, ~half):
            rows = kept.reshape(batch + (1,) * event_dim)
            copied = x.reshape((-1,) + x.shape[len(batch) :])[kept.flatten()][0]
            apart = _apart(value, at(torch.where(rows, x, copied)), kept)
            # a function with a random source of its own differs from itself as well
            if not apart <= tolerance and not apart <= tolerance + 10 * _apart(value, at(x), kept):
                return True
        return False
    except torch.linalg.LinAlgError:  # a matrix of one row at the point of another
        return False


def evaluated(
    function: Callable[[Tensor], Any], x: Tensor, modules: Iterable[nn.Module] = ()
) -> Tensor:
    """What a function of points gives, detached, with nothing left of the evaluation.

    Random state and buffers are put back, and compiled modules are run as they are written.

    Args:
        function: maps ``(*batch, *event)`` to ``(*batch)``.
        x: points, shape ``(*batch, *event)``.
        modules: the modules that the function evaluates, whose buffers are to be put back.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> first, again = (evaluated(net, torch.ones(9), [net]) for _ in range(2))
        >>> torch.equal(first, again)
        True
    """
    with random_state_put_back(), buffers_put_back(modules), as_written():
        try:
            with torch.no_grad():
                return function(x).detach()
        except RuntimeError:  # a function that differentiates inside
            with torch.enable_grad():
                return function(x).detach()


def _half(batch: torch.Size, seed: int) -> Tensor:
    """True at about half of the rows, at least one and not all, shape ``batch``."""
    order = torch.randperm(batch.numel(), generator=torch.Generator().manual_seed(seed))
    return (order < batch.numel() // 2).reshape(batch)


def _apart(one: Tensor, other: Tensor, rows: Tensor) -> float:
    """The largest difference of values in the rows, infinite where only one of them is finite."""
    one, other = one[rows].double(), other[rows].double()
    same = (one == other) | (one.isnan() & other.isnan())
    apart = (one - other).abs().masked_fill(same, 0.0)
    return float(apart.masked_fill(apart.isnan(), torch.inf).max())


@contextlib.contextmanager
def random_state_put_back() -> Iterator[None]:
    """Puts all global random number generators back to where they were.

    Example:
        >>> with random_state_put_back():
        ...     x = torch.rand(3)
        >>> torch.equal(torch.rand(3), x)
        True
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def buffers_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts running averages, and other buffers of modules, back to what they were.

    Example:
        >>> net = nn.BatchNorm1d(1)
        >>> with buffers_put_back([net]):
        ...     _ = net(torch.randn(5, 1))
        >>> net.running_mean, net.num_batches_tracked
        (tensor([0.]), tensor(0))
    """
    held = [
        (m, name, buffer, buffer.detach().clone())
        for m in modules
        for name, buffer in m._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in held:
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)
