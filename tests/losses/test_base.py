"""What a loss makes of a model: latents, factors, guides, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import SGD, Adam
from torch import nn

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    FlowNCE,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_ebm.mcmc import LangevinKernel

SIGMAS = 4.5
MALA = LangevinKernel(step_size=0.3, adapt_step_size=False)
OTHERS = [ScoreMatching, SlicedScoreMatching, DenoisingScoreMatching, EnergyDiscrepancy]
OTHERS += [NCE, RankingNCE, FlowNCE]


def no_guide(*args):
    pass


def gradients(loss, model, guide, *args):
    """Gradients by parameter after one step, added to nothing."""
    store = pyro.get_param_store()
    for value in store.values():
        value.unconstrained().grad = None
    loss.loss_and_grads(model, guide, *args)
    return {name: p.unconstrained().grad for name, p in store.items()}


# -- latents -------------------------------------------------------------------------------------


def test_the_gradient_reaches_a_latent_in_front_of_an_energy():
    # z ~ N(0, 1), x_i | z has the energy e^z x^2 / 2, so that log Z(z) = -z / 2 + const, and with
    # q(z) = N(m, s^2):   dELBO / dm = -m + n / 2 - e^(m + s^2 / 2) sum x^2 / 2
    n, m, s = 200, 0.3, 0.2
    x = 1.3 * torch.randn(n)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", UnnormalizedEnergy(lambda x: z.exp() * x**2 / 2), obs=x)

    def guide(x):
        m_ = pyro.param("m", torch.tensor(m))
        pyro.sample("z", dist.Normal(m_, s))

    loss = ContrastiveDivergence(kernel=MALA, num_steps=12)
    draws = torch.stack([gradients(loss, model, guide, x)["m"] for _ in range(100)])
    exact = -(-m + n / 2 - math.exp(m + s**2 / 2) * float(x.square().sum()) / 2)
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - exact).abs() < SIGMAS * error
    # without the negatives' share it would be m + e^(...) sum x^2 / 2, n / 2 away
    assert error < n / 2 / 10


def test_a_latent_of_each_row_in_front_of_an_energy():
    # the same with a latent for each row:
    #   dELBO / dm = sum_i (-m + 1 / 2 - e^(m + s^2 / 2) x_i^2 / 2)
    n, m, s = 4000, -0.2, 0.3
    x = 1.2 * torch.randn(n)

    def model(x):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", UnnormalizedEnergy(lambda x: z.exp() * x**2 / 2), obs=x)

    def guide(x):
        m_ = pyro.param("m", torch.tensor(m))
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(m_, s))

    loss = ContrastiveDivergence(kernel=MALA, num_steps=20)
    draws = torch.stack([gradients(loss, model, guide, x)["m"] for _ in range(30)]) / n
    exact = m - 0.5 + math.exp(m + s**2 / 2) * float(x.square().mean()) / 2
    assert (draws.mean() - exact).abs() < SIGMAS * draws.std() / len(draws) ** 0.5


@pytest.mark.parametrize("persistent", [False, True])
def test_an_energy_as_the_prior_of_a_latent(persistent):
    # p(z) has the energy t z^2 / 2, log Z = -log(t) / 2 + const; x | z ~ N(z, 1); q(z) = N(m, s^2):
    #   dELBO / dm = -t m + (x - m),   dELBO / dt = -(m^2 + s^2) / 2 + 1 / (2 t)
    n, m, s, t, x = 3000, 0.5, 0.7, 1.6, 1.4

    def model():
        t_ = pyro.param("t", torch.tensor(t))
        p = UnnormalizedEnergy(lambda z: t_ * z**2 / 2)
        with pyro.plate("data", n):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(x).expand(n))

    def guide():
        m_ = pyro.param("m", torch.tensor(m))
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(m_, s))

    loss = ContrastiveDivergence(kernel=MALA, num_steps=25, persistent=persistent)
    grads = [gradients(loss, model, guide) for _ in range(30)][2:]  # persistent chains warm up
    for name, exact in (("m", t * m - (x - m)), ("t", (m**2 + s**2) / 2 - 1 / (2 * t))):
        draws = torch.stack([g[name] for g in grads]) / n
        error = draws.std() / len(draws) ** 0.5
        assert (draws.mean() - exact).abs() < SIGMAS * error, name
        assert error < 0.01


@pytest.mark.parametrize("make", OTHERS)
def test_a_learned_latent_energy_is_refused_by_the_others(make):
    def model():
        t = pyro.param("t", torch.tensor(1.0))
        pyro.sample("z", UnnormalizedEnergy(lambda z: t * z**2 / 2))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match=r"'z'.*unknown.*ContrastiveDivergence"):
        make().loss_and_grads(model, guide)


@pytest.mark.parametrize("make", [ContrastiveDivergence, *OTHERS])
def test_a_fixed_latent_energy_is_a_prior_like_another(make):
    # E = z^2 / 2 is N(0, 1): with x | z ~ N(z, 1) the posterior is N(x / 2, 1 / 2)
    def model():
        z = pyro.sample("z", UnnormalizedEnergy(lambda z: z**2 / 2))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    def guide():
        m = pyro.param("m", torch.tensor(0.2))
        pyro.sample("z", dist.Normal(m, 0.5))

    draws = torch.stack([gradients(make(), model, guide)["m"] for _ in range(200)])
    # dELBO / dm = -m + (x - m), its estimate -z + (x - z) has sd 2 * .5
    assert (draws.mean() + 3.0 - 0.4).abs() < SIGMAS * 1.0 / 200**0.5


@pytest.mark.parametrize("make", [ContrastiveDivergence, *OTHERS])
def test_a_fixed_energy_is_a_factor_on_latents(make):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("tie", UnnormalizedEnergy(lambda d: 5 * d**2), obs=z - 2.0)

    def guide():
        m = pyro.param("m", torch.tensor(0.2))
        pyro.sample("z", dist.Normal(m, 0.1))

    loss = make()
    draws = torch.stack([gradients(loss, model, guide)["m"] for _ in range(100)])
    # dELBO / dm = -m - 10 (m - 2)
    assert (draws.mean() - (0.2 - 18.0)).abs() < SIGMAS * 1.1 / 100**0.5
    assert math.isfinite(loss.loss(model, guide))


def test_data_computed_from_a_parameter_move_it():
    # the residuals of a location have a learned energy: E(x - m), whose Z does not depend on m
    x = torch.randn(500) + 1.0

    def model(x):
        m = pyro.param("m", torch.tensor(0.0))
        lam = pyro.param("lam", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2), obs=x - m)

    grad = gradients(ContrastiveDivergence(), model, no_guide, x)["m"]
    torch.testing.assert_close(grad, -2 * x.sum())  # of sum lam (x - m)^2 / 2 at m = 0
    # score matching: J = sum -lam + lam^2 (x - m)^2 / 2
    for loss in (ScoreMatching(), SlicedScoreMatching()):
        torch.testing.assert_close(gradients(loss, model, no_guide, x)["m"], -4 * x.sum())
    assert gradients(DenoisingScoreMatching(), model, no_guide, x)["m"] < 0


@pytest.mark.parametrize("make", [NCE, RankingNCE, FlowNCE])
def test_noise_needs_fixed_data(make):
    def model():
        m = pyro.param("m", torch.tensor(0.0))
        lam = pyro.param("lam", torch.tensor(2.0))
        p = UnnormalizedEnergy(lambda x: lam * x**2 / 2, log_normalizer=pyro.param("c", m * 0))
        pyro.sample("x", p, obs=1.0 - m)

    with pytest.raises(ValueError, match=r"'x' are computed from a latent or a parameter"):
        make().loss_and_grads(model, lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))


def latent_in_front(log_normalizer=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    lam = pyro.param("lam", torch.tensor(1.0))
    p = UnnormalizedEnergy(lambda x: lam * z.exp() * x**2 / 2, log_normalizer=log_normalizer)
    with pyro.plate("data", 3):
        pyro.sample("x", p, obs=torch.ones(3))


def guide_in_front(noise=False):
    m = pyro.param("m", torch.tensor(0.0))
    pyro.sample("z", dist.Normal(m, 1.0))
    if noise:
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(0.0, 2.0))


def test_one_log_normalizer_will_not_do_with_a_latent_in_front():
    def model():
        latent_in_front(pyro.param("c", torch.tensor(0.0)))

    with pytest.raises(ValueError, match="log_normalizer does not depend on it"):
        NCE().loss_and_grads(model, lambda: guide_in_front(noise=True))
    loss = RankingNCE()  # needs none
    assert gradients(loss, model, lambda: guide_in_front(noise=True))["m"].isfinite()


def test_persistent_chains_will_not_do_with_a_latent_in_front():
    loss = ContrastiveDivergence(persistent=True)
    with pytest.raises(ValueError, match=r"latent stands in front.*'x'"):
        loss.loss_and_grads(latent_in_front, guide_in_front)


def test_a_guide_without_reparametrized_draws_is_refused():
    def model():
        z = pyro.sample("z", dist.Poisson(3.0))
        with pyro.plate("data", 3):
            pyro.sample("x", UnnormalizedEnergy(lambda x: (1 + z) * x**2), obs=torch.ones(3))

    def guide():
        pyro.sample("z", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    with pytest.raises(ValueError, match=r"'z' has no reparametrized draws.*\['x'\]"):
        ContrastiveDivergence().loss_and_grads(model, guide)


def test_sites_that_are_no_energies_keep_their_elbo():
    x = torch.tensor([1.0, 2.0])

    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(w * z, 1.0), obs=x)
        pyro.factor("f", -(z**2))

    def guide():
        a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("z", dist.Gamma(a, 2.0))

    results = []
    for loss in (Trace_ELBO(num_particles=5), ContrastiveDivergence(num_particles=5)):
        torch.manual_seed(0)
        value = loss.loss_and_grads(model, guide)
        grads = [p.unconstrained().grad.clone() for p in pyro.get_param_store().values()]
        results.append((value, *grads))
        for p in pyro.get_param_store().values():
            p.unconstrained().grad = None
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]))


# -- what is registered --------------------------------------------------------------------------


class PyroEnergy(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 4)
        self.plain = nn.Linear(4, 1)
        self.curvature = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        hidden = self.layer(x[..., None]).tanh()
        return self.curvature * x**2 + self.plain(hidden).squeeze(-1)


def test_an_energy_that_is_a_pyro_module_trains():
    net = PyroEnergy()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net), obs=x)

    SVI(model, no_guide, SGD({"lr": 0.1}), ContrastiveDivergence()).step(torch.randn(20))
    after = dict(net.named_parameters())
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["plain.bias"]  # a constant in the energy


def test_a_pyro_module_as_the_model_trains():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroEnergy()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", UnnormalizedEnergy(self.net), obs=x)

    model = Model()
    before = model.net.layer.weight.detach().clone()
    SVI(model, no_guide, SGD({"lr": 0.1}), ScoreMatching()).step(torch.randn(20))
    assert not torch.equal(before, model.net.layer.weight)


def test_the_parameter_that_would_not_train_is_named():
    net = nn.Linear(1, 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def __call__(self, x):
            with pyro.plate("data", len(x)):
                p = UnnormalizedEnergy(lambda x: x**2 + self.net(x[..., None]).squeeze(-1))
                pyro.sample("x", p, obs=x)

    with pytest.raises(ValueError, match=r"shape \(1, 1\) \('net.weight' of Model\)"):
        ContrastiveDivergence().loss_and_grads(Model(), no_guide, torch.randn(5))
    net.requires_grad_(False)  # frozen on purpose
    ContrastiveDivergence().loss_and_grads(Model(), no_guide, torch.randn(5))


# -- bad input -----------------------------------------------------------------------------------


def test_a_guide_that_samples_data_must_be_asked_for():
    def model():
        with pyro.plate("data", 3):
            pyro.sample("x", UnnormalizedEnergy(torch.square), obs=torch.ones(3))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(3))

    def guide_of(name):
        def guide():
            with pyro.plate("data", 3):
                pyro.sample(name, dist.Normal(0.0, 1.0))

        return guide

    with pytest.raises(ValueError, match=r"'x'.*needs no noise"):
        ContrastiveDivergence().loss_and_grads(model, guide_of("x"))
    with pytest.raises(ValueError, match=r"\['y'\].*no energy sites"):
        ContrastiveDivergence().loss_and_grads(model, guide_of("y"))


def test_a_latent_energy_needs_a_guide():
    def model():
        pyro.sample("z", UnnormalizedEnergy(torch.square))

    pyro.enable_validation(False)  # Pyro would only warn
    with pytest.raises(ValueError, match="does not sample the latent energy 'z'"):
        ContrastiveDivergence().loss_and_grads(model, lambda: None)


def test_data_outside_the_support_are_named():
    def model(x):
        p = UnnormalizedEnergy(lambda x: x, support=constraints.positive)
        with pyro.plate("data", 2):
            pyro.sample("x", p, obs=x)

    with pytest.raises(ValueError, match=r"'x' leave the energy's support"):
        ScoreMatching().loss_and_grads(model, no_guide, torch.tensor([1.0, -1.0]))


def test_an_unknown_wrapper_is_refused():
    p = UnnormalizedEnergy(torch.square)
    q = dist.TransformedDistribution(p, [dist.transforms.ExpTransform()])

    def model():
        pyro.sample("x", q, obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="'x' is an energy inside TransformedDistribution"):
        ScoreMatching().loss_and_grads(model, lambda: None)


def test_data_broadcast_over_the_plates():
    x = torch.tensor([1.0, 2.0, 3.0])

    def model(x):
        lam = pyro.param("lam", torch.tensor(1.0))
        with pyro.plate("copies", 4, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2), obs=x)

    grad = gradients(ScoreMatching(), model, no_guide, x)["lam"]
    torch.testing.assert_close(grad, 4 * (-3 + x.square().sum()))


# -- a plain ELBO --------------------------------------------------------------------------------

PLAIN = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO]


def learned(**kwargs):
    def model():
        lam = pyro.param("lam", torch.tensor(1.0))
        with pyro.plate("data", 3):
            pyro.sample(
                "x", UnnormalizedEnergy(lambda x: lam * x**2 / 2, **kwargs), obs=torch.ones(3)
            )

    return model


def step(model, guide, loss):
    SVI(model, guide, Adam({"lr": 0.01}), loss).step()


@pytest.mark.parametrize("elbo", PLAIN)
def test_a_plain_elbo_over_a_learned_energy_is_refused(elbo):
    with pytest.raises(ValueError, match=r"moves UnnormalizedEnergy.*ContrastiveDivergence"):
        step(learned(), lambda: None, elbo())


def test_a_plain_elbo_over_an_energy_with_a_latent_in_front_is_refused():
    with pytest.raises(ValueError, match="log_normalizer= in closed form"):
        step(latent_in_front, guide_in_front, Trace_ELBO())


def test_a_plain_elbo_over_a_learned_normalizer_is_refused():
    def model():
        log_z = pyro.param("log_z", torch.tensor(0.0))
        pyro.sample("x", UnnormalizedEnergy(torch.square, log_normalizer=log_z), obs=torch.ones(()))

    with pytest.raises(ValueError, match="log_normalizer=learned"):
        step(model, lambda: None, Trace_ELBO())


def test_a_plain_elbo_over_a_learned_prior_is_refused():
    def model():
        t = pyro.param("t", torch.tensor(1.0))
        z = pyro.sample("z", UnnormalizedEnergy(lambda z: t * z**2))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="a plain ELBO lacks the gradient"):
        step(model, guide, Trace_ELBO())


def test_a_plain_elbo_may_do_what_it_can():
    step(learned(constant_normalizer=True), lambda: None, Trace_ELBO())
    step(learned(log_normalizer=0.9, constant_normalizer=True), lambda: None, Trace_ELBO())

    def latent():  # a fixed prior, and a fixed factor
        z = pyro.sample("z", UnnormalizedEnergy(lambda z: z**2 / 2))
        pyro.sample("f", UnnormalizedEnergy(torch.square), obs=z - 1.0)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    guide = AutoNormal(latent)
    svi = SVI(latent, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    assert svi.evaluate_loss() > 0


def test_nobody_else_is_refused():
    model = learned()
    model()  # the parameter is there
    assert Trace_ELBO().differentiable_loss(model, lambda: None).requires_grad
    with torch.no_grad():
        Trace_ELBO().loss(model, lambda: None)

    def sampled():
        lam = pyro.param("lam", torch.tensor(1.0)).detach()
        pyro.sample("x", UnnormalizedEnergy(lambda x: lam * x**2 / 2))

    mcmc = MCMC(NUTS(sampled), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert Predictive(sampled, num_samples=2)()["x"].shape == (2,)
