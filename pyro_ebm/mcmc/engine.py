r"""Runs a pure batched function as it is, or as one compiled graph.

A transition of a kernel is tensors in, tensors out. With ``jit_compile`` it is captured once, Pyro
model and gradient included, as a plain graph (``make_fx``), and compiled (``torch.compile``).
Random numbers are drawn outside, so that a compiled run gives the same draws as an eager one, to
rounding.

A graph refers to the parameters that it was captured with, and so sees them change in place. It
is captured anew when shapes, dtypes or devices of its inputs change, when a parameter is replaced
by another tensor, or when a module changes between training and evaluation. A Python number that
the model reads is frozen in the graph: pass a tensor, or build the kernel anew.
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

MAX_GRAPHS = 8


class Engine:
    """A function of tensors, run eagerly or through captured and compiled graphs.

    Args:
        function: a pure function of tensors (or nested tuples of them) to tensors.
        jit_compile: whether to capture and compile it.
        state: a hashable description of what else the function reads: parameter identities,
            training flags. A graph serves one such state.
        ignore_jit_warnings: whether to silence warnings raised while capturing.

    Example:
        >>> weight = torch.tensor(2.0)
        >>> double = Engine(lambda x: (weight * x,), jit_compile=False)
        >>> double(torch.ones(2))
        (tensor([2., 2.]),)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        jit_compile: bool = False,
        state: Callable[[], Hashable] = lambda: None,
        ignore_jit_warnings: bool = False,
    ):
        self.function, self.jit_compile, self.state = function, jit_compile, state
        self.ignore_jit_warnings = ignore_jit_warnings
        self._graphs: dict[Hashable, tuple[Callable[..., Any], Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """The function's value at the inputs."""
        if not self.jit_compile:
            return self.function(*inputs)
        flat, spec = tree_flatten(inputs)
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        described = tuple(
            (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in flat
        )
        key = (spec, described, self.state())
        if key not in self._graphs:
            value = self.function(*inputs)  # an error of the model itself is raised as it is
            self._add_graph(key, flat, spec, tensors)
            return value
        graph, out_spec = self._graphs[key]
        try:
            with torch.no_grad():
                return tree_unflatten(list(graph(*tensors)), out_spec)
        except torch.linalg.LinAlgError:  # for the function to handle, which the graph cannot
            return self.function(*inputs)

    def _add_graph(self, key: Hashable, flat: list[Any], spec: Any, tensors: list[Any]) -> None:
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        try:
            graph, out_spec = self._capture(flat, spec, tensors)
            with torch.no_grad(), contextlib.suppress(torch.linalg.LinAlgError):
                graph(*tensors)  # compiled by its first call
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            self.jit_compile = False
            warnings.warn(
                "the model cannot be captured as a graph, so jit_compile=True has no effect"
                f" ({type(error).__name__}: {str(error).splitlines()[0]})",
                stacklevel=3,
            )
        else:
            self._graphs[key] = graph, out_spec

    def _capture(
        self, flat: list[Any], spec: Any, tensors: list[Any]
    ) -> tuple[Callable[..., Any], Any]:
        out_spec = None

        def on_tensors(*tensors: torch.Tensor) -> tuple[Any, ...]:
            nonlocal out_spec
            remaining = iter(tensors)
            full = [next(remaining) if isinstance(x, torch.Tensor) else x for x in flat]
            out, out_spec = tree_flatten(self.function(*tree_unflatten(full, spec)))
            return tuple(out)

        with contextlib.ExitStack() as stack:
            if self.ignore_jit_warnings:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            # one tensor that comes twice would be one input of the graph for ever
            graph = make_fx(on_tensors)(*(x.detach() for x in tensors))
        if shutil.which("c++") is None and shutil.which("g++") is None:
            warnings.warn(
                "there is no C++ compiler on the path: the graph is captured, not compiled",
                stacklevel=4,
            )
            return graph, out_spec
        return torch.compile(graph), out_spec
