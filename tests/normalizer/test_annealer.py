"""Annealing, eager and by graphs: the same log weights, from one graph."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import (
    ChEESKernel,
    LangevinKernel,
    MHKernel,
    UnnormalizedEnergy,
    estimate_log_normalizer,
)
from pyro_ebm.distributions import RBM, BoltzmannMachine, GaussianRBM
from pyro_ebm.mcmc import CompositeKernel, EnergyPotential, GibbsKernel, Info
from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.normalizer.annealing.annealer import Annealer
from pyro_ebm.normalizer.annealing.choices import path_of
from pyro_ebm.normalizer.annealing.path import AnnealingPath, GeometricPath
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule

BETAS = [0.0, 0.1, 0.3, 0.6, 0.8, 1.0]


@pytest.fixture(autouse=True)
def _exact():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def graphs(monkeypatch):
    """The names of the functions that were captured, in order."""
    names, add = [], Engine._add_graph

    def added(self, *args):
        names.append(self.function.__name__)
        return add(self, *args)

    monkeypatch.setattr(Engine, "_add_graph", added)
    return names


class Narrowing(AnnealingPath):
    """From N(0, 1) to N(0, 1 / 10), without gradients that could be combined."""

    def sample(self, num):
        return torch.randn(num, self.dim)

    def parts(self, z):
        return (z.square().sum(-1) / 2,)

    def combine(self, square):
        return (1 + 9 * self.beta) * square


def bowl(x):
    return 5 * x.square().sum(-1)


def wells(x):
    return (x.square() - 2).square().sum(-1) / 2 + x[..., 0]


def well_path():
    p = UnnormalizedEnergy(wells, event_shape=(2,))
    return GeometricPath.between(dist.Normal(torch.zeros(2), 2.0).to_event(1), p)


def box_path():
    """Half of the start lies where the target has no density."""
    p = UnnormalizedEnergy(lambda x: torch.where(x > 0, x, torch.inf))
    return GeometricPath.between(dist.Normal(0.0, 1.0), p)


def narrowing():
    p = UnnormalizedEnergy(bowl, event_shape=(3,))
    return Narrowing(EnergyPotential(p, like=torch.zeros(3)))


def machine(n=5, m=3, family=RBM):
    torch.manual_seed(0)
    w = torch.randn(n, m)
    return family(w, torch.zeros(n), torch.zeros(m))


def spins():
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    return BoltzmannMachine(torch.tensor(0.4), edges=edges)


CASES = {
    "mala": (well_path, LangevinKernel),
    "metropolis": (well_path, MHKernel),
    "infinite": (box_path, LangevinKernel),
    "no gradients": (narrowing, LangevinKernel),
    "layers": (lambda: path_of(machine()), GibbsKernel),
    "real layers": (lambda: path_of(machine(family=GaussianRBM)), GibbsKernel),
    "real layers, mala": (lambda: path_of(machine(family=GaussianRBM)), LangevinKernel),
    "tempered": (lambda: path_of(spins()), GibbsKernel),
}


def log_weights(make, kernel, flag, num_steps=1, betas=BETAS):
    pyro.set_rng_seed(0)
    path, kernel = make(), kernel(jit_compile=flag)
    kernel.bind(path, warmup_steps=0)
    pyro.set_rng_seed(1)
    z = path.at(betas[0]).draw(20)
    return Annealer(path, kernel, TemperatureSchedule([], betas), num_steps).run(z), path


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(("make", "kernel"), CASES.values(), ids=CASES)
def test_the_log_weights_are_those_without_graphs(graphs, make, kernel, num_steps):
    eager, *_ = log_weights(make, kernel, False, num_steps)
    assert "leap" not in graphs
    found, path = log_weights(make, kernel, "capture", num_steps)
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)
    assert found[found.isfinite()].std() > 1e-3
    # where nothing is remembered, the later steps at a temperature take the state as it is
    forgets = kernel is LangevinKernel and path.gradients(path.draw(1)) is None
    assert graphs.count("leap") == (2 if forgets and num_steps > 1 else 1)


def test_chains_without_density_keep_a_weight_of_0():
    found, *_ = log_weights(box_path, LangevinKernel, "capture")
    assert found.isneginf().any()
    assert found.isfinite().any()


def test_one_graph_for_many_runs_both_ways(graphs):
    path, kernel = well_path(), LangevinKernel(jit_compile="capture")
    kernel.bind(path, 0)
    annealer = Annealer(path, kernel, TemperatureSchedule([], BETAS))
    z = torch.randn(20, 2)
    annealer.run(z)
    annealer.run(z, reverse=True)
    annealer.run(z)
    assert graphs == ["leap"]
    annealer.run(z[:5])
    assert graphs == ["leap", "leap"]


def test_parameters_that_change_are_seen():
    net = MLPEnergy(2, hidden=(8,))
    p = UnnormalizedEnergy(lambda x: net(x) + x.square().sum(-1), (2,))
    q = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    path, runs = GeometricPath.between(q, p), []
    for flag in (False, "capture"):
        torch.manual_seed(0)
        kernel = LangevinKernel(jit_compile=flag)
        kernel.bind(path, 0)
        annealer = Annealer(path, kernel, TemperatureSchedule([], BETAS))
        for factor in (1.0, 3.0):
            with torch.no_grad():
                net.layers[0].weight.mul_(factor)
            z = torch.randn(10, 2)
            runs.append(annealer.run(z))
        with torch.no_grad():
            net.layers[0].weight.div_(3.0)
    torch.testing.assert_close(runs[2:], runs[:2])
    assert not torch.allclose(runs[0], runs[1])


class TwoSteps(LangevinKernel):
    """Makes two proposals, and may end at the first: not where it was evaluated last."""

    def transition(self, state, *draws):
        one, info = super().transition(state, *draws)
        self.evaluate(one.z + 1.0)
        return one, Info(info.accept_prob, info.diverging)


class Watched(GeometricPath):
    """Counts how often both densities are evaluated."""

    count = 0

    def gradients(self, z):
        self.count += 1
        return super().gradients(z)


def watched(kernel, num_steps=1):
    """The log weights, those of a path that remembers nothing, and the evaluations."""
    path, weights = well_path(), []
    path.__class__ = Watched
    for remembers in (True, False):
        kernel = kernel.copy()
        kernel.bind(path, 0)
        annealer = Annealer(path, kernel, TemperatureSchedule([], BETAS), num_steps)
        annealer.remembers &= remembers
        pyro.set_rng_seed(0)
        z = path.at(0.0).draw(30)
        path.count = 0
        weights.append(annealer.run(z))
        if remembers:
            count = path.count
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)
    return count


@pytest.mark.parametrize("num_steps", [1, 3])
def test_what_is_known_is_not_computed_again(num_steps):
    # once at the start by the kernel, once by the loop, and at each proposal: no more
    moves = num_steps * (len(BETAS) - 2)
    assert watched(LangevinKernel(step_size=0.3), num_steps) <= moves + 3


@pytest.mark.parametrize("flag", [False, "capture"])
def test_a_kernel_that_is_evaluated_elsewhere(flag):
    watched(TwoSteps(step_size=0.3, jit_compile=flag))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_kernel_of_several_transitions(num_steps):
    kernel = ChEESKernel(step_size=0.3)
    watched(kernel, num_steps)


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (well_path, LangevinKernel()),
        (well_path, LangevinKernel(jit_compile="auto")),  # for four transitions
        (lambda: path_of(UnnormalizedEnergy(lambda x: x, support=dist.constraints.boolean)),)
        + (GibbsKernel(jit_compile="capture"),),
        (well_path, CompositeKernel(kernels=[LangevinKernel(jit_compile="capture")])),
    ],
    ids=["not asked", "short", "single sites", "composite"],
)
def test_where_there_are_no_graphs_of_the_loop(graphs, make, kernel):
    path = make()
    kernel.bind(path, 0)
    log_w = Annealer(path, kernel, TemperatureSchedule([], BETAS)).run(path.draw(10))
    assert log_w.isfinite().all()
    assert "leap" not in graphs


def test_paths_pickle_without_what_they_remember():
    path = narrowing()
    path(torch.randn(4, 3))
    again = pickle.loads(pickle.dumps(path))
    assert again.last is None
    z = torch.randn(4, 3)
    torch.testing.assert_close(again(z), path(z))


def test_the_whole_estimate():
    p = machine()
    truth = float(p.exact_log_normalizer())
    kernel = GibbsKernel(jit_compile="capture")
    found = estimate_log_normalizer(
        p, "ais", kernel=kernel, samples=p.exact_sample((200,)), disable_progbar=True
    )
    assert abs(float(found) - truth) < 4.5 * float(found.std_error)
    assert found.upper is not None
