"""Kernels kept through training: one graph, never a stale one, the negatives of an eager run."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from torch import nn

from pyro_ebm import ContrastiveDivergence, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.distributions import RBM, RBMModule
from pyro_ebm.losses.contrastive.kept_kernels import (
    MAX_KEPT,
    MAX_MISSES,
    KeptKernels,
    runs_as_graph,
)
from pyro_ebm.mcmc import CompositeKernel, EnergyPotential, GibbsKernel
from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.nn import MLPEnergy


@pytest.fixture
def graphs(monkeypatch):
    """The names of the functions that were captured, in order."""
    names, add = [], Engine._add_graph

    def added(self, *args):
        names.append(self.function.__name__)
        return add(self, *args)

    monkeypatch.setattr(Engine, "_add_graph", added)
    return names


def model_of(net, name="net"):
    def model(x):
        pyro.module(name, net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: net(x), (2,)), obs=x)

    return model


def train(kernel, batches, model_of=model_of, before=lambda step, net: None, **settings):
    """The parameters after each step, and the loss."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    net = MLPEnergy(2, hidden=(8,)).double()
    loss = ContrastiveDivergence(kernel, **settings)
    module = loss(model_of(net), lambda x: None)
    path = []
    for step, x in enumerate(batches):
        before(step, net)
        net.zero_grad()
        module(x).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 1e-4 * parameter.grad
        path.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return torch.stack(path), loss


def same_run(kernel, batches, **settings):
    """Both runs, whose parameters agree all the way; the loss that kept a graph."""
    other, *_ = train(_with(kernel, False), batches, **settings)
    path, loss = train(_with(kernel, "capture"), batches, **settings)
    torch.testing.assert_close(path, other, rtol=1e-9, atol=1e-12)
    assert (path[1:] - path[:-1]).abs().amax(1).min() > 1e-9
    return loss


def _with(kernel, jit_compile):
    kernel = kernel.copy()
    kernel.jit_compile = jit_compile
    return kernel


def batches(*sizes):
    torch.manual_seed(0)
    return [torch.randn(n, 2).double() for n in sizes]


KERNELS = {
    "mala": LangevinKernel(),
    "ula": LangevinKernel(adjusted=False, step_size=0.05),
    "schedule": LangevinKernel(adjusted=False, step_size=lambda t: 0.1 / (1 + t)),
    "mh": MHKernel(),
}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_one_graph_serves_the_run(graphs, kernel, persistent):
    loss = same_run(kernel, batches(*[6] * 8), num_steps=3, persistent=persistent)
    # the transition, and the gradient at the start: captured once
    assert graphs == ["transition", "value_and_grad"][: 2 if kernel.needs_grad else 1]
    assert len(loss.negatives.kept._seen) == 1


@pytest.mark.parametrize("flag", [False, "capture"])
def test_a_schedule_goes_on_within_a_gradient_and_starts_anew_at_the_next(flag):
    # from x = 1 with U = x^2 / 2 and no noise to speak of: x' = x - eps x, twice
    kernel = LangevinKernel(
        adjusted=False, step_size=lambda t: 0.5 / (1 + t), temperature=1e-20, jit_compile=flag
    )
    loss = ContrastiveDivergence(kernel, num_steps=2, persistent=True, num_chains=3)
    net = Quadratic()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net), obs=x)

    for _ in range(4):
        loss.chains["x"] = torch.ones(3)
        loss(model, lambda x: None)(torch.ones(2)).backward()
        torch.testing.assert_close(loss.chains["x"], torch.full((3,), (1 - 0.5) * (1 - 0.25)))


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.precision = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.precision * x.square() / 2


def test_the_energy_s_own_kernel_is_kept_too(graphs):
    kernel = LangevinKernel(adjusted=False, step_size=0.05, jit_compile="capture")
    net = MLPEnergy(2, hidden=(8,))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, (2,), kernel=kernel), obs=x)

    loss = ContrastiveDivergence()
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-3}), loss)
    for x in torch.randn(5, 6, 2):
        svi.step(x)
    assert graphs == ["transition", "value_and_grad"]


def test_auto_is_a_graph_after_a_hundred_transitions(graphs):
    """The first ten gradients, and one that sees the energy, are without; a loaded loss goes on."""
    automatic = LangevinKernel(step_size=0.05)
    x = batches(*[6] * 14)
    train(automatic, x[:11], num_steps=10)
    assert graphs == []
    path, loss = train(automatic, x, num_steps=10)
    assert graphs == ["transition", "value_and_grad"]
    eager, _ = train(_with(automatic, False), x, num_steps=10)
    torch.testing.assert_close(path, eager, rtol=1e-9, atol=1e-12)
    again = ContrastiveDivergence(automatic, num_steps=10)
    again.load_state_dict(loss.state_dict())
    again(model_of(MLPEnergy(2, hidden=(8,)).double()), lambda x: None)(x[0])
    assert graphs[2:] == ["value_and_grad", "transition"]


def test_auto_gives_up_in_silence(graphs):
    kernels, kernel = KeptKernels(), LangevinKernel()
    for n in range(2 * MAX_MISSES):
        energy = UnnormalizedEnergy(lambda x, n=n: n * x**2)
        kernels.bound(kernel, energy, torch.zeros(3), "x", 1000)
    assert kernels._misses == MAX_MISSES


def test_a_last_minibatch_has_a_graph_of_its_own(graphs):
    same_run(KERNELS["ula"], batches(6, 6, 6, 2, 6, 6, 6, 2, 6, 6, 6, 2))
    assert graphs.count("transition") == 2


class Changing(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.beta, self.drop = net, 1.0, nn.Dropout(0.5)

    def forward(self, x):
        return self.beta * self.net(self.drop(x))


def test_never_a_stale_graph(graphs):
    """Mode, parameters, a number and a layer change: each run again is that of an eager kernel."""
    held = {}

    def changing(net):
        held["net"] = Changing(net).double()
        return model_of(held["net"])

    def change(step, net):
        outer = held["net"]
        if step == 4:
            outer.beta = 3.0
        elif step == 8:
            state = {k: 0.5 * v.clone() for k, v in net.state_dict().items()}
            net.load_state_dict(state, assign=True)
            for parameter in net.parameters():
                parameter.requires_grad_()
        elif step == 12:
            outer.eval()
        elif step == 16:
            outer.net.layers[1] = nn.Tanh()
        elif step == 20:
            with torch.no_grad():
                net.layers[0].weight.mul_(1.5)

    same_run(KERNELS["ula"], batches(*[6] * 24), model_of=changing, before=change, num_steps=2)
    assert graphs.count("transition") == 5  # not for the change in place


def test_a_number_in_the_closure(graphs):
    def scheduled(net):
        steps = iter(range(100))

        def model(x):
            beta = 1.0 + next(steps) // 5
            with pyro.plate("data", len(x)):
                pyro.sample("x", UnnormalizedEnergy(lambda x: beta * net(x), (2,)), obs=x)

        return model

    same_run(KERNELS["mala"], batches(*[6] * 20), model_of=scheduled, num_steps=2)
    assert graphs.count("transition") == 4


def test_another_energy_at_each_step_warns_once(graphs):
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: scale * x.square()), obs=x)

    loss = ContrastiveDivergence(LangevinKernel(jit_compile=True))
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-3}), loss)
    for x in torch.randn(MAX_MISSES - 1, 4):
        svi.step(x)
    with pytest.warns(UserWarning, match=r"site 'x' is another one at each step \(it reads a"):
        svi.step(torch.randn(4))
    for x in torch.randn(MAX_MISSES, 4):
        svi.step(x)
    assert graphs == []


def test_few_are_kept(graphs):
    energies = [UnnormalizedEnergy(torch.square).expand([n + 1]) for n in range(MAX_KEPT + 5)]
    kernels = KeptKernels()
    for energy in energies:
        for _ in range(2):
            kernels.bound(LangevinKernel(jit_compile="capture"), energy, torch.zeros(1), "x")
    assert len(kernels._seen) == MAX_KEPT


def test_settings_of_the_kernel_count(graphs):
    """An annealed temperature is no constant of a graph that goes on."""
    runs = []
    for flag in (False, "capture"):
        kernel = LangevinKernel(adjusted=False, step_size=0.05, jit_compile=flag)

        def cool(step, net, kernel=kernel):
            kernel.temperature = 1.0 / (1 + step // 4)

        runs.append(train(kernel, batches(*[6] * 12), before=cool)[0])
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adjusted", [True, False])
def test_transitions_in_a_row_are_those_one_by_one(adjusted):
    ends = []
    for in_a_row in (False, True):
        torch.manual_seed(0)
        net, x = MLPEnergy(2, hidden=(8,)).double(), torch.randn(5, 2).double()
        kernel = LangevinKernel(adjusted=adjusted, step_size=0.3, jit_compile="capture")
        kernel.bind(EnergyPotential(UnnormalizedEnergy(net, (2,)), like=x), 0)
        before = state = kernel.init(x)
        for _ in range(3):
            if in_a_row:
                before, state, infos = kernel.steps(state, 4)
                continue
            for _ in range(4):
                before, (state, info) = state, kernel.step(state)
        ends.append((before.z, state.z, (infos[-1] if in_a_row else info).accept_prob))
        assert kernel.state_dict()["steps"] == kernel.state_dict()["calls"] == 12
    assert all(map(torch.equal, *ends))


def test_block_gibbs_and_composite_kernels():
    torch.manual_seed(0)
    net, x = RBMModule(4, 3), torch.bernoulli(torch.full((6, 4), 0.5))
    ends = []
    for flag in (False, "capture"):
        pyro.set_rng_seed(0)
        loss = ContrastiveDivergence(GibbsKernel(jit_compile=flag), persistent=True)

        def model(x):
            machine = RBM(net.weights, net.visible_bias, net.hidden_bias)
            with pyro.plate("data", len(x)):
                pyro.sample("x", machine, obs=x)

        for _ in range(5):
            loss(model, lambda x: None)(x)
        ends.append(loss.chains["x"])
    assert torch.equal(*ends)
    inner = LangevinKernel(adjusted=False, step_size=0.05, jit_compile="capture")
    assert runs_as_graph(CompositeKernel(kernels=[inner]))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_graphs_stay_behind(again):
    _, loss = train(_with(KERNELS["mala"], "capture"), batches(*[6] * 4), persistent=True)
    new = again(loss)
    assert new.negatives.kept._seen == {}
    assert torch.equal(new.chains["x"], loss.chains["x"])


def test_the_step_size_goes_on():
    runs = [
        train(LangevinKernel(jit_compile=flag), batches(*[20] * 15), persistent=True)[1]
        for flag in (False, "capture")
    ]
    sizes = [loss.step_sizes["x"] for loss in runs]
    torch.testing.assert_close(*sizes)
    assert sizes[0] != 0.1


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(_with(KERNELS["mala"], "capture"), batches(*[5] * 6))


def test_a_base_with_its_own_tensors():
    """Made anew at each step, it is another one; made once, it is kept."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    kernels, kernel = KeptKernels(), LangevinKernel(jit_compile="capture")

    def bound(base):
        energy = UnnormalizedEnergy(lambda x: x.square().sum(-1), base=base)
        return kernels.bound(kernel, energy, torch.zeros(3, 2), "x")[0]

    bound(base)
    assert bound(base) is bound(base)
    anew = [bound(dist.Normal(torch.zeros(2), 1.0).to_event(1)) for _ in range(3)]
    assert len({id(found) for found in anew}) == 3
