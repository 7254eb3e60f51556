"""A load that fails says why, and leaves the training as it was."""

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm import files
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import ContrastiveDivergence, load_training, save_training
from tests.losses.test_checkpoint import MORE, BySVI, ByTorch, same, snapshot


class ByModule:
    """A model whose network is in Pyro's store once it has run."""

    def __init__(self):
        pyro.clear_param_store()
        self.net = nn.Linear(2, 1)
        loss = ContrastiveDivergence()
        self.svi = SVI(self.model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), loss)

    def model(self, x):
        net = pyro.module("net", self.net)
        p = UnnormalizedEnergy(lambda x: net(x).squeeze(-1) + x.square().sum(-1), (2,))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)


def test_a_module_whose_model_has_not_run(tmp_path):
    x, path = torch.randn(5, 2), tmp_path / "t.ckpt"
    training = ByModule()
    training.svi.step(x)
    save_training(path, training.svi)
    weight = training.net.weight.detach().clone()
    training = ByModule()
    before = training.net.weight.detach().clone()
    match = r"Adam: the optimiser's parameters .*weight'\] are not in Pyro's store yet: give args="
    with pytest.raises(files.CheckpointError, match=match):
        load_training(path, training.svi)
    assert torch.equal(training.net.weight, before)
    load_training(path, training.svi, args=(x,))
    assert torch.equal(training.net.weight, weight)


class Fussy:
    """A part that takes half of a state, and refuses it."""

    def __init__(self, refuses):
        self.number, self.refuses = torch.zeros(()), refuses

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]
        if self.refuses and self.number == 1:
            raise KeyError("another")


@pytest.mark.parametrize("form", [BySVI, ByTorch])
@pytest.mark.parametrize("name", ["pcd", "nce", "flow-nce-every"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_part_that_refuses_its_state(form, name, begun, tmp_path):
    path = tmp_path / "t.ckpt"
    training, part = form(MORE[name]), Fussy(False)
    training.step()
    part.number = torch.ones(())
    training.parts = (*training.parts, part)
    save_training(path, *training.parts)

    def start():
        training = form(MORE[name])
        pyro.set_rng_seed(3)
        if begun:
            for _ in range(2):
                training.step()
        return training

    want = [start().step()]
    training, part = start(), Fussy(True)
    before = snapshot(training)
    training.parts = (*training.parts, part)
    match = r"Fussy refuses its state \(KeyError: 'another'\); nothing is changed"
    with pytest.raises(files.CheckpointError, match=match):
        training.load(path)
    after = snapshot(training)
    assert same({name: after[name] for name in before}, before)
    assert part.number == 0
    if begun:
        assert [training.step()] == want


def test_parameters_of_another_dtype_are_named(tmp_path):
    path = tmp_path / "t.ckpt"
    pyro.param("scale", torch.ones(2))
    save_training(path)
    pyro.clear_param_store()
    pyro.param("scale", torch.ones(2).double())
    match = "'scale' is torch.float32 in the file, torch.float64 here"
    with pytest.raises(files.CheckpointError, match=match):
        load_training(path)
