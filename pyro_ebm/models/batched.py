r"""All chains in one evaluation of a function that was written for one chain.

``torch.func.vmap`` maps a function of one chain over all of them, and refuses what Pyro, and its
users, do often. Here such an operation is replaced by one that does the same and can be mapped:

* *A write into a tensor that all chains share*, as ``p = torch.zeros(3); p[0] = mu``: the
  evaluation is begun again, and makes this tensor for each chain.
* *A value that is read*, as by ``if (x > 0).any()``, ``int(k)``, ``x[mask]``: if it is the same in
  all chains, it is read as that. Where it differs, the chains are parted by it, and each part is
  evaluated by itself; a part takes the branch that each of its chains would have taken alone.
* ``x.data``, and the operations that torch maps slowly, or not at all.

Real numbers that are read (``mu.item()``) differ from chain to chain, and random numbers are
another thing altogether: these functions cannot be mapped.
"""

import contextlib
import math
import operator
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_ebm.internals.compilers import as_written
from pyro_ebm.internals.functorch import GET_DATA, is_wrapped, memory_key
from pyro_ebm.internals.lookup import Args, Kwargs, Operation
from pyro_ebm.internals.pyro_runtime import safe_log_replaced
from pyro_ebm.internals.recurrent import STEPWISE

MAX_RESTARTS = 64  # of one evaluation: each finds a tensor that is written into


class Batched:
    """A function of one chain, mapped over chains.

    Args:
        function: maps tensors of one chain (or tuples and dicts of them) to tensors of fixed
            shapes. It draws no random numbers.

    Example:
        >>> def function(x):
        ...     y = torch.zeros(2)
        ...     y[0] = x.square() if x > 0 else -x
        ...     return y
        >>> Batched(function)(torch.tensor([-1.0, 2.0, -3.0]))
        tensor([[1., 0.],
                [4., 0.],
                [3., 0.]])
    """

    def __init__(self, function: Operation):
        self.function = function
        self._written: set[int] = set()

    def __call__(self, *args: object) -> object:
        """The values at arguments whose tensors have shapes ``(chains, ...)``.

        Raises:
            RuntimeError: where the function cannot be mapped.
        """
        like = tree_leaves(args)[0]
        for _ in range(MAX_RESTARTS):
            try:
                with as_written(), safe_log_replaced(_SafeLog):
                    return vmap(self._one)(args, like.new_ones(like.shape[:1], dtype=torch.bool))
            except _Written as found:
                self._written.add(found.place)
            except _Differ as differ:
                labels = differ.labels
                rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
                parts = [self(*tree_map(operator.itemgetter(part), args)) for part in rows]
                joined = tree_map(lambda *values: torch.cat(values), *parts)
                return tree_map(operator.itemgetter(torch.cat(rows).argsort()), joined)
        raise RuntimeError("the operations of an evaluation are others each time")

    def _one(self, args: tuple[object, ...], own: Tensor) -> object:
        with _ForAllChains(own, self._written):
            return self.function(*args)


class _Written(Exception):
    """A tensor that chains share is written into: the result of the operation number ``place``."""

    def __init__(self, place: int):
        super().__init__(place)
        self.place = place


class _Differ(Exception):
    """A value is read that is not the same in all chains, which are labelled by it."""

    def __init__(self, labels: Tensor):
        super().__init__(labels)
        self.labels = labels


@contextlib.contextmanager
def refuse_slow() -> Iterator[None]:
    """Makes an error of the warning that ``vmap`` runs an operation for one chain after another."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop", UserWarning)
        yield


class _ForAllChains(TorchFunctionMode):
    """Replaces what ``vmap`` refuses.

    Args:
        own: True, of each chain its own.
        written: the places of operations whose results are written into.
    """

    def __init__(self, own: Tensor, written: set[int]):
        super().__init__()
        self.own, self.written = own, written
        self.place = 0
        self.made: dict[int, tuple[int, Tensor]] = {}  # where, and the tensor, by its storage

    def __torch_function__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs = None
    ) -> object:
        kwargs = kwargs or {}
        self.place += 1
        name = getattr(func, "__name__", "")
        if name in READS:
            args = tree_map(self._common, args)
        elif name in _TEXTS:
            args = tree_map(self._common_choice, args)
            if is_wrapped(args[0]):  # a message about numbers
                return "<a number of each chain>"
        elif func == GET_DATA and is_wrapped(args[0]):
            func = Tensor.detach
        try:
            found = _INSTEAD.get(func, func)(*args, **kwargs)
        except (RuntimeError, IndexError):
            found = self._again(func, name, args, kwargs)
        return self._made(found, args)

    def _again(self, func: Operation, name: str, args: Args, kwargs: dict[str, object]) -> object:
        """Does in another way what ``func`` was refused to do, or raises what it raises."""
        if name == "__setitem__" and (mask := _lone_mask(*args)) is not None:
            # x[mask] = number: x where not masked
            target, value = args[0], args[2]
            mask = mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim()))
            func, args = Tensor.copy_, (target, torch.where(mask, value, target))
            with contextlib.suppress(RuntimeError):
                return func(*args)
        if _writes(name) and not is_wrapped(args[0]):
            made = self.made.get(memory_key(args[0]))
            if made is not None and made[0] not in self.written:
                raise _Written(made[0])
        args, kwargs = tree_map(self._common_choice, (args, kwargs))
        return func(*args, **kwargs)

    def _common(self, x: object) -> object:
        """The one value that all chains have."""
        if isinstance(x, Tensor) and is_wrapped(x):
            return _Common.apply(x.detach(), self.own)
        return x

    def _common_choice(self, x: object) -> object:
        """The same of masks, indices and counts, which choose what there is."""
        if isinstance(x, slice):
            return slice(*map(self._common_choice, (x.start, x.stop, x.step)))
        choice = isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())
        return self._common(x) if choice else x

    def _made(self, found: object, args: tuple[object, ...]) -> object:
        """Notes a new tensor that all chains share; one that is written into becomes their own."""
        if type(found) is not Tensor or is_wrapped(found):
            return found
        storage = memory_key(found)
        if storage in self.made:
            return found
        for x in args:  # a view of a tensor that was there before
            if type(x) is Tensor and not is_wrapped(x) and memory_key(x) == storage:
                return found
        self.made[storage] = self.place, found
        return torch.where(self.own, found, found) if self.place in self.written else found


class _SafeLog(torch.autograd.Function):
    """Pyro's, by which it sums in logarithms: its gradient at 0 is finite. This one is mapped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / x.clamp(min=torch.finfo(x.dtype).eps)


class _Common(torch.autograd.Function):
    """The value that all chains have of a tensor that has no gradient."""

    @staticmethod
    def forward(x: Tensor, own: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, ...], x: Tensor, own: Tensor
    ) -> tuple[Tensor, None]:
        if in_dims[0] is None:  # it is mapped by the function's own grad alone
            return x.clone(), None
        rows = x.movedim(in_dims[0], 0)
        rows = rows.reshape(len(rows), -1)
        if not ((rows == rows[:1]) | ((rows != rows) & (rows[:1] != rows[:1]))).all():
            if in_dims[1] is None or rows.is_floating_point() or rows.is_complex():
                raise RuntimeError("a number is read that is another one in each chain")
            raise _Differ(rows.unique(dim=0, return_inverse=True)[1])
        return x.select(in_dims[0], 0).clone(), None


def _clamp_(x: Tensor, *args: float, **kwargs: float) -> Tensor:
    return x.copy_(x.clone().clamp(*args, **kwargs))


def _isclose(
    x: Tensor, y: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Tensor:
    close = (x == y) | (((x - y).abs() <= atol + rtol * y.abs()) & y.isfinite())
    return close | (x.isnan() & y.isnan()) if equal_nan else close


def _mvlgamma(x: Tensor, p: int) -> Tensor:
    #  Gamma_p(x) = pi^(p (p - 1) / 4)  prod_j Gamma(x - j / 2),   j = 0, ..., p - 1
    j = torch.arange(p, dtype=x.dtype, device=x.device)
    return (x[..., None] - j / 2).lgamma().sum(-1) + p * (p - 1) / 4 * math.log(math.pi)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    # the n-th element under the mask becomes the n-th of the source
    x, mask = torch.broadcast_tensors(x, mask)
    place = (mask.reshape(-1).cumsum(0) - 1).clamp(min=0)
    return torch.where(mask, source.reshape(-1)[place].reshape(x.shape), x)


_INSTEAD: dict[Operation, Operation] = {
    **STEPWISE,
    Tensor.clamp_: _clamp_,
    torch.clamp_: _clamp_,
    torch.isclose: _isclose,
    Tensor.isclose: _isclose,
    torch.mvlgamma: _mvlgamma,
    Tensor.mvlgamma: _mvlgamma,
    torch.masked_scatter: _masked_scatter,
    Tensor.masked_scatter: _masked_scatter,
}
READS = {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"} | {
    f"__{name}__" for name in ("array", "bool", "complex", "contains", "float", "index", "int")
}
"""The names of functions by which values leave the tensors."""
_TEXTS = {"__format__", "__repr__"}


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    into = name.endswith("_") and not name.endswith("__")
    return into or name.startswith("__i") or name == "__setitem__"


def _lone_mask(target: Tensor, index: object, value: object) -> Tensor | None:
    """The mask of ``target[mask] = number``."""
    number = not isinstance(value, Tensor) or value.numel() == 1
    if not (number and isinstance(index, Tensor) and index.dtype is torch.bool):
        return None
    return index if index.dim() <= target.dim() else None
