r"""A function of tensors, written down as a graph of operations.

The function runs once, and what is done to tensors is written down: Pyro's handlers, autograd and
``vmap`` leave their operations, and are gone. What a graph cannot hold is refused here: values that
the host reads, shapes that depend on values, random numbers.
"""

import contextlib
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ebm.internals.compilers import as_written, compile_unguarded
from pyro_ebm.internals.interpreting import Interpreted
from pyro_ebm.internals.lookup import Args, Kwargs, Operation
from pyro_ebm.internals.recording import FIXED
from pyro_ebm.internals.tracing import FAILURES, capture, is_followed, namespace
from pyro_ebm.mcmc.engine.costs import WORTH_THREADS, one_thread, work, worth_compiling
from pyro_ebm.mcmc.engine.readings import Readings

Layout = tuple[Hashable, ...]


class FxGraph:
    """The operations that a function makes with tensors of some shapes.

    Args:
        function: maps tensors and nested tuples of them to the same.
        inputs: its arguments.
        tensors: the tensors in these, in order, as :func:`describe` collects them.

    Attributes:
        constants: what else it reads, parameters for example: further inputs of the graph.
        checked: whether it was found to agree with the function at other inputs.
        captured_at: the inputs, until then.
        calls: how often it was called.
        last: the function's arguments when it was called last.
        compared_at: the number of calls when it was last compared with the function.
        compare_at: the number of calls at which it is to be compared again.
        readings: what the function read from elsewhere when it was captured.
        compiled: whether it was turned into machine code, or could not be.
        worth_compiling: the number of calls after which that has paid.
        threads: within this it runs, on one thread where it is small.

    Raises:
        RuntimeError: if the function does something that a graph cannot hold.
    """

    checked = False
    calls = compared_at = 0
    compare_at = 10
    last: Args = ()
    readings: Readings | None = None
    _returns_alike: bool | None = None  # once it is known

    def __init__(self, function: Operation, inputs: Args, tensors: list[Tensor]):
        structure: list[object] = []

        def on_tensors(*tensors: Tensor) -> list[Tensor]:
            remaining = iter(tensors)
            structure.append(function(*_refill(inputs, remaining)))
            return tensors_of(structure[-1:])

        self.captured_at = [x.detach().clone() for x in tensors]
        with as_written(), _NoHostReads():
            # one tensor that comes twice would be one input of the graph for ever
            apart = [x.detach() for x in tensors]
            graph = capture(on_tensors, {_SOLVE: solve_together}, apart)
        _refuse_dynamic(graph)
        _list_masks(graph)
        self.build, _ = _builder(structure[-1])
        self.graph, self.constants = lifted(graph)
        _refuse_borrowed(self.graph, self.constants)
        small = work(self.graph.graph) < WORTH_THREADS
        self.threads = one_thread if small else contextlib.nullcontext
        self.captured: Operation = self._interpreted(tensors)
        self.run: Operation = self.captured
        self.compiled = False
        self.worth_compiling = worth_compiling(self.graph.graph, self.captured is not self.graph)
        self.replays = False
        self.places, self.layouts = self._look()

    def _interpreted(self, tensors: list[Tensor]) -> Operation:
        """What runs it before it is compiled: on a CPU an interpreter faster than Python."""
        arguments = [*tensors, *self.constants]
        if any(x.device.type != "cpu" or type(x) not in (Tensor, Parameter) for x in arguments):
            return self.graph
        try:
            interpreted = Interpreted(self.graph, [x.detach() for x in arguments])
        except FAILURES:  # it may hold what the interpreter does not know
            return self.graph

        def run(*arguments: Tensor) -> Sequence[Tensor]:
            try:
                return interpreted(*arguments)
            except RuntimeError:  # whose kind the interpreter hides: a singular matrix
                return self.graph(*arguments)

        return run

    def _look(self) -> tuple[Sequence[Layout], list[Layout]]:
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
        """Turns it into machine code, for inputs that lie in memory as these do."""
        arguments = [*tensors, *self.constants]
        self.compiled = True  # or not to be tried again
        with torch.no_grad(), self.threads():
            if all(x.device.type == "cpu" for x in arguments):
                # neither guards nor assertions in each call: the caller has looked at the layouts
                run = compile_unguarded(self.graph, arguments)
            else:
                run = torch.compile(self.graph, mode="reduce-overhead", dynamic=False)
                self.replays = True
            try:
                run(*arguments)  # compiled by its first call
            except torch.linalg.LinAlgError:
                self.run = run
                raise
            self.run = run

    @property
    def solves(self) -> bool:
        """Whether it solves triangular systems, which round otherwise than the function's."""
        return any(node.target is _SOLVE for node in self.graph.graph.nodes)

    def captured_value(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """What the graph says before it is compiled."""
        with torch.no_grad(), self.threads():
            return self.captured(*tensors, *self.constants)

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The function's value at these inputs."""
        with torch.no_grad(), self.threads():
            return self.value(tensors)

    def value(self, tensors: list[Tensor]) -> Any:
        """The function's value, within ``no_grad`` and :attr:`threads`."""
        return self.build(self._run([*tensors, *self.constants]))

    def iterate(self, n: int, tensors: list[Tensor], carried: int) -> Any:
        """The function's last value when it is called ``n`` times.

        Args:
            n: how many times.
            tensors: its inputs the first time.
            carried: how many of these become, the next time, what it has returned first.

        Returns:
            The value; None if what it returns is not laid out as what it takes.
        """
        if self._returns_alike is False:
            return None
        arguments = [*tensors, *self.constants]
        found: Sequence[Tensor] = ()
        with torch.no_grad(), self.threads():
            for _ in range(n):
                found = self._run(arguments)
                if self._returns_alike is None:  # it lays them out in the same way each time
                    pairs = zip(found[:carried], tensors[:carried], strict=True)
                    self._returns_alike = all(_layout(x) == _layout(y) for x, y in pairs)
                if not self._returns_alike:
                    return None
                arguments[:carried] = found[:carried]
        return self.build(found)

    def _run(self, arguments: list[Tensor]) -> Sequence[Tensor]:
        if self.replays:  # into the same memory each time
            torch.compiler.cudagraph_mark_step_begin()
            return [x.clone() for x in self.run(*arguments)]
        return self.run(*arguments)


class _NoHostReads(TorchFunctionMode):
    """Refuses what would read a traced value and leave no trace."""

    HIDDEN = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr)

    def __torch_function__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs = None
    ) -> Any:
        if func in self.HIDDEN and is_followed(args[0]):
            raise RuntimeError(f"a value is read on the host, by Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def solve_together(matrix: Tensor, sides: Tensor, **kinds: bool) -> Tensor:
    """Solves triangular systems of one matrix at once.

    Of a matrix that all chains share, as the scale of a multivariate normal, torch makes a copy for
    each chain; here the chains' vectors become the columns of one matrix. The same to rounding.

    Args:
        matrix: shape ``(..., n, n)``.
        sides: the right-hand sides, shape ``(..., n, k)``, or ``(..., k, n)`` if not ``left``.
        kinds: as of :func:`torch.linalg.solve_triangular`.

    Returns:
        The solutions; NotImplemented if there are several matrices, or one system.
    """
    if matrix.shape[:-2].numel() > 1 or sides.numel() in (0, sides.shape[-2:].numel()):
        return NotImplemented
    shape = torch.broadcast_shapes(matrix.shape[:-2], sides.shape[:-2]) + sides.shape[-2:]
    matrix = matrix.reshape(matrix.shape[-2:])
    if not kinds.get("left", True):  # of X A = B rows are solved, of A X = B columns
        rows = sides.reshape(-1, sides.shape[-1])
        return _SOLVE(matrix, rows, **kinds).reshape(shape)
    columns = sides.movedim(-2, 0)
    solved = _SOLVE(matrix, columns.flatten(1), **kinds)
    return solved.reshape(columns.shape).movedim(0, -2).reshape(shape)


_SOLVE = torch.ops.aten.linalg_solve_triangular.default


class SolvesTogether(TorchDispatchMode):
    """Solves as a graph does, :func:`solve_together`."""

    def __torch_dispatch__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs = None
    ) -> Any:
        kwargs = kwargs or {}
        found = solve_together(*args, **kwargs) if func is _SOLVE else NotImplemented
        return func(*args, **kwargs) if found is NotImplemented else found


def _refuse_dynamic(graph: GraphModule) -> None:
    """Raises a RuntimeError if a graph draws random numbers, or if shapes depend on its inputs."""
    moved: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or moved.intersection(node.all_input_nodes):
            moved.add(node)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise RuntimeError(f"it draws random numbers of its own, by {node.target}")
        if torch.Tag.dynamic_output_shape not in tags:
            continue
        shaping = node.all_input_nodes
        if node.target is torch.ops.aten.index.Tensor:  # only a mask among its indices says shapes
            masks = (torch.bool, torch.uint8)
            indices = [x for x in node.args[1] if isinstance(x, Node)]
            shaping = [x for x in indices if x.meta["val"].dtype in masks]
        if moved.intersection(shaping):
            raise RuntimeError(f"the shape of a tensor depends on values, by {node.target}")


def _refuse_borrowed(graph: GraphModule, constants: list[Tensor]) -> None:
    """Raises a RuntimeError if a graph reads memory that is not there to stay.

    Parameters that are sharded over processes are gathered before a layer runs, and freed after.
    """
    gathers = any(namespace(node) in _COLLECTIVE for node in graph.graph.nodes)
    freed = any(x.numel() and not x.untyped_storage().nbytes() for x in constants)
    if gathers or freed:
        raise RuntimeError("its parameters are gathered from several processes while it runs")


_COLLECTIVE = ("c10d", "_c10d_functional", "c10d_functional", "fsdp")


def _list_masks(graph: GraphModule) -> None:
    """Writes constant masks as lists of indices, since a compiler needs all shapes."""
    nodes, known = graph.graph, {}
    for node in list(nodes.nodes):
        if node.op == "get_attr" and str(node.target).startswith(FIXED):
            known[node] = getattr(graph, str(node.target))
        if node.op != "call_function":
            continue
        if all(x in known for x in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
        if node.target not in _INDEXING:
            continue
        listed: list[object] = []
        for x in node.args[1]:
            mask = known.get(x) if isinstance(x, Node) else None
            if mask is None or mask.dtype is not torch.bool:
                listed.append(x)
                continue
            for indices in mask.nonzero(as_tuple=True):
                name = f"listed_{len(nodes.nodes)}"
                graph.register_buffer(name, indices)
                with nodes.inserting_before(node):
                    listed.append(nodes.get_attr(name))
        node.update_arg(1, listed)
    nodes.eliminate_dead_code()
    graph.recompile()


_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


def lifted(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
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
                inputs[-1].meta = dict(node.meta)
            constants[node.target] = inputs[-1]
        node.replace_all_uses_with(constants[node.target])
        nodes.erase_node(node)
    tensors = [getattr(graph, str(name)) for name in constants]
    for name in constants:
        delattr(graph, str(name))
    graph.recompile()
    return graph, tensors


def tensors_of(values: Iterable[object]) -> list[Tensor]:
    """The tensors of nested tuples."""
    found: list[Tensor] = []
    describe(values, [], found)
    return found


def describe(values: Iterable[object], described: list[Hashable], tensors: list[Tensor]) -> None:
    """Collects the tensors of nested tuples, and what a graph takes for granted of them."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            described += _layout(value)
        elif isinstance(value, tuple | list):
            described += (type(value), len(value))
            describe(value, described, tensors)
        else:
            described += (type(value), value)


def _layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype, x.device


def _refill(value: object, tensors: Iterator[Tensor]) -> Any:
    """The value with other tensors in place of its own, in their order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if not isinstance(value, tuple | list):
        return value
    parts = [_refill(part, tensors) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _builder(value: object, start: int = 0) -> tuple[Callable[[Sequence[Tensor]], Any], int]:
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
