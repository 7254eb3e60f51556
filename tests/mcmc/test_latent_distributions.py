"""Every distribution of Pyro as a latent site: sampled, or refused by its name, with a way out."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints, transforms
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from pyro.infer.reparam import ProjectedNormalReparam
from torch import tensor
from torch.distributions.transforms import Transform

from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.provenance import HostReads, trace_latents
from pyro_ebm.models.runs import BoundModel
from tests.statistics import assert_mean

ones, zeros, eye = torch.ones, torch.zeros, torch.eye
one, two, half = tensor(1.0), tensor(2.0), tensor(0.5)


def normal(*shape):
    return dist.Normal(zeros(shape), 1.0).to_event(len(shape))


def mvn(n):
    return dist.MultivariateNormal(zeros(n), eye(n))


def mixed(parts, *batch):
    return dist.MixtureSameFamily(dist.Categorical(ones(*batch, 2)), parts)


def hmm(*batch):
    return dist.GaussianHMM(normal(1), eye(1), normal(1), eye(1), normal(1), duration=3)


SAMPLED = {
    "AVFMultivariateNormal": lambda: dist.AVFMultivariateNormal(zeros(2), eye(2), ones(2, 2, 2)),
    "AffineBeta": lambda: dist.AffineBeta(two, two, -one, two),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 2.0),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Cauchy": lambda: dist.Cauchy(0.0, 1.0),
    "Chi2": lambda: dist.Chi2(two),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(tensor(0.3)),
    "Dirichlet": lambda: dist.Dirichlet(ones(3)),
    "Exponential": lambda: dist.Exponential(1.0),
    "FisherSnedecor": lambda: dist.FisherSnedecor(two, two),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(0.0, 1.0)),
    "Gamma": lambda: dist.Gamma(2.0, 2.0),
    "GammaGaussianHMM": lambda: dist.GammaGaussianHMM(
        dist.Gamma(two, two), mvn(1), eye(1), mvn(1), eye(1), mvn(1), duration=3
    ),
    "GaussianHMM": hmm,
    "GaussianMRF": lambda: dist.GaussianMRF(mvn(1), mvn(2), mvn(2)),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(tensor(0.0), one, tensor(0.1)),
    "Gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "ImproperUniform": lambda: dist.ImproperUniform(constraints.unit_interval, (), ()),
    "Independent": lambda: dist.Independent(dist.Normal(zeros(2), 1.0), 1),
    "InverseGamma": lambda: dist.InverseGamma(two, two),
    "Kumaraswamy": lambda: dist.Kumaraswamy(two, two),
    "LKJ": lambda: dist.LKJ(3, one),
    "LKJCholesky": lambda: dist.LKJCholesky(3, one),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
    "Logistic": lambda: dist.Logistic(0.0, 1.0),
    "LogisticNormal": lambda: dist.LogisticNormal(zeros(2), ones(2)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        zeros(2), ones(2, 1), ones(2)
    ),
    "MaskedDistribution": lambda: dist.Normal(0.0, 1.0).mask(True),
    "MaskedMixture": lambda: dist.MaskedMixture(
        tensor([True, False]), dist.Normal(zeros(2), 1.0), dist.Normal(ones(2), 1.0)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(zeros(2, 2), ones(2, 2), zeros(2)),
    "MixtureOfDiagNormalsSharedCovariance": lambda: dist.MixtureOfDiagNormalsSharedCovariance(
        zeros(2, 2), ones(2), zeros(2)
    ),
    "MixtureSameFamily": lambda: mixed(dist.Normal(tensor([-1.0, 1.0]), 1.0)),
    "MultivariateNormal": lambda: mvn(2),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(two, zeros(2), eye(2)),
    "Normal": lambda: dist.Normal(0.0, 1.0),
    "OMTMultivariateNormal": lambda: dist.OMTMultivariateNormal(zeros(2), eye(2)),
    "Pareto": lambda: dist.Pareto(one, two),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(one, half),
    "RelaxedBernoulliStraightThrough": lambda: dist.RelaxedBernoulliStraightThrough(one, half),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(one, ones(3)),
    "RelaxedOneHotCategoricalStraightThrough": (
        lambda: dist.RelaxedOneHotCategoricalStraightThrough(one, ones(3))
    ),
    "SineBivariateVonMises": lambda: dist.SineBivariateVonMises(one, one, one, one, half),
    "SineSkewed": lambda: dist.SineSkewed(
        dist.VonMises(zeros(2), 1.0).to_event(1), tensor([0.2, 0.2])
    ),
    "SkewLogistic": lambda: dist.SkewLogistic(one, one),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(one, one),
    "SoftLaplace": lambda: dist.SoftLaplace(one, one),
    "StudentT": lambda: dist.StudentT(4.0),
    "TransformedDistribution": lambda: dist.TransformedDistribution(
        normal(3), [transforms.OrderedTransform()]
    ),
    "TruncatedPolyaGamma": lambda: dist.TruncatedPolyaGamma(one),
    "Uniform": lambda: dist.Uniform(-1.0, 3.0),
    "VonMises": lambda: dist.VonMises(0.0, 1.0),
    "Weibull": lambda: dist.Weibull(1.0, 2.0),
    "Wishart": lambda: dist.Wishart(tensor(5.0), eye(2)),
    # the same kinds of support, elsewhere
    "a mixture of half-lines": lambda: mixed(dist.Gamma(tensor([1.0, 5.0]), 1.0)),
    "a mixture of intervals": lambda: mixed(dist.Uniform(zeros(2), tensor([1.0, 3.0]))),
    "a mixture of vectors": lambda: mixed(dist.Normal(zeros(2, 3), 1.0).to_event(1)),
    "a batch of mixtures": lambda: mixed(dist.LogNormal(zeros(4, 2), 1.0), 4).to_event(1),
    "a simplex": lambda: dist.TransformedDistribution(
        normal(3), [transforms.StickBreakingTransform()]
    ),
    "improper vectors": lambda: dist.ImproperUniform(constraints.simplex, (2,), (3,)).to_event(1),
}

# Those that are written one after another, and those that are summed out, are slow: one chain.
ONE_CHAIN = {
    "Bernoulli": lambda: dist.Bernoulli(0.5),
    "BetaBinomial": lambda: dist.BetaBinomial(2.0, 3.0, 4),
    "Binomial": lambda: dist.Binomial(3, 0.5),
    "Categorical": lambda: dist.Categorical(ones(3)),
    "DiscreteHMM": lambda: dist.DiscreteHMM(
        ones(2).log(), ones(3, 2, 2).log(), dist.Normal(tensor([0.0, 1.0]), 1.0)
    ),
    "Empirical": lambda: dist.Empirical(tensor([0.0, 1.0]), zeros(2)),
    "ExtendedBetaBinomial": lambda: dist.ExtendedBetaBinomial(2.0, 3.0, 4),
    "ExtendedBinomial": lambda: dist.ExtendedBinomial(3, half),
    "NanMaskedMultivariateNormal": lambda: dist.NanMaskedMultivariateNormal(zeros(2), eye(2)),
    "NanMaskedNormal": lambda: dist.NanMaskedNormal(0.0, 1.0),
    "OneHotCategorical": lambda: dist.OneHotCategorical(ones(3)),
    "OneHotCategoricalStraightThrough": lambda: dist.OneHotCategoricalStraightThrough(ones(3)),
    "OneOneMatching": lambda: dist.OneOneMatching(zeros(3, 3)),
    "OneTwoMatching": lambda: dist.OneTwoMatching(zeros(4, 2)),
    "OrderedLogistic": lambda: dist.OrderedLogistic(one, tensor([-1.0, 1.0])),
    "SpanningTree": lambda: dist.SpanningTree(zeros(3)),
    "Stable": lambda: dist.Stable(tensor(1.5), tensor(0.0)),
    "StableWithLogProb": lambda: dist.StableWithLogProb(tensor(1.5), tensor(0.0)),
}

DISCRETE = "is discrete and cannot be summed out"
REFUSED = {
    "CoalescentTimes": (lambda: dist.CoalescentTimes(tensor([0.0, 0, 0, 1])), "transforms="),
    "CoalescentTimesWithRate": (
        lambda: dist.CoalescentTimesWithRate(zeros(3), ones(4)),
        "transforms=.*init_to_value",
    ),
    "Delta": (lambda: dist.Delta(one), r"pyro\.deterministic"),
    "a Delta of an event": (lambda: dist.Delta(ones(2)).to_event(1).mask(True), "deterministic"),
    "DirichletMultinomial": (lambda: dist.DirichletMultinomial(ones(3), 4), DISCRETE),
    "GammaPoisson": (lambda: dist.GammaPoisson(2.0, 2.0), DISCRETE),
    "GaussianScaleMixture": (
        lambda: dist.GaussianScaleMixture(ones(2), ones(2), ones(2)),
        "has no support",
    ),
    "Geometric": (lambda: dist.Geometric(0.5), DISCRETE),
    "LinearHMM": (
        lambda: dist.LinearHMM(normal(1), eye(1), normal(1), eye(1), normal(1), duration=3),
        "has no log density.*reparam",
    ),
    "LogNormalNegativeBinomial": (lambda: dist.LogNormalNegativeBinomial(two, one, one), DISCRETE),
    "Multinomial": (lambda: dist.Multinomial(3, ones(3)), DISCRETE),
    "NegativeBinomial": (lambda: dist.NegativeBinomial(3, 0.5), DISCRETE),
    "Poisson": (lambda: dist.Poisson(3.0), DISCRETE),
    "ProjectedNormal": (
        lambda: dist.ProjectedNormal(tensor([1.0, 0.0])),
        r"poutine\.reparam\(model, \{'site': ProjectedNormalReparam\(\)\}\)",
    ),
    "VonMises3D": (lambda: dist.VonMises3D(tensor([1.0, 0.0, 0.0])), "transforms="),
    "ZeroInflatedDistribution": (
        lambda: dist.ZeroInflatedDistribution(dist.Poisson(3.0), gate=half),
        DISCRETE,
    ),
    "ZeroInflatedNegativeBinomial": (
        lambda: dist.ZeroInflatedNegativeBinomial(two, probs=half, gate=half),
        DISCRETE,
    ),
    "ZeroInflatedPoisson": (lambda: dist.ZeroInflatedPoisson(3.0, gate=half), DISCRETE),
    "a transform without a density": (
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.AbsTransform()]),
        "has no log density",
    ),
}

# Parts of others, and those that take more than a line to make.
LEFT_OUT = {
    "ExpandedDistribution", "ExponentialFamily", "TorchDistribution", "Rejector", "IndependentHMM",
    "GroupedNormalNormal", "LKJCorrCholesky", "Unit",
}  # fmt: skip


def run(make, num_chains=2, **kwargs):
    def model():
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("site", make())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample detected")  # of Wishart's own draws
        mcmc = MCMC(LangevinKernel(model, **kwargs), 3, num_chains=num_chains, disable_progbar=True)
        mcmc.run()
    return mcmc.get_samples()


def test_all_are_here():
    classes = {
        name
        for name, value in vars(dist).items()
        if isinstance(value, type) and issubclass(value, torch.distributions.Distribution)
    }
    assert classes <= SAMPLED.keys() | ONE_CHAIN.keys() | REFUSED.keys() | LEFT_OUT


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled(name):
    make = SAMPLED[name]
    draws = run(make)["site"]
    assert draws.shape == (6, *make().shape())
    assert draws.isfinite().all()


@pytest.mark.parametrize("name", ONE_CHAIN)
def test_sampled_or_summed_out(name):
    make = ONE_CHAIN[name]
    draws = run(make, num_chains=1)
    assert make().has_enumerate_support == ("site" not in draws)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match="(?s)site 'site'.*" + message) as raised:
        run(make)
    assert str(raised.value).count("\n") < 10


# -- that what is sampled is right, and that the ways out work ------------------------------------


def moments(model):
    mcmc = MCMC(LangevinKernel(model), 80, 80, num_chains=400, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)


def test_a_mixture_prior():
    """Half N(-1, 1), half N(2, 1): E x = .5, E x^2 = (2 + 5) / 2."""

    def model():
        pyro.sample("x", mixed(dist.Normal(tensor([-1.0, 2.0]), 1.0)))

    x = moments(model)["x"]
    assert_mean(x, 0.5)
    assert_mean(x.square(), 3.5)


def test_a_mixture_of_different_intervals():
    """Half U(0, 1), half U(0, 3): E x = 1, E x^2 = (1/3 + 3) / 2."""

    def model():
        pyro.sample("x", mixed(dist.Uniform(zeros(2), tensor([1.0, 3.0]))))

    mcmc = MCMC(MHKernel(model), 80, 80, num_chains=400, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert_mean(x, 1.0)
    assert_mean(x.square(), (1 / 3 + 3) / 2)


@pytest.mark.filterwarnings("ignore:Singular sample")
def test_a_wishart_prior():
    """E P = 5 V."""

    def model():
        pyro.sample("P", dist.Wishart(tensor(5.0), tensor([[1.0, 0.5], [0.5, 1.0]])))

    P = moments(model)["P"]
    assert_mean(P[..., 0, 0], 5.0)
    assert_mean(P[..., 0, 1], 2.5)


def test_an_energy_on_positive_definite_matrices():
    p = UnnormalizedEnergy(
        lambda x: x.diagonal(dim1=-2, dim2=-1).sum(-1),
        event_shape=(2, 2),
        support=constraints.positive_definite,
    )
    assert torch.linalg.eigvalsh(p.sample((5,))).min() > 0


@pytest.mark.parametrize("start", [None, "value", "initial_params", "sample"])
def test_an_improper_prior(start):
    """p(s) = 1 on s > 0, y ~ N(0, s) ten times: 1/s^2 ~ Gamma((n - 1) / 2, |y|^2 / 2)."""
    y = torch.linspace(-2.0, 2.0, 10)

    def model():
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    strategies = {"value": init_to_value(values={"s": tensor(1.5)}), "sample": init_to_sample}
    kernel = LangevinKernel(model)
    if start in strategies:
        kernel = LangevinKernel(model, init_strategy=strategies[start])
    params = {"s": zeros(400)} if start == "initial_params" else None
    mcmc = MCMC(kernel, 50, 80, num_chains=400, initial_params=params, disable_progbar=True)
    mcmc.run()
    precision = mcmc.get_samples(group_by_chain=True)["s"] ** -2.0
    assert_mean(precision, 9 / y.square().sum())


class ToAngle(Transform):
    """The circle without a point, as the reals: a bijection that torch does not know."""

    domain, codomain, bijective = constraints.sphere, constraints.real_vector, True

    def _call(self, x):
        return torch.tan(torch.atan2(x[..., 1], x[..., 0]) / 2)[..., None]

    def _inverse(self, z):
        angle = 2 * torch.atan(z[..., 0])
        return torch.stack([angle.cos(), angle.sin()], -1)

    def log_abs_det_jacobian(self, x, z):
        return torch.log((1 + z[..., 0].square()) / 2)  # dz / d angle


@pytest.mark.filterwarnings("ignore:the model cannot be vectorized")
def test_directions():
    """By a reparametrisation, and by a transform: E cos(angle) is the same."""

    def model():
        return pyro.sample("v", dist.ProjectedNormal(tensor([1.0, 0.0])))

    rewritten = poutine.reparam(model, {"v": ProjectedNormalReparam()})
    mcmc = MCMC(LangevinKernel(rewritten), 300, num_chains=2, disable_progbar=True)
    mcmc.run()
    v = mcmc.get_samples(group_by_chain=True)["v_normal"] + tensor([1.0, 0.0])
    cosine = v[..., 0] / v.norm(dim=-1)
    #  E cos = sqrt(pi / 8) e^{-1/4} (I_0(1/4) + I_1(1/4))
    quarter = tensor(0.25)
    want = math.sqrt(math.pi / 8) * math.exp(-0.25)
    want = want * (torch.special.i0(quarter) + torch.special.i1(quarter)).item()
    assert_mean(cosine, want)
    kernel = LangevinKernel(model, transforms={"v": ToAngle()})
    MCMC(kernel, 2, disable_progbar=True).run()
    potential = kernel.make_potential()
    angle = torch.linspace(-3.1, 3.1, 200)[:, None]
    z = torch.tan(angle / 2)
    weight = (-potential(z)).exp() * (1 + z[:, 0].square())  # dz is (1 + z^2) / 2 d angle
    assert (weight * angle[:, 0].cos()).sum() / weight.sum() == pytest.approx(want, abs=0.01)


def test_a_mixture_beside_a_site_that_is_summed_out():
    def model():
        x = pyro.sample("x", mixed(dist.Normal(tensor([-1.0, 1.0]), 1.0)))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x + k, 1.0), obs=tensor(1.0))

    mcmc = MCMC(LangevinKernel(model, max_plate_nesting=0), 5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (5,)


def test_a_distribution_that_needs_no_other_words_starts_as_it_is():
    """``init_to_median`` looks at its type: vectors would start at 0."""
    seen = []

    def start(site):
        seen.append(type(site["fn"]).__name__)
        return init_to_sample(site)

    def model():
        pyro.sample("x", dist.Gamma(ones(2), 1.0).to_event(1))

    MCMC(LangevinKernel(model, init_strategy=start), 1, disable_progbar=True).run()
    assert set(seen) == {"Independent"}


def test_bounds_that_are_computed_from_latents_are_not_read():
    """A read is a suspicion: it costs sixty further runs, and names the wrong latents."""

    def model():
        b = pyro.sample("b", dist.HalfNormal(1.0))
        support = constraints.interval(torch.zeros(()), 1 + b)
        p = UnnormalizedEnergy(torch.square, support=support, constant_normalizer=True)
        with poutine.mask(mask=tensor(False)):
            pyro.sample("x", p, obs=tensor(math.nan))

    with HostReads() as reads:
        trace_latents(BoundModel(model, init_strategy=init_to_sample))
    assert not reads.latents
    value, grad = ModelPotential(model).value_and_grad(zeros(3, 1))
    assert value.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.VonMises(0.5, 1.0),
        lambda: dist.VonMises(zeros(2), 1.0).to_event(1),
        lambda: dist.SineBivariateVonMises(0.5, 0.2, 2.0, 2.0, tensor(0.5)),
        lambda: dist.SineSkewed(dist.VonMises(zeros(2), 2.0).to_event(1), tensor([0.1, 0.2])),
    ],
    ids=["VonMises", "independent", "bivariate", "skewed"],
)
def test_angles_stay_on_one_turn(make):
    mcmc = MCMC(LangevinKernel(lambda: pyro.sample("x", make())), 100, 50, num_chains=50)
    mcmc.disable_progbar = True
    mcmc.run()
    x = mcmc.get_samples()["x"]
    assert (x.abs() <= math.pi).all()
    assert x.amax() - x.amin() > 2
