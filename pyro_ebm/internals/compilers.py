"""The compilers of torch: ``inductor``, which makes machine code, and ``dynamo`` in front of it.

Relies on ``torch._inductor.compile``, which takes a graph and no guards, and on the settings of
``torch._dynamo``. Both take seconds to import, and are imported when they are used.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_ebm.internals.lookup import Operation, internal


def compile_unguarded(graph: GraphModule, arguments: Sequence[Tensor]) -> Operation:
    """A graph as machine code, for inputs that lie in memory as these do.

    Calls do not check how their arguments lie in memory: the caller has.
    """
    compiler = internal("torch._inductor", "compile", "to compile a graph")
    vector_units = internal("torch._inductor.cpu_vec_isa", "valid_vec_isa_list", "to compile")
    options = {"size_asserts": False}
    try:
        # those that the processor has: probing them with the compiler takes ten seconds
        return compiler(graph, arguments, {**options, "cpp.vec_isa_ok": True})
    except (RuntimeError, OSError):
        return compiler(graph, arguments, options)
    finally:
        vector_units.cache_clear()  # others may want to know for certain


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Lets what is under ``torch.compile`` run as it was written: the same values, no compiler.

    For evaluations that the compiler has no code for (second derivatives, ``vmap``, a capture), and
    for those that record what a function does, whose own operations it would compile too.

    Example:
        >>> square = torch.compile(torch.square)
        >>> with as_written():
        ...     square(torch.tensor(3.0))
        tensor(9.)
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield
        return
    settings = internal("torch._dynamo", "config", "to run compiled networks as written")
    nested = settings.patch(error_on_nested_fx_trace=False)
    with torch.compiler.set_stance("force_eager"), nested:
        yield
