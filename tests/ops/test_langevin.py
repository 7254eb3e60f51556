import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.ops import langevin_log_accept_ratio, langevin_proposal, value_and_grad

CHAINS, DIM = 6, 3


def potential(z):
    return (z**4).sum(-1) / 4 + z[..., 0] * z[..., 1]


def factor_of(kind, groups):
    if kind == "identity":
        return None, torch.eye(DIM).expand(CHAINS, DIM, DIM)
    if kind == "diagonal":
        factor = torch.rand(groups, DIM) + 0.5
        dense = torch.diag_embed(factor)
    else:
        factor = dense = torch.randn(groups, DIM, DIM).tril() + 2 * torch.eye(DIM)
    return factor, torch.stack([dense[c % groups] for c in range(CHAINS)])


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("per_chain", [False, True], ids=["one step", "step per chain"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["identity", "diagonal", "dense"])
def test_log_ratio_is_that_of_the_gaussian_proposal_density(kind, groups, per_chain, temperature):
    factor, dense = factor_of(kind, groups)
    z, noise = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM)
    step_size = torch.rand(CHAINS, 1) + 0.05 if per_chain else torch.tensor(0.2)
    steps = step_size.expand(CHAINS, 1)
    t = torch.tensor(temperature)
    covariance = dense @ dense.mT

    def q(at, grad):
        drift = (covariance @ grad[..., None])[..., 0]
        return dist.MultivariateNormal(
            at - steps * drift, covariance_matrix=2 * steps[..., None] * t * covariance
        )

    u, g = value_and_grad(potential, z)
    new_z = langevin_proposal(z, g, step_size, factor, t, noise)
    new_u, new_g = value_and_grad(potential, new_z)
    forth, back = q(z, g), q(new_z, new_g)

    step = (dense @ noise[..., None])[..., 0] * (2 * steps * t).sqrt()
    torch.testing.assert_close(new_z, forth.mean + step)
    want = (u - new_u) / t + back.log_prob(z) - forth.log_prob(new_z)
    got = langevin_log_accept_ratio(u, g, new_u, new_g, step_size, factor, t, noise)
    torch.testing.assert_close(got, want)


def test_step_is_a_leapfrog_step_and_the_ratio_its_energy_error():
    z, momentum, t = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM), torch.tensor(0.7)
    step_size = torch.tensor(0.1)
    h = (2 * step_size * t).sqrt()  # of the Hamiltonian U / T + |p|^2 / 2
    u, g = value_and_grad(potential, z)
    half = momentum - h / 2 * g / t
    new_z = z + h * half
    new_u, new_g = value_and_grad(potential, new_z)
    new_momentum = half - h / 2 * new_g / t

    torch.testing.assert_close(langevin_proposal(z, g, step_size, None, t, momentum), new_z)
    before = u / t + momentum.square().sum(-1) / 2
    after = new_u / t + new_momentum.square().sum(-1) / 2
    got = langevin_log_accept_ratio(u, g, new_u, new_g, step_size, None, t, momentum)
    torch.testing.assert_close(got, before - after)


def test_the_way_back_has_the_opposite_ratio():
    z, noise, t = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM), torch.tensor(1.0)
    step_size = torch.tensor(0.2)
    u, g = value_and_grad(potential, z)
    new_z = langevin_proposal(z, g, step_size, None, t, noise)
    new_u, new_g = value_and_grad(potential, new_z)
    back_noise = (z - new_z + step_size * new_g) / (2 * step_size).sqrt()
    forth = langevin_log_accept_ratio(u, g, new_u, new_g, step_size, None, t, noise)
    back = langevin_log_accept_ratio(new_u, new_g, u, g, step_size, None, t, back_noise)
    torch.testing.assert_close(forth, -back)
