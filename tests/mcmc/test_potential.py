"""The potential of a model: U by hand, starts, batches of chains, what falls back, what is NaN."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import (
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import AffineTransform, ExpTransform

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential, FunctionPotential, ModelPotential, Site
from pyro_ebm.mcmc.potentials.singular import nan_where_singular
from pyro_ebm.ops import value_and_grad
from pyro_ebm.ops.eval_mode import called_in_eval_mode, eval_mode

FALLBACK = "cannot be vectorized over chains"


def reference(potential: ModelPotential, z: torch.Tensor) -> torch.Tensor:
    """U of each chain from the model's own log joint and torch's Jacobians, one by one."""
    values = []
    for row in z:
        x, log_det = {}, torch.zeros((), dtype=torch.float64)
        at = 0
        for site in potential.sites:
            part = row[at : at + site.shape.numel()].reshape(site.shape).to(site.dtype)
            at += site.shape.numel()
            forward = site.transform.inv
            x[site.name] = forward(part)
            if site.name in potential.idle:  # standard normal, and no matter to the model
                idle = potential.idle[site.name]
                log_det = log_det - torch.where(idle, part, 0.0).square().sum().double() / 2
                part = torch.where(idle, 0.0, part)
            log_det = log_det + forward.log_abs_det_jacobian(part, forward(part)).sum().double()
        trace = potential.bound.trace_at(x)
        values.append(-trace.log_prob_sum().double() - log_det)
    return torch.stack(values)


def agrees(potential: ModelPotential, chains: int = 5) -> None:
    """All chains at once, without a warning, equals the reference, gradient included."""
    z = potential.initial(chains)
    value, grad = potential.value_and_grad(z)
    assert value.shape == (chains,)
    assert grad.shape == z.shape == (chains, potential.dim)
    tolerance = {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(value.double(), reference(potential, z).detach(), **tolerance)
    torch.testing.assert_close(potential(z), value)
    want = value_and_grad(lambda z: reference(potential, z), z)[1]
    torch.testing.assert_close(grad, want, rtol=2e-3, atol=2e-3)


# -- U by hand -------------------------------------------------------------------------------------

X = torch.linspace(-1.5, 1.5, 7)


def test_u_on_the_half_line():
    """x = e^z, p(x) = 2 e^(-2x): U = 2 e^z - log 2 - z."""
    potential = ModelPotential(lambda: pyro.sample("x", dist.Exponential(2.0)))
    want = 2 * X.exp() - math.log(2) - X
    torch.testing.assert_close(potential(X[:, None]), want)
    torch.testing.assert_close(potential.value_and_grad(X[:, None])[1][:, 0], 2 * X.exp() - 1)


def test_u_on_a_shifted_half_line():
    """x = 3 + e^z, p(x) = 2 * 3^2 / x^3."""
    potential = ModelPotential(lambda: pyro.sample("x", dist.Pareto(3.0, 2.0)))
    x = 3 + X.exp()
    torch.testing.assert_close(potential(X[:, None]), -(math.log(18) - 3 * x.log()) - X)


def test_u_on_an_interval():
    """x = 2 + 3 sigmoid(z), p = 1/3, dx/dz = 3 s (1 - s): U = -log s - log(1 - s)."""
    potential = ModelPotential(lambda: pyro.sample("x", dist.Uniform(2.0, 5.0)))
    s = X.sigmoid()
    torch.testing.assert_close(potential(X[:, None]), -s.log() - (1 - s).log())


def test_u_on_the_simplex():
    """Stick breaking on K = 2: x = (s, 1 - s), s = sigmoid(z), Dirichlet(2, 3) = 12 x1 x2^2."""
    potential = ModelPotential(lambda: pyro.sample("x", dist.Dirichlet(torch.tensor([2.0, 3.0]))))
    x1, x2 = potential.constrain(X[:, None])["x"].unbind(-1)
    torch.testing.assert_close(x1, X.sigmoid())
    want = -(12 * x1 * x2**2).log() - (x1 * x2).log()
    torch.testing.assert_close(potential(X[:, None]), want)


def test_u_on_correlation_matrices():
    """x21 = tanh z; LKJ(2) on L: log p = 2 log L22 + c, L22^2 = 1 - tanh^2; dx/dz = 1 - tanh^2."""
    potential = ModelPotential(lambda: pyro.sample("x", dist.LKJCholesky(2, 2.0)))
    assert potential.dim == 1
    square = 1 - X.tanh() ** 2
    lower = potential.constrain(X[:, None])["x"]
    torch.testing.assert_close(lower[:, 1, 0], X.tanh())
    # the density of the correlation r is (3/4) (1 - r^2)
    want = -(0.75 * square).log() - square.log()
    torch.testing.assert_close(potential(X[:, None]), want)


def test_u_on_ordered_vectors():
    """x = (a, a + e^b) under the energy |x|^2 / 2: U = |x|^2 / 2 - b."""
    p = UnnormalizedEnergy(
        lambda x: x.square().sum(-1) / 2,
        event_shape=(2,),
        support=dist.constraints.ordered_vector,
    )
    z = torch.randn(6, 2)
    a, b = z.unbind(-1)
    want = (a**2 + (a + b.exp()) ** 2) / 2 - b
    torch.testing.assert_close(ModelPotential(p)(z), want)
    torch.testing.assert_close(EnergyPotential(p)(z), want)


def test_u_of_two_sites_and_data():
    """A normal mean and a half-Cauchy scale, by their formulas."""
    y = torch.tensor([1.0, -2.0, 0.5])

    def model(y):
        m = pyro.sample("m", dist.Normal(1.0, 2.0))
        s = pyro.sample("s", dist.HalfCauchy(3.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    potential = ModelPotential(model, (y,))
    assert potential.names == ["m", "s"]  # in the order of the model
    z = torch.randn(4, 2)
    m, s = z[:, 0], z[:, 1].exp()
    log_joint = (
        -((m - 1) ** 2) / 8
        - math.log(2 * math.sqrt(2 * math.pi))
        + math.log(2 / (3 * math.pi))
        - (1 + (s / 3) ** 2).log()
        - ((y - m[:, None]) ** 2 / (2 * s[:, None] ** 2)).sum(-1)
        - 3 * s.log()
        - 1.5 * math.log(2 * math.pi)
    )
    torch.testing.assert_close(potential(z), -log_joint - z[:, 1])


def test_u_with_the_users_own_transform():
    """x = e^(z / 2) for Exponential(1): U = e^(z/2) - z/2 + log 2."""
    transform = AffineTransform(0.0, 0.5).inv
    chain = torch.distributions.transforms.ComposeTransform([ExpTransform().inv, transform])
    potential = ModelPotential(
        lambda: pyro.sample("x", dist.Exponential(1.0)), transforms={"x": chain}
    )
    torch.testing.assert_close(
        potential(X[:, None]), (X / 2).exp() - X / 2 + math.log(2), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"transforms= names \['nope'\].*are\s+\['x'\]"):
        ModelPotential(lambda: pyro.sample("x", dist.Normal(0, 1)), transforms={"nope": chain})


def test_a_distribution_is_a_model_of_one_site():
    for p in (
        dist.Gamma(2.0, 1.0),
        UnnormalizedEnergy(lambda x: x - x.log(), support=constraints.positive),
    ):
        potential = ModelPotential(p)
        assert potential.names == ["x"]
        want = X.exp() - X - X  # Gamma(2, 1): -log x + x, and the Jacobian
        torch.testing.assert_close(potential(X[:, None]), want)


# -- positions and sites ---------------------------------------------------------------------------


def many_sites():
    pyro.sample("b", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    pyro.sample("a", dist.LogNormal(0.0, 1.0))
    pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    pyro.sample("l", dist.LKJCholesky(3, 1.0))


def test_round_trips():
    potential = ModelPotential(many_sites)
    assert potential.names == ["b", "a", "p", "l"]
    assert potential.sizes == [6, 1, 3, 3]
    for batch in [(), (5,), (4, 5)]:
        z = torch.randn(*batch, potential.dim)
        params = potential.unravel(z)
        assert {k: tuple(v.shape) for k, v in params.items()} == {
            "b": (*batch, 2, 3),
            "a": batch,
            "p": (*batch, 3),
            "l": (*batch, 3),
        }
        assert torch.equal(potential.ravel(params), z)
        points = potential.constrain(z)
        assert points["p"].shape == (*batch, 4)
        assert points["l"].shape == (*batch, 3, 3)
        assert torch.equal(points["b"], params["b"])
        back = {name: t(points[name]) for name, t in potential.transforms.items()}
        torch.testing.assert_close(potential.ravel(back), z, rtol=1e-4, atol=1e-4)


def test_mixed_dtypes():
    def model():
        pyro.sample("single", dist.Normal(0.0, 1.0))
        pyro.sample("double", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    potential = ModelPotential(model)
    assert potential.dtype == torch.float64
    z = potential.initial(3)
    params = potential.unravel(z)
    assert params["single"].dtype == torch.float32
    assert params["double"].dtype == torch.float64
    value, grad = potential.value_and_grad(z)
    assert value.dtype == grad.dtype == torch.float64
    want = z.square().sum(-1) / 2 + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, z, rtol=1e-6, atol=1e-6)


def test_the_default_dtype_is_followed():
    torch.set_default_dtype(torch.float64)
    potential = ModelPotential(lambda: pyro.sample("x", dist.Gamma(2.0, 1.0)))
    assert potential.initial(3).dtype == torch.float64


def test_sites_that_no_kernel_can_move():
    with pytest.raises(ValueError, match=r"'k' has dtype torch\.int64"):
        FunctionPotential(lambda p: p["k"].sum(), [Site("k", torch.Size([]), torch.int64, None)])
    with pytest.raises(ValueError, match="'k' is discrete and cannot be summed out: this kernel"):
        ModelPotential(lambda: pyro.sample("k", dist.Poisson(2.0)))

    def scaled():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, top))

    with pytest.raises(ValueError, match=r"support of site 'x' depends on \['top'\]"):
        ModelPotential(scaled)

    def subsampled():
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="plate 'data' subsamples 2 of 10"):
        ModelPotential(subsampled)


# -- where chains start ----------------------------------------------------------------------------


def two_sites():
    pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("x", dist.Normal(torch.tensor([10.0, 20.0]), 1.0).to_event(1))


def starts(init_strategy, chains: int = 40) -> dict[str, torch.Tensor]:
    potential = ModelPotential(two_sites, init_strategy=init_strategy)
    return potential.constrain(potential.initial(chains))


def test_init_to_uniform():
    for strategy, radius in ((init_to_uniform, 2.0), (init_to_uniform(radius=0.1), 0.1)):
        start = starts(strategy, 300)
        for z in (start["s"].log(), start["x"]):
            assert z.abs().max() <= radius + 1e-6
            assert z.abs().max() > 0.95 * radius
            assert (z.std() - radius / math.sqrt(3)).abs() < 0.15 * radius


def test_init_to_value():
    value = {"s": torch.tensor(3.0), "x": torch.tensor([7.0, 8.0])}
    start = starts(init_to_value(values=value))
    torch.testing.assert_close(start["s"], torch.full((40,), 3.0))
    torch.testing.assert_close(start["x"], value["x"].expand(40, 2))
    partly = starts(init_to_value(values={"s": torch.tensor(3.0)}))
    assert partly["x"].unique().numel() > 75  # the others start apart


def test_init_to_value_of_another_shape():
    wrong = init_to_value(values={"s": torch.ones(3)})
    with pytest.raises(ValueError, match=r"starts site 's' at shape \(3,\), not \(\)"):
        ModelPotential(two_sites, init_strategy=wrong)


def test_init_to_sample():
    start = starts(init_to_sample, 300)
    # the prior's moments, within 5 standard errors
    assert ((start["x"].mean(0) - torch.tensor([10.0, 20.0])).abs() < 5 / math.sqrt(300)).all()
    assert (start["s"].log().mean().abs()) < 5 * 0.5 / math.sqrt(300)
    assert start["s"].unique().numel() > 290  # two may round to one number


def test_init_to_median_and_mean():
    # the median of 15 draws has a standard deviation of about 0.32
    start = starts(init_to_median(num_samples=15), 100)
    assert (start["x"].std(0) < 0.45).all()
    assert (start["x"].std(0) > 0.2).all()
    mean = starts(init_to_mean, 3)
    torch.testing.assert_close(mean["x"], torch.tensor([[10.0, 20.0]]).expand(3, 2))


def test_init_to_generated():
    made = iter(range(1000))

    def generate():
        return init_to_value(values={"s": torch.tensor(1.0 + next(made))})

    start = starts(init_to_generated(generate=generate), 6)
    assert start["s"].unique().numel() == 6


def test_starts_without_density_are_drawn_again():
    """U is infinite on x < 1: the chains that start there move, the others stay."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x < 1, -math.inf, 0.0))

    for strategy in (init_to_uniform, init_to_sample):
        x = ModelPotential(model, init_strategy=strategy).initial(50)[:, 0]
        assert (x >= 1).all()
        assert x.unique().numel() == 50


def test_only_chains_without_a_start_are_drawn_again():
    potential = ModelPotential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    asked = []

    def draw(chains):
        asked.append(chains)
        z = torch.zeros(chains, 1)
        if len(asked) == 1:
            z[:3] = math.nan
        return z

    potential._draw = draw
    potential.initial(10)
    assert asked == [10, 3]


def test_no_start_names_the_site():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("good", x)
        pyro.factor("bad", x + math.nan)
        pyro.factor("wall", -math.inf * x.square())

    for validate, match in ((True, "not valid in 100 tries"), (False, "no starting point")):
        with pyro.validation_enabled(validate), pytest.raises(ValueError, match=match) as caught:
            ModelPotential(model, (torch.tensor(0.0),)).initial(3)
        text = str(caught.value)
        assert "density of site 'bad' is nan" in text
        assert "density of site 'wall' is infinite" in text
        assert "good" not in text.split("(")[0]
    assert "init_strategy" in text

    def steep(x=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("kink", (x * 0).sqrt())

    with pytest.raises(ValueError, match=r"the gradient of the potential in site\(s\) 'x'"):
        ModelPotential(steep).initial(1)


def test_a_start_that_a_distribution_refuses_is_drawn_again():
    """Half of the uniform starts give a negative scale: a ValueError while validation is on."""

    def model():
        scale = pyro.sample("scale", dist.Normal(1.0, 0.1))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(0.3))

    for seed in range(6):
        pyro.set_rng_seed(seed)
        for strategy in (init_to_uniform, init_to_uniform(radius=1.9)):
            z = ModelPotential(model, init_strategy=strategy).initial(20)
            assert (z > 0).all()


def test_the_model_is_validated_once_in_the_open():
    """A mistake is an error with the site's name, although sampling itself validates nothing."""

    def outside():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Gamma(1.0, 1.0), obs=torch.tensor(-1.0))

    with pytest.raises(ValueError, match="site 'y'"):
        ModelPotential(outside)
    with pyro.validation_enabled(False):
        assert ModelPotential(outside).names == ["x"]
    calls = []

    def counted():
        calls.append(pyro.distributions.is_validation_enabled())
        pyro.sample("x", dist.Normal(0.0, 1.0))

    potential = ModelPotential(counted)
    assert calls[0] is True
    calls.clear()
    potential.value_and_grad(torch.randn(4, 1))
    assert not any(calls)
    assert pyro.distributions.is_validation_enabled()


# -- all chains at once ----------------------------------------------------------------------------


def dirichlet(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Categorical(p), obs=counts)


def lkj(y):
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(3)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    tril = scale[:, None] * corr
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=y)


def gaussian_process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    cov = (-((x[:, None] - x) ** 2) / (2 * length**2)).exp() + noise * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def circular(y):
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.VonMises(b, a), obs=y)


def factors():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("f", -(x**4).sum())


def loop(y):
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in pyro.markov(range(1, 4)):
        x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.1), obs=y[t])
    for i in pyro.plate("plate", 2):
        pyro.sample(f"w_{i}", dist.Normal(x, 1.0))


def nested(y):
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3, dim=-2):
        row = pyro.sample("row", dist.Normal(top, 1.0))
        with pyro.plate("columns", 2, dim=-1):
            cell = pyro.sample("cell", dist.Normal(row, 1.0))
            pyro.sample("y", dist.Normal(cell, 0.5), obs=y)


def masked(y, mask):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.poutine.scale(scale=3.0), pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0).mask(mask), obs=y)
    with pyro.poutine.mask(mask=mask), pyro.plate("more", len(y)):
        pyro.sample("w", dist.Normal(x, 1.0))


def with_an_energy(y):
    energy = UnnormalizedEnergy(
        lambda x: (x[..., 1:] - x[..., :-1]).square().sum(-1),
        event_shape=(4,),
        base=dist.Normal(0.0, 1.0).expand([4]).to_event(1),
    )
    x = pyro.sample("x", energy)
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


OUTER_NORMAL = dist.Normal(torch.zeros(2), torch.ones(2), validate_args=True)
OUTER_GAMMA = dist.Gamma(2.0, 1.0, validate_args=True).expand([2])
OUTER_ENERGY = UnnormalizedEnergy(
    lambda x: x**4, support=constraints.positive, validate_args=True
).expand([2])


def made_outside():
    """The parts were told to validate outside, the wrappers are made in the model."""
    pyro.sample("x", OUTER_NORMAL.to_event(1))
    pyro.sample("g", OUTER_GAMMA.to_event(1))
    pyro.sample("m", OUTER_GAMMA.mask(torch.tensor([True, False])).to_event(1))
    pyro.sample("e", OUTER_ENERGY.to_event(1))
    pyro.sample("t", dist.TransformedDistribution(OUTER_GAMMA, [ExpTransform().inv]).to_event(1))
    mixed = dist.Categorical(torch.ones(2), validate_args=True)
    pyro.sample("y", dist.MixtureSameFamily(mixed, OUTER_NORMAL), obs=torch.tensor(0.5))


DATA = torch.randn(6, generator=torch.Generator().manual_seed(1))
MODELS = {
    "dirichlet": (dirichlet, (torch.tensor([0, 2, 2, 1]),)),
    "lkj": (lkj, (DATA.reshape(2, 3),)),
    "gaussian_process": (gaussian_process, (torch.linspace(0, 1, 6), DATA)),
    "circular": (circular, (DATA,)),
    "factors": (factors, ()),
    "loop": (loop, (DATA,)),
    "nested": (nested, (DATA.reshape(3, 2),)),
    "masked": (masked, (DATA, torch.tensor([True, False, True, True, False, True]))),
    "energy": (with_an_energy, (DATA[:4],)),
    "made_outside": (made_outside, ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_chains_at_once_equal_each_chain_alone(name):
    model, args = MODELS[name]
    potential = ModelPotential(model, args)
    agrees(potential)
    assert potential.way == "vmap"


def test_a_proposal_outside_every_support_is_no_error():
    """Whatever a part of the model was told to validate: there is no density, and no exception."""
    potential = ModelPotential(made_outside)
    z = potential.initial(4)
    for site_index in range(len(potential.sites)):
        start = sum(potential.sizes[:site_index])
        for chains in (4, 1):
            bad = z[:chains].clone()
            bad[0, start] = math.nan
            value, _ = potential.value_and_grad(bad)
            assert value[0].isnan()
            assert value[1:].isfinite().all()


def test_a_branch_on_a_value_parts_the_chains():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            pyro.factor("right", -x)

    potential = ModelPotential(model)
    z = torch.tensor([[1.0], [-1.0], [0.5]])
    value, grad = potential.value_and_grad(z)  # a warning would be an error
    want = z[:, 0] ** 2 / 2 + math.log(2 * math.pi) / 2 + z[:, 0].clamp(min=0)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(potential(z), want)
    torch.testing.assert_close(grad, z + (z > 0))
    assert potential.way == "rewritten"


def test_a_number_that_is_read_falls_back_with_one_warning():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("read", x * x.item())

    potential = ModelPotential(model)
    z = torch.tensor([[1.0], [-1.0], [0.5]])
    with pytest.warns(UserWarning, match=FALLBACK) as caught:
        value, grad = potential.value_and_grad(z)
    assert len(caught) == 1
    again = potential(z)  # a second warning would be an error
    want = -(z[:, 0] ** 2) / 2 + math.log(2 * math.pi) / 2
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(again, want)
    torch.testing.assert_close(grad, 0 * z)


def test_a_number_that_is_read_far_out_falls_back_there():
    """No position at which the ways are compared shows it."""

    def potential_fn(params):
        x = params["x"]
        return x.square().sum() * (x[0].item() if x[0] > 100 else 1.0)

    potential = FunctionPotential(potential_fn, [site("x", 2)])
    assert potential(torch.ones(3, 2)).tolist() == [2.0, 2.0, 2.0]
    far = torch.tensor([[1.0, 0.0], [200.0, 0.0], [300.0, 0.0]])
    with pytest.warns(UserWarning, match=FALLBACK):
        assert potential(far).tolist() == [1.0, 200.0**3, 300.0**3]
    assert potential(far).tolist() == [1.0, 200.0**3, 300.0**3]


def test_a_vectorized_value_that_differs_falls_back():
    """A function may run under vmap and mean something else there: it is compared first."""

    def in_the_open():
        return torch._C._functorch.peek_interpreter_stack() is None

    def potential_fn(params):
        x = params["x"]
        return x.square().sum() * (1 if in_the_open() else 2)

    potential = FunctionPotential(potential_fn, [site("x", 2)])
    with pytest.warns(UserWarning, match="vectorized value differs"):
        value = potential(torch.ones(3, 2))
    assert value.tolist() == [2.0, 2.0, 2.0]


def test_nothing_is_decided_where_nothing_is_finite():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x < 0, math.nan, 0.0))

    potential = ModelPotential(model)
    assert potential.value_and_grad(torch.full((3, 1), -1.0))[0].isnan().all()
    assert potential.way is None
    assert potential.value_and_grad(torch.ones(3, 1))[0].isfinite().all()
    assert potential.way == "vmap"


def site(name: str, *shape: int) -> Site:
    return Site(name, torch.Size(shape), torch.float32, biject_to(constraints.real).inv)


# -- discrete latents are summed out ---------------------------------------------------------------


def mixture(y):
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(w), infer={"enumerate": "parallel"}).long()
        pyro.sample("y", dist.Normal(m[k], 1.0), obs=y)


def marginal(y):
    """The mixture with k summed out by hand."""
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        parts = dist.Normal(m, 1.0).log_prob(y[:, None])
        log_w = torch.stack([(1 - w).log(), w.log()])
        pyro.factor("y", (parts + log_w).logsumexp(-1))


@pytest.mark.parametrize("max_plate_nesting", [None, 1, 2])
def test_enumerated_mixture(max_plate_nesting):
    y = DATA
    potential = ModelPotential(mixture, (y,), max_plate_nesting=max_plate_nesting)
    by_hand = ModelPotential(marginal, (y,))
    assert potential.names == by_hand.names == ["w", "m"]
    z = by_hand.initial(4)
    value, grad = potential.value_and_grad(z)  # at once, or a warning would be an error
    want_value, want_grad = by_hand.value_and_grad(z)
    torch.testing.assert_close(value, want_value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-4)


# -- parameters and modules ------------------------------------------------------------------------

NET = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def with_a_net(held=None):
    """A global net, or one in the arguments, called in the model."""
    net = pyro.module("net", NET if held is None else held["net"])
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("f", -net(x[None]).sum())


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.drop = nn.Dropout(0.9)

    def forward(self, x, y):
        mean = self.linear(self.drop(x)).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_parameters_are_read_at_every_evaluation():
    def model():
        m = pyro.param("m", torch.tensor(3.0))
        s = pyro.param("s", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(m, s))

    potential = ModelPotential(model)
    grad = potential.value_and_grad(torch.tensor([[1.0], [5.0]]))[1]
    torch.testing.assert_close(grad, torch.tensor([[-0.5], [0.5]]))
    pyro.get_param_store()["m"] = torch.tensor(5.0)
    grad = potential.value_and_grad(torch.tensor([[1.0], [5.0]]))[1]
    torch.testing.assert_close(grad, torch.tensor([[-1.0], [0.0]]))
    assert pyro.param("m").grad is None


@pytest.mark.parametrize("args", [(), ({"net": NET},)], ids=["global", "argument"])
def test_nets_are_held_in_evaluation_mode(args):
    NET.train()
    NET[2].eval()  # a part that was in evaluation mode stays so
    before = {k: v.clone() for k, v in NET.state_dict().items()}
    potential = ModelPotential(with_a_net, args)
    z = torch.randn(4, 2)
    first, second = potential.value_and_grad(z)[0], potential(z)
    assert torch.equal(first, second.detach())
    assert potential.way == "vmap"
    assert [module.training for module in NET] == [True, True, False, True]
    for name, value in NET.state_dict().items():
        assert torch.equal(value, before[name]), name
    NET.eval()
    want = z.square().sum(-1) / 2 + math.log(2 * math.pi) + NET(z)[:, 0]
    torch.testing.assert_close(second, want)
    NET.train()
    potential.initial(3)
    assert int(NET[1].num_batches_tracked) == 0


def test_pyro_module():
    regression = Regression().train()
    x, y = torch.randn(5, 2), torch.randn(5)
    potential = ModelPotential(regression, (x, y))
    assert potential.names == ["linear.weight"]
    z = torch.randn(3, 2)
    bias = regression.linear.bias
    mean = z @ x.T + bias
    want = z.square().sum(-1) / 2 + (y - mean).square().sum(-1) / 2 + 3.5 * math.log(2 * math.pi)
    torch.testing.assert_close(potential(z), want)
    assert regression.training
    assert regression.drop.training


def test_the_energy_of_a_net_is_held_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).train()
    p = UnnormalizedEnergy(lambda x: net(x).squeeze(-1), event_shape=(3,))
    z = torch.randn(4, 3)
    for potential in (EnergyPotential(p), ModelPotential(lambda: pyro.sample("x", p))):
        assert torch.equal(potential(z), potential(z))
        assert net.training
    with called_in_eval_mode() as called:
        net(z)
    assert called[0] is net
    assert len(called) == 4

    def fails_within():
        with eval_mode(net.modules()):
            assert not net.training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails_within()
    assert net.training
    assert net[1].training


# -- functions, energies, singular matrices --------------------------------------------------------


def test_a_potential_function():
    def potential_fn(params):
        return params["a"] ** 2 + (params["b"] ** 4).sum()

    potential = FunctionPotential(potential_fn, [site("a"), site("b", 2)])
    z = torch.randn(4, 3)
    value, grad = potential.value_and_grad(z)
    torch.testing.assert_close(value, z[:, 0] ** 2 + (z[:, 1:] ** 4).sum(-1))
    torch.testing.assert_close(grad, torch.cat([2 * z[:, :1], 4 * z[:, 1:] ** 3], -1))
    start = potential.initial(100)
    assert start.abs().max() < 2
    bad = FunctionPotential(lambda params: params["b"], [site("b", 2)])
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        bad(torch.zeros(1, 2))


def test_an_energy_has_a_group_for_each_batch_element():
    """E_b(x) = a_b x^2 / 2 on the half-line, three at once."""
    a = torch.tensor([1.0, 2.0, 3.0])
    p = UnnormalizedEnergy(lambda x: a * x**2 / 2, batch_shape=(3,), support=constraints.positive)
    potential = EnergyPotential(p)
    assert potential.targets == 3
    z = potential.initial(12)
    assert z.shape == (12, 1)
    want = a.repeat(4) * z[:, 0].exp() ** 2 / 2 - z[:, 0]
    torch.testing.assert_close(potential(z), want)
    torch.testing.assert_close(potential.to_position(potential.to_points(z)), z)
    torch.testing.assert_close(
        potential.value_and_grad(z)[1][:, 0], a.repeat(4) * (2 * z[:, 0]).exp() - 1
    )


def test_starts_of_an_energy_are_drawn_again_within_their_group():
    low = torch.tensor([-9.0, 1.0])

    def energy(x):  # the second group is walled off below 1
        return torch.where(x < low, math.inf, x**2)

    potential = EnergyPotential(UnnormalizedEnergy(energy, batch_shape=(2,)))
    z = potential.initial(40).reshape(20, 2)
    assert (z[:, 1] >= 1).all()
    assert (z[:, 0] < 1).any()


def singular(x):
    """A covariance that is positive definite where x > 0."""
    eye = torch.eye(2)
    return dist.MultivariateNormal(torch.zeros(2), x * eye)


def test_a_singular_matrix_is_nan_for_its_chain_alone():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", singular(x), obs=y)

    y = torch.ones(2)
    potential = ModelPotential(
        model, (y,), init_strategy=init_to_value(values={"x": torch.tensor(1.0)})
    )
    x = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 4.0])
    good = x > 0
    value, grad = potential.value_and_grad(x[:, None])
    assert value.isnan().tolist() == (~good).tolist()
    want = x**2 / 2 + 1.5 * math.log(2 * math.pi) + x.log() + 1 / x
    torch.testing.assert_close(value[good], want[good])
    torch.testing.assert_close(grad[good, 0], (x + 1 / x - 1 / x**2)[good])
    assert grad[~good].eq(0).all()  # so that a trajectory goes on
    plain = potential(x[:, None])  # as a kernel without gradients asks
    assert plain.isnan().tolist() == (~good).tolist()
    torch.testing.assert_close(plain[good], want[good])
    assert potential(x[2:3, None]).isnan().all()
    assert potential.way == "vmap"
    assert "singular" in potential.blame(torch.tensor([-1.0]))
    # half of the uniform starts are singular: they are drawn again
    assert (ModelPotential(model, (y,)).initial(30) > 0).all()
    assert (ModelPotential(model, (y,), init_strategy=init_to_sample).initial(30) > 0).all()


def test_the_chain_that_torch_names_is_tried_alone():
    sizes = []

    def function(z):
        sizes.append(len(z))
        return (torch.linalg.cholesky(z[:, :, None])[:, 0, 0],)

    z = torch.ones(64, 1).index_fill(0, torch.tensor([40]), -1.0)
    (value,) = nan_where_singular(function, z)
    assert value.isnan().nonzero().tolist() == [[40]]
    assert sizes == [64, 40, 1, 12, 11]
    assert nan_where_singular(function, -torch.ones(2000, 1))[0].isnan().all()


def test_a_singular_matrix_in_an_energy():
    p = UnnormalizedEnergy(lambda x: torch.linalg.cholesky(x[..., None, None])[..., 0, 0])
    x = torch.tensor([4.0, -1.0, 9.0])
    potential = EnergyPotential(p)
    assert potential(x[:, None]).nan_to_num(-1.0).tolist() == [2.0, -1.0, 3.0]
    value, grad = potential.value_and_grad(x[:, None])
    assert value.nan_to_num(-1.0).tolist() == [2.0, -1.0, 3.0]
    torch.testing.assert_close(grad[[0, 2], 0], 0.5 / x[[0, 2]].sqrt())


def test_other_errors_of_the_model_are_raised():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", (x @ torch.ones(4)))

    with pytest.raises(RuntimeError, match="size"):
        ModelPotential(model)
