"""The path from a prior or a guide to a model: what it integrates to, and what it refuses."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

from pyro_ebm import UnnormalizedEnergy, log_evidence
from pyro_ebm.evidence.model_path import ModelPath
from pyro_ebm.mcmc import CompositeKernel, GibbsKernel, LangevinKernel, NormalizerError
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.normalizer.annealing.annealer import Annealer
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule
from tests.statistics import SIGMAS

Y = torch.tensor([0.3, -1.2, 2.4, 0.8, 1.9])


def precision(y):
    """Gamma precisions in a plate: p(y) is a product of Student's t densities."""
    with pyro.plate("data", len(y)):
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.5))
        pyro.sample("y", dist.Normal(0.0, tau.rsqrt()), obs=y)


def mixture(y):
    """Each datum of one of two kinds, whose share is a latent."""
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)


TRUTH_PRECISION = float(dist.StudentT(4.0, 0.0, 0.75**0.5).log_prob(Y).sum())
U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
LIKELIHOOD = U[:, None] * dist.Normal(2.0, 1.0).log_prob(Y).exp()
LIKELIHOOD = LIKELIHOOD + (1 - U[:, None]) * dist.Normal(0.0, 1.0).log_prob(Y).exp()
TRUTH_MIXTURE = float((dist.Beta(2.0, 3.0).log_prob(U).exp() * LIKELIHOOD.prod(-1)).mean().log())


def annealed(path: ModelPath, kernel: Kernel, num_chains: int = 500) -> tuple[float, float]:
    """Log evidence by annealed importance sampling, and its error."""
    kernel.bind(path, warmup_steps=0)
    betas = torch.linspace(0.0, 1.0, 20).square().tolist()
    annealer = Annealer(path, kernel, TemperatureSchedule([], betas))
    log_w = annealer.run(path.at(0.0).draw(num_chains)).double() + path.log_normalizer
    w = (log_w - log_w.max()).exp()
    value = float(w.mean().log() + log_w.max())
    return value, float(w.std() / w.mean() / num_chains**0.5)


def assert_near(found: tuple[float, float], truth: float, errors: float = 4.5) -> None:
    value, error = found
    assert error < 0.2
    assert abs(value - truth) < errors * error + 1e-4, (value, error, truth)


def test_from_the_prior_of_constrained_sites_in_a_plate():
    path = ModelPath.of_model(precision, (Y,))
    assert_near(annealed(path, LangevinKernel()), TRUTH_PRECISION)


def test_the_parts_are_the_prior_and_the_joint_density():
    path = ModelPath.of_model(precision, (Y,))
    z = torch.randn(3, 5)
    prior = -(dist.Gamma(2.0, 1.5).log_prob(z.exp()) + z).sum(-1)
    joint = prior - dist.Normal(0.0, (-z / 2).exp()).log_prob(Y).sum(-1)
    for beta in (0.0, 0.3, 1.0):
        torch.testing.assert_close(path.at(beta)(z), (1 - beta) * prior + beta * joint)


def test_discrete_sites_are_summed_out_or_moved():
    path = ModelPath.of_model(mixture, (Y,), max_plate_nesting=1)
    assert path.names == ["share"]
    assert_near(annealed(path, LangevinKernel()), TRUTH_MIXTURE)
    path = ModelPath.of_model(mixture, (Y,), keep_discrete=True)
    assert sorted(path.names) == ["k", "share"]
    kernel = CompositeKernel(kernels=[GibbsKernel(), LangevinKernel()])
    assert_near(annealed(path, kernel), TRUTH_MIXTURE)


def by_hand(y):
    with pyro.plate("data", len(y)):
        pyro.sample("tau", dist.LogNormal(0.2, 1.0))


def auto_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["tau"]), init_scale=0.8))
    return guide


GUIDES = {
    "by hand": lambda: by_hand,
    "normal": lambda: AutoNormal(precision, init_scale=0.8),
    "diagonal": lambda: AutoDiagonalNormal(precision, init_scale=0.8),
    "full": lambda: AutoMultivariateNormal(precision, init_scale=0.8),
    "list": lambda: auto_list(precision),
}


@pytest.mark.parametrize("name", GUIDES)
def test_from_a_guide(name):
    path = ModelPath.of_model(precision, (Y,), guide=GUIDES[name]())
    assert_near(annealed(path, LangevinKernel()), TRUTH_PRECISION)


def test_a_guide_of_several_sites_in_another_order():
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        b = pyro.sample("b", dist.Dirichlet(torch.ones(3)))
        c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(c.sum() + b[0], a), obs=torch.tensor(1.0))

    guide = AutoMultivariateNormal(model, init_scale=0.5)
    path = ModelPath.of_model(model, guide=guide)
    z = path.draw(200)
    # the density of the guide in the coordinates of its own Gaussian
    posterior = guide.get_posterior()
    torch.testing.assert_close(path.at(0.0)(z), -posterior.log_prob(z), rtol=1e-4, atol=1e-3)


def test_masked_latents_that_nothing_depends_on_count_for_nothing():
    mask = torch.tensor([True, False, True])

    def model(y):
        with pyro.plate("data", 3), pyro.poutine.mask(mask=mask):  # pyright: ignore[reportArgumentType]
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = torch.tensor([1.0, 0.0, -2.0])
    truth = float(dist.Normal(0.0, 2**0.5).log_prob(y)[mask].sum())
    assert_near(annealed(ModelPath.of_model(model, (y,)), LangevinKernel()), truth)
    guide = AutoNormal(model, init_scale=0.9)
    assert_near(annealed(ModelPath.of_model(model, (y,), guide=guide), LangevinKernel()), truth)


def test_an_energy_with_a_known_normalizer_is_a_density():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        p = UnnormalizedEnergy(
            lambda y: (y - x).square() / 2, log_normalizer=0.9189385, constant_normalizer=True
        )
        pyro.sample("y", p, obs=y)

    y = torch.tensor(1.5)
    truth = float(dist.Normal(0.0, 2**0.5).log_prob(y))
    assert_near(annealed(ModelPath.of_model(model, (y,)), LangevinKernel()), truth)


def test_a_model_without_latents_is_its_likelihood():
    def model(y):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    path = ModelPath.of_model(model, (torch.tensor(1.0),))
    z = path.draw(2)
    torch.testing.assert_close(path.at(1.0)(z), torch.full((2,), 1.4189385))
    torch.testing.assert_close(path.at(0.0)(z), torch.zeros(2))


class Composite(dist.Normal):
    is_composite = True


def refused(draw, observe: Any = dist.Normal):
    def model():
        x = draw()
        pyro.sample("y", observe(x, 1.0), obs=torch.tensor(1.0))

    return model


def scaled():
    with poutine.scale(scale=2.0):
        return pyro.sample("x", dist.Normal(0.0, 1.0))


def energy(**settings):
    return lambda: pyro.sample("x", UnnormalizedEnergy(lambda x: x.square() / 2, **settings))


def normal():
    return pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            refused(lambda: pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))),
            ValueError,
            "site 'x' has an improper prior",
        ),
        (
            refused(lambda: pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))),
            ValueError,
            "site 'x' has an improper prior",
        ),
        (refused(scaled), ValueError, "the prior of site 'x' is scaled"),
        (refused(energy()), NormalizerError, "site 'x' is an energy whose log Z is unknown"),
        (
            refused(energy(log_normalizer=0.9189)),
            ValueError,
            "site 'x' of the prior is an energy whose draws are the ends of short chains",
        ),
        (
            refused(
                normal,
                lambda x, _: UnnormalizedEnergy(lambda y: (y - x) ** 2, constant_normalizer=True),
            ),
            NormalizerError,
            "site 'y' is an energy whose log Z is unknown",
        ),
        (refused(normal, Composite), NormalizerError, "site 'y' is a composite likelihood"),
    ],
)
def test_what_has_no_evidence_is_refused(model, error, words):
    with pytest.raises(error, match=words):
        ModelPath.of_model(model)


def test_an_improper_prior_that_is_allowed_starts_at_a_guide():
    model = refused(lambda: pyro.sample("x", dist.Normal(0.0, 1.0).mask(False)))
    path = ModelPath.of_model(model, guide=lambda: normal(), improper=["x"])
    assert_near(annealed(path, LangevinKernel()), 0.0)  # int N(1; x, 1) dx


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (AutoDelta, "Delta"),
        (AutoStructured, "functions of"),
        (lambda model: lambda y: None, "must draw the latents"),
        (lambda model: 3, "guide"),
    ],
)
def test_guides_without_a_density_are_refused(guide, words):
    with pytest.raises(ValueError, match=words):
        ModelPath.of_model(precision, (Y,), guide=guide(precision))


def test_an_energy_starts_at_its_base():
    pyro.set_rng_seed(0)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    prior = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, base=normal)  # N(0, 1 / 2)
    y, steep = torch.tensor([[0.5, -1.0], [1.5, 0.3], [0.0, 0.0]]), prior.normalized(-math.log(2.0))

    def model(p):
        with pyro.plate("rows", 3):
            x = pyro.sample("x", p)
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    truth = dist.Normal(0.0, math.sqrt(1.5)).log_prob(y).sum()
    few = {"method": "ais", "num_chains": 300}, {"method": "smc", "num_particles": 300}
    for method in few:
        got = log_evidence(model, steep, **method, disable_progbar=True)
        assert (got.value - truth).abs() < SIGMAS * got.std_error
    with pytest.raises(NormalizerError, match=r"same posterior: log_evidence\(model, .*draws=mcmc"):
        log_evidence(model, prior)
