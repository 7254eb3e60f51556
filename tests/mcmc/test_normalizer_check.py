"""Whether log Z depends on a latent: which models are refused, which are not, and what is said."""

import copy
import math

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
from torch.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
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

DATA = torch.tensor([0.5, -1.0, 2.0])


def energy(function, **kwargs):
    return UnnormalizedEnergy(function, **kwargs)


def observe(p, x=DATA):
    with pyro.plate("data", len(x)):
        return pyro.sample("x", p, obs=x)


def latent(name="z"):
    return pyro.sample(name, dist.Normal(0.0, 1.0))


def positive(name="z"):
    return pyro.sample(name, dist.Gamma(2.0, 1.0))


# -- refused: a table of models, and the latents that the error must name ----------------------

REFUSED = {}


def refused(*names):
    def register(model):
        REFUSED[model.__name__] = (model, names)
        return model

    return register


@refused("z")
def precision():
    z = positive()
    observe(energy(lambda x: z * x**2 / 2))


@refused("z")
def location_without_the_users_word():
    z = latent()
    observe(energy(lambda x: (x - z) ** 2 / 2))


@refused("z")
def dead_units():  # relu(z x) is 0 with gradient 0 at z = 0 and below
    z = pyro.sample("z", dist.Normal(-50.0, 0.01))
    observe(energy(lambda x: x**2 + (z * x.abs()).relu()))


@refused("z")
def energy_even_at_zero():  # d/dz cos(z x) is 0 at x = 0
    z = latent()
    observe(energy(lambda x: x**2 - (z * x).cos()), torch.zeros(2))


@refused("z")
def zero_gradient():
    z = latent()
    observe(energy(lambda x: x**2 * z.round().detach()))


@refused("z")
def base_of_a_latent():
    z = positive()
    observe(energy(lambda x: x.abs(), base=dist.Normal(0.0, z)))


@refused("z")
def upper_bound_of_a_latent():
    z = positive()
    observe(energy(lambda x: x, support=constraints.interval(-9.0, 9 + z)))


@refused("z")
def lower_bound_of_a_latent_in_an_event():
    z = positive()
    support = constraints.greater_than(-9 - z)
    pyro.sample("x", energy(lambda x: x.sum(-1), event_shape=(3,), support=support), obs=DATA)


@refused("z")
def discrete_latent():
    z = pyro.sample("z", dist.Categorical(torch.ones(3)))
    scales = torch.tensor([1.0, 2.0, 3.0])
    observe(energy(lambda x: x**2 / scales[z]))


@refused("z")
def discrete_branch():
    z = pyro.sample("z", dist.Bernoulli(0.1))
    scale = 1.0 if z else 2.0
    observe(energy(lambda x: scale * x**2))


@refused("z")
def host_read():
    z = positive().item()
    observe(energy(lambda x: z * x**2))


@refused("z")
def host_read_of_the_base():
    z = float(positive())
    observe(energy(torch.square, base=dist.Normal(0.0, z)))


@refused("z")
def host_read_of_the_bound():
    z = positive().item()
    observe(energy(torch.square, support=constraints.interval(-9.0, 9 + z)))


@refused("z")
def host_read_of_the_scale():
    z = positive().item()
    with poutine.scale(scale=z):
        observe(energy(torch.square))


@refused("z")
def numpy_read():
    z = positive().numpy()
    observe(energy(lambda x: float(z) * x**2))


@refused("z")
def a_branch_that_is_taken_now_and_then():
    z = latent()
    scale = 2.0 if z < -1.5 else 1.0
    observe(energy(lambda x: scale * x**2))


@refused("z")
def energy_latent_of_a_latent():
    z = positive()
    pyro.sample("x", energy(lambda x: z * x**2))


@refused("w")
def energy_latent_of_an_energy_latent():
    w = pyro.sample("w", energy(lambda w: w, support=constraints.positive))
    pyro.sample("x", energy(lambda x: w * x**2))


@refused("z")
def through_a_deterministic():
    z = latent()
    scale = pyro.deterministic("scale", z.exp())
    observe(energy(lambda x: scale * x**2))


@refused("low")
def hierarchical():  # the sites in between are latents of their own
    top = latent("top")
    low = pyro.sample("low", dist.LogNormal(top, 1.0))
    observe(energy(lambda x: low * x**2))


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


@refused("z")
def scaled_by_a_latent():
    z = positive()
    with poutine.scale(scale=z):
        observe(energy(torch.square))


@refused("z")
def masked_by_a_latent():
    z = latent()
    with poutine.mask(mask=z > 0):
        observe(energy(torch.square))


@refused("z")
def masked_distribution():
    z = latent()
    observe(energy(torch.square).mask(z > 0))


@refused("z")
def inside_a_masked_distribution():
    z = positive()
    observe(energy(lambda x: z * x**2).mask(torch.tensor([True, False, True])))


@refused("z")
def inside_independent():
    z = positive()
    pyro.sample("x", energy(lambda x: z * x**2).expand([3]).to_event(1), obs=DATA)


@refused("z")
def inside_a_transformed_distribution():
    z = positive()
    exp = torch.distributions.ExpTransform()
    observe(dist.TransformedDistribution(energy(lambda x: z * x**2), [exp]), DATA.exp())


@refused("z")
def components_of_a_mixture():
    z = positive()
    scales = torch.stack([z, 2 * z])
    parts = energy(lambda x: scales * x**2, batch_shape=(2,))
    observe(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))


@refused("w")
def weights_of_a_mixture():  # sum w_k exp(-E_k) / Z_k
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    parts = energy(lambda x: torch.tensor([1.0, 2.0]) * x**2, batch_shape=(2,))
    observe(dist.MixtureSameFamily(dist.Categorical(w), parts))


@refused("z")
def one_part_of_a_masked_mixture():
    z = positive()
    parts = energy(lambda x: z * x**2, batch_shape=(3,)), dist.Normal(torch.zeros(3), 1.0)
    observe(dist.MaskedMixture(torch.tensor([True, False, True]), *parts))


@refused("z")
def learned_normalizer():
    z = positive()
    observe(energy(lambda x: z * x**2, log_normalizer=pyro.param("c", torch.tensor(0.0))))


@refused("z")
def overridden_as_learned():
    z = positive()
    log_z = pyro.param("c", torch.tensor(0.0)) * z
    observe(energy(lambda x: z * x**2, log_normalizer=log_z, learned_normalizer=True))


@refused("z")
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
    p = energy(lambda x: z * x**2, batch_shape=(2,))
    with pyro.plate("groups_", 2, dim=-1), pyro.plate("data", 3, dim=-2):
        pyro.sample("x", p, obs=DATA[:, None].expand(3, 2))


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


# where and how often the energy counts


@refused("k")
def number_of_rows():  # an energy that is fixed, but Z to the power of k + 1
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    with pyro.plate("data", int(k) + 1):
        pyro.sample("x", energy(torch.square), obs=torch.zeros(int(k) + 1))


@refused("k")
def size_of_an_event():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    n = int(k) + 1
    p = energy(lambda x: x.square().sum(-1), event_shape=(n,))
    pyro.sample("x", p, obs=torch.zeros(n))


@refused("z")
def bound_of_the_base():
    z = positive()
    base = dist.Uniform(0.0, 9 + z).expand([3]).to_event(1)
    pyro.sample("x", energy(lambda x: x.sum(-1), base=base), obs=DATA.abs())


@refused("z")
def temperature():
    observe(energy(torch.square).tempered(positive()))


@refused("z")
def latent_energy_whose_base_moves():
    pyro.sample("x", energy(torch.square, base=dist.Normal(0.0, positive())))


@refused("z")
def latent_energy_whose_bound_moves():
    support = constraints.interval(-1.0, positive())
    pyro.sample("x", energy(torch.square, support=support))


@refused("z")
def in_one_branch_of_a_sequential_plate():
    z = positive()
    for i in pyro.plate("rows", 3):
        p = energy(lambda x: z * x**2) if i == 2 else energy(torch.square)
        pyro.sample("x" if i == 2 else f"x_{i}", p, obs=DATA[i])


# latents that leave the tensors


@refused("z")
def a_loop():
    z = positive()
    scale = 1.0
    for _ in range(int(4 * z)):
        scale = 1.5 * scale
    observe(energy(lambda x: scale * x**2))


@refused("k")
def choice_among_energies():
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.9, 0.05, 0.05])))
    observe([energy(torch.square), energy(torch.abs), energy(lambda x: x**4)][k])


@refused("k")
def a_parameter_for_each_value():
    k = pyro.sample("k", dist.Bernoulli(0.2))
    scale = pyro.param(f"scale_{int(k)}", torch.tensor(1.0 + float(k)))
    observe(energy(lambda x: scale * x**2))


@refused("k")
def an_enumerated_latent():
    scales = torch.tensor([1.0, 2.0])
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    observe(energy(lambda x: x**2 * scales[k.long()]))


@refused("z")
def a_list():
    scale = positive().expand([3]).tolist()
    observe(energy(lambda x: x**2 * scale[0]))


@refused("z")
def an_array():
    scale = np.sqrt(np.asarray(positive()))
    observe(energy(lambda x: x**2 * torch.from_numpy(scale[None])))


@refused("z")
def a_deterministic_number():
    z = pyro.deterministic("scale", torch.tensor(float(positive())))
    observe(energy(lambda x: z * x**2))


@refused("z")
def a_threshold_beyond_the_data():  # E is the same at all data, whatever z is
    z = pyro.sample("z", dist.Uniform(-1.5, 1.5)).item()
    observe(energy(lambda x: x**2 + 10.0 * (x > z)), -2 - DATA.abs())


@refused("z")
def detached_and_copied():
    z = copy.deepcopy(positive().data.clone().detach())
    observe(energy(lambda x: z * x**2))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False))
        self.inverse_mass_sqrt = torch.tensor(1.0)

    def forward(self, x):
        return self.inverse_mass_sqrt * self.inner(x[..., None]).square()[..., 0]


@refused("z")
def an_attribute_of_a_module():
    net = Scaled()
    net.inverse_mass_sqrt = positive()
    observe(energy(net))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z):
        return z.detach() * x**2

    @staticmethod
    def backward(ctx, grad):
        return None, None


# what a latent is


@refused("scale")
def a_lifted_parameter():
    def model():
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        observe(energy(lambda x: scale * x**2))

    poutine.lift(model, prior={"scale": dist.Gamma(2.0, 1.0)})()


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


# the families


@refused("z")
def a_product():
    z = positive()
    observe(product(energy(lambda x: z * x**2), dist.Normal(0.0, 1.0)))


@refused("m")
def a_product_of_location_families():  # each waived, but they overlap less as m grows
    m = latent("m")
    a = energy(lambda x: (x - m) ** 2, constant_normalizer=True)
    observe(product(a, energy(lambda x: (x + m) ** 2, constant_normalizer=True)))


@refused("w")
def a_mixture_of_unnormalized_densities():
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    parts = [energy(torch.square), dist.Normal(0.0, 1.0)]
    observe(mixture(w, parts, unnormalized_weights=True))


@refused("z")
def a_contrast():
    z = pyro.sample("z", dist.Beta(1.0, 1.0))
    a, b = (energy(f, support=constraints.boolean) for f in (torch.square, torch.abs))
    observe(negation(a, b, weight=z), torch.ones(3))


SPINS = torch.tensor([1.0, -1.0, 1.0])
PAIRS = torch.tensor([[0, 1], [1, 2]])


@refused("z")
def coupling():
    pyro.sample("x", BoltzmannMachine(positive(), edges=PAIRS), obs=SPINS)


@refused("z")
def field_read_by_the_host():
    p = BoltzmannMachine(1.0, bias=positive().item(), edges=PAIRS)
    pyro.sample("x", p, obs=SPINS)


@refused("z")
def tempered_machine():
    pyro.sample("x", BoltzmannMachine(1.0, edges=PAIRS).tempered(positive()), obs=SPINS)


@refused("field")
def potts_field():
    field = pyro.sample("field", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", Potts(1.0, field, edges=PAIRS), obs=torch.eye(2)[[0, 1, 1]])


def rbm(cls, n, **kwargs):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    pyro.sample("x", cls(w, torch.zeros(3), torch.zeros(2), **kwargs), obs=torch.ones(n))


@refused("w")
def rbm_weights():
    rbm(RBM, 3)


@refused("w")
def joint_rbm_weights():
    rbm(JointRBM, 5)


@refused("w")
def gaussian_rbm_weights():
    rbm(GaussianRBM, 3)


@refused("w")
def latent_rbm():
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    pyro.sample("x", RBM(w, torch.zeros(3), torch.zeros(2)))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, latents = REFUSED[name]
    with pytest.raises(NormalizerError) as caught:
        check_normalizers(model)
    message = str(caught.value)
    for part in latents:
        assert repr(part) in message
    assert "'x'" in message
    for way_out in ("ExchangeKernel", "log_normalizer=", "constant_normalizer=True", "losses"):
        assert way_out in message
    assert "learned" in message if "learned" in name else "unknown" in message


def an_overwritten_weight():  # the tensors of the module know nothing of z
    net = Scaled()
    with torch.no_grad():
        net.inner[1].weight.copy_(positive().reshape(1, 1))
    observe(energy(net))


SHARED = Scaled()


def an_overwritten_weight_of_a_shared_module():  # which every run overwrites again
    with torch.no_grad():
        SHARED.inner[1].weight.copy_(positive().reshape(1, 1))
    observe(energy(SHARED))


def a_custom_function():
    z = positive()
    observe(energy(lambda x: Square.apply(x, z)))


def numbers_in_a_new_tensor():
    k = pyro.sample("k", dist.Bernoulli(0.1))
    scale = torch.tensor([1.0 + k, 2.0])
    observe(energy(lambda x: scale[0] * x**2))


def a_reparametrized_latent():  # its start is given in terms of z
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        observe(energy(lambda x: z.exp() * x**2))

    poutine.reparam(model, config={"z": LocScaleReparam(0.0)})()


@pytest.mark.parametrize(
    "model",
    [
        an_overwritten_weight,
        an_overwritten_weight_of_a_shared_module,
        a_custom_function,
        numbers_in_a_new_tensor,
        a_reparametrized_latent,
    ],
)
def test_refused_where_nothing_tells_the_latent(model):
    for seed in range(10):
        pyro.set_rng_seed(seed)
        with pytest.raises(NormalizerError, match="site 'x': its energy depends on"):
            check_normalizers(model)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "model",
    [
        discrete_branch,
        host_read_of_the_bound,
        sometimes_present,
        number_of_rows,
        choice_among_energies,
        a_parameter_for_each_value,
        a_threshold_beyond_the_data,
    ],
)
def test_refused_whatever_the_seed(model, seed):
    pyro.set_rng_seed(seed)
    with pytest.raises(NormalizerError):
        check_normalizers(model)


# -- accepted ----------------------------------------------------------------------------------

ACCEPTED = {}


def accepted(model):
    ACCEPTED[model.__name__] = model
    return model


@accepted
def data_minus_latent():
    m = latent()
    observe(energy(lambda x: x**2 / 2), DATA - m)


@accepted
def location_with_the_users_word():
    m = latent()
    observe(energy(lambda x: (x - m) ** 2 / 2, constant_normalizer=True))


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
def known_function_of_the_latent():
    z = positive()
    observe(energy(lambda x: z * x**2 / 2, log_normalizer=(2 * math.pi / z).log() / 2))


@accepted
def no_energy_at_all():
    z = latent()
    observe(dist.Normal(z, 1.0))


@accepted
def conditioned_latent():
    poutine.condition(precision, {"z": torch.tensor(2.0)})()


COVARIATES = torch.tensor([1.0, 2.0, 3.0])


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
def transform_of_a_latent():  # a bijection, whatever it depends on, leaves Z as it is
    z = positive()
    affine = torch.distributions.AffineTransform(z, z)
    observe(dist.TransformedDistribution(energy(torch.square), [affine]))


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
def learned_normalizer_of_a_fixed_energy():
    m = latent()
    log_z = pyro.param("c", torch.tensor(0.0))
    observe(energy(torch.square, log_normalizer=log_z), DATA - m)


@accepted
def a_trained_energy():
    m = latent()
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    observe(energy(lambda x: scale * x**2), DATA - m)


@accepted
def a_mixture_of_fixed_energies():
    m = latent()
    parts = energy(lambda x: torch.tensor([1.0, 2.0]) * x**2, batch_shape=(2,))
    observe(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), DATA - m)


@accepted
def natural_parameters_of_a_known_family():
    z = positive()
    p = ExponentialFamily.from_distribution(dist.Exponential(z))
    with pyro.plate("data", 3):
        pyro.sample("x", p, obs=DATA.abs())


@accepted
def a_product_that_is_a_member_of_a_family():
    observe(product(dist.Normal(latent(), 1.0), dist.Normal(1.0, 2.0)))


@accepted
def a_mixture_of_known_parts():
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    log_z = math.log(math.pi) / 2
    parts = [energy(torch.square, log_normalizer=log_z), dist.Normal(0.0, 1.0)]
    observe(mixture(w, parts))


@accepted
def a_product_of_fixed_parts():
    m = latent()
    observe(product(energy(torch.abs), dist.Normal(0.0, 1.0)), DATA - m)


@accepted
def exact_normalizer_of_a_machine():
    p = BoltzmannMachine(positive(), edges=PAIRS)
    pyro.sample("x", p.normalized(p.exact_log_normalizer()), obs=SPINS)


@accepted
def exact_normalizer_of_an_rbm():
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    p = RBM(w, torch.zeros(3), torch.zeros(2))
    pyro.sample("x", p.normalized(p.exact_log_normalizer()), obs=torch.ones(3))


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


@pytest.mark.parametrize("model", [data_minus_latent, latent_energy_site, precision])
def test_consumes_no_random_numbers(model):
    state = torch.get_rng_state()
    try:
        check_normalizers(model)
    except NormalizerError:
        assert model is precision
    assert torch.equal(torch.get_rng_state(), state)


def test_leaves_no_trace_behind():
    with poutine.trace() as outer:
        check_normalizers(data_minus_latent)
    assert not outer.trace.nodes
    assert pyro.settings.get("validate_distributions_pyro")
    assert poutine.trace(latent_energy_site).get_trace().nodes["x"]["value"].shape == ()


def test_arguments_reach_the_model():
    def model(x, *, known):
        z = positive()
        log_z = (math.pi / z).log() / 2 if known else None
        observe(energy(lambda x: z * x**2, log_normalizer=log_z), x)

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
            pyro.sample("x", energy(lambda x: a * x**2, support=support), obs=DATA)
        pyro.sample("y", energy(torch.square), obs=DATA - a)
        pyro.sample("w", energy(lambda x: a.item() * x**2), obs=DATA)

    first, second = moving_normalizers(model)
    assert (first.name, second.name) == ("x", "w")
    assert first.parts == {"energy": {"a"}, "support": {"b"}, "scale or mask": {"b"}}
    assert first.latents == {"a", "b"}
    assert not first.was_read
    assert second.parts == {"energy": {"a"}}
    assert second.was_read == {"energy"}
    assert "site 'w': its energy depends on 'a', read by .item()" in str(second)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (number_of_rows, "its (shape|scale or mask) depends on 'k'"),
        (size_of_an_event, "its shape depends on 'k', read by"),
        (upper_bound_of_a_latent, "its support depends on 'z'"),
        (scaled_by_a_latent, "its scale or mask depends on 'z'"),
        (sometimes_present, "is in the model for some values of 'z' only"),
    ],
)
def test_says_what_moves(model, what):
    with pytest.raises(NormalizerError, match=f"site 'x': .*{what}"):
        check_normalizers(model)


def test_every_suspect_is_looked_at():
    def model():
        z = positive()
        pyro.sample("good", energy(torch.square), obs=DATA[0])
        pyro.sample("bad", energy(lambda x: z * x**2), obs=DATA[0])

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
        x = pyro.sample("x", energy(lambda x: w * x**2))
        assert math.isfinite(x.item())

    with pytest.raises(NormalizerError, match=r"site 'x': its energy depends on 'w', read by"):
        check_normalizers(model)


def test_float64():
    def model():
        z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0))
        observe(energy(lambda x: z * x**2), DATA.double())

    with pytest.raises(NormalizerError, match="'z'"):
        check_normalizers(model)
