import math
import re
from pathlib import Path

import pytest
import torch

import pyro_ebm
from pyro_ebm.ops import log_uniform, metropolis_accept, select

NAN, INF = float("nan"), float("inf")


def test_accepts_with_probability_of_the_ratio():
    n = 20_000
    log_ratio = torch.tensor([0.3, 0.0, -0.5, -2.0, -INF])
    valid = torch.ones(5, dtype=torch.bool)
    log_u = torch.rand(n, 5).log()
    accepted = torch.stack([metropolis_accept(log_ratio, valid, u)[1] for u in log_u])
    want = log_ratio.clamp(max=0).exp()
    error = (want * (1 - want) / n).sqrt()
    assert ((accepted.float().mean(0) - want).abs() <= 4.5 * error).all()


@pytest.mark.parametrize(
    ("log_ratio", "valid"), [(NAN, True), (NAN, False), (5.0, False), (INF, False), (-INF, True)]
)
def test_what_is_invalid_or_no_number_is_never_accepted(log_ratio, valid):
    log_u = torch.tensor([-INF, -1e30, -1.0])  # even log 0
    prob, accepted = metropolis_accept(torch.full((3,), log_ratio), torch.full((3,), valid), log_u)
    assert prob.tolist() == [0.0] * 3
    assert not accepted.any()


def test_a_rejected_row_touches_no_other():
    log_ratio = torch.tensor([NAN, -0.5, INF])
    prob, accepted = metropolis_accept(
        log_ratio, torch.tensor([True, True, True]), torch.full((3,), -0.1)
    )
    torch.testing.assert_close(prob, torch.tensor([0.0, math.exp(-0.5), 1.0]))
    assert accepted.tolist() == [False, False, True]


@pytest.mark.parametrize("smallest", [True, False])
def test_a_uniform_accepts_nothing_that_has_no_chance(smallest, monkeypatch):
    """``torch.rand`` has 0 among its values, and largest 1 - 2^-24, in single precision."""
    u = torch.tensor(0.0 if smallest else 1 - 2.0**-24).expand(3)
    monkeypatch.setattr(torch, "rand_like", lambda like: u.to(like))
    log_u = log_uniform(torch.empty(3))
    assert log_u.isfinite().all()
    log_ratio = torch.tensor([-20.0, -1e4, 1.0])
    accepted = metropolis_accept(log_ratio, torch.ones(3, dtype=torch.bool), log_u)[1]
    assert accepted.tolist() == [False, False, True]


def test_no_kernel_takes_the_logarithm_of_a_uniform_that_may_be_0():
    folder = Path(pyro_ebm.__file__).parent
    found = [
        path
        for path in folder.rglob("*.py")
        if re.search(r"rand(_like)?\(.*\)\.log\(", path.read_text())
    ]
    assert not found


def test_log_uniform_is_minus_an_exponential():
    log_u = log_uniform(torch.empty(100_000, dtype=torch.float64))
    assert abs(log_u.mean() + 1) < 4.5 / 100_000**0.5  # of mean and sd 1
    assert abs(log_u.square().mean() - 2) < 4.5 * (20 / 100_000) ** 0.5  # E e^4 - 2^2 = 20


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_select_takes_whole_rows(shape):
    new, old = torch.randn(3, *shape), torch.full((3, *shape), NAN)
    got = select(torch.tensor([True, False, True]), new, old)
    assert torch.equal(got[[0, 2]], new[[0, 2]])
    assert got[1].isnan().all()
