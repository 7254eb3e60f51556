"""The posteriors of :mod:`tests.benchmarks.models`, line by line, as NumPyro models."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist


def schools(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def logistic(x, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with numpyro.plate("patient", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def gaussian(scale_tril):
    zero = jnp.zeros(len(scale_tril))
    numpyro.sample("x", dist.MultivariateNormal(zero, scale_tril=scale_tril))


def correlations(x):
    d = x.shape[-1]
    tau = numpyro.sample("tau", dist.HalfNormal(jnp.full(d, 2.0)).to_event(1))
    root = numpyro.sample("root", dist.LKJCholesky(d, 2.0))
    scale_tril = tau[..., None] * root
    with numpyro.plate("point", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(d), scale_tril=scale_tril), obs=x)


def groups(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    with numpyro.plate("group", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, 1.0), obs=y)


MODELS = {f.__name__: f for f in (schools, logistic, gaussian, correlations, groups)}
