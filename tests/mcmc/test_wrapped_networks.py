"""Networks that a compiler, a script, a wrapper or a functional transform runs."""

import cProfile
import sys
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS, SVI
from pyro.optim import Adam
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm import (
    MCMC,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    LangevinKernel,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
    UnnormalizedEnergy,
)
from pyro_ebm.ops.eval_mode import called_in_eval_mode

# torch warns of its own doing while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

X = torch.tensor([[-1.0], [0.5], [2.0]])
Y = torch.tensor([0.0, 1.0, 1.5])
HOLDER = types.SimpleNamespace()


def network(inputs=1):
    torch.manual_seed(0)
    layers = nn.Linear(inputs, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)
    return nn.Sequential(*layers)


def functional(net):
    return lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,))


def hidden(net):
    """Where no search of what a function refers to finds it."""
    HOLDER.nets = {"the": [net]}
    return lambda x: HOLDER.nets["the"][0](x)


def compiled_function(net):
    return torch.compile(lambda x: net(x), backend="aot_eager", fullgraph=True)


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net)


def sharded(net):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net)


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled as a whole": lambda net: torch.compile(net, backend="aot_eager", fullgraph=True),
    "compiled function": compiled_function,
    "compiled in place": compiled_in_place,
    "compiled and hidden": lambda net: hidden(torch.compile(net, backend="eager")),
    "hidden": hidden,
    "functional": functional,
    "vmap": torch.func.vmap,
    "scripted": scripted,
    "distributed": DistributedDataParallel,
    "sharded": sharded,
}
SLOW_OR_NO_GRAPH = pytest.mark.filterwarnings("ignore:the model cannot be")


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch._dynamo.reset()


def draws(net, kernel, **settings):
    def model():
        assert not nn.modules.module._has_any_global_hook()
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(Y)):
            pyro.sample("y", dist.Normal(w + net(X * w).squeeze(-1), 1.0), obs=Y)

    pyro.set_rng_seed(0)
    num_chains = 1 if kernel is NUTS else 3
    mcmc = MCMC(kernel(model, **settings), 8, 4, num_chains=num_chains, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()["w"]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("settings", [{}, {"jit_compile": "capture"}], ids=["plain", "capture"])
@SLOW_OR_NO_GRAPH
def test_draws_are_those_with_the_network_itself(one_process, name, settings):
    want = draws(network(), LangevinKernel)
    net = network()
    found = draws(WRAPPERS[name](net), LangevinKernel, **settings)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("name", ["compiled", "compiled function", "scripted"])
def test_stock_nuts_runs_them(name):
    want = draws(network().eval(), NUTS)
    found = draws(WRAPPERS[name](network().eval()), NUTS)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["compiled", "compiled as a whole", "compiled function"])
def test_graphs_are_captured_and_chains_vectorized(name):
    draws(WRAPPERS[name](network()), LangevinKernel, jit_compile="capture")  # without a warning


def test_no_graph_holds_parameters_that_are_gathered(one_process):
    with pytest.warns(UserWarning, match="gathered from several processes"):
        draws(sharded(network()), LangevinKernel, jit_compile="capture")


def test_a_compiled_energy_is_sampled():
    samples = []
    for wrap in (lambda net: net, WRAPPERS["compiled"]):
        net = wrap(network())
        p = UnnormalizedEnergy(lambda x, net=net: net(x).squeeze(-1) + x.square().sum(-1), (1,))
        pyro.set_rng_seed(0)
        mcmc = MCMC(LangevinKernel(p), 10, 5, num_chains=3, disable_progbar=True)
        mcmc.run()
        samples.append(mcmc.get_samples()["x"])
    torch.testing.assert_close(*samples)


LOSSES = {
    "contrastive divergence": ContrastiveDivergence,
    "score matching": ScoreMatching,
    "sliced": SlicedScoreMatching,
    "denoising": lambda: DenoisingScoreMatching(sigma=0.5),
    "discrepancy": EnergyDiscrepancy,
    "ranking": RankingNCE,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_train_a_compiled_energy(name):
    data = torch.randn(16, 2)

    def guide(x):
        if name == "ranking":
            noise = dist.Normal(torch.zeros(2), 2.0).to_event(1)
            with pyro.plate("data", len(x)):
                pyro.sample("x", noise, infer={"is_auxiliary": True})

    steps = []
    for wrap in (lambda net: net, WRAPPERS["compiled as a whole"]):
        pyro.clear_param_store()
        net = wrap(nn.Sequential(network(2), nn.Flatten(-2)))

        def model(x, net=net):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", UnnormalizedEnergy(net, (2,)), obs=x)

        pyro.set_rng_seed(0)
        svi = SVI(model, guide, Adam({"lr": 0.01}), LOSSES[name]())
        steps.append(torch.tensor([svi.step(data) for _ in range(3)]))
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-3)


def test_profilers_are_left_as_they_were():
    net = nn.Dropout(0.9)
    calls = []
    sys.setprofile(watch := lambda frame, event, arg: calls.append(event))
    try:
        with called_in_eval_mode() as called:
            before = len(calls)
            net(torch.ones(3))
            assert len(calls) > before
        assert sys.getprofile() is watch
    finally:
        sys.setprofile(None)
    assert called == [net]
    with cProfile.Profile() as profile, called_in_eval_mode() as called:
        net(torch.ones(3))
    assert called == [net]
    with profile:
        torch.ones(3)
