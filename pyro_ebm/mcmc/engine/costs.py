r"""Which way to run a function pays, by the size of its graph and the number of its calls.

No clock decides, so that a seed gives the same draws on a slow day. What is compared with the
number of calls was measured once, on two cores of a server: capturing pays after some dozens of
calls whatever the function is. A captured graph spends a microsecond on each of its operations that
a compiled one does not, and time on writing down numbers that a compiled one keeps to itself.
Compiling takes seconds, and milliseconds for each operation.
"""

from torch.fx import Graph, Node

from pyro_ebm.internals.tracing import is_view

WORTH_CAPTURING = 100
"""Calls after which the capture has paid."""
COMPILING, COMPILING_AN_OPERATION = 6.0, 8e-3  # seconds
OPERATION, OPERATION_IN_PYTHON = 1.2e-6, 4e-6  # seconds that a compiled graph saves in a call
NUMBER = 0.3e-9  # as many, for each element of a result


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
    operations = [node for node in graph.nodes if node.op == "call_function"]
    spent = len(operations) * (OPERATION if interpreted else OPERATION_IN_PYTHON)
    spent += NUMBER * sum(map(_size, operations))
    return (COMPILING + COMPILING_AN_OPERATION * len(operations)) / max(spent, OPERATION)


def _size(node: Node) -> int:
    """How many numbers an operation writes, as far as it is known."""
    value = node.meta.get("val")
    return 0 if is_view(node) or not hasattr(value, "numel") else value.numel()
