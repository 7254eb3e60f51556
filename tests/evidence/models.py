"""Models whose evidence is known, and exact draws of their posteriors."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy

SIGMAS = 4.5

DRUG = torch.tensor([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
OTHER = torch.tensor([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP = DRUG - OTHER
"""Student's ten patients: extra hours of sleep by one drug, less those by another."""


def jeffreys(how):
    """``p(sigma^2) = 1 / sigma^2``, in the three ways that a user may write it."""
    if how == "energy":
        return pyro.sample("sigma2", UnnormalizedEnergy(torch.log, support=constraints.positive))
    if how == "flat":
        sigma2 = pyro.sample("sigma2", dist.ImproperUniform(constraints.positive, (), ()))
    else:
        sigma2 = pyro.sample("sigma2", dist.LogNormal(0.0, 1.0).mask(False))
    pyro.factor("jeffreys", -sigma2.log())
    return sigma2


def no_effect(y, how="flat"):
    sigma2 = jeffreys(how)
    with pyro.plate("patients", len(y)):
        pyro.sample("y", dist.Normal(0.0, sigma2.sqrt()), obs=y)


def effect(y, how="flat"):
    sigma2 = jeffreys(how)
    size = pyro.sample("size", dist.Cauchy(0.0, math.sqrt(2) / 2))
    with pyro.plate("patients", len(y)):
        pyro.sample("y", dist.Normal(size * sigma2.sqrt(), sigma2.sqrt()), obs=y)


NO_EFFECT, EFFECT, BAYES_FACTOR = -20.809266, -17.960939, 17.25888


def linear(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


def linear_data(dim, num, seed=0):
    """Regressors, responses, the log evidence, and a function that draws from the posterior."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(num, dim, generator=generator)
    w = torch.randn(dim, generator=generator)
    y = X @ w + 0.5 * torch.randn(num, generator=generator)
    wide, eye = X.double(), torch.eye(num, dtype=torch.float64)
    zero = torch.zeros(num, dtype=torch.float64)
    truth = dist.MultivariateNormal(zero, wide @ wide.T + eye / 4).log_prob(y.double())
    precision = torch.eye(dim, dtype=torch.float64) + 4 * wide.T @ wide
    mean = torch.linalg.solve(precision, 4 * wide.T @ y.double())
    posterior = dist.MultivariateNormal(mean, precision_matrix=precision)
    return X, y, float(truth), lambda *shape: {"w": posterior.sample(shape).float()}


def assert_near(estimate, truth):
    """An estimate is the truth, up to 4.5 of its stated errors, which are small."""
    assert abs(float(estimate) - truth) < SIGMAS * float(estimate.std_error) + 2e-5 * abs(truth), (
        estimate,
        truth,
    )
    assert estimate.std_error < 0.3
