"""How the exchange kernel draws auxiliaries, runs, and refuses."""

import pickle

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc import MCMC as PyroMCMC
from torch.distributions import constraints

from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.distributions import BoltzmannMachine, Potts, lattice_edges, spin
from pyro_ebm.distributions.mixture import mixture
from pyro_ebm.distributions.product import product
from pyro_ebm.mcmc import (
    NUTS,
    CompositeKernel,
    GibbsKernel,
    NormalizerError,
    RandomWalk,
    TemperingKernel,
)
from pyro_ebm.mcmc.exchange.auxiliary import AuxiliaryDraw, draw_inside
from pyro_ebm.mcmc.exchange.inner_steps import inner_steps_report
from pyro_ebm.mcmc.exchange.kernel import ExchangeKernel
from pyro_ebm.mcmc.exchange.potential import ExchangePotential
from tests.mcmc.exchange_models import (
    ALIKE,
    CONJUGATE,
    DATA,
    SMALL,
    Precision,
    aligned_spins,
    draws_of,
    grid_posterior,
    hidden_ising,
    ising,
    precision,
    run,
)
from tests.statistics import (
    assert_mean,
    assert_moments,
)

# -- inner chains ----------------------------------------------------------------------------------


def test_longer_inner_chains_show_the_bias_of_short_ones():
    pyro.set_rng_seed(0)
    x = aligned_spins(0.45, 0.825)
    short = run(ExchangeKernel(ising, num_inner_steps=1), x, chains=200, samples=30, warmup=30)
    report = inner_steps_report(short, factor=30)
    assert report.num_steps == {"x": (1, 30)}
    # An auxiliary that is still near the data says less of J: the draws are spread too widely, by
    # .5, give or take .1 over the data. Where their mean is depends on these.
    assert report.largest > 4.5
    assert report.stretch["J"] < 0
    before, after = (mcmc.get_samples()["J"].double() for mcmc in (short, report.mcmc))
    shift = (after.mean() - before.mean()) / after.std()
    torch.testing.assert_close(report.shift["J"], shift, rtol=1e-2, atol=1e-3)
    assert set(report.mcmc.get_samples()) == {"J"}
    assert "'x' 1 -> 30" in repr(report)


@pytest.mark.slow
def test_long_inner_chains_show_none():
    kernel = ExchangeKernel(precision, num_inner_steps=12, inner_kernel=LangevinKernel())
    mcmc = run(kernel, DATA, samples=8, warmup=30)
    report = inner_steps_report(mcmc, factor=2)
    assert report.largest < 4.5
    assert kernel.inner_steps_factor == 1  # the user's kernel is as it was


def test_the_report_of_a_composite_and_of_vectors():
    def model():
        x = pyro.sample("theta", dist.Gamma(torch.tensor([2.0, 4.0]), 1.0).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("x", UnnormalizedEnergy(lambda y: x * y**2, batch_shape=(2,)), obs=DATA[:2])
        pyro.sample("k", dist.Bernoulli(0.5))

    kernel = CompositeKernel(model, [ExchangeKernel(num_inner_steps=3), GibbsKernel()])
    report = inner_steps_report(run(kernel, chains=5, samples=20, warmup=20))
    assert report.num_steps == {"x": (3, 12)}
    assert report.shift["theta"].shape == (2,)
    assert "theta[1]" in repr(report)


def test_the_report_refuses_what_it_cannot_compare():
    exact = run(ExchangeKernel(precision), DATA, chains=2, samples=5, warmup=5)
    with pytest.raises(ValueError, match="all auxiliaries are exact draws"):
        inner_steps_report(exact)
    with pytest.raises(ValueError, match="factor must be an integer of at least 2, got 1"):
        inner_steps_report(exact, factor=1)
    other = run(MHKernel(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))), samples=5, warmup=5)
    with pytest.raises(ValueError, match="only an ExchangeKernel has inner steps, not MHKernel"):
        inner_steps_report(other)
    fresh = MCMC(ExchangeKernel(precision), 10, disable_progbar=True)
    with pytest.raises(RuntimeError, match="call run first"):
        inner_steps_report(fresh)


def test_the_inner_kernel_adapts_in_warmup_and_is_frozen_after():
    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))

        def energy(x):  # scales of 1 and 1000
            return theta * (x[..., 0] ** 2 + (x[..., 1] / 1000) ** 2) / 2

        p = UnnormalizedEnergy(energy, event_shape=(2,))
        pyro.sample("x", p, obs=torch.tensor([1.0, -500.0]))

    kernel = ExchangeKernel(model, num_inner_steps=4)
    frozen = []

    def remember(kernel, params, stage, i):
        chain = kernel.auxiliaries["x"]
        if stage == "Sample":
            frozen.append(
                (chain.adaptation.step_size.clone(), chain.adaptation.inverse_mass_sqrt.clone())
            )

    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, 5, 200, num_chains=20, disable_progbar=True, hook_fn=remember)
    mcmc.run()
    chain = kernel.auxiliaries["x"]
    assert 0.3 < chain.acceptance_rate < 0.9
    scale = chain.adaptation.inverse_mass_sqrt[0]
    assert 100 < scale[1] / scale[0] < 10_000  # the scales of the two elements: 1,000 apart
    for step_size, factor in frozen:
        assert torch.equal(step_size, frozen[0][0])
        assert torch.equal(factor, frozen[0][1])


def test_the_kernel_and_the_steps_of_the_energy_are_the_default():
    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        pyro.sample("x", Precision(theta, kernel=MHKernel(), num_steps=7), obs=DATA)
        pyro.sample("w", UnnormalizedEnergy(lambda x: theta * x**4, num_steps=9), obs=DATA[0])

    auxiliaries = ExchangePotential(model).auxiliaries
    assert repr(auxiliaries) == ("{'x': 7 steps of MHKernel(), 'w': 9 steps of BarkerKernel()}")


def test_inner_chains_start_at_the_data():
    u = torch.tensor([0.5, -1.0, 2.0])
    affine, exp = torch.distributions.AffineTransform(1.0, 2.0), torch.distributions.ExpTransform()
    fn = dist.TransformedDistribution(Precision(torch.ones(3)), [affine, exp]).to_event(1)
    fn = fn.mask(torch.tensor(True))
    seen = []

    def draw(energy, x):
        seen.append((type(energy), x))
        return AuxiliaryDraw(x + 1, x, x)

    y = draw_inside(fn, (1 + 2 * u).exp(), draw).y
    ((kind, x),) = seen
    assert kind is Precision
    torch.testing.assert_close(x, u)
    torch.testing.assert_close(y, (1 + 2 * (u + 1)).exp())


def test_masked_rows_have_no_data_to_start_at():
    masked = Precision(torch.ones(3)).mask(torch.tensor([True, False, True]))
    seen = []

    def draw(energy, x):
        seen.append(x)
        return AuxiliaryDraw(x, x, x)

    draw_inside(masked, torch.full((3,), 1e9), draw)
    assert seen[0].isnan().tolist() == [False, True, False]


def test_potts_is_swept():
    def model():
        coupling = pyro.sample("J", dist.Uniform(0.0, 1.0))
        p = Potts(coupling, edges=lattice_edges(6, 6), num_states=3)
        pyro.sample("x", p, obs=torch.eye(3)[torch.arange(36) % 3])

    potential = ExchangePotential(model, num_inner_steps=3)
    assert repr(potential.auxiliaries) == "{'x': 3 Gibbs sweeps}"
    y = potential.draw(potential.initial(5)).points["x"]
    assert y.shape == (5, 36, 3)
    assert (y.sum(-1) == 1).all()


@pytest.mark.parametrize("make", [product, mixture])
def test_combined_energies(make):
    parts = [UnnormalizedEnergy(lambda x: x**4, event_shape=()), dist.Normal(0.0, 1.0)]

    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        if make is product:
            p = product(parts[0].tempered(theta), parts[1])
        else:
            weights = torch.stack([theta, torch.ones(())])
            p = mixture(weights, parts, unnormalized_weights=True)
        pyro.sample("x", p, obs=torch.tensor(0.5))

    x = torch.linspace(-6, 6, 4001).double()
    normal = dist.Normal(0.0, 1.0).log_prob(x)

    def log_density(theta, x, normal):
        if make is product:
            return normal - theta * x**4
        return torch.logaddexp(theta.log() - x**4, normal)

    def log_posterior(theta):
        log_z = log_density(theta[:, None], x, normal).logsumexp(-1)
        at = torch.tensor(0.5).double()
        seen = log_density(theta, at, dist.Normal(0.0, 1.0).log_prob(at))
        return seen - log_z + dist.Gamma(2.0, 1.0).log_prob(theta)

    mean, variance = grid_posterior(log_posterior, 0.0, 20.0, 1000)
    kernel = ExchangeKernel(model, num_inner_steps=16)
    theta = draws_of(kernel, "theta")
    assert_moments(theta, mean, variance)


# -- under every runner ----------------------------------------------------------------------------


def scaled(x):  # at module level, for workers to unpickle
    theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(lambda x: theta * x**2 / 2), obs=x)


@pytest.mark.parametrize("method", ["vectorized", "sequential", "parallel"])
def test_chain_methods(method):
    kernel = ExchangeKernel(scaled, num_inner_steps=5)
    chains = 1 if method == "parallel" else 2
    mcmc = run(kernel, DATA, chains=chains, samples=30, warmup=30, chain_method=method)
    assert mcmc.get_samples(group_by_chain=True)["theta"].shape == (chains, 30)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert set(fields) == {"lp_without_log_z", "acceptance_rate", "step_size", "diverging"}
    assert mcmc.get_samples()["theta"].std() > 0.01


def test_one_chain_has_the_conjugate_posterior_too():
    kernel = ExchangeKernel(precision, **ALIKE)
    theta = draws_of(kernel, "theta", DATA, chains=1, samples=500, warmup=20)
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)


def test_stock_pyro():
    kernel = ExchangeKernel(precision, **ALIKE)
    mcmc = PyroMCMC(kernel, 500, warmup_steps=20, disable_progbar=True)
    mcmc.run(DATA)
    theta = mcmc.get_samples(group_by_chain=True)["theta"].double()
    assert_moments(theta, CONJUGATE.mean, CONJUGATE.variance)
    stats = kernel.diagnostics()["sample_stats"]
    assert "lp" not in stats
    assert "lp_without_log_z" in stats


def test_arviz():
    mcmc = run(ExchangeKernel(precision), DATA, chains=4, samples=50, warmup=100)
    data = mcmc.to_arviz()
    assert data["posterior"]["theta"].shape == (4, 50)
    assert set(data["sample_stats"]) == {
        "lp_without_log_z",
        "acceptance_rate",
        "step_size",
        "diverging",
    }
    assert data["observed_data"]["x"].dims == ("data",)
    assert float(arviz.rhat(data)["theta"]) < 1.6  # of 50 draws: 1.2 in one run of 30
    with pytest.raises(ValueError, match="the log Z of site 'x' is not known"):
        mcmc.to_arviz(log_likelihood=True)


def test_lp_without_log_z_is_what_it_says():
    mcmc = run(ExchangeKernel(precision), DATA, chains=2, samples=5, warmup=5)
    theta = mcmc.get_samples(group_by_chain=True)["theta"]
    want = dist.Gamma(2.0, 1.0).log_prob(theta) + theta.log()  # the Jacobian of exp
    want = want - theta * DATA.square().sum() / 2
    torch.testing.assert_close(mcmc.get_extra_fields(group_by_chain=True)["lp_without_log_z"], want)


def test_same_seed_same_draws_and_pickling():
    kernel = ExchangeKernel(scaled, num_inner_steps=2, inner_kernel=LangevinKernel(full_mass=True))
    settings = {"chains": 3, "samples": 5, "warmup": 20}
    want = draws_of(kernel, "theta", DATA, **settings)
    used = pickle.loads(pickle.dumps(kernel))
    for again in (kernel, used, kernel.copy()):
        assert torch.equal(draws_of(again, "theta", DATA, **settings), want)
    assert not torch.equal(draws_of(kernel, "theta", DATA, seed=1, **settings), want)
    assert used.num_inner_steps == 2
    inner = "inner_kernel=LangevinKernel(full_mass=True)"
    assert repr(used.copy()) == f"ExchangeKernel(scaled, num_inner_steps=2, {inner})"


def test_float64():
    torch.set_default_dtype(torch.float64)
    kernel = ExchangeKernel(scaled, num_inner_steps=3)
    mcmc = run(kernel, DATA.double(), chains=3, samples=5, warmup=25)
    assert mcmc.get_samples()["theta"].dtype == torch.float64
    assert mcmc.get_extra_fields()["lp_without_log_z"].dtype == torch.float64
    assert mcmc.kernel.auxiliaries["x"].adaptation.step_size.dtype == torch.float64


def test_a_model_that_reads_its_latent_runs_chain_by_chain():
    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        number = theta.item()
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", Precision(torch.tensor(number)), obs=DATA)

    with pytest.warns(UserWarning, match="cannot be vectorized over chains"):
        mcmc = run(ExchangeKernel(model, **ALIKE), chains=2, samples=220, warmup=20)
    assert_moments(
        mcmc.get_samples(group_by_chain=True)["theta"].double(), CONJUGATE.mean, CONJUGATE.variance
    )


class Stubborn(Precision):
    """Draws that cannot be vectorized."""

    def exact_sample(self, sample_shape=()):
        assert self.theta.item() > 0
        return super().exact_sample(sample_shape)


def test_draws_that_cannot_be_vectorized_are_made_one_by_one():
    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", Stubborn(theta), obs=DATA)

    with pytest.warns(UserWarning, match="auxiliary draws cannot be vectorized"):
        mcmc = run(ExchangeKernel(model, **ALIKE), chains=2, samples=220, warmup=20)
    assert_moments(
        mcmc.get_samples(group_by_chain=True)["theta"].double(), CONJUGATE.mean, CONJUGATE.variance
    )


def test_a_proposal_without_density_is_a_divergence_and_never_drawn_from():
    def model():
        theta = pyro.sample("theta", dist.Normal(torch.tensor(1.0), 1.0))
        p = BoltzmannMachine(theta.sqrt(), edges=SMALL)  # NaN below 0, and no table to draw from
        pyro.sample("x", p, obs=torch.ones(9))

    for chains in (1, 20):
        kernel = ExchangeKernel(model, proposal=RandomWalk(2.0), adapt_step_size=False)
        mcmc = run(kernel, chains=chains, samples=50, warmup=0)
        assert (mcmc.get_samples()["theta"] > 0).all()
        assert mcmc.get_extra_fields()["diverging"].any()


def test_a_network_as_the_energy_with_a_latent_temperature():
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def model(x):
        beta = pyro.sample("beta", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        pyro.module("net", net)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: beta * net(x).squeeze(-1).square(), base=base)
            pyro.sample("x", p, obs=x)

    kernel = ExchangeKernel(model, num_inner_steps=5)
    mcmc = run(kernel, torch.randn(6, 2), chains=4, samples=10, warmup=10)
    assert mcmc.get_samples()["beta"].shape == (40,)
    assert net.training


# -- what does not cancel --------------------------------------------------------------------------


def positive(name="z"):
    return pyro.sample(name, dist.Gamma(torch.tensor(2.0), 1.0))


def energy_at(z, **kwargs):
    return UnnormalizedEnergy(lambda x: z * x**2, **kwargs)


def scaled_site():
    with poutine.scale(scale=0.5):
        pyro.sample("x", energy_at(positive()), obs=DATA)


def moving_bound():
    z = positive()
    pyro.sample("x", energy_at(z, support=constraints.interval(-9.0, 9 + z)), obs=DATA)


def moving_bound_that_is_read():
    z = positive()
    support = constraints.interval(-9.0, 9 + z.item())
    pyro.sample("x", energy_at(z, support=support), obs=DATA)


def moving_mask():
    z = positive()
    with poutine.mask(mask=z > 1):
        pyro.sample("x", energy_at(z), obs=DATA)


def moving_presence():
    z = positive()
    if z > 1:
        pyro.sample("x", energy_at(z), obs=DATA)


def moving_rows():
    z = positive()
    with pyro.plate("data", 1 + int(z)):
        pyro.sample("x", energy_at(z), obs=torch.zeros(1 + int(z)))


def discrete_latent():
    z = positive()
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("x", energy_at(z + k), obs=DATA)


def mixture_of_energies():
    parts = energy_at(torch.stack([positive(), torch.ones(())]), batch_shape=(2,))
    p = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    pyro.sample("x", p, obs=torch.tensor(1.0))


def half_line_that_is_shifted():
    z = positive()
    p = energy_at(z, support=constraints.positive)
    shift = [torch.distributions.AffineTransform(-z, 1.0)]
    pyro.sample("x", dist.TransformedDistribution(p, shift), obs=DATA.abs())


REFUSED = {
    scaled_site: "scaled by 0.5.*power of Z does not cancel",
    moving_bound: "its support depends on 'z'.*fixed support",
    moving_bound_that_is_read: "its support depends on 'z', read by",
    moving_mask: "its scale or mask depends on 'z'.*how many factors",
    moving_presence: "for some values of 'z' only.*how many factors",
    moving_rows: "its .* depends on 'z'.*how many factors",
    discrete_latent: "not 'k': give log_normalizer=",
    mixture_of_energies: "MixtureSameFamily is the share.*unnormalized_weights=True",
    half_line_that_is_shifted: "its support depends on 'z'.*outside the support",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_refused(model):
    with pytest.raises(NormalizerError, match=f"site 'x'.*{REFUSED[model]}"):
        run(ExchangeKernel(model), chains=2)


def test_the_ways_of_other_kernels_stay_closed():
    for kernel in (LangevinKernel(precision), MHKernel(precision), NUTS(precision)):
        with pytest.raises(NormalizerError, match="ExchangeKernel, which needs no log Z"):
            run(kernel, DATA, chains=1)


def nothing_moves():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", UnnormalizedEnergy(torch.square), obs=DATA - m)


def test_a_model_without_a_moving_z():
    with pytest.raises(ValueError, match=r"there is nothing to exchange.*LangevinKernel"):
        run(ExchangeKernel(nothing_moves), chains=2)


def test_subsampling():
    def model():
        z = positive()
        with pyro.plate("data", 8, subsample_size=4) as i:
            pyro.sample("x", energy_at(z), obs=DATA[i])

    with pytest.raises(NotImplementedError, match="subsamples 4 of 8"):
        run(ExchangeKernel(model), chains=2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_inner_steps": 0}, "at least 1, got 0.*prior"),
        ({"num_inner_steps": 2.5}, "must be an integer of at least 1, got 2.5"),
        ({"num_inner_steps": True}, "must be an integer of at least 1, got True"),
        ({"inner_kernel": "langevin"}, "such as LangevinKernel"),
        ({"inner_kernel": LangevinKernel(precision)}, "without a model"),
        ({"inner_kernel": CompositeKernel()}, "one plain kernel"),
        ({"inner_kernel": ExchangeKernel()}, "one plain kernel"),
        ({"target_accept_prob": 2.0}, "target_accept_prob"),
        ({"proposal": 3}, "proposal must be"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_bad_arguments(settings, match):
    with pytest.raises(ValueError, match=match):
        ExchangeKernel(precision, **settings)


def test_an_inner_kernel_that_moves_no_site():
    with pytest.raises(ValueError, match=r"moves discrete sites, and \['x'\] are not"):
        run(ExchangeKernel(precision, inner_kernel=GibbsKernel()), DATA, chains=2)


def test_a_kernel_without_a_model():
    with pytest.raises(ValueError, match=r"ExchangeKernel\(model\)"):
        ExchangeKernel().setup(0)


def test_no_part_of_other_kernels():
    composite = CompositeKernel(hidden_ising, [ExchangeKernel(), GibbsKernel()])
    for kernel in (
        TemperingKernel(ExchangeKernel(precision), [1.0, 0.5]),
        TemperingKernel(composite, [1.0, 0.5]),
    ):
        args = (DATA,) if kernel.kernel is not composite else (torch.zeros(9),)
        with pytest.raises(ValueError, match="a part of"):
            run(kernel, *args, chains=2)
    with pytest.raises(ValueError, match="make neither a part"):
        UnnormalizedEnergy(torch.square, kernel=ExchangeKernel(precision)).sample()
    with pytest.raises(ValueError, match="one ExchangeKernel"):
        CompositeKernel(precision, [ExchangeKernel(), ExchangeKernel()])
    with pytest.raises(ValueError, match="nothing to exchange"):
        run(CompositeKernel(nothing_moves, [ExchangeKernel(), LangevinKernel()]), chains=2)


def test_a_composite_needs_a_kernel_for_the_other_latents():
    def model():
        z, _ = positive(), pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", energy_at(z), obs=DATA)

    with pytest.raises(ValueError, match=r"continuous sites \['m'\].*LangevinKernel"):
        run(CompositeKernel(model, [ExchangeKernel()]), chains=2)
    with pytest.raises(NormalizerError):
        run(CompositeKernel(model, [LangevinKernel()]), chains=2)


def test_spins_are_drawn_as_spins():
    def model():
        z = positive()
        p = UnnormalizedEnergy(lambda s: -z * s.prod(-1), event_shape=(3,), support=spin)
        pyro.sample("x", p, obs=torch.ones(3))

    potential = ExchangePotential(model, num_inner_steps=2)
    potential(torch.zeros(2, 1))  # from here on all chains at once
    potential.bind_auxiliaries(0)
    y = potential.draw(torch.full((2000, 1), -8.0)).points["x"]  # z = 0.0003: all are alike
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    assert_mean(y.double().reshape(20, 100, 3), 0.0)
