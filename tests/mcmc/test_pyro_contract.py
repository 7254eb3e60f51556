"""Our kernels under Pyro's own MCMC and StreamingMCMC, and under ours as Pyro runs chains."""

import json
import math
import pickle

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, Predictive
from pyro.infer.mcmc import StreamingMCMC
from pyro.infer.mcmc import api as pyro_api
from torch.distributions.transforms import ExpTransform

import pyro_ebm
from pyro_ebm import LangevinKernel, MHKernel, UnnormalizedEnergy
from tests.statistics import assert_moments

# Worker processes unpickle these, so they stand at module level.


def model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(x, torch.eye(2)), obs=y)


def scalars(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def trained():
    mean = pyro.param("mean", torch.tensor(0.0))
    noise = pyro.param("noise", torch.tensor(9.0), constraint=dist.constraints.positive)
    pyro.sample("x", dist.Normal(mean, noise))


def energy_model():
    pyro.sample("x", UnnormalizedEnergy(torch.square))


def half_line(params):
    """U of an Exponential(1) on the log scale."""
    z = params["s"]
    return (z.exp() - z).sum()


KERNELS = pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel])
Y = torch.ones(3, 2)
WARN = "Chains will be drawn sequentially"


def stock(kernel, *args, data=(Y,), seed=0, **kwargs) -> MCMC:
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, *args, **{"disable_progbar": True, **kwargs})
    mcmc.run(*data)
    return mcmc


def several(kernel, *args, **kwargs) -> MCMC:
    """Chains one after another: what Pyro does when there are not enough processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyro_api.mp, "cpu_count", lambda: 1)
        with pytest.warns(UserWarning, match=WARN):
            return stock(kernel, *args, **kwargs)


@KERNELS
def test_one_chain(kernel):
    kernel = kernel(model)
    mcmc = stock(kernel, 20, 10)
    samples = mcmc.get_samples(group_by_chain=True)
    assert {k: tuple(v.shape) for k, v in samples.items()} == {"scale": (1, 20), "x": (1, 20, 2)}
    assert (samples["scale"] > 0).all()
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics) == {"scale", "x", "divergences", "acceptance rate", "sample_stats"}
    stats = diagnostics["sample_stats"]["chain 0"]
    assert {k: tuple(v.shape) for k, v in stats.items()} == dict.fromkeys(
        ("lp", "acceptance_rate", "step_size", "diverging"), (20,)
    )
    assert diagnostics["divergences"]["chain 0"] == stats["diverging"].nonzero().flatten().tolist()
    rate = diagnostics["acceptance rate"]["chain 0"]
    assert rate == pytest.approx(float(stats["acceptance_rate"].mean()))
    mcmc.summary()
    # lp is minus the potential of the draw: of the right transition
    draw = {k: v[0, 7] for k, v in samples.items()}
    trace = pyro.poutine.trace(pyro.condition(model, draw)).get_trace(Y)
    torch.testing.assert_close(stats["lp"][7], trace.log_prob_sum() + draw["scale"].log())


@KERNELS
def test_the_answer_is_right(kernel):
    """x given y = 1 (three times) at unit scale: N(3/4, 1/4)."""

    def normal(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)

    kernel = kernel(normal, jit_compile="capture")  # a long run
    x = stock(kernel, 2000, 200, data=(torch.ones(3),)).get_samples()["x"]
    assert pyro.ops.stats.effective_sample_size(x[None], 0, 1) > 100
    assert_moments(x.reshape(4, 500, 1), 0.75, 0.25)


@KERNELS
def test_sequential_chains_are_independent(kernel):
    """The kernel object is shared: nothing of one chain may reach the next."""
    kernel = kernel(model)
    mcmc = several(kernel, 15, 8, num_chains=3)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (3, 15, 2)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not (x[a] == x[b]).any()
    stats = mcmc.diagnostics()["sample_stats"]
    assert all(len(stats[f"chain {chain}"]["lp"]) == 15 for chain in range(3))
    # a chain equals the one that runs alone from the same random state
    pyro.set_rng_seed(3)
    first = MCMC(kernel, 15, 8, disable_progbar=True)
    first.run(Y)
    alone = stock(type(kernel)(model), 15, 8, seed=3)
    assert torch.equal(first.get_samples()["x"], alone.get_samples()["x"])


@KERNELS
def test_initial_params_are_kept(kernel):
    start = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "scale": torch.tensor([-0.5, 0.5])}
    seen = []

    def hook(kernel, params, stage, i):
        seen.append({k: v.clone() for k, v in params.items()})

    fixed = {"adapt_step_size": False}
    if kernel is LangevinKernel:
        fixed["step_size"] = 1e-12
    else:
        fixed["proposal"] = pyro_ebm.mcmc.RandomWalk(1e-6)
    mcmc = several(kernel(model, **fixed), 1, 0, initial_params=start, num_chains=2, hook_fn=hook)
    for chain in range(2):
        for name in start:
            torch.testing.assert_close(seen[chain][name], start[name][chain], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        mcmc.get_samples()["scale"], start["scale"].exp(), rtol=1e-4, atol=1e-4
    )
    one = {"x": torch.zeros(2), "scale": torch.zeros(())}
    kernel = kernel(model, **fixed)
    stock(kernel, 2, 2, initial_params=one)
    with pytest.raises(ValueError, match=r"sites \['x'\], the model has \['scale', 'x'\]"):
        stock(kernel, 2, 2, initial_params={"x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"initial_params\['x'\] must be unconstrained"):
        stock(kernel, 2, 2, initial_params={**one, "x": torch.zeros(3)})


@KERNELS
def test_the_kernels_own_methods(kernel):
    kernel = kernel(model)
    with pytest.raises(RuntimeError, match="needs setup"):
        kernel.sample({})
    kernel.setup(3, Y)
    params = kernel.initial_params
    assert {k: tuple(v.shape) for k, v in params.items()} == {"scale": (), "x": (2,)}
    shapes = {k: v.shape for k, v in params.items()}
    for _ in range(6):
        params = kernel.sample(params)
        assert {k: v.shape for k, v in params.items()} == shapes
        assert set(json.loads(json.dumps(kernel.logging()))) == {"step size", "acc. prob"}
    # a caller may move the chain
    moved = {"scale": torch.tensor(0.3), "x": torch.tensor([100.0, 100.0])}
    assert (kernel.sample(moved)["x"] > 50).all()
    diagnostics = kernel.diagnostics()
    assert len(diagnostics["sample_stats"]["lp"]) == 4
    assert isinstance(diagnostics["divergences"], list)
    for _ in range(2):
        kernel.cleanup()
    assert set(kernel.transforms) == {"scale", "x"}
    torch.testing.assert_close(kernel.transforms["scale"](torch.tensor(math.e)), torch.tensor(1.0))
    assert kernel.save_params == ["scale", "x"]


@KERNELS
def test_save_params(kernel):
    """Pyro packs the sites in the order given, and unpacks them sorted."""
    whole = stock(kernel(model), 6, 3).get_samples()
    both = stock(kernel(model), 6, 3, save_params=["x", "scale"]).get_samples()
    for name in whole:
        assert torch.equal(both[name], whole[name])
    assert list(stock(kernel(model), 6, 3, save_params=["x"]).get_samples()) == ["x"]


@KERNELS
def test_potential_fn_and_transforms(kernel):
    start = {"s": torch.zeros(3)}
    given = {"s": ExpTransform().inv}
    for of_kernel, of_runner in ((given, None), (None, given)):
        mcmc = stock(
            kernel(potential_fn=half_line, transforms=of_kernel),
            200,
            100,
            initial_params=start,
            transforms=of_runner,
            data=(),
        )
        s = mcmc.get_samples()["s"]
        assert s.shape == (200, 3)
        assert (s > 0).all()
        assert 0.5 < s.mean() < 2
    with pytest.raises(ValueError, match="give initial_params"):
        stock(kernel(potential_fn=half_line), 5, data=())


@KERNELS
def test_an_energy_site(kernel):
    samples = stock(kernel(energy_model), 10, 10, data=()).get_samples()
    assert samples["x"].shape == (10,)
    drawn = Predictive(energy_model, samples, return_sites=("x",))()
    assert torch.equal(drawn["x"], samples["x"])


@KERNELS
def test_streaming(kernel):
    pyro.set_rng_seed(0)
    mcmc = StreamingMCMC(kernel(model), 60, 30, num_chains=2, disable_progbar=True)
    mcmc.run(Y)
    statistics = mcmc.get_statistics(group_by_chain=False)
    assert statistics["x"]["count"] == 120
    assert statistics["scale"]["mean"] > 0
    assert statistics["x"]["variance"].shape == (2,)
    assert "r_hat" in mcmc.diagnostics()["x"]


# -- worker processes ------------------------------------------------------------------------------


def train() -> None:
    """As if fitted: the model's own initial values are 0 and 9."""
    trained()
    store = pyro.get_param_store()
    store["mean"] = torch.tensor(100.0)
    store["noise"] = torch.tensor(0.01)


def test_the_parameter_store_is_shipped():
    train()
    kernel = LangevinKernel(trained)
    kernel.setup(0)
    sent = pickle.dumps(kernel)
    pyro.clear_param_store()  # as a new process starts
    received = pickle.loads(sent)
    x = stock(received, 50, 50, data=()).get_samples()["x"]
    assert (x - 100).abs().max() < 0.1
    # what the process has of its own is not overwritten
    pyro.clear_param_store()
    pyro.param("mean", torch.tensor(-7.0))
    x = stock(pickle.loads(sent), 50, 50, data=()).get_samples()["x"]
    assert (x + 7).abs().max() < 0.1
    torch.testing.assert_close(pyro.param("noise").detach(), torch.tensor(0.01))


def test_worker_processes_of_pyro(monkeypatch):
    """Two spawned workers, parameters shipped, chains apart, statistics back."""
    monkeypatch.setattr(pyro_api.mp, "cpu_count", lambda: 8)
    train()
    mcmc = stock(
        LangevinKernel(trained),
        30,
        30,
        num_chains=2,
        mp_context="spawn",
        data=(),
    )
    assert isinstance(mcmc.sampler, pyro_api._MultiSampler)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (2, 30)
    assert (x - 100).abs().max() < 0.1
    assert not (x[0] == x[1]).any()
    stats = mcmc.diagnostics()["sample_stats"]
    assert len(stats["chain 0"]["lp"]) == len(stats["chain 1"]["lp"]) == 30


@pytest.mark.parametrize("num_chains", [1, 2])
def test_our_runner_as_pyro_runs_chains(monkeypatch, num_chains):
    """The parallel method without the processes, which Pyro starts when it finds processors."""
    monkeypatch.setattr(pyro_api.mp, "cpu_count", lambda: 1)
    start = {"x": torch.zeros(2, 2), "scale": torch.zeros(2)}
    if num_chains == 1:
        start = {name: value[0] for name, value in start.items()}
    mcmc = pyro_ebm.MCMC(
        MHKernel(model),
        24,
        10,
        start,
        num_chains=num_chains,
        chain_method="parallel",
        thinning=4,
        save_params=["x", "scale"],
        disable_progbar=True,
    )
    if num_chains == 1:
        mcmc.run(Y)
    else:
        with pytest.warns(UserWarning, match=WARN):
            mcmc.run(Y)
    samples = mcmc.get_samples(group_by_chain=True)
    assert {k: tuple(v.shape) for k, v in samples.items()} == {
        "scale": (num_chains, 6),
        "x": (num_chains, 6, 2),
    }
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert {k: tuple(v.shape) for k, v in fields.items()} == dict.fromkeys(
        ("lp", "acceptance_rate", "step_size", "diverging"), (num_chains, 6)
    )
    draw = {k: v[-1, 2] for k, v in samples.items()}
    trace = pyro.poutine.trace(pyro.condition(model, draw)).get_trace(Y)
    torch.testing.assert_close(fields["lp"][-1, 2], trace.log_prob_sum() + draw["scale"].log())


# -- arviz -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(arviz, "from_pyro"), reason="ArviZ 1.x has no from_pyro")
@KERNELS
def test_arviz_from_pyro(kernel):
    mcmc = stock(kernel(scalars), 20, 10, data=(torch.ones(3),))
    data = arviz.from_pyro(mcmc, log_likelihood=True)
    assert dict(data.posterior.sizes)["draw"] == 20
    torch.testing.assert_close(
        torch.as_tensor(data.posterior["scale"].values),
        mcmc.get_samples(group_by_chain=True)["scale"],
    )
    assert data.sample_stats["diverging"].shape == (1, 20)
    assert data.log_likelihood["y"].shape == (1, 20, 3)
    assert data.observed_data["y"].shape == (3,)
