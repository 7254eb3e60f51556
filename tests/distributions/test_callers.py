"""Pyro's own algorithms are refused over an energy whose log Z a latent moves, others are not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    EmpiricalMarginal,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    WeighedPredictive,
)
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.infer.mcmc import StreamingMCMC
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from pyro.infer.mcmc.util import initialize_model
from pyro.optim import Adam

import pyro_ebm
from pyro_ebm import ContrastiveDivergence, UnnormalizedEnergy, fit

DATA = torch.tensor([0.5, -1.0, 2.0])
QUIET = {"num_samples": 4, "warmup_steps": 4, "disable_progbar": True}


def precision(x=DATA):
    t = pyro.sample("t", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        energy = UnnormalizedEnergy(lambda x: t * x.square() / 2, batch_shape=t.shape)
        pyro.sample("x", energy, obs=x)


def mixed(x=DATA):
    """One part of a mixture is moved, the energy is inside."""
    t = pyro.sample("t", dist.Gamma(2.0, 1.0))
    scales = torch.stack([t, torch.ones_like(t)], -1)
    parts = UnnormalizedEnergy(lambda x: scales * x.square(), batch_shape=scales.shape)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), obs=x)


def location(x=DATA):
    t = pyro.sample("t", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        energy = UnnormalizedEnergy(
            lambda x: (x - t).square() / 2, batch_shape=t.shape, constant_normalizer=True
        )
        pyro.sample("x", energy, obs=x)


def known(x=DATA):
    t = pyro.sample("t", dist.Gamma(2.0, 1.0))
    log_z = (2 * math.pi / t).log() / 2
    with pyro.plate("data", len(x)):
        energy = UnnormalizedEnergy(
            lambda x: t * x.square() / 2, batch_shape=t.shape, log_normalizer=log_z
        )
        pyro.sample("x", energy, obs=x)


def fixed(x=DATA):
    t = pyro.sample("t", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(torch.square), obs=x - t)


def guide(x=DATA):
    pyro.sample("t", dist.Gamma(2.0, 1.0))


def run(kernel):
    return lambda model: MCMC(kernel(model), **QUIET).run(DATA)


SAMPLERS = {
    "Importance": lambda model: Importance(model, num_samples=3).run(DATA),
    "Importance with a guide": lambda model: Importance(model, guide, num_samples=3).run(DATA),
    "weights": lambda model: vectorized_importance_weights(
        model, guide, DATA, num_samples=5, max_plate_nesting=1
    ),
    "psis": lambda model: psis_diagnostic(
        model, guide, DATA, num_particles=50, max_plate_nesting=1
    ),
    "WeighedPredictive": lambda model: WeighedPredictive(model, guide=guide, num_samples=3)(DATA),
    "NUTS": run(NUTS),
    "HMC": run(HMC),
    "random walk": run(RandomWalkKernel),
    "streaming": lambda model: StreamingMCMC(NUTS(model), **QUIET).run(DATA),
    "from given starts": lambda model: MCMC(
        NUTS(model), **QUIET, initial_params={"t": torch.zeros(())}
    ).run(DATA),
    "initialize_model": lambda model: initialize_model(model, (DATA,)),
    "ours": lambda model: pyro_ebm.MCMC(NUTS(model), **QUIET).run(DATA),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [precision, mixed])
@pytest.mark.parametrize("name", SAMPLERS)
def test_refused(name, model):
    with pytest.raises(ValueError, match="site 'x': its energy depends on 't', and its log Z is"):
        SAMPLERS[name](model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [location, known, fixed])
@pytest.mark.parametrize("name", SAMPLERS)
def test_accepted(name, model):
    SAMPLERS[name](model)


def test_arguments_reach_the_check_and_are_looked_at_anew():
    def model(x, normalized):
        (known if normalized else precision)(x)

    importance = Importance(model, num_samples=3)
    importance.run(DATA, normalized=True)
    for _ in range(2):  # a check that refused does not count as one that passed
        with pytest.raises(ValueError, match="depends on 't'"):
            importance.run(DATA, normalized=False)


def test_a_run_is_checked_once_and_draws_what_it_drew():
    calls = []

    def model():
        calls.append(0)
        fixed()

    pyro.set_rng_seed(0)
    posterior = Importance(model, num_samples=100).run()
    mean = EmpiricalMarginal(posterior, sites="t").mean
    assert len(calls) < 2 * 100 + 10
    pyro.set_rng_seed(0)
    first = Importance(model, num_samples=100).run()
    assert torch.equal(EmpiricalMarginal(first, sites="t").mean, mean)


def test_importance_with_the_known_constant_is_right():
    pyro.set_rng_seed(0)
    posterior = Importance(known, num_samples=500).run()
    weights = posterior.get_normalized_weights()
    t = torch.stack([trace.nodes["t"]["value"] for trace in posterior.exec_traces])
    mean = float((weights * t).sum())
    error = float((weights * (t - mean)).square().sum().sqrt())
    # Gamma(2, 1) times the likelihood of three normal data: Gamma(3.5, 1 + sum x^2 / 2)
    truth = 3.5 / (1 + float(DATA.square().sum()) / 2)
    assert abs(mean - truth) < 5 * error


ELBOS = [Trace_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, RenyiELBO]
HOW = ["loss", "loss_and_grads", "differentiable_loss", "particles", "module", "evaluate_loss"]


def by_hand(elbo, how, model):
    auto = AutoNormal(model)
    auto(DATA)
    loss = elbo(num_particles=2, vectorize_particles=how == "particles", max_plate_nesting=1)
    if how == "module":
        loss(model, auto)(DATA)
    elif how == "evaluate_loss":
        SVI(model, auto, Adam({"lr": 0.01}), loss).evaluate_loss(DATA)
    else:
        getattr(loss, "loss" if how == "particles" else how)(model, auto, DATA)


@pytest.mark.filterwarnings("ignore:.*ound no sample sites")
@pytest.mark.parametrize(
    ("elbo", "how"),
    [
        (elbo, how)
        for elbo in ELBOS
        for how in HOW
        if how not in ("differentiable_loss", "module") or hasattr(elbo, "differentiable_loss")
    ],
)
def test_elbos_by_hand(elbo, how):
    with pytest.raises(ValueError, match="site 'x': its energy depends on 't'"):
        by_hand(elbo, how, precision)
    for model in (location, known, fixed):
        by_hand(elbo, how, model)


def test_elbos_under_svi_are_refused_by_their_gradients():
    with pytest.raises(ValueError, match="SVI trains something that moves Unnormalized"):
        SVI(precision, AutoNormal(precision), Adam({"lr": 0.01}), Trace_ELBO()).step(DATA)


def learned(x=DATA, kind="bare"):
    """A parameter moves the energy."""
    t = pyro.param("t", torch.tensor(1.0), constraint=dist.constraints.positive)
    log_z = {
        "learned": lambda: pyro.param("log_z", torch.tensor(0.0)),
        "number": lambda: 0.9,
        "exact": lambda: (2 * math.pi / t).log() / 2,
    }.get(kind, lambda: None)()
    base = dist.Normal(0.0, 1.0) if kind == "base" else None
    p = UnnormalizedEnergy(lambda x: t * x.square() / 2, base=base, log_normalizer=log_z)
    with pyro.plate("data", len(x)):
        pyro.sample("x", p, obs=x)


def no_latents(x=DATA):
    pass


def by_module(model, elbo):
    return elbo(model, no_latents)(DATA)


def by_fit(model, elbo):
    return fit(model, no_latents, elbo, DATA, num_steps=2, disable_progbar=True)


@pytest.mark.parametrize("train", [by_module, by_fit])
@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO(), TraceEnum_ELBO()])
def test_elbos_that_train_an_energy_without_log_z(elbo, train):
    for kind in ("bare", "base", "learned", "number"):
        with pytest.raises(ValueError, match="the ELBO trains something that moves Unnormalized"):
            train(lambda x, kind=kind: learned(x, kind), elbo)


def test_elbos_that_train_an_energy_with_log_z():
    elbo = Trace_ELBO()
    by_module(lambda x: learned(x, "exact"), elbo).backward()
    # d/dt of t sum x^2 / 2 + n log(2 pi / t) / 2 at 1, and t = exp(u)
    slope = (DATA.square().sum() - len(DATA)) / 2
    torch.testing.assert_close(pyro.param("t").unconstrained().grad, slope)
    by_fit(lambda x: learned(x, "exact"), elbo)
    with torch.no_grad():  # a number trains nothing
        by_module(learned, elbo)
    pyro.param("t").unconstrained().requires_grad_(False)
    by_module(learned, elbo)


def bits(x=DATA):
    t = 1 + pyro.sample("t", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", UnnormalizedEnergy(lambda x: t * x.square() / 2), obs=x)


def guide_of_bits(x=DATA):
    probs = pyro.param("probs", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
    pyro.sample("t", dist.Bernoulli(probs))


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(), TraceGraph_ELBO(), RenyiELBO(), ReweightedWakeSleep(vectorize_particles=False)],
    ids=lambda loss: type(loss).__name__,
)
def test_svi_with_draws_that_have_no_gradient(loss):
    with pytest.raises(ValueError, match=r"site 'x': its energy depends on 't'"):
        SVI(bits, guide_of_bits, Adam({"lr": 0.01}), loss).step(DATA)


def test_an_elbo_is_checked_once():
    calls = []

    def model(x):
        calls.append(0)
        fixed(x)

    auto = AutoNormal(model)
    module = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)(model, auto)
    for i in range(20):
        module(DATA + i)
    assert len(calls) < 20 + 15


def test_a_method_is_the_same_model_whenever_it_is_looked_up():
    class Network:
        calls = 0

        def model(self, x):
            self.calls += 1
            fixed(x)

    network, elbo = Network(), Trace_ELBO()
    auto = AutoNormal(network.model)
    for i in range(20):
        elbo.loss(network.model, auto, DATA + i)
    assert network.calls < 20 + 15


def test_our_losses_are_not():
    net = torch.nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", UnnormalizedEnergy(lambda x: net(x[..., None])[..., 0].square()), obs=x
            )

    loss = ContrastiveDivergence()
    loss(model, lambda x: None)(DATA).backward()
    SVI(model, lambda x: None, Adam({"lr": 0.01}), loss).step(DATA)


def test_laplace_after_training_elsewhere():
    auto = AutoLaplaceApproximation(precision)
    auto(DATA)
    with pytest.raises(ValueError, match="depends on 't'"):
        auto.laplace_approximation(DATA)


def test_no_posterior_no_check():
    Predictive(precision, num_samples=3)(DATA)
    assert UnnormalizedEnergy(torch.square).log_prob(torch.ones(())) == -1


@pytest.mark.parametrize("constant", [False, True])
def test_log_densities_compile_whole(constant):
    p = UnnormalizedEnergy(lambda x: x**2 / 2, constant_normalizer=constant, validate_args=False)
    x = torch.randn(3)
    want = p.log_prob(x)  # looks for the modules of the energy, once
    compiled = torch.compile(p.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), want)
