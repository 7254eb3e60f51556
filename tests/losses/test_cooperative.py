"""Cooperative training: both gradients, where both rest, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI

from pyro_ebm import ContrastiveDivergence, CooperativeTraining, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.distributions.flow import FlowDistribution, neural_spline_flow
from pyro_ebm.nn import MLPEnergy
from tests.statistics import assert_mean_of_rows

MEAN, SD = 2.0, 0.5


def watched(loss):
    """The loss, and the list that its negatives go to."""
    seen, run = [], loss.negatives.run
    loss.negatives.run = lambda *args: seen.append(run(*args)) or seen[-1]
    return loss, seen


def copies(parameters):
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("form", ["svi", "module"])
def test_each_has_its_own_gradient(form):
    # s sum_i m_i (grad E(x_i) - grad E(x'_i)) and -s sum_i m_i grad log q(x'_i), x'_i from draws
    net = MLPEnergy(2, hidden=(8,)).double()
    flow = neural_spline_flow(2, transforms=1, hidden_features=(8,)).double()
    x, mask = torch.randn(10, 2).double(), torch.rand(10) < 0.6

    def site(module, name, fn, **kwargs):
        if form == "svi":
            pyro.module(name, module)
        with pyro.plate("data", 40, subsample=torch.arange(10)), poutine.mask(mask=mask):
            return pyro.sample("x", fn(), **kwargs)

    def model(x):
        site(net, "net", lambda: UnnormalizedEnergy(net, (2,)), obs=x)
        torch.manual_seed(3)

    def guide(x):
        drafts.append(site(flow, "flow", lambda: FlowDistribution(flow())).detach())

    drafts = []
    loss, seen = watched(CooperativeTraining(num_steps=3))
    if form == "svi":
        value = loss.loss_and_grads(model, guide, x)
    else:
        result = loss(model, guide)(x)
        result.backward()
        value = result.item()
    (negatives,), ends = seen, seen[0].x
    assert torch.equal(negatives.start, drafts[0])
    assert (ends != negatives.start).any()
    log_q = flow().log_prob(ends)
    contrast = 4 * (net(x) - net(ends))[mask].sum()
    teaching = -4 * log_q[mask].sum()
    assert value == pytest.approx((contrast + teaching).item())
    assert loss.diagnostics["log_q_negatives"] == pytest.approx(log_q[mask].mean().item())
    for player, objective in ((net, contrast), (flow, teaching)):
        got = copies(player.parameters())
        player.zero_grad()
        objective.backward()
        torch.testing.assert_close(got, copies(player.parameters()))
        assert max(g.abs().max() for g in got) > 1e-3
    # the chains are those of contrastive divergence whose data are the drafts
    other, seen = watched(ContrastiveDivergence(num_steps=3))
    other(model, lambda x: None)(drafts[0])
    assert torch.equal(seen[0].x[mask], ends[mask])


# -- where both rest -----------------------------------------------------------------------------


def gaussian(kernel, num_steps, start):
    """An energy lam (x - m)^2 / 2 and a guide N(loc, scale^2), with the loss."""

    def model(x):
        lam = pyro.param("lam", torch.tensor(start["lam"]).double(), constraints.positive)
        m = pyro.param("m", torch.tensor(start["m"]).double())
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * (x - m) ** 2 / 2), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(start["loc"]).double())
        scale = pyro.param("scale", torch.tensor(start["scale"]).double(), constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale))

    return model, guide, CooperativeTraining(kernel, num_steps)


def parameters():
    return {name: pyro.param(name).unconstrained() for name in ("lam", "m", "loc", "scale")}


def gradients(model, guide, loss, groups=50, rows=400):
    """The mean gradient of each parameter in each group of rows, ``(groups, 4)``."""
    found = []
    for _ in range(groups):
        loss.loss_and_grads(model, guide, MEAN + SD * torch.randn(rows).double())
        found.append(torch.stack([p.grad / rows for p in parameters().values()]))
        for p in parameters().values():
            p.grad = None
    return torch.stack(found)


STEP = 0.05
# x' = m + a (x - m) + sqrt(2 step) xi, a = 1 - step lam, is stationary at the variance
# 2 step / (1 - a^2) = 1 / (lam (1 - step lam / 2)): here that of the data
LAM = (1 - math.sqrt(1 - 2 * STEP / SD**2)) / STEP
KERNELS = {
    "adjusted": (LangevinKernel(step_size=STEP, adapt_step_size=False), 1 / SD**2),
    "unadjusted": (LangevinKernel(step_size=STEP, adjusted=False), LAM),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_rest_at_the_density_of_the_data(kernel):
    kernel, lam = KERNELS[kernel]
    rest = {"lam": lam, "m": MEAN, "loc": MEAN, "scale": SD}
    assert_mean_of_rows(gradients(*gaussian(kernel, 3, rest)))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_gradients_of_unadjusted_chains_are_known(num_steps):
    # from N(loc, s^2) to N(m + a^k (loc - m), v), v = a^2k s^2 + 2 step (1 - a^2k) / (1 - a^2)
    at = {"lam": 3.0, "m": 1.5, "loc": 1.0, "scale": 0.8}
    a = 1 - STEP * at["lam"]
    pull = a ** (2 * num_steps)
    end = at["m"] + a**num_steps * (at["loc"] - at["m"])
    v = pull * at["scale"] ** 2 + 2 * STEP * (1 - pull) / (1 - a**2)
    of_data = SD**2 + (MEAN - at["m"]) ** 2
    of_ends = v + (end - at["m"]) ** 2
    want = [
        at["lam"] * (of_data - of_ends) / 2,  # of log lam, as of log scale below
        -at["lam"] * (MEAN - end),
        -(end - at["loc"]) / at["scale"] ** 2,
        1 - (v + (end - at["loc"]) ** 2) / at["scale"] ** 2,
    ]
    grads = gradients(*gaussian(KERNELS["unadjusted"][0], num_steps, at))
    assert_mean_of_rows(grads - torch.tensor(want).double())


def test_both_go_to_the_density_of_the_data():
    start = {"lam": 1.0, "m": 0.0, "loc": -1.0, "scale": 1.0}
    model, guide, loss = gaussian(None, 5, start)
    svi, path = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss), []
    x = MEAN + SD * torch.randn(1000).double()
    for _ in range(400):
        svi.step(x)
        path.append(torch.stack([pyro.param(name).detach() for name in parameters()]))
    lam, m, loc, scale = torch.stack(path[-200:]).mean(0).tolist()
    # the mean of 1000 ends, whose error is sd / 1000^.5, over 200 steps, of which few are
    # independent: chains of five transitions take some ten gradients to forget
    error = SD / (1000 * 200 / 10) ** 0.5
    for found, want in ((m, x.mean()), (loc, x.mean()), (lam**-0.5, x.std()), (scale, x.std())):
        assert found == pytest.approx(float(want), abs=6 * error)


# -- bad input -----------------------------------------------------------------------------------


def model(x):
    lam = pyro.param("lam", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2), obs=x)


def guide_of(make):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", make())

    return guide


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dist.Normal(pyro.param("lam"), 1.0), r"'x'.*share a parameter of shape \(\)"),
        (lambda: UnnormalizedEnergy(lambda x: x**2), "an energy without its log Z"),
        (lambda: dist.LogNormal(0.0, 1.0), "has no density at some of the data"),
        (lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), "batch and event shape"),
    ],
)
def test_a_guide_that_will_not_do(make, message):
    pyro.param("lam", torch.tensor(1.0))
    with pytest.raises(ValueError, match=message):
        CooperativeTraining().loss_and_grads(model, guide_of(make), torch.randn(5))


def test_settings_that_will_not_do():
    with pytest.raises(ValueError, match="persistent chains do not start at draws of the guide"):
        CooperativeTraining(persistent=True)
    with pytest.raises(ValueError, match="CooperativeTraining needs noise"):
        CooperativeTraining().loss_and_grads(model, lambda x: None, torch.randn(5))
