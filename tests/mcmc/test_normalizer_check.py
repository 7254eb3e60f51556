"""Whether log Z depends on a latent: which models are refused, which are not, and what is said."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import AffineTransform, ExpTransform, constraints

from pyro_ebm import UnnormalizedEnergy as energy
from pyro_ebm.distributions import (
    RBM,
    BoltzmannMachine,
    ExponentialFamily,
    GaussianRBM,
    JointRBM,
    Potts,
    mixture,
    negation,
    product,
)
from pyro_ebm.mcmc import NormalizerError, check_normalizers
from pyro_ebm.models.checks.intractability import moving_normalizers
from pyro_ebm.models.runs import BoundModel

DATA = torch.tensor([0.5, -1.0, 2.0])
SPINS = torch.tensor([1.0, -1.0, 1.0])
PAIRS = torch.tensor([[0, 1], [1, 2]])
COVARIATES = torch.tensor([1.0, 2.0, 3.0])
SCALES = torch.tensor([1.0, 2.0])
NORMAL, GAMMA, BIT = dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Bernoulli(0.1)
CATEGORIES, WEIGHTS = dist.Categorical(torch.ones(3)), dist.Dirichlet(torch.ones(2))
MATRIX = dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2)
INTERVAL = constraints.interval
TWO = dist.Categorical(torch.ones(2))


def observe(p, x=DATA):
    """The site "x": data in a plate, one event, or, without data, a latent."""
    if x is None or p.event_shape:
        return pyro.sample("x", p, obs=x)
    with pyro.plate("data", len(x)):
        return pyro.sample("x", p, obs=x)


def latent(name="z"):
    return pyro.sample(name, NORMAL)


def positive(name="z"):
    return pyro.sample(name, GAMMA)


def scaled(z, **kwargs):
    return energy(lambda x: z * x**2, **kwargs)


def threshold(z):
    return energy(lambda x: x**2 + 10.0 * (x > z))


def of(prior, p, data=DATA):
    """A model of a latent "z", and of data whose distribution ``p(z)`` is."""
    return lambda: observe(p(pyro.sample("z", prior)), data)


def shifted(p, prior=NORMAL):
    """A model of a latent "z", and of data whose distances from it are ``p``."""
    return lambda: observe(p(), DATA - pyro.sample("z", prior))


def rbm(cls, n=3):
    return of(MATRIX, lambda w: cls(w, torch.zeros(3), torch.zeros(2)), n and torch.ones(n))


class Case(NamedTuple):
    """A model, and what the error must say of it."""

    model: Callable[[], Any]
    names: tuple[str, ...] = ("z",)
    """Latents."""
    says: str = ""
    """A regular expression."""
    state: str = "unknown"
    """Of log Z."""
    seeds: int = 1
    """How many are tried."""


# -- refused: a table of models ----------------------------------------------------------------

REFUSED = {
    name: case if isinstance(case, Case) else Case(case)
    for name, case in {
        "precision": of(GAMMA, lambda z: energy(lambda x: z * x**2 / 2)),
        "location without the user's word": of(NORMAL, lambda z: energy(lambda x: (x - z) ** 2)),
        # relu(z x) is 0 with gradient 0 at z = 0 and below
        "dead units": of(
            dist.Normal(-50.0, 0.01), lambda z: energy(lambda x: x**2 + (z * x.abs()).relu())
        ),
        # d/dz cos(z x) is 0 at x = 0
        "an energy even at zero": of(
            NORMAL, lambda z: energy(lambda x: x**2 - (z * x).cos()), torch.zeros(2)
        ),
        "a gradient of zero": of(NORMAL, lambda z: energy(lambda x: x**2 * z.round().detach())),
        "base": of(GAMMA, lambda z: energy(torch.abs, base=dist.Normal(0.0, z))),
        "upper bound": Case(
            of(GAMMA, lambda z: energy(lambda x: x, support=INTERVAL(-9.0, 9 + z))),
            says="site 'x': its support depends on 'z'",
        ),
        "lower bound of an event": of(
            GAMMA,
            lambda z: energy(
                lambda x: x.sum(-1), event_shape=(3,), support=constraints.greater_than(-9 - z)
            ),
        ),
        "bound of the base": of(
            GAMMA,
            lambda z: energy(
                lambda x: x.sum(-1), base=dist.Uniform(0.0, 9 + z).expand([3]).to_event(1)
            ),
            DATA.abs(),
        ),
        "discrete latent": of(CATEGORIES, lambda z: energy(lambda x: x**2 / COVARIATES[z])),
        "temperature": of(GAMMA, lambda z: energy(torch.square).tempered(z)),
        "masked distribution": of(NORMAL, lambda z: energy(torch.square).mask(z > 0)),
        "inside a masked distribution": of(
            GAMMA, lambda z: scaled(z).mask(torch.tensor([True, False, True]))
        ),
        "inside Independent": of(GAMMA, lambda z: scaled(z).expand([3]).to_event(1)),
        "inside a transformed distribution": of(
            GAMMA, lambda z: dist.TransformedDistribution(scaled(z), [ExpTransform()]), DATA.exp()
        ),
        "components of a mixture": of(
            GAMMA,
            lambda z: dist.MixtureSameFamily(
                TWO, scaled(torch.stack([z, 2 * z]), batch_shape=(2,))
            ),
        ),
        # sum_k w_k exp(-E_k) / Z_k
        "weights of a mixture": of(
            WEIGHTS,
            lambda w: dist.MixtureSameFamily(dist.Categorical(w), scaled(SCALES, batch_shape=(2,))),
        ),
        "one part of a masked mixture": of(
            GAMMA,
            lambda z: dist.MaskedMixture(
                torch.tensor([True, False, True]),
                scaled(z, batch_shape=(3,)),
                dist.Normal(torch.zeros(3), 1.0),
            ),
        ),
        "learned normalizer": Case(
            of(GAMMA, lambda z: scaled(z, log_normalizer=pyro.param("c", torch.tensor(0.0)))),
            state="learned",
        ),
        "overridden as learned": Case(
            of(
                GAMMA,
                lambda z: scaled(
                    z,
                    log_normalizer=pyro.param("c", torch.tensor(0.0)) * z,
                    learned_normalizer=True,
                ),
            ),
            state="learned",
        ),
        # latents that are energies, or stand in front of one
        "latent energy": of(GAMMA, lambda z: scaled(z), None),
        "latent energy of a latent energy": of(
            energy(lambda z: z, support=constraints.positive), lambda z: scaled(z), None
        ),
        "latent energy whose base moves": of(
            GAMMA, lambda z: energy(torch.square, base=dist.Normal(0.0, z)), None
        ),
        "latent energy whose bound moves": of(
            GAMMA, lambda z: energy(torch.square, support=INTERVAL(-1.0, z)), None
        ),
        # families
        "product": of(GAMMA, lambda z: product(scaled(z), NORMAL)),
        # each waived, but they overlap less as z grows
        "product of location families": of(
            NORMAL,
            lambda z: product(
                energy(lambda x: (x - z) ** 2, constant_normalizer=True),
                energy(lambda x: (x + z) ** 2, constant_normalizer=True),
            ),
        ),
        "mixture of unnormalized densities": of(
            WEIGHTS, lambda w: mixture(w, [energy(torch.square), NORMAL], unnormalized_weights=True)
        ),
        "negation": of(
            dist.Beta(1.0, 1.0),
            lambda z: negation(
                *(energy(f, support=constraints.boolean) for f in (torch.square, torch.abs)),
                weight=z,
            ),
            torch.ones(3),
        ),
        "coupling": of(GAMMA, lambda z: BoltzmannMachine(z, edges=PAIRS), SPINS),
        "field read by the host": of(
            GAMMA, lambda z: BoltzmannMachine(1.0, bias=z.item(), edges=PAIRS), SPINS
        ),
        "tempered machine": of(
            GAMMA, lambda z: BoltzmannMachine(1.0, edges=PAIRS).tempered(z), SPINS
        ),
        "Potts field": of(
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            lambda z: Potts(1.0, z, edges=PAIRS),
            torch.eye(2)[[0, 1, 1]],
        ),
        "RBM weights": rbm(RBM),
        "joint RBM weights": rbm(JointRBM, 5),
        "Gaussian RBM weights": rbm(GaussianRBM),
        "latent RBM": rbm(RBM, None),
        # latents that leave the tensors
        "host read": of(GAMMA, lambda z: scaled(z.item())),
        "host read of the base": of(
            GAMMA, lambda z: energy(torch.square, base=dist.Normal(0.0, float(z)))
        ),
        "host read of the bound": Case(
            of(GAMMA, lambda z: energy(torch.square, support=INTERVAL(-9.0, 9 + z.item()))),
            seeds=10,
        ),
        "numpy read": of(GAMMA, lambda z: scaled(float(z.numpy()))),
        "list": of(GAMMA, lambda z: scaled(z.expand([3]).tolist()[0])),
        "array": of(GAMMA, lambda z: scaled(torch.from_numpy(np.sqrt(np.asarray(z))[None]))),
        "deterministic number": of(
            GAMMA, lambda z: scaled(pyro.deterministic("scale", torch.tensor(float(z))))
        ),
        # E is the same at all data, whatever z is
        "a threshold beyond the data": Case(
            of(dist.Uniform(-1.5, 1.5), lambda z: threshold(z.item()), -2 - DATA.abs()), seeds=10
        ),
        "detached and copied": of(GAMMA, lambda z: scaled(copy.deepcopy(z.data.clone().detach()))),
        "branch of a discrete latent": Case(of(BIT, lambda z: scaled(1.0 if z else 2.0)), seeds=6),
        "branch that is taken now and then": of(NORMAL, lambda z: scaled(2.0 if z < -1.5 else 1.0)),
        "loop": of(GAMMA, lambda z: scaled(1.5 ** int(4 * z))),
        "choice among energies": Case(
            of(
                dist.Categorical(torch.tensor([0.9, 0.05, 0.05])),
                lambda z: [energy(torch.square), energy(torch.abs), energy(lambda x: x**4)][z],
            ),
            seeds=10,
        ),
        "a parameter for each value": Case(
            of(
                dist.Bernoulli(0.2),
                lambda z: scaled(pyro.param(f"c_{int(z)}", torch.tensor(1.0 + float(z)))),
            ),
            seeds=10,
        ),
        "a custom function": Case(
            of(GAMMA, lambda z: energy(lambda x: Square.apply(x, z))),
            (),
            "site 'x': its energy depends on",
            seeds=10,
        ),
        "numbers in a new tensor": Case(
            of(BIT, lambda z: scaled(torch.tensor([1.0 + z, 2.0])[0])),
            (),
            "site 'x': its energy depends on",
            seeds=10,
        ),
        # how often the energy counts: it is fixed, but Z to the power of z + 1
        "number of rows": Case(
            lambda: observe(
                energy(torch.square), torch.zeros(int(pyro.sample("z", CATEGORIES)) + 1)
            ),
            says="site 'x': its (shape|scale or mask) depends on 'z'",
            seeds=10,
        ),
    }.items()
}


def refused(*names, **expected):
    """Adds a model to the table."""

    def add(model):
        REFUSED[model.__name__] = Case(model, names, **expected)
        return model

    return add


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z):
        return z.detach() * x**2

    @staticmethod
    def backward(ctx, grad):
        return None, None


@refused("z")
def host_read_of_the_scale():
    z = positive().item()
    with poutine.scale(scale=z):
        observe(energy(torch.square))


@refused("z")
def through_a_deterministic():
    z = latent()
    scale = pyro.deterministic("scale", z.exp())
    observe(scaled(scale))


@refused("low")
def hierarchical():  # the sites in between are latents of their own
    top = latent("top")
    low = pyro.sample("low", dist.LogNormal(top, 1.0))
    observe(scaled(low))


@refused("z")
def through_an_observed_value():
    z = latent()
    y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=2 * z)
    observe(energy(lambda x: y.exp() * x**2))


@refused("z")
def through_a_factor_of_energies():
    z = latent()
    y = pyro.sample("y", energy(torch.square), obs=2 * z)
    observe(energy(lambda x: y.exp() * x**2))


@refused("z", says="site 'x': its scale or mask depends on 'z'")
def scaled_by_a_latent():
    z = positive()
    with poutine.scale(scale=z):
        observe(energy(torch.square))


@refused("z")
def masked_by_a_latent():
    z = latent()
    with poutine.mask(mask=z > 0):
        observe(energy(torch.square))


@refused("z", says="'x': .*is in the model for some values of 'z' only", seeds=6)
def sometimes_present():
    z = latent()
    if z > 0:
        observe(energy(torch.square))


@refused("z")
def rarely_present():  # most first runs see no energy at all
    z = latent()
    if z > 1.5:
        observe(energy(torch.square))


@refused("a", "b")
def two_latents():
    a, b = positive("a"), latent("b")
    observe(energy(lambda x: a * x**2 + b * x))


@refused("z")
def in_a_local_plate():
    with pyro.plate("groups", 2):
        z = positive()
    p = scaled(z, batch_shape=(2,))
    with pyro.plate("groups_", 2, dim=-1), pyro.plate("data", 3, dim=-2):
        pyro.sample("x", p, obs=DATA[:, None].expand(3, 2))


@refused("k", says="site 'x': its shape depends on 'k', read by")
def size_of_an_event():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    n = int(k) + 1
    p = energy(lambda x: x.square().sum(-1), event_shape=(n,))
    pyro.sample("x", p, obs=torch.zeros(n))


@refused("z")
def in_one_branch_of_a_sequential_plate():
    z = positive()
    for i in pyro.plate("rows", 3):
        p = scaled(z) if i == 2 else energy(torch.square)
        pyro.sample("x" if i == 2 else f"x_{i}", p, obs=DATA[i])


@refused("k")
def an_enumerated_latent():
    scales = torch.tensor([1.0, 2.0])
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    observe(energy(lambda x: x**2 * scales[k.long()]))


@refused("weight")
def functional_bayesian_network():
    net = nn.Linear(1, 1, bias=False)
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def e(x):
        return torch.func.functional_call(net, {"weight": weight}, x[..., None]).square()[..., 0]

    observe(energy(e))


class BayesianEnergy(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x):
        return (self.weight * x).square()


class ReadsItsWeight(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = BayesianEnergy()

    def forward(self):
        weight = self.net.weight
        observe(energy(lambda x: (weight * x).square()))


@refused("net.weight")
def bayesian_weights_read_in_the_model():
    ReadsItsWeight()()


class Outer(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Sequential](
            PyroModule[nn.Linear](1, 2), PyroModule[nn.Linear](2, 1)
        )
        self.net[1].weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self):
        weight = self.net[1].weight
        first = self.net[0]
        observe(energy(lambda x: (first(x[..., None]) @ weight.mT).square()[..., 0]))


@refused("net.1.weight")
def weights_of_an_inner_module():
    Outer()()


@refused("scale")
def a_lifted_parameter():
    def model():
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        observe(scaled(scale))

    poutine.lift(model, prior={"scale": dist.Gamma(2.0, 1.0)})()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False))
        self.scale = torch.tensor(1.0)

    def forward(self, x):
        return self.scale * self.inner(x[..., None]).square()[..., 0]


SHARED = Scaled()


@refused("z")
def an_attribute_of_a_module():
    net = Scaled()
    net.scale = positive()
    observe(energy(net))


@refused(says="site 'x': its energy depends on", seeds=6)
def an_overwritten_weight():  # the tensors of the module know nothing of z
    net = Scaled()
    with torch.no_grad():
        net.inner[1].weight.copy_(positive().reshape(1, 1))
    observe(energy(net))


@refused(says="site 'x': its energy depends on", seeds=6)
def an_overwritten_weight_of_a_shared_module():  # which every run overwrites again
    with torch.no_grad():
        SHARED.inner[1].weight.copy_(positive().reshape(1, 1))
    observe(energy(SHARED))


@refused(says="site 'x': its energy depends on", seeds=6)
def a_reparametrized_latent():  # its start is given in terms of z
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        observe(energy(lambda x: z.exp() * x**2))

    poutine.reparam(model, config={"z": LocScaleReparam(0.0)})()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    case = REFUSED[name]
    for seed in range(case.seeds):
        if case.seeds > 1:
            pyro.set_rng_seed(seed)
        with pytest.raises(NormalizerError) as caught:
            check_normalizers(case.model)
        message = str(caught.value)
        for part in (*map(repr, case.names), "'x'", case.state):
            assert part in message
        for way_out in ("ExchangeKernel", "log_normalizer=", "constant_normalizer=True", "losses"):
            assert way_out in message
        assert re.search(case.says, message), message


# -- accepted ----------------------------------------------------------------------------------

ACCEPTED = {
    "data minus latent": shifted(lambda: energy(lambda x: x**2 / 2)),
    "location with the user's word": of(
        NORMAL, lambda z: energy(lambda x: (x - z) ** 2 / 2, constant_normalizer=True)
    ),
    "known function of the latent": of(
        GAMMA, lambda z: energy(lambda x: z * x**2 / 2, log_normalizer=(2 * math.pi / z).log() / 2)
    ),
    "no energy at all": of(NORMAL, lambda z: dist.Normal(z, 1.0)),
    "conditioned latent": lambda: poutine.condition(
        REFUSED["precision"].model, {"z": torch.tensor(2.0)}
    )(),
    # a bijection, whatever it depends on, leaves Z as it is
    "transform of a latent": of(
        GAMMA, lambda z: dist.TransformedDistribution(energy(torch.square), [AffineTransform(z, z)])
    ),
    "learned normalizer of a fixed energy": shifted(
        lambda: energy(torch.square, log_normalizer=pyro.param("c", torch.tensor(0.0)))
    ),
    "mixture of fixed energies": shifted(
        lambda: dist.MixtureSameFamily(TWO, scaled(SCALES, batch_shape=(2,)))
    ),
    "natural parameters of a known family": of(
        GAMMA, lambda z: ExponentialFamily.from_distribution(dist.Exponential(z)), DATA.abs()
    ),
    "product that is a member of a family": of(
        NORMAL, lambda z: product(dist.Normal(z, 1.0), dist.Normal(1.0, 2.0))
    ),
    "mixture of known parts": of(
        WEIGHTS,
        lambda w: mixture(w, [energy(torch.square, log_normalizer=math.log(math.pi) / 2), NORMAL]),
    ),
    "product of fixed parts": shifted(lambda: product(energy(torch.abs), NORMAL)),
    "exact normalizer of a machine": of(
        GAMMA, lambda z: exact(BoltzmannMachine(z, edges=PAIRS)), SPINS
    ),
    "exact normalizer of an RBM": of(
        MATRIX, lambda w: exact(RBM(w, torch.zeros(3), torch.zeros(2))), torch.ones(3)
    ),
}


def exact(p):
    return p.normalized(p.exact_log_normalizer())


def accepted(model):
    ACCEPTED[model.__name__] = model
    return model


@accepted
def factor_on_neighbours():
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    pyro.sample("x", energy(lambda d: d.abs().sum(-1), event_shape=(3,)), obs=z.diff())


@accepted
def latent_energy_site():
    x = pyro.sample("x", energy(lambda x: x**4))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


@accepted
def latent_energy_then_a_function_of_it():
    x = pyro.sample("x", energy(lambda x: x**2))
    pyro.sample("y", energy(lambda y: y**2), obs=1 - x)


@accepted
def known_constant():
    z = latent()
    observe(energy(lambda x: x**2 / 2, log_normalizer=math.log(2 * math.pi) / 2))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


@accepted
def conditional_on_covariates():
    m = latent()
    p = energy(lambda x: (1 + COVARIATES) * x**2 / 2, batch_shape=(3,))
    observe(p, DATA - m * COVARIATES)


@accepted
def subsampled_covariates():  # the choice of data is not a latent
    m = latent()
    with pyro.plate("data", 3, subsample_size=2) as i:
        p = energy(lambda x: (1 + COVARIATES[i] ** 2) * x**2, batch_shape=(2,))
        pyro.sample("x", p, obs=DATA[i] - m)


@accepted
def scaled_and_masked_by_data():
    latent()
    with poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, False, True])):
        observe(energy(torch.square))


@accepted
def a_host_read_that_does_not_matter():
    z = latent()
    assert math.isfinite(z.item())
    observe(energy(torch.square), DATA - z)


@accepted
def a_trained_energy():
    m = latent()
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    observe(scaled(scale), DATA - m)


@accepted
def a_hidden_machine_of_fixed_couplings():
    s = pyro.sample("x", BoltzmannMachine(0.5, edges=PAIRS))
    pyro.sample("y", dist.Normal(s, 1.0).to_event(1), obs=SPINS)


@accepted
def a_discrete_latent_beside_the_energy():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(0.5))
    observe(energy(torch.square))


@accepted
def a_singular_matrix_at_some_points():  # an energy that has no value everywhere is still fixed
    m = latent()

    def e(x):
        return torch.linalg.cholesky((1 + x)[..., None, None])[..., 0, 0]

    observe(energy(e), (DATA.abs() - m).abs())


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    check_normalizers(ACCEPTED[name])
    check_normalizers(ACCEPTED[name], init_strategy=init_to_sample)


class NoisyNet(nn.Module):
    """An energy, or a feature, that is random and couples its batch while training."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(1, 8), nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        h = self.layer(x[..., None]).reshape(-1, 8)
        return self.dropout(self.norm(h)).square().sum(-1).reshape(x.shape)


class NoisyPyroNet(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.net(x[..., None])).square()[..., 0]


@pytest.mark.parametrize("make", [NoisyNet, NoisyPyroNet])
def test_networks_in_training_mode_are_accepted(make):
    net = make().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def as_energy():
        m = latent()
        pyro.module("net", net)
        observe(energy(net), DATA - m)

    def as_features():
        m = latent()
        features = net(COVARIATES)
        observe(energy(lambda x: (x - features) ** 2, batch_shape=(3,)), DATA - m)

    for model in (as_energy, as_features):
        check_normalizers(model)
    assert all(module.training for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_networks_that_read_a_latent_are_refused():
    net = NoisyNet()

    def model():
        z = latent()
        observe(energy(lambda x: net(x * z)))

    with pytest.raises(NormalizerError, match="'z'"):
        check_normalizers(model)


def test_a_bayesian_network_as_the_energy_is_refused():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = BayesianEnergy()

        def forward(self):
            observe(energy(self.net))

    with pytest.raises(RuntimeError, match=r"draws its weight 'net.weight' \(a PyroSample\) anew"):
        check_normalizers(Model())


# -- the check itself --------------------------------------------------------------------------


def test_consumes_no_random_numbers():
    state = torch.get_rng_state()
    for model in (ACCEPTED["data minus latent"], latent_energy_site):
        check_normalizers(model)
    with pytest.raises(NormalizerError):
        check_normalizers(REFUSED["precision"].model)
    assert torch.equal(torch.get_rng_state(), state)


def test_leaves_no_trace_behind():
    with poutine.trace() as outer:
        check_normalizers(ACCEPTED["data minus latent"])
    assert not outer.trace.nodes
    assert pyro.settings.get("validate_distributions_pyro")
    assert poutine.trace(latent_energy_site).get_trace().nodes["x"]["value"].shape == ()


def test_arguments_reach_the_model():
    def model(x, *, known):
        z = positive()
        log_z = (math.pi / z).log() / 2 if known else None
        observe(scaled(z, log_normalizer=log_z), x)

    check_normalizers(model, (DATA,), {"known": True})
    with pytest.raises(
        NormalizerError, match=r"site 'x': its energy depends on 'z', and its log Z"
    ):
        check_normalizers(model, (DATA,), {"known": False})


def test_all_that_moves_is_found():
    def model():
        a, b = positive("a"), positive("b")
        support = constraints.interval(-9.0, 9 + b)
        with poutine.mask(mask=b > 1):
            pyro.sample("x", scaled(a, support=support), obs=DATA)
        pyro.sample("y", energy(torch.square), obs=DATA - a)
        pyro.sample("w", energy(lambda x: a.item() * x**2), obs=DATA)

    first, second = moving_normalizers(BoundModel(model))
    assert (first.name, second.name) == ("x", "w")
    assert first.parts == {"energy": {"a"}, "support": {"b"}, "scale or mask": {"b"}}
    assert first.latents == {"a", "b"}
    assert not first.was_read
    assert second.parts == {"energy": {"a"}}
    assert second.was_read == {"energy"}
    assert "site 'w': its energy depends on 'a', read by .item()" in str(second)


def test_every_suspect_is_looked_at():
    def model():
        z = positive()
        pyro.sample("good", energy(torch.square), obs=DATA[0])
        pyro.sample("bad", scaled(z), obs=DATA[0])

    with pytest.raises(NormalizerError, match="site 'bad'"):
        check_normalizers(model)


def test_only_the_site_that_comes_and_goes_is_named():
    def model():
        if latent() > 0:
            pyro.sample("some", energy(torch.square), obs=DATA[0])
        pyro.sample("always", energy(torch.square), obs=DATA[0])

    with pytest.raises(NormalizerError) as caught:
        check_normalizers(model)
    assert "'some'" in str(caught.value)
    assert "'always'" not in str(caught.value)


def test_an_energy_is_not_blamed_on_its_own_value():
    def model():
        w = positive("w").item()
        x = pyro.sample("x", scaled(w))
        assert math.isfinite(x.item())

    with pytest.raises(NormalizerError, match=r"site 'x': its energy depends on 'w', read by"):
        check_normalizers(model)


def test_float64():
    def model():
        z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0))
        observe(scaled(z), DATA.double())

    with pytest.raises(NormalizerError, match="'z'"):
        check_normalizers(model)
