"""Our kernels and Pyro's NUTS draw from the same posteriors of real data.

NUTS takes minutes, so what it says is kept in ``nuts.json``, with its Monte Carlo errors: means and
mean squared deviations from them. The slow test runs NUTS again, from another seed, and compares;
``python -m tests.mcmc.test_posteriors`` writes the file anew.
"""

import json
import pathlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_breast_cancer

from pyro_ebm import MCMC, LangevinKernel, MHKernel
from pyro_ebm.mcmc import NUTS
from tests.statistics import assert_equal_means, standard_error

KEPT = pathlib.Path(__file__).with_name("nuts.json")
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        standard = pyro.sample("standard", dist.Normal(0.0, 1.0))
        pyro.sample("effects", dist.Normal(mu + tau * standard, ERRORS), obs=EFFECTS)


X, Y = (torch.as_tensor(a, dtype=torch.float32) for a in load_breast_cancer(return_X_y=True))
X = (X - X.mean(0)) / X.std(0)


def breast_cancer():
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([30]).to_event(1))
    pyro.sample("malignant", dist.Bernoulli(logits=intercept + X @ slopes).to_event(1), obs=Y)


MODELS = {"eight schools": eight_schools, "breast cancer": breast_cancer}


def draw(kernel, num_samples, warmup_steps, num_chains=1):
    """Draws ``(chains, draws, dim)`` of all sites, the scale on the log scale (it has tails)."""
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run()
    parts = []
    for name, x in sorted(mcmc.get_samples(group_by_chain=True).items()):
        x = x.log() if name == "tau" else x
        parts.append(x.reshape(*x.shape[:2], -1))
    return torch.cat(parts, -1).double()


def moments(x, center=None):
    """Means and squared deviations from a center, with their errors: 2 x 2 x dim."""
    center = x.mean((0, 1)) if center is None else center
    both = (x, (x - center).square())
    return torch.stack([torch.stack([m.mean((0, 1)), standard_error(m)]) for m in both])


def kept(name):
    return torch.tensor(json.loads(KEPT.read_text())[name], dtype=torch.float64)


def nuts(model, num_samples, seed):
    pyro.set_rng_seed(seed)
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    return draw(kernel, num_samples, 500)


def assert_same_posterior(name, x):
    want = kept(name)
    got = moments(x, center=want[0, 0])
    for (mean, error), (want_mean, want_error) in zip(got, want, strict=True):
        assert_equal_means(mean, error, want_mean, want_error)


@pytest.mark.parametrize("make", [LangevinKernel, MHKernel])
def test_eight_schools(make):
    x = draw(make(eight_schools, full_mass=True), 150, 250, num_chains=200)
    assert_same_posterior("eight schools", x)


def test_breast_cancer():
    x = draw(LangevinKernel(breast_cancer, full_mass=True), 300, 300, num_chains=64)
    assert_same_posterior("breast cancer", x)


@pytest.mark.slow
@pytest.mark.parametrize("make", [LangevinKernel, MHKernel])
def test_breast_cancer_at_length(make):
    x = draw(make(breast_cancer), 3000, 1500, num_chains=100)
    assert_same_posterior("breast cancer", x)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_of_nuts_is_what_nuts_says(name):
    assert_same_posterior(name, nuts(MODELS[name], 1500, seed=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: moments(nuts(model, 3000, seed=0)).tolist() for name, model in MODELS.items()}
    KEPT.write_text(json.dumps(found) + "\n")
