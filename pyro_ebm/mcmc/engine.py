r"""Runs a pure batched function as it is, as a captured graph, or as a compiled one.

A transition of a kernel is tensors in, tensors out. It can be run in three ways, which give the
same draws to rounding, since random numbers are drawn outside:

- as it is (``jit_compile=False``);
- *captured* (``"capture"``): the operations on tensors, Pyro model and gradient included, are
  written down once as a plain graph (``make_fx``), which is then run without Pyro and without
  autograd. Capturing takes as long as a few hundred transitions;
- *compiled* (``True``): that graph, turned into machine code by PyTorch's own compiler
  (``inductor``), and on a GPU replayed as one CUDA graph. Compiling takes seconds.

``"auto"`` chooses by how many calls are planned: a short run is not worth a graph, and only a long
one is worth compiling.

What a graph may rest on beside its inputs is looked at before each call. It refers to the
parameters that it was captured with, and so sees them change in place. It is captured anew when
shapes, strides, dtypes or devices of its inputs change, when a parameter is replaced by another
tensor, or when a module changes between training and evaluation. A value that the model reads on
the host (``x.tolist()``) would be frozen in the graph: its second call is made with the graph *and*
with the function, and where these differ the graph is given up. What nothing can see is a Python
number that the model reads from elsewhere and that changes later: make it a tensor that changes in
place, or build the kernel anew.
"""

import contextlib
import operator
import shutil
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
import torch._inductor
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

JitCompile = bool | Literal["capture", "auto"]
MAX_GRAPHS = 8  # kept at a time, of one function
WORTH_CAPTURING, WORTH_COMPILING = 500, 20_000  # planned calls


class Engine:
    """A pure function of tensors, run eagerly or through captured and compiled graphs.

    Args:
        function: a pure function of tensors (or nested tuples of them) to tensors.
        jit_compile: False, ``"capture"``, True or ``"auto"``.
        state: a hashable description of what else the function reads: parameter identities,
            training flags. A graph serves one such state.
        ignore_jit_warnings: whether to silence warnings raised while capturing.
        planned: how many calls to expect, for ``"auto"``; None if that is not known.

    Raises:
        ValueError: for another ``jit_compile``.

    Example:
        >>> weight = torch.tensor(2.0)
        >>> double = Engine(lambda x: (weight * x,), jit_compile="capture")
        >>> double(torch.ones(2))
        (tensor([2., 2.]),)
        >>> _ = weight.mul_(2)  # the graph refers to the tensor, not to its value
        >>> double(torch.ones(2))
        (tensor([4., 4.]),)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        jit_compile: JitCompile = False,
        state: Callable[[], Hashable] = lambda: None,
        ignore_jit_warnings: bool = False,
        planned: int | None = None,
    ):
        check_jit_compile(jit_compile)
        self.asked = jit_compile
        if jit_compile == "auto":
            calls = WORTH_CAPTURING if planned is None else planned
            jit_compile = calls >= WORTH_COMPILING or (calls >= WORTH_CAPTURING and "capture")
        self.function, self.jit_compile, self.state = function, jit_compile, state
        self.ignore_jit_warnings = ignore_jit_warnings
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, *inputs: Any) -> Any:
        """The function's value at the inputs."""
        if not self.jit_compile:
            return self.function(*inputs)
        described: list[Any] = [self.state()]
        tensors: list[Tensor] = []
        _describe(inputs, described, tensors)
        key = tuple(described)
        graph = self._graphs.get(key)
        if graph is None or graph.is_stale():
            graph = self._add_graph(key, inputs, tensors)
            if graph is None:
                return self.function(*inputs)
        elif not graph.checked:
            self._check(graph, inputs, tensors)
            if not self.jit_compile:
                return self.function(*inputs)
        try:
            return graph(tensors)
        except torch.linalg.LinAlgError:  # for the function to handle, which the graph cannot
            return self.function(*inputs)

    def _add_graph(self, key: Hashable, inputs: Any, tensors: list[Tensor]) -> "_Graph | None":
        self.function(*inputs)  # an error of the model itself is raised as it is
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        with contextlib.ExitStack() as stack:
            if self.ignore_jit_warnings:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            try:
                graph = _Graph(self.function, inputs, tensors)
                if self.jit_compile is True and _can_compile(tensors):
                    with contextlib.suppress(torch.linalg.LinAlgError):
                        graph.compile(tensors)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                self._give_up(f"{_first_line(error)}{_place(error)}")
                return None
        self._graphs[key] = graph
        return graph

    def _check(self, graph: "_Graph", inputs: Any, tensors: list[Tensor]) -> None:
        """Compares the graph with the function at other inputs than it was captured at."""
        devices = list({x.device for x in tensors if x.is_cuda})
        try:
            with torch.random.fork_rng(devices):
                found = graph.captured_value(tensors)
            with torch.random.fork_rng(devices):
                wanted = _tensors([self.function(*inputs)])
        except torch.linalg.LinAlgError:  # at a later call then
            return
        if all(_close(*pair) for pair in zip(found, wanted, strict=True)):
            graph.checked = not torch.equal(tensors[0], graph.captured_at)
            return
        self._give_up(
            "the graph gives other values than the model, which must have read one on the host, as"
            " in x.tolist() or x.numpy(), or drawn random numbers of its own"
        )

    def _give_up(self, why: str) -> None:
        self.jit_compile = False
        self._graphs.clear()
        if self.asked != "auto":  # which promises no graph
            warnings.warn(
                f"the model cannot be captured as a graph, so jit_compile={self.asked!r} has no"
                f" effect ({why})",
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}}


class _Graph:
    """The operations that a function makes with tensors of some shapes."""

    checked = False

    def __init__(self, function: Callable[..., Any], inputs: Any, tensors: list[Tensor]):
        structure: list[Any] = []

        def on_tensors(*tensors: Tensor) -> list[Any]:
            remaining = iter(tensors)
            structure.append(function(*_refill(inputs, remaining)))
            return _tensors(structure[-1:])

        self.captured_at = tensors[0].detach().clone()
        # one tensor that comes twice would be one input of the graph for ever
        graph = make_fx(on_tensors)(*(x.detach() for x in tensors))
        self.build, _ = _builder(structure[-1])
        self.graph, self.constants = _lifted(graph)
        self.run: Callable[..., Any] = self.graph
        self.replays = False
        self.places, self.layouts = self._look()

    def _look(self) -> tuple[list[Any], list[Any]]:
        """Where the tensors are that it refers to, and how they lie there."""
        places = [(x.data_ptr(), x.stride()) for x in self.constants]
        return places, [(x.shape, x.dtype, x.device) for x in self.constants]

    def is_stale(self) -> bool:
        """Whether a tensor that it refers to has become one of another shape (``x.data = y``)."""
        if [(x.data_ptr(), x.stride()) for x in self.constants] == self.places:
            return False
        strides = [stride for _, stride in self.places]
        self.places, layouts = self._look()
        return layouts != self.layouts or [stride for _, stride in self.places] != strides

    def compile(self, tensors: list[Tensor]) -> None:
        arguments = [*tensors, *self.constants]
        with torch.no_grad():
            if all(x.device.type == "cpu" for x in arguments):
                # neither guards nor assertions in each call: the caller has looked at the layouts
                compiler: Any = torch._inductor.compile
                self.run = compiler(self.graph, arguments, {"size_asserts": False})
            else:
                self.run = torch.compile(self.graph, mode="reduce-overhead", dynamic=False)
                self.replays = True
            self.run(*arguments)

    def captured_value(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """What the graph says before it is compiled."""
        with torch.no_grad():
            return self.graph(*tensors, *self.constants)

    def __call__(self, tensors: list[Tensor]) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(tensors)
        if self.replays:  # into the same memory each time
            torch.compiler.cudagraph_mark_step_begin()
            found = [x.clone() for x in self.run(*tensors, *self.constants)]
        else:
            found = self.run(*tensors, *self.constants)
        return self.build(found)


def check_jit_compile(value: Any) -> None:
    """Raises a ValueError unless ``value`` is a way to run a function."""
    if not isinstance(value, bool) and value not in ("capture", "auto"):
        raise ValueError(f'jit_compile must be False, "capture", True or "auto", got {value!r}')


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors of nested tuples."""
    found: list[Tensor] = []
    _describe(values, [], found)
    return found


def _describe(values: Iterable[Any], described: list[Any], tensors: list[Tensor]) -> None:
    """Collects the tensors of nested tuples, and what a graph takes for granted of them."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            described += (value.shape, value.stride(), value.dtype, value.device)
        elif isinstance(value, tuple | list):
            described += (type(value), len(value))
            _describe(value, described, tensors)
        else:
            described.append(value)


def _refill(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with other tensors in place of its own, in their order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if not isinstance(value, tuple | list):
        return value
    parts = [_refill(part, tensors) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _builder(value: Any, start: int = 0) -> tuple[Callable[[Sequence[Tensor]], Any], int]:
    """What makes values like this one from tensors, those from ``start`` on, and where it ends."""
    if isinstance(value, Tensor):
        return operator.itemgetter(start), start + 1
    if not isinstance(value, tuple | list):
        return lambda tensors: value, start
    make = getattr(value, "_make", type(value))
    if all(isinstance(part, Tensor) for part in value):
        stop = start + len(value)
        return lambda tensors: make(tensors[start:stop]), stop
    builders = []
    for part in value:
        builder, start = _builder(part, start)
        builders.append(builder)
    return lambda tensors: make([builder(tensors) for builder in builders]), start


def _lifted(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """A graph with the tensors that it refers to as further inputs, and these tensors.

    A compiler may take what a graph refers to for constants; inputs it must read in each call.
    """
    nodes, constants = graph.graph, {}
    inputs = [node for node in nodes.nodes if node.op == "placeholder"]
    for node in list(nodes.nodes):
        if node.op != "get_attr" or not isinstance(getattr(graph, str(node.target)), Tensor):
            continue
        if node.target not in constants:
            after = nodes.inserting_after(inputs[-1]) if inputs else nodes.inserting_before()
            with after:
                inputs.append(nodes.placeholder(f"referred_{len(constants)}"))
            constants[node.target] = inputs[-1]
        node.replace_all_uses_with(constants[node.target])
        nodes.erase_node(node)
    tensors = [getattr(graph, str(name)) for name in constants]
    for name in constants:
        delattr(graph, str(name))
    graph.recompile()
    return graph, tensors


def _can_compile(tensors: list[Tensor]) -> bool:
    if any(x.is_cuda for x in tensors) or any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return True
    warnings.warn(
        "there is no C++ compiler on the path: the graph is captured, not compiled",
        stacklevel=5,
    )
    return False


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    finite = wanted[wanted.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    tolerance = 100 * torch.finfo(wanted.dtype).eps * scale
    return torch.allclose(found, wanted, rtol=0.0, atol=tolerance, equal_nan=True)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_LIBRARIES = tuple(
    str(Path(str(file)).parent)
    for file in (torch.__file__, pyro.__file__, contextlib.__file__, Path(__file__).parent)
)


def _place(error: Exception) -> str:
    """The innermost line that is neither ours nor torch's nor Pyro's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_LIBRARIES, "<")) and frame.line:
            return f', raised by line {frame.lineno} of {frame.filename}: "{frame.line}"'
    return ""
