"""Gaussian-Bernoulli machines: against the sum over hidden states, quadrature, and the mixture."""

import copy
import itertools
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_ebm.distributions.boltzmann.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.core.discrete import BlockGibbs
from tests.statistics import SIGMAS, assert_mean


def parameters(n, m, batch=(), dtype=torch.float64):
    shapes = [(n, m), (n,), (m,)]
    scale = 0.5 + torch.rand(batch + (n,), dtype=dtype)
    return (*(torch.randn(batch + shape, dtype=dtype) for shape in shapes), scale)


def machine(n, m, batch=(), dtype=torch.float64):
    return GaussianRBM(*parameters(n, m, batch, dtype))


def all_bits(m):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=m)), dtype=torch.float64)


def joint(p, x, z):
    """-E(x, z) of points ``(num, n)`` and hidden states ``(num, m)``, as it is defined."""
    w, b, c, s = p.weights, p.visible_bias, p.hidden_bias, p.scale
    rows = []
    for xi in x:
        square = ((xi - b) ** 2 / (2 * s**2)).sum()
        rows.append(torch.stack([-square + (xi / s**2) @ w @ zj + c @ zj for zj in z]))
    return torch.stack(rows)


# -- the density ---------------------------------------------------------------------------------


def test_energy_and_conditionals_against_all_hidden_states():
    p, x, z = machine(4, 3), torch.randn(10, 4, dtype=torch.float64), all_bits(3)
    log_joint = joint(p, x, z)
    assert_close(p.energy(x), -log_joint.logsumexp(1))
    assert_close(p.free_energy(x), p.energy(x))
    assert_close(p.hidden_given(x[:, None]).log_prob(z), log_joint.log_softmax(1))
    given = p.visible_given(z[:, None])
    assert isinstance(given.base_dist, dist.Normal)
    # of p(x | z) the definition knows ratios
    assert_close(given.log_prob(x) - given.log_prob(x)[:, :1], (log_joint - log_joint[:1]).T)


def test_log_z_by_quadrature():
    grid = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    p = machine(1, 3)
    z = torch.trapezoid((-p.energy(grid[:, None])).exp(), grid)
    assert_close(p.exact_log_normalizer(), z.log())
    p, grid = machine(2, 3), grid[::5]
    density = (-p.energy(torch.cartesian_prod(grid, grid))).exp().reshape(len(grid), -1)
    z = torch.trapezoid(torch.trapezoid(density, grid), grid)
    assert_close(p.exact_log_normalizer(), z.log())


def test_the_mixture_is_the_same_density():
    p, x = machine(4, 3), 3 * torch.randn(20, 4, dtype=torch.float64)
    mixture = p.mixture()
    assert mixture.event_shape == (4,)
    assert_close(mixture.log_prob(x), p.normalized(p.exact_log_normalizer()).log_prob(x))


def test_no_hidden_unit_that_matters():
    # W = 0: x is N(b, s^2), and log Z = sum log(sqrt(2 pi) s) + sum softplus(c)
    _, b, c, s = parameters(4, 3)
    p = GaussianRBM(torch.zeros(4, 3, dtype=torch.float64), b, c, s)
    want = (s * math.sqrt(2 * math.pi)).log().sum() + c.exp().log1p().sum()
    assert_close(p.exact_log_normalizer(), want)
    x = torch.randn(5, 4, dtype=torch.float64)
    normal = dist.Normal(b, s).to_event(1)
    assert_close(p.normalized(want).log_prob(x), normal.log_prob(x))


def test_score():
    # -(x - b - W E[z | x]) / s^2
    p, x = machine(4, 3), torch.randn(10, 4, dtype=torch.float64)
    mean = p.visible_bias + p.hidden_given(x).mean @ p.weights.T
    assert_close(p.score(x), -(x - mean) / p.scale**2)


def test_units():
    # in other units the same density: log p(x / a) = log p'(x) + sum log a
    w, b, c, s = parameters(4, 3)
    p, a = GaussianRBM(w, b, c, s), torch.tensor([0.1, 1.0, 7.0, 100.0], dtype=torch.float64)
    q = GaussianRBM(a[:, None] * w, a * b, c, a * s)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_close(q.mixture().log_prob(a * x), p.mixture().log_prob(x) - a.log().sum())
    assert_close(q.hidden_given(a * x).mean, p.hidden_given(x).mean)


def test_gradient_of_log_z():
    args = tuple(t.requires_grad_() for t in parameters(2, 3))
    assert torch.autograd.gradcheck(lambda *a: GaussianRBM(*a).exact_log_normalizer(), args)


def test_scale_as_a_number():
    w, b, c, _ = parameters(4, 3)
    p, x = GaussianRBM(w, b, c, 0.7), torch.randn(5, 4, dtype=torch.float64)
    q = GaussianRBM(w, b, c, torch.full((4,), 0.7, dtype=torch.float64))
    assert_close(p.energy(x), q.energy(x))
    assert_close(p.exact_log_normalizer(), q.exact_log_normalizer())
    assert GaussianRBM(w, b, c).scale.tolist() == [1.0] * 4


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_batch_of_any_parameter_as_one_by_one(which):
    args = list(parameters(4, 3))
    args[which] = args[which].abs() * (0.5 + torch.rand((2, 3) + args[which].shape).double())
    p, x, z = GaussianRBM(*args), torch.randn(5, 4).double(), all_bits(3)
    assert p.batch_shape == (2, 3)
    xs = x[:, None, None]
    log_z, log_p = p.exact_log_normalizer().expand(2, 3), p.mixture().log_prob(xs)
    noise = p.gibbs_noise(xs.expand(5, 2, 3, 4))
    swept = p.gibbs_sweep(xs.expand(5, 2, 3, 4), noise)
    for i, j in itertools.product(range(2), range(3)):
        one = GaussianRBM(*(t[i, j] if k == which else t for k, t in enumerate(args)))
        assert_close(p.energy(xs)[:, i, j], one.energy(x))
        assert_close(p.visible_given(z[:, None, None]).mean[:, i, j], one.visible_given(z).mean)
        assert_close(log_z[i, j], one.exact_log_normalizer())
        assert_close(log_p[:, i, j], one.mixture().log_prob(x))
        assert_close(swept[:, i, j], one.gibbs_sweep(x, tuple(u[:, i, j] for u in noise)))


def test_under_vmap():
    batched, x = parameters(4, 3, (5,)), torch.randn(6, 4, dtype=torch.float64)

    def both(*args):
        p = GaussianRBM(*args, validate_args=False)
        return p.energy(x), p.exact_log_normalizer()

    energy, log_z = torch.func.vmap(both)(*batched)
    p = GaussianRBM(*batched)
    assert_close(energy, p.energy(x[:, None]).T)
    assert_close(log_z, p.exact_log_normalizer())


@pytest.mark.parametrize("size", [1e3, 1e12])
def test_large_weights_do_not_overflow(size):
    p = GaussianRBM(*(t * size for t in parameters(3, 2, dtype=torch.float32)))
    assert p.exact_log_normalizer().isfinite()
    assert p.energy(size * torch.randn(5, 3)).isfinite().all()


# -- draws ---------------------------------------------------------------------------------------


def smooth(n, m, batch=()):
    """A machine whose hidden units are not all but decided by the visible ones."""
    w, b, c, s = parameters(n, m, batch)
    return GaussianRBM(w / 2, b, c / 2, s + 0.5)


def assert_drawn_from(x, p):
    """Means, second moments and hidden posteriors of independent draws are those of p."""
    mixture, z = p.mixture(), all_bits(p.num_hidden)
    second = mixture.variance + mixture.mean.square()
    weights = mixture.mixture_distribution.probs
    # E[x x'] = diag(s^2) + sum_z p(z) mean(z) mean(z)'
    mean = mixture.component_distribution.mean
    outer = torch.einsum("k,ki,kj->ij", weights, mean, mean) + torch.diag(p.scale.square())
    assert_close(outer.diagonal(), second)
    for statistic, truth in [
        (x, mixture.mean),
        (x[:, :, None] * x[:, None, :], outer),
        (p.hidden_given(x).mean, weights @ z),
    ]:
        error = (statistic.mean(0) - truth) / (statistic.std(0) / len(x) ** 0.5)
        assert error.abs().max() < SIGMAS, error


def test_exact_draws():
    p = smooth(3, 4)
    assert_drawn_from(p.exact_sample((20_000,)), p)
    assert p.expand((2,)).exact_sample((5,)).shape == (5, 2, 3)
    batch = smooth(3, 4, (2,))
    x = batch.exact_sample((20_000,))
    for k in range(2):
        assert_drawn_from(x[:, k], GaussianRBM(*(getattr(batch, a)[k] for a in p.arg_constraints)))


def test_a_sweep_leaves_the_density_invariant_and_forgets():
    p = smooth(3, 2)
    assert isinstance(p, BlockGibbs)
    x = p.exact_sample((20_000,))
    new = p.gibbs_sweep(x, p.gibbs_noise(x))
    assert not torch.equal(new, x)
    assert_drawn_from(new, p)
    x = torch.full_like(x, 2.0)
    for _ in range(100):
        x = p.gibbs_sweep(x, p.gibbs_noise(x))
    assert_drawn_from(x, p)


def test_short_chains():
    # any sampler of continuous densities will do
    p = machine(2, 2, dtype=torch.float32)
    x = p.sample((500,))
    assert x.shape == (500, 2)
    assert_mean(p.score(x)[None], 0.0)  # E[score] = 0


def test_starts_are_where_the_units_are():
    w, b, c, s = parameters(3, 2, dtype=torch.float32)
    p = GaussianRBM(0.1 * w, b + 100, c, s).expand((2,))
    x = p.starting_points((1000,))
    assert (x.shape, x.dtype) == ((1000, 2, 3), torch.float32)
    z = (x.mean((0, 1)) - p.visible_bias - 0.1 * w.sum(1) / 2) / (x.std((0, 1)) / 2000**0.5)
    assert z.abs().max() < SIGMAS


# -- as a distribution ---------------------------------------------------------------------------


def test_expand_pickle_copy_repr():
    p = machine(4, 3).expand((2,))
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    assert p.mixture().batch_shape == (2,)
    assert_close(p.mixture().log_prob(x), machine_of(p).mixture().log_prob(x))
    for clone in [pickle.loads(pickle.dumps(p)), copy.deepcopy(p)]:
        assert_close(clone.energy(x), p.energy(x))
    assert repr(p) == "GaussianRBM(visible=4, hidden=3, batch_shape=(2,), log_normalizer=unknown)"


def machine_of(p):
    return GaussianRBM(p.weights, p.visible_bias, p.hidden_bias, p.scale)


def test_dtypes():
    p = machine(4, 3, dtype=torch.float32)
    x = torch.randn(5, 4)
    assert p.energy(x.double()).dtype == torch.float32
    assert_close(p.energy(x.double()), p.energy(x))
    assert p.gibbs_sweep(x.double(), p.gibbs_noise(x)).dtype == torch.float64
    assert p.exact_sample().dtype == torch.float32
    assert machine(4, 3).exact_sample().dtype == torch.float64


W, B, C = torch.zeros(4, 3), torch.zeros(4), torch.zeros(3)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (torch.ones(3), r"scale must have shape \(\*batch, 4\) beside weights .*got \(3,\)"),
        (torch.ones(4).double(), r"scale has dtype torch.float64"),
        (torch.ones(4).long(), r"scale must be a tensor of floating numbers"),
        (torch.zeros(4), r"parameter scale"),
        (-1.0, r"parameter scale"),
    ],
)
def test_bad_scales(scale, says):
    with pytest.raises(ValueError, match=says):
        GaussianRBM(W, B, C, scale)


def test_bad_input():
    with pytest.raises(ValueError, match=r"visible_bias must have shape"):
        GaussianRBM(W, torch.zeros(5), C)
    with pytest.raises(ValueError, match=r"13 units, 2\^13 states, and max_units=12"):
        GaussianRBM(torch.zeros(4, 13), B, torch.zeros(13)).mixture()
    with pytest.raises(ValueError, match=r"26 units.*annealed importance sampling"):
        GaussianRBM(torch.zeros(4, 26), B, torch.zeros(26)).exact_log_normalizer()
    p = GaussianRBM(W, B, C)
    assert not p.supports_tempering
    with pytest.raises(ValueError, match=r"not e\^\{-beta F\}"):
        p.gibbs_sweep(B, p.gibbs_noise(B), torch.tensor(0.5))
