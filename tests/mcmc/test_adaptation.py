import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.adaptation import WarmupAdapter
from pyro.ops.dual_averaging import DualAveraging
from torch.distributions import constraints

from pyro_ebm import MCMC, ConvergenceWarning
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.mcmc import ChEESKernel, EnergyPotential, LangevinKernel, MHKernel
from pyro_ebm.mcmc.adaptation.dual_averaging import TensorAveraging
from pyro_ebm.mcmc.adaptation.metric import PooledCovariance, cholesky_or_diagonal, new_window
from pyro_ebm.mcmc.adaptation.population import Population
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.adaptation.windows import growing_windows, slow_windows
from pyro_ebm.mcmc.ranks import ALONE, ProcessGroup, binding_to
from tests.benchmarks.real.posteriors import REAL
from tests.statistics import assert_moments, run_kernel


def adaptation(warmup_steps, **changes):
    settings = {
        "targets": 1,
        "dim": 2,
        "step_size": 1.0,
        "like": torch.empty(0),
        "adapt_step_size": True,
        "adapt_mass_matrix": True,
        "kind": "diagonal",
        "from_gradients": False,
        "target_accept_prob": 0.574,
    }
    return Adaptation(warmup_steps=warmup_steps, **{**settings, **changes})


# -- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [*range(20, 200), 300, 500, 749, 750, 1000, 1234, 5000])
def test_windows_are_those_of_pyro_and_stan(warmup_steps):
    theirs = WarmupAdapter()
    theirs._warmup_steps = warmup_steps
    schedule = theirs._build_adaptation_schedule()[1:-1]  # without the fast start and end
    assert slow_windows(warmup_steps) == [(start, end + 1) for start, end in schedule]
    assert adaptation(warmup_steps).settling_step == schedule[-1][1] + 1


@pytest.mark.parametrize("warmup_steps", range(20))
def test_short_warmups_have_no_windows(warmup_steps):
    assert slow_windows(warmup_steps) == growing_windows(warmup_steps) == []


@pytest.mark.parametrize("warmup_steps", [*range(20, 200), 300, 1000, 1234, 5000])
def test_growing_windows_follow_one_another_to_the_end(warmup_steps):
    windows = growing_windows(warmup_steps)
    assert windows[0][0] == 8
    assert all(stop == start for (_, stop), (start, _) in pairwise(windows))
    assert all(start < stop <= 2 * start for start, stop in windows)
    assert windows[-1][1] == warmup_steps - min(50, warmup_steps // 5)


# -- covariance ------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pooled_covariance_is_that_of_all_draws_of_a_group(groups, dense, offset):
    mixing = torch.randn(4, 4, dtype=torch.float64)
    z = offset + torch.randn(10, 2 * groups, 4, dtype=torch.float64) @ mixing
    stats = PooledCovariance(groups, dense)
    for batch in z:
        stats.update(batch)
    assert (stats.count == 20).all()
    for group in range(groups):
        want = torch.cov(z[:, group::groups].reshape(-1, 4).T)
        got = stats.covariance()[group]
        torch.testing.assert_close(got, want if dense else want.diagonal(), rtol=1e-7, atol=1e-7)


def test_covariance_of_one_draw_is_refused():
    stats = PooledCovariance(1, dense=False)
    stats.update(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="two positions"):
        stats.covariance()


def test_rows_of_weight_0_are_not_pooled():
    z, weight = torch.randn(10, 6, 2), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    stats = PooledCovariance(2, dense=True)
    for batch in z:
        stats.update(batch, weight)
    assert stats.count.tolist() == [10.0, 30.0]
    torch.testing.assert_close(stats.covariance()[0].float(), torch.cov(z[:, 0].T))
    torch.testing.assert_close(
        stats.covariance()[1].float(), torch.cov(z[:, 1::2].reshape(-1, 2).T)
    )


@pytest.mark.parametrize("full_mass", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_factor_squares_to_the_covariance_of_the_last_window(groups, full_mass):
    learn = adaptation(200, targets=groups, kind="dense" if full_mass else "diagonal")
    mixing = torch.tensor([[[2.0, 0.0], [1.5, 0.5]], [[1.0, 0.0], [-30.0, 10.0]]])
    chains = 500 * groups
    last = []
    for t in range(200):
        z = (mixing[torch.arange(chains) % groups] @ torch.randn(chains, 2, 1)).squeeze(-1)
        if slow_windows(200)[-1][0] <= t < slow_windows(200)[-1][1]:
            last.append(z)
        renewed = learn.update(z, torch.full((chains,), 0.5))
        assert renewed == (t + 1 in [end for _, end in slow_windows(200)])
    for group in range(groups):
        want = torch.cov(torch.cat([z[group::groups] for z in last]).T)
        factor = learn.inverse_mass_sqrt[group]
        got = factor @ factor.mT if full_mass else factor.square()
        want = want if full_mass else want.diagonal()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_few_draws_do_not_make_a_dense_factor_singular():
    learn = adaptation(100, dim=30, kind="dense")
    z = torch.randn(3, 30)
    for t in range(100):
        learn.update(z[t % 3][None], torch.full((1,), 0.5))  # three points span no 30 dimensions
    assert learn.inverse_mass_sqrt.isfinite().all()
    # and no direction is believed to be more than ten times narrower than its draws say
    factor = (
        learn.inverse_mass_sqrt[0] / learn.inverse_mass_sqrt[0].square().sum(-1).sqrt()[:, None]
    )
    assert torch.linalg.svdvals(factor).min() > 0.1


def test_an_indefinite_covariance_falls_back_to_its_diagonal():
    good, bad = torch.tensor([[4.0, 2.0], [2.0, 5.0]]), torch.tensor([[4.0, 7.0], [7.0, 9.0]])
    got = cholesky_or_diagonal(torch.stack([good, bad]))
    torch.testing.assert_close(got[0], torch.linalg.cholesky(good))
    torch.testing.assert_close(got[1], torch.tensor([[2.0, 0.0], [0.0, 3.0]]))


def test_without_warmup_or_mass_matrix_there_is_no_factor():
    assert adaptation(0).inverse_mass_sqrt is None
    assert adaptation(500, adapt_mass_matrix=False).inverse_mass_sqrt is None


# -- step size -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.234, 0.574, 0.8])
@pytest.mark.parametrize("first", [1e-3, 1.0, 1e3])
def test_dual_averaging_reaches_the_target(target, first):
    learn = adaptation(1000, step_size=first, target_accept_prob=target, adapt_mass_matrix=False)
    learn.start(50)
    for _ in range(1000):
        accept_prob = torch.exp(-learn.step_size * (0.5 + torch.rand(50)))
        learn.update(torch.zeros(50, 2), accept_prob)
    assert learn.step_size.shape == (1,)
    reached = torch.exp(-learn.step_size * (0.5 + torch.rand(10_000))).mean()
    assert reached.item() == pytest.approx(target, abs=0.03)


def test_chains_have_steps_of_their_own_until_they_settle():
    learn = adaptation(300, targets=2, adapt_mass_matrix=False)
    learn.start(6)
    scale = torch.tensor([1.0, 10.0, 1.0, 10.0, 1e-6, 1e6])  # the last pair is stuck
    for t in range(300):
        assert learn.step_size.shape == ((6,) if t < learn.settling_step else (2,))
        steps = learn.step_size.repeat(6 // learn.step_size.shape[0])
        if t == learn.settling_step - 1:
            want = -math.log(0.574) * scale
            torch.testing.assert_close(steps, want, rtol=0.2, atol=0.0)
        if t == learn.settling_step:  # a stuck chain does not move the median
            torch.testing.assert_close(learn.step_size, want[:2], rtol=0.2, atol=0.0)
        learn.update(torch.zeros(6, 2), torch.exp(-steps / scale))
    # pooled at the end: the mean acceptance of each group, the stuck chain's included
    prob = torch.exp(-learn.step_size.repeat(3) / scale).reshape(3, 2).mean(0)
    torch.testing.assert_close(prob, torch.full((2,), 0.574), rtol=0.1, atol=0.0)


def test_nothing_changes_after_the_warmup():
    learn = adaptation(50)
    for _ in range(50):
        learn.update(torch.randn(8, 2), torch.rand(8))
    assert not learn.active
    step_size, factor = learn.step_size.clone(), learn.inverse_mass_sqrt.clone()
    assert not learn.update(torch.randn(8, 2), torch.rand(8))
    assert torch.equal(learn.step_size, step_size)
    assert torch.equal(learn.inverse_mass_sqrt, factor)


# -- with kernels ------------------------------------------------------------------------------


def normal(scale, dim):
    scale = torch.as_tensor(scale)
    return EnergyPotential(
        UnnormalizedEnergy(lambda x: (x / scale).square().sum(-1) / 2, event_shape=(dim,))
    )


@pytest.mark.parametrize("make", [LangevinKernel, MHKernel])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_tiny_and_huge_scales_are_found(make, scale):
    draws, info = run_kernel(make(), normal(scale, 2), torch.ones(100, 2), 300, 200)
    assert_moments(draws / scale, 0.0, 1.0)
    assert 0.15 < info.accept_prob.mean() < 0.7


@pytest.mark.parametrize("make", [LangevinKernel, MHKernel])
@pytest.mark.parametrize("full_mass", [False, True])
def test_scales_that_differ_are_found_at_once(make, full_mass):
    scale = torch.tensor([0.1, 1.0, 10.0])
    kernel = make(full_mass=full_mass)
    draws, _ = run_kernel(kernel, normal(scale, 3), torch.randn(100, 3), 400, 200)
    assert_moments(draws / scale, 0.0, 1.0)


def test_chains_that_start_far_out_come_in():
    # On exp(-x^4 / 4) the drift grows as x^3: the step that suits the bulk overshoots from afar,
    # and is rejected for ever.
    quartic = EnergyPotential(UnnormalizedEnergy(lambda x: x.pow(4).sum(-1) / 4, event_shape=(5,)))
    z = torch.randn(64, 5)
    z[:6] = 30.0
    draws, info = run_kernel(LangevinKernel(), quartic, z, 200, 200)
    assert info.accept_prob.mean(1).min() > 0.4
    # E[x^2] of the density exp(-x^4 / 4) is 2 Gamma(3/4) / Gamma(1/4)
    assert_moments(draws, 0.0, 2 * math.gamma(0.75) / math.gamma(0.25))


def test_a_chain_whose_potential_is_all_rounding_comes_in():
    # Where sigma starts at a ten-thousandth of what it is, the potential is 1e12. Once it is 5e6,
    # in single precision known to 1/2, every step that fits there is rejected by rounding.
    posterior = REAL["earn_height"]
    mcmc = MCMC(ChEESKernel(posterior.model), 100, 200, num_chains=32, disable_progbar=True)
    mcmc.run(*posterior.tensors())
    lp = mcmc.get_extra_fields(group_by_chain=True)["lp"]
    # minus a chi-squared variable of three degrees of freedom over two, from the highest value
    assert (lp.max() - lp.mean(1)).max() < 8


WIDE = init_to_uniform(radius=2.0)


def side_well(height):
    """A model on the plane with a second mode, which some starts lead to."""

    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        main, side = (200 * (x - torch.tensor([at, 0.0])).square().sum(-1) for at in (0.0, 2.0))
        pyro.factor("wells", -torch.minimum(main, side + height))

    return model


@pytest.mark.parametrize("make", [ChEESKernel, LangevinKernel])
def test_a_chain_that_is_stranded_starts_anew(make, monkeypatch):
    heights, look = [], Population.look

    def watched(self, ranks):
        look(self, ranks)
        if self.stranded is not None:
            heights.extend(self._last[self.stranded].tolist())

    monkeypatch.setattr(Population, "look", watched)
    add = Population.add
    monkeypatch.setattr(
        Population, "add", lambda self, u: (setattr(self, "_last", u), add(self, u))[1]
    )
    kernel = make(side_well(60.0), init_strategy=WIDE)
    mcmc = MCMC(kernel, 50, 300, num_chains=64, disable_progbar=True)
    mcmc.run()
    assert mcmc.kernel.adaptation.num_restarts > 0
    assert "new starts in the warmup" in repr(mcmc.kernel)
    assert min(heights) > 40  # none of them had come in since its last start
    # a quarter of all starts lead there, and in each second window one can be made anew
    assert (mcmc.get_samples()["x"][:, 0] < 1).float().mean() > 0.9


def test_a_stranded_chain_keeps_the_start_of_its_super_chain():
    population = Population(2, 1)
    # 3 super-chains of 4 chains, of 2 targets each: of the first, chains 0 and 2 of target 0 are
    # stranded, and chain 3 of target 1; of the second all chains of target 0; of the last none
    stranded = torch.zeros(3, 4, 2, dtype=torch.bool)
    stranded[0, [0, 2], 0] = stranded[0, 3, 1] = stranded[1, :, 0] = True
    population.stranded = stranded.flatten()
    z, first = torch.arange(24.0)[:, None], torch.arange(100.0, 124.0)[:, None]
    got = population.starts_anew(z, first, together=4).reshape(3, 4, 2)
    z, first = z.reshape(3, 4, 2), first.reshape(3, 4, 2)
    assert (got[0, [0, 2], 0].unsqueeze(-1) == z[0, [1, 3], 0]).any(-1).all()
    assert got[0, 3, 1] in z[0, :3, 1]
    assert (got[1, :, 0] == first[1, 0, 0]).all()
    alone = population.starts_anew(z.reshape(24, 1), first.reshape(24, 1), together=1)
    assert torch.equal(alone.flatten()[stranded.flatten()], first[stranded])


def test_a_density_that_is_flat_everywhere_is_told():
    def flat():
        pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (3,)))

    mcmc = MCMC(LangevinKernel(flat), 100, num_chains=4, disable_progbar=True)
    with pytest.warns(ConvergenceWarning):
        mcmc.run()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_unequal_shares_keep_the_same_transitions(rank):
    with binding_to(ProcessGroup(101, 2, rank)):
        rows = new_window("low_rank", 1, 3, 101)
        for t in range(101):
            rows.add(torch.full((51 - rank, 3), t), None, torch.ones(51 - rank))
    kept = [int(z[0, 0]) for z, _, _ in rows._rows]
    assert kept == list(range(0, 101, 5))  # 2,048 rows of 101 chains are some twenty transitions


@pytest.mark.parametrize(
    ("fall", "length", "stranded"), [(0, 30, True), (1, 30, False), (0, 10, False)]
)
def test_a_chain_is_stranded_where_it_rests(fall, length, stranded):
    population = Population(1, 5)
    for t in range(2 * length):
        potential = 2.5 + 1.6 * torch.randn(16)
        potential[0] += 1000 - fall * t  # one that comes in slowly is left alone
        population.add(potential)
        if (t + 1) % length == 0:
            population.look(ALONE)
    found = [False] if population.stranded is None else population.stranded.tolist()
    assert found[0] is stranded
    assert not any(found[1:])


@pytest.mark.parametrize("reason", ["a mode of little weight", "given positions"])
def test_a_chain_of_another_mode_stays(reason):
    # 2 dimensions: 40 nats are the limit
    given = {"x": 4 * torch.rand(64, 2) - 2} if reason == "given positions" else None
    kernel = ChEESKernel(side_well(60.0 if given else 30.0), init_strategy=WIDE)
    mcmc = MCMC(kernel, 50, 300, num_chains=64, initial_params=given, disable_progbar=True)
    with pytest.warns(ConvergenceWarning, match="stand apart"):
        mcmc.run()
    assert mcmc.kernel.adaptation.num_restarts == 0


@pytest.mark.parametrize(
    ("make", "dim", "target"),
    [
        (LangevinKernel, 1, 0.574),
        (LangevinKernel, 20, 0.574),
        (lambda: LangevinKernel(target_accept_prob=0.8), 5, 0.8),
        (MHKernel, 1, 0.44),
        (MHKernel, 20, 0.234),
        (lambda: MHKernel(target_accept_prob=0.3), 5, 0.3),
    ],
)
def test_acceptance_adapts_to_the_target(make, dim, target):
    _, info = run_kernel(make(), normal(1.0, dim), torch.randn(200, dim), 300, 100)
    assert info.accept_prob.mean().item() == pytest.approx(target, abs=0.04)


def test_each_group_adapts_by_itself():
    scale = torch.tensor([1e-2, 1.0, 1e2])
    energies = UnnormalizedEnergy(lambda x: (x / scale).square() / 2, batch_shape=(3,))
    potential = EnergyPotential(energies)
    kernel = LangevinKernel(adapt_mass_matrix=False)  # so that the step sizes differ
    draws, info = run_kernel(kernel, potential, potential.initial(300), 300, 100)
    assert kernel.step_size.shape == (3,)
    for group in range(3):
        assert_moments(draws[group::3, :, 0] / scale[group], 0.0, 1.0)
        accept_prob = info.accept_prob[group::3].mean().item()
        assert accept_prob == pytest.approx(0.574, abs=0.04)


@pytest.mark.parametrize("dense", [False, True])
def test_positions_that_are_pooled_at_once_are_those_one_by_one(dense, monkeypatch):
    z = torch.randn(30, 8, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0])
    z[:, 1::2] += 100.0  # the second group lies elsewhere
    factors = []
    for at_once in (1, 50, 100, 2**16):
        monkeypatch.setattr("pyro_ebm.mcmc.adaptation.metric.POOLED_AT_ONCE", at_once)
        like = torch.empty(0, dtype=z.dtype)
        kind = "dense" if dense else "diagonal"
        learned = adaptation(30, targets=2, dim=3, like=like, kind=kind)
        for positions in z:
            learned.update(positions, torch.ones(8))
        assert learned.inverse_mass_sqrt.shape == ((2, 3, 3) if dense else (2, 3))
        factors.append(learned.inverse_mass_sqrt)
    for factor in factors[1:]:
        torch.testing.assert_close(factor, factors[0])


@pytest.mark.parametrize("center", [0.3, -math.inf])
def test_averaging_by_tensors_is_that_by_numbers(center):
    ours, theirs = TensorAveraging(torch.full((2,), center)), DualAveraging(center)
    for g in (torch.randn(50) * 0.3).tolist():
        ours.step(torch.tensor([g, g], dtype=torch.float64))  # of another dtype than the center
        theirs.step(g)
    for mine, its in zip(ours.get_state(), theirs.get_state(), strict=True):
        torch.testing.assert_close(mine, torch.full((2,), its))
