"""The real posteriors of :mod:`.pyro_models`, line by line, as a user of NumPyro writes them.

Loops are ``lax.scan``, and flat priors ``ImproperUniform``.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from tests.benchmarks.jax_models import groups, schools


def flat_regression(x, y):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), (x.shape[-1],)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore_momiq(x, y):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), (x.shape[-1],)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def blr(x, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[-1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def arma11(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def step(expected, last):
        expected = mu + phi * last + theta * (last - expected)
        return expected, expected

    first = mu + phi * mu
    _, others = jax.lax.scan(step, first, y[:-1])
    expected = jnp.concatenate([first[None], others])
    # a draw of the prior, by which NumPyro traces the model, may overflow
    numpyro.sample("y", dist.Normal(expected, sigma, validate_args=False).to_event(1), obs=y)


def gp_pois_regr(x, k):
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    covariance = alpha**2 * jnp.exp(-(((x[:, None] - x) / rho) ** 2) / 2)
    scale_tril = jnp.linalg.cholesky(covariance + 1e-10 * jnp.eye(len(x)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("k", dist.Poisson(jnp.exp(scale_tril @ f_tilde)), obs=k)


def hmm_example(y):
    theta = numpyro.sample("theta", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    first = numpyro.sample("mu_1", dist.ImproperUniform(constraints.positive, (), ()))
    gap = numpyro.sample("gap", dist.ImproperUniform(constraints.positive, (), ()))
    mu = jnp.stack([first, first + gap])
    numpyro.sample("mu", dist.Normal(jnp.array([3.0, 10.0]), 1.0).to_event(1), obs=mu)
    emission = dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(alpha, emission):
        new = jax.scipy.special.logsumexp(alpha[:, None] + jnp.log(theta), 0) + emission
        return new, None

    alpha, _ = jax.lax.scan(step, emission[0], emission[1:])
    numpyro.factor("y", jax.scipy.special.logsumexp(alpha))


def stochastic_volatility(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    walk = numpyro.sample("walk", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    log_variance = mu + sigma * walk.cumsum(-1)
    with numpyro.plate("day", len(y)):
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(log_variance / 2)), obs=y)


MODELS = {
    f.__name__: f
    for f in (
        *(flat_regression, kidscore_momiq, blr, diamonds, arma11, gp_pois_regr, hmm_example),
        *(stochastic_volatility, groups, schools),
    )
}
