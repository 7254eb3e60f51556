"""The pilot spaces the temperatures evenly, and tunes the kernel at each."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LangevinKernel, UnnormalizedEnergy
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.mcmc import GibbsKernel, MHKernel
from pyro_ebm.normalizer.annealing import pilot as pilot_run
from pyro_ebm.normalizer.annealing.choices import checked_betas, path_of
from pyro_ebm.normalizer.annealing.pilot import DROP, _resampled, pilot
from pyro_ebm.normalizer.annealing.schedule import (
    SchedulePoint,
    TemperatureSchedule,
    schedule_of,
)
from tests.normalizer.targets import gaussian, wells

ONE = torch.ones(1)


def point(beta, length=1.0, slowness=1.0, step_size=1.0):
    return SchedulePoint(beta, length, slowness, step_size * ONE, None)


def run_pilot(p, kernel=None, proposal=None):
    path = path_of(p, proposal)
    kernel = LangevinKernel() if kernel is None else kernel
    kernel.bind(path, 0)
    return path, kernel, pilot(path, kernel, disable_progbar=True)


def test_points_are_as_far_apart_as_the_drop_allows():
    _, _, points = run_pilot(wells(4))
    betas = [found.beta for found in points]
    assert betas[0] == 0
    assert betas[-1] == 1
    assert betas == sorted(betas)
    far = math.sqrt(-math.log1p(-DROP))
    assert all(abs(found.length - far) < 0.01 for found in points[1:-1])
    assert 0 < points[-1].length <= far + 0.01


def test_the_length_of_a_path_between_gaussians():
    # N(0, I) -> N(0, s^2 I): the Fisher information of beta is d/2 (dlog precision / dbeta)^2, so
    # that the length is sqrt(d / 2) log(1 / s^2)
    dim, precision = 20, 25.0
    p = UnnormalizedEnergy(lambda x: precision * x.square().sum(-1) / 2, event_shape=(dim,))
    _, _, points = run_pilot(p, proposal=dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    want = math.sqrt(dim / 2) * math.log(precision)
    # each of its steps has a relative error of about 1 / sqrt(2 * 256), and a bias of 9 percent
    assert abs(sum(found.length for found in points) / want - 1) < 0.15


def test_the_kernel_is_tuned_at_each_point():
    p = UnnormalizedEnergy(lambda x: 100 * x.square().sum(-1), event_shape=(5,))
    proposal = dist.Normal(torch.zeros(5), 1.0).to_event(1)
    path, kernel, points = run_pilot(p, proposal=proposal)
    deviation = [float(found.inverse_mass_sqrt.mean()) for found in points]
    for found, sd in zip(points, deviation, strict=True):
        assert abs(sd * (1 + 199 * found.beta) ** 0.5 - 1) < 0.3
    settings = TemperatureSchedule(points, [0.0, 1.0])
    for beta in (0.01, 0.3, 1.0):
        settings.set(kernel, beta)
        sd = (1 + 199 * beta) ** -0.5
        path.at(beta)
        state = kernel.evaluate(sd * torch.randn(2000, 5))
        accepted = torch.stack([kernel.step(state)[1].accept_prob.mean() for _ in range(5)])
        assert abs(accepted.mean() - 0.574) < 0.12


def test_a_slow_kernel_gets_more_temperatures():
    p, _, _ = gaussian(20, 100.0)
    fast, slow = (schedule_of(run_pilot(p, kernel)[2]) for kernel in (LangevinKernel(), MHKernel()))
    assert len(slow) > 2 * len(fast)


def test_a_kernel_without_a_step_size_is_not_tuned():
    path = path_of(BoltzmannMachine(0.2, edges=lattice_edges(2, 3)))
    kernel = GibbsKernel()
    kernel.bind(path, 0)
    points = pilot(path, kernel, disable_progbar=True)
    assert all(found.inverse_mass_sqrt is None and found.step_size == 0.1 for found in points)


def test_settings_between_points():
    points = [point(0.0, step_size=1.0), point(0.5, step_size=1.0), point(1.0, step_size=0.01)]
    kernel = LangevinKernel()
    kernel.bind(path_of(wells(1)), 0)
    settings = TemperatureSchedule(points, [])
    for beta, want in {0.25: 1.0, 0.5: 1.0, 0.75: 0.1, 1.0: 0.01}.items():
        settings.set(kernel, beta)
        assert torch.allclose(kernel.adaptation.step_size, torch.tensor([want]))


def test_how_many_temperatures():
    points = [point(0.0), *(point(b, length=0.5) for b in (0.1, 0.3, 0.6, 1.0))]
    # variance (sum of lengths)^2 / T of 0.5
    assert len(schedule_of(points)) == 1 + 8
    # drop = 1 - exp(-length^2)
    assert len(schedule_of(points, ess_drop=1 - math.exp(-(0.1**2)))) == 1 + 20
    assert len(schedule_of(points, num_temperatures=77)) == 77
    assert len(schedule_of(points, num_temperatures=2)) == 2
    tau = [point(0.0), *(point(b, 0.5, slowness=4.0) for b in (0.1, 0.3, 0.6, 1.0))]
    assert len(schedule_of(tau)) == 1 + 32
    assert len(schedule_of([point(0.0), point(1.0, length=1000.0)])) == 10_001


def test_more_temperatures_where_the_kernel_is_slow():
    points = [point(0.0), point(0.5, 1.0, slowness=1.0), point(1.0, 1.0, slowness=9.0)]
    betas = schedule_of(points, num_temperatures=41)
    assert sum(b < 0.5 - 1e-9 for b in betas) == 10
    # but a given drop speaks of lengths alone
    betas = schedule_of(points, ess_drop=1 - math.exp(-(0.1**2)))
    assert sum(b < 0.5 - 1e-9 for b in betas) == 10


def test_a_path_that_stands_still():
    assert schedule_of([point(0.0), point(1.0, length=0.0)]) == [0.0, 1.0]


def test_resampling_keeps_the_expected_number_of_copies():
    z = torch.arange(4.0)[:, None, None].expand(4, 2, 1)
    log_w = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]).T.log()
    new = _resampled(z, log_w)[..., 0]
    assert sorted(new[:, 0].tolist()) == [0.0, 0.0, 1.0, 2.0]
    assert new[:, 1].tolist() == [3.0] * 4


def test_an_improper_density_has_no_schedule(monkeypatch):
    monkeypatch.setattr(pilot_run, "MAX_POINTS", 50)
    tilted = UnnormalizedEnergy(lambda x: -x.sum(-1), event_shape=(2,))
    with pytest.raises(ValueError, match="the density may be improper"):
        run_pilot(tilted, proposal=dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    "betas",
    [
        [0.0],
        [0.1, 1.0],
        [0.0, 0.9],
        [0.0, 0.5, 0.5, 1.0],
        [0.0, 0.7, 0.3, 1.0],
        [0.0, math.nan, 1.0],
    ],
)
def test_temperatures_that_do_not_rise_from_0_to_1(betas):
    with pytest.raises(ValueError, match="must rise from 0, the start, to 1, the target"):
        checked_betas(betas)


def test_temperatures_that_are_no_numbers():
    with pytest.raises(ValueError, match="must be a sequence of numbers"):
        checked_betas(0.5)
    with pytest.raises(ValueError, match="must be a sequence of numbers"):
        checked_betas(["a"])
