"""A run whose chains are shared out over two ranks is as one in one process."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import ExchangeKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import (
    MCMC,
    ChEESKernel,
    CompositeKernel,
    FlowKernel,
    GibbsKernel,
    LangevinKernel,
    TemperingKernel,
)
from pyro_ebm.mcmc.running import vectorized as runner
from pyro_ebm.ops.distributed import RankError, rank
from tests.ranks import Ranks
from tests.statistics import assert_moments

KERNELS = {
    "langevin": lambda: LangevinKernel(normal),
    "langevin, dense": lambda: LangevinKernel(normal, full_mass=True),
    "chees": lambda: ChEESKernel(normal),
    "chees, dense": lambda: ChEESKernel(normal, full_mass=True),
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


def normal(y):
    """The posterior of x is N(y / 2, 1 / 2), that of the scale its prior."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


Y = torch.tensor([2.0, -4.0])


def sampler(name="langevin", num_samples=100, warmup_steps=80, num_chains=6, **kwargs):
    settings = {"disable_progbar": True, "distributed": True, **kwargs}
    return MCMC(KERNELS[name](), num_samples, warmup_steps, num_chains=num_chains, **settings)


def everything(mcmc):
    """The draws and statistics that a rank can read, the warmup's too."""
    if rank() > 0:
        return {}
    samples = mcmc.get_samples(group_by_chain=True)
    found = {**samples, **mcmc.get_extra_fields(group_by_chain=True)}
    if mcmc.save_warmup:
        for name, value in mcmc.get_warmup_samples(group_by_chain=True).items():
            found[f"warmup {name}"] = value
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what is drawn ---------------------------------------------------------------------------


def drawn(name, num_samples, num_chains):
    pyro.set_rng_seed(5)
    mcmc = sampler(name, num_samples, 150, num_chains)
    mcmc.run(Y)
    kernel = mcmc.kernel
    learned = [kernel.adaptation.step_size, kernel.inverse_mass_sqrt]
    if isinstance(kernel, ChEESKernel):
        learned.append(kernel.trajectory_length)
    return everything(mcmc), learned


@pytest.mark.parametrize("name", KERNELS)
def test_many_chains_on_two_ranks(ranks, name):
    (draws, learned), (_, theirs) = ranks(drawn, name, 60, 160)
    assert all(torch.equal(a, b) for a, b in zip(learned, theirs, strict=True))
    x, scale = draws["x"], draws["scale"]
    assert x.shape == (160, 60, 2)
    assert scale.shape == draws["lp"].shape == (160, 60)
    assert x[:, -1, 0].unique().numel() == 160  # each rank's chains are its own
    for part in (slice(None), slice(80), slice(80, None)):  # of all, of each rank
        assert_moments(x[part], Y / 2, 0.5)
        assert_moments(scale[part].log(), 0.0, 0.25)
    assert (draws["step_size"] == learned[0]).all()
    alone, learned_alone = drawn(name, 60, 160)  # in this process, without a group
    assert_moments(alone["x"], Y / 2, 0.5)
    assert abs((learned[0] / learned_alone[0]).log()) < 0.2
    rates = [d["acceptance_rate"].mean() for d in (draws, alone)]
    assert abs(rates[0] - rates[1]) < 0.04


def test_outside_a_group_it_changes_nothing():
    shared = sampler(num_chains=3, save_warmup=True)
    usual = sampler(num_chains=3, save_warmup=True, distributed=False)
    for mcmc in (shared, usual):
        pyro.set_rng_seed(1)
        mcmc.run(Y)
    assert same(everything(shared), everything(usual))


def in_parts(num_chains):
    """The draws of this rank as it made them, and those that it can read."""
    seen = []

    def hook(kernel, params, stage, i):
        seen.append(params["x"].clone())

    mcmc = sampler(num_chains=num_chains, thinning=3, save_warmup=True, hook_fn=hook)
    mcmc.run(Y)
    warmup, draws = torch.stack(seen[:80], 1), torch.stack(seen[80:], 1)
    return warmup, draws[:, 2::3], everything(mcmc)


@pytest.mark.parametrize("num_chains", [2, 5])
def test_chains_come_in_the_order_of_the_ranks(ranks, num_chains):
    (warmup, draws, read), (other_warmup, other, _) = ranks(in_parts, num_chains)
    assert torch.equal(read["x"], torch.cat([draws, other]))
    assert torch.equal(read["warmup x"], torch.cat([warmup, other_warmup]))
    assert read["diverging"].dtype == torch.bool
    assert read["x"].shape == (num_chains, 33, 2)
    assert len(draws) == (num_chains + 1) // 2


def started_at(start):
    mcmc = sampler(num_samples=1, warmup_steps=0, num_chains=5, initial_params=start)
    mcmc.kernel.adapt_step_size, mcmc.kernel.first_step_size = False, 1e-12
    mcmc.run(Y)
    return everything(mcmc)


def test_starts_are_shared_out(ranks):
    start = {"x": torch.randn(5, 2), "scale": torch.randn(5)}
    read = ranks(started_at, start)[0]
    assert torch.allclose(read["x"][:, 0], start["x"], atol=1e-4)
    assert torch.allclose(read["scale"][:, 0].log(), start["scale"], atol=1e-4)


def reports():
    mcmc = sampler(num_chains=5)
    mcmc.run(Y)
    if rank() > 0:
        told = []
        for read in (mcmc.get_samples, mcmc.get_extra_fields, mcmc.diagnostics, mcmc.summary):
            with pytest.raises(RuntimeError, match=r"rank 1 of 2, and the draws.* are on rank 0"):
                read()
        for read in (mcmc.to_arviz, mcmc.get_warmup_samples):
            with pytest.raises(RuntimeError, match="on rank 0"):
                read()
        return told
    data = mcmc.to_arviz(log_likelihood=True)
    mcmc.summary()
    again = pickle.loads(pickle.dumps(mcmc))
    sizes = {group: dict(data[group].sizes) for group in data.groups()}
    return sizes, mcmc.diagnostics(), again.get_samples()["x"].shape


def test_one_arviz_object(ranks):
    (sizes, diagnostics, shape), _ = ranks(reports)
    assert sizes["posterior"] == {"chain": 5, "draw": 100, "x_dim_0": 2}
    assert sizes["sample_stats"] == {"chain": 5, "draw": 100}
    assert sizes["log_likelihood"]["chain"] == 5
    assert sorted(diagnostics["acceptance rate"]) == [f"chain {i}" for i in range(5)]
    assert diagnostics["x"]["r_hat"].max() < 1.2
    assert shape == (500, 2)


def extended():
    pyro.set_rng_seed(2)
    mcmc = sampler()
    mcmc.run(Y)
    first = everything(mcmc)
    mcmc.extend(40)
    return first, everything(mcmc)


def test_more_draws(ranks):
    first, both = ranks(extended)[0]
    assert both["x"].shape == (6, 140, 2)
    assert all(torch.equal(both[name][:, :100], value) for name, value in first.items())


def in_superchains(num_superchains):
    pyro.set_rng_seed(1)
    still = {"step_size": 1e-9, "adapt_step_size": False, "adapt_mass_matrix": False}
    settings = {"num_superchains": num_superchains, "check_convergence": False}
    settings |= {"num_chains": 12, "distributed": True, "disable_progbar": True}
    mcmc = MCMC(LangevinKernel(normal, **still), 1, 0, **settings)
    mcmc.run(Y)
    return everything(mcmc)


def test_superchains_start_together_and_on_one_rank(ranks):
    x = ranks(in_superchains, 4)[0]["x"].reshape(4, 3, 2)
    assert (x - x[:, :1]).abs().max() < 1e-3
    assert (x[:, 0, 0].sort().values.diff() > 1e-3).all()
    with pytest.raises(ValueError, match="num_superchains=3 must be a multiple of the 2 ranks"):
        ranks(in_superchains, 3)


def until_met(store):
    pyro.set_rng_seed(3)
    mcmc = sampler(num_samples=20, store=store)
    mcmc.run_until(Y, ess=400, rhat=1.1)
    return mcmc.runner.chains.records["draws"].count


@pytest.mark.parametrize("in_store", [False, True])
def test_the_ranks_meet_a_target_together(ranks, tmp_path, in_store):
    first, second = ranks(until_met, tmp_path / "draws.zarr" if in_store else None)
    assert first == second > 20


def composite(kind):
    def mixed():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * k, 1.0))

    kernels = {
        "composite": lambda: CompositeKernel(mixed, [GibbsKernel(), ChEESKernel()]),
        "replicas": lambda: TemperingKernel(LangevinKernel(normal), [1.0, 0.5]),
        "flow": lambda: FlowKernel(LangevinKernel(normal), num_fit_steps=20),
    }
    mcmc = MCMC(kernels[kind](), 50, 60, num_chains=60, distributed=True, disable_progbar=True)
    mcmc.run(*([] if kind == "composite" else [Y]))
    learned = mcmc.kernel.adaptation.step_size
    if kind == "flow":
        flow = mcmc.kernel._flow
        learned = torch.cat([flow.mean, flow.scale, *map(torch.flatten, flow.net.parameters())])
    return everything(mcmc), learned


@pytest.mark.parametrize("kind", ["composite", "replicas", "flow"])
def test_kernels_made_of_kernels(ranks, kind):
    (draws, learned), (_, theirs) = ranks(composite, kind)
    assert torch.equal(learned, theirs)
    if kind == "composite":
        assert_moments(draws["k"].double(), 0.3, 0.21)
    else:
        assert_moments(draws["x"], Y / 2, 0.5)


def precision(x):
    """The posterior of theta is that of a normal's precision, its log Z not known."""
    theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        energy = UnnormalizedEnergy(lambda v: theta[..., None] * v**2 / 2, batch_shape=(len(x),))
        pyro.sample("x", energy, obs=x)


def exchanged(x):
    mcmc = MCMC(
        ExchangeKernel(precision, inner_kernel=LangevinKernel(), num_inner_steps=10),
        30,
        40,
        num_chains=50,
        distributed=True,
        disable_progbar=True,
    )
    mcmc.run(x)
    (inner,) = mcmc.kernel._exchange.inner_chains.values()
    learned = mcmc.kernel.adaptation.step_size, inner.adaptation.step_size
    return everything(mcmc), learned


def test_exchange_with_inner_chains(ranks):
    x = torch.tensor([0.3, -1.2, 0.8, 1.5, -0.1, 0.4, -0.7, 2.0])
    (draws, learned), (_, theirs) = ranks(exchanged, x)
    assert all(torch.equal(a, b) for a, b in zip(learned, theirs, strict=True))
    exact = dist.Gamma(2 + len(x) / 2, 1 + x.square().sum() / 2)
    assert_moments(draws["theta"], exact.mean, exact.variance)


# -- what goes wrong -------------------------------------------------------------------------


def error_of(kind):
    kwargs, y, num_samples = {}, Y, 20
    if kind == "data":
        y = Y + rank()
    elif kind == "numbers":
        num_samples += rank()
    elif kind == "start" and rank() == 1:
        kwargs["initial_params"] = {"x": torch.zeros(6, 3)}
    elif kind == "few":
        kwargs["num_chains"] = 1
    try:
        if kind == "calls" and rank() == 1:
            sampler(checkpoint="no.ckpt").resume(y)
        sampler(num_samples=num_samples, warmup_steps=10, **kwargs).run(y)
    except (ValueError, RankError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("data", "the ranks differ in the log density of the model"),
        ("numbers", "the ranks differ in num_chains, num_samples"),
        ("calls", "the ranks differ in what they call"),
        ("few", "num_chains=1 cannot be shared out over 2 ranks"),
    ],
)
def test_ranks_that_run_other_things_are_refused(ranks, kind, says):
    for error, text in ranks(error_of, kind):
        assert error is ValueError
        assert says in text


def test_an_error_of_one_rank_ends_all(ranks):
    (error, text), (own, _) = ranks(error_of, "start")
    assert (error, own) == (RankError, ValueError)
    assert text == "the start of the chains failed on rank 1"


def interrupted_by_hand():
    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 50):
            raise KeyboardInterrupt

    mcmc = sampler(hook_fn=hook)
    with pytest.raises(KeyboardInterrupt):
        mcmc.run(Y)
    return mcmc._results


def test_an_interrupt_keeps_no_draws_of_different_lengths(ranks):
    assert ranks(interrupted_by_hand) == [None, None]


def bars():
    shown, bar = [], runner.Bar

    def noting(total, num_chains, disable, **kwargs):
        shown.append((num_chains, disable))
        return bar(total, num_chains, True, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Bar", noting)
        sampler(disable_progbar=False).run(Y)
    return shown


def test_one_rank_shows_progress(ranks):
    assert ranks(bars) == [[(6, False)], [(6, True)]]


@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_needs_vectorized_chains(method):
    with pytest.raises(ValueError, match="distributed= needs"):
        MCMC(LangevinKernel(normal), 10, chain_method=method, distributed=True)


def mine_alone():
    """One rank runs by itself, within a group that is there for something else."""
    mcmc = sampler(distributed=False)
    if rank() > 0:
        return None
    mcmc.run(Y)
    return mcmc.get_samples()["x"].shape


def test_a_group_is_used_only_when_asked_for(ranks):
    assert ranks(mine_alone) == [(600, 2), None]
