"""The real posteriors, as a user of Pyro writes them.

A flat prior is a distribution with the right support that is masked: its density does not count,
and chains start from its draws.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def flat_regression(x: Tensor, y: Tensor) -> None:
    flat = dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1).mask(False)
    beta = pyro.sample("beta", flat)
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore_momiq(x: Tensor, y: Tensor) -> None:
    flat = dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1).mask(False)
    beta = pyro.sample("beta", flat)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def blr(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def arma11(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    expected = [mu + phi * mu]
    for t in range(1, len(y)):
        error = y[t - 1] - expected[-1]
        expected.append(mu + phi * y[t - 1] + theta * error)
    pyro.sample("y", dist.Normal(torch.stack(expected, -1), sigma).to_event(1), obs=y)


def gp_pois_regr(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    covariance = alpha**2 * torch.exp(-(((x[:, None] - x) / rho) ** 2) / 2)
    scale_tril = torch.linalg.cholesky(covariance + 1e-10 * torch.eye(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Poisson(torch.exp(scale_tril @ f_tilde)), obs=k)


def hmm_example(y: Tensor) -> None:
    # two rows of transition probabilities, and means 0 < mu_1 < mu_2 by the first and the gap
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    first = pyro.sample("mu_1", dist.HalfNormal(1.0).mask(False))
    gap = pyro.sample("gap", dist.HalfNormal(1.0).mask(False))
    mu = torch.stack([first, first + gap], -1)
    pyro.sample("mu", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).to_event(1), obs=mu)
    # the forward algorithm sums the states out
    emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    alpha = emission[0]
    for t in range(1, len(y)):
        alpha = torch.logsumexp(alpha[:, None] + theta.log(), 0) + emission[t]
    pyro.factor("y", torch.logsumexp(alpha, 0))


def stochastic_volatility(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    walk = pyro.sample("walk", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    log_variance = mu + sigma * walk.cumsum(-1)
    with pyro.plate("day", len(y)):
        pyro.sample("y", dist.Normal(0.0, torch.exp(log_variance / 2)), obs=y)
