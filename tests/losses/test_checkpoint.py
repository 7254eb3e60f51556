"""A training that was saved and loaded goes on bit for bit as one that was not."""

import os
import random
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ebm import files
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import (
    ContrastiveDivergence,
    FlowNCE,
    ScoreMatching,
    load_training,
    save_training,
)
from pyro_ebm.nn import MLPEnergy
from tests.losses.test_loss_contract import LOSSES, World, data

ROOT = Path(__file__).parents[2]
MORE = {
    **LOSSES,
    "flow-nce-every": lambda: FlowNCE(alternate=3),
    # which passes through the spectral norm, and so must be due when it would have been
    "cd-watched": lambda: ContrastiveDivergence(monitor=watch, monitor_every=3),
}


def watch(energy):
    return energy.energy(torch.randn(5, 2)).logsumexp(0)


class Seen(World):
    """With spectral norms, whose buffers are a state, and dropout, which draws in each pass."""

    def __init__(self, loss):
        super().__init__(loss)
        net = MLPEnergy(2, hidden=(8,), spectral_norm=True)
        self.nets["x"] = nn.Sequential(nn.Dropout(0.1), net)


class BySVI:
    """A training as a new process starts it."""

    def __init__(self, make_loss, optim=None):
        pyro.clear_param_store()
        self.loss = make_loss()
        world = Seen(self.loss)
        optim = optim or pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9})
        self.svi = SVI(world.model, world.guide, optim, self.loss)
        self.parts = (self.svi,)

    def step(self):
        return self.svi.step(x=batch())

    def load(self, path):
        return load_training(path, *self.parts, kwargs={"x": data()})

    def numbers(self):
        nets = networks(self.svi)
        return {**dict(pyro.get_param_store().named_parameters()), **nets}


class ByTorch:
    """The same with ``loss(model, guide)``, a torch optimiser and its scheduler."""

    def __init__(self, make_loss):
        pyro.clear_param_store()
        self.loss = make_loss()
        world = Seen(self.loss)
        self.module = self.loss(world.model, world.guide).initialize(x=data())
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 6])
        self.parts = (self.module, self.optimizer, self.schedule)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.module(x=batch())
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def load(self, path):
        return load_training(path, *self.parts)

    def numbers(self):
        return self.module.state_dict()


def batch():
    """A new one at each step: the random state must be right for it."""
    return data()[(torch.randint(12, (6,)) + random.randrange(12)) % 12]


def networks(svi):
    return {k: v for net in svi.model.__self__.nets.values() for k, v in net.state_dict().items()}


def snapshot(training):
    return {k: v.detach().clone() for k, v in training.numbers().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("form", [BySVI, ByTorch])
@pytest.mark.parametrize("name", MORE)
def test_loaded_it_goes_on_exactly(name, form, tmp_path):
    training = form(MORE[name])
    for _ in range(4):
        training.step()
    save_training(tmp_path / "t.ckpt", *training.parts, step=4)
    want = [training.step() for _ in range(5)]
    numbers, told, state = snapshot(training), training.loss.diagnostics, training.loss.state_dict()

    pyro.set_rng_seed(1234)
    training = form(MORE[name])
    before = snapshot(training)
    assert training.load(tmp_path / "t.ckpt") == {"step": 4}
    assert training.loss.steps_taken == 4
    assert [training.step() for _ in range(5)] == want
    assert same(snapshot(training), numbers)
    assert not same(before, numbers)
    assert training.loss.diagnostics == told
    assert str(training.loss.state_dict()) == str(state)


@pytest.mark.parametrize("form", [BySVI, ByTorch])
def test_loaded_into_the_training_that_went_on(form, tmp_path):
    training = form(MORE["pcd"])
    training.step()
    save_training(tmp_path / "t.ckpt", *training.parts)
    want = [training.step() for _ in range(3)]
    training.load(tmp_path / "t.ckpt")
    assert [training.step() for _ in range(3)] == want


@pytest.mark.parametrize("form", [BySVI, ByTorch])
def test_saved_again_at_once_it_is_the_same(form, tmp_path):
    training = form(MORE["nce"])
    training.step()
    save_training(tmp_path / "a.ckpt", *training.parts)
    want = [training.step() for _ in range(3)]
    training = form(MORE["nce"])
    training.load(tmp_path / "a.ckpt")
    save_training(tmp_path / "b.ckpt", *training.parts)
    training = form(MORE["nce"])
    training.load(tmp_path / "b.ckpt")
    assert [training.step() for _ in range(3)] == want


def test_a_state_that_pyros_optimiser_has_not_taken_yet(tmp_path):
    training = BySVI(MORE["sm"])
    training.step()
    moments = training.svi.optim.get_state()
    training = BySVI(MORE["sm"])
    training.svi.optim.set_state(moments)  # each parameter takes its own at its first step
    training.svi.model(x=data())
    save_training(tmp_path / "t.ckpt", *training.parts)
    want = [training.step() for _ in range(3)]
    training = BySVI(MORE["sm"])
    training.load(tmp_path / "t.ckpt")
    assert [training.step() for _ in range(3)] == want


def test_what_a_file_holds_as_plain_dicts_is_what_it_was(tmp_path):
    training = ByTorch(MORE["sm"])
    save_training(tmp_path / "t.ckpt", *training.parts)
    training.load(tmp_path / "t.ckpt")
    assert list(training.schedule.milestones.elements()) == [3, 6]


def test_schedulers_of_pyro(tmp_path):
    def start():
        arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
        return BySVI(MORE["sm"], pyro.optim.StepLR({**arguments, "step_size": 2, "gamma": 0.1}))

    training, want = start(), []
    for epoch in range(4):
        want.append(training.step())
        if epoch == 1:  # between the step and the scheduler's
            save_training(tmp_path / "t.ckpt", *training.parts)
        training.svi.optim.step()
    numbers = snapshot(training)

    training, losses = start(), []
    training.load(tmp_path / "t.ckpt")
    for _ in range(2):
        training.svi.optim.step()
        losses.append(training.step())
    training.svi.optim.step()
    assert losses == want[2:]
    assert same(snapshot(training), numbers)


def constrained(constraint=dist.constraints.positive, shape=()):
    def model(x):
        scale = pyro.param("scale", torch.ones(shape), constraint=constraint)
        p = UnnormalizedEnergy(lambda x: (x / scale.mean()) ** 2 / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def start():
        pyro.clear_param_store()
        return SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), ScoreMatching())

    return start


def test_parameters_with_constraints(tmp_path):
    x = torch.randn(50)
    svi = constrained()()
    for _ in range(3):
        svi.step(x)
    save_training(tmp_path / "t.ckpt", svi)
    want = [svi.step(x) for _ in range(3)]
    svi = constrained()()
    load_training(tmp_path / "t.ckpt", svi, args=(x,))
    assert [svi.step(x) for _ in range(3)] == want


def latent(z_dim=1):
    """A latent in front of an energy, and an autoguide, which is lazy."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: (x - z.sum()) ** 2 / 2, constant_normalizer=True)
            pyro.sample("x", p, obs=x)

    pyro.clear_param_store()
    return SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), ContrastiveDivergence())


def test_lazy_guides(tmp_path):
    x = torch.randn(20)
    svi = latent()
    for _ in range(3):
        svi.step(x)
    save_training(tmp_path / "t.ckpt", svi)
    want = [svi.step(x) for _ in range(3)]
    svi = latent()
    load_training(tmp_path / "t.ckpt", svi, args=(x,))
    assert [svi.step(x) for _ in range(3)] == want


def test_generators_are_parts(tmp_path):
    generator = torch.Generator().manual_seed(3)
    save_training(tmp_path / "t.ckpt", generator)
    want = torch.rand(3, generator=generator)
    other = torch.Generator()
    load_training(tmp_path / "t.ckpt", other)
    assert torch.equal(torch.rand(3, generator=other), want)


def test_progress_comes_back(tmp_path):
    progress = {"epoch": 3, "best": 0.25, "history": [1.0, 2.0], "mean": torch.ones(2), "name": "a"}
    save_training(tmp_path / "t.ckpt", **progress)
    back = load_training(tmp_path / "t.ckpt")
    assert str(back) == str(progress)
    with pytest.raises(TypeError, match=r"\['when'\] is a function"):
        save_training(tmp_path / "t.ckpt", when=batch)


def test_no_file_is_an_error_unless_it_may_be(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_training(tmp_path / "t.ckpt")
    assert load_training(tmp_path / "t.ckpt", missing_ok=True) == {}


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """Which did not number its saves."""
    path = tmp_path / "t.ckpt"
    save_training(path, torch.nn.Linear(1, 1), step=1)
    payload = files.load(path, "training")
    del payload["saves"]
    files.save(path, payload, "training")
    assert load_training(path, torch.nn.Linear(1, 1)) == {"step": 1}


@pytest.mark.parametrize("missing_ok", [False, True])
def test_a_broken_file_is_always_an_error(tmp_path, missing_ok):
    path = tmp_path / "t.ckpt"
    save_training(path, step=1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(files.CheckpointError, match="cut short"):
        load_training(path, missing_ok=missing_ok)


# -- what does not fit -----------------------------------------------------------------------------


def refused(path, *parts, match, **kwargs):
    """An error, and nothing has changed."""
    pyro.set_rng_seed(7)
    before = {k: v.clone() for k, v in pyro.get_param_store().named_parameters()}
    with pytest.raises(files.CheckpointError, match=match):
        load_training(path, *parts, **kwargs)
    after = dict(pyro.get_param_store().named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.initial_seed() == 7


def test_another_loss_is_named(tmp_path):
    path = tmp_path / "t.ckpt"
    training = ByTorch(MORE["nce"])
    save_training(path, *training.parts)
    other = ByTorch(MORE["pcd"])
    refused(path, *other.parts, match=r"holds .*NCE.* and given are .*ContrastiveDivergence")


def test_another_optimiser_is_named(tmp_path):
    path = tmp_path / "t.ckpt"
    training = ByTorch(MORE["nce"])
    save_training(path, *training.parts)
    sgd = torch.optim.SGD(training.module.parameters(), lr=0.1)
    refused(path, training.module, sgd, training.schedule, match="AdamW.* and given are .*SGD")
    few = torch.optim.AdamW(list(training.module.parameters())[:2], lr=0.1)
    match = r"groups of \[6\] parameters in the file, of \[2\] here"
    refused(path, training.module, few, training.schedule, match=match)


def test_another_network_is_named(tmp_path):
    path = tmp_path / "t.ckpt"
    net, wide, deep = MLPEnergy(2, (8,)), MLPEnergy(2, (9,)), MLPEnergy(2, (8, 8))
    save_training(path, net)
    refused(path, wide, match=r"'layers.0.weight' has shape \(8, 2\) in the file, \(9, 2\) here")
    refused(path, deep, match=r"does not hold \['layers.4.bias', 'layers.4.weight'\]")
    refused(path, MLPEnergy(2, ()), match=r"holds \['layers.2.bias', .*which is not here")
    refused(path, MLPEnergy(2, (8,)).double(), match=r"torch.float32 in the file, torch.float64")


def test_another_model_is_named(tmp_path):
    x, path = torch.randn(10), tmp_path / "t.ckpt"
    svi = constrained()()
    svi.step(x)
    save_training(path, svi)
    refused(path, constrained(shape=(2,))(), args=(x,), match=r"shape \(\) in the file, \(2,\) he")
    other = constrained(dist.constraints.real)()
    refused(path, other, args=(x,), match=r"constraint GreaterThan.* in the file, Real\(\) here")
    refused(path, constrained()(), match=r"\['scale'\] are not in Pyro's store.*give args=")
    svi = constrained()()
    pyro.param("another", torch.ones(()))
    refused(path, svi, args=(x,), match=r"\['another'\], which the file does not")


def test_moments_of_another_shape_are_named(tmp_path):
    path = tmp_path / "t.ckpt"
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    one, other = torch.optim.Adam([a]), torch.optim.Adam([b])
    a.sum().backward()
    one.step()
    save_training(path, one)
    refused(path, other, match=r"'exp_avg' has shape \(2,\) in the file, its parameter \(3,\) here")


def test_what_is_no_part_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="a part of a training is an SVI"):
        save_training(tmp_path / "t.ckpt", "net")


def test_networks_that_are_not_found_are_an_error(tmp_path):
    hidden = [MLPEnergy(2, (4,))]

    class Where:
        net = property(lambda self: hidden[0])

    where = Where()
    assert where.net is hidden[0]

    def model(x):
        pyro.module("energy", where.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(where.net, (2,)), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), ContrastiveDivergence())
    svi.step(data())
    with pytest.raises(ValueError, match=r"registered as \['energy'\] are not found"):
        save_training(tmp_path / "t.ckpt", svi)
    save_training(tmp_path / "t.ckpt", svi, where.net)
    load_training(tmp_path / "t.ckpt", svi, where.net)


def test_a_failed_save_leaves_the_file_and_the_training(tmp_path, monkeypatch):
    training = BySVI(MORE["pcd"])
    path = tmp_path / "t.ckpt"
    training.step()
    save_training(path, *training.parts, step=1)

    def full(*args):
        raise OSError(28, "No space left on device")

    training.step()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_training(path, *training.parts, step=2)
    assert training.load(path) == {"step": 1}
