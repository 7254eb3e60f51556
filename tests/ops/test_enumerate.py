"""Sums over all states: against closed forms, brute force, and a bound on memory."""

import itertools
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.testing import assert_close

from pyro_ebm.ops.integration.enumerate import (
    check_enumerable,
    log_sum_over_states,
    states,
    values_of_states,
)

BITS = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
SPINS = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
ONE_HOT = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize("support_values", [BITS, SPINS, ONE_HOT])
@pytest.mark.parametrize("variables", [1, 4])
def test_states_are_the_product_of_the_support_values(support_values, variables):
    want = [torch.cat(row) for row in itertools.product(support_values, repeat=variables)]
    assert_close(states(support_values, variables), torch.stack(want), rtol=0, atol=0)
    assert_close(states(support_values, variables, 1, 2), torch.stack(want[1:2]), rtol=0, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 7, 81, 1000])
def test_independent_variables_have_a_closed_form(chunk_size):
    # sum_s exp(sum_i a . s_i) = (sum_k exp(a_k))^n
    a = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    got = log_sum_over_states(lambda s: s.reshape(-1, 4, 3).sum(1) @ a, ONE_HOT, 4, chunk_size)
    assert_close(got, 4 * a.logsumexp(0))


def quadratic(weights):
    """x' W x for each W, ``(chunk, n) -> (chunk, *batch)``."""
    return lambda s: torch.einsum("ci,...ij,cj->c...", s, weights, s)


def test_batches_and_chunks_as_by_brute_force():
    weights = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    s = torch.stack([torch.cat(row) for row in itertools.product(SPINS, repeat=6)])
    want = torch.einsum("ci,abij,cj->cab", s, weights, s).logsumexp(0)
    for chunk_size in [64, 10]:
        got = log_sum_over_states(quadratic(weights), SPINS, 6, chunk_size)
        assert_close(got, want)
        table = values_of_states(quadratic(weights), SPINS, 6, chunk_size)
        assert_close(table.logsumexp(0), want)
        assert table.shape == (64, 2, 3)


def test_nothing_overflows():
    # all of the mass is in the last state; and exp(+-1e30) leaves every range
    for scale in [1e3, 1e30]:
        got = log_sum_over_states(lambda s, a=scale: a * s.sum(-1), BITS, 5, 4)
        assert_close(got, torch.tensor(5 * scale, dtype=torch.float64))
        got = log_sum_over_states(lambda s, a=scale: -a * s.sum(-1), BITS, 5, 4)
        assert_close(got, torch.tensor(0.0, dtype=torch.float64))


def test_states_of_probability_zero():
    # only the 5 states with one bit set count, and whole chunks have none of them
    def log_f(s):
        return torch.where(s.sum(-1) == 1, 0.0, -torch.inf)

    assert_close(log_sum_over_states(log_f, BITS, 5, 2), torch.tensor(math.log(5.0)))


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_gradient_is_an_expectation(chunk_size):
    weights = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    log_z = log_sum_over_states(quadratic(weights), BITS, 6, chunk_size)
    (grad,) = torch.autograd.grad(log_z, weights)
    s = states(BITS, 6)
    p = torch.einsum("ci,ij,cj->c", s, weights, s).softmax(0)
    assert_close(grad, torch.einsum("c,ci,cj->ij", p, s, s))  # E[s s']


def test_second_derivatives():
    def log_z(weights):
        return log_sum_over_states(quadratic(weights), BITS, 3, 3)

    weights = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_z, weights)
    assert torch.autograd.gradgradcheck(log_z, weights)


def test_under_the_transforms_of_torch_func():
    weights = torch.randn(4, 5, 5, dtype=torch.float64)

    def log_z(w):
        return log_sum_over_states(quadratic(w), BITS, 5, 8)

    assert_close(torch.func.vmap(log_z)(weights), log_z(weights))
    grads = torch.func.vmap(torch.func.grad(log_z))(weights)
    w = weights.clone().requires_grad_()
    assert_close(grads, torch.autograd.grad(log_z(w).sum(), w)[0])


def test_float32_and_float64():
    for dtype in [torch.float32, torch.float64]:
        assert log_sum_over_states(lambda s: s.sum(-1), BITS.to(dtype), 3).dtype == dtype


MEMORY = """
    import pathlib, resource, sys
    import torch
    from pyro_ebm.ops.integration.enumerate import log_sum_over_states

    def peak():
        status = pathlib.Path("/proc/self/status")
        if status.exists():  # in Linux, ru_maxrss starts at that of the process that forked
            kilobytes = status.read_text().partition("VmHWM:")[2].split()[0]
            return int(kilobytes) / 2**10
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    torch.set_num_threads(1)
    bits, weights = torch.tensor([[0.0], [1.0]]), torch.randn(20, 20, requires_grad=True)

    def run(variables, chunk_size):
        w = weights[:variables, :variables]
        log_f = lambda s: ((s @ w) * s).sum(-1)
        log_sum_over_states(log_f, bits, variables, chunk_size).backward()

    run(8, 2**6)  # what is imported once
    before = peak()
    run(20, 2**14)
    chunked = peak() - before
    run(20, 2**20)
    print(chunked, peak() - before)
"""


def test_memory_is_bounded_under_autograd():
    # In a process of its own, whose peak is its own. The states alone are 80 MB.
    code = textwrap.dedent(MEMORY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chunked, at_once = map(float, done.stdout.split())
    assert at_once > 200, "the measurement must be able to see a whole table"
    assert chunked < at_once / 2  # what is imported late is in both


@pytest.mark.parametrize(
    ("support_values_of", "variables", "says"),
    [(2, 784, r"2\^784 states"), (3, 16, r"3\^16 states"), (2, 26, r"2\^26 states")],
)
def test_too_many_states_are_refused(support_values_of, variables, says):
    with pytest.raises(ValueError, match=says + r".*annealed importance sampling"):
        check_enumerable(support_values_of, variables)
    support_values = torch.zeros(support_values_of, 1)
    for function in [log_sum_over_states, values_of_states]:
        with pytest.raises(ValueError, match=says):
            function(lambda s: s.sum(-1), support_values, variables)


def test_as_many_states_as_one_allows():
    check_enumerable(2, 25)
    check_enumerable(2, 26, max_states=2**26)
    with pytest.raises(ValueError, match=r"2\^4 states"):
        log_sum_over_states(lambda s: s.sum(-1), BITS, 4, max_states=15)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (-1, 2), (3, 2)])
def test_states_that_do_not_exist(start, stop):
    with pytest.raises(ValueError, match=r"states are numbered from 0 to 3"):
        states(BITS, 2, start, stop)


def test_bad_input():
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1, got 0"):
        log_sum_over_states(lambda s: s.sum(-1), BITS, 2, chunk_size=0)
    for wrong in [lambda s: s.sum(), lambda s: s.sum(-1)[:2]]:
        with pytest.raises(ValueError, match=r"log_f must map 4 states"):
            log_sum_over_states(wrong, BITS, 2)
