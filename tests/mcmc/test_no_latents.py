"""A model without latents runs, as under Pyro: nothing moves, and all that is asked is told."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc import HMC, StreamingMCMC
from pyro.infer.mcmc import MCMC as PyroMCMC
from pyro.infer.mcmc import NUTS as PyroNUTS
from pyro.infer.mcmc import api as pyro_api
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import ConjugateReparam

from pyro_ebm import MCMC, UnnormalizedEnergy, to_arviz
from pyro_ebm.mcmc import (
    NUTS,
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    DiscreteLangevinKernel,
    Flip,
    GibbsKernel,
    GibbsWithGradientsKernel,
    Independence,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
)

Y = torch.tensor([0.5, -1.0, 2.0])
LP = float(dist.Normal(0.0, 1.0).log_prob(Y).sum())
SETTINGS = {"num_samples": 10, "warmup_steps": 20, "disable_progbar": True}


def empty():
    return torch.tensor(1)


def observed():
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y)


def normal():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def enumerated():
    k = pyro.sample("k", dist.Bernoulli(0.25), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(4 * k, 1.0), obs=torch.tensor(1.0))


def an_energy():
    with pyro.plate("data", 3):
        pyro.sample("y", UnnormalizedEnergy(lambda x: x.square() / 2), obs=Y)


def a_factor():
    pyro.factor("f", torch.tensor(-2.0))


def beta_binomial():
    p = pyro.sample("p", dist.Beta(0.5, 1.5))
    pyro.sample("count", dist.Binomial(10.0, p), obs=torch.tensor(2.0))


ENUMERATED_LP = math.log(
    sum(
        w * math.exp(dist.Normal(m, 1.0).log_prob(torch.tensor(1.0)))
        for w, m in [(0.75, 0.0), (0.25, 4.0)]
    )
)
# of the model, whose posterior predictive of the count integrates its latent out
BETA_BINOMIAL = float(dist.BetaBinomial(0.5, 1.5, 10.0).log_prob(torch.tensor(2.0)))
MODELS = {
    "empty": (empty, 0.0),
    "observed": (observed, LP),
    "conditioned": (
        poutine.condition(normal, {"x": torch.tensor(0.5)}),
        float(dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.5, 0.5])).sum()),
    ),
    "enumerated": (enumerated, ENUMERATED_LP),
    "energy": (an_energy, -float(Y.square().sum() / 2)),
    "factor": (a_factor, -2.0),
    "conjugate": (
        poutine.reparam(beta_binomial, {"p": ConjugateReparam(dist.Beta(3.0, 9.0))}),
        BETA_BINOMIAL,
    ),
}
KERNELS = {
    "langevin": LangevinKernel,
    "unadjusted": lambda model: LangevinKernel(model, adjusted=False),
    "full mass": lambda model: LangevinKernel(model, full_mass=True),
    "captured": lambda model: LangevinKernel(model, jit_compile="capture"),
    "metropolis": MHKernel,
    "independence": lambda model: MHKernel(model, proposal=Independence({})),
    "chees": ChEESKernel,
    "captured chees": lambda model: ChEESKernel(model, jit_compile="capture"),
    "barker": BarkerKernel,
    "composite": CompositeKernel,
    "tempering": lambda model: TemperingKernel(LangevinKernel(model), [1.0, 0.5]),
}
DISCRETE = {
    "gibbs": GibbsKernel,
    "gradients": GibbsWithGradientsKernel,
    "discrete langevin": DiscreteLangevinKernel,
    "flips": lambda model: MHKernel(model, proposal=Flip()),
}


def check(mcmc, chains, lp):
    for grouped in (False, True):
        assert mcmc.get_samples(group_by_chain=grouped) == {}
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert fields["lp"].shape == (chains, 10)
    torch.testing.assert_close(fields["lp"], torch.full((chains, 10), lp), rtol=1e-5, atol=1e-5)
    assert (fields["acceptance_rate"] == 1).all()
    assert not fields["diverging"].any()
    assert mcmc.diagnostics()["divergences"] == {f"chain {i}": [] for i in range(chains)}
    mcmc.summary()


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(name, chains):
    mcmc = MCMC(KERNELS[name](observed), **SETTINGS, num_chains=chains)
    mcmc.run()
    check(mcmc, chains, LP)


@pytest.mark.parametrize("name", DISCRETE)
def test_every_discrete_kernel(name):
    mcmc = MCMC(DISCRETE[name](observed), **SETTINGS, num_chains=2)
    mcmc.run()
    check(mcmc, 2, LP)


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, method):
    model, lp = MODELS[name]
    mcmc = MCMC(LangevinKernel(model), **SETTINGS, num_chains=2, chain_method=method)
    mcmc.run()
    check(mcmc, 2, lp)


@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_pyros_kernels_in_our_runner(kernel):
    mcmc = MCMC(kernel(observed), **SETTINGS, num_chains=2, save_warmup=True)
    mcmc.run()
    assert mcmc.get_samples() == mcmc.get_warmup_samples() == {}
    mcmc.summary()
    assert "divergences" in mcmc.diagnostics()
    assert to_arviz(mcmc)["sample_stats"]["diverging"].shape == (2, 10)


def test_no_density_is_named():
    def model():
        pyro.sample("y", dist.Uniform(0.0, 1.0), obs=torch.tensor(2.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="'y' is infinite"):
        MCMC(LangevinKernel(model), **SETTINGS).run()


# -- Pyro's own tests, with our kernels ----------------------------------------------------------


def note(iterations, kernel, samples, stage, i):
    assert samples == {}
    iterations.append((stage, i))


ITERATIONS = [("Warmup", i) for i in range(20)] + [("Sample", i) for i in range(10)]


@pytest.mark.parametrize("jit_compile", [False, "capture"])
@pytest.mark.parametrize("runner", [MCMC, PyroMCMC])
@pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel, ChEESKernel, BarkerKernel])
def test_null_model_with_hook(kernel, runner, jit_compile):
    initial_params, potential_fn, transforms, _ = initialize_model(empty)
    iterations = []
    mcmc = runner(
        kernel(potential_fn=potential_fn, transforms=transforms, jit_compile=jit_compile),
        **SETTINGS,
        initial_params=initial_params,
        hook_fn=functools.partial(note, iterations),
    )
    mcmc.run()
    assert mcmc.get_samples() == {}
    assert iterations == ITERATIONS


@pytest.mark.parametrize("runner", [MCMC, PyroMCMC])
@pytest.mark.parametrize("model", [empty, observed, enumerated])
def test_models_with_hook(model, runner):
    iterations = []
    hook = functools.partial(note, iterations)
    mcmc = runner(LangevinKernel(model), **SETTINGS, initial_params={}, hook_fn=hook)
    mcmc.run()
    assert mcmc.get_samples() == {}
    assert iterations == ITERATIONS
    mcmc.summary()
    assert to_arviz(mcmc)["sample_stats"]["lp"].shape == (1, 10)


def test_chains_one_after_another():
    iterations = []
    hook = functools.partial(note, iterations)
    mcmc = MCMC(
        LangevinKernel(empty), **SETTINGS, num_chains=2, hook_fn=hook, chain_method="sequential"
    )
    mcmc.run()
    assert iterations == [(f"{stage} [{chain}]", i) for chain in (0, 1) for stage, i in ITERATIONS]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [LangevinKernel, PyroNUTS])
def test_in_worker_processes(kernel, monkeypatch):
    monkeypatch.setattr(pyro_api.mp, "cpu_count", lambda: 8)
    mcmc = MCMC(kernel(observed), **SETTINGS, num_chains=2, chain_method="parallel")
    mcmc.run()
    assert mcmc.get_samples() == {}
    assert "divergences" in mcmc.diagnostics()


def test_streaming():
    """Pyro's own kernels fail there: no statistics come of no draws."""
    mcmc = StreamingMCMC(LangevinKernel(empty), **SETTINGS)
    mcmc.run()


# -- what is read afterwards ---------------------------------------------------------------------


@pytest.mark.parametrize("runner", [MCMC, PyroMCMC])
def test_observed_data_and_likelihood_in_arviz(runner):
    mcmc = runner(LangevinKernel(observed), **SETTINGS)
    mcmc.run()
    data = to_arviz(mcmc, log_likelihood=True)
    assert data["observed_data"]["y"].values.tolist() == Y.tolist()
    each = torch.as_tensor(data["log_likelihood"]["y"].values)
    assert each.shape == (1, 10, 3)
    torch.testing.assert_close(each, dist.Normal(0.0, 1.0).log_prob(Y).expand(1, 10, 3))


def test_more_draws_and_the_warmup():
    mcmc = MCMC(ChEESKernel(observed), **SETTINGS, num_chains=2, save_warmup=True, thinning=2)
    mcmc.run()
    mcmc.extend(10)
    assert mcmc.get_warmup_samples() == {}
    assert mcmc.get_extra_fields(group_by_chain=True)["lp"].shape == (2, 10)


def test_checkpoints(tmp_path):
    def make():
        return MCMC(
            LangevinKernel(observed), **SETTINGS, num_chains=2, checkpoint=tmp_path / "run.ckpt"
        )

    make().run()
    mcmc = make()
    mcmc.resume()
    check(mcmc, 2, LP)


def test_a_store(tmp_path):
    mcmc = MCMC(LangevinKernel(observed), **SETTINGS, num_chains=2, store=tmp_path / "run.zarr")
    mcmc.run()
    assert mcmc.to_arviz()["sample_stats"]["lp"].shape == (2, 10)


def test_float64():
    def model():
        pyro.sample("y", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), obs=Y.double())

    mcmc = MCMC(LangevinKernel(model), **SETTINGS)
    mcmc.run()
    assert mcmc.get_extra_fields()["lp"].dtype == torch.float64


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"initial_params has sites \['x'\], the model has \[\]"):
        MCMC(LangevinKernel(observed), **SETTINGS, initial_params={"x": torch.zeros(())}).run()
    with pytest.raises(ValueError, match=r"save_params names \['x'\]"):
        MCMC(LangevinKernel(observed), **SETTINGS, save_params=["x"]).run()
