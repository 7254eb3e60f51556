"""Functions written down as graphs, operation by operation as they are made.

``make_fx`` of torch does the same for many more purposes: it takes a second to import what it
needs, and half a millisecond for each operation. Here is the part that transitions need, of plain
tensors. What it does not know it refuses, and :mod:`pyro_ebm.internals.tracing` asks ``make_fx``.
Operations that change nothing are left out, and what no input moves is computed once; values are
the same, to the last bit.

Relies on ``torch.utils._python_dispatch``, on ``torch.utils.weak``, and on the ``_schema`` of
operations, which says what they write into.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_aggregate
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_ebm.internals.lookup import Operation, internal

_OpOverload = internal("torch._ops", "OpOverload", "to read the operations of a graph")
_PLAIN = (Tensor, Parameter)
_OF_SHAPES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
FIXED = "fixed"
"""How names of tensors begin that a graph refers to and that cannot change in place."""
MAX_CONSTANT = 10_000
"""The most elements of a tensor that is computed once."""


class CannotRecordError(RuntimeError):
    """Something that only ``make_fx`` may know how to write down."""


class HostReadError(RuntimeError):
    """A value is read on the host that depends on the inputs: no graph can hold that."""


class Recorder(TorchDispatchMode):
    """Writes down the operations that are made with tensors.

    Args:
        instead: functions that replace operations, or return NotImplemented.
        tensors: the inputs of the graph.

    Example:
        >>> x = torch.zeros(2)
        >>> with Recorder({}, [x]) as recorder:
        ...     y = x.exp().detach() + torch.tensor(2.0).log()
        >>> graph = recorder.graph_of([y])
        >>> graph.graph.eliminate_dead_code()
        True
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.exp.default', 'aten.add.Tensor']
        >>> graph(torch.ones(2))
        [tensor([3.4114, 3.4114])]
    """

    active: "list[Recorder]" = []
    """Those at work, the innermost last."""

    def __init__(self, instead: Mapping[Operation, Operation], tensors: Sequence[Tensor]):
        super().__init__()
        self.instead, self.graph, self.root = instead, Graph(), Module()
        self._nodes = WeakTensorKeyDictionary()  # of tensors that were made so far
        self._known: dict[Node, Tensor] = {}  # values that no input moves
        self._places: dict[Node, int] = {}  # the memory of such a value
        self._written: set[int] = set()  # memory that is written into
        self._from_outside: dict[int, tuple[Tensor, Node]] = {}  # kept alive
        for i, x in enumerate(tensors):
            self._is_at(x, self.graph.placeholder(f"arg{i}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which would import it
        return False

    def __enter__(self) -> "Recorder":
        self.active.append(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.active.remove(self)

    def follows(self, x: object) -> bool:
        """Whether a tensor's values may depend on the inputs."""
        return isinstance(x, Tensor) and x in self._nodes and not self._is_fixed(x)

    def graph_of(self, outputs: Sequence[Tensor]) -> GraphModule:
        """The graph that gives these tensors, as a list; what nobody needs is still in it."""
        self.graph.output([self._node(x) for x in outputs])
        for node, value in self._known.items():
            if node.users and self._places[node] not in self._written:
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self._constant(value, FIXED))
        return GraphModule(self.root, self.graph)

    def __torch_dispatch__(
        self,
        func: Operation,
        types: Iterable[type],
        args: tuple[Argument, ...] = (),
        kwargs: dict[str, Argument] | None = None,
    ) -> object:
        kwargs = {} if kwargs is None else kwargs
        if not isinstance(func, _OpOverload) or any(kind not in _PLAIN for kind in types):
            raise CannotRecordError(f"{func} of {types}")
        if func in self.instead:
            with self:
                found = self.instead[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        inputs: list[Tensor] = []
        map_aggregate((args, kwargs), lambda x: inputs.append(x) if isinstance(x, Tensor) else None)
        fresh = func in _FRESH  # torch.tensor(2.0), which may be written into later
        if fresh:
            args, func = (inputs[0].clone(),), torch.ops.aten.clone.default
        found = func(*args, **kwargs)
        values = list(found) if isinstance(found, list | tuple) else [found]
        if found is None:  # it looks at its arguments, and may raise an error
            self.graph.call_function(func, *map_aggregate((args, kwargs), self._node))
            return None
        if not all(type(x) in _PLAIN for x in values):
            if torch.Tag.data_dependent_output not in func.tags:
                raise CannotRecordError(f"{func} gives {found}")
            if any(self.follows(x) for x in inputs):
                raise HostReadError(f"a value is read on the host, by {func}")
            return found
        if _changes_nothing(func, inputs, values):
            self._nodes[values[0]] = self._node(inputs[0])
            return found
        known = fresh or self._is_known(func, inputs, values)
        node = self.graph.call_function(func, *map_aggregate((args, kwargs), self._node))
        for i, x in enumerate(values):
            at = node if isinstance(found, Tensor) else self.graph.call_function(getitem, (node, i))
            self._is_at(x, at)
            if known:
                self._known[at], self._places[at] = x, _memory(x)
        if func._schema.is_mutable:
            self._written |= {_memory(x) for x in _written(func, args, kwargs)}
        return found

    def _is_known(self, func: Operation, inputs: list[Tensor], values: list[Tensor]) -> bool:
        """Whether no input of the graph moves the values."""
        name = func._schema.name.removeprefix("aten::")
        return (
            (name in _OF_SHAPES or all(map(self._is_fixed, inputs)))
            and not name.startswith(("empty", "new_empty"))
            and not func._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in func.tags
            and all(x.numel() <= MAX_CONSTANT for x in values)
        )

    def _is_fixed(self, x: Tensor) -> bool:
        """Whether a value was made of numbers alone, and nothing was written into it."""
        return self._nodes.get(x, None) in self._known and _memory(x) not in self._written

    def _is_at(self, x: Tensor, node: Node) -> None:
        like = {"dtype": x.dtype, "device": "meta"}
        node.meta["val"] = torch.empty_strided(x.shape, x.stride(), **like)
        self._nodes[x] = node

    def _node(self, x: Argument) -> Argument:
        """The node of a tensor; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        node = self._nodes.get(x, None)
        return self._constant(x) if node is None else node

    def _constant(self, x: Tensor, kind: str = "referred_to") -> Node:
        if id(x) not in self._from_outside:
            name = f"{kind}_{len(self._from_outside)}"
            setattr(self.root, name, x)
            node = self.graph.get_attr(name)
            node.meta["val"] = x
            self._from_outside[id(x)] = x, node
        return self._from_outside[id(x)][1]


_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _written(func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    found: list[object] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, list | tuple) else [value]
    return [x for x in found if isinstance(x, Tensor)]


def _changes_nothing(func: Operation, inputs: list[Tensor], values: list[Tensor]) -> bool:
    """Whether it gives the very elements of its one argument, in their places."""
    if len(values) != 1 or len(inputs) != 1 or func._schema.is_mutable:
        return False
    x, y = inputs[0], values[0]
    return (
        (x.dtype, x.shape, x.stride(), x.storage_offset())
        == (y.dtype, y.shape, y.stride(), y.storage_offset())
        and x.numel() > 0
        and _memory(x) == _memory(y)
    )
