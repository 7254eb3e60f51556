"""Draws of an energy by short chains, against closed forms, and what they tell of themselves."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import gelman_rubin
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.diagnostics import ConvergenceWarning
from pyro_ebm.distributions import mixture
from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.mcmc import MCMC, ChainDiagnostics, CompositeKernel, LangevinKernel, MHKernel
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.sample_watch import SampleWatch

HOT_PAIR = CompositeKernel(kernels=[LangevinKernel(temperature=2.0)] * 2)


def assert_moments(x, mean, variance):
    """Independent draws in the first dimension have these moments, within 5 standard errors."""
    n = x.shape[0]
    mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
    assert ((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    square = (x - mean).square()
    assert ((square.mean(0) - variance).abs() < 5 * square.std(0) / n**0.5).all()


def gaussian(x):
    return x.square() / 2


# -- temperature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [LangevinKernel(temperature=0.5), HOT_PAIR])
def test_draws_are_at_temperature_1(kernel):
    p = UnnormalizedEnergy(gaussian, kernel=kernel)
    for draw in (p.sample, p.sample_with_diagnostics, mixture([1.0], [p], True).sample):
        with pytest.raises(ValueError, match=r"has temperature=.*energy\.tempered\(1 / T\)"):
            draw((3,))
    # a prototype is no draw; and contrastive divergence says what its short runs are
    with starting_points_only():
        assert p.sample((3,)).shape == (3,)
    p.kernel = None
    assert_moments(p.tempered(2.0).sample((2000,)), 0.0, 0.5)


# -- moments -----------------------------------------------------------------------------------


def test_scales_of_a_hundred_to_one():
    """The default kernel forgets its start in the widest of 50 coordinates, which Langevin's steps
    of a length that suits the narrowest do not: 2 to 25 % of the variance after a hundred."""
    scales = torch.logspace(-1, 1, 50)
    x = UnnormalizedEnergy(lambda x: (x / scales).square().sum(-1) / 2, (50,)).sample((200,))
    ratio = x.square().mean(0) / scales**2  # of mean 1 and sd .1 in exact draws
    assert 0.5 < ratio[-1] < 1.7
    assert 0.85 < ratio.mean() < 1.15


@pytest.mark.parametrize("slope", [0.0, 1.0, 1e6])
def test_chains_of_an_improper_density_wander_for_a_bounded_time(slope):
    """As those of a network without a base: there is no right answer, but one in time."""
    calls = []

    def energy(x):
        calls.append(x)
        return slope * x.sum(-1)

    x = UnnormalizedEnergy(energy, (2,)).sample((20,))
    assert x.isfinite().all()
    assert len(calls) < 3500  # a hundred trajectories of 15 steps in the mean, and a few more


def test_correlated_gaussian():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    precision = covariance.inverse()
    p = UnnormalizedEnergy(lambda x: ((x @ precision) * x).sum(-1) / 2, event_shape=(2,))
    x = p.sample((2000,))
    assert x.shape == (2000, 2)
    assert_moments(x, torch.zeros(2), covariance.diag())
    product = x.prod(-1)
    assert (product.mean() - 0.6).abs() < 5 * product.std() / len(x) ** 0.5


@pytest.mark.parametrize(
    ("energy", "support", "truth"),
    [
        (lambda x: 2 * x - 2 * x.log(), constraints.positive, dist.Gamma(3.0, 2.0)),
        (
            lambda x: -x.log() - 2 * (1 - x).log(),
            constraints.unit_interval,
            dist.Beta(2.0, 3.0),
        ),
        (
            lambda x: -(x + 1).log() - 2 * (3 - x).log(),  # Beta(2, 3) stretched to (-1, 3)
            constraints.interval(-1.0, 3.0),
            dist.TransformedDistribution(
                dist.Beta(2.0, 3.0), [torch.distributions.AffineTransform(-1.0, 4.0)]
            ),
        ),
        (
            lambda x: (2 - x) - 2 * (2 - x).log(),  # 2 - Gamma(3, 1)
            constraints.less_than(2.0),
            dist.TransformedDistribution(
                dist.Gamma(3.0, 1.0), [torch.distributions.AffineTransform(2.0, -1.0)]
            ),
        ),
    ],
)
def test_constrained_supports(energy, support, truth):
    p = UnnormalizedEnergy(energy, support=support)
    x = p.sample((2000,))
    assert support.check(x).all()
    exact = truth.sample((200_000,))
    assert_moments(x, exact.mean(), exact.var())


def test_simplex():
    concentration = torch.tensor([2.0, 3.0, 5.0])
    truth = dist.Dirichlet(concentration)
    p = UnnormalizedEnergy(
        lambda x: -((concentration - 1) * x.log()).sum(-1), (3,), constraints.simplex
    )
    x = p.sample((2000,))
    assert_close(x.sum(-1), torch.ones(2000))
    assert_moments(x, truth.mean, truth.variance)


def test_a_tilt_is_sampled_from_its_base():
    # N(0, 1) exp(-(x - 2)^2 / 2) is N(1, 1/2)
    p = UnnormalizedEnergy(lambda x: (x - 2).square() / 2, base=dist.Normal(0.0, 1.0))
    assert_moments(p.sample((2000,)), 1.0, 0.5)


def test_each_batch_element_at_its_own_scale():
    scale = torch.tensor([0.01, 1.0, 100.0])
    mean = torch.tensor([5.0, 0.0, -300.0])
    p = UnnormalizedEnergy(
        lambda x: ((x - mean) / scale).square() / 2, batch_shape=(3,), num_steps=300
    )
    x = p.sample((1000,))
    assert x.shape == (1000, 3)
    assert_moments((x - mean) / scale, torch.zeros(3), torch.ones(3))


def test_bounds_of_the_batchs_shape():
    low = torch.tensor([0.0, 10.0, -50.0])
    p = UnnormalizedEnergy(
        lambda x: x - low, support=constraints.greater_than(low), batch_shape=(3,)
    )
    assert_moments(p.sample((2000,)) - low, torch.ones(3), torch.ones(3))


def test_multidimensional_batch_and_event():
    mean = torch.arange(4.0).reshape(2, 2, 1, 1)
    p = UnnormalizedEnergy(
        lambda x: (x - mean).square().sum((-2, -1)) / 2, event_shape=(3, 2), batch_shape=(2, 2)
    )
    x = p.sample((30, 20))
    assert x.shape == (30, 20, 2, 2, 3, 2)
    assert_moments(x.flatten(0, 1), mean.expand(2, 2, 3, 2), torch.ones(2, 2, 3, 2))


@pytest.mark.parametrize(
    "kernel",
    [
        MHKernel(),
        LangevinKernel(full_mass=True),
        LangevinKernel(step_size=0.05, adjusted=False),
    ],
)
def test_any_kernel(kernel):
    p = UnnormalizedEnergy(gaussian, kernel=kernel, num_steps=200)
    # ULA's stationary variance is 1 / (1 - eps / 2)
    variance = 1 / (1 - 0.025) if not getattr(kernel, "adjusted", True) else 1.0
    assert_moments(p.sample((2000,)), 0.0, variance)
    with pytest.raises(RuntimeError, match="not bound"):  # the user's kernel has seen nothing
        _ = kernel.adaptation


# -- starts, seeds, gradients, modes -----------------------------------------------------------


def test_chains_start_at_the_base():
    # two far modes: chains stay where the base puts them
    def wells(x):
        return torch.minimum((x - 50).square(), (x + 50).square()) / 2

    right = UnnormalizedEnergy(wells, base=dist.Normal(50.0, 20.0))
    assert (right.sample((200,)) > 0).double().mean() > 0.95
    left = UnnormalizedEnergy(wells, base=dist.Normal(-50.0, 20.0))
    assert (left.sample((200,)) < 0).double().mean() > 0.95


def test_a_base_wider_than_the_support():
    p = UnnormalizedEnergy(  # a half-normal in each of ten dimensions
        lambda x: torch.zeros_like(x).sum(-1),
        base=dist.Normal(torch.zeros(10), 1.0).to_event(1),
        support=constraints.positive,
    )
    x = p.sample((1000,))
    mean = (2 / torch.pi) ** 0.5
    assert (x > 0).all()
    assert_moments(x, torch.full((10,), mean), torch.full((10,), 1 - mean**2))


def test_same_seed_same_draws():
    p = UnnormalizedEnergy(gaussian)
    pyro.set_rng_seed(3)
    first = p.sample((5,))
    second = p.sample((5,))
    pyro.set_rng_seed(3)
    assert torch.equal(p.sample((5,)), first)
    assert not torch.equal(first, second)


class Noisy(nn.Module):
    """N(0, 1) while evaluating; nonsense while training."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.dropout = nn.Dropout(0.9)
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.frozen = nn.Linear(1, 1).eval()
        self.trained_mode = []

    def forward(self, x):
        self.trained_mode.append(self.training or self.dropout.training)
        y = self.norm(x[..., None].reshape(-1, 1)).reshape(x.shape + (1,))
        return self.dropout(self.weight * y).square().sum(-1) / 8


def test_modules_are_evaluated_and_put_back():
    net = Noisy()
    p = UnnormalizedEnergy(lambda x: net(x))
    x = p.sample((2000,))
    assert not any(net.trained_mode)
    assert net.training
    assert net.dropout.training
    assert not net.frozen.training
    assert_close(net.norm.running_var, torch.ones(1))  # learned nothing from the chains
    assert_moments(x, 0.0, 1.0)


def test_draws_carry_and_leave_no_gradient():
    net = Noisy()
    bound = torch.zeros((), requires_grad=True)
    mean = torch.ones((), requires_grad=True)
    tilt = UnnormalizedEnergy(net, base=dist.Normal(mean, 1.0))
    bounded = UnnormalizedEnergy(lambda x: x, support=constraints.greater_than(bound))
    for p in (tilt, bounded):
        for x in (p.sample((3,)), p.starting_points((3,)), p.sample_with_diagnostics((3,))[0]):
            assert not x.requires_grad
    for leaf in (*net.parameters(), bound, mean):
        assert leaf.grad is None


def test_works_without_gradients_and_in_inference_of_them():
    p = UnnormalizedEnergy(gaussian)
    with torch.no_grad():
        x = p.sample((2000,))
        assert not torch.is_grad_enabled()
    assert_moments(x, 0.0, 1.0)


# -- shapes and bad input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample_shape", "batch_shape", "event_shape"),
    [((), (), ()), ((), (2,), (3,)), ((2, 3), (), (1,)), ((0,), (2,), ()), ((2,), (0,), (3,))],
)
def test_shapes(sample_shape, batch_shape, event_shape):
    def energy(x):
        return x.square().sum(-1) if event_shape else x.square()

    p = UnnormalizedEnergy(energy, event_shape, batch_shape=batch_shape, num_steps=4)
    assert p.sample(sample_shape).shape == sample_shape + batch_shape + event_shape
    x, diagnostics = p.sample_with_diagnostics(sample_shape)
    assert x.shape == sample_shape + batch_shape + event_shape
    for tensor in diagnostics[:-1]:
        assert tensor.shape == batch_shape


def test_one_step():
    x, diagnostics = UnnormalizedEnergy(gaussian, num_steps=1).sample_with_diagnostics((3,))
    assert x.shape == (3,)
    assert diagnostics.r_hat.isnan()  # one state a chain says nothing
    assert 0 <= diagnostics.acceptance_rate <= 1


@pytest.mark.parametrize("support", [constraints.boolean, constraints.integer_interval(0, 3)])
def test_discrete_supports_move_by_gibbs(support):
    p = UnnormalizedEnergy(lambda x: x, support=support)  # p(k) prop. to exp(-k)
    x = p.sample((4000,))
    values = x.unique()
    want = (-values).softmax(0)
    got = torch.stack([(x == v).float().mean() for v in values])
    assert ((got - want).abs() < 4.5 * (want * (1 - want) / 4000).sqrt()).all()
    moved = UnnormalizedEnergy(lambda x: x, support=support, kernel=LangevinKernel())
    with pytest.raises(ValueError, match=r"moves continuous sites, and \['x'\] are not: use Gibbs"):
        moved.sample((3,))


def test_the_kernel_must_be_ours():
    from pyro.infer import NUTS

    p = UnnormalizedEnergy(gaussian, kernel=NUTS(potential_fn=gaussian))
    with pytest.raises(TypeError, match=r"kernel must be a pyro_ebm.mcmc.Kernel.* got .*NUTS"):
        p.sample()


def test_an_energy_that_is_never_finite_is_an_error():
    with pytest.raises(ValueError, match="no starting point with a finite potential"):
        UnnormalizedEnergy(lambda x: x * torch.nan).sample((3,))


def test_an_energy_that_is_sometimes_nan_is_a_wall():
    def half(x):  # N(0, 1) on x > 0
        return torch.where(x > 0, x.square() / 2, torch.nan)

    x, diagnostics = UnnormalizedEnergy(half, num_steps=300).sample_with_diagnostics((2000,))
    mean = (2 / torch.pi) ** 0.5
    assert (x > 0).all()
    assert diagnostics.num_divergences > 0
    assert_moments(x, mean, 1 - mean**2)


# -- diagnostics -------------------------------------------------------------------------------


def test_good_chains_look_good():
    p = UnnormalizedEnergy(gaussian, num_steps=200)
    x, diagnostics = p.sample_with_diagnostics((200,))
    assert isinstance(diagnostics, ChainDiagnostics)
    assert x.shape == (200,)
    assert diagnostics.r_hat < 1.05
    assert diagnostics.ess > 1000
    assert diagnostics.acceptance_rate > 0.574
    assert diagnostics.step_size > 0
    assert diagnostics.num_divergences == 0


def test_separated_modes_are_flagged_where_they_are():
    centre = torch.tensor([0.0, 20.0])

    def wells(x):
        return torch.minimum((x - centre).square(), (x + centre).square()) / 2

    p = UnnormalizedEnergy(wells, base=dist.Normal(torch.zeros(2), 20.0), num_steps=200)
    _, diagnostics = p.sample_with_diagnostics((100,))
    assert diagnostics.r_hat.shape == (2,)
    assert diagnostics.r_hat[0] < 1.1
    assert diagnostics.r_hat[1] > 2
    assert diagnostics.ess[1] < diagnostics.ess[0]


def test_chains_that_never_move_are_flagged():
    kernel = LangevinKernel(step_size=1e6, adapt_step_size=False, adapt_mass_matrix=False)
    p = UnnormalizedEnergy(lambda x: x.square() * 1e6, kernel=kernel)
    _, diagnostics = p.sample_with_diagnostics((10,))
    assert diagnostics.acceptance_rate == 0
    assert diagnostics.r_hat > 2
    assert diagnostics.num_divergences > 0
    # all at one point they agree, but not with a density that is not a point
    stuck = UnnormalizedEnergy(gaussian, base=dist.Delta(torch.tensor(1.0)))
    assert stuck.sample_with_diagnostics((10,))[1].r_hat == torch.inf


def test_the_worst_element_of_the_event_counts():
    def wells(x):
        second = torch.minimum((x[..., 1] - 20).square(), (x[..., 1] + 20).square())
        return (x[..., 0].square() + second) / 2

    base = dist.Normal(torch.zeros(2), torch.tensor([1.0, 20.0])).to_event(1)
    kernel = LangevinKernel(adapt_mass_matrix=False)  # so that the first element mixes well
    p = UnnormalizedEnergy(wells, base=base, kernel=kernel, num_steps=200)
    _, diagnostics = p.sample_with_diagnostics((100,))
    assert diagnostics.r_hat > 2
    assert diagnostics.ess < 500


# -- what draws say of themselves --------------------------------------------------------------


def four_modes(x):
    """Modes at (+-2, +-2), a hundred of their widths apart."""
    return 20 * (x.square() - 4).square().sum(-1)


def test_chains_in_far_modes_are_told():
    p = UnnormalizedEnergy(four_modes, event_shape=(2,))
    with pytest.warns(ConvergenceWarning, match=r"R-hat is \d\d.*where chains start.*num_steps="):
        p.sample((50,))
    p.sample_with_diagnostics((50,))  # whose R-hat is in the user's hands
    p.sample((3,))  # too few to tell


def test_r_hat_is_that_of_the_draws():
    """Of a batch it is that of the worst element, and the limit is passed by it alone."""
    where = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-12.0, 12.0, -12.0, 12.0]]).T  # (chains, targets)
    p = UnnormalizedEnergy(gaussian, batch_shape=(2,))
    z = (where + torch.randn(50, 4, 2)).reshape(50, 8, 1)
    watch = SampleWatch(EnergyPotential(p), z[0])
    for draw in z:
        watch.add(draw)
    (found,) = watch.findings(z[-1])
    x = z.reshape(50, 4, 2).transpose(0, 1)
    want = gelman_rubin(x, chain_dim=0, sample_dim=1)
    assert float(found.text.split()[2].rstrip(":")) == pytest.approx(float(want[1]), rel=0.01)
    assert want[0] < 1.2


@pytest.mark.parametrize("sample_shape", [(), (20,)])
@pytest.mark.parametrize("energy", [lambda x: -(x**2), lambda x: -x, lambda x: 0 * x])
def test_chains_that_run_off_are_told(energy, sample_shape):
    with pytest.warns(ConvergenceWarning, match=r"ran off, .*no finite Z.*sign.*base="):
        UnnormalizedEnergy(energy).sample(sample_shape)


def test_far_is_not_off():
    """A density far from its starts, or with a heavy tail, falls further out."""
    UnnormalizedEnergy(lambda x: (x - 1000) ** 2 / 2).sample((20,))
    UnnormalizedEnergy(lambda x: (x / 1000).square().sum(-1) / 2, (3,)).sample((20,))
    p = UnnormalizedEnergy(lambda x: 1.5 * (1 + x.square().sum(-1)).log(), (2,))
    z = 1000 * torch.randn(20, 2)  # Cauchy's, in the plane: like 1 / r^3
    assert not SampleWatch(EnergyPotential(p), torch.randn(20, 2)).findings(z)


def test_a_run_of_the_wrong_sign_says_so():
    p = UnnormalizedEnergy(lambda x: -x.square().sum(-1), event_shape=(2,))
    mcmc = MCMC(LangevinKernel(p), 200, 100, num_chains=8, disable_progbar=True)
    with pytest.warns(ConvergenceWarning, match=r"rises all along\. Try another sign .* base="):
        mcmc.run()
