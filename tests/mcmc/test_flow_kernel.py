"""Far moves by a flow: exact whatever the flow is, and good where it has learned."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_ebm import (
    MCMC,
    ChEESKernel,
    ContrastiveDivergence,
    ConvergenceWarning,
    ExchangeKernel,
    FlowKernel,
    GibbsKernel,
    LangevinKernel,
    SGLDKernel,
    TemperingKernel,
    UnnormalizedEnergy,
    estimate_log_normalizer,
    to_arviz,
)
from pyro_ebm.distributions.flow import coupling_flow
from pyro_ebm.mcmc import CompositeKernel, EnergyPotential, geometric_betas
from pyro_ebm.mcmc.kernels.composed.fitted_flow import MAX_POSITIONS, FittedFlow, window_ends
from tests.statistics import SIGMAS, assert_mean, assert_mean_of_rows, assert_moments


def double_well(x):
    return x**4 - 6 * x**2 - x / 2


def normal():
    return UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, event_shape=(2,))


def wrong_flow(dim=2, scale=0.1):
    """A flow that has learned nothing, and is no standard normal either."""
    torch.manual_seed(7)
    net = coupling_flow(dim, bins=4, hidden_features=(8,))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return net


def as_it_is(p, flow, local=None):
    """A kernel bound to an energy, with this flow."""
    kernel = FlowKernel(LangevinKernel() if local is None else local, flow, num_fit_steps=0)
    kernel.bind(EnergyPotential(p), 0)
    return kernel


def run(kernel, num_samples, warmup_steps, chains, seed=0, **settings):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        kernel, num_samples, warmup_steps, num_chains=chains, disable_progbar=True, **settings
    )
    mcmc.run()
    return mcmc


# -- exactness -------------------------------------------------------------------------------------


def test_a_wrong_flow_keeps_detailed_balance():
    """At stationarity (z, z') and (z', z) are alike: E[f(z) g(z')] = E[g(z) f(z')]."""
    kernel = as_it_is(normal(), wrong_flow())
    z = torch.randn(200_000, 2)
    new = kernel._far_move(kernel.init(z), kernel._flow).z
    moved = (new != z).any(-1).float().mean()
    assert 0.2 < moved < 0.98  # it rejects, and it moves
    for f, g in [
        (lambda z: z[:, 0], lambda z: z[:, 0] ** 2),
        (lambda z: (z[:, 0] > 0.5).float(), lambda z: z.prod(-1)),
        (lambda z: z.sum(-1).tanh(), lambda z: (z[:, 1] < -1).float()),
    ]:
        assert_mean_of_rows(f(z) * g(new) - g(z) * f(new))
    assert_mean_of_rows(new)
    assert_mean_of_rows(new.square() - 1)


def test_potentials_and_gradients_are_those_of_the_positions():
    p = normal()
    local = TemperingKernel(LangevinKernel(), [1.0, 0.5])
    for kernel in (as_it_is(p, wrong_flow()), as_it_is(p, wrong_flow(), local)):
        state = kernel.init(torch.randn(20, 2))
        for _ in range(5):
            state, _ = kernel.step(state)
        value, grad = kernel.potential.value_and_grad(state.z)
        torch.testing.assert_close(state.potential, value)
        torch.testing.assert_close(state.grad, grad)
    replicas = state.replicas
    value, grad = kernel._inner._tempered.value_and_grad(replicas.z)
    torch.testing.assert_close(replicas.potential, value)
    torch.testing.assert_close(replicas.grad, grad)
    assert torch.equal(replicas.z.unflatten(0, (20, 2))[:, 0], state.z)


def test_the_flow_that_is_the_target_is_always_accepted():
    kernel = as_it_is(normal(), coupling_flow(2))  # the identity: a standard normal
    state = kernel.init(torch.randn(50, 2))
    for _ in range(3):
        state, _ = kernel.step(state)
    assert kernel.flow_rates == [pytest.approx(1.0, abs=1e-5)]


# -- what it learns --------------------------------------------------------------------------------


def test_windows_are_the_later_halves_of_all_chains():
    kernel = FlowKernel(LangevinKernel(UnnormalizedEnergy(double_well)), num_fit_steps=5)
    mcmc = run(kernel, 4, 60, 7, save_warmup=True, check_convergence=False)
    assert window_ends(60) == [12, 18, 27, 40, 60]
    last = mcmc.get_warmup_samples(group_by_chain=True)["x"][:, 30:]
    flow = kernel._flow
    torch.testing.assert_close(flow.mean, last.mean().reshape(1))
    reach = (last - last.mean()).abs().max() / 4.5
    torch.testing.assert_close(flow.scale, last.std(correction=0).maximum(reach).reshape(1))
    assert len(flow.losses) == 5
    assert not flow._kept  # nothing is left of the warmup
    rates = mcmc._results.warmup_fields["flow_acceptance_rate"].mean(0)
    assert (rates[:12] == 0).all()
    assert (rates[12:] > 0).all()
    assert kernel.flow_rates[0] == pytest.approx(float(rates[12:18].mean()), rel=1e-4)
    assert len(kernel.flow_rates) == 5  # after each fit


def test_long_windows_are_thinned():
    flow = FittedFlow(nn.Module(), torch.zeros(()), 2, 10_000, 100, 1e-3)
    z, most = torch.zeros(1000, 2), 0
    flow._fit = lambda z, end: None
    for _ in range(10_000):
        flow.learn(z)
        most = max(most, len(flow._kept))
    assert 0.9 * MAX_POSITIONS < most * 1000 <= 1.1 * MAX_POSITIONS


def test_shares_of_wells_that_local_moves_do_not_cross():
    """P(x > 0) = .84431; chains start at half and half."""
    p = UnnormalizedEnergy(double_well)
    starts = {"x": torch.linspace(-2, 2, 60)}
    local = run(LangevinKernel(p), 100, 100, 60, initial_params=starts, check_convergence=False)
    x = local.get_samples(group_by_chain=True)["x"] > 0
    assert (x[:, 1:] != x[:, :-1]).float().mean() < 0.005
    kernel = FlowKernel(LangevinKernel(p), num_fit_steps=150)
    mcmc = run(kernel, 200, 100, 60, initial_params=starts)
    x = mcmc.get_samples(group_by_chain=True)["x"] > 0
    assert_mean(x.float(), 0.84431)
    assert (x[:, 1:] != x[:, :-1]).float().mean() > 0.1
    assert kernel.flow_rates[-1] > 0.3
    assert f"flow accepted at {kernel.flow_rates[-1]:.2g}" in repr(kernel)
    stats = to_arviz(mcmc).sample_stats["flow_acceptance_rate"]
    assert stats.shape == (60, 200)
    assert float(stats.mean()) == pytest.approx(kernel.flow_rates[-1], rel=1e-4)
    # its log Z, from the frozen flow
    (truth,) = [estimate_log_normalizer(p, "quadrature").value]
    estimate = estimate_log_normalizer(p, "importance", proposal=kernel.proposal)
    assert (estimate.value - truth).abs() < SIGMAS * estimate.std_error
    assert estimate.std_error < 0.03


def test_a_mode_that_no_chain_visits_needs_tempering():
    def two(x):  # three quarters near 6
        return -torch.logaddexp(math.log(3) - (x - 6) ** 2 / 2, -((x + 6) ** 2) / 2)

    p = UnnormalizedEnergy(two)
    starts = {"x": torch.linspace(-7, -5, 20)}
    # (a step size that adapts may be so long, early in the warmup, that a chain jumps)
    local = LangevinKernel(p, step_size=0.3, adapt_step_size=False)
    alone = run(FlowKernel(local, num_fit_steps=60), 60, 60, 20, initial_params=starts)
    assert (alone.get_samples()["x"] < 0).all()
    local = TemperingKernel(LangevinKernel(p), geometric_betas(0.04, 4))
    mcmc = run(FlowKernel(local, num_fit_steps=100), 200, 200, 20, initial_params=starts)
    assert_mean((mcmc.get_samples(group_by_chain=True)["x"] > 0).float(), 0.75)
    assert mcmc.kernel.flow_rates[-1] > 0.3


def test_several_sites_with_constraints():
    """Gamma and Dirichlet posteriors with closed forms, and one flow of both."""

    def model():
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0), 2.0))
        shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("count", dist.Poisson(rate), obs=torch.tensor(5.0))
        pyro.sample("kinds", dist.Multinomial(4, shares), obs=torch.tensor([2.0, 1.0, 1.0]))

    kernel = FlowKernel(LangevinKernel(model), num_fit_steps=80)
    mcmc = run(kernel, 60, 60, 50)
    samples = mcmc.get_samples(group_by_chain=True)
    assert_moments(samples["rate"], 8 / 3, 8 / 9)
    assert_mean(samples["shares"], torch.tensor([3.0, 3.0, 4.0]) / 10)
    assert kernel.flow_rates[-1] > 0.3
    with pytest.raises(ValueError, match=r"\['rate', 'shares'\] together"):
        _ = kernel.proposal


def test_the_proposal_is_a_density_on_the_support():
    p = UnnormalizedEnergy(lambda x: x, support=constraints.positive)
    kernel = FlowKernel(LangevinKernel(p), wrong_flow(1), num_fit_steps=10)
    run(kernel, 5, 10, 10, check_convergence=False)
    q = kernel.proposal
    assert q.support is constraints.positive
    assert q.batch_shape == q.event_shape == ()
    grid = torch.linspace(-12, 12, 20_001)  # of log x
    log_q = q.log_prob(grid.exp()) + grid
    assert torch.trapezoid(log_q.exp(), grid) == pytest.approx(1.0, abs=1e-3)
    x = q.sample((20_000,))
    assert (x > 0).all()
    assert_mean_of_rows(x.log() - torch.trapezoid(log_q.exp() * grid, grid))
    assert not q.log_prob(x).requires_grad


def test_a_flow_of_ones_own_is_copied_and_trained():
    own = wrong_flow()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    kernel = FlowKernel(LangevinKernel(normal()), own, num_fit_steps=20)
    run(kernel, 5, 20, 10, check_convergence=False)
    after, trained = own.state_dict(), kernel._flow.net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not all(torch.equal(trained[name], value) for name, value in before.items())


def test_a_fit_that_fails_is_put_back():
    kernel = FlowKernel(LangevinKernel(normal()), num_fit_steps=20, lr=1e30)
    mcmc = run(kernel, 5, 20, 10, check_convergence=False)
    assert all(p.isfinite().all() for p in kernel._flow.net.parameters())
    assert mcmc.get_samples()["x"].isfinite().all()


# -- words -----------------------------------------------------------------------------------------


def test_a_run_whose_far_moves_fail_says_so():
    p = UnnormalizedEnergy(lambda x: 50 * (x - 40).square().sum(-1), event_shape=(2,))
    kernel = FlowKernel(LangevinKernel(p), coupling_flow(2), num_fit_steps=0)
    with pytest.warns(ConvergenceWarning, match="far moves were accepted at a rate of 0: the flow"):
        mcmc = run(kernel, 60, 60, 10)
    (finding,) = mcmc.findings
    assert finding.kind == "flow"
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    assert_moments(draws, 40.0, 0.01)  # and the draws are right


def test_what_it_does_not_take():
    def bits():
        pyro.sample("b", dist.Bernoulli(0.3))

    for kernel in (FlowKernel(LangevinKernel()), "langevin", None):
        with pytest.raises(ValueError, match="kernel of pyro_ebm that makes local moves"):
            FlowKernel(kernel)
    with pytest.raises(ValueError, match="temperature=2"):
        FlowKernel(LangevinKernel(temperature=2.0))
    with pytest.raises(ValueError, match="would need that log Z"):
        FlowKernel(ExchangeKernel())
    with pytest.raises(ValueError, match="makes no Metropolis test"):
        FlowKernel(SGLDKernel(normal()))
    for flow in (nn.Identity(), lambda: dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0)):
        with pytest.raises(ValueError, match="flow must be a module with parameters"):
            FlowKernel(LangevinKernel(), flow)
    with pytest.raises(ValueError, match="give one, flow="):
        FlowKernel(LangevinKernel(), num_fit_steps=0)
    with pytest.raises(ValueError, match="lr must be positive"):
        FlowKernel(LangevinKernel(), lr=0.0)
    with pytest.raises(ValueError, match=r"the sites \['b'\] are discrete"):
        FlowKernel(GibbsKernel(bits)).setup(0)
    with pytest.raises(ValueError, match=r"event_shape=\(2,\).*got \(\) and \(3,\)"):
        FlowKernel(LangevinKernel(normal()), coupling_flow(3)).setup(0)
    with pytest.raises(ValueError, match=r"FlowKernel\(TemperingKernel"):
        TemperingKernel(FlowKernel(LangevinKernel(normal())), [1.0, 0.5]).setup(0)
    with pytest.raises(ValueError, match="kernels must be kernels of pyro_ebm"):
        CompositeKernel(normal(), [FlowKernel(LangevinKernel())])
    with pytest.raises(RuntimeError, match="run first"):
        _ = FlowKernel(LangevinKernel()).proposal


def test_negatives_have_no_warmup_to_fit_a_flow_in():
    energy = nn.Linear(2, 1)

    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: energy(x).square().squeeze(-1), event_shape=(2,))
            pyro.sample("x", p, obs=x)

    loss = ContrastiveDivergence(kernel=FlowKernel(LangevinKernel()))
    with pytest.raises(ValueError, match="no warmup in which its flow is fitted"):
        loss.loss(model, lambda x: None, torch.randn(4, 2))


# -- long runs -------------------------------------------------------------------------------------


def r_hat_and_ess(x):
    """Of ``(chains, draws, elements)``, both ``(elements,)``."""
    ess = pyro.ops.stats.effective_sample_size(x, 0, 1)
    return pyro.ops.stats.split_gelman_rubin(x, 0, 1), ess


def gaussians():
    """The 40 Gaussians of Midgley et al. (2023), their means ``(40, 2)`` and deviation."""
    generator = torch.Generator().manual_seed(0)
    means = (torch.rand((40, 2), generator=generator) - 0.5) * 2 * 40
    sd = math.log1p(math.e)  # softplus(1)

    def energy(x):
        return -(-(x[..., None, :] - means).square().sum(-1) / (2 * sd**2)).logsumexp(-1)

    return UnnormalizedEnergy(energy, event_shape=(2,)), means, sd


@pytest.mark.slow
def test_forty_gaussians():
    p, means, sd = gaussians()
    pyro.set_rng_seed(1)
    starts = {"x": (torch.rand(200, 2) - 0.5) * 80}
    exact = means[torch.randint(40, (1_000_000,))] + sd * torch.randn(1_000_000, 2)
    truth = torch.cdist(exact, means).argmin(-1).bincount(minlength=40) / len(exact)
    shares = {}
    for name, kernel in [("local", LangevinKernel(p)), ("flow", FlowKernel(LangevinKernel(p)))]:
        mcmc = run(kernel, 1200, 400, 200, initial_params=starts, check_convergence=False)
        x = mcmc.get_samples(group_by_chain=True)["x"]
        shares[name] = nn.functional.one_hot(torch.cdist(x, means).argmin(-1), 40).float()
    r_hat, ess = r_hat_and_ess(shares["flow"])
    assert r_hat.max() < 1.01
    assert ess.min() > 5000
    assert_mean(shares["flow"], truth)
    visited = {k: (x.sum(1) > 0).sum(-1).float().mean() for k, x in shares.items()}  # by a chain
    assert visited["flow"] > 39
    assert visited["local"] < 5  # some of the Gaussians overlap


@pytest.mark.slow
def test_many_wells():
    """16 double wells of 2 dimensions: log Z = 164.69568, P(x > 0) = .84431 of each."""

    def energy(x):
        return double_well(x[..., 0::2]).sum(-1) + x[..., 1::2].square().sum(-1) / 2

    p = UnnormalizedEnergy(energy, event_shape=(32,))
    pyro.set_rng_seed(1)
    kernel = FlowKernel(LangevinKernel(p), num_fit_steps=600)
    starts = {"x": 2 * torch.randn(300, 32)}
    mcmc = run(kernel, 1200, 300, 300, initial_params=starts)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    right = (x[..., 0::2] > 0).float()
    r_hat, ess = r_hat_and_ess(right)
    assert r_hat.max() < 1.01
    assert ess.min() > 5000
    assert_mean(right, torch.tensor(0.84431))
    draws = x[:, ::100].flatten(0, 1)
    for method, given in [("importance", {}), ("bridge", {"samples": draws})]:
        estimate = estimate_log_normalizer(p, method, proposal=kernel.proposal, **given)
        assert (estimate.value - 164.69568).abs() < 0.1, estimate


@pytest.mark.slow
def test_a_funnel_and_a_banana():
    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([2]).to_event(1))

    def banana():
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        pyro.sample("b", dist.Normal(0.3 * a**2, 0.5))

    kernel = FlowKernel(ChEESKernel(banana))
    draws = run(kernel, 600, 300, 100).get_samples(group_by_chain=True)
    assert_moments(draws["a"], 0.0, 9.0)
    assert_moments(draws["b"], 2.7, 0.09 * 2 * 81 + 0.25)
    kernel = FlowKernel(ChEESKernel(funnel))
    mcmc = run(kernel, 500, 300, 100, check_convergence=False)
    draws = mcmc.get_samples(group_by_chain=True)
    assert_moments(draws["v"], 0.0, 9.0)
    assert_mean(draws["x"].sign(), 0.0)
    r_hat, _ = r_hat_and_ess(draws["v"])
    assert r_hat < 1.01
