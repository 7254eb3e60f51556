"""Data on the boundary of their support: an error with a way out from every loss, and wherever
chains start at points that a user gives."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide.initialization import init_to_value

from pyro_ebm import estimate_log_normalizer
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import ContrastiveDivergence, ScoreMatching, SlicedScoreMatching
from pyro_ebm.mcmc import MCMC, LangevinKernel

UNIT = constraints.unit_interval
PIXELS = torch.bernoulli(torch.full((500,), 0.8), generator=torch.Generator().manual_seed(0))


def fitted(x, loss, support, steps=1, lr=0.05):
    """The slope a of E(x) = a sum x, by some steps of a loss."""
    event = x.shape[1:]

    def model(x):
        a = pyro.param("a", torch.tensor(0.0))
        energy = (lambda x: a * x) if not event else lambda x: a * x.flatten(-len(event)).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(energy, event, support), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": lr}), loss)
    for _ in range(steps):
        svi.step(x)
    return pyro.param("a").item()


LOSSES = {
    "cd": ContrastiveDivergence,
    "score matching": ScoreMatching,
    "hutchinson": lambda: ScoreMatching("hutchinson"),
    "sliced": SlicedScoreMatching,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("support", "x"),
    [
        (UNIT, PIXELS),
        (UNIT, torch.tensor([0.3, 0.7, 1.0])),
        (UNIT, torch.cat([torch.rand(100), torch.zeros(10)])),
        (UNIT, torch.cat([torch.rand(50, 4), torch.zeros(50, 1)], 1)),
        (constraints.interval(1.0, 2.0), 1 + PIXELS),
        (constraints.interval(-1.0, 1.0), 2 * PIXELS - 1),
        (constraints.half_open_interval(0.0, 1.0), torch.tensor([0.0, 0.5, 0.0])),
        (constraints.nonnegative, PIXELS),
        (constraints.greater_than_eq(3.0), 3 + PIXELS),
    ],
)
def test_every_loss_refuses_data_on_the_boundary(name, support, x):
    with pytest.raises(ValueError, match=r"values of the data at site 'x' lie on the boundary"):
        fitted(x, LOSSES[name](), support)


def test_rows_of_joint_supports():
    x = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    with pytest.raises(ValueError, match=r"1 of 2 events of the data at site 'x' lie on"):
        fitted(x, ContrastiveDivergence(), constraints.simplex)


@pytest.mark.parametrize("margin", [1e-6, 1e-4, 1e-3])
def test_score_matching_refuses_clamped_data(margin):
    for support, x in [(UNIT, PIXELS.clamp(margin, 1 - margin)), (constraints.positive, None)]:
        x = dist.Exponential(1.0).sample((500,)).sub(0.5).clamp(margin) if x is None else x
        with pytest.raises(ValueError, match="or pile up beside it"):
            fitted(x, ScoreMatching(), support)


def test_data_away_from_the_boundary_and_a_few_rounded_pass():
    x = torch.rand(500)
    x[:3] = 1.0
    rounded = torch.randint(1, 100, (500,)) / 100.0
    for loss in LOSSES.values():
        fitted(x, loss(), UNIT)
        fitted(rounded, loss(), UNIT)
        fitted(dist.Gamma(1.0, 1.0).sample((500,)), loss(), constraints.positive)
        fitted(torch.zeros(500), loss(), constraints.real)


# The mean of e^{-a x} on (0, 1) is 0.8 at a = -4.80
WAYS = {
    "shrunk": (lambda x: 0.5 + 0.98 * (x - 0.5), lambda: ContrastiveDivergence(num_steps=10)),
    "persistent": (lambda x: x, lambda: ContrastiveDivergence(num_steps=10, persistent=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_ways_out_fit(way):
    move, loss = WAYS[way]
    a = fitted(move(PIXELS), loss(), UNIT, steps=120, lr=0.2)
    mean = 1 / (1 - torch.tensor(a).exp()) + 1 / a if a else 0.5  # of the density
    assert abs(float(mean) - float(move(PIXELS).mean())) < 0.05


def test_bits_have_a_support_of_their_own():
    with pytest.raises(ValueError, match=r"support=constraints\.boolean, with Contrast"):
        fitted(PIXELS, ScoreMatching(), UNIT)
    a = fitted(PIXELS, ContrastiveDivergence(num_steps=10), constraints.boolean, steps=60, lr=0.1)
    assert abs(1 / (1 + torch.tensor(a).exp()) - PIXELS.mean()) < 0.08


@pytest.mark.parametrize("method", ["bridge", "reverse_ais", "ais"])
def test_samples_of_estimates(method):
    p = UnnormalizedEnergy(lambda x: x, support=UNIT)
    samples = torch.cat([torch.rand(100), torch.zeros(1), torch.ones(4)])
    with pytest.raises(ValueError, match="5 of 105 values of the samples lie on the boundary"):
        estimate_log_normalizer(p, method, samples=samples, disable_progbar=True)


def test_draws_of_a_proposal():
    p = UnnormalizedEnergy(lambda x: x, base=dist.Beta(0.05, 0.05))
    with pytest.raises(ValueError, match="of the draws of Beta lie on the boundary"):
        estimate_log_normalizer(p, "ais", num_chains=500, disable_progbar=True)


@pytest.mark.parametrize("fn", [dist.Beta(1.0, 1.0), dist.Gamma(2.0, 1.0), dist.Uniform(1.0, 2.0)])
def test_starts_of_chains(fn):
    end = {"Uniform": 2.0}.get(type(fn).__name__, 0.0)
    start = init_to_value(values={"p": torch.tensor(end)})
    kernel = LangevinKernel(lambda: pyro.sample("p", fn), init_strategy=start)
    pyro.enable_validation(False)
    mcmc = MCMC(kernel, 10, 10, num_chains=2, disable_progbar=True)
    with pytest.raises(ValueError, match=r"\['p'\] start on the boundary of the support"):
        mcmc.run()
