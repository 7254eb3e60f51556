"""Functions written down as graphs, by ``make_fx``.

Relies on ``torch.fx.experimental.proxy_tensor`` (``make_fx`` has no public place; the mode that is
active while it runs, and which tensors it follows, have none either), and on ``torch._guards`` and
``torch._subclasses``, by which one fake-tensor mode serves all nodes of a graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_ebm.internals.lookup import internal

_PROXIES, _CAPTURE = "torch.fx.experimental.proxy_tensor", "to capture a function as a graph"
_make_fx = internal(_PROXIES, "make_fx", _CAPTURE)
_get_proxy_mode = internal(_PROXIES, "get_proxy_mode", "to see whether a graph is being captured")
_has_proxy_slot = internal(_PROXIES, "has_proxy_slot", "to see which tensors a graph follows")
_tracing = internal("torch._guards", "tracing", _CAPTURE)
_TracingContext = internal("torch._guards", "TracingContext", _CAPTURE)
_FakeTensorMode = internal("torch._subclasses.fake_tensor", "FakeTensorMode", _CAPTURE)
_OpOverload = internal("torch._ops", "OpOverload", "to read the operations of a graph")


def is_capturing() -> bool:
    """Whether a graph is being captured."""
    return _get_proxy_mode() is not None


def is_followed(x: Any) -> bool:
    """Whether a tensor's values are written down by the graph that is being captured."""
    mode = _get_proxy_mode()
    return mode is not None and _has_proxy_slot(x, mode.tracer)


def capture(
    function: Callable[..., Any],
    instead: Mapping[Any, Callable[..., Any]],
    tensors: Sequence[Tensor],
) -> GraphModule:
    """The operations that a function makes with some tensors, as a graph.

    Args:
        function: maps tensors to a list of tensors.
        instead: functions that replace operations.
        tensors: its arguments.

    Example:
        >>> capture(lambda x: [x + 1], {}, [torch.zeros(2)])(torch.ones(2))
        [tensor([2., 2.])]
    """
    with _tracing(_TracingContext(_FakeTensorMode())):  # one mode for all nodes
        return _make_fx(function, dict(instead))(*tensors)


def namespace(node: Node) -> str | None:
    """The library that the operation of a node belongs to; None if it is no operation of torch."""
    target: Any = node.target
    return target.namespace if isinstance(target, _OpOverload) else None
