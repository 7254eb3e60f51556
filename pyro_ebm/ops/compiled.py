"""Networks under ``torch.compile``."""

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Lets what is under ``torch.compile`` run as it was written: the same values, no compiler.

    For evaluations that the compiler has no code for (second derivatives, ``vmap``, a capture), and
    for those that look at what a function does, whose means it would take for a part of that.

    Example:
        >>> square = torch.compile(torch.square)
        >>> with as_written():
        ...     square(torch.tensor(3.0))
        tensor(9.)
    """
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        nested = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
        with torch.compiler.set_stance("force_eager"), nested:
            yield
    else:
        yield
