"""What beginners hand to a loss: the error is about that, and not about what it leads to."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule

from pyro_ebm import (
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    FlowNCE,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
    UnnormalizedEnergy,
    fit,
)
from pyro_ebm.nn import MLPEnergy

CLASSES = [
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    FlowNCE,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
]
LOSSES = [
    ContrastiveDivergence(),
    ScoreMatching(),
    DenoisingScoreMatching(0.1),
    EnergyDiscrepancy(),
    NCE(),
    RankingNCE(),
]


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("pixels", dist.Normal(torch.zeros(2), 100.0).to_event(1))


def step(loss, data, energy=None):
    net = MLPEnergy(2, hidden=(8,))

    def model(x):
        if energy is None:
            pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(1.0))
        log_z = scale if loss.needs_noise else None
        p = UnnormalizedEnergy(energy or net, event_shape=(2,), log_normalizer=log_z)
        with pyro.plate("data", len(x)):
            pyro.sample("pixels", p, obs=x)

    noise = guide if loss.needs_noise else lambda x: None
    return SVI(model, noise, pyro.optim.Adam({}), loss).step(data)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("energy", [None, lambda x: (x**2).sum(-1)], ids=["network", "function"])
def test_integers_are_no_points(loss, dtype, energy):
    with pytest.raises(ValueError, match=r"the data at site 'pixels'.*x\.float\(\)"):
        step(loss, torch.randint(0, 255, (5, 2)).to(dtype), energy)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    "data", [np.zeros((50, 2)), [[0.0, 0.0]] * 50, torch.zeros(50, 2) + 0j], ids=lambda d: type(d)
)
def test_data_that_are_no_real_tensor(loss, data):
    with pytest.raises(ValueError, match="the data at site 'pixels' must be a tensor") as raised:
        step(loss, data)
    assert len(str(raised.value)) < 250


def test_discrete_data_may_be_whole_numbers():
    weight = torch.tensor(0.5)

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        p = UnnormalizedEnergy(
            lambda x: -(weight * x[..., 0] * x[..., 1]) - shift * x.sum(-1),
            event_shape=(2,),
            support=dist.constraints.boolean,
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({}), ContrastiveDivergence())
    svi.step(torch.randint(0, 2, (50, 2)))


@pytest.mark.parametrize("loss", CLASSES)
def test_a_class_is_no_loss(loss):
    def model(x):
        pyro.sample("pixels", UnnormalizedEnergy(torch.square), obs=x)

    svi = SVI(model, guide, pyro.optim.Adam({}), loss)
    with pytest.raises(ValueError, match=rf"class.*loss={loss.__name__}\(\)"):
        svi.step(torch.zeros(()))
    with pytest.raises(ValueError, match=rf"{loss.__name__}\(\)\(model, guide\)"):
        loss(model, guide)


def test_model_and_guide_swapped():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("pixels", UnnormalizedEnergy(torch.square), obs=x)

    svi = SVI(lambda x: None, model, pyro.optim.Adam({}), ContrastiveDivergence())
    with pytest.raises(ValueError, match="swapped"):
        svi.step(torch.zeros(5))


def test_no_guide():
    svi = SVI(lambda x: None, None, pyro.optim.Adam({}), ContrastiveDivergence())
    with pytest.raises(ValueError, match="guide must be a function"):
        svi.step(torch.zeros(5))


def test_sparse_data():
    with pytest.raises(ValueError, match=r"the data at site 'pixels'.*x\.to_dense\(\)"):
        step(ContrastiveDivergence(), torch.eye(2).to_sparse())


# -- a network registered under the name of another ------------------------------------------------


def registering(net, log_z=False):
    def model(x):
        pyro.module("energy", net)
        constant = pyro.param("log_z", torch.tensor(0.0)) if log_z else None
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(net, event_shape=(2,), log_normalizer=constant)
            pyro.sample("pixels", p, obs=x)

    return model


def test_svi_of_a_network_under_an_older_name():
    """With the same loss too: its first network had the same names of parameters."""
    loss, x = DenoisingScoreMatching(0.3), torch.randn(20, 2)
    nets = [MLPEnergy(2, hidden=(8,)) for _ in range(2)]
    adam = pyro.optim.Adam({"lr": 0.01})
    SVI(registering(nets[0]), lambda x: None, adam, loss).step(x)
    for again in (loss, DenoisingScoreMatching(0.3)):
        with pytest.raises(ValueError, match=r"store holds an older 'energy', .*clear_param_store"):
            SVI(registering(nets[1]), lambda x: None, adam, again).step(x)
    pyro.clear_param_store()
    SVI(registering(nets[1]), lambda x: None, adam, loss).step(x)


def test_fit_of_a_network_under_an_older_name():
    x, quiet = torch.randn(20, 2), {"num_steps": 2, "disable_progbar": True}
    nets = [MLPEnergy(2, hidden=(8,)) for _ in range(2)]
    fit(registering(nets[0], log_z=True), guide, NCE(), x, **quiet)
    old = [p.detach().clone() for p in nets[0].parameters()]
    before = [p.detach().clone() for p in nets[1].parameters()]
    words = r"store holds an older 'energy', .*; \['log_z'\] start where they were left"
    with pytest.warns(UserWarning, match=words) as warned:
        result = fit(registering(nets[1], log_z=True), guide, NCE(), x, **quiet)
    assert warned[0].filename == __file__
    assert all(map(torch.equal, old, nets[0].parameters()))
    assert not all(map(torch.equal, before, nets[1].parameters()))
    assert len(list(result.module.parameters())) == len(before) + 1
    for net in (nets[0], MLPEnergy(2, hidden=(8,))):  # that which the store holds, and a new store
        fit(registering(net, log_z=True), guide, NCE(), x, **quiet)
        pyro.clear_param_store()


def test_a_pyro_module_under_older_names():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](2, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                p = UnnormalizedEnergy(lambda x: self.layer(x).square().sum(-1), event_shape=(2,))
                pyro.sample("pixels", p, obs=x)

    x, loss, adam = torch.randn(20, 2), DenoisingScoreMatching(0.3), pyro.optim.Adam({"lr": 0.1})
    SVI(Model(), lambda x: None, adam, loss).step(x)
    with pytest.raises(
        ValueError, match=r"store holds an older 'layer.(weight|bias)', .*clear_par"
    ):
        SVI(Model(), lambda x: None, adam, loss).step(x)
