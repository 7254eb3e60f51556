"""Chains that come down the noise levels of an energy."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import UnnormalizedEnergy, geometric_ladder, noise_conditional, product
from pyro_ebm.mcmc import LangevinKernel, annealed_langevin
from tests.statistics import SIGMAS

MEANS, SHARES = torch.tensor([-6.0, 6.0]), torch.tensor([0.8, 0.2])


def two_modes(x, sigma):
    """.8 N(-6, .5^2) + .2 N(6, .5^2), and noise."""
    modes = dist.Normal(MEANS, (0.25 + sigma[..., None] ** 2).sqrt())
    return -(SHARES.log() + modes.log_prob(x[..., None])).logsumexp(-1)


def share_is_right(x):
    n, p = len(x), float(SHARES[0])
    return ((x < 0).double().mean() - p).abs() < SIGMAS * (p * (1 - p) / n) ** 0.5


def test_far_modes_get_their_shares_where_chains_at_one_level_do_not():
    p = noise_conditional(two_modes, geometric_ladder(12.0, 0.02, 40))
    start = p.starting_points((10_000,))
    assert share_is_right(annealed_langevin(p, start, steps_per_level=5))
    assert share_is_right(p.sample((2000,)))
    # Langevin steps alone lag behind the levels
    p.noised = False
    assert not share_is_right(annealed_langevin(p, start, steps_per_level=5))
    # from the same starts, for as many steps, at the smallest level
    plain = p.at(p.sigmas[-1])
    plain.starts, plain.num_steps, plain.kernel = p, 800, LangevinKernel()
    x = plain.sample((2000,))
    assert not share_is_right(x)
    assert (x < 0).float().mean() < 0.65  # that of the starts on either side


def test_draws_are_at_the_smallest_level():
    # the variance of each mode is .25 + sigma^2: draws of the last levels would be wider
    p = noise_conditional(two_modes, geometric_ladder(12.0, 0.5, 20))
    x, diagnostics = p.sample_with_diagnostics((4000,))
    left = x[x < 0] + 6
    variance = 0.25 + 0.5**2
    assert (left.square().mean() / variance - 1).abs() < SIGMAS * (2 / len(left)) ** 0.5
    assert diagnostics.num_divergences == 0


def test_draws_of_a_product_are_the_products():
    # of N(0, .3) and N(2, .2), to O(sigma^2) at the smallest sigma: mean 1.2, variance .12. No
    # level leads there by itself: that of 0.5 has the variance (1/.55 + 1/.45)^-1 = .2475
    def gaussian(mean, variance):
        def energy(x, sigma):
            return (x - mean).square() / (variance + sigma**2) / 2

        return noise_conditional(energy, geometric_ladder(4.0, 1e-3, 24))

    both = product(gaussian(0.0, 0.3), gaussian(2.0, 0.2))
    x = both.sample((4000,))
    assert (x.mean() - 1.2).abs() < SIGMAS * (0.12 / 4000) ** 0.5
    assert (x.var() / 0.12 - 1).abs() < SIGMAS * (2 / 4000) ** 0.5
    y = both.at(0.5).sample((4000,))
    assert (y.var() / 0.2475 - 1).abs() < SIGMAS * (2 / 4000) ** 0.5


@pytest.mark.parametrize("adjusted", [False, True])
def test_levels_of_a_product_keep_both_modes_of_it(adjusted):
    # times N(0, 6^2), which is symmetric
    ladder = geometric_ladder(12.0, 0.02, 60)
    both = product(noise_conditional(two_modes, ladder), dist.Normal(0.0, 6.0))
    assert not both.noised
    x = annealed_langevin(both, both.starting_points((1000,)), adjusted=adjusted)
    assert ((x.abs() - 6).abs() < 3).all()
    assert 0.6 < (x < 0).float().mean() < 0.95


def test_the_shape_of_batches_and_events():
    net = noise_conditional(
        lambda x, s: x.square().sum((-1, -2)) / (1 + s**2), [2.0, 0.5], event_shape=(2, 3)
    )
    x = annealed_langevin(net.expand((4,)), torch.randn(5, 4, 2, 3).double())
    assert x.shape == (5, 4, 2, 3)
    assert x.dtype == torch.float64
    assert not x.requires_grad
    assert net.sample().shape == (2, 3)
    assert net.sample((0,)).shape == (0, 2, 3)
    assert net.expand((4,)).sample((5,)).shape == (5, 4, 2, 3)


def test_an_energy_without_levels_is_refused():
    p = UnnormalizedEnergy(torch.square)
    with pytest.raises(ValueError, match=r"p must have noise levels.*noise_conditional"):
        annealed_langevin(p, torch.randn(3))


def test_a_product_with_a_density_on_a_half_line_is_drawn_without_the_levels():
    # N(1, 1) on the half-line with a half-normal: N(.5, .5) above 0
    def energy(x, sigma):
        return (x - 1).square() / (1 + sigma**2) / 2

    p = noise_conditional(energy, geometric_ladder(4.0, 0.01, 20))
    above = product(p, dist.HalfNormal(1.0))
    x, diagnostics = above.sample_with_diagnostics((2000,))
    exact = dist.Normal(0.5, 0.5**0.5)
    tail = 1 - exact.cdf(torch.tensor(0.0))
    mean = 0.5 + 0.5 * exact.log_prob(torch.tensor(0.0)).exp() / tail
    assert (x.mean() - mean).abs() < SIGMAS * 0.5 / 2000**0.5
    assert diagnostics.r_hat < 1.1
    with pytest.raises(ValueError, match="noise leads out of the support"):
        annealed_langevin(above, x)


def test_the_levels_of_a_steep_energy_are_walked_in_small_steps():
    p = noise_conditional(two_modes, geometric_ladder(12.0, 0.5, 20))
    x = annealed_langevin(p.tempered(400.0), p.starting_points((500,)))
    assert x.abs().max() < 8
