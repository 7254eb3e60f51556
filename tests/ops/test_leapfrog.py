import pytest
import torch

from pyro_ebm.ops import langevin_log_accept_ratio, langevin_proposal, value_and_grad
from pyro_ebm.ops.steps.leapfrog import drift, energy_change, kick

CHAINS, DIM = 6, 3


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def potential(z):
    return (z**4).sum(-1) / 4 + z[..., 0] * z[..., 1]


def harmonic(z):
    return z.square().sum(-1) / 2


def factor_of(kind, groups):
    if kind == "identity":
        return None
    if kind == "diagonal":
        return torch.rand(groups, DIM) + 0.5
    return torch.randn(groups, DIM, DIM).tril() + 2 * torch.eye(DIM)


def leapfrog(z, p, h, factor, steps=1, energy=potential):
    for _ in range(steps):
        p = kick(p, value_and_grad(energy, z)[1], h / 2, factor)
        z = drift(z, p, h, factor)
        p = kick(p, value_and_grad(energy, z)[1], h / 2, factor)
    return z, p


FACTORS = pytest.mark.parametrize(
    ("kind", "groups"),
    [("identity", 1), ("diagonal", 1), ("diagonal", 3), ("dense", 1), ("dense", 3)],
)


@FACTORS
def test_is_hamiltonian_dynamics_in_whitened_coordinates(kind, groups):
    # with w = L^{-1} z the potential is V(w) = U(L w), and its leapfrog step the textbook's
    factor, h = factor_of(kind, groups), 0.1
    matrices = torch.eye(DIM).expand(groups, DIM, DIM) if factor is None else factor
    matrices = torch.diag_embed(matrices) if matrices.dim() == 2 else matrices
    dense = matrices[torch.arange(CHAINS) % groups]

    def whitened(w):
        return potential((dense @ w[..., None])[..., 0])

    w, p = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM)
    half = p - h / 2 * value_and_grad(whitened, w)[1]
    new_w = w + h * half
    new_p = half - h / 2 * value_and_grad(whitened, new_w)[1]
    got_z, got_p = leapfrog((dense @ w[..., None])[..., 0], p, torch.tensor(h), factor)
    torch.testing.assert_close(got_z, (dense @ new_w[..., None])[..., 0])
    torch.testing.assert_close(got_p, new_p)


@FACTORS
def test_run_backwards_it_retraces_its_way(kind, groups):
    factor, h = factor_of(kind, groups), 0.05 + 0.05 * torch.rand(CHAINS, 1)
    z, p = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM)
    end_z, end_p = leapfrog(z, p, h, factor, steps=20)
    assert (end_z - z).abs().max() > 0.5
    back_z, back_p = leapfrog(end_z, -end_p, h, factor, steps=20)
    torch.testing.assert_close(back_z, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(back_p, -p, rtol=0, atol=1e-10)


@FACTORS
def test_keeps_volumes(kind, groups):
    factor, h = factor_of(kind, groups)[:1] if kind != "identity" else None, torch.tensor(0.4)

    def flow(zp):
        z, p = zp.split(DIM)
        grad = torch.func.grad(lambda z: potential(z))
        p = kick(p[None], grad(z)[None], h / 2, factor)
        z = drift(z[None], p, h, factor)[0]
        p = kick(p, grad(z)[None], h / 2, factor)[0]
        return torch.cat([z, p])

    jacobian = torch.func.jacrev(flow)(torch.randn(2 * DIM))
    torch.testing.assert_close(torch.linalg.det(jacobian), torch.tensor(1.0))
    assert (jacobian - torch.eye(2 * DIM)).abs().max() > 0.1


def test_energy_error_is_of_second_order():
    # after the same time, a step half as long makes a quarter of the error
    z, p = torch.randn(200, DIM), torch.randn(200, DIM)
    u = potential(z)
    errors = []
    for steps in (100, 200, 400):
        new_z, new_p = leapfrog(z, p, torch.tensor(1.0 / steps), None, steps)
        errors.append(energy_change(u, p, potential(new_z), new_p).square().mean().sqrt())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("h", [0.1, 1.0, 1.9])
def test_on_a_normal_it_conserves_its_shadow_energy(h):
    # |p|^2 + (1 - h^2 / 4) |z|^2 is constant for every h < 2
    z, p = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM)
    shadow = p.square() + (1 - h**2 / 4) * z.square()
    for _ in range(100):
        z, p = leapfrog(z, p, torch.tensor(h), None, energy=harmonic)
        torch.testing.assert_close(p.square() + (1 - h**2 / 4) * z.square(), shadow)


def test_a_step_of_size_0_stands_still():
    factor = factor_of("dense", 1)
    z, p = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM)
    h = torch.tensor([0.1, 0.0, 0.1, 0.0, 0.1, 0.0])[:, None]
    new_z, new_p = leapfrog(z, p, h, factor)
    stays = h[:, 0] == 0
    assert torch.equal(new_z[stays], z[stays])
    assert torch.equal(new_p[stays], p[stays])
    assert (new_z[~stays] != z[~stays]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@FACTORS
def test_a_langevin_step_is_one_of_it(kind, groups, temperature):
    factor, t = factor_of(kind, groups), torch.tensor(temperature)
    eps = 0.02 + 0.1 * torch.rand(CHAINS, 1)
    z, noise = torch.randn(CHAINS, DIM), torch.randn(CHAINS, DIM)
    u, g = value_and_grad(potential, z)
    want_z = langevin_proposal(z, g, eps, factor, t, noise)
    new_u, new_g = value_and_grad(potential, want_z)
    want = langevin_log_accept_ratio(u, g, new_u, new_g, eps, factor, t, noise)

    def cooled(z):
        return potential(z) / t

    got_z, p = leapfrog(z, noise, (2 * eps * t).sqrt(), factor, energy=cooled)
    torch.testing.assert_close(got_z, want_z)
    torch.testing.assert_close(-energy_change(u / t, noise, cooled(got_z), p), want)


def test_energy_that_is_no_number_stays_none():
    u, nan, p = torch.ones(3), torch.tensor([1.0, torch.nan, torch.inf]), torch.zeros(3, 2)
    change = energy_change(u, p, nan, p)
    assert change[0] == 0
    assert change[1].isnan()
    assert change[2] == torch.inf
