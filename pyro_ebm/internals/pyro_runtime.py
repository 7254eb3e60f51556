"""Pyro while a model runs: its handlers, its random weights, its sums in logarithms.

Relies on the stack of handlers (``pyro.poutine.runtime._PYRO_STACK``), the dimensions of the plates
that are open (``_DIM_ALLOCATOR._stack`` there) and ``param_only`` of
``TraceMessenger``, by which ``SVI.step`` is recognized; on ``PyroModule._pyro_context``; on
``pyro.ops.special._SafeLog``; on ``ProvenanceTensor._provenance``; and on the parameter store's
``_params``.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
from pyro import poutine
from pyro.nn import PyroModule
from pyro.ops import special
from pyro.ops.provenance import ProvenanceTensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn
from torch.autograd import Function

from pyro_ebm.internals.lookup import internal

_stack: list[Messenger] = internal("pyro.poutine.runtime", "_PYRO_STACK", "to see whether SVI runs")
_dims: Any = internal("pyro.poutine.runtime", "_DIM_ALLOCATOR", "to run a guide within a model")
internal("pyro.ops.special", "_SafeLog", "to map sums over discrete latents")


def in_svi_step() -> bool:
    """Whether ``SVI.step`` is looking for parameters to train."""
    return any(isinstance(m, TraceMessenger) and m.param_only for m in _stack)


def with_random_weights(modules: Iterable[nn.Module]) -> list[PyroModule]:
    """The modules that have a weight which is a ``PyroSample``."""
    return [m for m in modules if isinstance(m, PyroModule) and m._pyro_samples]


def weights_are_samples(module: PyroModule) -> contextlib.AbstractContextManager[object]:
    """A context in which reading a random weight is a sample statement."""
    return module._pyro_context


@contextlib.contextmanager
def safe_log_replaced(function: type[Function]) -> Iterator[None]:
    """Within this context Pyro's sums in logarithms use another ``autograd.Function``."""
    before = special._SafeLog
    special._SafeLog = function
    try:
        yield
    finally:
        special._SafeLog = before


@contextlib.contextmanager
def outside_plates() -> Iterator[None]:
    """Within this context another model runs as if no plate were open and no handler listened."""
    before, _dims._stack = _dims._stack, []
    try:
        with poutine.block():
            yield
    finally:
        _dims._stack = before


def set_provenance(x: ProvenanceTensor, sources: frozenset[str]) -> None:
    """Says of a provenance tensor where it comes from, in place."""
    x._provenance = sources


def parameter_identities() -> list[int]:
    """The identities of the unconstrained tensors in Pyro's parameter store."""
    return [id(p) for p in pyro.get_param_store()._params.values()]
