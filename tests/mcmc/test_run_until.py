"""A run that goes on until its target is met: how far, with files, after a kill, on ranks."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS

from pyro_ebm import MCMC, ChEESKernel, ConvergenceWarning, LangevinKernel, MHKernel
from pyro_ebm.diagnostics.targets import Target


def model(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("slow", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


Y = torch.ones(3)


def sampler(kernel=LangevinKernel, seed=0, **settings):
    pyro.set_rng_seed(seed)
    settings = {"num_chains": 8, "disable_progbar": True, **settings}
    return MCMC(kernel(model), 20, 60, **settings)


def least(mcmc, what="n_eff"):
    found = mcmc.diagnostics()
    return min(float(found[name][what].min()) for name in ("x", "slow"))


@pytest.mark.parametrize("kernel", [LangevinKernel, ChEESKernel, MHKernel])
def test_it_stops_where_the_target_is_met(kernel):
    mcmc = sampler(kernel)
    mcmc.run_until(Y, ess=600, rhat=1.05)
    num = mcmc.results.shape[1]
    assert least(mcmc) >= 600
    assert max(float(mcmc.diagnostics()[n]["r_hat"].max()) for n in ("x", "slow")) <= 1.05
    assert not [finding for finding in mcmc.findings if finding.kind == "target"]
    # the draws are those of one long run, and half as many would not have done
    longer = sampler(kernel)
    longer.run(Y)
    longer.extend(num - 20)
    assert torch.equal(longer.get_samples()["x"], mcmc.get_samples()["x"])
    if num > 20:
        half = Target(600, 1.05).gaps(
            {k: x[:, : (num - 1) // 2] for k, x in mcmc.get_samples(group_by_chain=True).items()}
        )
        assert half


def test_a_target_that_is_out_of_reach():
    mcmc = sampler(thinning=2)
    with pytest.warns(ConvergenceWarning, match="stopped by max_draws=25, after 25 draws") as seen:
        mcmc.run_until(Y, ess=1e5, max_draws=25)
    assert seen[0].filename == __file__
    assert mcmc.results.shape == (8, 25)
    (missed,) = [finding for finding in mcmc.findings if finding.kind == "target"]
    assert f"the effective sample size is {least(mcmc):.3g} at " in missed.text
    assert "and not 100000" in missed.text


def test_time_that_is_up():
    mcmc = sampler()
    with pytest.warns(ConvergenceWarning, match="stopped by max_seconds=0.001, after 20 draws"):
        mcmc.run_until(Y, ess=1e6, max_seconds=1e-3)


def test_named_sites_count_alone():
    mcmc = sampler()
    mcmc.run_until(Y, ess=300, rhat=1.2, names=["slow"])
    all_of = sampler()
    all_of.run_until(Y, ess=300, rhat=1.2)
    assert float(mcmc.diagnostics()["slow"]["n_eff"]) >= 300
    assert mcmc.results.shape[1] <= all_of.results.shape[1]
    with pytest.raises(ValueError, match=r"names has \['z'\], the sites that are kept"):
        sampler().run_until(Y, names=["z"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"ess": 0}, "ess must be a number above 0"),
        ({"rhat": 1.0}, "rhat must be a number above 1"),
        ({"max_draws": 5}, "max_draws=5 is less than the first num_samples=20"),
        ({"max_seconds": -1}, "max_seconds must be a number above 0"),
        ({"names": "x"}, "names must hold"),
    ],
)
def test_arguments(arguments, why):
    with pytest.raises(ValueError, match=why):
        sampler().run_until(Y, **arguments)


def test_chains_one_after_another_are_not_extended():
    with pytest.raises(RuntimeError, match='these are "sequential"'):
        sampler(NUTS).run_until(Y)


class Died(Exception):
    pass


def test_after_a_kill_it_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = sampler()
    whole.run_until(Y, ess=1200, rhat=1.05)
    calls = 0

    def die(kernel, params, stage, i):
        nonlocal calls
        calls += stage == "Sample"
        if calls == 33:  # in the first extension
            raise Died

    files = {"checkpoint": tmp_path / "a.ckpt", "checkpoint_every": 7}
    with pytest.raises(Died):
        sampler(hook_fn=die, **files).run_until(Y, ess=1200, rhat=1.05)
    again = sampler(seed=5, **files)
    again.run_until(Y, ess=1200, rhat=1.05)
    assert torch.equal(again.get_samples()["x"], whole.get_samples()["x"])
    finished = sampler(seed=5, **files)
    finished.run_until(Y, ess=1200, rhat=1.05)
    assert finished.results.shape == whole.results.shape


def test_draws_in_a_store(tmp_path):
    whole = sampler()
    whole.run_until(Y, ess=900, rhat=1.05)
    stored = sampler(store=tmp_path / "a.zarr")
    stored.run_until(Y, ess=900, rhat=1.05)
    x = torch.from_numpy(stored.to_arviz().posterior["x"].values)
    assert torch.equal(x, whole.get_samples(group_by_chain=True)["x"])


def test_few_draws_of_superchains():
    pyro.set_rng_seed(0)
    mcmc = MCMC(ChEESKernel(model), 1, 60, num_chains=400, num_superchains=8, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        mcmc.run_until(Y, ess=2000, rhat=1.01)
    assert least(mcmc) >= 2000
    assert mcmc.results.shape[1] < 30
