"""Annealing by graphs: the same log weights as without, from one graph."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import LangevinKernel, MHKernel, UnnormalizedEnergy, estimate_log_normalizer
from pyro_ebm.distributions import RBM, BoltzmannMachine, GaussianRBM
from pyro_ebm.mcmc import CompositeKernel, EnergyPotential, GibbsKernel, Info
from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.normalizer.annealing.ais import anneal, path_of
from pyro_ebm.normalizer.annealing.graphed import GraphedAnnealing
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
    return anneal(path, kernel, TemperatureSchedule([], betas), z, betas, num_steps), path, kernel


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(("make", "kernel"), CASES.values(), ids=CASES)
def test_the_log_weights_are_those_without_graphs(graphs, make, kernel, num_steps):
    eager, *_ = log_weights(make, kernel, False, num_steps)
    assert graphs == []
    found, *_ = log_weights(make, kernel, "capture", num_steps)
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)
    assert found[found.isfinite()].std() > 1e-3
    assert graphs == ["leap"]


def test_chains_without_density_keep_a_weight_of_0():
    found, *_ = log_weights(box_path, LangevinKernel, "capture")
    assert found.isneginf().any()
    assert found.isfinite().any()


def test_one_graph_for_many_runs_both_ways(graphs):
    _, path, kernel = log_weights(well_path, LangevinKernel, "capture")
    z = torch.randn(20, 2)
    anneal(path, kernel, TemperatureSchedule([], BETAS), z, BETAS[::-1])
    anneal(path, kernel, TemperatureSchedule([], BETAS), z, BETAS)
    assert graphs == ["leap"]
    anneal(path, kernel, TemperatureSchedule([], BETAS), z[:5], BETAS)
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
        for factor in (1.0, 3.0):
            with torch.no_grad():
                net.layers[0].weight.mul_(factor)
            z = torch.randn(10, 2)
            runs.append(anneal(path, kernel, TemperatureSchedule([], BETAS), z, BETAS))
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


def test_a_kernel_that_is_evaluated_elsewhere_runs_without_graphs():
    path, kernel = well_path(), TwoSteps(jit_compile="capture")
    kernel.bind(path, 0)
    z = path.at(0.0).draw(10)
    graphed = GraphedAnnealing.of(path, kernel, planned=10)
    assert graphed is not None
    assert graphed.run(TemperatureSchedule([], BETAS), z, BETAS, 1, BETAS[1:]) is None
    pyro.set_rng_seed(0)
    found = anneal(path, kernel, TemperatureSchedule([], BETAS), z, BETAS)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (well_path, LangevinKernel()),
        (well_path, LangevinKernel(jit_compile="auto")),  # for ten transitions
        (lambda: path_of(UnnormalizedEnergy(lambda x: x, support=dist.constraints.boolean)),)
        + (GibbsKernel(jit_compile="capture"),),
        (well_path, CompositeKernel(kernels=[LangevinKernel(jit_compile="capture")])),
    ],
    ids=["not asked", "short", "single sites", "composite"],
)
def test_where_there_are_none(make, kernel):
    path = make()
    kernel.bind(path, 0)
    assert GraphedAnnealing.of(path, kernel, planned=10) is None


def test_paths_pickle_without_their_graphs():
    _, path, _ = log_weights(narrowing, LangevinKernel, "capture")
    again = pickle.loads(pickle.dumps(path))
    assert again.graphed is None
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
