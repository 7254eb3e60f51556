"""Score matching of energies whose score jumps: refused; of all that is smooth: fitted."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.losses import DenoisingScoreMatching, ScoreMatching, SlicedScoreMatching

HESSIANS = {
    "exact": ScoreMatching,
    "hutchinson": lambda: ScoreMatching("hutchinson"),
    "sliced": SlicedScoreMatching,
    "sliced, raw": lambda: SlicedScoreMatching(variance_reduced=False),
}
BASE = dist.Normal(torch.zeros(2), 2.0).to_event(1)


def param(name, value, **kwargs):
    return pyro.param(name, torch.as_tensor(value), **kwargs)


def positive(name, value):
    return param(name, value, constraint=constraints.positive)


def mlp(*activations):
    width = 16
    layers = [nn.Linear(2, width)]
    for activation in activations:
        layers += [activation, nn.Linear(width, width)]
    return nn.Sequential(*layers[:-1], nn.Linear(width, 1), nn.Flatten(-2))


class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 12)

    def forward(self, x):
        return self.linear(x).unflatten(-1, (4, 3)).amax(-1).sum(-1)


class Pooled(nn.Module):
    """A convolution of 4 x 4 images, and the largest of each block."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(-3), nn.Linear(16, 1)
        )

    def forward(self, x):
        return self.net(x.unsqueeze(-3)).squeeze(-1)


class Together(nn.Module):
    """Sum of two energies."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def network(net, base=None, event_shape=(2,), **kwargs):
    def energy():
        pyro.module("net", net)
        return UnnormalizedEnergy(net, event_shape, base=base, **kwargs)

    return energy


def plain(energy, event_shape=(2,), **kwargs):
    return lambda: UnnormalizedEnergy(energy, event_shape, **kwargs)


def learned_scale(x):
    return mlp_of_relu(x) + positive("precision", 1.0) * x.square().sum(-1) / 2


torch.manual_seed(0)
mlp_of_relu = mlp(nn.ReLU(), nn.ReLU())
mlp_of_both = mlp(nn.ReLU(), nn.SiLU())


class SquaredReLU(nn.Module):
    def forward(self, x):
        return x.relu().square()


def relu_and_learned_scale():
    pyro.module("net", mlp_of_relu)
    return UnnormalizedEnergy(learned_scale, (2,))


JUMPS = {
    "relu": network(mlp(nn.ReLU(), nn.ReLU())),
    "relu on a base": network(mlp(nn.ReLU()), BASE),
    "leaky relu": network(mlp(nn.LeakyReLU())),
    "prelu": network(mlp(nn.PReLU())),
    "hardtanh": network(mlp(nn.Hardtanh(-0.3, 0.3)), BASE),
    "abs": plain(lambda x: (param("w", torch.ones(2)) * x.abs()).sum(-1)),
    "laplace": plain(lambda x: (x - param("m", 0.0)).abs().sum(-1) / positive("b", 1.0)),
    "max": network(Maxout(), BASE),
    "max pooling": network(Pooled(), None, (4, 4)),
    "relu beside silu": network(Together(mlp(nn.SiLU()), mlp(nn.ReLU()))),
    "relu and a learned precision": relu_and_learned_scale,
    "relu on a learned base": lambda: network(
        mlp_of_relu, dist.Normal(torch.zeros(2), positive("s", 2.0)).to_event(1)
    )(),
    "on a half-line": plain(
        lambda x: (param("w", torch.ones(2)) * (x - 1).abs()).sum(-1), support=constraints.positive
    ),
    "in a box": plain(
        lambda x: (param("w", torch.ones(2)) * x.abs()).sum(-1),
        support=constraints.interval(-5.0, 5.0),
    ),
}
FLAT = {
    "location of a laplace": plain(lambda x: (x - param("m", 0.0)).abs().sum(-1)),
    "a step": plain(lambda x: param("w", 1.0) * (x > 0).to(x).sum(-1), base=BASE),
    "a rounding": plain(lambda x: param("w", 1.0) * x.round().sum(-1), base=BASE),
}
SMOOTH = {
    "silu": network(mlp(nn.SiLU())),
    "softplus": network(mlp(nn.Softplus()), BASE),
    "sharp softplus": network(mlp(nn.Softplus(beta=20.0))),
    "elu": network(mlp(nn.ELU())),
    "gelu": network(mlp(nn.GELU(), nn.GELU())),
    "tanh": network(mlp(nn.Tanh())),
    "relu below silu": network(mlp(nn.ReLU(), nn.SiLU())),
    "relu above silu": network(mlp(nn.SiLU(), nn.ReLU())),
    "relu between": network(mlp(nn.SiLU(), nn.ReLU(), nn.SiLU())),
    "location": plain(lambda x: (x - param("m", 0.0)).square().sum(-1) / 2),
    "locations": plain(lambda x: (x - param("m", torch.zeros(2))).square().sum(-1) / 2),
    "location of relu below silu": lambda: network(
        mlp_of_both,
        dist.Normal(param("m", torch.zeros(2)), 1.0).to_event(1),
    )(),
    "harmonic": plain(lambda x: param("t", 0.1) * (x[..., 0] ** 2 - x[..., 1] ** 2), base=BASE),
    "saddle": plain(lambda x: param("t", 0.1) * x.prod(-1), base=BASE),
    "linear on a base": plain(lambda x: (param("t", torch.zeros(2)) * x).sum(-1), base=BASE),
    "linear in a box": plain(
        lambda x: (param("t", torch.zeros(2)) * x).sum(-1), support=constraints.interval(-5.0, 5.0)
    ),
    "exponential": plain(
        lambda x: (positive("t", torch.ones(2)) * x).sum(-1), support=constraints.positive
    ),
    "quadratic and linear": plain(
        lambda x: positive("t", 1.0) * x.square().sum(-1) / 2 + param("m", 0.3) * x.sum(-1)
    ),
    "cubic in the location": plain(lambda x: (x - param("m", 0.0)).pow(4).sum(-1)),
    "huber": plain(
        lambda x: nn.functional.huber_loss(
            x, param("m", 0.2).expand_as(x), delta=0.7, reduction="none"
        ).sum(-1)
    ),
    "squared relu": network(mlp(SquaredReLU())),
    "a bias alone": plain(lambda x: x.square().sum(-1) / 2 + param("c", 0.0)),
    "nothing to train": plain(lambda x: x.abs().sum(-1)),
    "student": plain(lambda x: (1 + (x - param("m", 0.0)).square()).log().sum(-1)),
}


def step(energy, loss, n=60, num_steps=1):
    shape = energy().event_shape
    x = torch.randn((n, *shape)) + 0.3
    x = x.abs() if energy().support.check(-torch.ones(shape)).logical_not().any() else x

    def model():
        p = energy()
        with pyro.plate("data", n):
            pyro.sample("x", p, obs=x)

    svi = SVI(model, lambda: None, Adam({"lr": 1e-3}), loss)
    for _ in range(num_steps):
        svi.step()


@pytest.mark.parametrize("loss", HESSIANS.values(), ids=HESSIANS)
@pytest.mark.parametrize("energy", JUMPS.values(), ids=JUMPS)
def test_a_score_that_jumps_is_refused(energy, loss):
    with pytest.raises(ValueError, match=r"'x': the score .* jumps.*SiLU.*DenoisingScore"):
        step(energy, loss())


@pytest.mark.parametrize("loss", [*HESSIANS.values(), DenoisingScoreMatching])
@pytest.mark.parametrize("energy", FLAT.values(), ids=FLAT)
def test_an_energy_that_no_score_trains_is_refused(energy, loss):
    with pytest.raises(ValueError, match=r"'x': parameters move .* never train them"):
        step(energy, loss())


@pytest.mark.parametrize("loss", HESSIANS.values(), ids=HESSIANS)
@pytest.mark.parametrize("energy", SMOOTH.values(), ids=SMOOTH)
def test_what_is_smooth_is_not(energy, loss):
    step(energy, loss(), num_steps=12)  # looked at twice


@pytest.mark.parametrize("energy", JUMPS.values(), ids=JUMPS)
def test_denoising_needs_no_second_derivative(energy):
    if energy().support is constraints.real or energy().base is not None:
        step(energy, DenoisingScoreMatching(0.5))
