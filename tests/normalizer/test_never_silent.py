"""Where an estimate must not be trusted, or not be used: an error or a warning."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ebm import (
    MCMC,
    ExchangeKernel,
    LangevinKernel,
    NormalizerError,
    UnnormalizedEnergy,
    estimate_log_normalizer,
    mean_log_likelihood,
)
from pyro_ebm.normalizer import UnreliableEstimateWarning

LOG_Z = math.log(2 * math.pi) / 2
DATA = 0.5 * torch.randn(30, generator=torch.Generator().manual_seed(0))


def bell(x):
    return x.square() / 2


def posterior(normalize):
    def model(x):
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        p = UnnormalizedEnergy(lambda x: tau * x.square() / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p.normalized(normalize(p)), obs=x)

    return model


made_inside = posterior(lambda p: estimate_log_normalizer(p, "quadrature"))
ONCE = estimate_log_normalizer(UnnormalizedEnergy(bell), "quadrature")
made_once = posterior(lambda p: ONCE)


@pytest.mark.parametrize("model", [made_inside, made_once])
def test_an_estimate_does_not_follow_a_latent(model):
    with pytest.raises(NormalizerError, match="'tau', and its log Z is an estimate, made once"):
        MCMC(LangevinKernel(model), 10, disable_progbar=True).run(DATA)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match="lacks the gradient of its log Z"):
        svi.step(DATA)


def test_the_exchange_kernel_takes_an_estimate_for_unknown():
    kernel = ExchangeKernel(made_once, num_inner_steps=20)
    mcmc = MCMC(kernel, 8, 30, num_chains=500, disable_progbar=True)
    mcmc.run(DATA[:10])
    # p(tau | x) = Gamma(2 + n / 2, 1 + sum x^2 / 2)
    truth = dist.Gamma(2 + 5, 1 + DATA[:10].square().sum() / 2)
    mean = mcmc.get_samples()["tau"].mean()
    assert (mean - truth.mean).abs() < truth.stddev / 5  # the naive posterior has its mean at .4


def test_an_energy_that_nothing_moves_may_use_its_estimate():
    p = UnnormalizedEnergy(bell).normalized(ONCE)
    assert p.is_normalized
    assert p.is_estimated
    assert not p.normalized(LOG_Z).is_estimated
    assert p.expand((3,)).unexpanded.is_estimated

    def model():
        return pyro.sample("x", p)

    MCMC(LangevinKernel(model), 5, disable_progbar=True).run()


@pytest.mark.parametrize(
    ("proposal", "part"),
    [
        (dist.Normal(0.0, 1.5).mask(False), "MaskedDistribution"),
        (dist.Delta(torch.tensor(0.0)), "Delta"),
        (dist.ImproperUniform(dist.constraints.real, (), ()), "ImproperUniform"),
    ],
)
def test_proposals_that_are_no_densities(proposal, part):
    with pytest.raises(ValueError, match=f"holds a {part}, whose log_prob is no density"):
        estimate_log_normalizer(UnnormalizedEnergy(bell), "importance", proposal=proposal)


@pytest.mark.filterwarnings(  # of its weights
    "ignore:reverse annealing:pyro_ebm.normalizer.estimate_result.UnreliableEstimateWarning"
)
def test_samples_that_repeat_themselves():
    with pytest.warns(UnreliableEstimateWarning, match="only 1 of 400 samples"):
        estimate_log_normalizer(
            UnnormalizedEnergy(bell), "reverse_ais", samples=torch.full((400,), 0.5)
        )


def test_few_weights_tell_no_error():
    with pytest.warns(UnreliableEstimateWarning, match="of 5"):
        estimate_log_normalizer(
            UnnormalizedEnergy(bell), "ais", num_chains=5, num_temperatures=2, disable_progbar=True
        )


def test_a_point_without_density_has_no_likelihood():
    p = UnnormalizedEnergy(lambda x: torch.where(x > 3, torch.inf, bell(x)))
    with pytest.raises(ValueError, match="0 or infinite at 1 of 3 of the data"):
        mean_log_likelihood(p, torch.tensor([0.0, 1.0, 4.0]), LOG_Z)
    with pytest.raises(ValueError, match=r"the estimate has shape \(3,\)"):
        mean_log_likelihood(UnnormalizedEnergy(bell), torch.zeros(4), torch.zeros(3))


def test_a_bridge_without_overlap_does_not_settle():
    p = UnnormalizedEnergy(lambda x: bell(x - 60.0))
    with pytest.raises(ValueError, match="hardly overlap"):
        estimate_log_normalizer(
            p, "bridge", samples=60 + torch.randn(500), proposal=dist.Normal(0.0, 1.0)
        )
