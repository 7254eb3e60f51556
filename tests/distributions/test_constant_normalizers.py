"""A log Z that stays where a latent or a parameter moves the energy is refused, however wrapped."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch.distributions import AffineTransform, constraints

from pyro_ebm import (
    MCMC,
    ExchangeKernel,
    LangevinKernel,
    NormalizerError,
    UnnormalizedEnergy,
    estimate_log_normalizer,
    to_arviz,
)
from pyro_ebm.distributions import (
    RBM,
    BoltzmannMachine,
    DeepBeliefNetwork,
    ExponentialFamily,
    RBMModule,
    mixture,
    product,
)
from pyro_ebm.distributions.core.supports import is_finite
from pyro_ebm.losses import ContrastiveDivergence
from pyro_ebm.models.checks.intractability import check_normalizers

LOG_Z = math.log(2 * math.pi) / 2
ONCE = estimate_log_normalizer(UnnormalizedEnergy(lambda x: x**2 / 2), "quadrature")
HALF = torch.tensor([0.5, 0.5])
BITS = torch.tensor([1.0, 0.0, 1.0])


def bell(t, **settings):
    return UnnormalizedEnergy(lambda x: t * x**2 / 2, **settings)


def tilted(base):
    return UnnormalizedEnergy(lambda x: x.cos(), base=base)


FIXED = bell(1.0, log_normalizer=LOG_Z)
ONE, THREE = torch.tensor(0.7), torch.tensor([0.7, -0.2, 1.1])

# what is made of a density whose log Z is given, and a value of it
OPERATIONS = {
    "itself": (lambda p: p, ONE),
    "expand": (lambda p: p.expand([3]), THREE),
    "expand twice": (lambda p: p.expand([1]).expand([3]), THREE),
    "to_event": (lambda p: p.expand([3]).to_event(1), THREE),
    "mask": (lambda p: p.expand([3]).mask(torch.tensor([True, False, True])), THREE),
    "the constructor": (
        lambda p: UnnormalizedEnergy(p.energy, log_normalizer=p.log_normalizer),
        ONE,
    ),
    "normalized again": (lambda p: p.normalized(p.log_normalizer), ONE),
    "a copy": (copy.copy, ONE),
    "the power 1": (lambda p: p.tempered(1), ONE),
    "a product of one": (lambda p: product(p.expand([3]).to_event(1)), THREE),
    "a mixture": (lambda p: mixture(HALF, [p, dist.Normal(1.0, 2.0)]), ONE),
    "a component among fixed ones": (lambda p: mixture(HALF, [FIXED, p]), ONE),
    "weights of factors": (lambda p: mixture(HALF, [p, FIXED], unnormalized_weights=True), ONE),
    "a mixture in a mixture": (
        lambda p: mixture(HALF, [mixture(HALF, [FIXED, p]), dist.Normal(0.0, 1.0)]),
        ONE,
    ),
    "a mixture of events": (
        lambda p: mixture(
            HALF, [p.expand([3]).to_event(1), dist.Normal(0.0, 1.0).expand([3]).to_event(1)]
        ),
        THREE,
    ),
    "a mixture as an event": (
        lambda p: product(mixture(HALF, [p, FIXED]).expand([3]).to_event(1)),
        THREE,
    ),
    "an expanded mixture": (lambda p: mixture(HALF, [p, FIXED]).expand([3]).mask(True), THREE),
    "a base alone": (lambda p: tilted(p).tempered(0), ONE),
    "a base as an event": (
        lambda p: product(tilted(p).tempered(0).expand([3]).to_event(1)),
        THREE,
    ),
    "a bijection": (lambda p: dist.TransformedDistribution(p, [AffineTransform(1.0, 2.0)]), ONE),
    "a bijection in a mixture": (
        lambda p: mixture(
            HALF,
            [
                dist.TransformedDistribution(p, [AffineTransform(1.0, 2.0)]),
                dist.Normal(0.0, 1.0),
            ],
        ),
        ONE,
    ),
    "torch's mixture": (
        lambda p: dist.MixtureSameFamily(dist.Categorical(HALF), p.expand([2])),
        ONE,
    ),
    "Pyro's mixture": (
        lambda p: dist.MaskedMixture(
            torch.tensor([True, False, True]), p.expand([3]), dist.Normal(0.0, 1.0).expand([3])
        ),
        THREE,
    ),
}


def rbm(t):
    w = torch.tensor([[0.5, -0.3], [0.2, 0.4], [-0.1, 0.6]])
    return RBM(t * w, torch.zeros(3), torch.zeros(2))


def boltzmann(t):
    return BoltzmannMachine(t, edges=torch.tensor([[0, 1], [1, 2]]))


SPINS = torch.tensor([1.0, -1.0, 1.0])
OTHERS = {
    "a machine": (rbm, lambda p: p, BITS),
    "a batch of machines": (rbm, lambda p: p.expand([2]), BITS.expand(2, 3)),
    "a joint machine": (rbm, lambda p: p.joint(), torch.cat([BITS, BITS[:2]])),
    "a marginal": (rbm, lambda p: p.joint().marginal(), BITS),
    "spins": (boltzmann, lambda p: p, SPINS),
    "cold spins": (boltzmann, lambda p: p.tempered(1), SPINS),
    "machines mixed": (rbm, lambda p: mixture(HALF, [p, p.joint().marginal()]), BITS),
}
CASES = {name: (bell, *case) for name, case in OPERATIONS.items()} | OTHERS
CASES["a family"] = (lambda t: ExponentialFamily.gaussian(0.0, t), lambda p: p, ONE)


def number(p, t):
    return p.normalized(LOG_Z)


def estimate(p, t):
    return p.normalized(ONCE)


def follows(p, t):
    if is_finite(p.support, p.event_shape):
        return p.normalized(p.exact_log_normalizer())
    if isinstance(p, ExponentialFamily):
        return p
    return p.normalized(LOG_Z - t.log() / 2)


def model_of(case, normalize, latent):
    make, operation, x = CASES[case]

    def model():
        if latent:
            t = pyro.sample("t", dist.Gamma(3.0, 3.0))
        else:
            t = pyro.param("t", torch.tensor(1.2), constraint=constraints.positive)
        pyro.sample("x", operation(normalize(make(t), t)), obs=x)

    return model


def plain_elbo(model):
    with pyro.validation_enabled(False):
        SVI(model, lambda: None, Adam({"lr": 0.01}), Trace_ELBO()).step()


@pytest.mark.parametrize("normalize", [number, estimate])
@pytest.mark.parametrize("case", CASES)
def test_a_constant_is_refused(case, normalize):
    state = "an estimate, made once" if normalize is estimate else "a constant"
    with pytest.raises(NormalizerError, match=f"'x': its energy depends on 't', .* is {state}"):
        check_normalizers(model_of(case, normalize, latent=True))
    with pytest.raises(ValueError, match=r"(?s)lacks the gradient of its log Z"):
        plain_elbo(model_of(case, normalize, latent=False))


@pytest.mark.parametrize("case", CASES)
def test_a_log_z_that_follows_is_not(case):
    check_normalizers(model_of(case, follows, latent=True))
    plain_elbo(model_of(case, follows, latent=False))


@pytest.mark.parametrize("case", OPERATIONS)
def test_what_nothing_moves_may_have_a_constant(case):
    operation, x = OPERATIONS[case]

    def model(normalize):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", operation(normalize(bell(1.0), 1.0)), obs=x - m)

    check_normalizers(model, (estimate,))
    check_normalizers(model, (number,))


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: mixture(HALF, [p, FIXED])])
def test_the_users_word(wrap):
    """Z of a location family is constant, and so is that of minus the log of a density."""

    def model(latent):
        start = torch.tensor(1.2)
        m = pyro.sample("m", dist.Normal(start, 1.0)) if latent else pyro.param("m", start)
        word = {"log_normalizer": LOG_Z, "constant_normalizer": True}
        pyro.sample("x", wrap(UnnormalizedEnergy(lambda x: (x - m) ** 2 / 2, **word)), obs=ONE)

    check_normalizers(model, (True,))
    SVI(model, lambda latent: None, Adam({"lr": 0.01}), Trace_ELBO()).step(False)


def test_the_word_for_the_whole_holds_for_its_parts():
    def model(latent):
        start = torch.tensor(1.2)
        m = pyro.sample("m", dist.Normal(start, 1.0)) if latent else pyro.param("m", start)
        part = UnnormalizedEnergy(lambda x: (x - m) ** 2 / 2, log_normalizer=LOG_Z)
        pyro.sample("x", mixture(HALF, [part, FIXED], constant_normalizer=True), obs=ONE)

    check_normalizers(model, (True,))
    SVI(model, lambda latent: None, Adam({"lr": 0.01}), Trace_ELBO()).step(False)


def test_a_log_z_that_follows_another_latent():
    def model():
        s, t = (pyro.sample(name, dist.Gamma(2.0, 2.0)) for name in "st")
        pyro.sample("x", bell(t, log_normalizer=LOG_Z - s.log() / 2), obs=ONE)

    with pytest.raises(NormalizerError, match="depends on 't', and its log Z is a constant"):
        check_normalizers(model)


def test_a_log_z_that_follows_the_scale_alone():
    """Of a location-scale family that is all there is."""

    def model():
        m, s = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.Gamma(2.0, 2.0))
        p = UnnormalizedEnergy(lambda x: ((x - m) / s) ** 2 / 2, log_normalizer=LOG_Z + s.log())
        pyro.sample("x", p, obs=ONE)

    check_normalizers(model)


@pytest.mark.parametrize("normalize", [number, estimate, follows])
def test_a_base_of_a_density_whose_own_log_z_follows(normalize):
    def model(latent):
        t = torch.tensor(1.2)
        t = pyro.sample("t", dist.Gamma(3.0, 3.0)) if latent else pyro.param("t", t)
        base = normalize(bell(t), t)
        pyro.sample(
            "x", UnnormalizedEnergy(lambda x: t + 0 * x, base=base, log_normalizer=-t), obs=ONE
        )

    svi = SVI(model, lambda latent: None, Adam({"lr": 0.01}), Trace_ELBO())
    if normalize is follows:
        check_normalizers(model, (True,))
        svi.step(False)
        return
    with pytest.raises(NormalizerError, match="'x': its energy depends on 't'"):
        check_normalizers(model, (True,))
    with pytest.raises(ValueError, match="lacks the gradient"):
        svi.step(False)


def test_bounds_that_move():
    def model():
        t = pyro.sample("t", dist.Uniform(0.1, 0.5))
        p = UnnormalizedEnergy(
            lambda x: 0 * x, support=constraints.interval(t, 1.0), log_normalizer=0.0
        )
        pyro.sample("x", p, obs=ONE)

    with pytest.raises(NormalizerError, match=r"its support depends on 't'.* is a constant"):
        check_normalizers(model)


def test_a_known_site_may_come_and_go_and_be_counted():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        scale = pyro.sample("scale", dist.Uniform(0.5, 1.5))
        with pyro.poutine.scale(scale=scale):
            pyro.sample("x", FIXED, obs=ONE)
        if k:
            pyro.sample("y", FIXED, obs=ONE)

    check_normalizers(model)


def test_weights_of_fixed_components_are_shares():
    def model():
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        pyro.sample("x", mixture(w, [FIXED, tilted(FIXED).tempered(0)]), obs=ONE)
        pair = UnnormalizedEnergy(lambda x: x**2 / 2, log_normalizer=LOG_Z).expand([2])
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), pair), obs=ONE)

    check_normalizers(model)


def test_modules():
    machine = RBMModule(3, 2)
    network = DeepBeliefNetwork([RBMModule(4, 3), machine])

    def model():
        pyro.module("machine", machine)
        pyro.sample("x", machine().normalized(ONCE), obs=BITS)

    with pytest.raises(ValueError, match="lacks the gradient"):
        plain_elbo(model)

    def deep(x, log_z):
        pyro.module("network", network)
        network.model(x, log_normalizer=log_z)

    x = torch.ones(5, 4)
    svi = SVI(
        deep,
        lambda x, log_z: network.guide(x),
        Adam({"lr": 0.01}),
        Trace_ELBO(),
    )
    for log_z in (ONCE, 3.0):
        with pytest.raises(ValueError, match="lacks the gradient"):
            svi.step(x, log_z)
    svi.step(x, machine().exact_log_normalizer())


def half_square(x):
    return x**2 / 2


def test_the_mark_is_saved_with_the_density():
    p = UnnormalizedEnergy(half_square).normalized(ONCE)
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for q in (p, pickle.loads(pickle.dumps(p)), copy.deepcopy(p), saved, p.expand([3]).unexpanded):
        assert q.is_estimated
        assert q.is_normalized
    assert not p.normalized(LOG_Z).is_estimated
    assert not p.normalized(torch.tensor(LOG_Z)).is_estimated
    assert not hasattr(ONCE.value, "is_estimate")  # the estimate is left as it was


def test_a_latent_prior_with_a_constant_is_contrasted():
    """Under our losses its log Z counts as unknown where a parameter moves it, and only there."""

    def model(moved):
        t = pyro.param("t", torch.tensor(1.2)) if moved else 1.0
        z = pyro.sample("z", bell(t, log_normalizer=LOG_Z))
        pyro.sample("y", dist.Normal(z, 1.0), obs=ONE)

    def guide(moved):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.5))

    for moved in (True, False):
        loss = ContrastiveDivergence(num_steps=1)
        SVI(model, guide, Adam({"lr": 0.01}), loss).step(moved)
        assert ("energy_negatives" in loss.diagnostics) == moved


def observed_with(log_z):
    def model(x):
        t = pyro.sample("t", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", bell(t, log_normalizer=log_z), obs=x)

    return model


def test_exchange_samples_what_is_refused_elsewhere_and_tells_no_likelihood():
    x = torch.tensor([0.5, -0.3, 0.8])
    with pytest.raises(NormalizerError, match="a constant"):
        MCMC(LangevinKernel(observed_with(LOG_Z)), 10, disable_progbar=True).run(x)
    kernel = ExchangeKernel(observed_with(LOG_Z), num_inner_steps=20)
    mcmc = MCMC(kernel, 5, 5, num_chains=4, disable_progbar=True)
    mcmc.run(x)
    with pytest.raises(ValueError, match="the log Z of site 'x' is not known"):
        to_arviz(mcmc, log_likelihood=True)


def test_exchange_does_not_take_weights_for_shares():
    def model():
        t = pyro.sample("t", dist.Gamma(2.0, 1.0))
        pyro.sample("x", mixture(HALF, [bell(t, log_normalizer=LOG_Z), FIXED]), obs=ONE)

    with pytest.raises(NormalizerError, match="a weight of a Mixture is the share"):
        MCMC(ExchangeKernel(model), 5, disable_progbar=True).run()
