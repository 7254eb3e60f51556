import math

import pyro
import pytest
import torch
from pyro.ops.stats import split_gelman_rubin

from pyro_ebm import MCMC, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential
from pyro_ebm.mcmc.kernels.gradient.barker import BarkerKernel
from tests.mcmc.test_posteriors import assert_same_posterior, draw, eight_schools
from tests.statistics import SIGMAS, assert_mean, assert_moments, run_kernel

FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}
SPREADS = pytest.mark.parametrize("spread", [0.1, 1.0])


def energy(function, dim):
    return EnergyPotential(UnnormalizedEnergy(function, event_shape=(dim,)))


def normal(scale, dim):
    scale = torch.as_tensor(scale)
    return energy(lambda x: (x / scale).square().sum(-1) / 2, dim)


def double_well(x):
    return (x.square().sum(-1) - 2).square() / 2


# -- the proposal ------------------------------------------------------------------------------


@pytest.mark.parametrize("full_mass", [False, True])
@SPREADS
def test_ratio_is_that_of_the_proposal_density(spread, full_mass):
    # In whitened coordinates the density of a jump is 2 mu(w) sigma(w c(z)), with mu symmetric:
    # all that is left of q(z | z') / q(z' | z) is sigma(-w c(z')) / sigma(w c(z)).
    torch.set_default_dtype(torch.float64)
    target = energy(double_well, 3)
    kernel = BarkerKernel(spread=spread, full_mass=full_mass)
    kernel.bind(target, 100)
    if full_mass:
        factor = torch.randn(1, 3, 3).tril() + 2 * torch.eye(3)
        dense = factor[0]
    else:
        factor = torch.rand(1, 3) + 0.5
        dense = factor[0].diag()
    kernel.adaptation.inverse_mass_sqrt = factor
    state = kernel.evaluate(torch.randn(50, 3))
    jump, _, u, _ = kernel.draw(state)
    # log u = 0 accepts a ratio above 1 alone: the acceptance probability tells the ratio below
    new, info = kernel.transition(state, jump, factor, u, torch.full((50,), -torch.inf))
    w = torch.linalg.solve_triangular(dense, (new.z - state.z).T, upper=False).T
    torch.testing.assert_close(w.abs(), jump.abs())
    slope, new_slope = -state.grad @ dense, -new.grad @ dense
    q_ratio = (torch.sigmoid(-w * new_slope) / torch.sigmoid(w * slope)).prod(-1)
    want = (state.potential - new.potential).exp() * q_ratio
    torch.testing.assert_close(info.accept_prob, want.clamp(max=1.0))
    assert (want < 1).any()


@SPREADS
def test_jumps_have_the_variance_of_langevin_noise_and_follow_the_gradient(spread):
    kernel = BarkerKernel(step_size=0.02, spread=spread, **FIXED)
    kernel.bind(energy(lambda x: 3.0 * x.sum(-1), 1), 0)
    state = kernel.evaluate(torch.zeros(40_000, 1))
    new, info = kernel.transition(state, *kernel.draw(state))
    assert (info.accept_prob > 0.999).all()  # on a slope q(z | z') p(z') = q(z' | z) p(z)
    jump = (new.z - state.z).reshape(100, 400, 1)
    assert_mean(jump.square(), 0.04)
    # the mean is E[xi tanh(xi c / 2)], and eps c to first order, up to 7 % more for normal jumps
    c = -3.0
    xi = kernel.draw(state)[0]
    assert_mean(jump - (xi * (xi * c / 2).tanh()).reshape(jump.shape), 0.0)
    assert jump.mean().item() == pytest.approx(0.02 * c, rel=0.15)


# -- exactness ---------------------------------------------------------------------------------


@SPREADS
def test_is_invariant_at_any_step(spread):
    kernel = BarkerKernel(step_size=0.8, spread=spread, **FIXED)
    draws, info = run_kernel(kernel, normal(1.0, 3), torch.randn(20_000, 3), 0, 4)
    assert info.accept_prob.mean() < 0.95  # the correction had something to correct
    for t in (0, 3):
        assert_moments(draws[:, t].reshape(100, 200, 3), 0.0, 1.0)


@SPREADS
def test_satisfies_detailed_balance(spread):
    kernel = BarkerKernel(step_size=0.3, spread=spread, **FIXED)
    draws, _ = run_kernel(kernel, energy(double_well, 1), torch.randn(2000, 1), 100, 200)
    before, after = draws[:, :-1, 0], draws[:, 1:, 0]
    flow = ((before < 1) & (after > 1.5)).double() - ((before > 1.5) & (after < 1)).double()
    assert flow.abs().sum() > 1000
    net = flow.sum(1)  # of each chain
    assert net.mean().abs() < SIGMAS * net.std() / len(net) ** 0.5


@pytest.mark.parametrize("full_mass", [False, True])
@SPREADS
def test_correlated_normal(spread, full_mass):
    covariance = torch.tensor([[1.0, 1.8, 0.0], [1.8, 4.0, -3.0], [0.0, -3.0, 25.0]])
    precision = torch.linalg.inv(covariance)
    target = energy(lambda x: ((x @ precision) * x).sum(-1) / 2, 3)
    kernel = BarkerKernel(spread=spread, full_mass=full_mass)
    x, _ = run_kernel(kernel, target, torch.randn(500, 3), 150, 120)
    assert_moments(x, 0.0, covariance.diagonal())
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert_mean(x[..., i] * x[..., j], covariance[i, j])


@SPREADS
def test_same_posterior_as_nuts(spread):
    x = draw(BarkerKernel(eight_schools, spread=spread, full_mass=True), 150, 150, num_chains=200)
    assert_same_posterior("eight schools", x)


# -- robustness --------------------------------------------------------------------------------


def test_moves_with_a_step_ten_times_too_large_where_langevin_stands_still():
    rates = {}
    for make in (LangevinKernel, BarkerKernel):
        kernel = make(step_size=6.0, **FIXED)
        draws, info = run_kernel(kernel, normal(1.0, 5), torch.randn(200, 5), 0, 400)
        rates[make] = info.accept_prob.mean().item()
        if make is BarkerKernel:
            assert_moments(draws, 0.0, 1.0)
    assert rates[LangevinKernel] < 1e-3
    assert rates[BarkerKernel] > 0.03


@pytest.mark.parametrize("make", [LangevinKernel, BarkerKernel])
def test_a_short_warmup_finds_scales_that_differ(make):
    # x / s is the log of a Gamma(3) variable, whose potential is as steep as e^20 at the start
    scale, targets = torch.logspace(-1, 2, 6), 100  # which adapt by themselves
    target = EnergyPotential(
        UnnormalizedEnergy(
            lambda x: ((x / scale).exp() - 3 * x / scale).sum(-1),
            batch_shape=(targets,),
            event_shape=(6,),
        )
    )
    z = torch.empty(20 * targets, 6).uniform_(-2, 2)
    draws, _ = run_kernel(make(), target, z, 250, 300)
    r_hat = split_gelman_rubin(draws.unflatten(0, (20, targets)), chain_dim=0, sample_dim=2)
    assert r_hat.max() < 1.2  # 1.03 for Langevin, 1.06 for Barker


@pytest.mark.parametrize("target", [0.4, 0.574, 0.8])
def test_acceptance_adapts_to_the_target(target):
    kernel = BarkerKernel(target_accept_prob=target)
    _, info = run_kernel(kernel, normal(1.0, 20), torch.randn(200, 20), 300, 100)
    assert info.accept_prob.mean().item() == pytest.approx(target, abs=0.04)


# -- energies that go wrong --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_wall_is_never_crossed_and_the_target_stays_exact(kind):
    def function(x):
        inside = x.square().sum(-1) / 2
        return torch.where((x > 0).all(-1), inside, {"nan": math.nan, "inf": math.inf}[kind])

    z = torch.randn(2000, 1).abs()
    draws, info = run_kernel(BarkerKernel(), energy(function, 1), z, 50, 100)
    assert (draws > 0).all()
    assert info.diverging.any()
    assert (info.accept_prob[info.diverging] == 0).all()
    assert_mean(draws, (2 / math.pi) ** 0.5)
    assert_mean(draws.square(), 1.0)


def test_an_infinite_gradient_is_rejected():
    # at 1 the potential is 0 and its gradient infinite, and there is no way back
    kernel = BarkerKernel(**FIXED)
    kernel.bind(energy(lambda x: -(1 - x).sqrt().sum(-1), 1), 0)
    state = kernel.evaluate(torch.zeros(1, 1))
    one, keep = torch.ones(1, 1), torch.zeros(1, 1)
    new, info = kernel.transition(state, one, None, keep, torch.tensor([-100.0]))
    assert info.diverging.all()
    assert new.z.item() == 0.0


def test_where_it_is_steep_the_gradient_alone_chooses_the_sign():
    torch.set_default_dtype(torch.float64)
    kernel = BarkerKernel(step_size=1.0, spread=0.1, **FIXED)
    kernel.bind(energy(lambda x: 1e4 * x.sum(-1), 2), 0)
    state = kernel.init(torch.zeros(20, 2))
    for _ in range(10):
        before = state.z
        state, info = kernel.step(state)
        assert (state.z < before).all()  # downhill, and always accepted
        assert not info.diverging.any()


# -- compiled ----------------------------------------------------------------------------------


def test_a_captured_run_gives_the_draws_of_an_eager_one():
    def run(jit_compile):
        pyro.set_rng_seed(0)
        kernel = BarkerKernel(eight_schools, jit_compile=jit_compile)
        mcmc = MCMC(kernel, 20, 30, num_chains=8, disable_progbar=True)
        mcmc.run()
        return mcmc

    jit, eager = run("capture"), run(False)
    assert len(jit.kernel._engine._graphs) == 1
    for name, value in eager.get_samples().items():
        assert torch.equal(jit.get_samples()[name], value)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5, math.nan])
def test_spread_out_of_range(bad):
    with pytest.raises(ValueError, match=r"spread must lie in \(0, 1\]"):
        BarkerKernel(spread=bad)
