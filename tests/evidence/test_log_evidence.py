"""The log evidence of Pyro models, against closed forms."""

import math
import warnings

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_ebm import (
    MCMC,
    ChEESKernel,
    LangevinKernel,
    NormalizerError,
    UnnormalizedEnergy,
    compare_evidence,
    log_evidence,
)
from tests.evidence.models import (
    BAYES_FACTOR,
    EFFECT,
    NO_EFFECT,
    SIGMAS,
    SLEEP,
    assert_near,
    effect,
    linear,
    linear_data,
    no_effect,
)


def test_the_paired_t_test_of_the_sleep_data():
    results = {}
    for name, model, truth in (("null", no_effect, NO_EFFECT), ("effect", effect, EFFECT)):
        mcmc = MCMC(LangevinKernel(model), 400, 200, num_chains=20, disable_progbar=True)
        mcmc.run(SLEEP)
        results[name] = log_evidence(mcmc, shared_improper=["sigma2"])
        assert_near(results[name], truth)
        assert results[name].std_error < 0.01
    table = compare_evidence(results)
    gap = -table.log_bf["null"] - math.log(BAYES_FACTOR)
    assert abs(gap) < SIGMAS * table.dse["null"]


@pytest.mark.parametrize("how", ["flat", "masked", "energy"])
def test_ways_to_write_an_improper_prior(how):
    # without an effect, sigma^2 given the data is InverseGamma(n / 2, |y|^2 / 2)
    posterior = dist.InverseGamma(len(SLEEP) / 2, SLEEP.square().sum() / 2)
    draws = {"sigma2": posterior.sample((4, 500))}
    args = (no_effect, SLEEP, how)
    estimate = log_evidence(*args, draws=draws, shared_improper=["sigma2"])
    assert_near(estimate, NO_EFFECT)
    assert estimate.shared_improper == ("sigma2",)
    with pytest.raises(ValueError, match="site 'sigma2'"):  # by name, without the word
        log_evidence(*args, draws=draws)
    with pytest.raises(ValueError, match=r"sigma2.* improper"):  # there is no prior to start at
        log_evidence(*args, method="ais", shared_improper=["sigma2"])


def test_an_improper_prior_is_annealed_from_a_guide():
    def guide(y, how):
        pyro.sample("sigma2", dist.LogNormal(1.5, 1.0))

    estimate = log_evidence(
        *(no_effect, SLEEP, "flat"),
        method="ais",
        guide=guide,
        shared_improper=("sigma2",),
        num_chains=300,
    )
    assert_near(estimate, NO_EFFECT)


@pytest.mark.parametrize("dim", [1, 10, 50])
def test_linear_models_by_bridge(dim):
    X, y, truth, draw = linear_data(dim, 2 * dim)
    estimate = log_evidence(linear, X, y, draws=draw(4, 500))
    assert_near(estimate, truth)
    assert estimate.num_data == 2 * dim
    assert estimate.method == "bridge"


def test_both_directions_enclose_the_evidence():
    X, y, truth, draw = linear_data(2, 10)
    draws, given = draw(1, 300), {"num_chains": 300, "disable_progbar": True}
    both = log_evidence(linear, X, y, method="ais", draws=draws, exact_draws=True, **given)
    assert_near(both, truth)
    assert abs(both.upper - truth) < SIGMAS * both.upper_error
    assert "log evidence = " in repr(both)
    assert "upper bound" in repr(both)
    back = log_evidence(linear, X, y, method="reverse_ais", draws=draws, **given)
    assert_near(back, truth)
    assert back.lower is None


def test_a_guide_is_a_proposal_and_a_start():
    X, y, truth, draw = linear_data(2, 10)
    w = draw(2000)["w"]

    def guide(X, y):
        scale_tril = 1.2 * torch.linalg.cholesky(w.T.cov())
        pyro.sample("w", dist.MultivariateNormal(w.mean(0), scale_tril=scale_tril))

    for method in ("importance", "ais", "bridge"):
        given = {"draws": draw(4, 250)} if method == "bridge" else {}
        estimate = log_evidence(linear, X, y, method=method, guide=guide, **given)
        assert_near(estimate, truth)


def test_an_automatic_guide():
    X, y, truth, _ = linear_data(2, 10)
    guide = AutoMultivariateNormal(linear, init_scale=0.5)
    guide(X, y)
    assert_near(log_evidence(linear, X, y, method="ais", guide=guide, num_chains=200), truth)


def test_pyros_runner_and_arviz_data():
    X, y, truth, _ = linear_data(2, 10)
    mcmc = PyroMCMC(NUTS(linear), num_samples=200, warmup_steps=50, disable_progbar=True)
    mcmc.run(X, y)
    assert_near(log_evidence(mcmc), truth)
    data = arviz.from_dict(posterior={"w": mcmc.get_samples()["w"][None].numpy()})
    assert_near(log_evidence(linear, X, y, draws=data), truth)


def betas(y):
    with pyro.plate("coins", y.shape[-1]):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("y", dist.Binomial(10, p), obs=y)


def shares(y):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("y", dist.Multinomial(10, probs=p), obs=y)


def rates(y):
    with pyro.plate("counts", len(y)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        pyro.sample("y", dist.Poisson(rate), obs=y)


Y = torch.tensor([2.0, 5.0, 3.0])
CONJUGATE = {
    "Beta": (betas, {"p": dist.Beta(2 + Y, 13 - Y)}, dist.BetaBinomial(2.0, 3.0, 10)),
    "Dirichlet": (
        shares,
        {"p": dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]) + Y)},
        dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0]), 10),
    ),
    "Gamma": (rates, {"rate": dist.Gamma(2 + Y, 2.5)}, dist.GammaPoisson(2.0, 1.5)),
}


@pytest.mark.parametrize("name", CONJUGATE)
def test_constrained_sites_and_plates(name):
    model, posterior, evidence = CONJUGATE[name]
    draws = {site: p.sample((4, 500)) for site, p in posterior.items()}
    truth = float(evidence.log_prob(Y).sum())
    assert_near(log_evidence(model, Y, draws=draws), truth)
    prior = log_evidence(model, Y, method="importance", num_samples=1000)
    assert_near(prior, truth)


def kinds(y):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Normal(4 * k, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


TWO = torch.tensor(1.5)
PARTS = torch.stack([0.7 * dist.Normal(0.0, 2**0.5).log_prob(TWO).exp(),
                     0.3 * dist.Normal(4.0, 2**0.5).log_prob(TWO).exp()])  # fmt: skip


def draws_of_kinds():
    k = dist.Bernoulli(PARTS[1] / PARTS.sum()).sample((4, 500))
    return {"k": k, "x": dist.Normal((4 * k + TWO) / 2, 0.5**0.5).sample()}


def test_discrete_latents_sampled_or_summed_out():
    truth, draws = float(PARTS.sum().log()), draws_of_kinds()
    kept = log_evidence(kinds, TWO, draws=draws)
    summed = log_evidence(kinds, TWO, draws=draws, keep_discrete=False, max_plate_nesting=0)
    annealed = log_evidence(kinds, TWO, keep_discrete=True, num_chains=300, disable_progbar=True)
    for estimate in (kept, summed, annealed):
        assert_near(estimate, truth)
    for given in ({"keep_discrete": True}, {"keep_discrete": False, "max_plate_nesting": 0}):
        given |= {"num_particles": 500, "num_steps": 5, "disable_progbar": True}
        tempered = log_evidence(kinds, TWO, method="smc", **given)
        assert tempered.method == "smc"
        assert tempered.num_data == 1
        assert_near(tempered, truth)
    del draws["k"]  # a kernel that sums it out has no draws of it
    assert_near(log_evidence(kinds, TWO, draws=draws, max_plate_nesting=0), truth)


def test_a_model_without_anything_to_integrate_is_exact():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(4 * k, 2**0.5), obs=y)

    estimate = log_evidence(model, TWO, max_plate_nesting=0)
    assert (estimate.method, float(estimate.std_error)) == ("exact", 0.0)
    assert math.isclose(float(estimate), float(PARTS.sum().log()), rel_tol=1e-5)


def count(y):
    n = pyro.sample("n", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(n, 1.0), obs=y)


def test_whole_numbers_without_bounds():
    n = torch.arange(60.0)
    log_p = dist.Poisson(3.0).log_prob(n) + dist.Normal(n, 1.0).log_prob(TWO)
    for given in ({"method": "ais", "num_chains": 300}, {"method": "smc", "num_particles": 500}):
        estimate = log_evidence(count, TWO, keep_discrete=True, disable_progbar=True, **given)
        assert_near(estimate, float(log_p.logsumexp(0)))
    draws = {"n": dist.Categorical(logits=log_p).sample((4, 100))}
    with pytest.raises(ValueError, match="site 'n' holds whole numbers"):
        log_evidence(count, TWO, draws=draws)


def precision_of(log_normalizer):
    """An observed Gaussian written as an energy, with this log Z of its precision."""

    def model(y):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.5))
        log_z = log_normalizer(precision)
        energy = UnnormalizedEnergy(
            lambda x: precision * x**2 / 2, batch_shape=(), log_normalizer=log_z
        )
        pyro.sample("y", energy, obs=y)

    return model


def test_an_energy_counts_with_its_log_z():
    # precision ~ Gamma(2, 1.5): y is Student's with 4 degrees of freedom and scale sqrt(.75)
    model = precision_of(lambda precision: (2 * math.pi / precision).log() / 2)
    draws = {"precision": dist.Gamma(2.5, 1.5 + TWO**2 / 2).sample((4, 500))}
    truth = float(dist.StudentT(4.0, 0.0, 0.75**0.5).log_prob(TWO))
    assert_near(log_evidence(model, TWO, draws=draws), truth)
    with pytest.raises(NormalizerError, match="site 'y'"):
        log_evidence(precision_of(lambda precision: None), TWO, draws=draws)


def unknown(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    energy = UnnormalizedEnergy(lambda x: (x - mu) ** 2, constant_normalizer=True)
    pyro.sample("seen", energy, obs=y)


class Composite(dist.Normal):
    is_composite = True


def composite(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("seen", Composite(mu, 1.0), obs=y)


def flat(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("seen", dist.Normal(mu, 1.0), obs=y)


def scaled_prior(y):
    with poutine.scale(scale=0.5):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("seen", dist.Normal(mu, 1.0), obs=y)


def scaled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("seen", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (unknown, "'seen' is an energy whose log Z is unknown"),
        (composite, "'seen' is a composite likelihood"),
        (flat, "'mu' has an improper prior .ImproperUniform"),
        (scaled_prior, "prior of site 'mu' is scaled"),
        (scaled, "likelihood of site 'seen' is scaled by 0.5"),
    ],
)
def test_what_has_no_evidence_is_refused_by_name(model, message):
    draws = {"mu": torch.randn(4, 100)}
    for given in ({"draws": draws}, {"method": "ais"}, {"method": "importance"}):
        with pytest.raises(ValueError, match=message):
            log_evidence(model, TWO, **given)


def test_missing_elements_of_a_latent_count_for_nothing():
    y, seen = torch.tensor([0.5, 1.5, 0.0]), torch.tensor([True, True, False])

    def model(y):
        with pyro.plate("data", 3), poutine.mask(mask=seen):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    draws = {"x": dist.Normal(y / 2, 0.5**0.5).sample((4, 500))}
    truth = float(dist.Normal(0.0, 2**0.5).log_prob(y[:2]).sum())
    estimate = log_evidence(model, y, draws=draws)
    assert_near(estimate, truth)
    assert estimate.num_data == 2
    assert_near(log_evidence(model, y, num_chains=300, disable_progbar=True), truth)


def test_draws_that_are_not_of_this_model():
    X, y, _, draw = linear_data(2, 10)
    wanted = [
        ({"v": torch.zeros(4, 100, 2)}, "no draws of site.*'w'"),
        ({"w": torch.zeros(4, 100, 3)}, r"\(4, 100, 3\), and the model wants \(4, 100, 2\)"),
        ({"w": torch.zeros(4, 10, 2)}, "at least 16 draws"),
    ]
    for draws, message in wanted:
        with pytest.raises(ValueError, match=message):
            log_evidence(linear, X, y, draws=draws)
    with pytest.raises(TypeError, match="draws must be"):
        log_evidence(linear, X, y, draws=[1.0])
    with pytest.raises(ValueError, match="lie on the boundary"):
        log_evidence(rates, Y, draws={"rate": torch.zeros(4, 100, 3)})
    far = draw(4, 100)["w"] + torch.arange(4.0)[:, None, None] / 10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_evidence(linear, X, y, draws={"w": far})
    assert any("have not converged" in str(each.message) for each in caught)


def test_arguments_that_do_not_go_together():
    X, y, _, draw = linear_data(2, 10)
    mcmc = MCMC(ChEESKernel(linear), 20, 20, num_chains=2, disable_progbar=True)
    mcmc.check_convergence = False
    mcmc.run(X, y)
    wanted = [
        ((linear, X, y), {"method": "bridge"}, "needs draws"),
        ((linear, X, y), {"method": "reverse_ais"}, "needs draws"),
        ((linear, X, y), {"method": "ais", "exact_draws": True}, "exact_draws"),
        ((linear, X, y), {"draws": draw(4, 100), "betas": [0, 1]}, "does not take .'betas'"),
        ((linear, X, y), {"method": "smc", "betas": [0, 1]}, "does not take .'betas'"),
        ((mcmc,), {"method": "smc"}, "does not take .'draws'"),
        ((linear, X, y), {"method": "laplace"}, "method must be one of"),
        ((linear, X, y), {"method": "ais", "num_chains": 0}, "num_chains"),
        ((linear, X, y), {"shared_improper": "w"}, "shared_improper"),
        ((linear, X, y), {"shared_improper": ["v"]}, "shared_improper names .'v'"),
        ((mcmc, X), {}, "a run knows its arguments"),
        ((3,), {}, "model must be"),
    ]
    for args, given, message in wanted:
        with pytest.raises(ValueError, match=message):
            log_evidence(*args, **given)
