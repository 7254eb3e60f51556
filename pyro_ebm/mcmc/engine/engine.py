r"""Runs a pure batched function as it is, as a captured graph, or as a compiled one.

A transition of a kernel is tensors in, tensors out. It can be run in three ways, which give the
same draws to rounding, since random numbers are drawn outside:

- as it is (``jit_compile=False``);
- *captured* (``"capture"``): the operations on tensors, Pyro model and gradient included, are
  written down once as a plain graph, which is then run without Pyro, without autograd and, on a
  CPU, without Python. Capturing takes as long as some dozens of transitions;
- *compiled* (``True``): that graph, turned into machine code by PyTorch's own compiler
  (``inductor``), and on a GPU replayed as one CUDA graph. Compiling takes seconds.

``"auto"`` chooses by how many calls are planned, or, where more are made than that, by how many
were made, and will be: few calls are not worth a graph, and only many are worth compiling it
(:mod:`pyro_ebm.mcmc.engine.costs`). Where no run says how many calls there will be, nothing is
captured.

What a graph depends on beside its inputs is compared before each call, or before the first of
those that are made in a row. It refers to the parameters that it was captured with, and so sees
them change in place. It is captured anew when shapes, strides, dtypes or devices of its inputs
change, when a parameter, a buffer or a module of a network is replaced, or when one changes between
training and evaluation. A function that cannot be written down, because it branches on a value,
reads one on the host or makes tensors whose shapes depend on values, is run as it is, after one
warning that names the line.

What no graph can see is a Python number, or a tensor in a closure or a global variable, that is
*rebound* to another one. So the function is called beside its graph at the second call, where a
graph that gives other values is given up, and at the 10th, 100th, 1,000th, ..., before each
checkpoint and at the end of a run, where one that gives other values is a :class:`GraphError`.
"""

import contextlib
import shutil
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyro_ebm.internals.lookup import Args, Operation
from pyro_ebm.internals.tracing import FAILURES
from pyro_ebm.mcmc.engine.agreement import agree
from pyro_ebm.mcmc.engine.costs import WORTH_CAPTURING
from pyro_ebm.mcmc.engine.graph import FxGraph, SolvesTogether, describe, tensors_of
from pyro_ebm.mcmc.engine.readings import Readings
from pyro_ebm.ops.arguments import first_line

JitCompile = bool | Literal["capture", "auto"]
MAX_GRAPHS = 8  # kept at a time, of one function
MAX_SINGULAR = 8  # calls in which a matrix is singular, before capturing is given up


class GraphError(RuntimeError):
    """A model has become another one in a way that the graph which runs for it cannot see."""


class Engine:
    """A pure function of tensors, run eagerly or through captured and compiled graphs.

    Args:
        function: a pure function of tensors (or nested tuples of them) to tensors.
        jit_compile: False, ``"capture"``, True or ``"auto"``.
        state: a hashable description of what else the function reads: parameter identities,
            training flags. A graph serves one such state.
        ignore_jit_warnings: whether to silence warnings raised while capturing.
        planned: how many calls, or transitions of some calls each, to expect, for ``"auto"``; None
            if that is not known.

    Attributes:
        jit_compile: as asked for; less where that cannot be.
        calls: how many were made. One that goes on from another, from a checkpoint, takes its
            number, and chooses as it would have.
        compiles: whether so many were made that graphs are compiled; to be taken over too.
        made: how many of the planned transitions were made, which their kernel counts.

    Raises:
        ValueError: for another ``jit_compile``.
        GraphError: by a call, if the graph gives other values than the function by now.

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
        function: Operation,
        jit_compile: JitCompile = False,
        state: Callable[[], Hashable] | None = None,
        ignore_jit_warnings: bool = False,
        planned: int | None = None,
    ):
        check_jit_compile(jit_compile)
        self.requested = jit_compile
        self.function, self.state = function, state
        self.jit_compile: JitCompile = jit_compile
        self.planned, self.calls, self.made = planned, 0, 0
        self.compiles = False
        self.ignore_jit_warnings = ignore_jit_warnings
        self._graphs: dict[Args, FxGraph] = {}
        self._singular = 0
        self._warned: list[str] = []

    def __call__(self, *inputs: object) -> Any:
        """The function's value at the inputs."""
        return self._run(*self._find(inputs), inputs)

    def iterate(self, n: int, carried: Args, *fixed: object) -> Any:
        """The last value when the function is called ``n`` times with what it returned.

        Its graph is looked up once; nothing that it rests on may change on the way.

        Args:
            n: how many times, at least once.
            carried: the first arguments, each time the first values of the last time.
            fixed: the other arguments.

        Example:
            >>> fibonacci = Engine(lambda a, b: (b, a + b))
            >>> fibonacci.iterate(5, (torch.tensor(0), torch.tensor(1)))
            (tensor(5), tensor(8))
        """
        inputs = (*carried, *fixed)
        graph, tensors = self._find(inputs, n)
        if graph is not None and graph.checked:
            with contextlib.suppress(torch.linalg.LinAlgError):
                found = graph.iterate(n, tensors, len(tensors_of(carried)))
                if found is not None:
                    graph.calls, graph.last = graph.calls + n, inputs
                    return found
        self.calls -= n - 1
        found = self._run(graph, tensors, inputs)
        for _ in range(n - 1):
            found = self(*found[: len(carried)], *fixed)
        return found

    def chain(self, n: int, state: Any, draw: Callable[[Any], Args]) -> tuple[Any, Any, list[Any]]:
        """The function ``n`` times, from a state and random numbers to the next state and more.

        Its graph is looked up once; nothing that it rests on may change on the way.

        Args:
            n: how many times, at least once.
            state: the first argument at first, and then the first value of the last time.
            draw: gives the other arguments at a state.

        Returns:
            The state before the last call, the one after it, and the second values of all.

        Example:
            >>> walk = Engine(lambda x, step: (x + step, x))
            >>> walk.chain(3, torch.tensor(0), lambda x: (torch.tensor(2),))
            (tensor(4), tensor(6), [tensor(0), tensor(2), tensor(4)])
        """
        inputs = (state, *draw(state))
        graph, tensors = self._find(inputs, n)
        before, others = state, []
        if graph is not None and graph.checked:
            layouts: list[Hashable] = []
            describe(inputs, layouts, [])
            with torch.no_grad(), graph.threads(), contextlib.suppress(torch.linalg.LinAlgError):
                while True:
                    before, (state, other) = state, graph.value(tensors)
                    others.append(other)
                    graph.calls, graph.last = graph.calls + 1, inputs
                    if len(others) == n:
                        return before, state, others
                    inputs, described, tensors = (state, *draw(state)), [], []
                    describe(inputs, described, tensors)
                    if described != layouts:  # another graph's
                        break
        self.calls -= n - len(others)
        while len(others) < n:
            before, (state, other) = state, self(*inputs)
            others.append(other)
            inputs = (state, *draw(state)) if len(others) < n else inputs
        return before, state, others

    def _run(self, graph: "FxGraph | None", tensors: list[Tensor], inputs: Args) -> Any:
        if graph is not None:
            with contextlib.suppress(torch.linalg.LinAlgError):  # which the function can handle
                found = graph(tensors)
                graph.calls, graph.last = graph.calls + 1, inputs
                return found
        return self.function(*inputs)

    def check(self) -> None:
        """Compares the graphs in use with the function, where each was called last.

        Raises:
            GraphError: if one gives other values.
        """
        now = None if self.state is None else self.state()
        for (state, *_), graph in self._graphs.items():
            if graph.calls > graph.compared_at and state == now and not graph.is_stale():
                self._compare(graph, graph.last, tensors_of(graph.last))

    def _find(self, inputs: Args, n: int = 1) -> "tuple[FxGraph | None, list[Tensor]]":
        """The graph for ``n`` calls from such inputs on, if there can be one, and their tensors."""
        self.calls += n
        if not self.uses_graphs:
            return None, []
        described: list[Hashable] = [None if self.state is None else self.state()]
        tensors: list[Tensor] = []
        describe(inputs, described, tensors)
        described.append(bool(tensors) and torch.is_autocast_enabled(tensors[0].device.type))
        key = tuple(described)
        graph = self._graphs.get(key)
        if graph is None or graph.is_stale():
            graph = self._add_graph(key, inputs, tensors)
        elif not graph.checked:
            if not self._is_right(graph, inputs, tensors):
                graph = None
        elif graph.calls + n >= graph.compare_at:
            self._compare(graph, inputs, tensors, n)
        if graph is not None and not graph.compiled and self._is_worth_compiling(graph):
            self._compile(graph, tensors)
        return graph, tensors

    @property
    def uses_graphs(self) -> bool:
        """Whether calls run through a graph, if there can be one."""
        if self.jit_compile == "auto":
            return self._expected >= WORTH_CAPTURING
        return bool(self.jit_compile)

    def _is_worth_compiling(self, graph: "FxGraph") -> bool:
        if self.jit_compile != "auto" or self.planned is None:
            return self.jit_compile is True
        if self.compiles or self.planned >= graph.worth_compiling:
            return True
        # more calls than planned are made, as of a trajectory's steps: if so many will follow too
        to_come = (self.planned - self.made) * self.calls / max(self.made, 1)
        self.compiles = min(self.calls, 2 * to_come) >= graph.worth_compiling
        return self.compiles

    @property
    def _expected(self) -> int:
        return -1 if self.planned is None else max(self.planned, self.calls)

    def _add_graph(self, key: Args, inputs: Args, tensors: list[Tensor]) -> "FxGraph | None":
        self.function(*inputs)  # an error of the model itself is raised as it is
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        try:
            with self._silenced():
                graph = FxGraph(self.function, inputs, tensors)
        except torch.linalg.LinAlgError:  # a bad moment: the next call may be a better one
            self._singular += 1
            if self._singular >= MAX_SINGULAR:
                self._give_up("a matrix is singular whenever it is tried")
            return None
        except FAILURES as error:
            self._give_up(f"{first_line(error)}{_place(error)}")
            return None
        graph.readings = Readings(self.function, [self])
        self._graphs[key] = graph
        return graph

    def _compile(self, graph: "FxGraph", tensors: list[Tensor]) -> None:
        """Compiles a graph if it can be, and else leaves it as it is."""
        why = None
        if not any(x.is_cuda for x in tensors) and not any(map(shutil.which, _COMPILERS)):
            why = "there is no C++ compiler on the path"
        else:
            try:
                with self._silenced(DeprecationWarning, FutureWarning):  # torch's own
                    graph.compile(tensors)
            except torch.linalg.LinAlgError:
                pass  # it is compiled, and the function is for this call
            except FAILURES as error:
                why = first_line(error)
        if why is not None:
            self.jit_compile = "capture"
            self._warn(f"the model is captured as a graph, not compiled: {why}")

    def _is_right(self, graph: "FxGraph", inputs: Args, tensors: list[Tensor]) -> bool:
        """Whether the graph gives the function's value at other inputs than it was captured at."""
        agrees = self._agrees(graph, inputs, tensors)
        if agrees is False:
            self._give_up(f"the graph gives other values than the model, {self._why(graph)}")
            return False
        if agrees and not all(map(torch.equal, tensors, graph.captured_at)):
            graph.checked, graph.captured_at = True, []
        return True

    def _compare(self, graph: "FxGraph", inputs: Args, tensors: list[Tensor], n: int = 0) -> None:
        """Raises a GraphError if the graph does not give the function's value any more.

        Before ``n`` calls of it, from these inputs on.
        """
        agrees = self._agrees(graph, inputs, tensors)
        if agrees is False:
            graph.compare_at = 1  # and at each call that may follow
            raise GraphError(
                f"the model gives other values than the graph that was captured of it,"
                f" {self._why(graph)}. They were last compared {graph.calls - graph.compared_at}"
                f" calls ago, of {graph.calls}: draws that were made since are in doubt. Run again"
                " with a tensor that changes in place (x.fill_(2.0)), or with jit_compile=False"
            )
        if agrees:
            graph.compared_at = graph.calls
            while graph.compare_at <= graph.calls + n:
                graph.compare_at *= 10

    def _agrees(self, graph: "FxGraph", inputs: Args, tensors: list[Tensor]) -> bool | None:
        """Whether the graph gives the function's value; None where a matrix is singular.

        The graph as it was captured: a compiled one rounds otherwise.
        """
        try:
            found = graph.captured_value(tensors)
            wanted = tensors_of([self.function(*inputs)])
            agrees = agree(found, wanted, graph.captured_value, tensors)
            if not agrees and graph.solves:  # an ill-conditioned matrix makes much of rounding
                with SolvesTogether():
                    wanted = tensors_of([self.function(*inputs)])
                agrees = agree(found, wanted, graph.captured_value, tensors)
        except torch.linalg.LinAlgError:  # at a later call then
            return None
        return agrees

    def _why(self, graph: "FxGraph") -> str:
        """What the function reads from elsewhere, and has changed since the capture."""
        changes = graph.readings.changes(Readings(self.function, [self])) if graph.readings else []
        listed = f": {'; '.join(changes[:3])}" if changes else ""
        return f"which reads something that changes and that no graph can see{listed}"

    def _give_up(self, why: str) -> None:
        self.jit_compile = False
        self._graphs.clear()
        self._warn(
            f"the model cannot be captured as a graph, so jit_compile={self.requested!r} has no"
            f" effect ({why})"
        )

    def _warn(self, what: str) -> None:
        if self.requested != "auto" and what not in self._warned:  # "auto" promises no graph
            self._warned.append(what)
            warnings.warn(what, stacklevel=6)

    @contextlib.contextmanager
    def _silenced(self, *always: type[Warning]) -> Iterator[None]:
        with warnings.catch_warnings():
            for category in (Warning,) if self.ignore_jit_warnings else always:
                warnings.simplefilter("ignore", category)
            yield

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_graphs": {}}


_COMPILERS = ("c++", "g++", "clang++", "cl")


def check_jit_compile(value: object) -> None:
    """Raises a ValueError unless ``value`` is a way to run a function."""
    if not isinstance(value, bool) and value not in ("capture", "auto"):
        raise ValueError(f'jit_compile must be False, "capture", True or "auto", got {value!r}')


_LIBRARIES = tuple(
    str(Path(str(file)).parent)
    for file in (torch.__file__, pyro.__file__, contextlib.__file__, Path(__file__).parents[1])
)


def _place(error: Exception) -> str:
    """The innermost line that is neither ours nor torch's nor Pyro's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_LIBRARIES, "<")) and frame.line:
            return f', raised by line {frame.lineno} of {frame.filename}: "{frame.line}"'
    return ""
