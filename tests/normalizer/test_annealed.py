"""Annealing is unbiased, biased in its log as theory says, and a sandwich in both directions."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.mcmc import (
    CompositeKernel,
    DiscreteLangevinKernel,
    Flip,
    GibbsKernel,
    GibbsWithGradientsKernel,
    Info,
    TemperingKernel,
    TransitionKernel,
)
from pyro_ebm.normalizer import AnnealingPath, UnreliableEstimateWarning, estimate_log_normalizer
from pyro_ebm.normalizer.annealing.choices import kernel_of, path_of
from tests.normalizer.targets import assert_agrees, funnel, gaussian, wells
from tests.statistics import SIGMAS

# an estimate whose weights are few says so, as it should
FEW_WEIGHTS = pytest.mark.filterwarnings(
    "ignore::pyro_ebm.normalizer.estimate_result.UnreliableEstimateWarning"
)


def ais(p, method="ais", **kwargs):
    return estimate_log_normalizer(p, method, disable_progbar=True, **kwargs)


# -- the law of its bias, N(0, 1) -> N(0, 1 / 100) in 50 dimensions, exact draws at each level ---


class Independent(TransitionKernel):
    """Draws anew from N(0, 1 / (1 + 99 beta)), the density at each temperature."""

    needs_grad = False

    def __init__(self):
        super().__init__(adapt_step_size=False, adapt_mass_matrix=False)

    def draw(self, state):
        return (torch.randn_like(state.z) / (1 + 99 * self.potential.beta).sqrt(),)

    def transition(self, state, z):
        new = self.evaluate(z.to(state.z.dtype))
        accepted = torch.ones_like(new.potential)
        return new, Info(accepted, torch.zeros_like(accepted, dtype=torch.bool))


class Narrowing(AnnealingPath):
    """The same densities, written as a path without constants."""

    def sample(self, num):
        return torch.randn(num, self.dim)

    def parts(self, z):
        return (z.square().sum(-1) / 2,)

    def combine(self, *parts):
        return (1 + 99 * self.beta) * parts[0]


NARROW = UnnormalizedEnergy(lambda x: 50 * x.square().sum(-1), event_shape=(50,))
LOG_Z = 25 * math.log(2 * math.pi / 100)


def law(steps, dim=50):
    """The exact mean and variance of log w - log Z."""
    # log w = - (99 / 2) sum_k |z_k|^2 / K, with |z_k|^2 ~ chi^2_d / (1 + 99 k / K)
    variances = 1 / (1 + 99 * torch.arange(steps, dtype=torch.float64) / steps)
    mean = -49.5 * dim * variances.sum() / steps - dim / 2 * math.log(1 / 100)
    return float(mean), float(49.5**2 * 2 * dim * variances.square().sum() / steps**2)


def test_the_law_is_that_of_the_literature():
    assert law(100) == pytest.approx((-14.145, 40.28), rel=2e-4)
    assert law(1000) == pytest.approx((-1.2455, 2.577), rel=2e-4)


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("way", ["proposal", "path"])
def test_the_bias_law(steps, way):
    start = {
        "proposal": {"proposal": dist.Normal(torch.zeros(50), 1.0).to_event(1)},
        "path": {"path": Narrowing(NARROW, 25 * math.log(2 * math.pi))},
    }[way]
    n, betas = 1000, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        estimate = ais(NARROW, kernel=Independent(), betas=betas, num_chains=n, **start)
    mean, variance = law(steps)
    gap = estimate.log_weights.double() - LOG_Z
    assert abs(gap.mean() - mean) < SIGMAS * math.sqrt(variance / n)
    # a chi-squared sum is nearly normal, whose variance has the relative error sqrt(2 / n)
    assert abs(gap.var() / variance - 1) < SIGMAS * math.sqrt(2 / n)
    if steps == 1000:
        assert_agrees(estimate, LOG_Z)


def test_weights_too_few_for_a_mean_are_told():
    betas = torch.linspace(0, 1, 101)
    with pytest.warns(UnreliableEstimateWarning, match=r"effective sample size .* too low"):
        ais(NARROW, kernel=Independent(), betas=betas, path=Narrowing(NARROW, 0.0))


def test_the_mean_weight_is_unbiased_however_badly_the_chains_mix():
    # a kernel that stands still: annealing is importance sampling, with the same weights
    p = UnnormalizedEnergy(lambda x: 2 * x**2)
    kernel = LangevinKernel(step_size=1e-12, adapt_step_size=False, adapt_mass_matrix=False)
    estimate = ais(
        p, kernel=kernel, proposal=dist.Normal(0.0, 1.0), betas=[0, 0.2, 0.7, 1], num_chains=20_000
    )
    assert_agrees(estimate, math.log(math.pi / 2) / 2)
    exact = estimate.log_weights + 0  # log p~ - log q of the start
    assert exact.max() <= math.log(2 * math.pi) / 2 + 1e-4


# -- kernels, supports, batches ------------------------------------------------------------------

EDGES = lattice_edges(3, 3)


@pytest.mark.parametrize(
    "kernel",
    [
        None,
        GibbsKernel(),
        GibbsWithGradientsKernel(),
        DiscreteLangevinKernel(),
        MHKernel(proposal=Flip()),
        CompositeKernel(kernels=[GibbsWithGradientsKernel(), GibbsKernel()]),
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_discrete_kernels(kernel):
    p = BoltzmannMachine(0.3, torch.randn(9), edges=EDGES)
    assert_agrees(ais(p, kernel=kernel, num_temperatures=60), p.exact_log_normalizer())


@pytest.mark.parametrize(
    "kernel",
    [
        LangevinKernel(),
        LangevinKernel(full_mass=True),
        LangevinKernel(step_size=0.3, adapt_step_size=False, adapt_mass_matrix=False),
        MHKernel(),
        pytest.param(LangevinKernel(jit_compile=True), marks=pytest.mark.slow),
    ],
    ids=["diagonal", "dense", "fixed", "walk", "compiled"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_continuous_kernels(kernel):
    p, log_z, _ = gaussian(4, 10.0)
    assert_agrees(ais(p, kernel=kernel, num_temperatures=40), log_z)


SUPPORTS = {
    "positive": (constraints.positive, (), lambda x: 2 * x - x.log(), math.log(1 / 4)),
    "interval": (constraints.interval(-1.0, 2.0), (), lambda x: 0 * x, math.log(3.0)),
    "simplex": (constraints.simplex, (3,), lambda x: -x[..., 0].log(), math.log(1 / 6)),
    "bits": (constraints.boolean, (10,), lambda x: x.sum(-1), 10 * math.log(1 + math.exp(-1))),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports(name):
    support, event_shape, energy, log_z = SUPPORTS[name]
    p = UnnormalizedEnergy(energy, event_shape, support)
    assert_agrees(ais(p), log_z)


def test_a_base_is_the_start():
    base = dist.Bernoulli(0.3).expand([10]).to_event(1)
    p = UnnormalizedEnergy(lambda x: 2 * x.sum(-1), base=base)
    assert_agrees(ais(p), 10 * math.log(0.7 + 0.3 * math.exp(-2)))
    base = dist.Gamma(2.0, 1.0)
    p = UnnormalizedEnergy(lambda x: x, base=base)  # Gamma(2, 2) times 1 / 4
    assert_agrees(ais(p), math.log(1 / 4))


def test_a_batch_has_an_estimate_for_each():
    precision = torch.tensor([[0.1], [1.0], [10.0]])
    mean = torch.tensor([5.0, 0.0])
    p = UnnormalizedEnergy(lambda x: precision * (x - mean) ** 2 / 2, batch_shape=(3, 2))
    estimate = ais(p, num_chains=500)
    assert estimate.log_weights.shape == (500, 3, 2)
    for field in (estimate.value, estimate.std_error, estimate.ess, estimate.pareto_k):
        assert field.shape == (3, 2)
    assert_agrees(estimate, (0.5 * (2 * math.pi / precision).log()).expand(3, 2))
    assert p.normalized(estimate).log_prob(mean.expand(3, 2)).shape == (3, 2)


def test_a_batch_of_machines():
    couplings = torch.tensor([[0.1], [0.3], [-0.3]])
    p = BoltzmannMachine(couplings, edges=EDGES)
    assert_agrees(ais(p, num_temperatures=30), p.exact_log_normalizer())


def test_elements_of_a_plate_share_one_estimate():
    p = UnnormalizedEnergy(lambda x: x**2 / 2).expand((4,))
    estimate = ais(p, num_chains=100)
    assert estimate.value.shape == (4,)
    assert estimate.log_weights.shape == (100, 4)
    assert (estimate.value == estimate.value[0]).all()


def test_float64():
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1)
    p = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, (2,))
    estimate = ais(p, proposal=base)
    assert estimate.value.dtype == estimate.log_weights.dtype == torch.float64
    assert_agrees(estimate, math.log(2 * math.pi))


def test_densities_that_are_0_in_places():
    p = UnnormalizedEnergy(lambda x: torch.where(x > 0, x, torch.inf))
    estimate = ais(p, proposal=dist.Normal(0.0, 2.0))
    assert_agrees(estimate, 0.0)
    assert abs(estimate.zeros - 0.5) < SIGMAS * 0.5 / math.sqrt(1000)


# -- temperatures --------------------------------------------------------------------------------


def test_the_ladder_is_told_and_can_be_used_again():
    p = wells(1)
    first = ais(p, num_temperatures=50)
    assert len(first.betas) == 50
    again = ais(p, betas=first.betas)
    assert torch.equal(again.betas, first.betas)
    coarse, fine = (ais(p, ess_drop=drop).betas for drop in (0.01, 0.002))
    # a drop of d goes as far as sqrt(d)
    assert 1.5 < len(fine) / len(coarse) < 3.5


def test_the_default_ladder_keeps_the_variance_small():
    p, log_z, _ = gaussian(10, 100.0)
    estimate = ais(p)
    assert_agrees(estimate, log_z)
    assert 0.2 < estimate.ess / 1000 < 0.9


@FEW_WEIGHTS
def test_more_transitions_at_each_temperature_help():
    p, _, _ = gaussian(20, 100.0)
    few, many = (ais(p, num_temperatures=120, num_steps=k, num_chains=1000).ess for k in (1, 5))
    assert many > 1.5 * few


# -- the sandwich --------------------------------------------------------------------------------


@FEW_WEIGHTS
def test_the_sandwich_holds_and_closes():
    p = BoltzmannMachine(0.4, torch.randn(9), edges=EDGES)
    log_z, draws = p.exact_log_normalizer(), p.exact_sample((1000,))
    widths = []
    for num in (8, 80):
        estimate = ais(p, samples=draws, num_temperatures=num)
        # how far expectations of the two are apart is the two variances' half sum, about
        reverse = ais(p, "reverse_ais", samples=draws, num_temperatures=num)
        widths.append(-estimate.log_weights.mean() - reverse.log_weights.mean())
        assert estimate.lower <= log_z + SIGMAS * estimate.std_error
        assert estimate.upper >= log_z - SIGMAS * reverse.std_error
        assert reverse.lower is None
        assert reverse.value is reverse.upper
        assert_agrees(reverse, log_z)
    assert widths[0] > 3 * widths[1] > 0


def test_reverse_weights_are_of_the_inverse():
    p, log_z, draws = gaussian(3, 4.0)
    estimate = ais(p, "reverse_ais", samples=draws)
    value = estimate.log_weights.logsumexp(0) - math.log(len(draws))
    assert torch.allclose(-value, estimate.value)
    assert_agrees(estimate, log_z)


def test_what_is_called_a_bound():
    p, _, draws = gaussian(3, 4.0)
    betas = torch.linspace(0, 1, 12)  # the same for all, so that their errors are alike
    vouched, not_so = (
        ais(p, samples=draws, exact_samples=exact, betas=betas) for exact in (True, False)
    )
    assert "upper bound" in repr(vouched)
    assert vouched.exact_samples
    assert "upper bound" not in repr(not_so)
    assert "a bound only from exact draws" in repr(not_so)
    for estimate in (vouched, not_so):
        reverse = ais(p, "reverse_ais", samples=draws, betas=betas)
        assert 0.5 < estimate.upper_error / reverse.std_error < 2
        assert f"lower bound {float(estimate.value):.3f} +- 0.0" in repr(estimate)
    assert "lower bound" not in repr(reverse)
    with pytest.raises(ValueError, match=r"exact_samples=True says.*give samples="):
        ais(p, exact_samples=True)


@pytest.mark.filterwarnings("ignore:reverse annealing. the weights")
def test_samples_of_another_density_are_told():
    p, _, draws = gaussian(3, 4.0)
    with pytest.warns(UnreliableEstimateWarning, match="exceeds the upper one"):
        ais(p, samples=3 + draws)


@pytest.mark.filterwarnings("ignore:reverse annealing. the weights")
def test_chains_that_miss_a_mode_are_told_by_the_other_direction():
    # two far modes, of which the start knows one
    p = UnnormalizedEnergy(lambda x: 2 * (x.abs() - 10) ** 2)
    draws = 10 * torch.randn(500).sign() + 0.5 * torch.randn(500)
    start, betas = dist.Normal(10.0, 1.0), torch.linspace(0, 1, 20)
    with pytest.warns(UnreliableEstimateWarning, match="nats apart"):
        estimate = ais(p, samples=draws, proposal=start, betas=betas)
    truth = 0.5 * math.log(math.pi / 2) + math.log(2.0)
    # below by log 2, the mode that is missed; above is the log of that mode's share of the draws,
    # one half with an error of .022, so that it lies within 4.5 times .045 of the truth
    assert estimate.lower < truth - 0.4
    assert estimate.upper > truth - 0.2


def test_a_conditional_energy_in_reverse():
    precision = torch.tensor([0.5, 2.0])
    p = UnnormalizedEnergy(lambda x: precision * x**2 / 2, batch_shape=(2,))
    draws = torch.randn(800, 2) / precision.sqrt()
    # few temperatures would do forwards, and leave the weights in reverse a heavy tail
    estimate = ais(p, samples=draws, betas=torch.linspace(0, 1, 20))
    assert estimate.upper.shape == (2,)
    truth = 0.5 * (2 * math.pi / precision).log()
    assert_agrees(estimate, truth)
    assert (estimate.upper - truth > -SIGMAS * 2 * estimate.std_error).all()


# -- what will not do ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:annealing. the weights")
def test_a_density_narrower_than_the_steps_is_told():
    p, _ = funnel(10)
    with pytest.warns(UnreliableEstimateWarning, match="hardly moves"):
        ais(p, num_chains=100, num_temperatures=50)


@pytest.mark.filterwarnings("ignore:annealing. LangevinKernel hardly moves")
def test_an_improper_density_has_no_confident_number():
    p = UnnormalizedEnergy(lambda x: -(x**2) / 4)
    few = pytest.warns(UnreliableEstimateWarning, match="effective sample size")
    with pytest.warns(UnreliableEstimateWarning, match="no finite Z"), few:
        ais(p, proposal=dist.Normal(0.0, 1.0), num_temperatures=100)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: torch.where(x > 0, x**2, torch.nan), r"[45]\d.*% of the weights .* NaN"),
        (lambda x: torch.full_like(x, torch.inf), "100% of the weights of annealing are 0"),
        (lambda x: torch.full_like(x, -torch.inf), "infinite"),
    ],
)
def test_weights_without_a_mean(energy, message):
    with pytest.raises(ValueError, match=message):
        ais(UnnormalizedEnergy(energy), proposal=dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (LangevinKernel(adjusted=False), "adjusted=False does not leave"),
        (LangevinKernel(temperature=0.5), "temperature of its own"),
        (TemperingKernel(LangevinKernel(), [1.0, 0.5]), "replicas do not anneal"),
    ],
)
def test_kernels_that_leave_another_density_invariant(kernel, message):
    with pytest.raises(ValueError, match=message):
        ais(wells(1), kernel=kernel)


def test_no_kernel_at_all():
    with pytest.raises(TypeError, match=r"must be a pyro_ebm.mcmc.Kernel"):
        ais(wells(1), kernel="langevin")


def test_the_energys_own_kernel_is_used_if_it_is_exact():
    own = MHKernel()
    for kernel, used in {own: MHKernel, LangevinKernel(adjusted=False): LangevinKernel}.items():
        p = UnnormalizedEnergy(lambda x: x**2 / 2, kernel=kernel)
        chosen = kernel_of(None, p, path_of(p, dist.Normal(0.0, 1.0)))
        assert type(chosen) is used
        assert getattr(chosen, "adjusted", True)


def test_a_compiled_kernel_cannot_follow_a_function():
    p = UnnormalizedEnergy(lambda x: x**2 / 8)
    with pytest.raises(ValueError, match="write an AnnealingPath"):
        ais(
            p,
            path=lambda beta: UnnormalizedEnergy(lambda x: x**2 / (2 + 6 * beta)),
            proposal=dist.Normal(0.0, 1.0),
            kernel=LangevinKernel(jit_compile=True),
        )


def test_a_function_anneals():
    p = UnnormalizedEnergy(lambda x: 50 * x**2)
    estimate = ais(
        p,
        path=lambda beta: UnnormalizedEnergy(lambda x: 100**beta * x**2 / 2),
        proposal=dist.Normal(0.0, 1.0),
    )
    assert_agrees(estimate, math.log(math.pi / 50) / 2)


def test_the_progress_bar_is_for_long_runs(capsys):
    p = UnnormalizedEnergy(lambda x: x**2 / 2)
    estimate_log_normalizer(p, "ais", num_chains=100, num_temperatures=5)
    assert capsys.readouterr().err == ""
