"""Pyro models with discrete latents: posteriors by enumeration, and what Pyro asks of a kernel."""

import math
from contextlib import nullcontext

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive, TraceEnum_ELBO, config_enumerate
from pyro.infer.mcmc import MCMC as PyroMCMC
from pyro.infer.mcmc import StreamingMCMC
from pyro.infer.mcmc import api as pyro_api

from pyro_ebm import MCMC, UnnormalizedEnergy
from pyro_ebm.distributions import RBM, spin
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.mcmc import (
    DiscreteLangevinKernel,
    EnergyPotential,
    Flip,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    ModelPotential,
)
from pyro_ebm.mcmc.potentials.lone_energy import lone_energy
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.models.sites.discrete_sites import site_support_values
from tests.enumeration import assert_draws, assert_invariant, states_of
from tests.statistics import assert_mean

# -- models ----------------------------------------------------------------------------------------

Y = torch.tensor([0.3, 1.2, 2.5])


def mixture():
    """Indices into a table, in a plate."""
    means = torch.tensor([0.0, 1.0, 3.0])
    with pyro.plate("data", 3):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        pyro.sample("y", dist.Normal(means[k], 0.8), obs=Y)


def coupled():
    """Bits of one event that an observation couples."""
    b = pyro.sample("b", dist.Bernoulli(0.3).expand([4]).to_event(1))
    pyro.sample("y", dist.Normal(b.sum() + b[0] * b[1], 0.7), obs=torch.tensor(2.0))


def counts():
    with pyro.plate("data", 2):
        n = pyro.sample("n", dist.Binomial(3, torch.tensor([0.2, 0.7])))
        pyro.sample("y", dist.Normal(n, 1.0), obs=torch.tensor([1.0, 1.5]))


def one_hot():
    means = torch.tensor([-1.0, 0.5, 2.0])
    with pyro.plate("data", 2):
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(k @ means, 1.0), obs=Y[:2])


def weighed():
    """Scales and masks, of both kinds."""
    with pyro.plate("data", 3), poutine.scale(scale=2.0):
        mask = torch.tensor([True, False, True])
        with poutine.mask(mask=mask):
            b = pyro.sample("b", dist.Bernoulli(0.2))
        pyro.sample("y", dist.Normal(b, 1.0).mask(torch.tensor([True, True, False])), obs=Y)
    pyro.factor("f", 0.7 * b[0] * b[2])


def chain():
    """Sites with other numbers of values, each of which depends on the one before."""
    b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
    k = pyro.sample("k", dist.Categorical(logits=torch.stack([b[0], 0 * b[0], b[1]])))
    n = pyro.sample("n", dist.Binomial(2, 0.2 + 0.3 * b[1]))
    pyro.sample("y", dist.Normal(1.0 * k + n, 1.0), obs=torch.tensor(1.7))


def prior_energy():
    """An Ising prior, seen through noise."""
    couplings = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, -0.5], [0.0, -0.5, 0.0]])
    p = UnnormalizedEnergy(lambda x: -(x @ couplings * x).sum(-1) / 2, (3,), spin)
    x = pyro.sample("x", p)
    pyro.sample("y", dist.Normal(x, 1.5).to_event(1), obs=torch.tensor([0.5, -0.2, 1.0]))


def dmala(model=None, **kwargs):
    return DiscreteLangevinKernel(model, step_size=0.6, adapt_step_size=False, **kwargs)


def flip(model=None, **kwargs):
    return MHKernel(model, proposal=Flip(), **kwargs)


MODELS = [mixture, coupled, counts, one_hot, weighed, chain, prior_energy]
ANY = [GibbsKernel, flip]
GRADIENT = [GibbsWithGradientsKernel, dmala]
FLOATING = [coupled, counts, one_hot, weighed, prior_energy]


def exact(model):
    """The model's states and log joint density, from traces of its own, one after another."""
    potential = ModelPotential(model, keep_discrete=True)
    states, log_p = states_of(potential)
    want = []
    for state in states:
        values = {k: v[0] for k, v in potential.constrain(state[None]).items()}
        trace = poutine.trace(poutine.condition(model, values)).get_trace()
        want.append(trace.log_prob_sum())
    torch.testing.assert_close(log_p, torch.stack(want), rtol=1e-4, atol=1e-4)
    return potential, states, log_p


@pytest.mark.parametrize(
    ("model", "make"),
    [(m, k) for m in MODELS for k in ANY] + [(m, k) for m in FLOATING for k in GRADIENT],
)
def test_the_posterior_is_invariant(model, make):
    potential, _, _ = exact(model)
    info = assert_invariant(make(), potential, num=6000)
    assert not info.diverging.any()


@pytest.mark.parametrize("make", [*ANY, *GRADIENT])
def test_from_the_prior_to_the_posterior(make):
    _, states, log_p = exact(coupled)
    mcmc = MCMC(make(coupled), 1, 25, num_chains=2000, disable_progbar=True)
    mcmc.run()
    assert_draws(mcmc.get_samples()["b"], states, log_p)


def test_marginals_are_pyros():
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    marginals = elbo.compute_marginals(config_enumerate(mixture), lambda: None)
    mcmc = MCMC(GibbsKernel(mixture), 100, 5, num_chains=200, disable_progbar=True)
    mcmc.run()
    k = mcmc.get_samples(group_by_chain=True)["k"]
    assert k.dtype == torch.long
    probs = marginals["k"].probs.detach()  # (3, 3)
    assert_mean((k[..., None] == torch.arange(3)).float(), probs)


@pytest.mark.parametrize("make", GRADIENT)
def test_gradients_refuse_indices(make):
    with pytest.raises(ValueError, match=r"in the values of \['k'\], which are whole numbers"):
        make(mixture).setup(0)


def test_an_unadjusted_chain_must_see_every_term():
    """The log density of a OneHotCategorical looks an index up: its gradient is not there."""
    with pytest.raises(ValueError, match=r"density of \['k'\] has no gradient .* adjusted=True"):
        dmala(one_hot, adjusted=False).setup(0)
    dmala(coupled, adjusted=False).setup(0)
    dmala(prior_energy, adjusted=False).setup(0)


def test_float64():
    torch.set_default_dtype(torch.float64)
    for make in (GibbsKernel, dmala):
        mcmc = MCMC(make(coupled), 3, 3, num_chains=2, disable_progbar=True)
        mcmc.run()
        assert mcmc.get_samples()["b"].dtype == torch.float64
        assert mcmc.get_extra_fields()["lp"].dtype == torch.float64


def test_indices_of_a_precise_density():
    """float32 knows no difference of 1 between potentials of 1e8."""

    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(2).double()))
        pyro.factor("f", 1e8 + k.double())

    table, base = torch.tensor([0.0, -1.0]).double(), dist.Categorical(torch.ones(2).double())
    for target in (model, UnnormalizedEnergy(lambda k: table[k] - 1e8, base=base)):
        mcmc = MCMC(GibbsKernel(target), 400, 1, num_chains=10, disable_progbar=True)
        mcmc.run()
        (k,) = mcmc.get_samples(group_by_chain=True).values()
        assert k.dtype == torch.long
        assert_mean(k.double(), 1 / (1 + math.exp(-1)))


def test_a_gradient_that_is_nowhere_finite_does_not_slow_gibbs_down():
    """What is compared when a model is first vectorized is its value, and gradients in reals."""

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.factor("f", (0 * b).sqrt() + b)  # of slope infinity times 0

    kernel = GibbsKernel(model)
    mcmc = MCMC(kernel, 50, 5, num_chains=100, disable_progbar=True)
    mcmc.run()
    assert kernel.potential.way == "vmap"
    assert_mean(mcmc.get_samples(group_by_chain=True)["b"], 1 / (1 + math.exp(-1)))


# -- the values of a site --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "codes"),
    [
        (dist.Bernoulli(0.3).expand([2, 3]).to_event(1), [[0], [1]]),
        (dist.Bernoulli(torch.rand(3)).mask(torch.tensor([True, False, True])), [[0], [1]]),
        (dist.Categorical(torch.ones(2, 3)), [[0], [1], [2]]),
        (dist.Binomial(2, torch.rand(3)), [[0], [1], [2]]),
        (dist.BetaBinomial(1.0, 1.0, 2), [[0], [1], [2]]),
        (dist.OneHotCategorical(torch.ones(4, 2)).to_event(1), [[1, 0], [0, 1]]),
        (dist.OrderedLogistic(torch.tensor(0.0), torch.tensor([-1.0, 1.0])), [[0], [1], [2]]),
        (UnnormalizedEnergy(torch.square, support=spin).expand([2]).mask(True), [[-1], [1]]),
        (dist.Normal(0.0, 1.0), None),
        (UnnormalizedEnergy(torch.square), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_site_support_values(fn, codes):
    got = site_support_values("x", fn)
    assert (got is None) if codes is None else (got.tolist() == codes)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Multinomial(3, torch.ones(3)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Bernoulli(torch.rand(2))),
    ],
    ids=lambda x: type(x).__name__,
)
def test_sites_without_a_finite_set_of_values(fn):
    with pytest.raises(ValueError, match=r"site 'k' .* has no finite set of values .* sum it out"):
        GibbsKernel(lambda: pyro.sample("k", fn)).setup(0)


def test_continuous_latents_want_a_composite():
    def model():
        pyro.sample("x", dist.Normal(pyro.sample("b", dist.Bernoulli(0.5)), 1.0))

    for make in (*ANY, *GRADIENT):
        with pytest.raises(ValueError, match=r"\['x'\] are not: use Langevin.* CompositeKernel"):
            make(model).setup(0)


def test_a_support_that_moves():
    def model():
        n = pyro.sample("n", dist.Categorical(torch.ones(3)))
        pyro.sample("m", dist.Binomial(1.0 * n, 0.5))

    with pytest.raises(ValueError, match=r"\['m'\] are whole numbers without fixed.*IntegerWalk"):
        GibbsKernel(model).setup(0)


def test_an_unknown_normalizer_that_depends_on_a_discrete_latent():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("y", UnnormalizedEnergy(lambda y: (1 + b) * y**2), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="'y': its energy depends on 'b'"):
        GibbsKernel(model).setup(0)


# -- an energy by itself, and its blocks -----------------------------------------------------------


def machine():
    torch.manual_seed(3)
    return RBM(torch.randn(3, 2), torch.randn(3), torch.randn(2))


MACHINE = machine()


def alone():
    return pyro.sample("x", MACHINE)


def observed():
    pyro.sample("x", MACHINE, obs=torch.ones(3))


def with_factor():
    pyro.factor("f", 1.5 * alone().sum())


def with_data():
    pyro.sample("y", dist.Normal(alone(), 1.0).to_event(1), obs=torch.zeros(3))


def with_observed_energy():
    p = UnnormalizedEnergy(lambda x: x.sum(-1), (3,), constraints.boolean)
    pyro.sample("y", p, obs=alone())


def scaled():
    with poutine.scale(scale=3.0):
        alone()


def masked():
    with poutine.mask(mask=False):
        alone()


def masked_by_itself():
    pyro.sample("x", MACHINE.mask(False))


def expanded():
    """An energy whose expanded elements an observation couples."""
    x = pyro.sample(
        "x", BoltzmannMachine(0.5, edges=torch.tensor([[0, 1]])).expand([2]).to_event(1)
    )
    pyro.factor("f", x[0, 0] * x[1, 0])


def on_a_condition():
    """A factor that the model has for some values only, which no trace may have met."""
    x = alone()
    if x.sum() > 2:
        pyro.factor("f", torch.tensor(2.0))


def scaled_by_a_tensor():
    with poutine.scale(scale=torch.tensor([2.0, 2.0])), pyro.plate("p", 2):
        pyro.sample("x", MACHINE)


WEIGHED = [
    with_factor,
    with_data,
    with_observed_energy,
    scaled,
    masked,
    masked_by_itself,
    expanded,
    scaled_by_a_tensor,
]


def test_an_energy_alone_is_swept_in_blocks():
    name, energy = lone_energy(BoundModel(alone))
    assert (name, energy) == ("x", MACHINE)
    for model in (alone, MACHINE):
        potential = GibbsKernel(model).make_potential()
        assert potential.blocks is not None
        assert potential.names == ["x"]
        assert_invariant(GibbsKernel(), potential, num=6000)
    assert lone_energy(BoundModel(dist.Bernoulli(0.5))) is None
    assert lone_energy(BoundModel(lambda: pyro.sample("k", dist.Bernoulli(0.5)))) is None


@pytest.mark.parametrize("model", WEIGHED)
def test_what_else_weighs_on_an_energy_forbids_its_blocks(model):
    assert lone_energy(BoundModel(model)) is None
    potential = GibbsKernel(model).make_potential()
    assert potential.blocks is None
    _, states, log_p = exact(model)
    assert_invariant(GibbsKernel(), potential, num=6000)
    plain = -EnergyPotential(MACHINE)(states[:, :3]) if model is not expanded else 0 * log_p
    assert (log_p.softmax(0) - plain.softmax(0)).abs().max() > 0.01  # it does weigh


@pytest.mark.parametrize("seed", range(4))  # traces on either side of the branch
@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_a_factor_on_a_condition_is_seen(seed):
    pyro.set_rng_seed(seed)
    assert lone_energy(BoundModel(on_a_condition)) is None
    mcmc = MCMC(GibbsKernel(on_a_condition), 1, 4, num_chains=300, disable_progbar=True)
    mcmc.run()
    states, log_p = states_of(EnergyPotential(MACHINE))
    assert_draws(mcmc.get_samples()["x"], states, log_p + 2.0 * (states.sum(-1) > 2))


def test_an_observed_energy_is_no_latent():
    assert lone_energy(BoundModel(observed)) is None
    assert GibbsKernel(observed).make_potential().dim == 0
    conditioned = poutine.condition(alone, {"x": torch.ones(3)})
    assert lone_energy(BoundModel(conditioned)) is None


def test_a_start_that_fails_is_no_lone_energy():
    def unlucky():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Bernoulli(x))  # validation refuses most draws

    assert lone_energy(BoundModel(unlucky)) is None


def test_parameters_of_the_store_are_read():
    def model():
        weight = pyro.param("weight", torch.tensor(1.0))
        pyro.sample(
            "x", UnnormalizedEnergy(lambda x: -weight * x.sum(-1), (2,), constraints.boolean)
        )

    kernel = GibbsKernel(model)
    for weight in (1.0, -2.0):
        pyro.clear_param_store()
        pyro.param("weight", torch.tensor(weight))
        mcmc = MCMC(kernel, 500, 5, num_chains=20, disable_progbar=True)
        mcmc.run()
        x = mcmc.get_samples(group_by_chain=True)["x"]
        assert not x.requires_grad
        assert_mean(x, 1 / (1 + math.exp(-weight)))


# -- Pyro's MCMC, and ours -------------------------------------------------------------------------


def stock(kernel, num_chains=1, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyro_api.mp, "cpu_count", lambda: 1)
        told = pytest.warns(UserWarning, match="sequentially") if num_chains > 1 else nullcontext()
        with told:
            mcmc = PyroMCMC(kernel, 25, 10, num_chains=num_chains, disable_progbar=True, **kwargs)
            mcmc.run()
    return mcmc


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("make", [*ANY, *GRADIENT])
def test_stock_mcmc(make, num_chains, capsys):
    mcmc = stock(make(coupled), num_chains)
    b = mcmc.get_samples(group_by_chain=True)["b"]
    assert b.shape == (num_chains, 25, 4)
    assert ((b == 0) | (b == 1)).all()
    assert len(b.unique(dim=1)[0]) > 1
    mcmc.summary()
    assert "b[3]" in capsys.readouterr().out
    stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
    trace = poutine.trace(poutine.condition(coupled, {"b": b[0, 7]})).get_trace()
    torch.testing.assert_close(stats["lp"][7], trace.log_prob_sum(), rtol=1e-4, atol=1e-4)
    assert "divergences" in mcmc.diagnostics()
    data = arviz.from_pyro(mcmc, log_likelihood=False)
    assert data.posterior["b"].shape == (num_chains, 25, 4)


def test_whole_numbers_come_back_as_such(capsys):
    """Pyro packs all sites into one tensor; ours keeps their types and can summarize them."""
    assert stock(GibbsKernel(mixture)).get_samples()["k"].dtype == torch.long
    assert stock(GibbsKernel(chain)).get_samples()["k"].dtype == torch.float
    for method in ("vectorized", "sequential"):
        mcmc = MCMC(
            GibbsKernel(chain), 30, 5, num_chains=2, disable_progbar=True, chain_method=method
        )
        mcmc.run()
        samples = mcmc.get_samples(group_by_chain=True)
        assert {k: (v.dtype, tuple(v.shape)) for k, v in samples.items()} == {
            "b": (torch.float, (2, 30, 2)),
            "k": (torch.long, (2, 30)),
            "n": (torch.float, (2, 30)),
        }
        mcmc.summary()
        assert " k " in capsys.readouterr().out
        assert mcmc.diagnostics()["k"]["n_eff"] > 1
        drawn = Predictive(chain, mcmc.get_samples(), return_sites=("k",))()
        assert torch.equal(drawn["k"], samples["k"].flatten())


def test_to_arviz():
    mcmc = MCMC(GibbsKernel(mixture), 20, 5, num_chains=3, disable_progbar=True, save_warmup=True)
    mcmc.run()
    data = mcmc.to_arviz(log_likelihood=True)
    assert data["posterior"]["k"].dims == ("chain", "draw", "data")
    assert data["posterior"]["k"].dtype == "int64"
    assert data["warmup_posterior"]["k"].shape == (3, 5, 3)
    k = torch.as_tensor(data["posterior"]["k"].values)
    want = dist.Normal(torch.tensor([0.0, 1.0, 3.0])[k], 0.8).log_prob(Y)
    got = torch.as_tensor(data["log_likelihood"]["y"].values)
    torch.testing.assert_close(got, want)


def test_streaming():
    mcmc = StreamingMCMC(GibbsKernel(mixture), 40, 5, num_chains=2, disable_progbar=True)
    mcmc.run()
    statistics = mcmc.get_statistics(group_by_chain=False)["k"]
    assert statistics["count"] == 80
    assert statistics["mean"].shape == (3,)


def test_worker_processes():
    """Two spawned workers; the starting values are checked before."""
    start = {"b": torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyro_api.mp, "cpu_count", lambda: 8)
        args = {"num_chains": 2, "chain_method": "parallel", "disable_progbar": True}
        bad = MCMC(GibbsKernel(coupled), 5, 5, {"b": start["b"] / 2}, **args)
        with pytest.raises(ValueError, match=r"initial_params\['b'\] must hold the values"):
            bad.run()
        mcmc = MCMC(GibbsKernel(coupled), 30, 5, start, **args)
        mcmc.run()
    b = mcmc.get_samples(group_by_chain=True)["b"]
    assert b.shape == (2, 30, 4)
    assert not torch.equal(b[0], b[1])
    assert mcmc.get_extra_fields(group_by_chain=True)["lp"].shape == (2, 30)


def test_initial_params_are_where_chains_start():
    start = {"b": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    for make in (*ANY, *GRADIENT):
        kernel = make(coupled)
        kernel.initial_params = start
        kernel.setup(0)
        assert torch.equal(kernel.initial_params["b"], start["b"])
    for bad in (torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.full((4,), math.nan)):
        kernel = GibbsKernel(coupled)
        kernel.initial_params = {"b": bad}
        with pytest.raises(ValueError, match=r"must hold the values \[\[0.0\], \[1.0\]\]"):
            kernel.setup(0)


def test_kernels_of_continuous_sites_sum_discrete_ones_out():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(4 * b, 1.0))

    mcmc = MCMC(LangevinKernel(model), 5, 5, disable_progbar=True)
    mcmc.run()
    assert list(mcmc.get_samples()) == ["x"]
    with pytest.raises(ValueError, match=r"'k' is discrete and cannot be summed out.*IntegerWalk"):
        LangevinKernel(lambda: pyro.sample("k", dist.Poisson(1.0))).setup(0)
