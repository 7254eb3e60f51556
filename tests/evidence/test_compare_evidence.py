"""Tables of models by their evidence."""

import math

import pytest
import torch

from pyro_ebm import compare_evidence
from pyro_ebm.evidence import EvidenceEstimate


def result(value, error=0.1, **kwargs):
    return EvidenceEstimate(torch.tensor(value), torch.tensor(error), "bridge", **kwargs)


def test_the_table():
    results = {"a": result(-3.0, 0.3), "b": result(-1.0, 0.4), "c": result(-2.0, 0.0)}
    table = compare_evidence(results)
    assert list(table.index) == ["b", "c", "a"]
    assert list(table["rank"]) == [0, 1, 2]
    assert table.log_bf["a"] == pytest.approx(-2.0)
    assert table.dse["a"] == pytest.approx(0.5)  # sqrt(.3^2 + .4^2)
    assert table.dse["b"] == 0
    total = sum(math.exp(x) for x in (-3, -1, -2))
    assert table.probability["c"] == pytest.approx(math.exp(-2) / total)
    assert table.probability.sum() == pytest.approx(1.0)


def test_prior_probabilities_count():
    results = {"a": result(-3.0), "b": result(-1.0)}
    table = compare_evidence(results, {"a": 0.9, "b": 0.1})
    odds = 9 * math.exp(-2)
    assert table.probability["a"] == pytest.approx(odds / (1 + odds))
    assert table.log_bf["a"] == pytest.approx(-2.0)  # which they do not move
    for wrong in ({"a": 1.0}, {"a": 0.9, "b": 0.2}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ValueError, match="prior_probabilities"):
            compare_evidence(results, wrong)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result(-1.0, shared_improper=("sigma2",)), "share their improper priors"),
        (result(-1.0, num_data=11), "different numbers of data, {'a': 10, 'b': 11}"),
        (result(float("inf")), "'b' must be a number"),
        (result([1.0, 2.0]), "'b' must be a number"),
        (-1.0, "results"),
    ],
)
def test_what_cannot_be_compared(other, message):
    with pytest.raises(ValueError, match=message):
        compare_evidence({"a": result(-3.0, num_data=10), "b": other})


def test_one_model_is_no_comparison():
    with pytest.raises(ValueError, match="two or more"):
        compare_evidence({"a": result(-3.0)})
