"""Models under each of Pyro's reparameterizers have Pyro's potential, and our kernels move them."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoIAFNormal, AutoStructured
from pyro.infer.mcmc import MCMC as PyroMCMC
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import (
    AutoReparam,
    DiscreteCosineReparam,
    GumbelSoftmaxReparam,
    HaarReparam,
    LatentStableReparam,
    LinearHMMReparam,
    LocScaleReparam,
    MinimalReparam,
    NeuTraReparam,
    ProjectedNormalReparam,
    SplitReparam,
    StableReparam,
    StructuredReparam,
    StudentTReparam,
    SymmetricStableReparam,
    TransformReparam,
    UnitJacobianReparam,
)

from pyro_ebm import MCMC, ChEESKernel, LangevinKernel, MHKernel
from pyro_ebm.mcmc.potentials.model import ModelPotential
from tests.statistics import assert_mean

Y = torch.tensor([3.0, 2.5, 8.0])
CORNER = torch.tensor([1.0, 0.0, 0.0])
TIME = torch.arange(4.0)


def hyper():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    return mu, pyro.sample("s", dist.LogNormal(0.0, 0.3))


def rows(make, observed=False):
    """A model of three rows: the site ``x`` of a distribution made of a location and a scale."""

    def model():
        fn = make(*hyper())
        with pyro.plate("rows", 3):
            x = pyro.sample("x", fn, obs=Y if observed else None)
            if not observed:
                pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    return model


def one_event(make, y):
    def model():
        x = pyro.sample("x", make(*hyper()))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    return model


def normal(mu, s):
    return dist.Normal(mu, s)


def student(mu, s):
    return dist.StudentT(3 + s, mu, s)


def stable(mu, s):
    return dist.Stable(1 + 0.9 * mu.sigmoid(), 0.9 * mu.tanh(), s, mu)


def symmetric(mu, s):
    return dist.Stable(1.5, 0.0, s, mu)


def warped(mu, s):
    base = dist.Normal(torch.zeros_like(mu), s.new_ones(s.shape))
    warp = [dist.transforms.AffineTransform(mu, s), dist.transforms.ExpTransform()]
    return dist.TransformedDistribution(base, warp)


def relaxed(mu, s):
    return dist.RelaxedOneHotCategorical(torch.tensor(1.0), logits=torch.stack([mu, s, -mu]))


def projected(mu, s):
    return dist.ProjectedNormal(torch.stack([mu, s, -mu]))


def sequence(mu, s):
    return dist.Normal(mu * torch.ones(4), s).to_event(1)


def hmm(noise):
    def model():
        _, s = hyper()
        zero = torch.zeros(4, 1)
        parts = noise(zero[0], 1 + zero[0]), noise(zero, s), noise(zero, 1 + zero)
        init, trans, obs = (part.to_event(1) for part in parts)
        fn = dist.LinearHMM(init, torch.eye(1), trans, torch.eye(1), obs, duration=4)
        pyro.sample("x", fn, obs=TIME[:, None])

    return model


def funnel():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.LogNormal(x, 1.0))
    pyro.sample("z", dist.Normal(y, 1.0), obs=Y[0])


def by_hand():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    u = pyro.sample("u", dist.Uniform(torch.zeros_like(mu), torch.ones_like(mu)))
    pyro.sample("y", dist.Normal(mu + u, 1.0), obs=Y[0])


def several():
    mu, s = hyper()
    with pyro.plate("rows", 3):
        parts = [
            pyro.sample("normal", dist.Normal(mu, s)),
            pyro.sample("log_normal", dist.LogNormal(mu, s)),
            pyro.sample("student", dist.StudentT(3.0, mu, s)),
            pyro.sample("stable", dist.Stable(1.7, 0.0, s, mu)),
        ]
        pyro.sample("y", dist.Normal(sum(parts), 1.0), obs=Y)


def random_walk():  # that of Pyro's own test of NUTS
    stability = pyro.sample("stability", dist.Uniform(1.0, 2.0))
    skew = pyro.sample("skew", dist.Uniform(-1.0, 1.0))
    scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
    steps = dist.Stable(stability, skew, scale).expand([4]).to_event(1)
    z = pyro.sample("x", steps).cumsum(-1)
    pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=torch.tensor([1.0, 0.0, 2.0, 1.0]))


def flipped():
    return UnitJacobianReparam(dist.transforms.Permute(torch.tensor([3, 2, 1, 0])), "flipped")


STABLE = SymmetricStableReparam
SITES = {  # a model and the reparameterizer of its site "x"
    "LocScale": (rows(normal), LocScaleReparam(0.5)),
    "LocScale, decentred": (rows(normal), LocScaleReparam(0.0)),
    "LocScale, learned": (rows(normal), LocScaleReparam()),
    "LocScale of StudentT": (rows(student), LocScaleReparam(0.3)),
    "Transform": (rows(warped), TransformReparam()),
    "Transform of LogNormal": (rows(dist.LogNormal), TransformReparam()),
    "StudentT": (rows(student), StudentTReparam()),
    "StudentT, observed": (rows(student, observed=True), StudentTReparam()),
    "SymmetricStable": (rows(symmetric), STABLE()),
    "SymmetricStable, observed": (rows(symmetric, observed=True), STABLE()),
    "Stable": (rows(stable), StableReparam()),
    "Stable, observed": (rows(stable, observed=True), StableReparam()),
    "LatentStable": (rows(stable), LatentStableReparam()),
    "LatentStable, Pyro's own": (random_walk, LatentStableReparam()),
    "GumbelSoftmax": (one_event(relaxed, CORNER), GumbelSoftmaxReparam()),
    "ProjectedNormal": (one_event(projected, CORNER), ProjectedNormalReparam()),
    "Haar": (one_event(sequence, TIME), HaarReparam()),
    "DiscreteCosine": (one_event(sequence, TIME), DiscreteCosineReparam()),
    "DiscreteCosine, smooth": (one_event(sequence, TIME), DiscreteCosineReparam(smooth=1.0)),
    "UnitJacobian": (one_event(sequence, TIME), flipped()),
    "LinearHMM": (hmm(dist.Normal), LinearHMMReparam()),
    "LinearHMM of StudentT": (
        hmm(lambda loc, scale: dist.StudentT(3.0, loc, scale)),
        LinearHMMReparam(StudentTReparam(), StudentTReparam(), StudentTReparam()),
    ),
    "LinearHMM of Stable": (
        hmm(lambda loc, scale: dist.Stable(1.5, loc, scale)),
        LinearHMMReparam(STABLE(), STABLE(), STABLE()),
    ),
}
MODELS = {name: poutine.reparam(model, {"x": how}) for name, (model, how) in SITES.items()}
MODELS |= {
    "by hand": by_hand,
    "AutoReparam": AutoReparam()(several),
    "AutoReparam of GumbelSoftmax": AutoReparam()(one_event(relaxed, CORNER)),
    "AutoReparam of ProjectedNormal": AutoReparam()(one_event(projected, CORNER)),
    "MinimalReparam": MinimalReparam()(several),
}


def _trained(guide):
    svi = SVI(funnel, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    return guide.requires_grad_(False)


def neutra():
    return NeuTraReparam(_trained(AutoIAFNormal(funnel))).reparam(funnel)


class AutoZuko(AutoContinuous):
    """A guide by an autoregressive flow of zuko."""

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self.flow = zuko.flows.MAF(self.latent_dim, transforms=1, hidden_features=[8])

    def get_base_dist(self):
        return dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1)

    def get_transform(self, *args, **kwargs):
        return self.flow().transform.inv

    def get_posterior(self, *args, **kwargs):
        return dist.TransformedDistribution(self.get_base_dist(), [self.get_transform()])


def neutra_by_zuko():
    return NeuTraReparam(_trained(AutoZuko(funnel))).reparam(funnel)


def structured():
    guide = AutoStructured(funnel, conditionals="normal", dependencies="linear")
    return StructuredReparam(_trained(guide)).reparam(funnel)


MADE = {"NeuTra": neutra, "NeuTra of zuko": neutra_by_zuko, "Structured": structured}


@pytest.fixture(params=[*MODELS, *MADE])
def model(request):
    name = request.param
    return MADE[name]() if name in MADE else MODELS[name]


@pytest.fixture(autouse=True)
def _of_pyro():
    with warnings.catch_warnings():  # of vmap, and of what Pyro says of its own starts
        warnings.filterwarnings("ignore", "the model cannot be vectorized", UserWarning)
        warnings.filterwarnings("ignore", ".*does not commute with init", RuntimeWarning)
        yield


def test_potential_is_pyros(model):
    potential = ModelPotential(model)
    start, pyros, transforms, _ = initialize_model(model)
    assert start.keys() == set(potential.names) == transforms.keys()
    z = potential.initial(3)
    want = torch.stack([pyros(potential.unravel(row)) for row in z])
    torch.testing.assert_close(potential(z).detach(), want.detach(), rtol=1e-4, atol=1e-4)


def moved(kernel):
    mcmc = MCMC(kernel, 3, 3, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert all(x.isfinite().all() for x in mcmc.get_samples().values())


def test_a_gradient_kernel_runs(model):
    moved(LangevinKernel(model))


# of each kind: over chains at once and one by one, with a potential that is Pyro's (above)
@pytest.mark.parametrize("name", ["LocScale", "Haar", "LinearHMM of Stable", "by hand"])
@pytest.mark.parametrize("kernel", [MHKernel, lambda model: ChEESKernel(model, step_size=0.01)])
def test_other_kernels_run(name, kernel):
    moved(kernel(MODELS[name]))


@pytest.mark.parametrize("name", ["SymmetricStable, observed", "GumbelSoftmax", "by hand"])
def test_under_pyros_runner(name):
    mcmc = PyroMCMC(LangevinKernel(MODELS[name]), 3, 3, num_chains=1, disable_progbar=True)
    mcmc.run()
    assert all(x.isfinite().all() for x in mcmc.get_samples().values())


def test_a_split_site():
    """Pyro's own kernels cannot start this one."""
    split = {"x": SplitReparam([1, 3], -1)}
    mcmc = MCMC(
        LangevinKernel(poutine.reparam(one_event(sequence, TIME), split)),
        3,
        3,
        num_chains=2,
        disable_progbar=True,
    )
    mcmc.run()
    assert {"x_split_0", "x_split_1"} <= mcmc.get_samples().keys()


def test_posterior_of_bounds_made_by_hand():
    mcmc = MCMC(ChEESKernel(by_hand), 200, 100, num_chains=30, disable_progbar=True)
    mcmc.run()
    # u | y is N(y, 2) on (0, 1), and mu | u is N((y - u) / 2, 1 / 2)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    mean = float((u * (-((3 - u) ** 2) / 4).softmax(0)).sum())
    draws = mcmc.get_samples(group_by_chain=True)
    assert_mean(draws["u"], mean)
    assert_mean(draws["mu"], (3 - mean) / 2)


def neck():
    """x is 0 on average, with the scale exp(v / 2) of v ~ N(0, 3)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("row", 3):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


@pytest.mark.parametrize("how", ["loc-scale", "auto"])
def test_the_neck_of_a_funnel_is_reached(how):
    ways = {"loc-scale": {"x": LocScaleReparam(0.0)}, "auto": AutoReparam(centered=0.0)}
    model = poutine.reparam(neck, ways[how])
    mcmc = MCMC(ChEESKernel(model), 150, 150, num_chains=30, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    v = draws["v"] if "v" in draws else 3 * draws["v_decentered"]
    assert_mean(v, 0.0)
    assert_mean(v.square(), 9.0)
