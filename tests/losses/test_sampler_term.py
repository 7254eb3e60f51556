"""What improved contrastive divergence adds: the gradient of the sampler, and augmentation."""

import math

import pyro
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import ContrastiveDivergence
from pyro_ebm.losses.contrastive.sampler_term import log_distances
from pyro_ebm.mcmc import LangevinKernel, MHKernel
from tests.statistics import assert_mean_of_rows

PRECISION, VARIANCE, STEP = 1.5, 2.0, 0.2  # of the model, of the data; of Langevin's kernel
ULA = LangevinKernel(adjusted=False, step_size=STEP)


def no_guide(*args):
    pass


def model_of(dim, **kwargs):
    def model(x):
        lam = pyro.param("lam", torch.tensor(PRECISION).double())
        p = UnnormalizedEnergy(lambda x: lam * x.square().sum(-1) / 2, (dim,), **kwargs)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    return model


def slope(loss, model, *args):
    if "lam" in pyro.get_param_store():
        pyro.param("lam").grad = None
    loss.loss_and_grads(model, no_guide, *args)
    return pyro.param("lam").grad.clone()


def normals(*shape, variance=VARIANCE):
    return math.sqrt(variance) * torch.randn(*shape).double()


# -- the gradient, of a Gaussian in closed form --------------------------------------------------


def divergence(variance, precision):
    """KL(N(0, variance) || N(0, 1 / precision))."""
    product = torch.as_tensor(variance * precision)
    return (product - 1 - product.log()) / 2


def after_a_step(precision, temperature=1.0):
    """The variance of x - eps lam x + sqrt(2 eps T) xi."""
    return (1 - STEP * precision) ** 2 * VARIANCE + 2 * STEP * temperature


def derivative(function):
    lam = torch.tensor(PRECISION).double().requires_grad_()
    return torch.autograd.grad(function(lam), lam)[0]


def slopes(dim, rows=200, groups=30, temperature=1.0, **settings):
    """Gradients of one step from data N(0, v), each the mean of so many rows and dimensions."""
    kernel = LangevinKernel(adjusted=False, step_size=STEP, temperature=temperature)
    found = []
    for _ in range(groups):
        loss, x = ContrastiveDivergence(kernel, **settings), normals(rows, dim)
        if settings.get("persistent"):
            loss.chains["x"] = normals(2 * rows, dim)
        found.append(slope(loss, model_of(dim), x) / (rows * dim))
    return torch.stack(found)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dim", [2, 5])  # in one dimension the entropy's gradient has heavy tails
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_sampler_is_drawn_to_the_model(weight, dim, persistent):
    contrast = (VARIANCE - after_a_step(PRECISION)) / 2
    sampler = derivative(lambda lam: divergence(after_a_step(lam), PRECISION))
    assert abs(sampler) > 0.1
    found = slopes(dim, kl_weight=weight, persistent=persistent)
    assert_mean_of_rows(found, contrast + weight * sampler)


def test_a_weight_of_minus_one_is_hinton_s_objective():
    objective = derivative(
        lambda lam: divergence(VARIANCE, lam) - divergence(after_a_step(lam), lam)
    )
    assert_mean_of_rows(slopes(2, kl_weight=-1.0), objective)


def test_a_temperature_is_that_of_the_step():
    contrast = (VARIANCE - after_a_step(PRECISION, 0.2)) / 2
    # from the density that the chains leave invariant, of the precision lam / T
    sampler = derivative(lambda lam: divergence(after_a_step(lam, 0.2), PRECISION / 0.2))
    found = slopes(2, kl_weight=1.0, temperature=0.2)
    assert_mean_of_rows(found, contrast + sampler)


def test_the_base_counts():
    # the tilt of N(0, 1 / 0.7) by a precision of 0.8 is the Gaussian above, with its gradient
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2).double(), 0.7**-0.5), 1
    )
    found = []
    for _ in range(60):
        x = normals(400, 2)

        def model(x):
            lam = pyro.param("lam", torch.tensor(PRECISION - 0.7).double())
            p = UnnormalizedEnergy(lambda x: lam * x.square().sum(-1) / 2, base=base)
            with pyro.plate("data", len(x)):
                pyro.sample("x", p, obs=x)

        found.append(slope(ContrastiveDivergence(ULA, kl_weight=1.0), model, x) / x.numel())
    contrast = (VARIANCE - after_a_step(PRECISION)) / 2
    sampler = derivative(lambda lam: divergence(after_a_step(lam), PRECISION))
    assert_mean_of_rows(torch.stack(found), contrast + sampler)


@pytest.mark.parametrize("dim", [1, 3])
def test_distances_estimate_the_entropy(dim):
    # Kozachenko and Leonenko: H = psi(n) - psi(3) + log(volume of the ball) + d mean log rho
    n, volume = 500, math.pi ** (dim / 2) / math.gamma(dim / 2 + 1)
    constant = float(torch.digamma(torch.tensor(float(n))) - torch.digamma(torch.tensor(3.0)))
    constant += math.log(volume)
    found = torch.stack([constant + dim * log_distances(normals(n, dim)).mean() for _ in range(40)])
    want = dim / 2 * math.log(2 * math.pi * math.e * VARIANCE)
    assert abs(found.mean() - want) < 4.5 * found.std() / 40**0.5 + 0.02 * dim  # its bias


def test_the_third_neighbour_is_found_beyond_a_block():
    x = torch.randn(1500, 2)
    want = torch.cdist(x.double(), x.double()).sort(dim=1).values[:, 3].log()
    torch.testing.assert_close(log_distances(x), want.float(), rtol=1e-4, atol=1e-4)


def test_a_single_chain_has_no_neighbour():
    x = normals(1, 2)
    grads = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        grads.append(slope(ContrastiveDivergence(ULA, kl_weight=weight), model_of(2), x))
    assert torch.equal(*grads)


def test_rows_masked_out_are_no_neighbours():
    x, mask = normals(30, 2), torch.arange(30) < 20
    grads = []
    for spoil in (0.0, 1e6):
        torch.manual_seed(0)
        y = torch.where(mask[:, None], x, x + spoil)
        loss = ContrastiveDivergence(ULA, kl_weight=1.0)
        grads.append(slope(loss, pyro.poutine.mask(model_of(2), mask=mask), y))
    assert torch.equal(*grads)


def test_where_there_is_no_such_step():
    for kernel, support in ((MHKernel(), constraints.real), (None, constraints.positive)):
        loss, model = ContrastiveDivergence(kernel, kl_weight=1.0), model_of(2, support=support)
        with pytest.raises(ValueError, match="kl_weight at site 'x' differentiates a Langevin"):
            slope(loss, model, normals(6, 2).abs())


def test_rows_of_different_densities():
    def model(x, c):
        lam = pyro.param("lam", torch.tensor(PRECISION).double())
        p = UnnormalizedEnergy(lambda x: lam * (x - c).square().sum(-1) / 2, (2,))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    with pytest.raises(ValueError, match=r"'x' is conditional.*kl_weight takes the entropy"):
        slope(ContrastiveDivergence(kl_weight=1.0), model, normals(6, 2), normals(6, 2))


# -- augmentation --------------------------------------------------------------------------------


def test_chains_that_go_on_are_augmented():
    still = LangevinKernel(adjusted=False, step_size=1e-10)
    loss = ContrastiveDivergence(
        still, persistent=True, num_chains=5, augmentation=lambda x: x.add_(3.0)
    )
    slope(loss, model_of(2), normals(4, 2))
    first = loss.chains["x"].clone()  # new chains are where they started
    assert (first.abs() <= 2.1).all()
    loss.loss(model_of(2), no_guide, normals(4, 2))
    assert torch.equal(loss.chains["x"], first)  # an evaluation leaves them
    slope(loss, model_of(2), normals(4, 2))
    torch.testing.assert_close(loss.chains["x"], first + 3, rtol=0, atol=1e-3)
    assert "augmentation=<function" in repr(loss)


@pytest.mark.parametrize("wrong", [lambda x: x[:2], lambda x: x / 0, lambda x: -x, lambda x: None])
def test_an_augmentation_leaves_shape_and_support(wrong):
    loss = ContrastiveDivergence(persistent=True, augmentation=wrong)
    model = model_of(2, support=constraints.positive)
    slope(loss, model, normals(4, 2).abs())
    with pytest.raises(ValueError, match="augmentation turned the chains of site 'x'"):
        slope(loss, model, normals(4, 2).abs())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kl_weight": math.nan}, "kl_weight must be finite"),
        ({"kl_weight": "1"}, "kl_weight must be a number"),
        ({"augmentation": torch.neg}, "give persistent=True"),
        ({"augmentation": 0.1, "persistent": True}, "augmentation must be"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDivergence(**kwargs)
