"""Graphs run by TorchScript's interpreter: operation by operation, three times as fast as Python.

A plain graph is Python code, which spends some microseconds on each call of an operation.
TorchScript makes the same calls from C++: the same values to the last bit, and nothing to compile.

Relies on ``torch.jit.trace``, which is public and deprecated, and on the switch of its optimizer,
which measures and rewrites a function in its first calls and is left out.
"""

import warnings
from collections.abc import Callable, Sequence
from operator import getitem
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Module

from pyro_ebm.internals.lookup import internal

_WHY = "to run graphs without Python"
_trace = internal("torch.jit", "trace", _WHY)
_optimizes = internal("torch._C", "_get_graph_executor_optimize", _WHY)
_set_optimizes = internal("torch._C", "_set_graph_executor_optimize", _WHY)
PIECE = 2000
"""The operations that are traced together, which takes a time that grows with their square."""


class _Piece(NamedTuple):
    """Some operations of a graph."""

    run: Callable[..., list[Tensor]]
    inputs: list[Node]
    outputs: list[Node]
    dead: list[Node]
    """What nobody needs after it."""


class Interpreted:
    """A graph of operations on CPU tensors, as the interpreter runs it.

    Args:
        graph: takes tensors and returns a list of them; it refers to no others.
        arguments: tensors to trace it with.

    Raises:
        RuntimeError: if it does something that TorchScript does not know; or another exception.

    Example:
        >>> from torch.fx import symbolic_trace
        >>> graph = symbolic_trace(lambda x: [x + 1, x])
        >>> Interpreted(graph, [torch.zeros(2)])(torch.ones(2))
        [tensor([2., 2.]), tensor([1., 1.])]
    """

    def __init__(self, graph: GraphModule, arguments: Sequence[Tensor]):
        *nodes, output = graph.graph.nodes
        self._outputs: list[Node] = []
        map_arg(output.args[0], self._outputs.append)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._nodes = nodes[len(self._inputs) :]
        self._last = {x: i for i, node in enumerate(self._nodes) for x in node.all_input_nodes}
        self._last |= dict.fromkeys(self._outputs, len(self._nodes))
        self._values: dict[Node, Tensor] = dict(zip(self._inputs, arguments, strict=True))
        self._pieces: list[_Piece] = []
        start = 0
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that it is deprecated
            while start < len(self._nodes):
                stop = self._stop(start)
                self._pieces.append(self._piece(start, stop))
                start = stop
        self._is_whole = len(self._pieces) == 1 and self._pieces[0].outputs is self._outputs
        self._nodes, self._last, self._values = [], {}, {}

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """The graph's value."""
        before = _optimizes()
        _set_optimizes(False)
        try:
            if self._is_whole:
                return self._pieces[0].run(*arguments)
            values = dict(zip(self._inputs, arguments, strict=True))
            for piece in self._pieces:
                found = piece.run(*[values[node] for node in piece.inputs])
                values.update(zip(piece.outputs, found, strict=True))
                for node in piece.dead:
                    del values[node]
            return [values[node] for node in self._outputs]
        finally:
            _set_optimizes(before)

    def _stop(self, start: int) -> int:
        """Where a piece ends that begins here."""
        nodes, stop = self._nodes, start + 1
        while stop < len(nodes):
            # a list and its elements stay together, and what returns nothing is by itself
            alone = not (nodes[stop].users and nodes[stop - 1].users) or stop == start + PIECE
            if alone and nodes[stop].target is not getitem:
                break
            stop += 1
        return stop

    def _piece(self, start: int, stop: int) -> _Piece:
        """The operations from one to another; the values that they have are added."""
        nodes, values = self._nodes[start:stop], self._values
        if not nodes[0].users:  # it may raise an error, which the interpreter would leave out
            run, inputs, outputs = _Look(nodes[0]), nodes[0].all_input_nodes, []
        elif len(nodes) == len(self._nodes):
            inputs, outputs = self._inputs, self._outputs
            run = _traced(nodes, inputs, outputs, values)
        else:
            inside = set(nodes)
            used = [x for node in nodes for x in node.all_input_nodes if x not in inside]
            inputs = list(dict.fromkeys(used))
            outputs = [x for x in nodes if self._last.get(x, -1) >= stop]
            run = _traced(nodes, inputs, outputs, values)
        values.update(zip(outputs, run(*[values[node] for node in inputs]), strict=True))
        dead = [x for x in values if self._last.get(x, -1) < stop]
        for node in dead:
            del values[node]
        return _Piece(run, inputs, outputs, dead)


class _Look:
    """An operation that returns nothing."""

    def __init__(self, node: Node):
        self.node = node

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        values = dict(zip(self.node.all_input_nodes, inputs, strict=True))
        args, kwargs = map_arg((self.node.args, self.node.kwargs), values.__getitem__)
        operation = self.node.target
        assert callable(operation)
        operation(*args, **kwargs)
        return []


def _traced(
    nodes: list[Node], inputs: list[Node], outputs: list[Node], values: dict[Node, Tensor]
) -> Callable[..., list[Tensor]]:
    """Operations as TorchScript's interpreter runs them."""
    graph, copies = Graph(), dict[Node, Node]()
    for i, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"x{i}")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[x] for x in outputs])
    examples = tuple(values[node] for node in inputs)
    script = _trace(GraphModule(Module(), graph), examples, check_trace=False)
    return script._c._get_method("forward")
