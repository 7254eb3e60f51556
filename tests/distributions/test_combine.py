"""Products, contrasts and tempered densities against closed forms and enumeration."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import (
    LangevinKernel,
    UnnormalizedEnergy,
)
from pyro_ebm.distributions.core.supports import same_support
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.product import IntegrabilityWarning, negation, product
from tests.statistics import assert_moments


class Quadratic(nn.Module):
    """E(x) = precision (x - mean)^2 / 2, summed over the last ``event_dim`` dimensions."""

    def __init__(self, mean, precision, event_dim=0):
        super().__init__()
        self.mean, self.event_dim = torch.as_tensor(mean), event_dim
        self.precision = nn.Parameter(torch.as_tensor(precision))

    def forward(self, x):
        energy = self.precision * (x - self.mean) ** 2 / 2
        return energy.flatten(energy.dim() - self.event_dim).sum(-1) if self.event_dim else energy


def quadratic(mean, precision):
    """N(mean, 1 / precision) as an energy with an unknown log Z."""
    mean, precision = torch.as_tensor(mean), torch.as_tensor(precision)
    batch = torch.broadcast_shapes(mean.shape, precision.shape)
    return UnnormalizedEnergy(Quadratic(mean, precision), batch_shape=batch)


def normal(mean, precision):
    return dist.Normal(mean, torch.as_tensor(precision).rsqrt())


def ring(x):
    return 8 * (x.norm(dim=-1) - 2) ** 2


def states(n):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n)


def assert_same_density(p, truth, x):
    """The log densities differ by a constant over the points ``(n, *batch, *event)``."""
    gap = p.unnormalized_log_prob(x) - truth.log_prob(x)
    assert gap.isfinite().all()
    assert_close(gap, gap[:1].expand_as(gap))


POINTS = torch.linspace(-3, 3, 7, dtype=torch.double)


# -- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds", [(quadratic, quadratic), (quadratic, normal), (normal, quadratic)]
)
def test_the_product_of_gaussians_is_the_gaussian_of_the_summed_precisions(kinds):
    mean1, mean2 = torch.tensor([[-1.0], [0.5], [2.0]]).double(), torch.tensor([0.0, 3.0]).double()
    lam1, lam2 = torch.tensor(2.0).double(), torch.tensor([0.5, 4.0]).double()
    p = product(kinds[0](mean1, lam1), kinds[1](mean2, lam2))
    assert p.batch_shape == (3, 2)
    truth = normal((lam1 * mean1 + lam2 * mean2) / (lam1 + lam2), lam1 + lam2)
    x = POINTS[:, None, None].expand(7, 3, 2)
    assert_same_density(p, truth, x)
    assert_close(p.score(x), -(lam1 + lam2) * (x - truth.mean))
    assert p.normalizer_state == "unknown"


def test_the_bases_of_three_tilts_multiply():
    bases = [dist.Normal(-1.0, 2.0), dist.Laplace(0.5, 1.0), dist.StudentT(3.0)]
    parts = [
        UnnormalizedEnergy(torch.cos, base=bases[0]),
        UnnormalizedEnergy(torch.sin, base=bases[1]),
        UnnormalizedEnergy(torch.atan, base=bases[2]),
    ]
    p = product(*parts)
    x = POINTS
    want = sum(h.log_prob(x) for h in bases) - x.cos() - x.sin() - x.atan()
    assert_close(p.unnormalized_log_prob(x), want)
    assert isinstance(p.base, dist.Normal)  # one of them is where chains start
    assert_close(p.energy(x), p.base.log_prob(x) - want)
    start = p.starting_points((4000,))
    assert abs(start.mean() + 1) < 4.5 * 2 / math.sqrt(4000)


def test_one_distribution_twice_is_its_square():
    d = dist.Laplace(0.0, 1.0)
    p = product(d, d)
    assert_close(p.log_density_ratio(POINTS, 0 * POINTS), -2 * POINTS.abs())


def test_members_of_one_exponential_family_multiply_to_a_member():
    mean1, mean2 = torch.tensor([[-1.0], [0.5], [2.0]]).double(), torch.tensor([0.0, 3.0]).double()
    kernel = LangevinKernel()
    given = ExponentialFamily.gaussian(mean1, torch.tensor(0.5).double())
    given.kernel, given.num_steps = kernel, 300
    p = product(normal(mean2, torch.tensor(1.0).double()), given, dist.Normal(mean2, 1.0))
    assert isinstance(p, ExponentialFamily)
    assert (p.batch_shape, p.kernel, p.num_steps) == ((3, 2), kernel, 300)
    x = POINTS[:, None, None].expand(7, 3, 2)
    #  precisions 1 + 4 + 1
    truth = normal((4 * mean1 + 2 * mean2) / 6, torch.tensor(6.0).double())
    assert_close(p.log_prob(x), truth.log_prob(x))
    assert p.sample((5,)).shape == (5, 3, 2)
    assert product(given.expand((2, 3, 1)), dist.Normal(0.0, 1.0)).batch_shape == (2, 3, 1)
    beta = product(dist.Beta(2.0, 3.0), dist.Beta(1.5, 4.0), dist.Beta(1.0, 1.0))
    x = torch.tensor([0.1, 0.7])
    assert_close(beta.log_prob(x), dist.Beta(2.5, 6.0).log_prob(x))
    coins = [dist.Bernoulli(torch.tensor(q)).to_event(1) for q in ([0.1, 0.5], [0.3, 0.9])]
    both = product(*coins)
    want = coins[0].mean * coins[1].mean
    want = want / (want + (1 - coins[0].mean) * (1 - coins[1].mean))
    assert_close(both.log_prob(states(2)), dist.Bernoulli(want).to_event(1).log_prob(states(2)))


def test_a_base_measure_or_another_family_leaves_log_z_unknown():
    x = torch.arange(5.0)
    p = product(dist.Poisson(2.0), dist.Poisson(3.0))  # 6^x / (x!)^2 is no Poisson
    assert p.normalizer_state == "unknown"
    assert_close(p.log_density_ratio(x, 0 * x), x * math.log(6) - 2 * (x + 1).lgamma())
    q = product(dist.Laplace(0.0, 1.0), dist.Laplace(1.0, 1.0))
    assert q.normalizer_state == "unknown"
    assert_close(q.log_density_ratio(POINTS, 0 * POINTS), 1 - POINTS.abs() - (POINTS - 1).abs())


def test_enumerated_products_of_discrete_densities():
    x = states(4)
    bernoulli = dist.Bernoulli(torch.tensor([0.1, 0.5, 0.7, 0.9])).to_event(1)
    coupled = UnnormalizedEnergy(
        lambda x: x[..., 0] * x[..., 1] - 2 * x[..., 2] * x[..., 3],
        event_shape=(4,),
        support=constraints.boolean,
    )
    tilt = UnnormalizedEnergy(lambda x: x.sum(-1), base=dist.Bernoulli(0.3).expand([4]).to_event(1))
    p = product(coupled, tilt, bernoulli)
    assert p.support.is_discrete
    want = (
        coupled.unnormalized_log_prob(x).exp()
        * tilt.unnormalized_log_prob(x).exp()
        * bernoulli.log_prob(x).exp()
    )
    assert_close(p.unnormalized_log_prob(x).softmax(0), want / want.sum())


def test_a_single_part_is_itself():
    p = quadratic(0.0, 1.0)
    assert product(p) is p
    gumbel = dist.Gumbel(1.0, 2.0)
    q = product(gumbel)
    assert q.is_normalized
    assert_close(q.log_prob(POINTS), gumbel.log_prob(POINTS))


def test_nesting_flattens():
    a, b, c = quadratic(0.0, 1.0), quadratic(1.0, 2.0), dist.Gumbel(0.0, 1.0)
    nested = product(product(a, b).tempered(0.5), product(c, a))
    assert len(nested.terms) == 3
    assert [c for c, _ in nested.terms] == [0.5, 0.5, 1.0]
    flat = product(a.tempered(0.5), b.tempered(0.5), c, a)
    assert_close(nested.unnormalized_log_prob(POINTS), flat.unnormalized_log_prob(POINTS))
    assert "0.5 Quadratic + 0.5 Quadratic + Quadratic" in repr(nested)


def test_energies_in_to_event_are_parts():
    mean = torch.randn(5, 3)
    p = product(quadratic(mean, 1.0).to_event(1), dist.Gumbel(0.0, 1.0).expand([3]).to_event(1))
    assert (p.batch_shape, p.event_shape) == ((5,), (3,))
    x = torch.randn(2, 5, 3)
    want = (x - mean).square().sum(-1) / 2 - dist.Gumbel(0.0, 1.0).log_prob(x).sum(-1)
    assert_close(-p.unnormalized_log_prob(x), want)
    tilts = UnnormalizedEnergy(torch.abs, base=dist.Normal(mean, 2.0), log_normalizer=0.25)
    lifted = product(tilts.to_event(1))  # log Z adds up, and the bases make one
    assert_close(lifted.log_prob(x), tilts.log_prob(x).sum(-1))
    assert lifted.is_normalized
    assert lifted.base.event_shape == (3,)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (constraints.real, constraints.positive),
        (constraints.real_vector, constraints.simplex),
        (constraints.nonnegative_integer, constraints.boolean),
    ],
)
def test_the_narrower_support_wins(wide, narrow):
    shape = (2,) * max(wide.event_dim, narrow.event_dim)
    a, b = (
        UnnormalizedEnergy(lambda x: x.sum(-1) if shape else x, shape, s) for s in (wide, narrow)
    )
    for p in (product(a, b), product(b, a)):
        assert same_support(p.support, b.support)


def test_the_base_that_fits_the_support_is_kept():
    p = product(dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Gamma(1.0, 3.0))
    assert isinstance(p.base, dist.Gamma)
    assert (p.starting_points((100,)) > 0).all()
    x = torch.tensor([0.5, 2.0])
    #  e^{-x^2/2} x e^{-x} e^{-3x}
    assert_close(p.log_density_ratio(x, torch.ones(2)), x.log() - (x**2 - 1) / 2 - 4 * (x - 1))


def test_the_kernel_and_the_longest_chains_of_the_parts():
    kernel = LangevinKernel(step_size=0.3)
    a = UnnormalizedEnergy(torch.square)
    b = UnnormalizedEnergy(torch.square, kernel=kernel, num_steps=300)
    p = product(a, b, dist.Gumbel(0.0, 1.0))
    assert p.kernel is kernel
    assert p.num_steps == 300
    assert product(a, a).kernel is None
    assert b.tempered(2.0).kernel is kernel


# -- contrasts -----------------------------------------------------------------------------------


def test_the_contrast_of_gaussians_subtracts_precisions():
    mean_a, mean_b = torch.tensor([0.0, 1.0]).double(), torch.tensor([[2.0], [-1.0]]).double()
    weight = torch.tensor([0.5, 1.5]).double()
    lam = 4 - weight
    truth = normal((4 * mean_a - weight * mean_b) / lam, lam)
    x = POINTS[:, None, None].expand(7, 2, 2)
    for a in (quadratic(mean_a, 4.0), normal(mean_a, 4.0)):
        for b in (
            quadratic(mean_b, 1.0),
            UnnormalizedEnergy(torch.zeros_like, base=normal(mean_b, 1.0)),
        ):
            with pytest.warns(IntegrabilityWarning, match="infinite log Z"):
                p = negation(a, b, weight)
            assert_same_density(p, truth, x)


def test_a_contrast_within_an_exponential_family_tells_whether_it_exists():
    p = negation(dist.Normal(1.0, 0.5), dist.Normal(-1.0, 1.0), torch.tensor(2.0))  # no warning
    assert_close(p.log_prob(POINTS), dist.Normal(3.0, 0.5**0.5).log_prob(POINTS))  # 4 - 2 * 1
    p = negation(dist.Normal(torch.zeros(2), 0.5), dist.Normal(-1.0, 1.0), torch.tensor([1.0, 3.0]))
    truth = normal(torch.tensor([1 / 3, 3.0]), torch.tensor([3.0, 1.0]))
    x = torch.randn(5, 2)
    assert_close(p.log_prob(x), truth.log_prob(x))


def test_a_contrast_keeps_the_base_of_what_is_wanted():
    a = UnnormalizedEnergy(torch.cos, base=dist.Normal(0.0, 1.0))
    with pytest.warns(IntegrabilityWarning):
        p = negation(a, dist.StudentT(3.0), 0.5)
    assert isinstance(p.base, dist.Normal)
    want = a.unnormalized_log_prob(POINTS) - dist.StudentT(3.0).log_prob(POINTS) / 2
    assert_close(p.unnormalized_log_prob(POINTS), want)
    with pytest.warns(IntegrabilityWarning):
        q = negation(quadratic(0.0, 1.0), dist.StudentT(3.0), 0.5)
    assert q.base is None  # what is not wanted is no place to start


def test_a_contrast_on_a_finite_set_needs_no_warning():
    x = states(3)
    a = dist.Bernoulli(torch.tensor([0.2, 0.5, 0.9])).to_event(1)
    b = UnnormalizedEnergy(lambda x: x.prod(-1) - x.sum(-1), (3,), constraints.boolean)
    p = negation(a, b, 2.0)
    want = a.log_prob(x).exp() / (-b.energy(x)).exp() ** 2
    assert_close(p.unnormalized_log_prob(x).softmax(0), want / want.sum())
    with pytest.warns(IntegrabilityWarning):
        negation(dist.Poisson(2.0), dist.Geometric(0.5), 2.0)  # infinitely many


def test_a_contrast_is_a_power_of_minus_the_weight():
    a, b, c = quadratic(0.0, 4.0), quadratic(1.0, 1.0), dist.Laplace(0.0, 1.0)
    with pytest.warns(IntegrabilityWarning):
        p = product(negation(product(a, c), product(b, c), 0.5), c)
    want = -2 * POINTS**2 + (POINTS - 1) ** 2 / 4 - (1 - 0.5 + 1) * POINTS.abs()
    gap = p.unnormalized_log_prob(POINTS) - want
    assert_close(gap, gap[:1].expand_as(gap))


# -- tempering -----------------------------------------------------------------------------------


def test_tempering_multiplies_the_energy_and_not_the_base():
    tilt = UnnormalizedEnergy(Quadratic(1.0, 3.0), base=dist.Normal(0.0, 1.0), batch_shape=(3,))
    beta = torch.tensor([0.0, 0.5, 2.0]).double()
    p = tilt.tempered(beta)
    lam = 1 + 3 * beta
    assert_same_density(p, normal(3 * beta / lam, lam), POINTS[:, None].expand(7, 3))
    assert p.batch_shape == (3,)
    assert isinstance(p.base, dist.Normal)
    assert p.normalizer_state == "unknown"
    chains = tilt.tempered(torch.tensor([0.0, 0.5, 2.0])).sample((3000,))
    assert_moments(chains[None], (3 * beta / lam), (1 / lam))


def test_tempering_without_a_base_is_a_power():
    p = quadratic(0.5, torch.tensor(2.0).double())
    assert_same_density(p.tempered(3.0), normal(0.5, torch.tensor(6.0).double()), POINTS)
    assert_same_density(
        p.tempered(3).tempered(0.5), normal(0.5, torch.tensor(3.0).double()), POINTS
    )


def test_what_is_known_of_log_z_at_other_temperatures():
    p = UnnormalizedEnergy(torch.cos, base=dist.Normal(0.0, 1.0), log_normalizer=0.1)
    assert p.tempered(1.0) is p
    assert p.tempered(0.0).is_normalized
    assert_close(p.tempered(0).log_prob(POINTS), dist.Normal(0.0, 1.0).log_prob(POINTS))
    for unknown in (0.5, 2, torch.tensor(0.0), torch.tensor(1.0)):
        assert p.tempered(unknown).normalizer_state == "unknown"
    cut = UnnormalizedEnergy(torch.cos, support=constraints.positive, base=dist.Normal(0.0, 1.0))
    assert cut.tempered(0.0).normalizer_state == "unknown"  # half of the base is outside
    word = UnnormalizedEnergy(torch.cos, constant_normalizer=True)
    assert not word.tempered(2.0).constant_normalizer


def test_the_power_0_of_an_infinite_energy_is_the_base():
    wall = UnnormalizedEnergy(
        lambda x: torch.where(x > 0, x, math.inf), base=dist.Normal(0.0, 1.0), batch_shape=(2,)
    )
    x = torch.tensor(-1.0)
    for p in (wall.tempered(0.0), wall.tempered(torch.tensor([0.0, 0.0]))):
        assert_close(p.unnormalized_log_prob(x), dist.Normal(0.0, 1.0).log_prob(x).expand(2))
    assert (
        wall.tempered(torch.tensor([0.1, 1.0])).unnormalized_log_prob(x).tolist() == [-math.inf] * 2
    )


# -- bad input -----------------------------------------------------------------------------------

Q = quadratic(0.0, 1.0)
TILT = UnnormalizedEnergy(torch.cos, base=dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product(), "at least one part"),
        (lambda: product(Q, torch.square), "part 1 of the product must be an energy"),
        (lambda: product(Q, UnnormalizedEnergy(ring, (2,))), r"event_shape.*place 1.*\.expand"),
        (lambda: product(quadratic(torch.zeros(2), 1.0), quadratic(torch.zeros(3), 1.0)), "batch"),
        (
            lambda: product(dist.Beta(1.0, 2.0), dist.Pareto(2.0, 1.0)),
            "part 1 .*neither lies within",
        ),
        (lambda: product(dist.Poisson(1.0), dist.Gamma(1.0, 1.0)), "neither lies within"),
        (lambda: product(Q, dist.Normal(0.0, 1.0).mask(False)), "MaskedDistribution, which has no"),
        (lambda: product(Q, dist.Delta(torch.tensor(0.0))), "Delta, which has no density"),
        (
            lambda: product(
                Q, dist.TransformedDistribution(Q, [dist.transforms.AffineTransform(1.0, 2.0)])
            ),
            "hides.*log Z is unknown.*combine the energies first",
        ),
        (
            lambda: product(
                Q,
                dist.MixtureSameFamily(
                    dist.Categorical(torch.ones(2)), quadratic(torch.zeros(2), 1.0)
                ),
            ),
            "hides",
        ),
        (lambda: negation(Q, dist.Gamma(1.0, 1.0), 1.0), "support of a.*must lie within that of b"),
        (lambda: negation(dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.9), 1.0), "Z is not finite"),
        (lambda: product(dist.Beta(0.3, 1.0), dist.Beta(0.2, 1.0)), "no member of Beta, its Z is"),
        (lambda: negation(Q, Q, 0.0), "weight must be finite and greater than 0, got 0.0"),
        (lambda: negation(Q, Q, torch.tensor([1.0, -1.0])), r"shape \(2,\)"),
        (lambda: negation(quadratic(torch.zeros(2), 1.0), Q, torch.tensor([1.0, -1.0])), "weight"),
        (lambda: negation(Q, Q, "much"), "weight must be a number or a tensor"),
        (lambda: Q.tempered(0.0), "beta must be finite and greater than 0, got 0.0"),
        (lambda: Q.tempered(-1.0), "beta must be finite"),
        (lambda: Q.tempered(math.inf), "beta must be finite"),
        (lambda: Q.tempered(torch.tensor(math.nan)), "beta must be finite"),
        (lambda: TILT.tempered(-1.0), "beta must be finite and at least 0"),
        (lambda: TILT.tempered(torch.ones(2)), r"beta has shape \(2,\).*expand"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings(action="ignore"):
        call()
