"""Captured graphs: the same values, captured anew when they must be, given up when they must be.

Compiling takes seconds, so it is done once here; elsewhere graphs are only captured.
"""

import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import MCMC, LangevinKernel, MHKernel
from pyro_ebm.mcmc import ModelPotential, engine
from pyro_ebm.mcmc.engine import MAX_GRAPHS, Engine
from pyro_ebm.mcmc.kernel import _Parameters

CANNOT = "cannot be captured as a graph"


@pytest.fixture
def captured(monkeypatch):
    """Graphs are captured but not compiled; the list holds them in order."""
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda graph: graphs.append(graph) or graph)
    return graphs


def run(model, *data, kernel=LangevinKernel, jit_compile=True, num_chains=4, **kwargs) -> MCMC:
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


def test_a_compiled_run_gives_the_draws_of_an_eager_one():
    """The one test that compiles: model, gradient and acceptance."""
    jit, eager = (run(one_site, jit_compile=flag) for flag in (True, False))
    ((graph, _),) = jit.kernel._engine._graphs.values()
    assert "OptimizedModule" in type(graph).__name__
    for name, value in eager.get_samples().items():
        torch.testing.assert_close(jit.get_samples()[name], value, rtol=1e-3, atol=1e-3)
    assert not jit.get_samples()["x"].requires_grad


@pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel])
@pytest.mark.parametrize("num_chains", [1, 4])
def test_a_captured_run_gives_the_draws_of_an_eager_one(captured, kernel, num_chains):
    y = torch.tensor([0.5, 1.0, -1.0])
    jit, eager = (
        run(two_sites, y, kernel=kernel, num_chains=num_chains, jit_compile=flag)
        for flag in (True, False)
    )
    assert len(captured) == 1
    for name, value in eager.get_samples().items():
        torch.testing.assert_close(jit.get_samples()[name], value, rtol=1e-3, atol=1e-3)


def test_without_a_compiler_the_graph_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    double = Engine(lambda x: (2 * x,), jit_compile=True)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler on the path"):
        double(torch.ones(2))
    assert double(torch.full((2,), 4.0))[0].tolist() == [8.0, 8.0]


# -- captured anew ---------------------------------------------------------------------------------


def test_one_graph_for_each_shape_and_dtype(captured):
    double = Engine(lambda x, flag: (2 * x, {"flag": flag}), jit_compile=True)
    for x in (torch.ones(2), torch.ones(3), torch.ones(2).double(), torch.ones(2) * 5):
        for _ in range(2):
            value, rest = double(x, None)
            assert torch.equal(value, 2 * x)
            assert value.dtype == x.dtype
            assert rest == {"flag": None}
    assert len(captured) == 3
    double(torch.ones(2), torch.ones(()))  # a tensor where there was none
    assert len(captured) == 4


def test_the_graphs_follow_parameters(captured):
    """In place a graph follows by itself; a new tensor, or a new mode, wants a new graph."""
    potential = ModelPotential(with_a_net)
    compiled = Engine(
        lambda z: potential.value_and_grad(z), jit_compile=True, state=_Parameters(potential)
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
    with torch.no_grad():
        for parameter, value in zip(NET.parameters(), before, strict=True):
            parameter.copy_(value)


def test_the_number_of_graphs_is_bounded(captured):
    double = Engine(lambda x: (2 * x,), jit_compile=True)
    for size in range(1, 3 * MAX_GRAPHS):
        double(torch.ones(size))
        assert len(double._graphs) <= MAX_GRAPHS
    dropped = weakref.ref(captured[0])
    captured.clear()
    gc.collect()
    assert dropped() is None
    double(torch.ones(3 * MAX_GRAPHS - 1))
    assert not captured  # the last ones are kept


# -- given up --------------------------------------------------------------------------------------


def branches(y=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0:
        pyro.factor("right", -x)


def test_a_model_that_cannot_be_captured_runs_without(captured):
    with pytest.warns(UserWarning, match="the model cannot be") as caught:
        jit = run(branches)
    texts = [str(warning.message) for warning in caught]
    assert len([text for text in texts if CANNOT in text]) == 1
    assert len(texts) == 2  # and one that it cannot be vectorized
    assert not captured
    with pytest.warns(UserWarning, match="cannot be vectorized"):
        eager = run(branches, jit_compile=False)
    assert torch.equal(jit.get_samples()["x"], eager.get_samples()["x"])


def test_a_graph_that_does_not_compile_is_given_up(monkeypatch):
    def broken(graph):
        def fails(*tensors):  # as compilers do: when they are first called
            raise RuntimeError("no such instruction")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    double = Engine(lambda x: (2 * x,), jit_compile=True)
    with pytest.warns(UserWarning, match=f"{CANNOT}.*no such instruction"):
        assert double(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert double(torch.ones(2))[0].tolist() == [2.0, 2.0]


def test_an_error_of_the_model_is_raised_as_it_is(captured):
    def fails(x):
        raise ValueError("the model's own")

    with pytest.raises(ValueError, match="the model's own"):
        Engine(fails, jit_compile=True)(torch.ones(2))
    assert not captured


def test_warnings_of_the_capture_can_be_silenced(captured):
    def loud(x):
        if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
            import warnings

            warnings.warn("while capturing", stacklevel=1)
        return (2 * x,)

    with pytest.warns(UserWarning, match="while capturing"):
        Engine(loud, jit_compile=True)(torch.ones(2))
    quiet = Engine(loud, jit_compile=True, ignore_jit_warnings=True)
    assert quiet(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert len(captured) == 2


def test_a_singular_matrix_in_a_graph_is_nan_for_its_chain(captured):
    def model(y):
        x = pyro.sample("x", dist.Normal(3.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), x * torch.eye(2)), obs=y)

    potential = ModelPotential(model, (torch.ones(2),))
    compiled = Engine(lambda z: potential.value_and_grad(z), jit_compile=True)
    compiled(torch.ones(3, 1))
    assert len(captured) == 1
    value, grad = compiled(torch.tensor([[1.0], [-1.0], [2.0]]))
    assert value.isnan().tolist() == [False, True, False]
    assert math.isfinite(grad[0, 0])
    assert len(captured) == 1


def test_one_tensor_that_comes_twice_is_still_two_inputs(captured):
    run = Engine(lambda x, y: (x - y,), jit_compile=True)
    x = torch.ones(2)
    run(x, x)
    torch.testing.assert_close(run(torch.full((2,), 3.0), x)[0], torch.full((2,), 2.0))
