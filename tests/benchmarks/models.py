"""The posteriors, as Pyro models; :mod:`tests.benchmarks.jax_models` writes the same in NumPyro.

- ``schools``: eight schools (Rubin 1981), non-centred, 10 unconstrained dimensions.
- ``logistic``: regression on scikit-learn's breast cancer data, 30 standardized features and an
  intercept, 31 dimensions, strongly correlated.
- ``gaussian``: 100 dimensions, standard deviations from 0.1 to 3 along axes that are turned at
  random, so that no diagonal mass matrix helps; its means are known to be 0.
- ``correlations``: scales and an LKJ correlation matrix of 4 variables, 200 points: 10 dimensions.
- ``groups``: a hierarchy of 998 groups, one observation each: 1,000 dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

Arrays = tuple[np.ndarray, ...]


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def schools_data() -> Arrays:
    sigma = np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32)
    return sigma, np.array([28, 8, -3, 7, -1, 1, 18, 12], np.float32)


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("patient", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def logistic_data() -> Arrays:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return np.c_[np.ones(len(x)), x].astype(np.float32), y.astype(np.float32)


def gaussian(scale_tril: Tensor) -> None:
    pyro.sample(
        "x", dist.MultivariateNormal(scale_tril.new_zeros(len(scale_tril)), scale_tril=scale_tril)
    )


def gaussian_data() -> Arrays:
    generator = np.random.default_rng(0)
    turn, _ = np.linalg.qr(generator.standard_normal((100, 100)))
    variance = np.geomspace(0.1, 3.0, 100) ** 2
    return (np.linalg.cholesky((turn * variance) @ turn.T).astype(np.float32),)


def correlations(x: Tensor) -> None:
    d = x.shape[-1]
    tau = pyro.sample("tau", dist.HalfNormal(x.new_full((d,), 2.0)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(d, x.new_tensor(2.0)))
    scale_tril = tau[..., None] * root
    with pyro.plate("point", len(x)):
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(d), scale_tril=scale_tril), obs=x)


def correlations_data() -> Arrays:
    generator = np.random.default_rng(1)
    mix = np.array([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.5, 0.7, 0], [0.2, 0.9, 0.3, 0.2]])
    x = generator.standard_normal((200, 4)) @ mix.T * [0.5, 1.0, 2.0, 1.5]
    return (x.astype(np.float32),)


def groups(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("group", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, 1.0), obs=y)


def groups_data() -> Arrays:
    generator = np.random.default_rng(2)
    effects = 1.0 + 0.7 * generator.standard_normal(998)
    return ((effects + generator.standard_normal(998)).astype(np.float32),)


@dataclass(frozen=True)
class Posterior:
    """A model, its data, and what a sensible user would set for it."""

    name: str
    title: str
    model: Callable[..., None]
    data: Callable[[], Arrays]
    dense: bool
    """Whether a dense mass matrix pays; every sampler that has one gets it."""
    mean: float | None = None
    """Of all quantities, where it is known."""

    def tensors(self, device: str = "cpu") -> tuple[Tensor, ...]:
        """The data for torch."""
        return tuple(torch.as_tensor(x, device=device) for x in self.data())


POSTERIORS = {
    p.name: p
    for p in (
        Posterior("schools", "Eight schools, 10-d", schools, schools_data, False),
        Posterior("logistic", "Logistic regression, 31-d", logistic, logistic_data, True),
        Posterior("gaussian", "Correlated Gaussian, 100-d", gaussian, gaussian_data, True, 0.0),
        Posterior("correlations", "LKJ correlations, 10-d", correlations, correlations_data, False),
        Posterior("groups", "Hierarchy of groups, 1,000-d", groups, groups_data, False),
    )
}
