"""Losses of noise-conditional energies, on Gaussian data, where every level is known."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_ebm import UnnormalizedEnergy, geometric_ladder, noise_conditional
from pyro_ebm.losses import DenoisingScoreMatching, RecoveryLikelihood, ScoreMatching
from pyro_ebm.mcmc import LangevinKernel
from tests.statistics import SIGMAS, assert_mean_of_rows

LADDER = geometric_ladder(2.0, 0.25, 4)
V = 0.7**2


def no_guide(*args):
    pass


def levels_model(start, d=()):
    """Energies t_i |x|^2 / 2 + c_i with parameters t and c of each level."""
    sigmas = torch.tensor(LADDER).double()

    def energy(x, sigma):
        t, c = pyro.param("t"), pyro.param("c")
        level = (sigma[..., None] - sigmas).abs().argmin(-1)
        square = x.square() if d == () else x.square().sum(-1)
        # in sigma as the levels of a Gaussian are: log p = -x^2 / 2 (v + sigma^2) - ...
        return t[level] * square / 2 + c[level]

    def model(x):
        pyro.param("t", torch.as_tensor(start).double().clone())
        pyro.param("c", torch.zeros(len(LADDER)).double())
        with pyro.plate("data", len(x)):
            pyro.sample("x", noise_conditional(energy, LADDER, event_shape=d), obs=x)

    return model


def groups_of_gradients(loss, model, x, groups=50, name="t"):
    grads = []
    for part in x.reshape((groups, -1) + x.shape[1:]):
        if name in pyro.get_param_store():
            pyro.param(name).grad = None
        loss.loss_and_grads(model, no_guide, part)
        grads.append(pyro.param(name).grad / len(part))
    return torch.stack(grads)


EXACT = [1 / (V + sigma**2) for sigma in LADDER]


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("d", [(), (3,)])
def test_the_best_energy_of_each_level_is_that_of_the_noised_data(d, control_variate):
    # of N(0, v I) at sigma that of N(0, (v + sigma^2) I), one t for each level
    x = V**0.5 * torch.randn(40_000, *d).double()
    loss = DenoisingScoreMatching(control_variate=control_variate)
    assert_mean_of_rows(groups_of_gradients(loss, levels_model(EXACT, d), x))
    pyro.clear_param_store()
    grads = groups_of_gradients(loss, levels_model([1 / V] * 4, d), x)
    z = grads.mean(0) / (grads.std(0) / 50**0.5)
    assert (z[:3] > SIGMAS).all()  # each level sees its own noise, that of .25 the least


def test_the_gradient_of_each_level_is_known():
    # dJ / dt of sigma: sigma^2 (t (v + sigma^2) - 1), of a row in four
    x = V**0.5 * torch.randn(40_000).double()
    t = 1.3
    want = torch.tensor([s**2 * (t * (V + s**2) - 1) / 4 for s in LADDER]).double()
    grads = groups_of_gradients(DenoisingScoreMatching(), levels_model([t] * 4), x)
    assert_mean_of_rows(grads - want)


def test_given_sigmas_are_told():
    seen = []

    def energy(x, sigma):
        seen.append(sigma)
        return pyro.param("t", torch.tensor(1.0)) * x**2 / (1 + sigma**2)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", noise_conditional(energy, LADDER), obs=x)

    DenoisingScoreMatching(0.4).loss_and_grads(model, no_guide, torch.randn(7))
    assert any(torch.allclose(s, torch.tensor(0.4)) and s.shape == (7,) for s in seen)
    seen.clear()
    DenoisingScoreMatching().loss_and_grads(model, no_guide, torch.randn(200))
    told = {round(float(x), 4) for s in seen for x in s.detach().flatten()}
    assert told == {round(s, 4) for s in LADDER}


# -- the dual objective --------------------------------------------------------------------------


def gaussian_model(start):
    """A normalized Gaussian of variance v + sigma^2, but for a power of the last: v, a."""

    def model(x):
        t = pyro.param("t", torch.as_tensor(start).double().clone())

        def energy(x, sigma):
            variance = t[0] + sigma**2
            return x.square().sum(-1) / variance / 2 + t[1] * variance.log()

        with pyro.plate("data", len(x)):
            p = noise_conditional(energy, LADDER, event_shape=x.shape[1:])
            pyro.sample("x", p, obs=x)

    return model


@pytest.mark.parametrize("d", [1, 3])
def test_dual_fits_the_constants_of_the_levels_too(d):
    # E = |x|^2 / 2 (v + sigma^2) + d/2 log(v + sigma^2): one log Z at all levels
    x = V**0.5 * torch.randn(40_000, d).double()
    loss = DenoisingScoreMatching(dual=True)
    assert_mean_of_rows(groups_of_gradients(loss, gaussian_model([V, d / 2]), x))
    pyro.clear_param_store()
    grads = groups_of_gradients(loss, gaussian_model([V, 0.0]), x)
    assert grads[:, 1].mean() < -SIGMAS * grads[:, 1].std() / 50**0.5
    pyro.clear_param_store()
    grads = groups_of_gradients(DenoisingScoreMatching(), gaussian_model([V, 0.0]), x)
    assert not grads[:, 1].any()  # the score sees no constant


def test_the_dual_objective_is_as_written():
    x, d = torch.randn(6, 2).double(), 2
    t = torch.tensor([0.8, 0.3]).double()
    model = gaussian_model(t)
    torch.manual_seed(5)
    value = DenoisingScoreMatching(0.5, dual=True).loss(model, no_guide, x)
    torch.manual_seed(5)
    noise = torch.randn_like(x)
    noised, variance = x + 0.5 * noise, t[0] + 0.25
    s = -noised / variance
    change = 0.5 * (noised.square().sum(-1) / variance**2 - 2 * t[1] / variance) * 0.5
    want = (0.5 * s + noise).square().sum(-1) / 2
    want = want + (change - (noise.square().sum(-1) - d)).square() / (2 * d)
    assert value == pytest.approx(float(want.sum()))


def test_the_shares_of_far_pieces_are_seen_by_dual_alone():
    """Of .8 N(-5, .1^2) + .2 N(5, .1^2), at a level where nothing lies between them."""
    means, ladder = torch.tensor([-5.0, 5.0]).double(), geometric_ladder(10.0, 0.1, 15)
    x = means[(torch.rand(40_000) < 0.2).long()] + 0.1 * torch.randn(40_000).double()

    def model(x):
        # log odds a + b log(sigma / sigma_max) of the left piece, and a variance
        t = pyro.param("t", torch.tensor([math.log(4.0), 0.0, 0.01]).double())

        def energy(x, sigma):
            odds = t[0] + t[1] * (sigma / 10.0).log()
            log_shares = torch.stack([torch.zeros_like(odds), -odds], -1).log_softmax(-1)
            variance = (t[2] + sigma**2)[..., None]
            log_p = -(x[..., None] - means).square() / (2 * variance) - variance.log() / 2
            return -(log_shares + log_p).logsumexp(-1)

        with pyro.plate("data", len(x)):
            pyro.sample("x", noise_conditional(energy, ladder), obs=x)

    for dual in (False, True):
        pyro.clear_param_store()
        grads = groups_of_gradients(DenoisingScoreMatching(0.2, dual=dual), model, x)
        assert_mean_of_rows(grads)  # the truth
        pyro.param("t").data[1] = 0.3
        grads = groups_of_gradients(DenoisingScoreMatching(0.2, dual=dual), model, x)
        z = grads[:, 1].mean() / (grads[:, 1].std() / 50**0.5 + 1e-30)
        assert z > SIGMAS if dual else grads[:, 1].abs().max() < 1e-12


# -- recovery likelihood -------------------------------------------------------------------------


def test_recovery_gradients_are_those_of_the_exact_conditional():
    # x | x~ has the precision t + 1 / s^2 and the mean x~ / (1 + s^2 t):
    #   E[x^2] / 2 of the data is (v + sigma^2) / 2, and of the conditional, with x~ of variance
    #   v + sigma^2 + s^2 = v + above^2,  ((v + above^2) / (1 + s^2 t)^2 + s^2 / (1 + s^2 t)) / 2
    x = V**0.5 * torch.randn(8000).double()
    t, ratio = 0.5, LADDER[0] / LADDER[1]
    want = []
    for sigma in LADDER:
        above = ratio * sigma
        shrink = 1 + (above**2 - sigma**2) * t
        negatives = (V + above**2) / shrink**2 + (above**2 - sigma**2) / shrink
        want.append((V + sigma**2 - negatives) / 2 / 4)
    loss = RecoveryLikelihood(LangevinKernel(step_size=0.1, adapt_step_size=False), num_steps=70)
    grads = groups_of_gradients(loss, levels_model([t] * 4), x)
    assert_mean_of_rows(grads - torch.tensor(want).double())
    pyro.clear_param_store()
    assert_mean_of_rows(groups_of_gradients(loss, levels_model(EXACT), x))


def test_recovery_takes_plates_masks_and_events():
    x = torch.randn(3, 4, 2)
    mask = torch.rand(3, 4) < 0.5

    def model():
        t = pyro.param("t", torch.tensor(1.0))

        def energy(x, sigma):
            return t * x.square() / (1 + sigma**2)

        p = noise_conditional(energy, LADDER).expand((3, 4, 2)).to_event(1)
        plates = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
        with plates[0], plates[1], poutine.mask(mask=mask):
            pyro.sample("x", p, obs=x)

    loss = RecoveryLikelihood()
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.01}), loss)
    assert math.isfinite(svi.step())
    assert loss.diagnostics["gradient_norm"] > 0
    assert 0 < loss.diagnostics["acceptance_rate"] <= 1


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (RecoveryLikelihood(), r"'x'.*at least two noise levels.*noise_conditional"),
        (DenoisingScoreMatching(dual=True), r"'x'.*dual=True.*noise_conditional"),
    ],
)
def test_an_energy_without_levels_is_refused(loss, message):
    def model(x):
        t = pyro.param("t", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: t * x**2), obs=x)

    with pytest.raises(ValueError, match=message):
        loss.loss_and_grads(model, no_guide, torch.randn(5))


def test_a_loss_of_one_level_says_so_once():
    def model(x):
        t = pyro.param("t", torch.ones(()))
        p = noise_conditional(lambda x, sigma: t * x**2, LADDER)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    loss = ScoreMatching()
    with pytest.warns(UserWarning, match="'x': ScoreMatching trains the smallest noise level"):
        loss.loss_and_grads(model, no_guide, torch.randn(4))
    loss.loss_and_grads(model, no_guide, torch.randn(4))  # warnings are errors here
    DenoisingScoreMatching().loss_and_grads(model, no_guide, torch.randn(4))
    RecoveryLikelihood().loss_and_grads(model, no_guide, torch.randn(4))


def test_the_chains_of_a_recovery_likelihood_are_its_own():
    with pytest.raises(TypeError, match="RecoveryLikelihood takes no num_chains, persistent"):
        RecoveryLikelihood(persistent=True, num_chains=7)
