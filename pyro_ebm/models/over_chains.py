"""A function of one chain, evaluated for all of them: at once where that gives the same values."""

import contextlib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from pyro_ebm.internals.lookup import Operation
from pyro_ebm.internals.tracing import is_capturing
from pyro_ebm.models.batched import Batched, refuse_slow
from pyro_ebm.ops.arguments import first_line

Way = Literal["vmap", "rewritten", "loop"]

# what vmap may raise of a function that can be evaluated without it
_UNMAPPED = (UserWarning, RuntimeError, ValueError, TypeError, LookupError, AttributeError)


class OverChains:
    r"""A function of one chain, evaluated for all chains in the fastest way that can be trusted.

    The ways are ``"vmap"``, ``torch.func.vmap`` of the function as it is; ``"rewritten"``, with the
    operations replaced that ``vmap`` refuses (:mod:`pyro_ebm.models.batched`); and ``"loop"``, one
    chain after another. The first of them is chosen that gives the function's plain values, and
    without operations that torch maps slowly if there is one. Where it fails later, at values at
    which the function does what it did nowhere before, all further calls loop.

    Args:
        function: maps tensors of one chain, or nested tuples and dicts of them, to the same.
        agrees: whether a candidate, called as this object is, gives the plain values at some of a
            call's arguments; None if they cannot be compared there. By default it compares the
            first and the last chain.
        on_loop: called once, with the reason and the arguments, when the way becomes ``"loop"``.
        ways: which to try.
        chunk_size: how many chains to evaluate at once; None is all.
        randomness: whether chains draw ``"different"`` random numbers, or none (``"error"``).

    Attributes:
        way: the way that was chosen; None before that.

    Raises:
        Exception: whatever the function itself raises.

    Example:
        >>> square = OverChains(lambda x: x**2 if x > 0 else x)
        >>> square(torch.tensor([-1.0, 2.0])), square.way
        (tensor([-1.,  4.]), 'rewritten')
    """

    def __init__(
        self,
        function: Operation,
        agrees: Callable[..., bool | None] | None = None,
        on_loop: Callable[..., None] | None = None,
        ways: tuple[Way, ...] = ("vmap", "rewritten"),
        chunk_size: int | None = None,
        randomness: str = "error",
    ):
        self.function = function
        self.way: Way | None = None
        self._agrees, self._on_loop = agrees or self._ends_agree, on_loop
        self._ways, self._chunk_size, self._randomness = ways, chunk_size, randomness
        self._rewritten = Batched(function)

    def __call__(self, *args: object) -> Any:
        """The values at arguments whose tensors are led by the chains."""
        way, reason = self.way, ""
        if way is None and num_chains(args) > 1:
            way, reason = self._choose(args)
        if way is not None and way != "loop":
            try:
                return self._at_once(way, args)
            except torch.linalg.LinAlgError:
                raise
            except _UNMAPPED as error:
                if is_capturing():
                    raise
                way, reason = "loop", first_line(error)
        values = self.one_by_one(*args)
        if way != self.way:
            self.way = way
            if self._on_loop is not None:
                self._on_loop(reason, *args)
        return values

    def one_by_one(self, *args: object) -> Any:
        """The plain values, of one chain after another."""
        rows = [self.function(*row) for row in _rows(args)]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows)
        return tree_map(lambda *values: torch.stack(values), *rows)

    def _mapped(self, way: Way) -> Operation:
        return (
            self._rewritten
            if way == "rewritten"
            else vmap(self.function, randomness=self._randomness)
        )

    def _at_once(self, way: Way, args: tuple[object, ...]) -> object:
        mapped, num = self._mapped(way), num_chains(args)
        size = self._chunk_size or num
        if num <= size:
            return mapped(*args)
        starts = range(0, num, size)
        parts = [mapped(*tree_map(lambda x, i=i: x[i : i + size], args)) for i in starts]
        return tree_map(lambda *values: torch.cat(values), *parts)

    def _choose(self, args: tuple[object, ...]) -> tuple[Way | None, str]:
        """The way that agrees, which is kept, or ``"loop"`` and the reason; None for no way yet."""
        reason = ""
        for refused in (refuse_slow, contextlib.nullcontext):
            for way in self._ways:
                try:
                    with refused():
                        agrees = self._agrees(self._mapped(way), *args)
                except torch.linalg.LinAlgError:
                    raise
                except _UNMAPPED as error:
                    reason = first_line(error)
                    continue
                if agrees is None:
                    return None, ""
                if agrees:
                    self.way = way
                    return way, ""
                reason = "its vectorized value differs from its plain value"
        return "loop", reason

    def _ends_agree(self, candidate: Operation, *args: object) -> bool:
        ends = tree_map(lambda x: x[[0, -1]], args)
        found, wanted = tree_leaves(candidate(*ends)), tree_leaves(self.one_by_one(*ends))
        return all(map(is_close, found, wanted))


def saved_way(saved: Way | bool | None) -> Way | None:
    """The way that a checkpoint holds; older ones hold whether ``vmap`` was used."""
    return ("vmap" if saved else "loop") if isinstance(saved, bool) else saved


def num_chains(args: object) -> int:
    """The number of chains that lead tensors."""
    return len(tree_leaves(args)[0])


def _rows(args: tuple[object, ...]) -> Iterable[Sequence[object]]:
    """The arguments of one chain after another."""
    if len(args) == 1 and isinstance(args[0], Tensor):
        return ((row,) for row in args[0])
    return (tree_map(operator.itemgetter(i), args) for i in range(num_chains(args)))


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, infinite and missing values included."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
