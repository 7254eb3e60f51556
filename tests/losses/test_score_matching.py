"""Score matching: the written objective, closed forms, unbiased estimates of it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.autograd.functional import hessian, jacobian

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import DenoisingScoreMatching, ScoreMatching, SlicedScoreMatching
from pyro_ebm.losses.score.weighted_score import boundary_weight
from pyro_ebm.nn import MLPEnergy
from tests.statistics import SIGMAS, assert_mean_of_rows

ESTIMATES = {
    "hutchinson": lambda: ScoreMatching(method="hutchinson"),
    "gaussian": lambda: ScoreMatching(method="hutchinson", distribution="gaussian"),
    "sphere": lambda: ScoreMatching(method="hutchinson", distribution="sphere"),
    "sliced": lambda: SlicedScoreMatching(),
    "sliced-plain": lambda: SlicedScoreMatching(variance_reduced=False),
    "sliced-many": lambda: SlicedScoreMatching(num_projections=4, distribution="gaussian"),
}


def no_guide(*args):
    pass


def network(dim, seed=1):
    torch.manual_seed(seed)
    net = MLPEnergy(dim, hidden=(6,)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    return net


def model_of(net, **kwargs):
    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, x.shape[1:], **kwargs), obs=x)

    return model


def family(energy, start, **kwargs):
    """A model with one vector of parameters ``t``: energy ``E(t, x)``."""

    def model(x):
        t = pyro.param("t", torch.as_tensor(start).detach().clone().double())
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: energy(t, x), x.shape[1:], **kwargs)
            pyro.sample("x", p, obs=x)

    return model


def groups_of_gradients(loss, model, x, groups=50):
    """The mean gradient in ``t`` of each of several equal groups of rows, ``(groups, ...)``."""
    grads = []
    for part in x.reshape((groups, -1) + x.shape[1:]):
        if "t" in pyro.get_param_store():
            pyro.param("t").grad = None
        loss.loss_and_grads(model, no_guide, part)
        grads.append(pyro.param("t").grad / len(part))
    return torch.stack(grads)


def gradient(loss, model, net, x):
    for p in net.parameters():
        p.grad = None
    value = loss.loss_and_grads(model, no_guide, x)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return value, torch.cat([g.flatten() for g in grads])


# -- the written objective -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
def test_the_exact_objective_is_as_written(shape):
    net, x = network(shape), torch.randn(5, *shape).double()
    value, got = gradient(ScoreMatching(), model_of(net), net, x)

    def objective():  # sum_i d_i s_i + s_i^2 / 2 with s = -grad E, by torch's own derivatives
        total = 0.0
        for row in x:
            s = -jacobian(net, row, create_graph=True)
            h = -hessian(net, row, create_graph=True).reshape(row.numel(), row.numel())
            total = total + h.trace() + s.square().sum() / 2
        return total

    want = torch.autograd.grad(objective(), list(net.parameters()), allow_unused=True)
    want = [torch.zeros_like(p) if g is None else g for p, g in zip(net.parameters(), want)]
    torch.testing.assert_close(got, torch.cat([g.flatten() for g in want]))
    assert value == pytest.approx(objective().item())


@pytest.mark.parametrize(
    "make", [ScoreMatching, ESTIMATES["sliced-plain"], lambda: DenoisingScoreMatching(0.3)]
)
def test_gradients_are_finite_differences_of_the_value(make):
    net, x = network(2), torch.randn(6, 2).double()
    loss, model = make(), model_of(net)
    torch.manual_seed(0)
    _, grad = gradient(loss, model, net, x)
    weight, h = net.layers[0].weight, 1e-5
    for index in ((0, 0), (3, 1)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * h
            torch.manual_seed(0)
            values.append(loss.loss(model, no_guide, x))
            with torch.no_grad():
                weight[index] -= sign * h
        flat = index[0] * 2 + index[1]
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(grad[flat]), rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_have_the_mean_of_the_exact_objective(name):
    net, x = network(3), torch.randn(1, 3).double()
    _, exact = gradient(ScoreMatching(), model_of(net), net, x)
    many, groups = x.expand(400, 3), 40
    draws = []
    for _ in range(groups):
        _, grad = gradient(ESTIMATES[name](), model_of(net), net, many)
        draws.append(grad / len(many))
    draws = torch.stack(draws)
    error = draws.std(0) / groups**0.5
    assert_mean_of_rows(draws, exact)
    assert (error.max() / exact.abs().max()) < 0.1


# -- closed forms --------------------------------------------------------------------------------


def test_on_a_gaussian_it_is_maximum_likelihood():
    # J is quadratic in the natural parameters; its minimum has the mean and the covariance of data
    x = torch.randn(50, 2).double() @ torch.tensor([[1.0, 0.4], [0.0, 0.7]]).double() + 3.0
    mean, precision = x.mean(0), torch.linalg.inv(x.T.cov(correction=0))
    start = torch.cat([precision.flatten(), mean])

    def energy(t, x):
        centred = x - t[4:]
        return torch.einsum("...i,ij,...j->...", centred, t[:4].reshape(2, 2), centred) / 2

    grad = groups_of_gradients(ScoreMatching(), family(energy, start), x, groups=1)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-10, rtol=0)
    pyro.clear_param_store()
    grad = groups_of_gradients(ScoreMatching(), family(energy, start + 0.1), x, groups=1)
    assert grad.abs().max() > 1e-3  # whatever the data, and no rounding error


def test_the_weighted_objective_on_the_half_line_is_the_closed_form():
    # Gamma(a + 1, b): s = a / x - b, w = x^2:  J = a - 2 b x + (a - b x)^2 / 2, least where
    # b = m1 / (m2 - m1^2) and a = b m1 - 1, with the moments m of the data
    x = dist.Gamma(3.0, 2.0).sample((100,)).double()
    m1, m2 = x.mean(), x.square().mean()
    b = m1 / (m2 - m1**2)
    best = torch.stack([b * m1 - 1, b])

    def energy(t, x):
        return -t[0] * x.log() + t[1] * x

    model = family(energy, best, support=constraints.positive)
    grad = groups_of_gradients(ScoreMatching(), model, x, groups=1)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-9, rtol=0)
    pyro.param("t").data.add_(0.2)
    a, b = pyro.param("t").detach()
    written = (a - 2 * b * x + (a - b * x) ** 2 / 2).sum()
    assert ScoreMatching().loss(model, no_guide, x) == pytest.approx(written.item())


BOUNDED = {
    "gamma": (
        lambda n: dist.Gamma(3.0, 2.0).sample((n,)),
        lambda t, x: -t[0] * x.log() + t[1] * x,
        [2.0, 2.0],
        constraints.positive,
    ),
    "truncated exponential": (
        lambda n: -(1 - torch.rand(n) * (1 - math.exp(-2.0))).log() / 2.0,
        lambda t, x: t[0] * x,
        [2.0],
        constraints.unit_interval,
    ),
    "beta": (
        lambda n: dist.Beta(2.0, 3.0).sample((n,)),
        lambda t, x: -t[0] * x.log() - t[1] * (1 - x).log(),
        [1.0, 2.0],
        constraints.unit_interval,
    ),
    "shifted box": (
        lambda n: 3 + 2 * dist.Beta(2.0, 3.0).sample((n, 2)),
        lambda t, x: (-t[0] * (x - 3).log() - t[1] * (5 - x).log()).sum(-1),
        [1.0, 2.0],
        constraints.interval(3.0, 5.0),
    ),
    "upper half-line": (
        lambda n: 1 - dist.Gamma(3.0, 2.0).sample((n,)),
        lambda t, x: -t[0] * (1 - x).log() + t[1] * (1 - x),
        [2.0, 2.0],
        constraints.less_than(1.0),
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("make", [ScoreMatching, SlicedScoreMatching, ESTIMATES["sliced-plain"]])
def test_no_gradient_is_expected_at_the_truth_on_bounded_supports(make, name):
    draw, energy, truth, support = BOUNDED[name]
    x = draw(20_000).double()
    model = family(energy, truth, support=support)
    grads = groups_of_gradients(make(), model, x)
    assert_mean_of_rows(grads)
    # without the weight the boundary would show: elsewhere the gradient is not 0
    pyro.param("t").data.mul_(1.3)
    grads = groups_of_gradients(make(), model, x)
    assert (grads.mean(0) / (grads.std(0) / 50**0.5)).abs().max() > 2 * SIGMAS


@pytest.mark.parametrize("control_variate", [False, True])
def test_denoising_fits_the_noised_density(control_variate):
    # N(0, s^2) is fitted by N(0, s^2 + sigma^2)
    s, sigma = 0.8, 0.6
    x = s * torch.randn(40_000).double()
    loss = DenoisingScoreMatching(sigma, control_variate=control_variate)
    model = family(lambda t, x: t * x**2 / 2, 1 / (s**2 + sigma**2))
    assert_mean_of_rows(groups_of_gradients(loss, model, x))
    pyro.param("t").data.fill_(1 / s**2)
    grads = groups_of_gradients(loss, model, x)
    assert grads.mean() / (grads.std() / 50**0.5) > 2 * SIGMAS


def test_the_control_variate_takes_the_variance_of_a_small_sigma():
    x = torch.randn(5000).double()
    model = family(lambda t, x: t * x**2 / 2, 1.0)
    spreads = []
    for control_variate in (False, True):
        loss = DenoisingScoreMatching(0.01, control_variate=control_variate)
        # J / sigma^2 tends to the objective of score matching
        spreads.append(float((groups_of_gradients(loss, model, x) / 1e-4).std()))
    exact = groups_of_gradients(ScoreMatching(), model, x)
    assert spreads[0] > 20 * exact.std()
    assert spreads[1] < 3 * exact.std()


def test_each_row_draws_one_of_several_sigmas():
    # each sigma has a term of its own: the gradient is 0 where the mean over sigmas is
    s, sigmas = 1.0, [0.3, 0.9]
    x = s * torch.randn(40_000).double()
    # dJ / dt of sigma: E (sigma s(x') + xi) sigma ds/dt = sigma^2 (t (s^2 + sigma^2) - 1)
    best = sum(v**2 for v in sigmas) / sum(v**2 * (s**2 + v**2) for v in sigmas)
    model = family(lambda t, x: t * x**2 / 2, best)
    assert_mean_of_rows(groups_of_gradients(DenoisingScoreMatching(sigmas), model, x))


def test_a_constant_normalizer_and_a_base_take_no_harm():
    x = torch.randn(10).double()

    def model(x):
        t = pyro.param("t", torch.tensor(0.5).double())
        log_z = pyro.param("log_z", torch.tensor(3.0).double())
        p = UnnormalizedEnergy(
            lambda x: t * x**2 / 2, base=dist.Normal(0.0, 1.0), log_normalizer=log_z
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    loss = ScoreMatching()
    value = loss.loss_and_grads(model, no_guide, x)  # s = -(1 + t) x
    torch.testing.assert_close(value, float((-1.5 + 1.5**2 * x**2 / 2).sum()))
    torch.testing.assert_close(pyro.param("t").grad, (-1 + 1.5 * x**2).sum())
    assert pyro.param("log_z").grad is None


def test_a_linear_energy_has_no_hessian():
    x = torch.randn(10).double()
    model = family(lambda t, x: t * x, 0.5)
    for make in (ScoreMatching, SlicedScoreMatching):
        assert make().loss(model, no_guide, x) == pytest.approx(10 * 0.125)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreMatching(method="exactly"), r"method must be one of.*'exactly'"),
        (lambda: ScoreMatching(num_projections=0), "num_projections"),
        (lambda: SlicedScoreMatching(num_projections=0), "num_projections"),
        (lambda: SlicedScoreMatching(distribution="cauchy"), "'cauchy'"),
        (lambda: ScoreMatching(distribution="cauchy"), "'cauchy'"),
        (lambda: DenoisingScoreMatching(0.0), "sigma must be positive"),
        (lambda: DenoisingScoreMatching([0.1, float("nan")]), "sigma must be positive"),
        (lambda: DenoisingScoreMatching([]), "sigma must be positive"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_supports_with_an_unknown_boundary():
    def model(x):
        p = UnnormalizedEnergy(lambda x: x.square().sum(-1), (3,), support=constraints.simplex)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    x = dist.Dirichlet(torch.ones(3)).sample((4,))
    with pytest.raises(ValueError, match=r"'x'.*no weight.*ContrastiveDivergence"):
        ScoreMatching().loss_and_grads(model, no_guide, x)
    with pytest.raises(ValueError, match=r"'x'.*noise would leave the support.*ScoreMatching"):
        DenoisingScoreMatching().loss_and_grads(model, no_guide, x)


def test_integer_data_have_no_score():
    def model(x):
        p = UnnormalizedEnergy(lambda x: x * 1.0, support=constraints.integer_interval(0, 5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    with pytest.raises(ValueError, match="score matching has no weight"):
        ScoreMatching().loss_and_grads(model, no_guide, torch.tensor([1.0, 2.0]))


def test_weights_vanish_at_the_boundary_only():
    x = torch.tensor([0.0, 0.5, 1.0])
    for support in (constraints.real, constraints.independent(constraints.real, 1)):
        assert torch.equal(boundary_weight(support, x), torch.ones_like(x))
    torch.testing.assert_close(
        boundary_weight(constraints.unit_interval, x), torch.tensor([0.0, 0.0625, 0.0])
    )
    torch.testing.assert_close(boundary_weight(constraints.positive, x), x**2)
    torch.testing.assert_close(boundary_weight(constraints.less_than(1.0), x), (1 - x) ** 2)
    assert boundary_weight(constraints.simplex, x) is None
