"""Draws and sweeps of restricted Boltzmann machines: frequencies of all states by chi-square."""

import pytest
import torch
from scipy.stats import chi2, norm
from torch.testing import assert_close

from pyro_ebm.distributions.boltzmann.rbm import RBM, JointRBM
from pyro_ebm.distributions.core.discrete import BlockGibbs
from tests.distributions.test_rbm import all_bits, machine, table
from tests.statistics import SIGMAS, assert_mean_of_rows

DRAWS = 40_000


def state_numbers(x):
    """Which row of ``all_bits`` each point is."""
    powers = 2 ** torch.arange(x.shape[-1] - 1, -1, -1)
    return (x.long() * powers).sum(-1)


def assert_frequencies(x, probability):
    """Independent draws of bits have these state probabilities, by a chi-square test."""
    counts = torch.bincount(state_numbers(x).flatten(), minlength=len(probability))
    expected = probability * counts.sum()
    assert expected.min() > 5, "too few draws for the test"
    statistic = ((counts - expected).square() / expected).sum().item()
    assert statistic < chi2.isf(norm.sf(SIGMAS), len(probability) - 1), statistic


@pytest.mark.parametrize(("n", "m"), [(4, 2), (2, 4)])
def test_exact_draws(n, m):
    p = machine(n, m, scale=0.5)
    log_joint = table(p)
    assert_frequencies(p.exact_sample((DRAWS,)), log_joint.logsumexp(1).softmax(0))
    xz = p.joint().exact_sample((DRAWS,))
    assert_frequencies(xz, log_joint.flatten().softmax(0))


def test_exact_draws_of_a_batch():
    tall, wide = machine(3, 2, (2,), scale=0.5), machine(2, 3, (2,), scale=0.5)
    for p in [tall, wide, tall.expand((3, 2))]:
        x = p.exact_sample((DRAWS,))
        assert x.shape == (DRAWS,) + p.batch_shape + p.event_shape
        for k in range(2):
            one = RBM(p.weights[k], p.visible_bias[k], p.hidden_bias[k])
            assert_frequencies(x[..., k, :], table(one).logsumexp(1).softmax(0))
    p = machine(3, 2, scale=0.5).expand((4,))
    x = p.exact_sample((DRAWS,))
    assert x.shape == (DRAWS, 4, 3)
    assert_frequencies(x, table(p).logsumexp(1).softmax(0))


@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 3)])
def test_a_sweep_leaves_the_density_invariant(n, m):
    p = machine(n, m, scale=0.5)
    log_joint = table(p)
    for q, probability in [(p, log_joint.logsumexp(1)), (p.joint(), log_joint.flatten())]:
        x = q.exact_sample((DRAWS,))
        new = q.gibbs_sweep(x, q.gibbs_noise(x))
        assert new.shape == x.shape
        assert not torch.equal(x, new)
        assert_frequencies(new, probability.softmax(0))


def test_sweeps_forget_where_they_started():
    p = machine(3, 2, scale=0.5)
    log_joint = table(p)
    for q, probability in [(p, log_joint.logsumexp(1)), (p.joint(), log_joint.flatten())]:
        x = torch.ones((DRAWS,) + q.event_shape, dtype=torch.float64)
        for _ in range(60):
            x = q.gibbs_sweep(x, q.gibbs_noise(x))
        assert_frequencies(x, probability.softmax(0))


def test_sampling_by_short_chains_of_sweeps():
    p = machine(3, 2, scale=0.5)
    log_joint = table(p)
    assert_frequencies(p.sample((DRAWS,)), log_joint.logsumexp(1).softmax(0))
    assert_frequencies(p.joint().sample((DRAWS,)), log_joint.flatten().softmax(0))


def test_tempered_sweeps_leave_the_tempered_density_invariant():
    p = machine(3, 2, scale=0.5).joint()
    assert p.supports_tempering
    beta = torch.tensor([0.0, 0.4, 1.7])
    tempered = p.tempered(beta)
    assert isinstance(tempered, JointRBM)
    assert tempered.batch_shape == (3,)
    x = tempered.exact_sample((DRAWS,))
    new = p.gibbs_sweep(x, p.gibbs_noise(x), beta)
    log_joint = table(p).flatten()
    for k in range(3):
        assert_frequencies(x[:, k], (beta[k] * log_joint).softmax(0))
        assert_frequencies(new[:, k], (beta[k] * log_joint).softmax(0))
    xz = all_bits(5)
    assert_close(tempered.energy(xz[:, None]), beta * p.energy(xz)[:, None])
    # the sweep of the tempered machine is the tempered sweep
    noise = p.gibbs_noise(x)
    assert_close(p.gibbs_sweep(x, noise, beta), tempered.gibbs_sweep(x, noise))


def test_batched_sweeps_as_one_by_one():
    for p in [machine(4, 3, (2,)), machine(4, 3, (2,)).joint()]:
        x = p.exact_sample((5,))
        noise = p.gibbs_noise(x)
        new = p.gibbs_sweep(x, noise)
        for k in range(2):
            one = type(p)(p.weights[k], p.visible_bias[k], p.hidden_bias[k])
            assert_close(new[:, k], one.gibbs_sweep(x[:, k], tuple(u[:, k] for u in noise)))


def test_the_marginal_cannot_be_tempered():
    p, x = machine(3, 2, scale=0.5), torch.ones(3)
    assert not p.supports_tempering
    assert isinstance(p, BlockGibbs)
    assert isinstance(p.joint(), BlockGibbs)
    with pytest.raises(ValueError, match=r"temper joint\(\)"):
        p.gibbs_sweep(x, p.gibbs_noise(x), torch.tensor(0.5))


def test_contrastive_divergence_has_no_gradient_at_the_truth():
    # E over data and one sweep of grad E(x) - grad E(x') is 0 at the parameters of the data
    p = machine(3, 2, scale=0.5)
    x = p.exact_sample((20_000,))
    new = p.gibbs_sweep(x, p.gibbs_noise(x))

    def contrast(weights, b, c, x, new):
        p = RBM(weights, b, c, validate_args=False)
        return p.energy(x) - p.energy(new)

    gradient = torch.func.grad(contrast, argnums=(0, 1, 2))
    rows = torch.func.vmap(gradient, in_dims=(None, None, None, 0, 0))
    for grad in rows(p.weights, p.visible_bias, p.hidden_bias, x, new):
        assert_mean_of_rows(grad)
    # and it has one where the bias is not that of the data
    q = RBM(p.weights, p.visible_bias + 0.3, p.hidden_bias)
    new = q.gibbs_sweep(x, q.gibbs_noise(x))
    _, grad, _ = rows(q.weights, q.visible_bias, q.hidden_bias, x, new)
    assert (grad.mean(0) / (grad.std(0) / len(x) ** 0.5)).abs().max() > 2 * SIGMAS
