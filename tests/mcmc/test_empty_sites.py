"""Sites without elements, beside others: a group that nobody is in."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import MCMC, LangevinKernel, UnnormalizedEnergy


def vectors():
    pyro.sample("e", dist.Normal(torch.zeros(0), 1.0).to_event(1))


def rows():
    with pyro.plate("rows", 3):
        pyro.sample("e", dist.LogNormal(torch.zeros(3, 0), 1.0).to_event(1))


def unit():
    pyro.sample("e", dist.Unit(torch.tensor(0.0)))


def energy():
    pyro.sample("e", UnnormalizedEnergy(lambda x: x.square().sum(-1), event_shape=(0,)))


@pytest.mark.parametrize("method", ["vectorized", "sequential", "checkpoint", "store"])
@pytest.mark.parametrize("empty", [vectors, rows, unit, energy], ids=lambda f: f.__name__)
def test_a_run_and_all_that_is_read_from_it(empty, method, tmp_path, capsys):
    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        empty()

    settings = {"num_chains": 2, "disable_progbar": True}
    if method == "sequential":
        settings["chain_method"] = "sequential"
    elif method == "checkpoint":
        settings["checkpoint"] = tmp_path / "a.ckpt"
    elif method == "store":
        settings["store"] = tmp_path / "a.zarr"
    mcmc = MCMC(LangevinKernel(model), 6, **settings)
    mcmc.run()
    posterior = mcmc.to_arviz()["posterior"]
    assert posterior["e"].shape[:2] == posterior["mu"].shape == (2, 6)
    assert posterior["e"].size == 0
    if method == "store":
        return
    assert mcmc.get_samples()["e"].numel() == 0
    assert mcmc.get_samples(5, group_by_chain=True)["mu"].shape == (2, 5)
    assert mcmc.get_samples(5)["mu"].shape == (5,)
    told = mcmc.diagnostics()
    assert told["e"]["r_hat"].numel() == 0
    assert told["mu"]["r_hat"].isfinite()
    mcmc.summary()
    assert "mu" in capsys.readouterr().out
    if method == "checkpoint":
        again = MCMC(LangevinKernel(model), 6, **settings)
        again.resume()
        again.extend(2)
        assert again.get_samples(group_by_chain=True)["e"].shape[:2] == (2, 8)
