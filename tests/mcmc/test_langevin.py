import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.mcmc import MCMC, EnergyPotential, LangevinKernel
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from tests.statistics import SIGMAS, assert_mean, assert_moments, run_kernel


def energy(function, dim):
    return EnergyPotential(UnnormalizedEnergy(function, event_shape=(dim,)))


def normal(dim, variance=1.0):
    return energy(lambda x: x.square().sum(-1) / (2 * variance), dim)


# -- theory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variance", "step_size"), [(1.0, 0.2), (1.0, 1.0), (4.0, 3.0)])
def test_unadjusted_has_its_stationary_variance(variance, step_size):
    kernel = LangevinKernel(step_size=step_size, adjusted=False)
    stationary = variance / (1 - step_size / (2 * variance))
    z = stationary**0.5 * torch.randn(1000, 1)
    draws, info = run_kernel(kernel, normal(1, variance), z, 0, 300)
    assert_moments(draws, 0.0, stationary)
    assert (info.accept_prob == 1).all()
    assert not info.diverging.any()


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_unadjusted_temperature(temperature):
    kernel = LangevinKernel(step_size=0.4, adjusted=False, temperature=temperature)
    draws, _ = run_kernel(kernel, normal(1), torch.randn(1000, 1), 50, 300)
    # the noise, and so the variance, is T times that of T = 1, the discretization's bias included
    assert_moments(draws, 0.0, temperature / (1 - 0.2))


@pytest.mark.parametrize(("dim", "chains", "accept"), [(10, 4000, 0.5866), (100, 2000, 0.5757)])
def test_acceptance_at_the_optimal_scaling(dim, chains, accept):
    kernel = LangevinKernel(step_size=2.7235 / 2 * dim ** (-1 / 3), adapt_step_size=False)
    _, info = run_kernel(kernel, normal(dim), torch.randn(chains, dim), 0, 50)
    assert_mean(info.accept_prob[..., None], accept)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("full_mass", [False, True])
def test_temperature_multiplies_the_variance(temperature, full_mass):
    kernel = LangevinKernel(temperature=temperature, full_mass=full_mass)
    draws, _ = run_kernel(kernel, normal(2, 3.0), torch.randn(200, 2), 200, 300)
    assert_moments(draws, 0.0, 3.0 * temperature)


def test_adjusted_is_invariant_at_any_step():
    # started in the target it stays there, one transition or fifty, adapted or not
    kernel = LangevinKernel(step_size=0.8, adapt_step_size=False)
    z = torch.randn(20_000, 3)
    draws, info = run_kernel(kernel, normal(3), z, 0, 4)
    assert info.accept_prob.mean() < 0.95  # the correction had something to correct
    for t in (0, 3):
        assert_moments(draws[:, t].reshape(100, 200, 3), 0.0, 1.0)


def test_adjusted_satisfies_detailed_balance():
    # In equilibrium the flow from A to B equals the flow from B to A, for any two sets.
    double_well = energy(lambda x: (x.square().sum(-1) - 2).square() / 2, 1)
    kernel = LangevinKernel(step_size=0.3, adapt_step_size=False)
    draws, _ = run_kernel(kernel, double_well, torch.randn(2000, 1), 100, 200)
    before, after = draws[:, :-1, 0], draws[:, 1:, 0]
    flow = ((before < 1) & (after > 1.5)).double() - ((before > 1.5) & (after < 1)).double()
    assert flow.abs().sum() > 1000
    net = flow.sum(1)  # of each chain
    assert net.mean().abs() < SIGMAS * net.std() / len(net) ** 0.5


def test_preconditioned_unadjusted_is_the_textbooks_in_whitened_coordinates():
    covariance = torch.tensor([[4.0, 1.8], [1.8, 1.0]])
    precision = torch.linalg.inv(covariance)
    target = energy(lambda x: ((x @ precision) * x).sum(-1) / 2, 2)
    kernel = LangevinKernel(step_size=0.1, adjusted=False, adapt_mass_matrix=True, full_mass=True)
    kernel.bind(target, 300)
    state = kernel.init(torch.randn(500, 2))
    draws = []
    for t in range(600):
        state, _ = kernel.step(state)
        if t >= 300:
            draws.append(state.z)
    sigma = (kernel.inverse_mass_sqrt @ kernel.inverse_mass_sqrt.mT)[0].double()
    # z' = (I - eps S P) z + sqrt(2 eps) L xi: the stationary C solves C = A C A' + 2 eps S
    a = torch.eye(2, dtype=torch.double) - 0.1 * sigma @ precision.double()
    system = torch.eye(4, dtype=torch.double) - torch.kron(a, a)
    stationary = torch.linalg.solve(system, 0.2 * sigma.reshape(4)).reshape(2, 2)
    assert_moments(torch.stack(draws, 1), 0.0, stationary.diagonal())


# -- schedules -----------------------------------------------------------------------------------


def falling(t):
    return 0.5 / (1 + t / 20) ** (2 / 3)


def test_a_decreasing_schedule_loses_the_bias_of_a_fixed_step():
    z = torch.randn(5000, 1)
    variances = []
    for step_size in (falling, 0.5):
        kernel = LangevinKernel(step_size=step_size, adjusted=False)
        draws, _ = run_kernel(kernel, normal(1), z, 500, 1)
        variances.append(draws.var().item())
    error = (2 / 5000) ** 0.5
    bias = 1 / (1 - falling(500) / 2) - 1
    assert abs(variances[0] - 1) < 4.5 * error + bias
    assert variances[1] == pytest.approx(1 / (1 - 0.25), abs=4.5 * error * 4 / 3)


def test_schedule_counts_every_transition():
    seen = []

    def schedule(t):
        seen.append(t)
        return 0.1

    run_kernel(
        LangevinKernel(step_size=schedule, adjusted=False), normal(1), torch.zeros(1, 1), 3, 2
    )
    assert seen == [0, 0, 1, 2, 3, 4]  # the first is looked at when the kernel is made


def test_schedule_is_what_the_statistics_tell():
    kernel = LangevinKernel(
        potential_fn=_harmonic, step_size=lambda t: 1.0 / (1 + t), adjusted=False
    )
    kernel.initial_params = {"x": torch.zeros(2)}
    kernel.setup(2)
    params = kernel.initial_params
    for _ in range(5):
        params = kernel.sample(params)
    steps = kernel.diagnostics()["sample_stats"]["step_size"]
    torch.testing.assert_close(steps, torch.tensor([1 / 3, 1 / 4, 1 / 5]))


def _harmonic(params):
    return params["x"].square().sum() / 2


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_schedule_must_stay_positive(bad):
    kernel = LangevinKernel(step_size=lambda t: 0.1 if t < 3 else bad, adjusted=False)
    with pytest.raises(ValueError, match="at step 3"):
        run_kernel(kernel, normal(1), torch.zeros(1, 1), 0, 10)


@pytest.mark.parametrize("settings", [{}, {"adapt_step_size": True}])
def test_a_schedule_cannot_be_adapted(settings):
    with pytest.raises(ValueError, match="schedule"):
        LangevinKernel(step_size=falling, **settings)


def test_a_schedule_may_be_adjusted():
    kernel = LangevinKernel(step_size=falling, adapt_step_size=False)
    draws, _ = run_kernel(kernel, normal(1), torch.randn(500, 1), 0, 200)
    assert_moments(draws, 0.0, 1.0)


def test_unadjusted_has_no_acceptance_to_adapt_to():
    with pytest.raises(ValueError, match="adjusted"):
        LangevinKernel(adjusted=False, adapt_step_size=True)


# -- energies that go wrong ------------------------------------------------------------------------


def walled(kind):
    """Half a normal: |x| has no density, or an undefined one, below 0."""

    def function(x):
        inside = x.square().sum(-1) / 2
        return torch.where((x > 0).all(-1), inside, {"nan": math.nan, "inf": math.inf}[kind])

    return energy(function, 1)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_wall_is_never_crossed_and_the_target_stays_exact(kind):
    z = torch.randn(2000, 1).abs()
    draws, info = run_kernel(LangevinKernel(), walled(kind), z, 50, 100)
    assert (draws > 0).all()
    assert info.diverging.any()
    assert (info.accept_prob[info.diverging] == 0).all()
    assert_mean(draws, (2 / math.pi) ** 0.5)
    assert_mean(draws.square(), 1.0)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_unadjusted_stays_where_it_was_at_a_wall(kind):
    kernel = LangevinKernel(step_size=0.5, adjusted=False)
    draws, info = run_kernel(kernel, walled(kind), torch.ones(50, 1), 0, 100)
    assert (draws > 0).all()
    stayed = draws[:, 1:, 0] == draws[:, :-1, 0]
    assert torch.equal(stayed, info.diverging[:, 1:])
    assert info.diverging.any()


@pytest.mark.parametrize("adjusted", [True, False])
def test_an_infinite_gradient_is_rejected(adjusted):
    def function(x):  # 0 below 0, where its gradient is 0 * nan
        return torch.where(x > 0, x.sqrt(), 0.0).sum(-1)

    kernel = LangevinKernel(step_size=0.1, adjusted=adjusted)
    kernel.bind(energy(function, 1), 0)
    state = kernel.evaluate(torch.tensor([[1.0]]))
    far_left, one = torch.full((1, 1), -10.0), torch.ones(())
    new, info = kernel.transition(
        state, torch.tensor([[0.1]]), None, one, far_left, torch.tensor([-100.0])
    )
    assert info.diverging.all()
    assert new.z.item() == 1.0


@pytest.mark.parametrize("adjusted", [True, False])
def test_one_bad_chain_touches_no_other(adjusted):
    def gone_bad(x):
        return torch.where(x.sum(-1) > 100, math.nan, x.square().sum(-1) / 2)

    settings = {"step_size": 0.3, "adjusted": adjusted, "adapt_step_size": False}
    z = torch.randn(5, 2)
    draws = []
    for far in (0.0, 99.9):
        torch.manual_seed(0)
        z[2] = far
        kernel = LangevinKernel(**settings)
        draws.append(run_kernel(kernel, energy(gone_bad, 2), z, 0, 50)[0])
    others = [0, 1, 3, 4]
    assert torch.equal(draws[0][others], draws[1][others])
    assert draws[1].isfinite().all()


def test_an_overflowing_ratio_neither_is_accepted_nor_spoils_the_step_size():
    # values and gradients are finite, their squares are not: inf - inf
    steep = energy(lambda x: -1e38 * x.sum(-1).tanh() * 3, 1)
    kernel = LangevinKernel(step_size=1.0)
    draws, info = run_kernel(kernel, steep, torch.zeros(20, 1), 50, 50)
    assert draws.isfinite().all()
    assert info.accept_prob.isfinite().all()
    assert kernel.step_size.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"step_size": math.nan}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": "auto"}, "step_size"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"target_accept_prob": 0.0}, "target_accept_prob"),
        ({"target_accept_prob": 1.0}, "target_accept_prob"),
        ({"target_accept_prob": math.nan}, "target_accept_prob"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        LangevinKernel(**settings)


def test_adapts_the_mass_matrix_only_when_adjusted_unless_asked():
    for settings, adapts in (({}, True), ({"adjusted": False}, False)):
        kernel = LangevinKernel(**settings)
        kernel.bind(normal(2), 100)
        assert isinstance(kernel.adaptation, Adaptation)
        assert (kernel.inverse_mass_sqrt is not None) == adapts


@pytest.mark.parametrize("chains", [1, 20])
def test_unadjusted_steps_that_miss_a_part_of_the_density_are_noticed(chains):
    def model(detached):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        y = x.detach() if detached else x
        pyro.factor("pull", -(y - 3).square().sum())

    def draws(detached, **settings):
        kernel = LangevinKernel(model, **settings)
        MCMC(kernel, 5, 5, num_chains=chains, disable_progbar=True).run(detached)

    with pytest.warns(UserWarning, match=r"gradient of the log density of \['x'\]"):
        draws(True, adjusted=False)
    draws(False, adjusted=False)  # no warning
    draws(True)  # slow, and right


def test_short_runs_step_by_the_scale_of_the_data():
    x = torch.tensor([1.0, 3.0]) * torch.randn(100_000, 2)
    for points in (x, dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1)):
        kernel = LangevinKernel.short_run(points, 0.1, temperature=0.5)
        # 0.1 (1 + 9) / 2; the variance of the estimate of sigma^2 is 2 sigma^4 / n
        assert abs(kernel.step_size - 0.5) < 0.1 * 5 * (2 * (1 + 81) / 4 / len(x)) ** 0.5
        assert (kernel.adjusted, kernel.adapt_step_size, kernel.temperature) == (False, False, 0.5)
    with pytest.raises(ValueError, match="positive and finite variance, got 0"):
        LangevinKernel.short_run(torch.ones(1, 3))
