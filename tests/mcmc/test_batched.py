"""Functions of one chain that vmap refuses, mapped over chains."""

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.ops import special
from torch.func import grad, vmap

from pyro_ebm import MCMC, LangevinKernel
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.batched import Batched, refuse_slow
from pyro_ebm.ops.score import value_and_grad

W = torch.linspace(-1.0, 2.0, 5)
MASK = W > 0

# -- functions ---------------------------------------------------------------------------------


def written_elements(x):
    y = torch.zeros(3)
    y[0] = x[0]
    y.view(-1)[1] = x[1]
    y[2:] += x[2:]
    return (y * x).sum()


def written_data(x):
    y = W * 2
    y[MASK] = x[0]
    return y.sum()


def written_matrix(x):
    matrix = torch.eye(2)
    matrix[0, 1] = matrix[1, 0] = x[0].tanh() / 2
    return torch.linalg.cholesky(matrix).sum()


def written_triangle(x):
    triangle = torch.zeros(2, 2)
    rows, columns = torch.tril_indices(2, 2)
    triangle[rows, columns] = x
    return triangle.det()


def written_rows(x):
    y = torch.empty(2, 3)
    for i in range(2):
        y[i].copy_(i * x)
    return y.square().sum()


def written_by_methods(x):
    y = torch.zeros(3).index_put_((torch.tensor([0]),), x[:1])
    y.scatter_add_(0, torch.tensor([1]), x[:1])
    y.data.add_(1.0)
    return (y * x.clone().clamp_(min=-0.5)).sum()


def masked_elements(x):
    y = x.clone()
    y[y > 0] = 0
    return y.square().sum()


def masked_places(x):
    y = torch.zeros(1, 3)
    y[..., x > 0] = 1.0
    return (y * x).sum()


def chosen_elements(x):
    return x[x > 0].sum() + x.masked_select(x < 0).square().sum() + x[torch.nonzero(x > 0.5)].sum()


def branch(x):
    if x[0] > 0 and not (x[1] > 1).any():
        return x.sum()
    return x.square().sum()


def count(x):
    n = int((x > 0).sum())
    return W[:n].sum() * x[0] + W[: (x > 0.5).sum()].sum()


def listed(x):
    return [x.sum(), x.prod(), x.cos().sum(), x.sin().sum()][(x > 0).long().sum()]


def checked(x):
    if not x.isfinite().all():
        raise ValueError(f"not finite: {x[0]}")
    assert torch.equal(x.sign().abs(), torch.ones(3)), f"{x}"
    return x.square().sum()


def slow(x):
    near = torch.isclose(x, torch.tensor([0.0, 1.0, 2.0]), atol=0.5)
    gamma = torch.mvlgamma(x.exp() + 2, 3)
    return torch.where(near, x, x.square()).sum() + gamma.sum()


def with_transforms(x):
    inner = vmap(grad(lambda a: (a * x.sum()).sin()))(W).sum()
    return inner + grad(lambda a: (a * x).sum() if x[0] > 0 else (a * x).square().sum())(x[1])


FUNCTIONS = [
    written_elements,
    written_data,
    written_matrix,
    written_triangle,
    written_rows,
    written_by_methods,
    masked_elements,
    masked_places,
    chosen_elements,
    branch,
    count,
    listed,
    checked,
    slow,
    with_transforms,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("chains", [1, 7])
def test_values_and_gradients_are_those_of_each_chain(function, chains):
    x = torch.randn(chains, 3, dtype=torch.float64)
    before = W.clone()
    torch.set_default_dtype(torch.float64)
    batched = Batched(function)
    for _ in range(2):
        found = value_and_grad(batched, x)
        want = value_and_grad(lambda x: torch.stack([function(row.clone()) for row in x]), x)
        torch.testing.assert_close(found, want)
    assert torch.equal(W, before)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_it_is_for_functions_that_vmap_refuses(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, UserWarning, IndexError)):
            vmap(function)(torch.randn(7, 3))


def test_parts_are_as_large_as_they_can_be():
    sizes = []

    def function(x):
        value = x.square() if x > 0 else -x
        sizes.append(1)
        return value

    Batched(function)(torch.linspace(-1.0, 1.0, 100))
    assert len(sizes) == 2  # evaluations that came to their end


def test_real_numbers_and_random_ones_are_refused():
    with pytest.raises(RuntimeError, match="another one in each chain"):
        Batched(lambda x: x * x.item())(torch.randn(4))
    with pytest.raises(RuntimeError, match="random"):
        Batched(lambda x: x + torch.randn(()))(torch.randn(4))
    assert Batched(lambda x: x * x.item())(torch.ones(4)).tolist() == [1.0] * 4  # all the same


def test_data_of_the_user_stays_as_it_is():
    data = torch.zeros(3)

    def function(x):
        data[0] = x[0]
        return data.sum()

    with pytest.raises(RuntimeError, match="vmap"):
        Batched(function)(torch.randn(4, 3))
    assert torch.equal(data, torch.zeros(3))


def test_trees_of_tensors():
    def function(pair):
        x, k = pair["x"], pair["k"]
        return x * int(k), {"k": k + 1}

    x, k = torch.randn(5), torch.tensor([2, 1, 2, 0, 1])
    value, more = Batched(function)({"x": x, "k": k})
    assert torch.equal(value, x * k)
    assert torch.equal(more["k"], k + 1)


def test_the_safe_logarithm_is_the_one_of_pyro():
    Batched(torch.square)(torch.ones(2))
    x = torch.tensor([0.0, 0.5, 3.0], requires_grad=True)
    found, want = special.safe_log(x), x.log()
    assert torch.equal(found, want)
    (slope,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(slope.detach(), 1 / x.detach().clamp(min=eps))
    (curvature,) = torch.autograd.grad(slope[1:].sum(), x)
    torch.testing.assert_close(curvature[1:], -1 / x.detach()[1:].square())


# -- distributions -----------------------------------------------------------------------------


def real(name, *shape) -> Any:
    return pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))


def simplex(name, n):
    return real(name, n).softmax(-1)


def gaussian_hmm():
    return dist.GaussianHMM(
        dist.Normal(real("a", 2), 1.0).to_event(1),
        real("b", 2, 2),
        dist.Normal(torch.zeros(2), real("c", 2).exp()).to_event(1),
        real("d", 2, 2),
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        duration=4,
    )


def covariance(n):
    root = real("root", n, n)
    return root @ root.T + torch.eye(n)


NAN = math.nan
LIKELIHOODS = {
    "CoalescentTimesWithRate": lambda: (
        dist.CoalescentTimesWithRate(torch.tensor([0.0, 0, 0, 1]), real("a", 4).exp()),
        torch.tensor([-0.9, -0.6, -0.1]),
    ),
    "DirichletMultinomial": lambda: (
        dist.DirichletMultinomial(real("a", 3).exp(), 10, is_sparse=True),
        torch.tensor([3.0, 7.0, 0.0]),
    ),
    "DiscreteHMM": lambda: (
        dist.DiscreteHMM(
            simplex("a", 2).log(), real("b", 2, 2).log_softmax(-1), dist.Normal(real("c", 2), 1.0)
        ),
        torch.tensor([0.3, 0.5, 0.2, 0.1]),
    ),
    "GaussianHMM": lambda: (gaussian_hmm(), W[:4, None] * torch.ones(2)),
    "GeneralizedPareto": lambda: (
        vars(dist)["GeneralizedPareto"](torch.tensor(0.0), real("a").exp(), real("b").exp()),
        torch.tensor([0.3, 0.5]),
    ),
    "Multinomial": lambda: (
        dist.Multinomial(10, simplex("a", 3)),
        torch.tensor([3.0, 7.0, 0.0]),
    ),
    "NanMaskedMultivariateNormal": lambda: (
        dist.NanMaskedMultivariateNormal(real("a", 3), covariance(3)),
        torch.tensor([[0.1, 0.5, 1.0], [0.1, NAN, 1.0], [NAN, NAN, NAN]]),
    ),
    "NanMaskedNormal": lambda: (
        dist.NanMaskedNormal(real("a", 3), real("b", 3).exp()),
        torch.tensor([0.1, NAN, 1.0]),
    ),
    "OneOneMatching": lambda: (
        dist.OneOneMatching(real("a", 3, 3), bp_iters=5),
        torch.tensor([0, 2, 1]),
    ),
    "OneTwoMatching": lambda: (
        dist.OneTwoMatching(real("a", 4, 2), bp_iters=5),
        torch.tensor([0, 0, 1, 1]),
    ),
    "OrderedLogistic": lambda: (
        dist.OrderedLogistic(real("a"), real("b", 3).exp().cumsum(-1)),
        torch.tensor([0, 2, 1]),
    ),
    "Poisson": lambda: (
        dist.Poisson(real("a").exp(), is_sparse=True),
        torch.tensor([3.0, 0.0]),
    ),
    "SineBivariateVonMises": lambda: (
        dist.SineBivariateVonMises(
            real("a"), real("b"), real("c").exp(), real("d").exp(), real("e").sigmoid()
        ),
        torch.tensor([0.3, -0.5]),
    ),
    "SineSkewed": lambda: (
        dist.SineSkewed(
            dist.VonMises(real("a", 2), real("b", 2).exp()).to_event(1), 0.2 * simplex("c", 2)
        ),
        torch.tensor([0.3, -0.5]),
    ),
    "Stable": lambda: (
        dist.Stable(1 + real("a").sigmoid(), simplex("b", 2)[0], real("c").exp(), real("d")),
        torch.tensor([0.3, -0.5]),
    ),
    "Wishart": lambda: (dist.Wishart(4 + real("a").exp(), covariance(2)), torch.eye(2)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_chains_of_every_likelihood_are_evaluated_at_once(name):
    def model():
        fn, y = LIKELIHOODS[name]()
        pyro.sample("y", fn, obs=y)

    pyro.enable_validation(False)
    torch.set_default_dtype(torch.float64)
    potential = ModelPotential(model)
    z = potential.initial(9)
    found = potential.value_and_grad(z)  # a warning would be an error
    assert potential.way in ("vmap", "rewritten")
    with potential.evaluating():
        want = value_and_grad(potential.chains.one_by_one, z)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@config_enumerate
def markov_chain():
    """Two layers of sums, in a plate, over time."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    means = real("means", 2)
    with pyro.plate("data", 3):
        k = torch.zeros(3, dtype=torch.long)
        for t in pyro.markov(range(4)):
            k = pyro.sample(f"k{t}", dist.Categorical(transition[k]))
            pyro.sample(f"y{t}", dist.Normal(means[k], 1.0), obs=W[:3] + t)


@config_enumerate
def one_bit_for_all():
    k = pyro.sample("k", dist.Bernoulli(real("logit").sigmoid()))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(k * real("mean"), 1.0), obs=W)


@pytest.mark.parametrize("model", [markov_chain, one_bit_for_all])
def test_sums_over_discrete_latents_are_made_at_once(model):
    torch.set_default_dtype(torch.float64)
    potential = ModelPotential(model, max_plate_nesting=1)
    z = potential.initial(6)
    found = potential.value_and_grad(z)
    assert potential.way in ("vmap", "rewritten")
    with potential.evaluating():
        want = value_and_grad(potential.chains.one_by_one, z)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", ["Multinomial", "OrderedLogistic", "DiscreteHMM"])
def test_a_graph_holds_what_was_replaced(name):
    def model():
        fn, y = LIKELIHOODS[name]()
        pyro.sample("y", fn, obs=y)

    draws = []
    for jit_compile in (False, "capture"):
        pyro.set_rng_seed(0)
        kernel = LangevinKernel(model, jit_compile=jit_compile)
        mcmc = MCMC(kernel, 15, 5, num_chains=4, disable_progbar=True)
        mcmc.run()  # a warning would be an error
        draws.append(mcmc.get_samples())
    for site, value in draws[0].items():
        torch.testing.assert_close(draws[1][site], value, rtol=1e-3, atol=1e-3)


def test_what_can_be_mapped_as_it_is_is_not_touched():
    potential = ModelPotential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    potential(torch.ones(3, 1))
    assert potential.way == "vmap"


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN])
def test_recurrent_networks(kind):
    net = kind(2, 3, num_layers=2, batch_first=True, bidirectional=True)
    z = torch.randn(4, 1, 5, 2)
    with refuse_slow():
        value, slope = value_and_grad(Batched(lambda x: net(x)[0].square().sum()), z)
    for i in range(4):
        want, grads = value_and_grad(lambda x: net(x)[0].square().sum((1, 2)), z[i])
        torch.testing.assert_close(value[i : i + 1], want)
        torch.testing.assert_close(slope[i], grads)
