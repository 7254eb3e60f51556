import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Distribution

from pyro_ebm import MCMC, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential, Independence, ModelPotential, Proposal, RandomWalk
from tests.statistics import assert_mean, assert_moments, run_kernel

COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 2.0]])


def correlated(x):
    return ((x @ torch.linalg.inv(COVARIANCE)) * x).sum(-1) / 2


def energy(function=lambda x: x.square().sum(-1) / 2, dim=2):
    return EnergyPotential(UnnormalizedEnergy(function, event_shape=(dim,)))


def gamma_and_normal():
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    return scale, x


class Uniform(Proposal):
    """Symmetric: uniform on a box around z."""

    symmetric = True

    def sample(self, z):
        return z + 4 * torch.rand_like(z) - 2


class Shrinking(Proposal):
    """Not symmetric: a preconditioned Crank-Nicolson step, reversible for N(0, I) alone."""

    def sample(self, z):
        return 0.5 * z + torch.randn_like(z)

    def log_prob(self, new, old):
        return dist.Normal(0.5 * old, 1.0).to_event(1).log_prob(new)


class NoDensity(Proposal):
    def sample(self, z):
        return 0.5 * z + torch.randn_like(z)


# -- theory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "chains", "accept"), [(10, 4000, 0.2611), (100, 2000, 0.2366), (1000, 500, 0.2342)]
)
def test_acceptance_at_the_optimal_scaling(dim, chains, accept):
    kernel = MHKernel(proposal=RandomWalk(2.381 / dim**0.5), adapt_step_size=False)
    _, info = run_kernel(kernel, energy(dim=dim), torch.randn(chains, dim), 0, 50)
    assert_mean(info.accept_prob[..., None], accept)


def test_the_default_scale_is_the_optimal_one():
    kernel = MHKernel(adapt_step_size=False)
    kernel.bind(energy(dim=100), 0)
    assert kernel.step_size.item() == pytest.approx(0.238)
    step = RandomWalk().sample(torch.zeros(2000, 100))
    assert step.std().item() == pytest.approx(0.238, rel=0.02)
    assert RandomWalk(3.0).sample(torch.zeros(2000, 100)).std().item() == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize(
    "proposal",
    [
        None,
        RandomWalk(0.7),
        dist.MultivariateNormal(torch.zeros(2), 2 * COVARIANCE),
        dist.StudentT(5.0, torch.ones(2), 2.0).to_event(1),
        Uniform(),
        Shrinking(),
    ],
    ids=["default", "walk", "independence", "off-centre", "own symmetric", "own with density"],
)
def test_target_is_invariant_under_every_proposal(proposal):
    potential = energy(correlated)
    draws, info = run_kernel(MHKernel(proposal=proposal), potential, torch.randn(200, 2), 150, 300)
    assert info.accept_prob.mean() < 0.95
    assert_moments(draws, 0.0, COVARIANCE.diagonal())
    assert_mean(draws.prod(-1), 0.6)


def test_a_proposal_from_the_target_is_always_accepted():
    q = {
        "scale": dist.Gamma(3.0, 2.0),
        "x": dist.Normal(0.0, 1.0).expand([2]).to_event(1),
    }
    potential = ModelPotential(gamma_and_normal)
    _, info = run_kernel(MHKernel(proposal=q), potential, potential.initial(100), 0, 20)
    torch.testing.assert_close(info.accept_prob, torch.ones(100, 20), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "q"),
    [
        (dist.Beta(2.0, 3.0), dist.Uniform(0.0, 1.0)),
        (dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])), dist.Dirichlet(torch.ones(3))),
        (dist.Gamma(4.0, 2.0), dist.LogNormal(0.5, 0.8)),
    ],
    ids=["interval", "simplex", "positive"],
)
def test_site_distributions_are_taken_on_the_support(site, q):
    kernel = MHKernel(lambda: pyro.sample("x", site), proposal={"x": q})
    mcmc = MCMC(kernel, 200, 50, num_chains=200, disable_progbar=True)
    mcmc.run()
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], site.mean, site.variance)


def test_a_narrow_site_distribution_is_no_error():
    # the chain starts where q has no density: q(z) = 0, and no move is ever accepted
    kernel = MHKernel(
        lambda: pyro.sample("x", dist.Uniform(0.0, 1.0)), proposal={"x": dist.Uniform(0.0, 0.4)}
    )
    start = {"x": torch.logit(torch.tensor([0.1, 0.9]))}
    mcmc = MCMC(kernel, 50, 0, start, num_chains=2, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert (x[0] < 0.4).all()
    assert x[0].std() > 0.05
    torch.testing.assert_close(x[1], torch.full((50,), 0.9))


def test_a_zuko_flow_proposes():
    before = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(before)  # importing zuko switches it off
    flow = zuko.flows.NSF(features=2, transforms=1, hidden_features=(8,))
    kernel = MHKernel(proposal=flow())
    draws, info = run_kernel(kernel, energy(correlated), torch.randn(500, 2), 20, 200)
    assert not draws.requires_grad
    assert 0.1 < info.accept_prob.mean() < 0.99
    assert_moments(draws, 0.0, COVARIANCE.diagonal())


# -- what is refused ---------------------------------------------------------------------------


def test_neither_symmetric_nor_density():
    with pytest.raises(ValueError, match=r"NoDensity.*log_prob.*symmetric"):
        MHKernel(proposal=NoDensity())


@pytest.mark.parametrize("proposal", [0.5, "walk", lambda z: z, RandomWalk])
def test_what_is_no_proposal(proposal):
    with pytest.raises(ValueError, match="proposal must be"):
        MHKernel(proposal=proposal)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_out_of_range(scale):
    with pytest.raises(ValueError, match="scale"):
        RandomWalk(scale)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, math.nan])
def test_target_out_of_range(target):
    with pytest.raises(ValueError, match="target_accept_prob"):
        MHKernel(target_accept_prob=target)


def test_a_proposal_of_the_wrong_shape():
    class Wrong(Uniform):
        def sample(self, z):
            return z[..., :1]

    with pytest.raises(ValueError, match=r"Wrong.*\(5, 2\).*\(5, 1\)"):
        run_kernel(MHKernel(proposal=Wrong()), energy(), torch.zeros(5, 2), 0, 1)


@pytest.mark.parametrize("chains", [1, 2, 5])
def test_a_density_of_the_wrong_shape(chains):
    class Wrong(Shrinking):
        def log_prob(self, new, old):
            return dist.Normal(0.5 * old, 1.0).log_prob(new)

    with pytest.raises(ValueError, match=r"log_prob of the proposal Wrong.*one density per chain"):
        run_kernel(MHKernel(proposal=Wrong()), energy(), torch.zeros(chains, 2), 0, 1)


@pytest.mark.parametrize(
    ("q", "match"),
    [
        ({"scale": dist.Gamma(1.0, 1.0)}, r"sites \['scale'\].*\['scale', 'x'\]"),
        ({"scale": dist.Gamma(1.0, 1.0), "x": dist.Normal(0.0, 1.0)}, r"site 'x'.*\(\).*\(2,\)"),
        (dist.Normal(0.0, 1.0), r"event_shape=\(3,\)"),
        (dist.Normal(torch.zeros(3), 1.0), r"event_shape=\(3,\)"),
        (dist.Normal(torch.zeros(5, 3), 1.0).to_event(1), r"batch_shape=\(\)"),
    ],
)
def test_an_independence_proposal_that_does_not_fit(q, match):
    kernel = MHKernel(gamma_and_normal, proposal=q)
    with pytest.raises(ValueError, match=match):
        kernel.setup(10)


# -- the rest ----------------------------------------------------------------------------------


def test_only_adaptive_proposals_adapt():
    for proposal, adapts in ((RandomWalk(), True), (Uniform(), False), (Shrinking(), False)):
        kernel = MHKernel(proposal=proposal)
        run_kernel(kernel, energy(), torch.randn(10, 2), 100, 1)
        assert (kernel.inverse_mass_sqrt is not None) == adapts
        assert (kernel.step_size != MHKernel(proposal=proposal).step_size) == adapts


def test_an_own_scale_of_a_proposal_is_its_own_business():
    class Scaled(Uniform):
        def __init__(self):
            self.scale = torch.tensor([1.0, 2.0])

    kernel = MHKernel(proposal=Scaled())
    assert kernel.step_size == 1.0


def test_an_own_walk_keeps_its_class_when_adapted():
    class Fixed(RandomWalk):
        def sample(self, z):
            return torch.full_like(z, 7.0)

    kernel = MHKernel(energy(), proposal=Fixed())
    kernel.bind(energy(), 10)
    new_z, _, _ = kernel.draw(kernel.evaluate(torch.zeros(1, 2)))
    assert (new_z == 7).all()


def test_the_users_proposal_is_not_changed_by_a_run():
    q = Independence(
        {"scale": dist.Gamma(1.0, 1.0), "x": dist.Normal(torch.zeros(2), 1.0).to_event(1)}
    )
    before = dict(vars(q))
    kernel = MHKernel(gamma_and_normal, proposal=q)
    kernel.setup(10)
    assert vars(q) == before
    assert pickle.loads(pickle.dumps(kernel))._bound is None  # it holds the potential


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_rejected_and_counted(value):
    def function(x):
        return torch.where((x > 0).all(-1), x.square().sum(-1) / 2, value)

    draws, info = run_kernel(MHKernel(), energy(function, 1), torch.randn(500, 1).abs(), 100, 200)
    assert (draws > 0).all()
    assert info.diverging.any()
    assert (info.accept_prob[info.diverging] == 0).all()
    assert_mean(draws, (2 / math.pi) ** 0.5)


def test_a_proposal_that_is_not_finite_is_rejected():
    class Nan(Uniform):
        def sample(self, z):
            new = super().sample(z)
            new[0] = math.nan
            return new

    draws, info = run_kernel(MHKernel(proposal=Nan()), energy(), torch.zeros(3, 2), 0, 20)
    assert draws.isfinite().all()
    assert info.diverging[0].all()
    assert not info.diverging[1:].any()
    assert draws[1:].std() > 0.1


def test_one_bad_chain_touches_no_other():
    def gone_bad(x):
        return torch.where(x.sum(-1) > 100, math.nan, x.square().sum(-1) / 2)

    z, draws = torch.randn(5, 2), []
    for far in (0.0, 99.9):
        torch.manual_seed(0)
        z[2] = far
        kernel = MHKernel(adapt_step_size=False)
        draws.append(run_kernel(kernel, energy(gone_bad), z, 0, 50)[0])
    others = [0, 1, 3, 4]
    assert torch.equal(draws[0][others], draws[1][others])
    assert draws[1].isfinite().all()


def test_an_energy_made_of_distributions_raises_at_no_proposal():
    def function(x):  # the scale underflows to 0 far out, which Normal refuses to be made with
        return -dist.Normal(0.0, (-x.square()).exp()).log_prob(torch.tensor(0.5)).sum(-1)

    kernel = MHKernel(proposal=RandomWalk(50.0), adapt_step_size=False)
    draws, info = run_kernel(kernel, energy(function), torch.zeros(20, 2), 0, 50)
    assert draws.isfinite().all()
    assert info.diverging.any()
