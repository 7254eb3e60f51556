"""Contrastive divergence: its gradient, its chains, its fixed point."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import ContrastiveDivergence
from pyro_ebm.mcmc import LangevinKernel, MHKernel
from pyro_ebm.nn import MLPEnergy

SIGMAS = 4.5
FIXED = {"adapt_step_size": False}


def no_guide(*args):
    pass


def watched(loss):
    """The loss, and the list that its negatives go to."""
    negatives, run = [], loss.negatives.run

    def run_chains(*args):
        found = run(*args)
        negatives.append(found.x)
        return found

    loss.negatives.run = run_chains
    return loss, negatives


def model_of(precision=1.5, **kwargs):
    def model(x):
        lam = pyro.param("lam", torch.tensor(precision, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2, **kwargs), obs=x)

    return model


def slope(loss, model, x):
    if "lam" in pyro.get_param_store():
        pyro.param("lam").unconstrained().grad = None
    loss.loss_and_grads(model, no_guide, x)
    return pyro.param("lam").unconstrained().grad


# -- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_the_gradient_is_the_contrast(persistent):
    # s (sum_i m_i grad E(x_i) - (sum_i m_i) mean_c grad E(x'_c)), negatives of masked rows left out
    torch.manual_seed(1)
    net, x, mask = (
        MLPEnergy(2, hidden=(8,)).double(),
        torch.randn(10, 2).double(),
        torch.rand(10) < 0.6,
    )
    loss, negatives = watched(ContrastiveDivergence(num_steps=3, persistent=persistent))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", 40, subsample=torch.arange(10)), poutine.mask(mask=mask):
            pyro.sample("x", UnnormalizedEnergy(net, (2,)), obs=x)

    value = loss.loss_and_grads(model, no_guide, x)
    got = [p.grad.clone() for p in net.parameters()]
    below = net(negatives[0])
    contrast = mask.sum() * below.mean() if persistent else below[mask].sum()
    objective = 4 * (net(x)[mask].sum() - contrast)
    want = torch.autograd.grad(objective, list(net.parameters()))
    torch.testing.assert_close(got, list(want))
    assert value == pytest.approx(objective.item())


def test_the_energy_penalty_is_as_written():
    net, x = MLPEnergy(1, hidden=(4,)), torch.randn(10, 1)
    loss, negatives = watched(ContrastiveDivergence(energy_penalty=0.3))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", 10):
            pyro.sample("x", UnnormalizedEnergy(net, (1,)), obs=x)

    loss.loss_and_grads(model, no_guide, x)
    got = [p.grad.clone() for p in net.parameters()]
    up, down = net(x), net(negatives[0])
    objective = (up - down + 0.3 * (up**2 + down**2)).sum()
    torch.testing.assert_close(got, list(torch.autograd.grad(objective, list(net.parameters()))))


def test_a_learned_base_has_its_gradient():
    x = torch.randn(30)
    loss, negatives = watched(ContrastiveDivergence())

    def model(x):
        m = pyro.param("m", torch.tensor(0.3))
        p = UnnormalizedEnergy(lambda x: x**2 / 4, base=dist.Normal(m, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    loss.loss_and_grads(model, no_guide, x)
    # d log N(x; m, 1) / dm = x - m, and the constant of the tilt is contrasted too
    want = -(x.sum() - negatives[0].sum())
    torch.testing.assert_close(pyro.param("m").grad, want)


# -- the fixed point -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(
    "kernel",
    [LangevinKernel(step_size=0.4, **FIXED), MHKernel(**FIXED), None],
    ids=["mala", "mh", "default"],
)
def test_no_gradient_is_expected_at_the_truth(kernel, num_steps):
    # an exactly invariant kernel started at draws of the model ends at draws of the model
    lam, n = 1.5, 40_000
    x = torch.randn(n) / math.sqrt(lam)
    loss, negatives = watched(ContrastiveDivergence(kernel=kernel, num_steps=num_steps))
    grad = slope(loss, model_of(lam), x)
    rows = (x**2 - negatives[0] ** 2) / 2
    torch.testing.assert_close(grad, rows.sum(), rtol=1e-3, atol=1e-2)
    assert (negatives[0] != x).float().mean() > 0.2  # it moved
    assert rows.mean().abs() < SIGMAS * rows.std() / n**0.5


@pytest.mark.parametrize("num_steps", [1, 10])
def test_the_unadjusted_kernel_leaves_its_bias(num_steps):
    # v_k = (1 - eps lam)^2 v_(k-1) + 2 eps from v_0 = 1 / lam: after one step eps^2 lam too much
    lam, eps, n = 1.5, 0.5, 200_000
    x = torch.randn(n) / math.sqrt(lam)
    kernel = LangevinKernel(adjusted=False, step_size=eps)
    loss, negatives = watched(ContrastiveDivergence(kernel=kernel, num_steps=num_steps))
    mean = slope(loss, model_of(lam), x) / n
    v = 1 / lam
    for _ in range(num_steps):
        v = (1 - eps * lam) ** 2 * v + 2 * eps
    rows = (x**2 - negatives[0] ** 2) / 2
    error = rows.std() / n**0.5
    expected = (1 / lam - v) / 2
    assert (mean - expected).abs() < SIGMAS * error
    assert abs(expected) > 20 * error  # and it is seen


def test_a_conditional_energy_is_contrasted_row_by_row():
    # E(x | c) = lam (x - w c)^2 / 2: recovers regression and precision
    c = torch.randn(2000)
    x = 1.7 * c + 0.5 * torch.randn(2000)

    def model(x, c):
        w, lam = pyro.param("w", torch.tensor(0.0)), pyro.param("lam", torch.tensor(1.0))
        p = UnnormalizedEnergy(lambda x: lam * (x - w * c) ** 2 / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    loss = ContrastiveDivergence(num_steps=3)
    svi = SVI(model, no_guide, Adam({"lr": 0.05}), loss)
    tail = []
    for step in range(260):
        svi.step(x, c)
        if step >= 180:
            tail.append(torch.stack([pyro.param("w"), pyro.param("lam")]).detach().clone())
    w, lam = torch.stack(tail).mean(0)
    assert (w - 1.7).abs() < SIGMAS * 0.5 / 2000**0.5 + 0.02
    assert (lam - 4.0).abs() < SIGMAS * 4.0 * (2 / 2000) ** 0.5


# -- chains --------------------------------------------------------------------------------------


def test_minibatches_of_any_size():
    for persistent in (False, True):
        pyro.clear_param_store()
        loss = ContrastiveDivergence(persistent=persistent, num_chains=8 if persistent else None)
        model = model_of()
        for n in (5, 9, 1, 3):
            assert slope(loss, model, torch.randn(n)).isfinite()


def test_chains_persist_and_go_on_exactly_after_loading():
    x = torch.randn(20)

    def fresh():
        pyro.clear_param_store()
        loss = ContrastiveDivergence(persistent=True, num_chains=30, restart_prob=0.1)
        return loss, SVI(model_of(), no_guide, Adam({"lr": 0.01}), loss)

    loss, svi = fresh()
    for _ in range(3):
        svi.step(x)
    first = loss.chains["x"].clone()
    assert first.shape == (30,)
    saved = copy.deepcopy(loss.state_dict())
    lam = pyro.param("lam").detach().clone()
    torch.manual_seed(5)
    svi.step(x)
    second = loss.chains["x"].clone()
    kept = (second - first).abs() < 3 * (2 * loss.step_sizes["x"]) ** 0.5
    assert kept.float().mean() > 0.7  # a step away, but for the few that started again
    assert torch.equal(saved["chains"]["x"], first)

    again, svi = fresh()
    again.load_state_dict(saved)
    pyro.param("lam", lam)
    torch.manual_seed(5)
    svi.step(x)
    assert torch.equal(again.chains["x"], second)
    assert torch.equal(again.step_sizes["x"], loss.step_sizes["x"])


def test_restarts_come_from_the_base_or_from_noise():
    kernel = LangevinKernel(step_size=1e-8, **FIXED)  # stands still
    far = dist.Normal(50.0, 0.1)
    loss = ContrastiveDivergence(kernel=kernel, persistent=True, num_chains=2000, restart_prob=0.25)
    slope(loss, model_of(base=far), torch.full((5,), 50.0))
    loss.chains["x"] = torch.zeros(2000)
    slope(loss, model_of(base=far), torch.full((5,), 50.0))
    restarted = (loss.chains["x"] - 50).abs() < 1
    assert (restarted.float().mean() - 0.25).abs() < SIGMAS * (0.25 * 0.75 / 2000) ** 0.5
    assert (loss.chains["x"][~restarted].abs() < 0.1).all()


def test_restarting_all_is_short_run_maximum_likelihood():
    loss = ContrastiveDivergence(persistent=True, restart_prob=1.0, num_chains=50)
    slope(loss, model_of(), torch.randn(5))
    loss.chains["x"] = torch.full((50,), 1e6)
    slope(loss, model_of(), torch.randn(5))
    assert loss.chains["x"].abs().max() < 10


def test_the_step_size_is_adapted_all_along():
    loss = ContrastiveDivergence(LangevinKernel(step_size=1e-4), persistent=True, num_chains=200)
    model, x = model_of(), torch.randn(50)
    svi = SVI(model, no_guide, Adam({"lr": 1e-4}), loss)
    rates = []
    for _ in range(400):
        svi.step(x)
        rates.append(loss.diagnostics["acceptance_rate"])
    assert rates[0] > 0.99
    assert abs(sum(rates[-50:]) / 50 - 0.574) < 0.03
    assert loss.diagnostics["step_size"] > 0.1


def test_a_random_walk_in_one_dimension_has_its_own_target():
    loss = ContrastiveDivergence(MHKernel(), persistent=True, num_chains=200)
    svi = SVI(model_of(), no_guide, Adam({"lr": 1e-4}), loss)
    rates = []
    for _ in range(200):
        svi.step(torch.randn(50))
        rates.append(loss.diagnostics["acceptance_rate"])
    assert abs(sum(rates[-50:]) / 50 - 0.44) < 0.03


def test_an_unadjusted_kernel_keeps_its_step():
    loss = ContrastiveDivergence(LangevinKernel(adjusted=False, step_size=0.03))
    slope(loss, model_of(), torch.randn(5))
    assert loss.step_sizes == {}
    assert loss.diagnostics["step_size"] == pytest.approx(0.03)


def test_the_kernel_of_the_energy_is_the_default():
    kernel = LangevinKernel(adjusted=False, step_size=0.03)
    loss = ContrastiveDivergence()
    slope(loss, model_of(kernel=kernel), torch.randn(5))
    assert loss.diagnostics["step_size"] == pytest.approx(0.03)


def test_chains_stay_in_the_support():
    def model(x):
        rate = pyro.param("rate", torch.tensor(1.0))
        p = UnnormalizedEnergy(lambda x: rate * x, support=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    x = dist.Exponential(3.0).sample((1000,))
    loss, negatives = watched(ContrastiveDivergence(num_steps=5))
    svi = SVI(model, no_guide, Adam({"lr": 0.05}), loss)
    for _ in range(200):
        svi.step(x)
    assert all((chain > 0).all() for chain in negatives)
    # maximum likelihood is 1 / mean(x), and the noise of the negatives is that of the data
    assert (pyro.param("rate") * x.mean() - 1).abs() < SIGMAS * (2 / 1000) ** 0.5


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 1.5}, "num_steps"),
        ({"restart_prob": 1.5, "persistent": True}, "restart_prob must lie in"),
        ({"restart_prob": 0.1}, "give persistent=True"),
        ({"num_chains": 5}, "give persistent=True"),
        ({"num_chains": 0, "persistent": True}, "num_chains must be an integer of at least 1"),
        ({"energy_penalty": -1.0}, "energy_penalty"),
        ({"energy_penalty": float("nan")}, "energy_penalty"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDivergence(**kwargs)


def test_a_kernel_of_another_kind():
    from pyro.infer import NUTS

    with pytest.raises(TypeError, match=r"LangevinKernel\(\), got"):
        ContrastiveDivergence(kernel=NUTS(lambda: None))


def test_a_buffer_smaller_than_asked():
    loss = ContrastiveDivergence(persistent=True, num_chains=10)
    slope(loss, model_of(), torch.randn(4))
    larger = ContrastiveDivergence(persistent=True, num_chains=20)
    larger.load_state_dict(loss.state_dict())
    with pytest.raises(ValueError, match="holds 10 chains, num_chains is 20"):
        slope(larger, model_of(), torch.randn(4))


@pytest.mark.parametrize("zero", [False, True])
def test_persistent_chains_for_a_conditional_energy(zero):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    if zero:  # the rows differ after the first step only
        nn.init.zeros_(net[-1].weight)

    def model(x, c):
        pyro.module("net", net)
        p = UnnormalizedEnergy(lambda x: net(torch.stack([x, c], -1)).squeeze(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    loss = ContrastiveDivergence(persistent=True)
    with pytest.raises(ValueError, match=r"'x' is conditional"):
        loss.loss_and_grads(model, no_guide, torch.randn(6), torch.randn(6))


def test_data_on_the_boundary():
    def model(x):
        p = UnnormalizedEnergy(lambda x: x, support=constraints.nonnegative)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    with pytest.raises(ValueError, match=r"'x' lie on the boundary of the support"):
        ContrastiveDivergence().loss_and_grads(model, no_guide, torch.tensor([0.5, 0.0]))


# -- stability -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:site 'x'. the step size of the chains")  # a constant rate
def test_20_000_steps_of_persistent_chains_neither_explode_nor_collapse():
    torch.manual_seed(0)
    angles = torch.arange(8) * (2 * math.pi / 8)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], -1)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(8)), dist.Normal(centres, 0.3).to_event(1)
    )
    net = MLPEnergy(2, hidden=(32, 32))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, (2,)), obs=x)

    loss = ContrastiveDivergence(persistent=True, num_chains=128)
    svi = SVI(model, no_guide, Adam({"lr": 1e-3}), loss)
    line = torch.linspace(-5.0, 5.0, 201)
    grid = torch.cartesian_prod(line, line)
    area = float(line[1] - line[0]) ** 2
    log_p = mixture.log_prob(grid)
    divergences = []
    for step in range(1, 20_001):
        svi.step(mixture.sample((64,)))
        if step % 1000 == 0:
            with torch.no_grad():
                log_q = -net(grid)
                log_q = log_q - log_q.logsumexp(0) - math.log(area)
            divergences.append(float((log_p.exp() * (log_p - log_q)).sum() * area))
            assert abs(loss.diagnostics["energy_data"] - loss.diagnostics["energy_negatives"]) < 3
            assert 0.3 < loss.diagnostics["acceptance_rate"] < 0.9
    assert loss.chains["x"].isfinite().all()
    # The uniform on the square is 2.1 nats away, the best Gaussian 1.07. The weights of the modes
    # drift at a constant learning rate, the modes stay.
    assert max(divergences) < 1.0
    assert sum(divergences[10:]) / 10 < 0.5


def test_tempering_is_refused():
    from pyro_ebm import LangevinKernel, TemperingKernel

    loss = ContrastiveDivergence(TemperingKernel(LangevinKernel(), [1.0, 0.5]))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: x**2), obs=x)

    with pytest.raises(ValueError, match=r"TemperingKernel at site 'x': its replicas would start"):
        loss.loss(model, lambda x: None, torch.zeros(3))
