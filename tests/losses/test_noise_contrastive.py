"""Noise-contrastive estimation: the written objective, log Z, and the asymptotic variance."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import SGD, Adam
from torch import nn
from torch.nn.functional import logsigmoid

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import NCE, RankingNCE, gaussian_noise
from pyro_ebm.losses.noise.noise import Noise
from pyro_ebm.nn import MLPEnergy
from tests.statistics import SIGMAS, assert_mean_of_rows

LOG_Z = 0.5 * math.log(2 * math.pi)


def model_of(energy=lambda lam, x: lam * x**2 / 2, lam=1.5, log_z=0.4, **kwargs):
    def model(x):
        lam_ = pyro.param("lam", torch.tensor(lam, dtype=x.dtype))
        log_z_ = pyro.param("log_z", torch.tensor(log_z, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: energy(lam_, x), log_normalizer=log_z_, **kwargs)
            pyro.sample("x", p, obs=x)

    return model


def guide_of(noise):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", noise)

    return guide


def watched(loss):
    """The loss, and the list that its noise points go to."""
    drawn, draw = [], loss.noise_of

    def noise_of(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    loss.noise_of = noise_of
    return loss, drawn


# -- the written objective -----------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, 4])
def test_the_objective_is_as_written(ratio):
    x, q = torch.randn(20).double(), dist.Normal(torch.tensor(0.2).double(), 1.7)
    loss, drawn = watched(NCE(noise_ratio=ratio))
    value = loss.loss_and_grads(model_of(), guide_of(q), x)
    noise = drawn[0][0]
    assert noise.shape == (ratio, 20)
    lam = torch.tensor(1.5).double().requires_grad_()
    log_z = torch.tensor(0.4).double().requires_grad_()

    def logit(u):
        return -lam * u**2 / 2 - log_z - q.log_prob(u) - math.log(ratio)

    objective = logsigmoid(logit(x)).sum() + logsigmoid(-logit(noise)).sum()
    assert value == pytest.approx(-objective.item())
    want = torch.autograd.grad(-objective, [lam, log_z])
    torch.testing.assert_close((pyro.param("lam").grad, pyro.param("log_z").grad), want)


def test_the_ranking_objective_is_as_written():
    x, q = torch.randn(20).double(), dist.Normal(torch.tensor(0.2).double(), 1.7)
    noise = q.expand([20]).sample((3,))
    loss = RankingNCE(noise_ratio=3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", q)
        torch.manual_seed(0)  # as for the noise above, after x
        torch.randn(20)

    def model(x):
        lam = pyro.param("lam", torch.tensor(1.5).double())
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2), obs=x)

    value = loss.loss_and_grads(model, guide, x)
    lam = torch.tensor(1.5).double().requires_grad_()
    everything = torch.cat([x[None], noise])
    g = -lam * everything**2 / 2 - q.log_prob(everything)
    objective = (g[0].exp() / g.exp().sum(0)).log().sum()
    assert value == pytest.approx(-objective.item())
    (want,) = torch.autograd.grad(-objective, lam)
    torch.testing.assert_close(pyro.param("lam").grad, want)


def test_the_noise_gets_no_gradient():
    def guide(x):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 2.0))

    for loss in (NCE(), RankingNCE()):
        loss.loss_and_grads(model_of(), guide, torch.randn(5))
        assert pyro.param("m").grad is None


def test_no_gradient_is_expected_at_the_truth():
    n, groups = 1000, 60
    q = dist.Normal(0.0, 2.0)
    model, guide = model_of(lam=1.0, log_z=LOG_Z), guide_of(q)
    for make in (lambda: NCE(noise_ratio=3), lambda: RankingNCE(noise_ratio=3)):
        grads = []
        for _ in range(groups):
            for p in pyro.get_param_store().values():
                p.grad = None
            make().loss_and_grads(model, guide, torch.randn(n))
            grads.append(
                torch.stack(
                    [
                        p.grad if p.grad is not None else p * 0
                        for p in (pyro.param("lam"), pyro.param("log_z"))
                    ]
                ).detach()
                / n
            )
        grads = torch.stack(grads)
        assert_mean_of_rows(grads)
        assert grads[:, 0].std() > 1e-3


def test_diagnostics_tell_easy_from_hard():
    x = torch.randn(4000)
    for q, low, high in ((dist.Normal(0.0, 1.0), 0.45, 0.55), (dist.Normal(30.0, 1.0), 0.99, 1.0)):
        pyro.clear_param_store()
        loss = NCE(noise_ratio=5)
        SVI(model_of(lam=1.0, log_z=LOG_Z), guide_of(q), SGD({"lr": 0.0}), loss).step(x)
        assert low <= loss.diagnostics["accuracy"] <= high
        assert loss.diagnostics["log_normalizer"] == pytest.approx(LOG_Z)


@pytest.mark.parametrize("make", [lambda: NCE(5), lambda: RankingNCE(5)], ids=["nce", "ranking"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_share_of_the_data_in_the_tail_of_the_noise(make, masked):
    x = torch.randn(4000)
    x[:1000] *= 1 + 99 * masked
    model = pyro.poutine.mask(model_of(), mask=(torch.arange(4000) >= 1000) | (not masked))
    for width, low, high in ((0.5, 0.15, 0.25), (1.0, 0.001, 0.019), (2.0, 0.0, 0.001)):
        loss = make()
        loss.loss_and_grads(model, guide_of(dist.Normal(0.0, width)), x)
        # P(|x| > 2.576 width) is .198, .01, 3e-7; errors are .008, .002, 1e-5
        assert low <= loss.diagnostics["noise_tail"] <= high


# -- log Z ---------------------------------------------------------------------------------------


def test_log_z_is_learned_beside_the_energy():
    x = torch.randn(4000) / 2**0.5
    svi = SVI(
        model_of(lam=1.0, log_z=0.0),
        guide_of(dist.Normal(0.0, 1.2)),
        Adam({"lr": 0.04}),
        NCE(noise_ratio=10),
    )
    tail = []
    for step in range(320):
        svi.step(x)
        if step >= 200:
            tail.append(torch.stack([pyro.param("lam"), pyro.param("log_z")]).detach().clone())
    lam, log_z = torch.stack(tail).mean(0)
    assert (lam / 2 - 1).abs() < SIGMAS * 1.3 * (2 / 4000) ** 0.5
    assert (log_z - (LOG_Z - 0.5 * math.log(2.0))).abs() < 0.06


def test_log_z_starts_from_importance_sampling():
    x, q = torch.randn(500), dist.Normal(0.0, 2.0)
    loss, drawn = watched(NCE(noise_ratio=20, init_log_normalizer=True))
    svi = SVI(model_of(lam=3.0, log_z=-7.0), guide_of(q), SGD({"lr": 0.0}), loss)
    svi.evaluate_loss(x)  # touches nothing
    assert pyro.param("log_z").item() == -7.0
    svi.step(x)
    noise = drawn[-1][0]
    weights = (-1.5 * noise**2 - q.log_prob(noise)).exp()
    assert pyro.param("log_z").item() == pytest.approx(weights.mean().log().item(), abs=1e-5)
    error = weights.std() / weights.mean() / weights.numel() ** 0.5
    assert (pyro.param("log_z") - (LOG_Z - 0.5 * math.log(3.0))).abs() < SIGMAS * error
    pyro.param("log_z").data.fill_(1.0)
    svi.step(x)
    assert pyro.param("log_z").item() == 1.0  # once
    again = NCE(init_log_normalizer=True)  # nor after loading
    again.load_state_dict(loss.state_dict())
    SVI(model_of(), guide_of(q), SGD({"lr": 0.0}), again).step(x)
    assert pyro.param("log_z").item() == 1.0


def test_a_log_z_for_each_batch_element_has_its_own_start():
    scales = torch.tensor([0.5, 2.0])

    def model(x):
        log_z = pyro.param("log_z", torch.zeros(2))
        p = UnnormalizedEnergy(
            lambda x: (x / scales) ** 2 / 2, batch_shape=(2,), log_normalizer=log_z
        )
        with pyro.plate("data", len(x), dim=-2), pyro.plate("kinds", 2, dim=-1):
            pyro.sample("x", p, obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("kinds", 2, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 2.5))

    SVI(model, guide, SGD({"lr": 0.0}), NCE(200, init_log_normalizer=True)).step(torch.randn(50, 2))
    torch.testing.assert_close(pyro.param("log_z").detach(), LOG_Z + scales.log(), atol=0.1, rtol=0)


def test_log_z_may_have_a_learning_rate_of_its_own():
    def rates(name):
        return {"lr": 0.5 if name == "log_z" else 0.0}

    svi = SVI(model_of(), guide_of(dist.Normal(0.0, 2.0)), SGD(rates), NCE())
    svi.step(torch.randn(10))
    assert pyro.param("lam").item() == 1.5
    assert pyro.param("log_z").item() != pytest.approx(0.4)


def test_self_normalized_needs_none():
    x = torch.randn(3000)

    def model(x):
        lam, c = pyro.param("lam", torch.tensor(2.0)), pyro.param("c", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2 + c), obs=x)

    guide = guide_of(dist.Normal(0.0, 1.5))
    with pytest.raises(ValueError, match=r"'x' has no log_normalizer.*self_normalized"):
        NCE().loss_and_grads(model, guide, x)
    svi = SVI(model, guide, Adam({"lr": 0.05}), NCE(5, self_normalized=True))
    for _ in range(250):
        svi.step(x)
    assert (pyro.param("c") - LOG_Z).abs() < 0.1


def test_an_init_without_a_parameter():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(torch.square, log_normalizer=1.0), obs=x)

    with pytest.raises(ValueError, match=r"init_log_normalizer=True needs a parameter.*'x'"):
        NCE(init_log_normalizer=True).loss_and_grads(
            model, guide_of(dist.Normal(0.0, 1.0)), torch.randn(3)
        )


def test_an_init_of_an_element_for_each_class():
    label = torch.tensor([0, 1, 1])

    def model(x):
        log_z = pyro.param("log_z", torch.zeros(2))[label]
        with pyro.plate("data", len(x)):
            known = {"log_normalizer": log_z, "learned_normalizer": True}
            pyro.sample("x", UnnormalizedEnergy(torch.square, batch_shape=(3,), **known), obs=x)

    loss, guide = NCE(init_log_normalizer=True), guide_of(dist.Normal(0.0, 1.0))
    with pytest.raises(
        ValueError, match=r"'x', of shape \(3,\), is computed from one.* leave init"
    ):
        loss.loss_and_grads(model, guide, torch.randn(3))
    NCE().loss_and_grads(model, guide, torch.randn(3))


def test_ranking_recovers_a_conditional_energy():
    # the rows' log Z(c) = -log(lam(c)) / 2 + const all differ, and none is learned
    c = torch.randn(4000)
    x = 0.8 * c + torch.randn(4000) * (-0.3 * c).exp()

    def model(x):
        w, v = pyro.param("w", torch.tensor(0.0)), pyro.param("v", torch.tensor(0.0))
        p = UnnormalizedEnergy(lambda x: (2 * v * c).exp() * (x - w * c) ** 2 / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    svi = SVI(model, guide_of(dist.Normal(0.0, 2.5)), Adam({"lr": 0.04}), RankingNCE(20))
    tail = []
    for step in range(260):
        svi.step(x)
        if step >= 140:
            tail.append(torch.stack([pyro.param("w"), pyro.param("v")]).detach().clone())
    w, v = torch.stack(tail).mean(0)
    # standard errors of maximum likelihood are .016 and .011
    assert (w - 0.8).abs() < SIGMAS * 0.016 * 1.2
    assert (v - 0.3).abs() < SIGMAS * 0.011 * 1.2


def test_by_default_the_variance_is_near_that_of_maximum_likelihood():
    assert 1 + 1 / NCE().noise_ratio <= 1.25  # times that, of noise of the data's own width


@pytest.mark.slow
@pytest.mark.parametrize(
    ("s2", "ratio", "lam_variance", "c_variance"),
    [
        (0.25, 1, 23.96, None),
        (1.0, 1, 2.00, None),
        (1.0, 4, 1.25, None),
        (1.0, 10, 1.10, None),
        (4.0, 1, 1.50, 1.815),
        (4.0, 10, 1.061, 0.645),
        (4.0, 100, 1.007, 0.515),
        (0.25, 10, 6.47, None),
    ],
)
def test_the_asymptotic_variance(s2, ratio, lam_variance, c_variance):
    # many fits at once: each column is a data set with its own parameters
    fits, n = {
        1: (600, 4000 if s2 < 1 else 1000),
        4: (400, 1000),
        10: (400, 1000),
        100: (300, 400),
    }[ratio]
    x, q = torch.randn(n, fits).double(), dist.Normal(torch.tensor(0.0).double(), s2**0.5)
    noise = q.sample((ratio, n, fits))
    fixed = [Noise(noise, q.log_prob(noise), q.log_prob(x))]
    loss = NCE(noise_ratio=ratio)
    loss.noise_of = lambda site, fn: fixed[0]

    def model(lam, log_z):
        with pyro.plate("rows", n, dim=-2), pyro.plate("fits", fits, dim=-1):
            p = UnnormalizedEnergy(
                lambda x: lam * x**2 / 2, batch_shape=(fits,), log_normalizer=log_z
            )
            pyro.sample("x", p, obs=x)

    def guide(lam, log_z):
        with pyro.plate("rows", n, dim=-2), pyro.plate("fits", fits, dim=-1):
            pyro.sample("x", q)

    theta = torch.stack([torch.ones(fits), torch.full((fits,), LOG_Z)]).double().requires_grad_()
    for _ in range(12):  # Newton: the objective is concave, with a 2 x 2 Hessian for each fit
        value = loss.differentiable_loss(model, guide, theta[0], theta[1])
        (grad,) = torch.autograd.grad(value, theta, create_graph=True)
        rows = [torch.autograd.grad(g.sum(), theta, retain_graph=True)[0] for g in grad]
        hessian = torch.stack(rows).permute(2, 0, 1)
        step = torch.linalg.solve(hessian, grad.detach().T[..., None])[..., 0].T
        theta = (theta - step).detach().requires_grad_()
    assert step.abs().max() < 1e-8
    lam, log_z = theta.detach()
    tolerance = SIGMAS * (2 / fits) ** 0.5 + 20 * lam_variance / n  # Monte Carlo, and a finite n
    # maximum likelihood has n Var = 2 lam^2
    assert abs(float(lam.var()) * n / 2 / lam_variance - 1) < tolerance
    if c_variance is not None:
        assert abs(float(log_z.var()) * n / c_variance - 1) < tolerance


# -- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("full_covariance", [True, False])
def test_gaussian_noise_matches_moments(event, full_covariance):
    x = torch.randn(20_000, *event).cumsum(-1) * 2 + 5 if event else torch.randn(20_000) * 2 + 5
    q = gaussian_noise(x, width=1.5, full_covariance=full_covariance)
    assert q.event_shape == event
    assert q.batch_shape == ()
    draws = q.sample((20_000,)).reshape(20_000, -1)
    flat = x.reshape(20_000, -1)
    scale = flat.std(0)
    assert ((draws.mean(0) - flat.mean(0)).abs() < SIGMAS * 2 * scale / 20_000**0.5).all()
    assert ((draws.std(0) / (1.5 * scale) - 1).abs() < 0.05).all()
    if full_covariance and flat.shape[-1] > 1:
        assert (torch.corrcoef(draws.T) - torch.corrcoef(flat.T)).abs().max() < 0.05
    assert q.log_prob(x).isfinite().all()


def test_gaussian_noise_of_degenerate_data():
    x = torch.randn(10, 1).expand(10, 30) * torch.arange(30)  # rank 1, and a constant column
    with pytest.warns(UserWarning, match="1 of the data's 30 elements are nearly constant"):
        q = gaussian_noise(x)
    assert q.log_prob(q.sample((5,))).isfinite().all()
    with pytest.raises(ValueError, match="two or more points"):
        gaussian_noise(x[:1])
    with pytest.raises(ValueError, match="width > 0"):
        gaussian_noise(x, width=0.0)
    with pytest.raises(ValueError, match="NaN"):
        gaussian_noise(x / 0)


@pytest.mark.parametrize("n", [20, 104, 2000])
def test_gaussian_noise_of_few_rows(n):
    """It is nearer to N(0, I + 1 1^T), that of the data, than the Gaussian of their variances.

    Also for fewer rows than elements, whose own covariance is singular. The mean of log q is
    maximal at the density of the points.
    """
    d = 64
    x, new = (torch.randn(m, d) + torch.randn(m, 1) for m in (n, 4000))
    full, diagonal = (
        gaussian_noise(x, 1.0, full_covariance=full).log_prob(new).mean() for full in (True, False)
    )
    assert full > diagonal
    if n > 20 * d:  # the estimate of d means and d (d + 1) / 2 covariances costs half of them / n
        truth = dist.MultivariateNormal(torch.zeros(d), torch.eye(d) + 1).log_prob(new).mean()
        assert truth - full < 1.2 * d * (d + 3) / 4 / n


@pytest.mark.parametrize("full_covariance", [True, False])
def test_gaussian_noise_of_pixels_that_hold_one_value(full_covariance):
    x = torch.randn(500, 4)
    x[:, 0] = 3.0
    x[:, 1] *= torch.rand(500) < 0.05  # 0 in 95 of 100 rows
    x[:, 2] *= 0.01  # small, but no constant: its own width
    with pytest.warns(UserWarning, match="2 of the data's 4 elements .* Add noise"):
        q = gaussian_noise(x, 1.0, full_covariance)
    spread = x.var(0).mean().sqrt()
    want = torch.stack([0.1 * spread, x[:, 1].std().clamp(min=0.1 * spread), x[:, 2].std()])
    assert torch.allclose(q.variance[:3].sqrt(), want, rtol=1e-4)


class Unscored(dist.Normal):
    def log_prob(self, value):
        raise NotImplementedError

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Unscored, _instance))


@pytest.mark.parametrize("make", [NCE, RankingNCE])
@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), r"event shape \(5,\) and \(2,\)"),
        (dist.Exponential(1.0).mask(True), "lives on .* and has no density at some of the data"),
        (UnnormalizedEnergy(torch.square), "'x' is an energy without its log Z"),
        (Unscored(0.0, 1.0), "'x', Unscored, cannot be scored"),
    ],
)
def test_noise_that_will_not_do(make, noise, message):
    with pytest.raises(ValueError, match=message):
        make().loss_and_grads(model_of(), guide_of(noise), -torch.ones(5))


@pytest.mark.parametrize("make", [NCE, RankingNCE])
def test_noise_that_leaves_the_support(make):
    model = model_of(support=constraints.positive)
    with pytest.raises(ValueError, match=r"noise at site 'x' leaves the energy's support"):
        make().loss_and_grads(model, guide_of(dist.Normal(0.0, 1.0)), torch.ones(50))
    make().loss_and_grads(model, guide_of(dist.Exponential(1.0)), torch.ones(50))


@pytest.mark.parametrize("make", [NCE, RankingNCE])
def test_a_guide_without_noise(make):
    with pytest.raises(ValueError, match=r"needs noise.*pyro.sample\('x', noise\)"):
        make().loss_and_grads(model_of(), lambda x: None, torch.ones(5))
    for ratio in (0, 1.5, True):
        with pytest.raises(ValueError, match="noise_ratio must be an integer"):
            make(noise_ratio=ratio)


def test_a_known_energy_is_noise():
    q = UnnormalizedEnergy(lambda x: x**2 / 8, log_normalizer=LOG_Z + math.log(2.0), num_steps=5)
    loss = NCE()
    loss.loss_and_grads(model_of(), guide_of(q), torch.randn(20))
    assert pyro.param("lam").grad.isfinite()


def test_a_network_learns_a_density():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1500) * 0.5 - 1.5, torch.randn(1500) * 0.5 + 1.5])
    net, log_z = MLPEnergy((), hidden=(32,)), nn.Parameter(torch.zeros(()))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, log_normalizer=log_z), obs=x)

    module = NCE(5, init_log_normalizer=True)(model, guide_of(gaussian_noise(x)))
    optimiser = torch.optim.Adam([*net.parameters(), log_z], lr=0.01)
    for _ in range(250):
        optimiser.zero_grad()
        module(x).backward()
        optimiser.step()
    grid = torch.linspace(-5, 5, 1001)
    log_q = (-net(grid) - log_z).detach()
    truth = (
        dist.Normal(-1.5, 0.5).log_prob(grid).exp() + dist.Normal(1.5, 0.5).log_prob(grid).exp()
    ) / 2
    assert float(torch.trapezoid(log_q.exp(), grid)) == pytest.approx(1.0, abs=0.06)
    assert float(torch.trapezoid((log_q.exp() - truth).abs(), grid)) < 0.12
