"""What pyro_ebm relies on of torch and Pyro beyond their public interfaces."""

import importlib
import re
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch.nn.parallel import DistributedDataParallel

import pyro_ebm
from pyro_ebm.internals import (
    compilers,
    data_parallel,
    functorch,
    interpreting,
    pyro_runtime,
    pyro_state,
    recording,
    recurrent,
    tracing,
)
from pyro_ebm.internals.lookup import internal
from pyro_ebm.mcmc.engine.graph import lifted

PACKAGE = Path(pyro_ebm.__file__).parent

# module of ours that relies on it, where it lies, its name
RELIED_ON = [
    (functorch, "torch._C._functorch", "is_functorch_wrapped_tensor"),
    (functorch, "torch._C", "_are_functorch_transforms_active"),
    (tracing, "torch.fx.experimental.proxy_tensor", "make_fx"),
    (tracing, "torch.fx.experimental.proxy_tensor", "get_proxy_mode"),
    (tracing, "torch.fx.experimental.proxy_tensor", "has_proxy_slot"),
    (tracing, "torch._guards", "tracing"),
    (tracing, "torch._guards", "TracingContext"),
    (tracing, "torch._subclasses.fake_tensor", "FakeTensorMode"),
    (tracing, "torch._ops", "OpOverload"),
    (recording, "torch._ops", "OpOverload"),
    (interpreting, "torch.jit", "trace"),
    (interpreting, "torch._C", "_get_graph_executor_optimize"),
    (interpreting, "torch._C", "_set_graph_executor_optimize"),
    (recurrent, "torch._decomp.decompositions", "gather_params"),
    (recurrent, "torch._decomp.decompositions", "_rnn_helper"),
    (recurrent, "torch._decomp.decompositions", "one_layer_lstm"),
    (recurrent, "torch._decomp.decompositions", "gru_impl"),
    (recurrent, "torch._decomp.decompositions", "rnn_relu_input"),
    (recurrent, "torch._decomp.decompositions", "rnn_tanh_input"),
    (pyro_runtime, "pyro.poutine.runtime", "_PYRO_STACK"),
    (pyro_runtime, "pyro.ops.special", "_SafeLog"),
]


@pytest.mark.parametrize(
    ("ours", "module", "name"), RELIED_ON, ids=[f"{m}.{n}" for _, m, n in RELIED_ON]
)
def test_a_version_that_lacks_it_is_told_in_a_sentence(ours, module, name, monkeypatch):
    internal(module, name, "here")  # raises the sentence if this version lacks it
    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module(module), name)
        library, version = module.partition(".")[0], importlib.import_module(module[:5].rstrip("."))
        wanted = f"{library} {re.escape(version.__version__)} has no {module}.{name}, which"
        with pytest.raises(ImportError, match=f"{wanted} pyro_ebm uses to .*: install a version"):
            exec(compile(Path(ours.__file__).read_text(), ours.__file__, "exec"), {})


def test_what_pyros_runner_and_optimisers_keep():
    def model(mean, sd):
        pyro.sample("x", pyro.distributions.Normal(mean, sd))

    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), 2, 2, disable_progbar=True)
    assert not pyro_state.has_run(mcmc)
    mcmc.run(torch.tensor(0.0), sd=torch.tensor(1.0))
    assert pyro_state.has_run(mcmc)
    assert pyro_state.arguments_of_run(mcmc) == ((torch.tensor(0.0),), {"sd": torch.tensor(1.0)})
    assert list(pyro_state.reported_by_chains(mcmc)[0]) == ["divergences", "acceptance rate"]
    state, optim = {"w": {"state": {}, "param_groups": []}}, pyro.optim.Adam({"lr": 0.1})
    optim.set_state(state)
    assert pyro_state.waiting_states(optim) == state


def test_what_is_imported_late():
    for module, name in (("torch._inductor", "compile"), ("torch._dynamo", "config")):
        internal(module, name, "here")
    assert hasattr(torch._dynamo.config, "error_on_nested_fx_trace")


def test_ddp():
    assert callable(DistributedDataParallel._get_active_ddp_module)
    assert data_parallel.active_data_parallel() is None


def test_no_other_file_relies_on_internals():
    private = re.compile(
        r"torch\._(?!_)\w+|torch\.fx\.experimental|torch\.\S*functorch|_PYRO_STACK|_get_active_ddp"
        r"|_SafeLog\b.*=|\._pyro_samples|\._pyro_context|\._cdata"
    )
    allowed = PACKAGE / "internals"
    for path in PACKAGE.rglob("*.py"):
        if allowed in path.parents:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = private.search(line)
            assert not found, f"{path.relative_to(PACKAGE)}:{number} uses {found.group()}"


# -- what they do ------------------------------------------------------------------------------


def test_mapped_tensors():
    seen = []

    def look(x):
        seen.append((functorch.is_wrapped(x), functorch.in_transform()))
        return x

    torch.vmap(look)(torch.ones(2))
    look(torch.ones(2))
    assert seen == [(True, True), (False, False)]


def test_views_share_a_key():
    x = torch.zeros(3)
    assert functorch.memory_key(x[1:]) == functorch.memory_key(x)
    assert functorch.memory_key(x.clone()) != functorch.memory_key(x)


def test_captures():
    seen = []

    def function(x):
        seen.append((tracing.is_capturing(), tracing.is_followed(x)))
        return [x.sin() + 1]

    graph = tracing.capture(function, {}, [torch.zeros(2)])
    assert seen == [(True, True)]
    assert not tracing.is_capturing()
    assert not tracing.is_followed(torch.zeros(2))
    torch.testing.assert_close(graph(torch.ones(2)), [torch.ones(2).sin() + 1])
    assert {tracing.namespace(node) for node in graph.graph.nodes} == {None, "aten"}


def test_captures_with_another_operation():
    replaced = {torch.ops.aten.sin.default: torch.cos}
    graph = tracing.capture(lambda x: [x.sin()], replaced, [torch.zeros(2)])
    torch.testing.assert_close(graph(torch.ones(2)), [torch.ones(2).cos()])


def test_what_is_compiled_runs_as_written():
    seen = []

    @torch.compile(backend="eager")
    def function(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    with compilers.as_written():
        function(torch.zeros(()))
    assert seen == [False]


def test_svi_is_seen():
    seen = []

    def model():
        seen.append(pyro_runtime.in_svi_step())
        pyro.param("p", torch.zeros(()))
        pyro.factor("f", pyro.param("p"))

    poutine.trace(model).get_trace()
    svi = pyro.infer.SVI(model, lambda: None, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
    svi.step()
    assert seen == [False, True]
    (identity,) = pyro_runtime.parameter_identities()
    assert identity == id(pyro.get_param_store()._params["p"])


def test_random_weights():
    module = PyroModule()
    module.weight = PyroSample(pyro.distributions.Normal(0.0, 1.0))
    assert pyro_runtime.with_random_weights([module, PyroModule(), torch.nn.Linear(1, 1)]) == [
        module
    ]
    with poutine.trace() as tracer, pyro_runtime.weights_are_samples(module):
        _ = module.weight
    assert list(tracer.trace.nodes) == ["weight"]


def test_the_safe_logarithm_is_put_back():
    before = pyro.ops.special._SafeLog
    with pyro_runtime.safe_log_replaced(torch.autograd.Function):
        assert pyro.ops.special._SafeLog is torch.autograd.Function
    assert pyro.ops.special._SafeLog is before


def recorded(function, *tensors):
    """The graph of a function, and which operations are in it."""
    with recording.Recorder({}, tensors) as recorder:
        values = function(*tensors)
    graph = recorder.graph_of(values)
    graph.graph.eliminate_dead_code()
    names = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    return graph, [getattr(name, "__name__", str(name)).split(".")[0] for name in names]


def test_operations_that_change_nothing_are_left_out():
    graph, names = recorded(
        lambda x: [x.detach().view(3).expand(3).contiguous() + torch.zeros(3).exp().sum()],
        torch.zeros(3),
    )
    assert names == ["add"]
    assert graph(torch.ones(3))[0].tolist() == [4.0] * 3


def filled(x):
    out = torch.zeros(2, 2)
    ones = torch.ones_like(x)
    out[0] = x
    out[1] = ones
    return [out * 2, ones, out.sum() + torch.tensor(3.0).add_(1)]


def alias(x):
    out = torch.zeros(2)
    view = out.view(2, 1)
    before = out + 1
    view.copy_(x[:, None])
    return [out + 1, before, out[:1] + view[1]]


@pytest.mark.parametrize("function", [filled, alias])
def test_what_is_written_into_is_made_anew_in_each_call(function):
    graph, _ = recorded(function, torch.zeros(2))
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([5.0, -3.0])):
        for found, wanted in zip(graph(x), function(x), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: filled(x)[0].sum().item(),
        lambda x: float(alias(x)[0][0]),
        lambda x: torch.equal(x, torch.zeros(2)),
    ],
)
def test_a_value_that_is_read_is_refused(read):
    with pytest.raises(recording.HostReadError, match="a value is read on the host, by aten"):
        recorded(lambda x: [x * read(x)], torch.zeros(2))


def test_a_number_of_numbers_may_be_read():
    graph, names = recorded(lambda x: [x * (torch.tensor(2.0) + 1).item()], torch.zeros(2))
    assert names == ["mul"]
    assert graph(torch.ones(2))[0].tolist() == [3.0, 3.0]


def test_it_refers_to_parameters_and_reads_them_in_each_call():
    weight = torch.nn.Parameter(torch.ones(2))
    graph, names = recorded(lambda x: [(x * (weight + weight)).sum()], torch.zeros(2))
    assert names == ["add", "mul", "sum"]
    weight.data.fill_(3.0)
    assert float(graph(torch.ones(2))[0].detach()) == 12.0


def test_make_fx_is_asked_for_the_rest(monkeypatch):
    def refuses(self, *anything):
        raise recording.CannotRecordError("anything")

    monkeypatch.setattr(recording.Recorder, "__torch_dispatch__", refuses)
    graph = tracing.capture(lambda x: [x + 1], {}, [torch.zeros(2)])
    assert graph(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert not tracing.is_capturing()


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
def test_pieces_of_a_graph_are_the_graph(piece, monkeypatch):
    monkeypatch.setattr(interpreting, "PIECE", piece)

    def function(x, y):
        first, _ = torch.linalg.eigh(x @ x.T)
        halves = y.split([1, 2])
        y.relu().add_(1)
        root = torch.linalg.cholesky(x @ x.T + torch.eye(3).to(x) * halves[1].exp().sum())
        return [first * 2, y, root + halves[0], x, y]

    x, y = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    graph, _ = recorded(function, x, y)
    graph, constants = lifted(graph)
    run = interpreting.Interpreted(graph, [x, y, *constants])
    for _ in range(3):
        x, y = torch.randn_like(x), torch.randn_like(y)
        for found, wanted in zip(run(x, y, *constants), function(x, y), strict=True):
            assert torch.equal(found, wanted)


def test_the_interpreter_raises_errors_too():
    graph, _ = recorded(lambda x: [torch.linalg.cholesky(x)], torch.eye(2))
    run = interpreting.Interpreted(graph, [torch.eye(2)])
    assert torch.equal(run(4 * torch.eye(2))[0], 2 * torch.eye(2))
    with pytest.raises(torch.linalg.LinAlgError):
        run(-torch.eye(2))
