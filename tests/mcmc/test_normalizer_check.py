"""Whether log Z depends on a latent: which models are refused, which are not, and what is said."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.mcmc import NormalizerError, check_normalizers

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


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, latents = REFUSED[name]
    with pytest.raises(NormalizerError) as caught:
        check_normalizers(model)
    message = str(caught.value)
    for part in latents:
        assert repr(part) in message
    assert "'x'" in message
    for way_out in ("log_normalizer=", "constant_normalizer=True", "losses"):
        assert way_out in message
    assert "learned" in message if "learned" in name else "unknown" in message


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("model", [discrete_branch, host_read_of_the_bound, sometimes_present])
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
