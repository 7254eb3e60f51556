"""Discrete kernels on targets whose states are counted: transition matrices and what they keep."""

import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import SGD

from pyro_ebm import MCMC, UnnormalizedEnergy
from pyro_ebm.distributions import (
    RBM,
    BoltzmannMachine,
    GaussianRBM,
    Potts,
    mixture,
    product,
    spin,
)
from pyro_ebm.losses import ContrastiveDivergence
from pyro_ebm.mcmc import (
    DiscreteLangevinKernel,
    EnergyPotential,
    Flip,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    Swap,
)
from pyro_ebm.mcmc.kernels.discrete.variables import Variables
from tests.enumeration import (
    assert_counts,
    assert_draws,
    assert_invariant,
    draws_of,
    number_of,
    states_of,
)
from tests.statistics import SIGMAS, assert_moments, run_kernel

ALPHA = 0.6


def dmala(**kwargs):
    return DiscreteLangevinKernel(**{"step_size": ALPHA, "adapt_step_size": False, **kwargs})


# name: the kernel, and whether it leaves the target invariant
KERNELS = {
    "gibbs": GibbsKernel,
    "gwg": GibbsWithGradientsKernel,
    "dmala": dmala,
    "flip": lambda: MHKernel(proposal=Flip()),
    "flip-2": lambda: MHKernel(proposal=Flip(2)),
    "swap": lambda: MHKernel(proposal=Swap()),
}
MIXING = [name for name in KERNELS if name != "swap"]  # those reach every state

# name: support, event shape
TARGETS = {
    "binary": (constraints.boolean, (3,)),
    "spin": (spin, (3,)),
    "interval": (constraints.integer_interval(-1, 2), (2,)),
    "one-hot": (constraints.one_hot, (2, 3)),
}


def target(name, **kwargs):
    """A density with interactions of all orders."""
    support, shape = TARGETS[name]
    dim = math.prod(shape)
    weights = torch.sin(torch.arange(float(dim * dim))).reshape(dim, dim).double()

    def energy(x):
        x = x.reshape(x.shape[: x.dim() - len(shape)] + (dim,)).to(weights)
        return -0.4 * (x @ weights * x).sum(-1) + torch.sin(x @ weights[0] + 0.5)

    return UnnormalizedEnergy(energy, shape, support, **kwargs)


# -- transition matrices ---------------------------------------------------------------------------


def conditional(states, log_p, columns):
    """The matrix that draws some columns given the others."""
    others = torch.ones(states.shape[1], dtype=torch.bool)
    others[columns] = False
    same = (states[:, None, others] == states[:, others]).all(-1)
    return torch.where(same, log_p, -torch.inf).softmax(-1)


def metropolis(log_q, log_p):
    """Proposals accepted or rejected: the matrix of ``q_ij min(1, p_j q_ji / p_i q_ij)``."""
    log_ratio = log_p - log_p[:, None] + log_q.T - log_q
    matrix = (log_q + log_ratio.clamp(max=0)).exp()
    matrix[log_q == -torch.inf] = 0
    matrix.fill_diagonal_(0)
    return matrix + torch.diag(1 - matrix.sum(-1))


def matrix_of(name, potential):
    """The transition matrix ``(states, states)``, written down anew from the papers' formulas."""
    states, log_p = states_of(potential)
    grad = -potential.value_and_grad(states)[1]
    b = potential.sites[0].support_values.shape[1]
    blocks = torch.arange(potential.dim).split(b)
    step = states - states[:, None]  # x' - x
    moved = torch.stack([(step[..., columns] != 0).any(-1) for columns in blocks], -1)
    change, distance = (grad[:, None] * step).sum(-1), step.square().sum(-1)
    if name == "gibbs":
        matrix = torch.eye(len(states), dtype=log_p.dtype)
        for columns in blocks:
            matrix = matrix @ conditional(states, log_p, columns)
        return matrix
    if name == "gwg":
        one = torch.where(moved.sum(-1) == 1, change / 2, -torch.inf)
        return metropolis(one.log_softmax(-1), log_p)
    if name.startswith("flip"):
        # one or two variables with equal probability, then their values
        q = torch.zeros_like(change)
        for k in (numbers := (1, 2) if name == "flip-2" else (1,)):
            some = torch.where(moved.sum(-1) == k, torch.zeros_like(change), -torch.inf)
            q = q + some.softmax(-1) / len(numbers)
        return metropolis(q.log(), log_p)
    if name == "swap":
        count = torch.zeros_like(change)
        for i, state in enumerate(states):
            for one, other in itertools.combinations(blocks, 2):
                new = state.clone()
                new[one], new[other] = state[other], state[one]
                count[i, number_of(new[None], states)] += 1
        return metropolis((count / count.sum(-1, keepdim=True)).log(), log_p)
    # all variables at once: the product of softmaxes is a softmax over all states
    log_q = (change / 2 - distance / (2 * ALPHA)).log_softmax(-1)
    return log_q.exp() if name == "dula" else metropolis(log_q, log_p)


@pytest.mark.parametrize("of", TARGETS)
@pytest.mark.parametrize("name", [*KERNELS, "dula"])
def test_transition_matrix(name, of):
    potential = EnergyPotential(target(of))
    states, log_p = states_of(potential)
    assert states.dtype == torch.float64
    matrix, p = matrix_of(name, potential), log_p.softmax(0)
    if name != "dula":
        torch.testing.assert_close(p @ matrix, p)
        if name != "gibbs":  # a sweep in a fixed order is not reversible
            torch.testing.assert_close(p[:, None] * matrix, (p[:, None] * matrix).T)
    num = 3000
    kernel = dmala(adjusted=False) if name == "dula" else KERNELS[name]()
    z, info = run_kernel(kernel, potential, states.repeat(num, 1), 0, 1)
    end = number_of(z[:, 0], states).reshape(num, len(states))
    counts = torch.stack([end[:, i].bincount(minlength=len(states)) for i in range(len(states))])
    assert_counts(counts, matrix.clamp(min=0).where(matrix > 1e-12, 0))
    assert not info.diverging.any()
    if name in ("gwg", "dmala"):  # the acceptance told is that of the proposals
        assert 0.2 < info.accept_prob.mean() < 1
    if name in ("gibbs", "dula"):
        assert (info.accept_prob == 1).all()


@pytest.mark.parametrize("name", KERNELS)
def test_batched_energies_keep_their_own_targets(name):
    batch = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, 3.0]])
    p = UnnormalizedEnergy(
        lambda x: -(batch * x).sum(-1) - x[..., 0] * x[..., 1],
        (3,),
        constraints.boolean,
        batch_shape=(2,),
    )
    potential = EnergyPotential(p)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    log_p = -p.energy(states[:, None].expand(8, 2, 3))  # (8, 2)
    start = torch.stack([draws_of(states, log_p[:, i], 8000) for i in range(2)], 1).reshape(-1, 3)
    z, _ = run_kernel(KERNELS[name](), potential, start, 0, 2)
    for i in range(2):
        assert_draws(z[i::2, -1], states, log_p[:, i])


@pytest.mark.parametrize("of", TARGETS)
@pytest.mark.parametrize("name", MIXING)
def test_runs_from_anywhere_to_the_target(name, of):
    """Under our runner, in float32, adaptation included."""
    p = target(of)
    kernel = KERNELS[name]()
    kernel.model, kernel.adapt_step_size = p, isinstance(kernel, DiscreteLangevinKernel)
    mcmc = MCMC(kernel, 10, 40, num_chains=1500, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (1500, 10) + p.event_shape
    assert p.support.check(x).all()
    states, log_p = states_of(EnergyPotential(p))
    assert_draws(x[:, -1].flatten(1).to(states), states, log_p)
    lp = mcmc.get_extra_fields(group_by_chain=True)["lp"]
    torch.testing.assert_close(lp, -p.energy(x).to(lp))


# -- the gradient kernels --------------------------------------------------------------------------


def bit(slope, **kwargs):
    return UnnormalizedEnergy(lambda x: -slope * x.sum(-1), (1,), constraints.boolean, **kwargs)


def test_the_bias_of_the_unadjusted_kernel_shrinks_with_its_step():
    # of one bit, P(0 -> 1) = s(a/2 - 1/2alpha) and P(1 -> 0) = s(-a/2 - 1/2alpha)
    a, biases = 2.0, []
    for alpha in (1.0, 0.2, 0.1):
        up, down = (1 / (1 + math.exp(1 / (2 * alpha) - sign * a / 2)) for sign in (1, -1))
        stationary = up / (up + down)
        biases.append(abs(stationary - 1 / (1 + math.exp(-a))))
        kernel = dmala(adjusted=False, step_size=alpha)
        start = (torch.rand(40_000, 1) < stationary).float()
        z, _ = run_kernel(kernel, EnergyPotential(bit(a)), start, 0, 3)
        counts = z[:, -1, 0].long().bincount(minlength=2)
        assert_counts(counts, torch.tensor([1 - stationary, stationary]))
    assert biases[0] > 0.1
    assert biases[0] > 4 * biases[1] > 20 * biases[2]


def test_the_step_size_adapts_to_the_acceptance_or_to_its_cap():
    torch.manual_seed(0)
    couplings = torch.randn(30, 30)

    def energy(x):
        return -(x @ couplings * x).sum(-1) / 2

    rough = UnnormalizedEnergy(energy, (30,), spin)
    for target_accept_prob in (0.574, 0.8):
        kernel = DiscreteLangevinKernel(rough, target_accept_prob=target_accept_prob)
        mcmc = MCMC(kernel, 100, 200, num_chains=50, disable_progbar=True)
        mcmc.run()
        rate = mcmc.get_extra_fields()["acceptance_rate"].mean()
        assert abs(rate - target_accept_prob) < 0.06
        assert kernel.step_size.item() < 100
    free = DiscreteLangevinKernel(bit(0.5))  # even the largest steps are accepted
    mcmc = MCMC(free, 100, 60, num_chains=20, disable_progbar=True)
    mcmc.run()
    assert free.step_size.item() == DiscreteLangevinKernel.MAX_STEP_SIZE
    assert mcmc.get_extra_fields()["acceptance_rate"].mean() > 0.9
    assert mcmc.get_extra_fields()["step_size"].isfinite().all()


def test_a_step_size_is_never_written_into():
    kernel = DiscreteLangevinKernel(bit(0.5), step_size=1e6, adapt_step_size=False)
    potential = kernel.make_potential()
    kernel.bind(potential, 0)
    assert kernel.step_size.item() == DiscreteLangevinKernel.MAX_STEP_SIZE
    large = torch.tensor([3e5])
    kernel.adaptation.step_size = large
    kernel.step(kernel.init(potential.initial(4)))
    assert large.item() == 3e5  # it may be someone else's
    assert kernel.step_size.item() == DiscreteLangevinKernel.MAX_STEP_SIZE


@pytest.mark.parametrize("make", [GibbsWithGradientsKernel, dmala])
class TestRefusals:
    def test_whole_numbers(self, make):
        base = dist.Categorical(torch.ones(3)).expand([2]).to_event(1)
        p = UnnormalizedEnergy(lambda x: x.sum(-1).float(), base=base)
        with pytest.raises(ValueError, match=r"gradient in the values of \['x'\], which are whole"):
            make().bind(EnergyPotential(p), 0)

    def test_continuous_sites(self, make):
        with pytest.raises(ValueError, match=r"discrete sites, and \['x'\] are not: use Langevin"):
            make().bind(EnergyPotential(UnnormalizedEnergy(torch.square)), 0)

    @pytest.mark.parametrize("energy", [lambda x: (x > 0.5).sum(-1), lambda x: x.round().sum(-1)])
    def test_a_gradient_of_zero(self, make, energy):
        p = UnnormalizedEnergy(
            lambda x: energy(x).float(), (3,), constraints.boolean, kernel=make()
        )
        with pytest.raises(ValueError, match=r"gradient in .*'x'.* is 0 at every starting point"):
            p.sample((20,))

    def test_a_flat_density_is_none(self, make):
        # as a machine whose couplings start at 0
        zero = torch.zeros(3, 3)
        p = UnnormalizedEnergy(lambda x: -(x @ zero * x).sum(-1), (3,), constraints.boolean)
        assert_invariant(make(), EnergyPotential(p), num=4000)

    def test_a_gradient_that_is_not_finite(self, make):
        p = UnnormalizedEnergy(lambda x: x.sqrt().sum(-1), (3,), constraints.boolean, kernel=make())
        with pytest.raises(ValueError, match=r"not finite at a starting point.*GibbsKernel"):
            p.sample((20,))


PROBS = torch.tensor([0.7, 0.2, 0.1])
ONE_HOT = dist.OneHotCategorical(PROBS)
SLOPE = torch.tensor([0.5, -1.0, 0.3])


def slope(x):
    return (SLOPE * x).sum(-1)


def one_hot_prior():
    x = pyro.sample("x", ONE_HOT)
    pyro.sample("y", dist.Normal(slope(x), 1.0), obs=torch.tensor(1.0))


torch.manual_seed(0)
NET = torch.nn.Sequential(
    torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU(),
    torch.nn.Linear(32, 1), torch.nn.Flatten(-2),
)  # fmt: skip
BITS = {"event_shape": (3,), "support": constraints.boolean}
LOST = {
    "a one-hot base": UnnormalizedEnergy(slope, base=ONE_HOT),
    "rows of them": UnnormalizedEnergy(
        lambda x: (SLOPE * x).sum((-1, -2)), base=ONE_HOT.expand([4]).to_event(1)
    ),
    "a one-hot part of a product": product(UnnormalizedEnergy(slope, base=ONE_HOT), ONE_HOT),
    "a one-hot part of a mixture": mixture(
        [0.5, 0.5],
        [UnnormalizedEnergy(slope, base=dist.OneHotCategorical(torch.ones(3))), ONE_HOT],
        unnormalized_weights=True,
    ),
    "a one-hot site": one_hot_prior,
    "an argmax": UnnormalizedEnergy(
        lambda x: slope(x) + SLOPE[x.argmax(-1)], base=dist.OneHotCategorical(torch.ones(3))
    ),
    "an index": UnnormalizedEnergy(lambda x: slope(x) + SLOPE[x[..., 0].long()], **BITS),
    "a comparison of one variable": UnnormalizedEnergy(
        lambda x: x.sum(-1) + (x[..., 2] > 0.5).float(), **BITS
    ),
    "a detached part": UnnormalizedEnergy(lambda x: slope(x) * slope(x).detach(), **BITS),
}
TOLD = {
    "bits": UnnormalizedEnergy(slope, **BITS),
    "a flat one-hot base": UnnormalizedEnergy(slope, base=dist.OneHotCategorical(torch.ones(3))),
    "a base of bits": UnnormalizedEnergy(
        slope, base=dist.Bernoulli(PROBS).to_event(1), support=constraints.boolean
    ),
    "a network with kinks": UnnormalizedEnergy(NET, (12,), constraints.boolean),
    "an RBM": RBM(3 * torch.ones(20, 5), torch.zeros(20), -20 * torch.ones(5)),
    "spins": BoltzmannMachine(torch.ones(12, 12).fill_diagonal_(0) / 3),
    "a Potts model": Potts(1.0, edges=torch.tensor([[0, 1], [1, 2]]), num_states=3),
    "what is impossible": UnnormalizedEnergy(
        lambda x: torch.where(x.sum(-1) > 2.5, torch.inf, slope(x)), **BITS
    ),
}


def dula_of(p):
    kernel = dmala(adjusted=False)
    if not isinstance(p, UnnormalizedEnergy):
        kernel.model = p
        return MCMC(kernel, 3, 0, num_chains=2, disable_progbar=True).run()
    p.kernel = kernel
    return p.sample((4,))


@pytest.mark.parametrize("p", LOST.values(), ids=LOST)
def test_the_unadjusted_kernel_refuses_what_its_gradient_does_not_tell(p):
    with pytest.raises(
        ValueError, match=r"a part of the log density of .* has no gradient.*adjusted=Tr"
    ):
        dula_of(p)


@pytest.mark.parametrize("p", TOLD.values(), ids=TOLD)
def test_the_unadjusted_kernel_takes_all_that_is_a_formula(p):
    dula_of(p)


@pytest.mark.parametrize("num_flips", [1, 2, 3])
def test_flips_of_any_number_reach_every_state(num_flips):
    """Always two flips would keep the parity of three bits, always three their differences."""
    p = EnergyPotential(target("binary"))
    start = torch.zeros(2000, 3, dtype=torch.float64)
    z, _ = run_kernel(MHKernel(proposal=Flip(num_flips)), p, start, 60, 1)
    assert_draws(z[:, -1], *states_of(p))


def test_bad_arguments():
    with pytest.raises(ValueError, match="adapt_step_size=True needs adjusted=True"):
        DiscreteLangevinKernel(adjusted=False, adapt_step_size=True)
    with pytest.raises(ValueError, match="step_size must be positive"):
        DiscreteLangevinKernel(step_size=0.0)
    for bad in (0, 1.5, -1):
        with pytest.raises(ValueError, match="num_flips must be an integer of at least 1"):
            Flip(bad)
    three = EnergyPotential(target("binary"))
    with pytest.raises(ValueError, match="num_flips=4, but there are 3 variables"):
        run_kernel(MHKernel(proposal=Flip(4)), three, three.initial(2), 0, 1)
    one = EnergyPotential(bit(1.0))
    with pytest.raises(ValueError, match=r"Swap exchanges two variables .* \[1\] variables"):
        MHKernel(proposal=Swap()).bind(one, 0)
    with pytest.raises(ValueError, match=r"MHKernel moves discrete sites, and \['x'\] are not"):
        MHKernel(proposal=Flip()).bind(EnergyPotential(UnnormalizedEnergy(torch.square)), 0)
    for kernel in (LangevinKernel(), MHKernel()):
        with pytest.raises(ValueError, match=r"continuous sites, and \['x'\] are not: use Gibbs"):
            kernel.bind(three, 0)


# -- states that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "swap"])
def test_states_without_a_density_are_never_entered(name, bad):
    """Infinite energy has probability 0; no number, or one that is infinitely low, is an error."""

    def energy(x):
        value = -x[..., 0] - 0.5 * x.sum(-1)
        return torch.where(x.sum(-1) == 3, bad, value)

    p = UnnormalizedEnergy(energy, (4,), constraints.boolean)
    potential = EnergyPotential(p)
    states, log_p = states_of(potential)
    allowed = states.sum(-1) != 3
    log_p = log_p.where(allowed, -torch.inf)
    start = draws_of(states, log_p, 20_000)
    z, info = run_kernel(KERNELS[name](), potential, start, 0, 2)
    assert_draws(z[:, -1], states, log_p)
    assert info.diverging.any() == (bad != math.inf)


def test_a_broken_block_sweep_stays_where_it_is():
    p = RBM(torch.full((3, 2), math.nan), torch.zeros(3), torch.zeros(2), validate_args=False)
    kernel, potential = GibbsKernel(), EnergyPotential(p)
    kernel.bind(potential, 0)
    z = torch.ones(5, 3)
    state = kernel.init(z)._replace(potential=torch.zeros(5))
    new, info = kernel.step(state)
    assert torch.equal(new.z, z)
    assert info.diverging.all()
    assert not info.accept_prob.any()


def test_a_variable_with_a_single_value():
    p = UnnormalizedEnergy(lambda x: x.sum(-1), (3,), constraints.integer_interval(2, 2))
    potential = EnergyPotential(p)
    for name in ("gibbs", "flip"):
        z, _ = run_kernel(KERNELS[name](), potential, potential.initial(4), 0, 3)
        assert (z == 2).all()


def test_large_whole_numbers_are_told_apart():
    """Squares of 9999 and 9998 differ by less than float32 can tell from their size."""
    p = UnnormalizedEnergy(
        lambda x: (9999 - x).sum(-1), (2,), constraints.integer_interval(9000, 9999)
    )
    potential = EnergyPotential(p)
    variables = Variables(potential.sites, torch.empty(()))
    z = torch.tensor([[9999.0, 9998.0]])
    moves = variables.moves(z, torch.zeros_like(z))
    assert moves.stays.nonzero()[:, 1].tolist() == [999, 1998]
    torch.testing.assert_close(
        moves.distance.reshape(2, 1000), (torch.arange(9000.0, 10000.0) - z[0, :, None]).square()
    )
    start = z.repeat(2000, 1)
    for name in ("gwg", "flip", "gibbs"):
        new, _ = run_kernel(KERNELS[name](), potential, start, 0, 1)
        assert p.support.check(new).all()
        moved = (new[:, 0] != start).any(-1).double().mean()
        if name == "gwg":  # to a neighbour, most likely
            assert moved > 0.1
        if name == "gibbs":  # P(9999) = 1 - e^-1
            counts = (new[:, 0, 1] == 9999).long().bincount(minlength=2)
            assert_counts(counts, torch.tensor([math.exp(-1), 1 - math.exp(-1)]))


# -- blocks ----------------------------------------------------------------------------------------


def rbm(**kwargs):
    torch.manual_seed(3)
    return RBM(torch.randn(4, 3), torch.randn(4), torch.randn(3), **kwargs)


def test_block_sweeps_leave_the_machine_invariant():
    potential = EnergyPotential(rbm())
    assert potential.blocks is not None
    assert_invariant(GibbsKernel(), potential)
    potential.blocks = None  # one by one
    assert_invariant(GibbsKernel(), potential)


def test_blocks_and_single_sites_agree_on_a_batch():
    torch.manual_seed(3)
    p = RBM(torch.randn(2, 4, 3), torch.randn(2, 4), torch.randn(3), num_steps=20)
    x = p.sample((4000,))
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    log_p = -p.energy(states[:, None].expand(16, 2, 4))
    for i in range(2):
        assert_draws(x[:, i], states, log_p[:, i])


def test_blocks_of_a_machine_with_real_units():
    torch.manual_seed(3)
    p = GaussianRBM(torch.randn(2, 3), torch.randn(2), torch.randn(3))
    mcmc = MCMC(GibbsKernel(p), 50, 20, num_chains=500, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert_moments(x, p.mixture().mean, p.mixture().variance)
    assert not mcmc.get_extra_fields()["diverging"].any()


# -- what they are for -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXING)
def test_draws_of_an_energy(name):
    p = target("one-hot", kernel=KERNELS[name](), num_steps=60)
    x, diagnostics = p.sample_with_diagnostics((3000,))
    assert x.shape == (3000, 2, 3)
    states, log_p = states_of(EnergyPotential(p))
    assert_draws(x.flatten(1), states, log_p)
    assert diagnostics.r_hat < 1.2
    assert diagnostics.ess > 3000
    assert diagnostics.num_divergences == 0


@pytest.mark.parametrize("name", [*KERNELS, "default"])
def test_contrastive_divergence_has_no_gradient_at_the_truth(name):
    kernel = None if name == "default" else KERNELS[name]()
    loss, negatives = ContrastiveDivergence(kernel=kernel, num_steps=2), []
    run_chains = loss.negatives.run

    def watched(*args):
        found = run_chains(*args)
        negatives.append(found.x)
        return found

    loss.negatives.run = watched
    couplings = torch.tensor([[0.0, 1.0, -0.5], [1.0, 0.0, 0.8], [-0.5, 0.8, 0.0]])

    def energy_of(theta):
        return lambda x: -theta * (x @ couplings * x).sum(-1) / 2

    def model(x):
        theta = pyro.param("theta", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(energy_of(theta), (3,), spin)
            pyro.sample("x", p, obs=x)

    states, log_p = states_of(EnergyPotential(UnnormalizedEnergy(energy_of(1.0), (3,), spin)))
    x = draws_of(states, log_p, 20_000)
    svi = SVI(model, lambda x: None, SGD({"lr": 0.0}), loss)
    svi.step(x)
    assert (negatives[0] != x).any(-1).double().mean() > 0.1  # it moved
    rows = energy_of(1.0)(x) - energy_of(1.0)(negatives[0])
    torch.testing.assert_close(
        torch.tensor(loss.diagnostics["gradient_norm"]), rows.sum().abs(), rtol=1e-3, atol=0.1
    )
    assert rows.mean().abs() < SIGMAS * rows.std() / len(x) ** 0.5


def test_whole_numbers_stay_indices():
    """An energy over a Categorical base sees the integers that it draws."""
    table = torch.tensor([0.0, 1.0, -0.5, 2.0])
    p = UnnormalizedEnergy(
        lambda k: table[k], base=dist.Categorical(torch.tensor([0.1, 0.2, 0.3, 0.4])), num_steps=10
    )
    x, diagnostics = p.sample_with_diagnostics((20_000,))
    assert x.dtype == torch.long
    assert diagnostics.r_hat < 1.1
    assert target("binary").sample((0, 2)).shape == (0, 2, 3)
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.4]).log() - table
    assert_counts(x.bincount(minlength=4), log_p.softmax(0))


@pytest.mark.parametrize("name", KERNELS)
def test_seeds_pickles_and_names(name):
    p = target("binary")

    def run(kernel):
        pyro.set_rng_seed(5)
        mcmc = MCMC(kernel, 8, 6, num_chains=3, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()["x"]

    kernel = KERNELS[name]()
    kernel.model = pickle.loads(pickle.dumps(kernel)).model  # None pickles
    assert type(kernel).__name__ in repr(kernel)
    kernel.model = p
    first = run(kernel)
    assert torch.equal(run(kernel), first)
    assert torch.equal(run(kernel.copy()), first)


@pytest.mark.parametrize("name", ["gibbs", "gwg", "dmala", "flip"])
@pytest.mark.parametrize("of", ["interval", "one-hot"])
def test_initial_params_must_be_support_values(name, of):
    kernel, p = KERNELS[name](), target(of)
    kernel.model = p
    good = p.starting_points((2,))
    mcmc = MCMC(kernel, 1, 0, {"x": good}, num_chains=2, disable_progbar=True)
    mcmc.run()
    bad = good.clone()
    bad[1, 0] = 0.5
    mcmc = MCMC(kernel, 1, 0, {"x": bad}, num_chains=2, disable_progbar=True)
    with pytest.raises(ValueError, match=r"initial_params\['x'\] must hold the values \[\["):
        mcmc.run()


@pytest.mark.parametrize("how", ["capture", pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gibbs", "dmala"])
def test_compiled_draws_are_the_eager_ones(name, how):
    def run(jit_compile):
        pyro.set_rng_seed(5)
        kernel = KERNELS[name]()
        kernel.model, kernel.jit_compile = target("one-hot"), jit_compile
        mcmc = MCMC(kernel, 20, 10, num_chains=3, disable_progbar=True)
        mcmc.run()
        assert bool(kernel._engine._graphs) == bool(jit_compile)
        return mcmc.get_samples()["x"]

    assert torch.equal(run(how), run(False))
