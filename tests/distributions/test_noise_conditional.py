"""Noise-conditional energies: the density of each level, and what is made of several."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import UnnormalizedEnergy, geometric_ladder, negation, noise_conditional, product
from pyro_ebm.distributions.core.linear import name_of
from pyro_ebm.nn import MLPEnergy

LADDER = geometric_ladder(4.0, 0.1, 8)


def gaussian(mean, variance, d=()):
    """The noised versions of N(mean, variance I)."""

    def energy(x, sigma):
        square = (x - mean).square()
        return (square if d == () else square.sum(-1)) / (variance + sigma**2) / 2

    return noise_conditional(energy, LADDER, event_shape=d)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MLPEnergy(3, hidden=(4,))

    def forward(self, x, sigma):
        return self.net(torch.cat([x, sigma[..., None]], -1))


def same(p, q, x):
    torch.testing.assert_close(p.unnormalized_log_prob(x), q.unnormalized_log_prob(x))


def normal(mean, variance):
    return UnnormalizedEnergy(lambda x: (x - mean).square() / variance / 2)


# -- levels --------------------------------------------------------------------------------------


def test_it_is_the_density_at_the_smallest_level():
    p, x = gaussian(1.0, 0.3), torch.randn(5)
    same(p, normal(1.0, 0.31), x)
    same(p.at(LADDER[-1]), normal(1.0, 0.31), x)
    same(p.at(2.0), normal(1.0, 4.3), x)
    torch.testing.assert_close(p.at(2.0).score(x), (1 - x) / 4.3)
    assert p.sigmas == LADDER
    assert LADDER[0] == 4.0
    assert not p.at(2.0).sigmas


def test_a_level_for_each_row():
    sigma, x = torch.tensor([0.5, 2.0, 1.0]), torch.randn(7, 3)
    p = gaussian(1.0, 0.3).expand((3,)).at(sigma)
    assert p.batch_shape == (3,)
    same(p, normal(1.0, 0.3 + sigma**2), x)
    assert gaussian(0.0, 1.0, (2,)).at(sigma).sample((4,)).shape == (4, 3, 2)


def test_bases_batches_and_gradients_in_sigma():
    base = dist.Normal(torch.zeros(3), 2.0)
    p = noise_conditional(lambda x, s: x**2 / (1 + s**2), LADDER, base=base)
    sigma = torch.tensor([[0.5], [2.0]], requires_grad=True)
    level = p.at(sigma)
    assert level.batch_shape == (2, 3)
    x = torch.randn(2, 3)
    want = base.log_prob(x) - x**2 / (1 + sigma**2)
    torch.testing.assert_close(level.unnormalized_log_prob(x), want)
    (grad,) = torch.autograd.grad(level.unnormalized_log_prob(x).sum(), sigma)
    assert grad.abs().min() > 0


def test_chains_start_as_wide_as_the_largest_level():
    x = gaussian(0.0, 1.0, (2,)).starting_points((4000,))
    assert x.shape == (4000, 2)
    assert (x.square().mean() / 16 - 1).abs() < 4.5 * (2 / 8000) ** 0.5
    base = dist.Normal(0.0, 0.01)
    assert (
        noise_conditional(lambda x, s: x, LADDER, base=base).starting_points((9,)).abs().max() < 1
    )


def test_networks_are_found_trained_and_copied():
    net = Net()
    p = noise_conditional(net, LADDER, event_shape=(2,))
    assert name_of(p) == "Net"
    assert net in p.modules
    for whole in (p, product(p, p), p.tempered(2.0), product(p.expand((3,)).to_event(1))):
        other, loaded = copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))
        x = torch.randn(5, *p.event_shape) if whole.event_shape == (2,) else torch.randn(5, 3, 2)
        same(other.at(0.7), whole.at(0.7), x)
        same(loaded.at(0.7), whole.at(0.7), x)
        before = other.at(0.7).energy(x)
        with torch.no_grad():
            net.net.layers[0].weight.mul_(1.1)
        torch.testing.assert_close(other.at(0.7).energy(x), before)  # has a network of its own
        assert (whole.at(0.7).energy(x) != before).any()


def test_dtypes_follow_the_points():
    p, x = gaussian(1.0, 0.3), torch.randn(5).double()
    assert p.at(0.5).energy(x).dtype == p.energy(x).dtype == torch.float64
    assert p.at(torch.tensor(0.5)).energy(x).dtype == torch.float64


# -- what is made of several ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pyro_ebm.distributions.IntegrabilityWarning")
def test_products_ratios_and_powers_are_noise_conditional():
    p, q, x = gaussian(0.0, 0.3), gaussian(2.0, 0.2), torch.randn(5)
    for sigma in (0.1, 1.5):
        one, other = normal(0.0, 0.3 + sigma**2), normal(2.0, 0.2 + sigma**2)
        same(product(p, q).at(sigma), product(one, other), x)
        same(product(p, q, p).at(sigma), product(one, other, one), x)
        same(product(product(p, q), p).at(sigma), product(one, other, one), x)
        same(negation(p, q, weight=0.1).at(sigma), negation(one, other, weight=0.1), x)
        same(p.tempered(3.0).at(sigma), one.tempered(3.0), x)
        clean = dist.Normal(1.0, 2.0)  # has no levels, and is itself at all of them
        same(product(p, clean).at(sigma), product(one, clean), x)
    both = p.expand((2,)).to_event(1)
    y = torch.randn(5, 2)
    same(product(both).at(1.5), product(normal(0.0, 0.3 + 1.5**2).expand((2,)).to_event(1)), y)
    assert product(p, q).sigmas == LADDER
    torch.testing.assert_close(product(p, q).energy(x), product(p, q).at(0.1).energy(x))


def test_the_sum_is_the_noised_product_at_no_noise_alone():
    # N(0, v1) N(2, v2) has the variance w = v1 v2 / (v1 + v2) and the mean 2 v1 / (v1 + v2)
    v1, v2 = 0.3, 0.2
    w, mean = v1 * v2 / (v1 + v2), 2 * v1 / (v1 + v2)
    x = torch.linspace(-2, 3, 7).double()
    gaps = []
    for sigma in (1.0, 0.1, 0.01, 0.001):
        level = product(gaussian(0.0, v1), gaussian(2.0, v2)).at(sigma)
        gaps.append(float((level.score(x) - (mean - x) / (w + sigma**2)).abs().max()))
        # and it is the product of the noised parts
        precision = 1 / (v1 + sigma**2) + 1 / (v2 + sigma**2)
        noised_mean = 2 / (v2 + sigma**2) / precision
        torch.testing.assert_close(level.score(x), (noised_mean - x) * precision)
    # off by O(1), and then by O(sigma^2)
    assert gaps[0] > 1
    assert gaps[2] / gaps[3] == pytest.approx(100, rel=0.05)


# -- bad input -----------------------------------------------------------------------------------


def test_other_ladders_do_not_combine():
    q = noise_conditional(lambda x, s: x**2, [1.0, 0.1])
    with pytest.raises(ValueError, match=r"other noise levels.*p\.at\(sigma\)"):
        product(gaussian(0.0, 1.0), q)
    assert not product(gaussian(0.0, 1.0).at(0.1), q.at(0.1)).sigmas


def test_an_energy_without_levels_says_so():
    with pytest.raises(ValueError, match=r"no noise levels.*noise_conditional"):
        UnnormalizedEnergy(torch.square).at(0.5)


@pytest.mark.parametrize("sigmas", [[], [1.0, 0.0], [1.0, float("nan")], "wide", None, [[1.0]]])
def test_levels_are_positive_numbers(sigmas):
    with pytest.raises(ValueError, match="sigmas must be"):
        noise_conditional(lambda x, s: x**2, sigmas)


@pytest.mark.parametrize("ends", [(1.0, 2.0), (1.0, 1.0), (1.0, 0.0), (float("inf"), 1.0)])
def test_a_ladder_goes_down(ends):
    with pytest.raises(ValueError, match="a ladder goes down"):
        geometric_ladder(*ends, 5)


def test_an_energy_that_forgets_sigma_is_an_error_that_shows_it():
    p = noise_conditional(lambda x: x**2, LADDER)
    with pytest.raises(Exception, match="positional argument"):
        p.energy(torch.randn(3))


def test_a_site_in_a_model():
    p = gaussian(1.0, 0.3)

    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("x", p)

    assert model().shape == (3,)


@pytest.mark.parametrize("name", ["log_normalizer", "support", "constant_normalizer"])
def test_settings_that_would_differ_between_levels_are_refused(name):
    with pytest.raises(TypeError, match=f"noise_conditional takes no {name}"):
        noise_conditional(lambda x, sigma: x, LADDER, **{name: 1.0})
    with pytest.raises(ValueError, match="noise leads out of the support"):
        noise_conditional(lambda x, sigma: x, LADDER, base=dist.HalfNormal(1.0))


def test_a_repr_shows_the_levels():
    p = noise_conditional(lambda x, sigma: x**2 / (1 + sigma**2), geometric_ladder(4.0, 0.5, 4))
    assert "sigmas=4 to 0.5 (4 levels)" in repr(p)
    assert "sigmas" not in repr(p.at(1.0))
