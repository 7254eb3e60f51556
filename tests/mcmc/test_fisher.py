"""The mass matrix that positions and gradients tell of, and the chains that are left out."""

import pytest
import torch

from pyro_ebm import BarkerKernel, ChEESKernel, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential
from pyro_ebm.mcmc.adaptation.fisher import geometric_mean, low_rank_factor
from pyro_ebm.mcmc.adaptation.metric import MetricWindow, first_factor, new_window
from pyro_ebm.mcmc.adaptation.population import Population
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.ranks import ALONE
from pyro_ebm.ops.steps.precondition import LowRank, precondition, precondition_transposed, whiten

DOUBLE = torch.float64


def gaussian(dim, rank=None):
    """The precision of a Gaussian; with a ``rank``, diagonal but for as many directions."""
    if rank is None:
        root = torch.randn(dim, dim, dtype=DOUBLE)
        return root @ root.mT / dim + 0.01 * torch.eye(dim, dtype=DOUBLE)
    scale = torch.logspace(-1, 1, dim, dtype=DOUBLE)
    u = torch.linalg.qr(torch.randn(dim, rank, dtype=DOUBLE))[0]
    variance = torch.logspace(-2, 2, rank, dtype=DOUBLE)
    middle = torch.eye(dim, dtype=DOUBLE) + (u * (1 / variance - 1)) @ u.mT
    return middle / scale[:, None] / scale


def of_gaussian(precision, z, kind, length=10):
    """The factor that a window of positions ``(steps, chains, dim)`` gives."""
    window = new_window(kind, 1, z.shape[-1], length)
    for positions in z:
        window.add(positions, positions @ precision, torch.ones(len(positions)))
    return window.factor(first_factor(kind, torch.ones(1, z.shape[-1], dtype=DOUBLE)), ALONE)


def spread(precision, factor):
    """The ratio of the largest to the least variance in whitened coordinates: 1 is perfect."""
    columns = precondition(factor, torch.eye(len(precision), dtype=DOUBLE))  # rows L e_i
    variances = torch.linalg.eigvalsh(columns @ precision @ columns.mT)
    return float(variances[-1] / variances[0])


# -- the mathematics -----------------------------------------------------------------------------


def test_geometric_mean_solves_its_equation():
    a, b = gaussian(6), gaussian(6)
    sigma = geometric_mean(a, b)
    torch.testing.assert_close(sigma @ b @ sigma, a)
    torch.testing.assert_close(sigma, sigma.mT)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_gaussian_is_known_from_any_cloud_of_chains(scale):
    precision = gaussian(20)
    far = torch.linspace(-5, 5, 20, dtype=DOUBLE)
    z = far + scale * torch.randn(10, 8, 20, dtype=DOUBLE) * torch.linspace(0.5, 2, 20)
    assert spread(precision, torch.ones(1, 20, dtype=DOUBLE)) > 50
    assert spread(precision, of_gaussian(precision, z, "dense")) < 1.001


def test_a_diagonal_gaussian_is_known_from_any_cloud_of_chains():
    precision = torch.diag(torch.logspace(-4, 4, 9, dtype=DOUBLE))
    factor = of_gaussian(precision, 7 + torch.randn(10, 8, 9, dtype=DOUBLE), "diagonal")
    torch.testing.assert_close(factor[0], precision.diagonal() ** -0.5)


def test_fewer_rows_than_dimensions_leave_the_other_directions_alone():
    precision = gaussian(50)
    before = spread(precision, torch.ones(1, 50, dtype=DOUBLE))
    z = torch.randn(10, 3, 50, dtype=DOUBLE)
    assert spread(precision, of_gaussian(precision, z, "dense")) < before


def test_low_rank_and_dense_agree_where_few_directions_matter():
    precision = gaussian(40, rank=3)
    draws = torch.linalg.solve_triangular(
        torch.linalg.cholesky(precision).mT, torch.randn(40, 4000, dtype=DOUBLE), upper=True
    ).mT.reshape(200, 20, 40)
    dense = of_gaussian(precision, draws, "dense", length=200)
    low_rank = of_gaussian(precision, draws, "low_rank", length=200)
    diagonal = of_gaussian(precision, draws, "diagonal", length=200)
    assert spread(precision, dense) < 1.001
    assert spread(precision, low_rank) < 4 < 100 < spread(precision, diagonal)
    assert (low_rank.stretch != 1).sum() <= 16


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low_rank"])
def test_products_with_a_factor_are_those_with_its_matrix(kind):
    precision = gaussian(6, rank=2)
    z = torch.randn(10, 30, 6, dtype=DOUBLE) @ torch.linalg.cholesky(torch.linalg.inv(precision)).mT
    factor = of_gaussian(precision, z, kind)
    matrix = precondition(factor, torch.eye(6, dtype=DOUBLE)).mT
    v = torch.randn(5, 6, dtype=DOUBLE)
    torch.testing.assert_close(precondition(factor, v), v @ matrix.mT)
    torch.testing.assert_close(precondition_transposed(factor, v), v @ matrix)
    torch.testing.assert_close(whiten(factor, v @ matrix.mT), v)


def test_after_the_last_window_a_low_rank_has_no_idle_directions():
    precision = gaussian(40, rank=3)
    learn = Adaptation(1, 40, 200, 0.1, torch.empty(0), True, True, "low_rank", True, 0.8)
    learn.start(16)
    root = torch.linalg.cholesky(torch.linalg.inv(precision)).mT
    while learn.active:
        z = torch.randn(16, 40, dtype=DOUBLE) @ root
        learn.update(z.float(), torch.full((16,), 0.8), z.sum(1), (z @ precision).float())
    factor = learn.inverse_mass_sqrt
    assert isinstance(factor, LowRank)
    assert (factor.stretch != 1).all()
    assert 3 <= factor.stretch.shape[-1] < 32


def test_low_rank_finds_any_scales():
    scale = torch.logspace(-7, 7, 300, dtype=DOUBLE)
    factor = first_factor("low_rank", torch.ones(1, 300, dtype=DOUBLE))
    for _ in range(4):
        window = new_window("low_rank", 1, 300, 10)
        for z in scale * torch.randn(10, 100, 300, dtype=DOUBLE):
            window.add(z, z / scale**2, torch.ones(100))
        factor = window.factor(factor, ALONE)
    torch.testing.assert_close(factor.diagonal[0], scale)  # of a Gaussian exactly


def test_flat_and_still_directions_keep_their_scale():
    rows = torch.randn(20, 3, dtype=DOUBLE)
    rows[:, 1] = 0.0  # nothing moved there, and nothing was felt
    factor = low_rank_factor(rows, rows, rank=2)
    assert all(bool(part.isfinite().all()) for part in factor)
    torch.testing.assert_close(factor.diagonal, torch.ones(1, 3, dtype=DOUBLE))


# -- chains that are out ---------------------------------------------------------------------------


def test_a_stuck_chain_is_out_and_changes_nothing_for_the_others():
    precision = torch.diag(torch.tensor([1.0, 100.0, 0.01]))
    factors = []
    for stuck in (False, True):
        torch.manual_seed(0)
        z = torch.randn(200, 16, 3)
        learn = Adaptation(1, 3, 200, 0.1, torch.empty(0), True, True, "dense", True, 0.8)
        learn.start(16)
        for positions in z / precision.diagonal().sqrt():
            if stuck:
                positions[7] = torch.tensor([50.0, -50.0, 50.0]) + torch.randn(3) / 100
            grad = positions @ precision
            grad[7] *= 1e-3 if stuck else 1.0
            potential = (positions * grad).sum(-1) / 2 + (1000.0 if stuck else 0.0) * (
                torch.arange(16) == 7
            )
            learn.update(positions, torch.full((16,), 0.8), potential, grad)
        factors.append(learn.inverse_mass_sqrt)
        assert learn.population.out.nonzero().flatten().tolist() == ([7] if stuck else [])
    for factor in factors:
        torch.testing.assert_close(factor[0], torch.diag(precision.diagonal() ** -0.5))


def test_a_stuck_chain_has_no_part_in_the_step_size():
    learn = Adaptation(1, 2, 300, 1.0, torch.empty(0), True, False, "diagonal", True, 0.574)
    learn.start(4)
    stuck = torch.tensor([False, False, False, True])
    while learn.active:
        accept_prob = torch.where(stuck, 0.0, torch.exp(-learn.step_size))
        potential = torch.where(stuck, 100.0, torch.randn(4))
        learn.update(torch.zeros(4, 2), accept_prob, potential)
    torch.testing.assert_close(
        torch.exp(-learn.step_size), torch.tensor([0.574]), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("chains", [1, 2, 4, 16])
def test_no_chain_of_a_population_that_moves_together_is_out(chains):
    population = Population(targets=1, dim=10)
    for t in range(30):
        population.add(5.0 + 1000.0 * 0.5**t + 2.2 * torch.randn(chains))
    population.look(ALONE)
    assert not population.out.any()


def test_two_modes_of_equal_depth_are_both_in():
    population = Population(targets=1, dim=2)
    for _ in range(50):
        population.add(torch.randn(8).abs())
    population.look(ALONE)
    assert not population.out.any()
    assert population.settled


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [LangevinKernel, BarkerKernel, ChEESKernel])
def test_the_kind_follows_the_dimension(make):
    for dim, want in ((3, "dense"), (300, "low-rank")):
        energy = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, event_shape=(dim,))
        kernel = make()
        kernel.bind(EnergyPotential(energy), 20)
        state = kernel.init(torch.randn(8, dim))
        for _ in range(20):
            state, _ = kernel.step(state)
        assert f"{want} mass matrix" in repr(kernel)


def test_kernels_without_gradients_have_covariances():
    energy = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, event_shape=(300,))
    kernel = MHKernel()
    kernel.bind(EnergyPotential(energy), 100)
    assert kernel.adaptation.kind == "diagonal"
    with pytest.raises(ValueError, match="gradients"):
        MHKernel(full_mass="low_rank")


@pytest.mark.parametrize("blocks", [[("a", "b")], [["a"]], ("a",)])
def test_blocks_of_sites_are_refused(blocks):
    with pytest.raises(TypeError, match="blocks of sites"):
        LangevinKernel(full_mass=blocks)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="full_mass must be"):
        ChEESKernel(full_mass="sparse")


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low_rank"])
def test_a_window_goes_on_from_its_state(kind):
    precision = gaussian(5)
    z = torch.randn(10, 8, 5, dtype=DOUBLE)
    whole, rest = new_window(kind, 1, 5, 10), new_window(kind, 1, 5, 10)

    def add(window: MetricWindow, rows):
        for positions in rows:
            window.add(positions, positions @ precision, torch.ones(8))

    add(whole, z[:4])
    rest.load_state_dict(whole.state_dict(), torch.device("cpu"))
    for window in (whole, rest):
        add(window, z[4:])
    old = first_factor(kind, torch.ones(1, 5, dtype=DOUBLE))
    for one, other in zip(whole.factor(old, ALONE), rest.factor(old, ALONE), strict=True):
        assert torch.equal(one, other)
