"""Captured graphs: the same values, captured anew when they must be, given up when they must be.

Compiling takes seconds, so it is done where it matters; elsewhere graphs are only captured.
"""

import gc
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ebm import MCMC, RBM, ChEESKernel, GibbsKernel, LangevinKernel, MHKernel
from pyro_ebm.internals.tracing import is_capturing
from pyro_ebm.mcmc import ModelPotential
from pyro_ebm.mcmc.engine import costs, graph
from pyro_ebm.mcmc.engine import engine as engine_module
from pyro_ebm.mcmc.engine.engine import MAX_GRAPHS, Engine
from pyro_ebm.mcmc.engine.graph_guards import Dependencies
from pyro_ebm.mcmc.kernels.composed.composite import BlockPotential

CANNOT = "cannot be captured as a graph"


@pytest.fixture
def captured(monkeypatch):
    """The graphs that are captured, in order."""
    graphs = []
    capture = graph.capture

    def captures(*args):
        graphs.append(capture(*args))
        return graphs[-1]

    monkeypatch.setattr(graph, "capture", captures)
    return graphs


def run(model, *data, kernel=LangevinKernel, jit_compile="capture", num_chains=4, **kwargs) -> MCMC:
    pyro.set_rng_seed(0)
    kernel = kernel(model, jit_compile=jit_compile, **kwargs)
    mcmc = MCMC(kernel, 10, 25, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*data)
    return mcmc


def one_site():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def two_sites(y):
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(3), scale).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


NET = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def with_a_net():
    mean = pyro.param("mean", torch.tensor(0.0))
    x = pyro.sample("x", dist.Normal(mean, 1.0))
    pyro.factor("f", -NET(x[None]).sum())


# -- the same draws --------------------------------------------------------------------------------


def same_draws(one: MCMC, other: MCMC, **tolerance) -> None:
    found = one.get_samples()
    for name, value in other.get_samples().items():
        torch.testing.assert_close(found[name], value, **tolerance)
        assert not found[name].requires_grad


@pytest.mark.parametrize("kernel", [LangevinKernel, ChEESKernel])
def test_a_compiled_run_gives_the_draws_of_an_eager_one(kernel):
    """Model, gradient and acceptance, compiled for once."""
    jit, eager = (run(one_site, kernel=kernel, jit_compile=flag) for flag in (True, False))
    graphs = jit.kernel._engine._graphs.values()
    assert graphs
    assert all(graph.run is not graph.captured for graph in graphs)
    same_draws(jit, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel, ChEESKernel])
@pytest.mark.parametrize("num_chains", [1, 4])
def test_a_captured_run_gives_the_draws_of_an_eager_one_bit_for_bit(kernel, num_chains):
    y = torch.tensor([0.5, 1.0, -1.0])
    jit, eager = (
        run(two_sites, y, kernel=kernel, num_chains=num_chains, jit_compile=flag)
        for flag in ("capture", False)
    )
    assert len(jit.kernel._engine._graphs) == 1
    same_draws(jit, eager, rtol=0, atol=0)


def test_a_sweep_of_bits_is_captured_too(captured):
    p = RBM(torch.randn(4, 2), torch.zeros(4), torch.zeros(2)).joint()
    jit, eager = (run(p, kernel=GibbsKernel, jit_compile=flag) for flag in ("capture", False))
    assert captured
    same_draws(jit, eager, rtol=0, atol=0)


def test_without_a_compiler_the_graph_is_run_as_it_is(monkeypatch, captured):
    monkeypatch.setattr(engine_module.shutil, "which", lambda name: None)
    double = Engine(lambda x: (2 * x,), jit_compile=True)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler on the path"):
        double(torch.ones(2))
    assert double(torch.full((2,), 4.0))[0].tolist() == [8.0, 8.0]
    assert len(captured) == 1
    double(torch.ones(3))  # another graph, without another warning


@pytest.mark.parametrize(
    ("planned", "first"),
    [(None, None), (0, 100), (99, 100), (100, 1), (10**9, 1)],
)
def test_auto_captures_when_as_many_calls_are_planned_or_made(planned, first, monkeypatch):
    monkeypatch.setattr(graph.FxGraph, "compile", lambda *_: None)
    double = Engine(lambda x: (2 * x,), "auto", planned=planned)
    found = []
    for i in range(1, 150):
        double.iterate(1, (torch.rand(2),))
        found += [i] if double._graphs and not found else []
    assert found == ([] if first is None else [first])


def chain(n):
    """A function of ``n`` operations."""

    def function(x):
        for _ in range(n):
            x = x.cos()
        return (x,)

    return function


@pytest.mark.parametrize(
    ("operations", "size", "calls"),
    # 6 s and 8 ms for each, against 1.2 us for each and .3 ns for each number that it makes
    [(1, 1, 5_006_000), (100, 1, 56_700), (1000, 1, 11_660), (10, 10**6, 2_020)],
)
def test_auto_compiles_by_the_size_of_the_graph(operations, size, calls, monkeypatch):
    compiled = []
    monkeypatch.setattr(graph.FxGraph, "compile", lambda self, _: compiled.append(self))
    for planned in (int(0.99 * calls), int(1.01 * calls)):
        assert not compiled
        engine = Engine(chain(operations), "auto", planned=planned)
        engine(torch.rand(size))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("function", "size", "work"),
    [
        (lambda x: (x.cos().T,), (20, 30), 600),  # the transpose writes nothing
        (lambda x: (x @ x.T,), (20, 30), 20 * 20 + 20 * 30 * 20 / 8),
        (lambda x: (x @ x.mT,), (7, 20, 30), 7 * (20 * 20 + 20 * 30 * 20 / 8)),
    ],
)
def test_work_is_what_is_written_and_added_up(function, size, work):
    found = graph.FxGraph(function, (torch.rand(size),), [torch.rand(size)])
    assert costs.work(found.graph.graph) == pytest.approx(work)


def test_a_small_graph_runs_on_one_thread(monkeypatch):
    threads = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for size, wanted in ((10, 1), (costs.WORTH_THREADS, 2)):
            found = graph.FxGraph(lambda x: (2 * x,), (torch.rand(size),), [torch.rand(size)])
            run = found.run
            found.run = lambda *x, run=run: threads.append(torch.get_num_threads()) or run(*x)
            found([torch.rand(size)])
            found.iterate(2, [torch.rand(size)], 1)
            assert threads == [wanted] * 3
            assert torch.get_num_threads() == 2
            threads.clear()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("planned", "first"), [(20, [56]), (9, [])])
def test_auto_compiles_when_as_many_calls_were_made_and_will_be(planned, first, monkeypatch):
    compiled = []
    monkeypatch.setattr(graph.FxGraph, "compile", lambda self, _: compiled.append(engine.calls))
    monkeypatch.setattr(engine_module, "WORTH_CAPTURING", 0)
    monkeypatch.setattr(costs, "COMPILING", 0.0)
    monkeypatch.setattr(costs, "COMPILING_AN_OPERATION", 50 * costs.OPERATION)
    engine = Engine(chain(3), "auto", planned=planned)
    for engine.made in range(planned):
        engine.iterate(7, (torch.rand(2),))
    assert compiled[:1] == first
    resumed = Engine(chain(3), "auto", planned=planned)
    resumed.calls, resumed.made, resumed.compiles = engine.calls, engine.made, engine.compiles
    compiled.clear()
    resumed(torch.rand(2))
    assert bool(compiled) == bool(first)


def test_auto_of_a_run():
    short, long = MCMC(LangevinKernel(one_site), 40, 30), MCMC(ChEESKernel(one_site), 50, 50)
    for mcmc, graphs in ((short, 0), (long, 1)):
        mcmc.disable_progbar = True
        mcmc.run()
        assert len(mcmc.kernel._engine._graphs) == graphs
    mcmc = pyro.infer.MCMC(LangevinKernel(one_site), 51, 50, disable_progbar=True)
    mcmc.run()
    assert len(mcmc.kernel._engine._graphs) == 1


def test_another_way_is_refused():
    with pytest.raises(ValueError, match=r'jit_compile must be False, "capture", True or "auto"'):
        LangevinKernel(one_site, jit_compile="captured")


def test_an_engine_travels_without_its_graphs():
    double = Engine(torch.square, jit_compile="capture")
    double(torch.ones(2))
    again = pickle.loads(pickle.dumps(double))
    assert again._graphs == {}
    assert again(torch.full((2,), 3.0)).tolist() == [9.0, 9.0]


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel, ChEESKernel])
@pytest.mark.parametrize("jit_compile", [False, "capture"])
def test_no_transition_waits_for_a_number(kernel, jit_compile):
    """On a GPU each look at a number waits for all that was launched before."""
    kernel = kernel(one_site, jit_compile=jit_compile)
    potential = kernel.make_potential()
    kernel.bind(potential, warmup_steps=0)
    state = kernel.init(potential.initial(4))
    for _ in range(12):  # the first ones capture, check, and look, until the 100th call
        state, _ = kernel.step(state)
    with Reads() as reads:
        for _ in range(5):
            state, _ = kernel.step(state)
    assert reads.count == 0
    with reads:
        float(state.potential.sum())
    assert reads.count == 1


# -- captured anew ---------------------------------------------------------------------------------


def test_one_graph_for_each_shape_and_dtype(captured):
    double = Engine(lambda x, flag: (2 * x, [flag]), "capture")
    for x in (torch.ones(2), torch.ones(3), torch.ones(2).double(), torch.ones(2) * 5):
        for _ in range(2):
            value, rest = double(x, None)
            assert torch.equal(value, 2 * x)
            assert value.dtype == x.dtype
            assert rest == [None]
    assert len(captured) == 3
    double(torch.ones(2), torch.ones(()))  # a tensor where there was none
    assert len(captured) == 4


def test_the_graphs_follow_parameters(captured):
    """In place a graph follows by itself; a new tensor, or a new mode, wants a new graph."""
    potential = ModelPotential(with_a_net)
    compiled = Engine(
        lambda z: potential.value_and_grad(z), "capture", state=Dependencies(potential)
    )
    z = torch.linspace(-1, 1, 5)[:, None]

    def agrees(graphs):
        for _ in range(2):
            for got, want in zip(compiled(z), potential.value_and_grad(z), strict=True):
                torch.testing.assert_close(got, want)
        assert len(captured) == graphs

    before = [p.clone() for p in NET.parameters()]
    agrees(1)
    first = compiled(z)[0]
    with torch.no_grad():
        NET[0].weight.mul_(3.0)
    NET.load_state_dict({k: v + 0.1 for k, v in NET.state_dict().items()})
    NET[2].bias.data = torch.tensor([5.0])
    agrees(1)
    assert (compiled(z)[0] - first).abs().min() > 0.1
    NET.load_state_dict({k: v + 1 for k, v in NET.state_dict().items()}, assign=True)
    agrees(2)
    pyro.get_param_store()["mean"] = torch.tensor(9.0)
    agrees(3)
    NET.eval()
    agrees(4)
    NET.train()
    agrees(4)  # as before: the graph is still there
    last, NET[2] = NET[2], nn.Linear(4, 1)
    agrees(5)
    NET[2].bias.data += 1  # of a layer that was not there when the model was first looked at
    agrees(5)
    NET[2].weight = nn.Parameter(torch.ones(1, 4))
    agrees(6)
    NET[2] = last
    agrees(7)
    with torch.no_grad():
        for parameter, value in zip(NET.parameters(), before, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("jit_compile", ["capture", True])
def test_a_graph_follows_a_tensor_that_it_refers_to_and_its_layout(jit_compile):
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    linear = Engine(lambda x: (x @ weight,), jit_compile)
    x = torch.tensor([[1.0, 0.0]])

    def gives(*want):
        for _ in range(2):
            assert linear(x)[0].tolist() == [[*want]]

    gives(1.0, 2.0)
    weight[0, 0] = 5.0
    gives(5.0, 2.0)
    weight.data = torch.tensor([[6.0, 7.0], [0.0, 0.0]])
    gives(6.0, 7.0)
    weight.t_()
    gives(6.0, 0.0)
    weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    gives(1.0, 2.0, 3.0)


def test_a_compiled_graph_knows_strides():
    """A compiled graph reads memory as it lay when it was compiled."""
    subtract = Engine(lambda x, y: (x - 2 * y,), jit_compile=True)
    x, y = torch.arange(4.0).reshape(2, 2), torch.ones(2, 2)
    for _ in range(2):
        for value in (x, x.T, x[:, :1].expand(2, 2)):
            assert torch.equal(subtract(value, y)[0], value - 2)


def test_a_new_layer_below_a_block_is_held_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", -net(x[None]).sum())

    whole = ModelPotential(model)
    block = BlockPotential(whole, ["x"])
    state = Dependencies(block)
    before = state()
    net[1] = nn.Dropout(0.9)
    assert state() != before
    z = torch.zeros(4, 2)
    block.hold(z)
    torch.testing.assert_close(block(z[:, :1]), whole(z))
    assert net[1].training
    assert net[1] in whole.modules


def test_the_number_of_graphs_is_bounded(captured):
    double = Engine(lambda x: (2 * x,), jit_compile="capture")
    for size in range(1, 3 * MAX_GRAPHS):
        double(torch.ones(size))
        assert len(double._graphs) <= MAX_GRAPHS
    dropped = weakref.ref(captured[0])
    captured.clear()
    gc.collect()
    assert dropped() is None
    double(torch.ones(3 * MAX_GRAPHS - 1))
    assert not captured  # the last ones are kept


def test_an_engine_that_goes_leaves_nothing_behind():
    def weak():
        weight = torch.randn(3, 3)
        linear = Engine(lambda x: (x @ weight,), jit_compile=True)
        linear(torch.ones(1, 3))
        (graph,) = linear._graphs.values()
        return [weakref.ref(x) for x in (graph, graph.graph, weight)]

    gone = weak()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# -- given up --------------------------------------------------------------------------------------


def branches(y=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0:
        pyro.factor("right", -x)


def test_a_model_that_cannot_be_captured_runs_without(captured):
    with pytest.warns(UserWarning, match="the model cannot be") as caught:
        jit = run(branches)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1
    assert CANNOT in texts[0]
    assert not captured
    eager = run(branches, jit_compile=False)
    assert torch.equal(jit.get_samples()["x"], eager.get_samples()["x"])


def far_out(x):
    if x.detach().numpy().sum() > 100:  # seldom: no comparison of values would notice
        return (-x,)
    return (x,)


def branching(x):
    scale = 3.0 if x.sum() > 0 else 2.0
    return (scale * x,)


def listing(x):
    return (x * sum(x.tolist()),)


def counting(x):
    far = x[x.abs() > 2.5]
    return (x + len(far),)


def noisy(x):
    return (x + torch.rand_like(x),)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (far_out, r'Tensor.numpy, .*test_engine.py: "if x.detach\(\).numpy\(\).sum\(\) > 100:'),
        (branching, r'test_engine.py: "scale = 3.0 if x.sum\(\) > 0 else 2.0"'),
        (listing, r'Tensor.tolist, .*test_engine.py: "return \(x \* sum\(x.tolist\(\)\),\)"'),
        (counting, "the shape of a tensor depends on values"),
        (noisy, "random numbers of its own"),
    ],
)
def test_what_stands_in_the_way_is_named(function, why):
    run = Engine(function, "capture")
    with pytest.warns(UserWarning, match=f"{CANNOT}.*{why}"):
        run(torch.ones(2))
    assert run._graphs == {}
    if function is not noisy:
        assert torch.equal(run(torch.full((2,), 99.0))[0], function(torch.full((2,), 99.0))[0])


def test_a_mask_and_a_list_of_numbers_that_do_not_move_may_be_read():
    mask = torch.tensor([True, False, True])

    def picks(x):
        return (x[mask] * sum(mask.tolist()),)

    run = Engine(picks, "capture")
    for x in (torch.ones(3), torch.tensor([1.0, 2.0, 3.0])):
        assert torch.equal(run(x)[0], picks(x)[0])
    assert len(run._graphs) == 1


def test_a_value_that_comes_from_elsewhere_is_not_frozen():
    """The second call is made with the function too."""
    calls = []

    def looks(x):
        calls.append(x)
        return (x * len(calls),)

    run = Engine(looks, "capture")
    run(torch.ones(2))
    with pytest.warns(UserWarning, match=f"{CANNOT}.*other values than the model"):
        run(torch.full((2,), 2.0))
    assert run._graphs == {}


def test_auto_gives_up_in_silence():
    looks = Engine(lambda x: (x * x.sum().item(),), "auto", planned=1000)
    for x in (1.0, 2.0):
        assert looks(torch.tensor([x]))[0].tolist() == [x * x]


def test_a_graph_that_does_not_compile_is_run_as_it_is(monkeypatch):
    def fails(*anything):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    double = Engine(lambda x: (2 * x,), jit_compile=True)
    with pytest.warns(UserWarning, match="captured as a graph, not compiled: .*no such instr"):
        assert double(torch.ones(2))[0].tolist() == [2.0, 2.0]
    for size in (2, 3):  # without another warning
        assert double(torch.ones(size))[0].tolist() == [2.0] * size
    assert len(double._graphs) == 2


def test_an_error_of_the_model_is_raised_as_it_is(captured):
    def fails(x):
        raise ValueError("the model's own")

    with pytest.raises(ValueError, match="the model's own"):
        Engine(fails, "capture")(torch.ones(2))
    assert not captured


def test_warnings_of_the_capture_can_be_silenced(captured):
    def loud(x):
        if is_capturing():
            import warnings

            warnings.warn("while capturing", stacklevel=1)
        return (2 * x,)

    with pytest.warns(UserWarning, match="while capturing"):
        Engine(loud, "capture")(torch.ones(2))
    quiet = Engine(loud, "capture", ignore_jit_warnings=True)
    assert quiet(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert len(captured) == 2


def singular_below_0(y):
    x = pyro.sample("x", dist.Normal(3.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), x * torch.eye(2)), obs=y)


def test_a_singular_matrix_in_a_graph_is_nan_for_its_chain(captured):
    potential = ModelPotential(singular_below_0, (torch.ones(2),))
    compiled = Engine(lambda z: potential.value_and_grad(z), "capture")
    compiled(torch.ones(3, 1))
    assert len(captured) == 1
    value, grad = compiled(torch.tensor([[1.0], [-1.0], [2.0]]))
    assert value.isnan().tolist() == [False, True, False]
    assert math.isfinite(grad[0, 0])
    assert len(captured) == 1


def test_a_capture_waits_for_a_moment_without_singular_matrices(captured):
    potential = ModelPotential(singular_below_0, (torch.ones(2),))
    compiled = Engine(lambda z: potential.value_and_grad(z), "capture")
    assert compiled(torch.tensor([[-1.0], [1.0]]))[0].isnan().tolist() == [True, False]
    assert not captured
    for x in (1.0, 2.0):
        z = torch.tensor([[x], [3.0]])
        torch.testing.assert_close(compiled(z)[0], potential.value_and_grad(z)[0])
    assert len(captured) == 1


def test_a_transition_with_a_matrix_is_compiled():
    torch.set_default_dtype(torch.float64)
    potential = ModelPotential(singular_below_0, (torch.ones(2),))
    compiled = Engine(lambda z: potential.value_and_grad(z), True)
    for z in (torch.ones(3, 1), torch.tensor([[1.0], [-1.0], [2.0]]), torch.full((3, 1), 3.0)):
        for found, wanted in zip(compiled(z), potential.value_and_grad(z), strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)
    (graph,) = compiled._graphs.values()
    assert graph.run is not graph.captured


@pytest.mark.parametrize("jit_compile", ["capture", pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_that_fills_a_triangle_becomes_a_graph(jit_compile):
    """By a mask, which no input moves."""
    torch.set_default_dtype(torch.float64)

    def model(y):
        factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)

    potential = ModelPotential(model, (torch.tensor([1.0, 2.0]),))
    compiled = Engine(lambda z: potential.value_and_grad(z), jit_compile)
    for _ in range(3):
        z = torch.randn(5, 1)
        for found, wanted in zip(compiled(z), potential.value_and_grad(z), strict=True):
            torch.testing.assert_close(found, wanted)
    (graph,) = compiled._graphs.values()
    assert (graph.run is graph.captured) == (jit_compile == "capture")


@pytest.mark.parametrize("kernel", [LangevinKernel, ChEESKernel])
def test_a_dense_matrix_needs_no_other_graph_when_it_is_learned(kernel):
    kernel = kernel(two_sites, full_mass=True, jit_compile="capture")
    mcmc = MCMC(kernel, 5, 30, num_chains=3, disable_progbar=True)
    mcmc.run(torch.ones(3))
    assert kernel.inverse_mass_sqrt.abs().tril(-1).sum() > 0
    assert len(kernel._engine._graphs) == 1


def test_one_tensor_that_comes_twice_is_still_two_inputs(captured):
    run = Engine(lambda x, y: (x - y,), "capture")
    x = torch.ones(2)
    run(x, x)
    torch.testing.assert_close(run(torch.full((2,), 3.0), x)[0], torch.full((2,), 2.0))
