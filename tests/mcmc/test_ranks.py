"""Chains on two ranks adapt together, to one step size, mass matrix and length."""

import pytest
import torch

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.mcmc import ChEESKernel, EnergyPotential, LangevinKernel, TemperingKernel
from pyro_ebm.mcmc.adaptation.metric import PooledCovariance, first_factor, new_window
from pyro_ebm.mcmc.ranks import ALONE, binding_to, current, process_group_of, shares
from pyro_ebm.ops.distributed import RankError, rank
from pyro_ebm.ops.steps.precondition import LowRank
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


@pytest.fixture(scope="module")
def three():
    with Ranks(3) as some:
        yield some


# -- sums, means, rows -----------------------------------------------------------------------


def test_alone_nothing_is_asked_of_anyone():
    x = torch.randn(5, 3)
    assert process_group_of(4, distributed=True) is process_group_of(4, distributed=False) is ALONE
    assert ALONE.here(7) == slice(0, 7)
    assert torch.equal(ALONE.mean(x), x.mean(0))
    assert ALONE.rows(x) is ALONE.to_first(x) is ALONE.from_first(x) is ALONE.total(x) is x
    assert current() is ALONE
    before = torch.get_rng_state()
    ALONE.seed()
    assert torch.equal(torch.get_rng_state(), before)


def test_torchrun_without_a_group_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"join_group\(\) first"):
        process_group_of(4, distributed=True)
    assert process_group_of(4, distributed=False) is ALONE


@pytest.mark.parametrize(("num", "size"), [(64, 2), (7, 3), (3, 3)])
def test_shares_differ_by_one_at_most(num, size):
    found = shares(num, size)
    assert sum(found) == num
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] <= 1


def pooled(x, flags, each):
    """What a rank of 7 chains, with some rows each, hears of the rows of all."""
    ranks = process_group_of(7, distributed=True)
    here = ranks.here(7)
    mine = x.reshape(7, each, -1)[here].reshape(-1, x.shape[-1])
    first = ranks.to_first(mine)
    assert (first is None) == (rank() > 0)
    return (
        ranks.mean(mine),
        ranks.rows(mine),
        mine if first is None else first,
        ranks.total(mine[:1]),
        ranks.from_first(torch.tensor([rank() + 5])),
        [ranks.any(torch.tensor(flag)[here]) for flag in flags],
    )


@pytest.mark.parametrize("each", [1, 2])
def test_rows_are_those_of_all_ranks_in_order(three, each):
    x = torch.randn(7 * each, 4, dtype=torch.float64)
    flags = [[False] * 6 + [True], [True] + [False] * 6, [False] * 7]
    found = three(pooled, x, flags, each)
    for mean, rows, _, total, first, any_of in found:
        assert torch.allclose(mean, x.mean(0), rtol=1e-14)
        assert torch.equal(rows, x)
        assert torch.allclose(total[0], x[0] + x[3 * each] + x[5 * each], rtol=1e-14)
        assert first == 5
        assert any_of == [True, True, False]
    assert torch.equal(found[0][2], x)
    assert torch.equal(found[1][0], found[0][0])
    assert torch.equal(found[2][0], found[0][0])


def kinds(dtype):
    ranks = process_group_of(3, distributed=True)
    x = torch.arange(3)[ranks.here(3)].to(dtype)
    return ranks.to_first(x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_draws_of_any_kind_come_to_the_first_rank(ranks, dtype):
    first, second = ranks(kinds, dtype)
    assert torch.equal(first, torch.arange(3).to(dtype))
    assert second is None


def drawn():
    process_group_of(2, distributed=True).seed()
    return torch.rand(3)


def test_ranks_draw_other_numbers_from_one_seed(ranks):
    first, second = ranks(drawn)
    assert not torch.equal(first, second)
    assert torch.equal(ranks(drawn)[0], first)


def fails_on(faulty):
    ranks = process_group_of(2, distributed=True)
    try:
        with ranks.fail_together("the start"):
            if rank() in faulty:
                raise ValueError("of my own")
    except (ValueError, RankError) as error:
        return type(error), str(error)
    return None


def test_an_error_of_one_is_an_error_of_all(ranks):
    assert ranks(fails_on, ()) == [None, None]
    mine, theirs = (ValueError, "of my own"), (RankError, "the start failed on rank 1")
    assert ranks(fails_on, (1,)) == [theirs, mine]
    assert ranks(fails_on, (0, 1)) == [mine, mine]


def refused():
    try:
        process_group_of(1, distributed=True)
    except ValueError as error:
        return str(error)


def test_fewer_chains_than_ranks(ranks):
    assert "num_chains=1 cannot be shared out over 2 ranks" in ranks(refused)[1]


def covariance(z, dense):
    stats = PooledCovariance(2, dense)
    ranks = process_group_of(z.shape[1], distributed=True)
    for batch in z[:, ranks.here(z.shape[1])]:
        stats.update(batch.flatten(0, 1))
    whole = stats.over_ranks(ranks)
    return whole.count, whole.mean, whole.covariance()


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_covariances_are_those_of_all_chains(ranks, dense, offset):
    mixing = torch.randn(4, 4, dtype=torch.float64)
    z = offset + torch.randn(10, 5, 2, 4, dtype=torch.float64) @ mixing  # of 5 chains, 2 groups
    z[:, 3:] += 2.0  # the second rank's are elsewhere
    found = ranks(covariance, z, dense)
    for i in range(2):
        count, mean, of_all = (x[i] for x in found[0])
        rows = z[:, :, i].flatten(0, 1)
        want = torch.cov(rows.T)
        assert count == 50
        assert torch.allclose(mean, rows.mean(0), rtol=1e-12)
        assert torch.allclose(of_all, want if dense else want.diagonal(), rtol=1e-8, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def factor(z, kind):
    """The factor of positions ``(steps, chains, dim)`` of chains that are shared out."""
    ranks = process_group_of(z.shape[1], distributed=True)
    window = new_window(kind, 1, z.shape[-1], len(z))
    for rows in z[:, ranks.here(z.shape[1])]:
        window.add(rows, rows * torch.arange(1.0, 1 + z.shape[-1]), torch.ones(len(rows)))
    new = window.factor(first_factor(kind, torch.ones(1, z.shape[-1])), ranks)
    return list(new) if isinstance(new, LowRank) else [new]


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low_rank"])
def test_mass_matrices_are_those_of_one_process(ranks, kind):
    z = torch.randn(10, 5, 4) * torch.tensor([0.1, 1.0, 2.0, 30.0])
    z[:, 3:] += 2.0
    found = ranks(factor, z, kind)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for got, want in zip(found[0], factor(z, kind), strict=True):
        torch.testing.assert_close(got.abs(), want.abs())  # directions have no sign


# -- warmup ----------------------------------------------------------------------------------


def energy(x):
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype)
    return (x / scale).square().sum(-1) / 2


KERNELS = {
    "langevin": lambda: LangevinKernel(),
    "langevin, diagonal": lambda: LangevinKernel(full_mass=False),
    "chees": lambda: ChEESKernel(),
    "chees, low rank": lambda: ChEESKernel(full_mass="low_rank"),
    "chees, diagonal": lambda: ChEESKernel(full_mass=False),
    "chees, captured": lambda: ChEESKernel(jit_compile="capture"),
    "replicas": lambda: TemperingKernel(ChEESKernel(), [1.0, 0.5]),
}


def warmed_up(name, num_chains, warmup_steps, far=0.0, seed=0):
    """What the chains of a rank have learned, and how many they are."""
    p = UnnormalizedEnergy(energy, event_shape=(3,))
    potential, kernel = EnergyPotential(p, like=torch.zeros(())), KERNELS[name]()
    ranks = process_group_of(num_chains, distributed=True)
    with binding_to(ranks):
        kernel.bind(potential, warmup_steps)
    torch.manual_seed(seed)
    ranks.seed()
    z = torch.randn(num_chains, 3)[ranks.here(num_chains)]
    if rank() == 1:  # chains that behave otherwise than those of the other rank
        z = z + far
    state = kernel.init(z)
    for _ in range(warmup_steps):
        state, _ = kernel.step(state)
    kernel = getattr(kernel, "_inner", kernel)
    learned = kernel.adaptation.step_size, kernel.inverse_mass_sqrt
    if isinstance(kernel, ChEESKernel):
        learned = *learned, kernel.trajectory_length, kernel._learner.learned.center
    parts = [part for x in learned for part in (x if isinstance(x, LowRank) else (x,))]
    return [x.clone() for x in parts], len(z)


@pytest.mark.parametrize("name", KERNELS)
def test_all_ranks_learn_the_same_to_the_last_bit(ranks, name):
    (first, here), (second, there) = ranks(warmed_up, name, 9, 60, 30.0)
    assert (here, there) == (5, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.isfinite().all() for x in first)


def test_one_chain_on_a_rank(ranks):
    (first, here), (second, there) = ranks(warmed_up, "chees", 3, 60)
    assert (here, there) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (first, _), (second, _) = ranks(warmed_up, "langevin", 2, 60)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "name", ["langevin", "chees", pytest.param("chees, diagonal", marks=pytest.mark.slow)]
)
def test_two_ranks_adapt_as_one_process_does(ranks, name):
    runs = range(8)  # each of 64 chains
    shared = [ranks(warmed_up, name, 64, 100, 0.0, seed)[0][0] for seed in runs]
    alone = [warmed_up(name, 64, 100, 0.0, 10 + seed)[0] for seed in runs]
    for what in range(len(alone[0]) - (name != "langevin")):  # all but the center
        a, b = (torch.stack([run[what] for run in some]) for some in (shared, alone))
        if a.dim() == 4:  # a dense factor
            a, b = a.diagonal(dim1=-2, dim2=-1), b.diagonal(dim1=-2, dim2=-1)
        a, b = a.log(), b.log()
        gap, error = (a.mean(0) - b.mean(0)).abs(), ((a.var(0) + b.var(0)) / len(runs)).sqrt()
        # Student's t(14): but for 6e-6; of a Gaussian the mass matrix is exact in all runs
        assert (gap < 7 * error + 1e-3).all(), (what, gap / error)
        assert (gap < 0.15).all()
