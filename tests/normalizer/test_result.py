"""Statistics of weights, against hand-computed and simulated ones."""

import math
import pickle
import warnings

import pytest
import torch

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.normalizer import NormalizerEstimate, UnreliableEstimateWarning
from pyro_ebm.normalizer.estimate_result import (
    check_weights,
    effective_sample_size,
    log_mean_error,
    log_mean_exp,
    stated_error,
    tail_shape,
    warn_if_unreliable,
)
from tests.statistics import SIGMAS

NAN, INF = float("nan"), float("inf")


def test_the_statistics_of_three_weights():
    log_w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log()
    assert math.isclose(log_mean_exp(log_w), math.log(2))
    assert math.isclose(effective_sample_size(log_w), 36 / 14)
    # sd / (mean sqrt(n)), with sd^2 = (1 + 0 + 1) / 2 = 1
    assert math.isclose(log_mean_error(log_w), 1 / (2 * math.sqrt(3)))


def test_statistics_do_not_overflow():
    log_w = torch.tensor([1000.0, -1000.0, 999.0])
    for statistic in (log_mean_exp, effective_sample_size, log_mean_error):
        assert statistic(log_w).isfinite()


def test_the_error_is_the_spread_of_the_estimate():
    log_w = 0.8 * torch.randn(500, 2000, dtype=torch.float64)
    spread = log_mean_exp(log_w).std()
    stated = log_mean_error(log_w).mean()
    # the relative error of a standard deviation from n values is 1 / sqrt(2 n)
    assert abs(stated / spread - 1) < SIGMAS / math.sqrt(2 * 2000) + 0.02  # 0.02: delta method


def test_one_weight_has_no_error():
    assert log_mean_error(torch.zeros(1, 3)).tolist() == [INF] * 3


@pytest.mark.parametrize(
    ("log_w", "message"),
    [
        ([0.0, NAN, 0.0, NAN], "50% of the weights of a test are NaN"),
        ([0.0, INF, 0.0, 0.0], "25% of the weights of a test are infinite"),
        ([-INF, -INF], "100% of the weights of a test are 0"),
    ],
)
def test_weights_without_a_mean(log_w, message):
    with pytest.raises(ValueError, match=message):
        check_weights(torch.tensor(log_w), "a test")


def test_one_batch_element_without_weights():
    log_w = torch.zeros(4, 3)
    log_w[:, 1] = -INF
    with pytest.raises(ValueError, match="of 1 of 3 batch elements"):
        check_weights(log_w, "a test")


def test_some_zeros_are_weights():
    check_weights(torch.tensor([0.0, -INF]), "a test")


def test_the_tail():
    log_w = torch.stack([0.3 * torch.randn(4000), 3 * torch.randn(4000), torch.zeros(4000)], -1)
    k = tail_shape(log_w)
    assert k[0] < 0.5
    assert k[1] > 0.7
    assert k[2] == -INF
    rounding = 1e-6 * torch.randn(1000).exp()
    assert tail_shape(rounding) == -INF  # equal but for rounding
    assert tail_shape(log_w[:20]) is None


@pytest.mark.parametrize(
    ("ess", "num", "k", "warns"),
    [
        (500.0, 1000, 0.2, False),
        (99.0, 1000, 0.2, True),
        (500.0, 1000, 0.71, True),
        (26.0, 100, 0.2, False),
        (24.0, 100, 0.2, True),
        (99.0, 1000, None, True),
    ],
)
def test_when_to_warn(ess, num, k, warns):
    k = None if k is None else torch.tensor(k)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_unreliable("a test", torch.tensor(ess), num, k, "do better")
    assert bool(caught) == warns
    for warning in caught:
        assert warning.category is UnreliableEstimateWarning
        assert "do better" in str(warning.message)
        assert warning.filename == __file__  # the caller's own line


@pytest.mark.parametrize(("ess", "even"), [(18.9, True), (8.0, False)])
def test_few_weights_that_are_near_to_each_other_want_more_of_them(ess, even):
    with pytest.warns(UnreliableEstimateWarning, match=f"of {ess:.3g} of 20") as caught:
        warn_if_unreliable("a test", torch.tensor(ess), 20, None, "do better", more="num_chains=")
    message = str(caught[0].message)
    assert ("take more of them (num_chains=)" in message) == even
    assert ("do better" in message) != even


def one(**kwargs):
    value = torch.tensor(1.23456)
    return NormalizerEstimate(value, torch.tensor(0.0123), "ais", **kwargs)


def test_an_estimate_in_words():
    assert repr(one()) == "NormalizerEstimate(log Z = 1.235 +- 0.012, method=ais)"
    both = one(lower=torch.tensor(1.2), upper=torch.tensor(1.3), ess=torch.tensor(81.2))
    assert "lower bound 1.200, in reverse 1.300 (a bound only from exact draws)" in repr(both)
    assert "ESS=81" in repr(both)
    assert "temperatures=3" in repr(one(betas=torch.tensor([0.0, 0.5, 1.0])))
    batch = NormalizerEstimate(torch.arange(3.0), 0.1 * torch.arange(3.0), "ais")
    assert "batch_shape=(3,), log Z from 0.000 to 2.000, +- 0.20 at most" in repr(batch)
    zero = NormalizerEstimate(torch.tensor(2.0), torch.tensor(0.0), "exact")
    assert "log Z = 2.0000 +- 0," in repr(zero)


def test_bounds_have_errors_and_may_cross():
    value, errors = torch.tensor(1.30), (torch.tensor(0.03), torch.tensor(0.04))
    settings = {"lower": value, "upper_error": errors[1], "exact_samples": True}
    above, below = (
        NormalizerEstimate(value, errors[0], "ais", upper=torch.tensor(upper), **settings)
        for upper in (1.35, 1.26)
    )
    assert "lower bound 1.300 +- 0.030, upper bound 1.350 +- 0.040)" in repr(above)
    assert "upper bound 1.260 +- 0.040, which cross by 0.040 +- 0.050)" in repr(below)
    assert below.upper < below.lower  # neither sorted nor clamped


@pytest.mark.parametrize("scale", [0.3, 0.8, 1.2])
def test_the_stated_error_of_few_weights(scale):
    """Log-normal weights: as many intervals as should hold the truth, and not many more."""
    log_w = scale * torch.randn(200, 5000, dtype=torch.float64)
    error = (log_mean_exp(log_w) - scale**2 / 2).abs()
    for errors, want in ((1.0, 0.68), (1.96, 0.95)):
        share = (error < errors * stated_error(log_w)).double().mean()
        assert want - 0.03 < share < want + 0.08
    assert stated_error(torch.zeros(10)) == 0
    assert stated_error(torch.zeros(1, 3)).isinf().all()
    assert stated_error(torch.tensor([0.0, -torch.inf, -torch.inf])).isfinite()


def test_an_estimate_as_a_number_and_a_normalizer():
    assert float(one()) == pytest.approx(1.23456)
    p = UnnormalizedEnergy(lambda x: x**2 / 2).normalized(one())
    assert p.normalizer_state == "known"
    assert p.log_prob(torch.tensor(0.0)) == -one().value


def test_an_estimate_is_saved_and_loaded():
    loaded = pickle.loads(pickle.dumps(one(ess=torch.tensor(3.0))))
    assert repr(loaded) == repr(one(ess=torch.tensor(3.0)))
