"""Likelihoods with two errors."""

import math

import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.normalizer import NormalizerEstimate, estimate_log_normalizer, mean_log_likelihood

NORMAL = UnnormalizedEnergy(lambda x: x**2 / 2)
LOG_Z = math.log(2 * math.pi) / 2


def estimate(**kwargs):
    return NormalizerEstimate(torch.tensor(LOG_Z), torch.tensor(0.3), "ais", **kwargs)


def test_the_mean_and_both_errors():
    data = torch.tensor([0.0, 2.0])
    result = mean_log_likelihood(NORMAL, data, estimate())
    assert float(result) == pytest.approx(-1.0 - LOG_Z)
    # the densities are 0 and -2: sd sqrt(2), error 1
    assert result.data_error == pytest.approx(1.0)
    assert result.normalizer_error == pytest.approx(0.3)
    assert result.std_error == pytest.approx(math.hypot(1.0, 0.3))
    assert result.num_points == 2
    assert repr(result) == (
        "LogLikelihood(-1.9 +- 1.0 nats a point: 1.0 from 2 points, 0.30 from log Z)"
    )


def test_bounds_change_sides():
    result = mean_log_likelihood(
        NORMAL,
        torch.zeros(2),
        estimate(lower=torch.tensor(LOG_Z - 1), upper=torch.tensor(LOG_Z + 2)),
    )
    assert result.lower == pytest.approx(-LOG_Z - 2, rel=1e-5)
    assert result.upper == pytest.approx(-LOG_Z + 1, rel=1e-5)
    assert mean_log_likelihood(NORMAL, torch.zeros(2), estimate()).lower is None


def test_a_known_normalizer_is_taken_as_exact():
    for given, p in {LOG_Z: NORMAL, None: NORMAL.normalized(LOG_Z)}.items():
        result = mean_log_likelihood(p, torch.tensor([0.0, 2.0]), given)
        assert float(result) == pytest.approx(-1.0 - LOG_Z)
        assert result.normalizer_error == 0
    again = mean_log_likelihood(NORMAL.normalized(99.0), torch.tensor([0.0, 2.0]), LOG_Z)
    assert float(again) == pytest.approx(-1.0 - LOG_Z)  # the estimate, not the energy's own


def test_a_batch():
    scale = torch.tensor([1.0, 2.0])
    p = UnnormalizedEnergy(lambda x: (x / scale) ** 2 / 2, batch_shape=(2,))
    found = estimate_log_normalizer(p)
    result = mean_log_likelihood(p, torch.ones(5), found)
    assert torch.allclose(
        result.value, torch.distributions.Normal(0.0, scale).log_prob(torch.ones(2))
    )
    assert mean_log_likelihood(p, torch.ones(5, 2), found).value.shape == (2,)
    assert "batch_shape=(2,)" in repr(result)


def test_one_point_has_no_error():
    assert mean_log_likelihood(NORMAL, torch.zeros(1), 0.0).std_error == math.inf


@pytest.mark.parametrize(
    ("p", "data", "given", "message"),
    [
        (NORMAL, torch.zeros(3), None, "log Z of .* is unknown: give the estimate"),
        (NORMAL, torch.zeros(3, 2), 0.0, r"data must have shape \(n, \*event\)"),
        (NORMAL, torch.zeros(0), 0.0, "data must have shape"),
        (NORMAL, torch.tensor([0.0, math.nan]), 0.0, "hold NaN"),
        (
            UnnormalizedEnergy(lambda x: x, support=constraints.positive),
            torch.tensor([-1.0]),
            0.0,
            "leave the energy's support",
        ),
        (NORMAL, torch.zeros(3), math.inf, "must be finite"),
        (UnnormalizedEnergy(lambda x: x * math.nan), torch.ones(3), 0.0, "NaN at 3 of the data"),
    ],
)
def test_wrong_input(p, data, given, message):
    with pytest.raises(ValueError, match=message):
        mean_log_likelihood(p, data, given)
