"""Tempered particles: shares of modes, evidence with an honest error, and runs that go on."""

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_ebm import ConvergenceWarning, UnnormalizedEnergy
from pyro_ebm.distributions import BoltzmannMachine
from pyro_ebm.evidence.smc import sampler
from pyro_ebm.evidence.smc.particles import of_ancestors, systematic
from pyro_ebm.evidence.smc.sampler import SMC
from pyro_ebm.files import CheckpointError
from pyro_ebm.mcmc import CompositeKernel, GibbsKernel, LangevinKernel, MHKernel, TemperingKernel
from pyro_ebm.mcmc.kernels.gradient_free.proposals import RandomWalk
from tests.ranks import Ranks

ERRORS = 4.5


def tempered(model, *args, num_particles=500, **settings: Any) -> SMC:
    smc = SMC(model, num_particles=num_particles, disable_progbar=True, **settings)
    smc.run(*args)
    return smc


def assert_evidence(smc: SMC, truth: float, most: float = 0.3) -> None:
    found = smc.log_evidence
    assert float(found.std_error) < most
    assert abs(float(found) - truth) < ERRORS * float(found.std_error) + 1e-4, (found, truth)


def linear(d: int, n: int, scale: float = 1.0):
    """A linear Gaussian model and its exact log evidence, posterior mean and covariance."""
    generator = torch.Generator().manual_seed(d)
    a = torch.randn(n, d, generator=generator)
    y = a @ torch.randn(d, generator=generator) + scale * torch.randn(n, generator=generator)

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(d), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a @ x, scale).to_event(1), obs=y)

    wide = a.double()
    marginal = wide @ wide.T + scale**2 * torch.eye(n).double()
    p = torch.distributions.MultivariateNormal(torch.zeros(n).double(), marginal)
    covariance = torch.linalg.inv(torch.eye(d).double() + wide.T @ wide / scale**2)
    return model, y, float(p.log_prob(y.double())), covariance @ wide.T @ y.double() / scale**2


def double_well(x):
    a, b = x[..., 0::2], x[..., 1::2]
    return (a**4 - 6 * a**2 - a / 2 + b**2 / 2).sum(-1)


def test_forty_modes_have_their_shares():
    locs = 40 * (2 * torch.rand(40, 2) - 1)
    shares = dist.Dirichlet(torch.full((40,), 3.0)).sample()
    parts = dist.Normal(locs, torch.ones(2)).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(shares), parts)
    p = UnnormalizedEnergy(lambda x: 2.0 - mixture.log_prob(x), event_shape=(2,))
    smc = tempered(p, num_particles=2000, guide=dist.Normal(torch.zeros(2), 30.0).to_event(1))
    assert_evidence(smc, -2.0)
    nearest = torch.cdist(smc.get_samples()["x"], locs).argmin(-1)
    found = torch.bincount(nearest, minlength=40) / 2000
    # Pearson's chi square of as many independent draws as there are ancestors, in effect
    square = float(smc.log_evidence.ess) * float(((found - shares).square() / shares).sum())
    assert square < dist.Chi2(39.0).rsample((10_000,)).quantile(0.9999)


def test_a_linear_model_has_its_evidence_and_posterior():
    model, y, truth, mean = linear(d=5, n=20)
    smc = tempered(model, y, num_particles=1000)
    assert_evidence(smc, truth)
    x = smc.get_samples()["x"].double()
    error = x.std(0) / float(smc.log_evidence.ess) ** 0.5
    assert ((x.mean(0) - mean).abs() < ERRORS * error).all()


def test_discrete_latents_are_moved_by_a_discrete_kernel():
    y = torch.tensor([0.3, -1.2, 2.4])

    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)

    u = (torch.arange(100_000).double() + 0.5) / 100_000
    high, low = (dist.Normal(m, 1.0).log_prob(y).exp() for m in (2.0, 0.0))
    likelihood = (u[:, None] * high + (1 - u[:, None]) * low).prod(-1)
    truth = float((dist.Beta(2.0, 3.0).log_prob(u).exp() * likelihood).mean().log())
    kernel = CompositeKernel(kernels=[GibbsKernel(), LangevinKernel()])
    smc = tempered(model, y, kernel=kernel)
    assert_evidence(smc, truth)
    assert set(smc.get_samples()) == {"share", "k"}
    acceptance = [t.acceptance for t in smc.temperatures]
    assert 0.3 < sum(acceptance) / len(acceptance) < 0.9  # its step size was tuned


def test_a_discrete_energy_is_swept():
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    p = BoltzmannMachine(0.8, edges=edges)
    truth = float(p.exact_log_normalizer())
    assert_evidence(tempered(p), truth)


@pytest.mark.parametrize("kernel", [MHKernel(), LangevinKernel(full_mass=True)])
def test_other_kernels_move_too(kernel):
    model, y, truth, _ = linear(d=2, n=5)
    assert_evidence(tempered(model, y, kernel=kernel), truth)


def test_from_a_guide_there_are_fewer_temperatures():
    model, y, truth, mean = linear(d=3, n=40)

    def guide(y):
        pyro.sample("x", dist.Normal(mean.float(), 0.4).to_event(1))

    near, far = tempered(model, y, guide=guide), tempered(model, y)
    assert_evidence(near, truth)
    assert len(near.temperatures) < len(far.temperatures)
    assert_evidence(tempered(model, y, guide=AutoNormal(model, init_scale=1.0)), truth)


def test_a_model_without_latents_has_the_evidence_of_its_likelihood():
    smc = tempered(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))
    assert float(smc.log_evidence) == pytest.approx(-1.4189385, abs=1e-6)
    assert float(smc.log_evidence.std_error) < 1e-6


def test_the_error_is_that_of_families():
    # two ancestors of 4 particles each: E of a family is 4, its variance between families
    ancestors = torch.tensor([0, 0, 0, 1, 2, 3, 3, 3])
    log_v = of_ancestors(torch.zeros(8), ancestors)
    torch.testing.assert_close(log_v.exp(), torch.tensor([3.0, 1, 1, 3, 0, 0, 0, 0]))


def test_systematic_resampling_copies_each_as_often_as_its_weight_says():
    w = torch.rand(50, dtype=torch.float64)
    counts = torch.bincount(systematic(w.log(), 0.3), minlength=50)
    assert ((counts - 50 * w / w.sum()).abs() < 1).all()


def test_a_seed_gives_the_same_particles_again():
    model, y, _, _ = linear(d=2, n=5)
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        draws.append(tempered(model, y, num_particles=50).get_samples()["x"])
    assert torch.equal(*draws)


def quiet(*args, **settings: Any) -> SMC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return tempered(*args, **settings)


@pytest.mark.parametrize("kernel", [None, LangevinKernel(), "composite"])
def test_a_run_that_was_killed_goes_on_to_the_same_particles(tmp_path, monkeypatch, kernel):
    model, y, _, _ = linear(d=3, n=20)
    if kernel == "composite":
        kernel = CompositeKernel(kernels=[LangevinKernel()])
    pyro.set_rng_seed(1)
    settings: dict[str, Any] = {"kernel": kernel, "num_particles": 64}
    whole = quiet(model, y, checkpoint=tmp_path / "a", checkpoint_every=1, **settings)
    advance = sampler.TemperedRun.advance

    def dies(run):
        if len(run.temperatures) == 3:
            raise KeyboardInterrupt
        advance(run)

    settings |= {"checkpoint": tmp_path / "b", "checkpoint_every": 2}
    pyro.set_rng_seed(1)
    monkeypatch.setattr(sampler.TemperedRun, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, y, **settings)
    monkeypatch.setattr(sampler.TemperedRun, "advance", advance)
    pyro.set_rng_seed(7)
    smc = SMC(model, disable_progbar=True, check_convergence=False, **settings)
    smc.resume(y)
    assert torch.equal(smc.get_samples()["x"], whole.get_samples()["x"])
    assert float(smc.log_evidence) == float(whole.log_evidence)
    assert len(smc.temperatures) == len(whole.temperatures)
    smc.resume(y)  # a run that is finished gives its draws again
    assert torch.equal(smc.get_samples()["x"], whole.get_samples()["x"])
    with pytest.raises(CheckpointError, match="is there already"):
        smc.run(y)
    with pytest.raises(CheckpointError, match="argument"):
        smc.resume(y + 1)
    other = SMC(model, **{**settings, "num_particles": 65})
    with pytest.raises(CheckpointError, match="num_particles is 65, and was 64"):
        other.resume(y)


def test_what_is_resumed_must_be_there(tmp_path):
    with pytest.raises(RuntimeError, match="checkpoint="):
        SMC(normal).resume()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        SMC(normal, checkpoint=tmp_path / "c").resume()


def normal():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def test_few_ancestors_are_a_warning():
    model, y, _, _ = linear(d=10, n=40, scale=0.3)
    with pytest.warns(ConvergenceWarning, match=r"descend from .* draws of the start"):
        smc = tempered(model, y, num_particles=50)
    assert "ancestors" in [finding.kind for finding in smc.findings]
    assert tempered(model, y, num_particles=50, check_convergence=False).findings == []


def test_moves_that_are_not_accepted_are_a_warning():
    model, y, _, _ = linear(d=2, n=5)
    kernel = MHKernel(proposal=RandomWalk(1e3), adapt_step_size=False, adapt_mass_matrix=False)
    with pytest.warns(ConvergenceWarning, match="hardly any move is accepted"):
        tempered(model, y, kernel=kernel)


def test_moves_that_lead_nowhere_are_a_warning():
    model, y, _, _ = linear(d=2, n=5)
    kernel = MHKernel(proposal=RandomWalk(1e-3), adapt_step_size=False, adapt_mass_matrix=False)
    with pytest.warns(ConvergenceWarning, match="the particles hardly moved"):
        tempered(model, y, kernel=kernel, num_moves=2)


def test_an_improper_energy_does_not_end(monkeypatch):
    from pyro_ebm.evidence.smc import run

    monkeypatch.setattr(run, "MAX_TEMPERATURES", 3)
    p = UnnormalizedEnergy(lambda x: 1e4 * x.square())
    with pytest.raises(ValueError, match="may be improper, or the start too far"):
        tempered(p, guide=dist.Normal(0.0, 100.0), ess_drop=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_particles": 3}, "num_particles"),
        ({"num_moves": 0}, "num_moves"),
        ({"ess_drop": 1.0}, "ess_drop"),
        ({"kernel": LangevinKernel(normal)}, "without them"),
        ({"kernel": TemperingKernel(LangevinKernel(), [1.0, 0.5])}, "replicas"),
        ({"kernel": LangevinKernel(adjusted=False)}, "adjusted"),
        ({"guide": 3}, "guide"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
    ],
)
def test_arguments_out_of_range_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SMC(normal, **settings).run()


def test_the_energies_of_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch"):
        SMC(UnnormalizedEnergy(lambda x: x**2, batch_shape=(3,)))


def test_what_is_read_after_a_run(capsys):
    smc = SMC(normal, num_particles=200, disable_progbar=True)
    assert repr(smc) == "SMC(num_particles=200): not run yet"
    for read in (smc.get_samples, smc.summary, smc.to_arviz, lambda: smc.log_evidence):
        with pytest.raises(RuntimeError, match="call run first"):
            read()
    smc.run()
    assert smc.get_samples()["x"].shape == (200,)
    assert smc.get_samples(group_by_chain=True)["x"].shape == (1, 200)
    assert smc.get_samples(30)["x"].shape == (30,)
    ancestors = smc.get_extra_fields()["ancestor"]
    assert (ancestors.diff() >= 0).all()  # relatives are neighbours
    x = smc.get_samples()["x"]
    truth = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(smc.get_extra_fields()["lp"], truth)
    data = smc.to_arviz()
    assert data["posterior"]["x"].shape == (1, 200)
    assert "y" in data["observed_data"]
    assert smc.diagnostics()["temperatures"][-1]["beta"] == 1.0
    smc.summary()
    assert "log evidence" in capsys.readouterr().out


def of_ranks(y):
    model, _, truth, _ = linear(d=3, n=10)
    smc = tempered(model, y, num_particles=301, distributed=True)
    assert_evidence(smc, truth)
    return smc.get_samples()["x"], float(smc.log_evidence)


def test_ranks_share_the_particles_and_have_one_result():
    with Ranks(2) as ranks:
        (x, value), (other_x, other) = ranks(of_ranks, linear(d=3, n=10)[1])
    assert x.shape == (301, 3)
    assert torch.equal(x, other_x)
    assert value == other


# -- long ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    model, y, truth, _ = linear(d=5, n=20)
    found = [quiet(model, y, num_particles=300).log_evidence for _ in range(100)]
    inside = [abs(float(e) - truth) < 1.96 * float(e.std_error) for e in found]
    assert 90 <= sum(inside) <= 99


@pytest.mark.slow
def test_sixteen_double_wells():
    p = UnnormalizedEnergy(double_well, event_shape=(32,))
    start = dist.Normal(torch.zeros(32), 1.5).to_event(1)
    smc = tempered(p, num_particles=64_000, guide=start)
    assert_evidence(smc, 164.69568, most=0.06)
    right = (smc.get_samples()["x"][:, 0::2] > 0).double().mean()
    assert abs(right - 0.84431) < ERRORS * (0.84 * 0.16 / 16 / float(smc.log_evidence.ess)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("d", "n"), [(20, 40), (50, 60)])
def test_linear_models_of_many_dimensions(d, n):
    model, y, truth, _ = linear(d, n)
    assert_evidence(tempered(model, y, num_particles=4000), truth, most=0.4)


SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def eight_schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, SIGMA), obs=y)


def test_eight_schools():
    # y_j ~ N(mu, tau^2 + sigma_j^2), and mu is summed out too: one integral, over tau = 5 tan(a)
    a = (torch.arange(20_000).double() + 0.5) / 20_000 * math.pi / 2
    variance = (5 * a.tan()).square()[:, None] + SIGMA.double().square()
    precision = 1 / 25 + (1 / variance).sum(-1)
    linear_term = (SCHOOLS / variance).sum(-1)
    square = (SCHOOLS.double().square() / variance).sum(-1) - linear_term.square() / precision
    log_p = (
        -(square + variance.log().sum(-1) + (25 * precision).log() + 8 * math.log(2 * math.pi)) / 2
    )
    truth = float(log_p.logsumexp(0) - math.log(len(a)))
    assert_evidence(tempered(eight_schools, SCHOOLS, num_particles=1000), truth)


@pytest.mark.slow
def test_a_logistic_regression():
    x = torch.randn(60, 2)
    y = torch.bernoulli((x @ torch.tensor([1.0, -2.0]) + 0.5).sigmoid())

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b).to_event(1), obs=y)

    grid = torch.linspace(-12, 12, 161).double()
    points = torch.cartesian_prod(grid, grid, grid)
    prior = dist.Normal(0.0, 2.0).log_prob(points).sum(-1)
    log_p = torch.cat(
        [
            part_prior
            + dist.Bernoulli(logits=part[:, :2] @ x.double().T + part[:, 2:])
            .log_prob(y.double())
            .sum(-1)
            for part, part_prior in zip(points.split(100_000), prior.split(100_000), strict=True)
        ]
    )
    truth = float(log_p.logsumexp(0)) + 3 * math.log(float(grid[1] - grid[0]))
    assert_evidence(tempered(model, y, num_particles=2000), truth)
