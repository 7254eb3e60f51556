"""Functions written down as graphs, by :mod:`pyro_ebm.internals.recording` or ``make_fx``.

Relies on ``torch.fx.experimental.proxy_tensor`` (``make_fx`` has no public place; the mode that is
active while it runs, and which tensors it follows, have none either), and on ``torch._guards`` and
``torch._subclasses``, by which one fake-tensor mode serves all nodes of a graph.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_ebm.internals.lookup import Operation, internal
from pyro_ebm.internals.recording import HostReadError, Recorder

_PROXIES, _CAPTURE = "torch.fx.experimental.proxy_tensor", "to capture a function as a graph"
_make_fx = internal(_PROXIES, "make_fx", _CAPTURE)
_get_proxy_mode = internal(_PROXIES, "get_proxy_mode", "to see whether a graph is being captured")
_has_proxy_slot = internal(_PROXIES, "has_proxy_slot", "to see which tensors a graph follows")
_tracing = internal("torch._guards", "tracing", _CAPTURE)
_TracingContext = internal("torch._guards", "TracingContext", _CAPTURE)
_FakeTensorMode = internal("torch._subclasses.fake_tensor", "FakeTensorMode", _CAPTURE)
_OpOverload = internal("torch._ops", "OpOverload", "to read the operations of a graph")


FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""What may be raised while a function is written down that has just succeeded as it is."""


def is_capturing() -> bool:
    """Whether a graph is being captured."""
    return bool(Recorder.active) or _get_proxy_mode() is not None


def is_followed(x: object) -> bool:
    """Whether a tensor's values are written down by the graph that is being captured."""
    if Recorder.active:
        return Recorder.active[-1].follows(x)
    mode = _get_proxy_mode()
    return mode is not None and _has_proxy_slot(x, mode.tracer)


def capture(
    function: Callable[..., Sequence[Tensor]],
    instead: Mapping[Operation, Operation],
    tensors: Sequence[Tensor],
) -> GraphModule:
    """The operations that a function makes with some tensors, as a graph.

    Args:
        function: maps tensors to a list of tensors.
        instead: functions that replace operations.
        tensors: its arguments.

    Raises:
        RuntimeError: if the function reads values of tensors on the host; or another exception.

    Example:
        >>> capture(lambda x: [x + 1], {}, [torch.zeros(2)])(torch.ones(2))
        [tensor([2., 2.])]
    """
    try:
        with Recorder(instead, tensors) as recorder:
            values = function(*tensors)
        return recorder.graph_of(values)
    except (HostReadError, torch.linalg.LinAlgError):
        raise
    except FAILURES:
        pass  # make_fx knows more
    with _tracing(_TracingContext(_FakeTensorMode())):  # one mode for all nodes
        return _make_fx(function, dict(instead))(*tensors)


def is_view(node: Node) -> bool:
    """Whether an operation returns memory of its arguments, and writes nothing."""
    schema = getattr(node.target, "_schema", None)  # of an operation of torch
    if schema is None or schema.is_mutable:
        return False
    return any(returned.alias_info is not None for returned in schema.returns)


def namespace(node: Node) -> str | None:
    """The library that the operation of a node belongs to; None if it is no operation of torch."""
    target = node.target
    return getattr(target, "namespace", None) if isinstance(target, _OpOverload) else None
