r"""Which way to run a function pays, by the size of its graph and the number of its calls.

No clock decides, so that a seed gives the same draws on a slow day. What is compared with the
number of calls was measured once, on two cores of a server: capturing pays after some dozens of
calls whatever the function is. A captured graph spends a microsecond on each of its operations that
a compiled one does not, and time on writing down numbers that a compiled one keeps to itself.
Compiling takes seconds, and milliseconds for each operation.

A small graph runs on one thread. Several wait for each other at the end of each operation, and
where other processes want the processor too, the wait is that for the scheduler: a logistic
regression of 64 chains took 68 ms a call on two threads of a busy machine, and 4 ms on one.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from pyro_ebm.internals.tracing import is_view

WORTH_CAPTURING = 100
"""Calls after which the capture has paid."""
COMPILING, COMPILING_AN_OPERATION = 6.0, 8e-3  # seconds
OPERATION, OPERATION_IN_PYTHON = 1.2e-6, 4e-6  # seconds that a compiled graph saves in a call
NUMBER = 0.3e-9  # as many, for each element of a result

WORTH_THREADS = 4_000_000
"""Numbers written in a call, from which on it runs on several threads: milliseconds of work."""


def worth_compiling(graph: Graph, interpreted: bool) -> float:
    """The number of calls after which compiling a graph has paid.

    Args:
        graph: the graph.
        interpreted: whether an interpreter runs it now, and not Python.

    Example:
        >>> from torch.fx import symbolic_trace
        >>> graph = symbolic_trace(lambda x: x + 1 + x).graph
        >>> worth_compiling(graph, interpreted=True)
        2506666.6...
    """
    operations = _operations(graph)
    spent = len(operations) * (OPERATION if interpreted else OPERATION_IN_PYTHON)
    spent += NUMBER * sum(map(_size, operations))
    return (COMPILING + COMPILING_AN_OPERATION * len(operations)) / max(spent, OPERATION)


def _operations(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _size(node: Node) -> int:
    """How many numbers an operation writes, as far as it is known."""
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) and not is_view(node) else 0


def work(graph: Graph) -> float:
    """The numbers that a graph writes in a call, and those that products of matrices add up.

    The latter count an eighth, since a processor takes eight of them at a time.
    """
    return sum(_size(node) + _products(node) / 8 for node in _operations(graph))


def _products(node: Node) -> float:
    """The multiplications of (m, k) by (k, n) matrices, m k n for each pair."""
    if "mm" not in getattr(node.target, "__name__", ""):
        return 0
    factors = [x.meta.get("val") for x in node.all_input_nodes[-2:]]
    product, total = node.meta.get("val"), 1
    if not isinstance(product, Tensor) or product.numel() == 0:
        return 0
    for x in (product, *factors):  # (m k)(k n)(m n) = (m k n)^2, of each pair
        total *= x.numel() if isinstance(x, Tensor) else 0
    return (total / product.shape[:-2].numel()) ** 0.5


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs operations of torch on one thread."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
