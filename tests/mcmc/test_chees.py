import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.mcmc import MCMC as PyroMCMC
from pyro.ops.stats import split_gelman_rubin

from pyro_ebm import MCMC, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import CompositeKernel, EnergyPotential, GibbsKernel, TemperingKernel
from pyro_ebm.mcmc.adaptation.chees import TrajectoryAdaptation, slopes, van_der_corput
from pyro_ebm.mcmc.kernels.accept import MAX_ENERGY_ERROR, decide
from pyro_ebm.mcmc.kernels.gradient.hmc import ChEESKernel
from pyro_ebm.mcmc.state import State
from tests.mcmc.test_posteriors import assert_same_posterior, breast_cancer, draw, eight_schools
from tests.statistics import SIGMAS, assert_mean, assert_moments, normal_scores, run_kernel

FIXED = {"adapt_step_size": False, "adapt_trajectory_length": False, "adapt_mass_matrix": False}


def energy(function, dim):
    return EnergyPotential(UnnormalizedEnergy(function, event_shape=(dim,)))


def normal(scale, dim):
    scale = torch.as_tensor(scale)
    return energy(lambda x: (x / scale).square().sum(-1) / 2, dim)


# -- the sequence of trajectory lengths ----------------------------------------------------------


@pytest.mark.parametrize("start", [1, 6, 1000])
@pytest.mark.parametrize("length", [8, 64])
def test_van_der_corput_spreads_evenly_from_anywhere(start, length):
    # of 2^k numbers in a row exactly one lies in each interval [i, i + 1) / 2^k
    numbers = [van_der_corput(n) for n in range(start, start + length)]
    assert sorted(int(x * length) for x in numbers) == list(range(length))
    assert all(0 < x < 1 for x in numbers)


def test_numbers_of_steps_follow_it():
    kernel = ChEESKernel(step_size=0.1, trajectory_length=2.0, **FIXED)
    kernel.bind(normal(1.0, 2), 0)
    state = kernel.init(torch.randn(3, 2))
    for want in (10, 5, 15, 3, 13):  # 20 times 1/2, 1/4, 3/4, 1/8, 5/8, rounded up
        state, _ = kernel.step(state)
        assert kernel.extra_fields["n_steps"].tolist() == [want] * 3


def test_every_third_transition_halves_an_adapted_step():
    kernel = ChEESKernel(step_size=0.1, adapt_trajectory_length=False, adapt_mass_matrix=False)
    kernel.bind(normal(1.0, 2), 0)
    state = kernel.init(torch.randn(3, 2))
    sizes = []
    follow = kernel.trajectory

    def spied(state, step_size, *rest):
        sizes.append(float(step_size[0]))
        return follow(state, step_size, *rest)

    kernel.trajectory = spied
    for want in (10, 5, 30, 3, 13):
        state, _ = kernel.step(state)
        assert kernel.extra_fields["n_steps"].tolist() == [want] * 3
    assert sizes == pytest.approx([0.1, 0.1, 0.05, 0.1, 0.1])


def test_a_chain_leaves_a_narrow_place():
    # y ~ N(0, s(x)^2): where s is 0.1 a leapfrog step of more than 0.2 is unstable
    def narrow(x):
        s = torch.where(x[..., 0] > 2, 0.1, 1.0)
        return x[..., 0].square() / 2 + (x[..., 1] / s).square() / 2 + s.log()

    kernel = ChEESKernel(step_size=0.38, adapt_trajectory_length=False, adapt_mass_matrix=False)
    start = torch.tensor([2.5, 0.2]).expand(2000, 2)
    draws, _ = run_kernel(kernel, energy(narrow, 2), start, 0, 60)
    stood = (draws == start[:, None]).all(-1).all(1)
    assert stood.double().mean() < 0.01


@pytest.mark.parametrize(("step_size", "most"), [(5.0, 1), (1e-6, 1000)])
def test_a_trajectory_has_at_least_one_step_and_an_end(step_size, most):
    kernel = ChEESKernel(step_size=step_size, **FIXED)
    kernel.bind(normal(1.0, 2), 0)
    state = kernel.init(torch.zeros(1, 2))
    state, _ = kernel.step(state)
    assert kernel.extra_fields["n_steps"].item() == max(1, most // 2)


# -- exactness -----------------------------------------------------------------------------------


def test_is_invariant_at_any_step_and_length():
    # started in the target it stays there, after trajectories of any number of steps
    kernel = ChEESKernel(step_size=1.2, trajectory_length=7.0, **FIXED)
    draws, info = run_kernel(kernel, normal(1.0, 3), torch.randn(20_000, 3), 0, 4)
    assert info.accept_prob.mean() < 0.9  # the correction had something to correct
    for t in range(4):
        assert_moments(draws[:, t].reshape(100, 200, 3), 0.0, 1.0)


def test_satisfies_detailed_balance():
    # In equilibrium the flow from A to B equals the flow from B to A, for any two sets.
    double_well = energy(lambda x: (x.square().sum(-1) - 2).square() / 2, 1)
    kernel = ChEESKernel(step_size=0.5, trajectory_length=2.0, **FIXED)
    draws, _ = run_kernel(kernel, double_well, torch.randn(4000, 1), 100, 100)
    before, after = draws[:, :-1, 0], draws[:, 1:, 0]
    flow = ((before < 1) & (after > 1.5)).double() - ((before > 1.5) & (after < 1)).double()
    assert flow.abs().sum() > 1000
    net = flow.sum(1)  # of each chain
    assert net.mean().abs() < SIGMAS * net.std() / len(net) ** 0.5


@pytest.mark.parametrize("full_mass", [False, True])
def test_correlated_normal(full_mass):
    covariance = torch.tensor([[1.0, 1.8, 0.0], [1.8, 4.0, -3.0], [0.0, -3.0, 25.0]])
    precision = torch.linalg.inv(covariance)
    target = energy(lambda x: ((x @ precision) * x).sum(-1) / 2, 3)
    x, _ = run_kernel(ChEESKernel(full_mass=full_mass), target, torch.randn(500, 3), 150, 80)
    assert_moments(x, 0.0, covariance.diagonal())
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert_mean(x[..., i] * x[..., j], covariance[i, j])


def test_one_chain():
    # forty targets of one chain each, which learns alone
    scale = torch.tensor([0.1, 1.0, 10.0])
    p = UnnormalizedEnergy(
        lambda x: (x / scale).square().sum(-1) / 2, event_shape=(3,), batch_shape=(40,)
    )
    x, info = run_kernel(ChEESKernel(), EnergyPotential(p), torch.randn(40, 3), 500, 100)
    assert_moments(x / scale, 0.0, 1.0)
    assert 0.6 < info.accept_prob.mean() < 0.97


@pytest.mark.parametrize(
    "name", ["eight schools", pytest.param("breast cancer", marks=pytest.mark.slow)]
)
def test_same_posterior_as_nuts(name):
    model, dense = {
        "eight schools": (eight_schools, False),
        "breast cancer": (breast_cancer, True),
    }[name]
    kernel = ChEESKernel(model, full_mass=dense, jit_compile="capture")
    x = draw(kernel, 200, 250, num_chains=128)
    assert_same_posterior(name, x)
    # R-hat of half chains of n draws that are worth n / tau is about 1 + tau / (2 n), here 1.006
    # to 1.012; a trajectory of one step would make it 1.045, but so does a single half chain of
    # 256 that is held up far out in log tau for long, which is rare and no fault. It adds at most
    # 3^2 / (2 * 255), of normal scores, so that R-hat tells only what all chains do; that they
    # do not walk at random is told by the length, about 2 in any seed.
    assert split_gelman_rubin(normal_scores(x), chain_dim=0, sample_dim=1).max() < 1.04
    assert kernel.trajectory_length > 1.5


# -- what warmup learns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chains", "groups", "tolerance"), [(1, 60, 0.16), (4, 40, 0.1), (100, 8, 0.05)]
)
def test_the_length_climbs_to_the_top_of_its_criterion(chains, groups, tolerance):
    # on a standard normal E(|w'|^2 - |w|^2)^2 is 2 d (1 - sin(2 T) / 2 T), at its highest over
    # T^(1/4) at 2.09; a warmup of one chain sees it through more noise, and is 8 % above in the
    # median, give or take 10 % each, and a few far more: .16 is 5 errors of a median of 60
    normals = EnergyPotential(
        UnnormalizedEnergy(
            lambda x: x.square().sum(-1) / 2, event_shape=(4,), batch_shape=(groups,)
        )
    )
    kernel = ChEESKernel(step_size=0.2, adapt_step_size=False, adapt_mass_matrix=False)
    run_kernel(kernel, normals, torch.randn(chains * groups, 4), 500, 1)
    assert kernel.trajectory_length.median().item() == pytest.approx(2.09, rel=tolerance)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_the_length_comes_in_the_units_of_the_target(scale):
    kernel = ChEESKernel(adapt_mass_matrix=False)
    draws, _ = run_kernel(kernel, normal(scale, 4), torch.randn(100, 4), 400, 100)
    assert_moments(draws / scale, 0.0, 1.0)
    # far from the first step size the first updates are wild, and the average remembers them
    assert kernel.trajectory_length.item() == pytest.approx(2.0 * scale, rel=0.5)


def test_the_length_follows_the_slowest_direction():
    # Equal variances and a correlation of r: the largest eigenvalue is 1 + (d - 1) r, and a
    # trajectory must be that root as long, in units of the scales of a diagonal matrix, unless a
    # dense matrix makes all directions alike.
    r, d = 0.9, 10
    precision = torch.linalg.inv(torch.eye(d) * (1 - r) + r)
    target = energy(lambda x: ((x @ precision) * x).sum(-1) / 2, d)
    lengths = {}
    for full_mass in (False, True):
        kernel = ChEESKernel(full_mass=full_mass)
        run_kernel(kernel, target, torch.randn(200, d), 250, 1)
        lengths[full_mass] = kernel.trajectory_length.item()
    assert lengths[True] == pytest.approx(2.0, rel=0.2)
    scale = precision[0, 0].item() ** -0.25  # the variance is 1, that of gradients P_ii
    assert lengths[False] == pytest.approx(2.09 * (1 + (d - 1) * r) ** 0.5 / scale, rel=0.5)


@pytest.mark.parametrize(("target", "above"), [(0.7, 0.16), (0.8, 0.09), (0.95, 0.03)])
def test_acceptance_adapts_to_the_target(target, above):
    # Near the longest stable step acceptance is a concave function of it: the average of the
    # steps of warmup is accepted more often than these are, at .7 by .04, give or take .02;
    # steps of half the size, a third of the transitions, make that more.
    kernel = ChEESKernel(target_accept_prob=target)
    _, info = run_kernel(kernel, normal(1.0, 20), torch.randn(200, 20), 300, 128)
    assert target - 0.03 < info.accept_prob.mean() < target + above


def test_nothing_changes_after_the_warmup():
    kernel = ChEESKernel()
    kernel.bind(normal([0.1, 10.0], 2), 100)
    state = kernel.init(torch.randn(20, 2))
    lengths = []
    for _ in range(100):
        state, _ = kernel.step(state)
        lengths.append(kernel.trajectory_length.item())
    assert len(set(lengths)) > 90
    learned = (kernel.step_size, kernel.inverse_mass_sqrt, kernel.trajectory_length)
    for _ in range(50):
        state, _ = kernel.step(state)
    assert kernel.step_size is learned[0]
    assert kernel.inverse_mass_sqrt is learned[1]
    assert kernel.trajectory_length is learned[2]


@pytest.mark.parametrize("warmup_steps", [0, 300])
def test_a_length_that_is_not_adapted_stays(warmup_steps):
    kernel = ChEESKernel(trajectory_length=1.5, adapt_trajectory_length=False)
    run_kernel(kernel, normal(1.0, 2), torch.randn(50, 2), warmup_steps, 10)
    assert kernel.trajectory_length.item() == 1.5


def test_each_group_learns_its_own():
    scale = torch.tensor([1e-2, 1.0, 1e2])
    energies = UnnormalizedEnergy(lambda x: (x / scale).square() / 2, batch_shape=(3,))
    potential = EnergyPotential(energies)
    kernel = ChEESKernel(adapt_mass_matrix=False)
    draws, info = run_kernel(kernel, potential, potential.initial(300), 300, 100)
    # in one dimension a step is about as long as this, and the number of steps is rounded up: the
    # lengths differ by up to .13 of it in four seeds
    torch.testing.assert_close(
        kernel.trajectory_length / scale, torch.full((3,), 1.5), rtol=0.4, atol=0.0
    )
    for group in range(3):
        assert_moments(draws[group::3, :, 0] / scale[group], 0.0, 1.0)
        assert 0.7 < info.accept_prob[group::3].mean() < 0.95


def test_groups_that_have_arrived_wait_for_the_others():
    potential = EnergyPotential(UnnormalizedEnergy(lambda x: x.square() / 2, batch_shape=(2,)))
    kernel = ChEESKernel(step_size=0.1, **FIXED)
    kernel.bind(potential, 0)
    state, momentum = kernel.evaluate(torch.randn(4, 1)), torch.randn(4, 1)
    step = torch.full((4, 1), 0.1)
    log_u = torch.zeros(4)
    both, *_ = kernel.trajectory(state, step, None, momentum, log_u, [3, 7])
    for group, steps in enumerate((3, 7)):
        alone, *_ = kernel.trajectory(state, step, None, momentum, log_u, [steps, steps])
        assert torch.equal(both.z[group::2], alone.z[group::2])
        assert torch.equal(both.potential[group::2], alone.potential[group::2])


def update(learner, start, end, momentum, weight, most=10.0):
    """One update of a learner from positions ``(chains, dim)`` around 0."""
    kernel = ChEESKernel()
    kernel.bind(normal(1.0, 2), 10)
    start, end = kernel.evaluate(start), kernel.evaluate(end)
    time = torch.ones(len(weight))
    learner.update(start, end, momentum, time, weight, None, torch.tensor([most]))


def test_learning_survives_trajectories_that_went_astray():
    learner = TrajectoryAdaptation(torch.ones(1), 2)
    for _ in range(5):
        end = torch.randn(4, 2)
        end[1], end[2] = torch.nan, torch.inf
        weight = torch.tensor([0.9, 0.0, 0.0, 0.5])
        update(learner, torch.randn(4, 2), end, torch.randn(4, 2), weight)
        assert learner.length.isfinite().all()
    update(learner, torch.randn(4, 2), end, torch.randn(4, 2), torch.zeros(4))
    learner.finish()
    assert learner.length.isfinite().all()


def test_trajectories_that_went_astray_weigh_nothing():
    start, end, momentum = torch.randn(3, 4, 2)
    end[1], end[2] = torch.nan, torch.inf
    kernel, time, weight = ChEESKernel(), torch.ones(4), torch.tensor([0.9, 0.4, 0.4, 0.5])
    kernel.bind(normal(1.0, 2), 10)
    states = kernel.evaluate(start), kernel.evaluate(end)
    rest = [0, 3]
    few = [kernel.evaluate(z[rest]) for z in (start, end)]
    got = slopes(torch.zeros(1, 2), *states, momentum, time, weight, None)
    want = slopes(torch.zeros(1, 2), *few, momentum[rest], time[rest], weight[rest], None)
    torch.testing.assert_close(got, want)


def test_the_length_grows_while_trajectories_still_move_away_but_not_for_ever():
    learner = TrajectoryAdaptation(torch.ones(1), 2)
    lengths = []
    for _ in range(20):
        z = torch.randn(8, 2)
        z = torch.cat([z, -z])
        update(learner, z, 2 * z, z, torch.ones(16), most=1.5)
        lengths.append(learner.length.item())
    assert lengths[0] == 1.0  # there is nothing yet to measure by
    assert lengths[1] > 1.0
    assert lengths[-1] == 1.5


@pytest.mark.parametrize(("length", "want"), [(6.0, 3.0), (3.0, 2.0), (1.5, 1.5)])
def test_a_better_factor_shortens_what_is_above_the_usual(length, want):
    diagonal = torch.tensor([[[1.0, 1.0]], [[2.0, 0.5]]])
    dense = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]], [[[2.0, 0.0], [2.0, 0.5]]]])
    for old, new in (diagonal, dense):  # the new units are up to twice as long
        learner = TrajectoryAdaptation(torch.tensor([length]), 2)
        learner.remeasure(old, new, usual=2.0)
        assert learner.length.item() == pytest.approx(want)


# -- energies that go wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_wall_is_never_crossed_and_the_target_stays_exact(kind):
    def function(x):
        inside = x.square().sum(-1) / 2
        return torch.where((x > 0).all(-1), inside, {"nan": math.nan, "inf": math.inf}[kind])

    draws, info = run_kernel(
        ChEESKernel(), energy(function, 1), torch.randn(1000, 1).abs(), 30, 150
    )
    assert (draws > 0).all()
    assert info.diverging.any()
    assert (info.accept_prob[info.diverging] == 0).all()
    assert_mean(draws, (2 / math.pi) ** 0.5)
    assert_mean(draws.square(), 1.0)


def test_one_bad_chain_touches_no_other():
    def gone_bad(x):
        return torch.where(x.sum(-1) > 100, math.nan, x.square().sum(-1) / 2)

    z, draws = torch.randn(5, 2), []
    for far in (0.0, 99.9):
        torch.manual_seed(0)
        z[2] = far
        kernel = ChEESKernel(step_size=0.3, **FIXED)
        draws.append(run_kernel(kernel, energy(gone_bad, 2), z, 0, 50)[0])
    others = [0, 1, 3, 4]
    assert torch.equal(draws[0][others], draws[1][others])
    assert draws[1].isfinite().all()


def test_an_energy_error_of_a_thousand_is_a_divergence():
    log_ratio = torch.tensor([-990.0, -1010.0, math.nan, 5000.0, -math.inf, math.inf])
    log_u = torch.full((6,), -2000.0)  # accepts what can be accepted
    end = State(torch.zeros(6, 1), -log_ratio, None)
    accepted, info = decide(end, log_ratio, log_u, MAX_ENERGY_ERROR)
    assert info.diverging.tolist() == [False, True, True, False, True, True]
    assert accepted.tolist() == [True, True, False, True, False, False]
    assert info.accept_prob.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_the_verdict_is_on_the_whole_trajectory():
    kernel = ChEESKernel()
    kernel.bind(normal(1.0, 2), 0)
    start, momentum = kernel.evaluate(torch.randn(50, 2)), torch.randn(50, 2)
    step_size, log_u = torch.full((50, 1), 1.7), torch.rand(50).log()
    end, p, accepted, info = kernel.trajectory(start, step_size, None, momentum, log_u, [5])
    before = start.potential + momentum.square().sum(-1) / 2
    after = end.potential + p.square().sum(-1) / 2
    ratio = (before - after).exp()
    torch.testing.assert_close(info.accept_prob, ratio.clamp(max=1.0), rtol=1e-4, atol=1e-5)
    assert torch.equal(accepted, log_u < (before - after))
    new, _ = kernel.transition(start, step_size, None, momentum, log_u, [5])
    assert torch.equal(new.z, torch.where(accepted[:, None], end.z, start.z))
    assert 0 < accepted.sum() < 50


def test_an_infinite_gradient_is_rejected():
    # at 1 the potential is 0 and its gradient infinite, and there is no way back
    kernel = ChEESKernel()
    kernel.bind(energy(lambda x: -(1 - x).sqrt().sum(-1), 1), 0)
    state = kernel.evaluate(torch.zeros(1, 1))
    momentum = torch.full((1, 1), 1.25)  # less half a kick of 1/2 it is 1
    draws = torch.ones(1, 1), None, momentum, torch.tensor([-1000.0]), [1]
    new, info = kernel.transition(state, *draws)
    assert info.diverging.all()
    assert new.z.item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_potential_that_is_not_finite_is_rejected(bad):
    kernel = ChEESKernel()
    kernel.bind(energy(lambda x: torch.where(x[..., 0] == 0, 0.0, bad), 2), 0)
    start = kernel.evaluate(torch.zeros(1, 2))
    draws = torch.ones(1, 1), None, torch.ones(1, 2), torch.tensor([-1000.0]), [1]
    new, info = kernel.transition(start, *draws)
    assert info.diverging.all()
    assert info.accept_prob == 0
    assert new.potential == 0


def test_an_unstable_trajectory_is_a_divergence():
    kernel = ChEESKernel(step_size=3.0, trajectory_length=60.0, **FIXED)  # unstable above 2
    draws, info = run_kernel(kernel, normal(1.0, 2), torch.randn(10, 2), 0, 20)
    assert info.diverging.any()
    assert (info.accept_prob[info.diverging] == 0).all()
    assert draws.isfinite().all()


def test_chains_that_start_far_out_come_in():
    quartic = energy(lambda x: x.pow(4).sum(-1) / 4, 5)
    z = torch.randn(64, 5)
    z[:6] = 30.0
    draws, info = run_kernel(ChEESKernel(), quartic, z, 200, 200)
    assert info.accept_prob.mean(1).min() > 0.4
    # E[x^2] of the density exp(-x^4 / 4) is 2 Gamma(3/4) / Gamma(1/4)
    assert_moments(draws, 0.0, 2 * math.gamma(0.75) / math.gamma(0.25))


# -- among the others ----------------------------------------------------------------------------


def test_a_graph_does_not_depend_on_the_number_of_steps():
    def run(jit_compile):
        pyro.set_rng_seed(0)
        kernel = ChEESKernel(eight_schools, jit_compile=jit_compile)
        mcmc = MCMC(kernel, 20, 30, num_chains=8, disable_progbar=True)
        mcmc.run()
        return mcmc

    jit, eager = run("capture"), run(False)
    assert len(jit.kernel._engine._graphs) == 1
    assert len(jit.get_extra_fields()["n_steps"].unique()) > 1
    for name, value in eager.get_samples().items():
        assert torch.equal(jit.get_samples()[name], value)


def test_the_first_trajectory_is_short_however_small_the_first_step_was():
    kernel = ChEESKernel(eight_schools, step_size=1e-3)
    mcmc = MCMC(kernel, 1, 30, num_chains=8, disable_progbar=True, save_warmup=True)
    mcmc.run()
    assert mcmc.results.warmup_fields["n_steps"][:, 0].max() <= 4


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_tells_the_number_of_steps_of_each_draw(method):
    kernel = ChEESKernel(eight_schools)
    mcmc = MCMC(kernel, 12, 30, num_chains=2, disable_progbar=True, chain_method=method, thinning=3)
    mcmc.run()
    n_steps = mcmc.get_extra_fields(group_by_chain=True)["n_steps"]
    assert n_steps.shape == (2, 4)
    assert n_steps.dtype == torch.int64
    assert (n_steps >= 1).all()


def test_runs_under_stock_pyro():
    def model():
        return pyro.sample("x", dist.Gamma(3.0, 2.0).expand([20]).to_event(1))

    kernel = ChEESKernel(model)
    mcmc = PyroMCMC(kernel, 400, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    assert_moments(mcmc.get_samples()["x"].T, 1.5, 0.75)  # 20 elements alike
    stats = kernel.diagnostics()["sample_stats"]
    assert stats["n_steps"].shape == (400,)
    assert stats["n_steps"].float().mean() < 6


def test_replicas():
    # density exp(-x^4 + 6 x^2 + x / 2): P(x > 0) = .84431
    p = UnnormalizedEnergy(lambda x: x**4 - 6 * x**2 - x / 2)
    kernel = TemperingKernel(ChEESKernel(p), [1.0, 0.4, 0.15])
    mcmc = MCMC(kernel, 50, 100, num_chains=300, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert_mean((x > 0).double()[..., None], 0.84431)


def test_takes_turns_with_gibbs():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(2 * k, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.5))

    kernel = CompositeKernel(model, [GibbsKernel(), ChEESKernel()])
    mcmc = MCMC(kernel, 50, 100, num_chains=400, disable_progbar=True)
    mcmc.run()
    # y | k ~ N(2 k, sqrt 2)
    odds = 0.3 / 0.7 * math.exp((1.5**2 - 0.5**2) / 4)
    k = mcmc.get_samples(group_by_chain=True)["k"]
    assert_mean(k.double()[..., None], odds / (1 + odds))


@pytest.mark.slow
def test_more_draws_for_a_gradient_than_langevin_where_directions_differ():
    scale = torch.logspace(0, 1.5, 20)[torch.randperm(20)]
    rotation, _ = torch.linalg.qr(torch.randn(20, 20))
    target = energy(lambda x: ((x @ rotation) / scale).square().sum(-1) / 2, 20)
    mixing = {}
    for make, num_draws in ((LangevinKernel, 400), (ChEESKernel, 60)):
        kernel = make(adapt_mass_matrix=False)
        kernel.bind(target, 200)
        state = kernel.init((torch.randn(200, 20) * scale) @ rotation.T)
        draws, gradients = [], 0
        for t in range(200 + num_draws):
            state, _ = kernel.step(state)
            if t >= 200:
                draws.append((state.z @ rotation).clone())
                gradients += kernel.extra_fields["n_steps"][0] if kernel.extra_fields else 1
        x = torch.stack(draws, 1)[..., scale.argmax()]
        error = x.mean(1).var() / scale.max() ** 2  # of the mean of one chain
        mixing[type(kernel)] = float(error * gradients)
    assert mixing[ChEESKernel] < mixing[LangevinKernel] / 2


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "auto", None])
def test_length_out_of_range(bad):
    with pytest.raises(ValueError, match="trajectory_length"):
        ChEESKernel(trajectory_length=bad)


def test_before_setup():
    kernel = ChEESKernel(trajectory_length=3.0)
    assert kernel.trajectory_length == 3.0
    with pytest.raises(RuntimeError, match="setup"):
        kernel.move(None)


def test_discrete_sites_are_left_to_others():
    potential = EnergyPotential(UnnormalizedEnergy(lambda x: x, support=constraints.boolean))
    with pytest.raises(ValueError, match="GibbsKernel"):
        ChEESKernel().bind(potential, 0)
