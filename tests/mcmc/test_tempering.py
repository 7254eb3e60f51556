"""Replica exchange: the product stays invariant, and chains cross where one alone does not."""

import json
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.mcmc import MCMC as PyroMCMC

from pyro_ebm import MCMC, UnnormalizedEnergy
from pyro_ebm.diagnostics import ConvergenceWarning
from pyro_ebm.distributions import RBM, GaussianRBM, spin
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.mcmc import (
    CompositeKernel,
    DiscreteLangevinKernel,
    EnergyPotential,
    Flip,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
    geometric_betas,
)
from pyro_ebm.mcmc.kernels.composed.tempering import TemperedPotential
from tests.enumeration import assert_counts, assert_draws, draws_of, number_of, states_of
from tests.statistics import SIGMAS, assert_mean

BETAS = [1.0, 0.5, 0.2]


def start_at(kernel, potential, replicas):
    """The state of replicas ``(chains, R, dim)`` of a bound kernel."""
    kernel.bind(potential, 0)
    return kernel._outward(kernel._inner.init(replicas.flatten(0, 1)))


def replicas_of(kernel, state):
    """All replicas, ``(chains, R, dim)``."""
    return state.replicas.z.unflatten(0, (-1, len(kernel.betas)))


def fixed(**kwargs):
    return LangevinKernel(adapt_step_size=False, adapt_mass_matrix=False, **kwargs)


def frustrated(x):
    return -1.5 * x[..., 0] * x[..., 1] - x[..., 0] + 0.5 * torch.sin(3 * x.sum(-1))


def machine():
    torch.manual_seed(3)
    return RBM(2 * torch.randn(2, 2), torch.randn(2), torch.randn(2))


# name: the kernel inside, and a target of four states
INSIDE = {
    "gibbs": (GibbsKernel, UnnormalizedEnergy(frustrated, (2,), spin)),
    "gwg": (GibbsWithGradientsKernel, UnnormalizedEnergy(frustrated, (2,), spin)),
    "dmala": (
        lambda: DiscreteLangevinKernel(adapt_step_size=False, step_size=1.0),
        UnnormalizedEnergy(frustrated, (2,), constraints.boolean),
    ),
    "flip": (lambda: MHKernel(proposal=Flip()), UnnormalizedEnergy(frustrated, (2,), spin)),
    "composite": (CompositeKernel, UnnormalizedEnergy(frustrated, (2,), spin)),
    "blocks": (
        GibbsKernel,
        BoltzmannMachine(0.8, torch.tensor([0.3, -1.0]), edges=torch.tensor([[0, 1]])),
    ),
    "blocks-that-temper-not": (GibbsKernel, machine()),
}


# -- invariance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSIDE)
def test_the_product_of_all_replicas_is_invariant(name):
    make, p = INSIDE[name]
    kernel, potential = TemperingKernel(make(), BETAS), EnergyPotential(p)
    states, log_p = states_of(potential)
    of_beta = [(beta * log_p).softmax(0) for beta in BETAS]
    num = 30_000
    start = torch.stack([draws_of(states, b * log_p, num) for b in BETAS], 1)
    state = start_at(kernel, potential, start)
    assert (kernel._tempered.blocks is not None) == (name == "blocks")
    for _ in range(3):  # rounds of even, odd and even pairs
        state, info = kernel.step(state)
        assert state.z.shape == (num, 2)
        assert info.accept_prob.shape == info.diverging.shape == (num,)
    end = replicas_of(kernel, state)
    assert (end != start).any(-1).float().mean(0).min() > 0.15
    number = sum(number_of(end[:, r], states) * 4 ** (2 - r) for r in range(3))
    joint = torch.einsum("i,j,k->ijk", *of_beta).flatten()
    assert_counts(number.bincount(minlength=64), joint)
    assert torch.equal(state.z, end[:, 0])


@pytest.mark.parametrize("name", ["gibbs", "gwg", "blocks"])
def test_potentials_and_gradients_travel_with_their_states(name):
    make, p = INSIDE[name]
    kernel, potential = TemperingKernel(make(), BETAS), EnergyPotential(p)
    kernel.bind(potential, 0)
    state = kernel.init(potential.initial(50))
    for _ in range(20):
        state, _ = kernel.step(state)
    value, grad = kernel._tempered.value_and_grad(state.replicas.z)
    torch.testing.assert_close(state.replicas.potential, value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.potential, potential(state.z), rtol=1e-4, atol=1e-4)
    if kernel.needs_grad:
        torch.testing.assert_close(state.replicas.grad, grad, rtol=1e-4, atol=1e-4)
    else:
        assert state.grad is None


MEANS, SCALES, Y = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, 1.5]), 1.2


def mixture():
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    x = pyro.sample("x", dist.Normal(MEANS[k], SCALES[k]))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(Y))


def test_a_model_of_both_kinds():
    """p(k, x | y)^beta: of x given k a Gaussian whose precision is beta times that of beta = 1."""
    precision = 1 + SCALES**-2
    center = (Y + MEANS / SCALES**2) / precision
    peak = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(MEANS, SCALES).log_prob(center)
    peak = peak + dist.Normal(center, 1.0).log_prob(torch.tensor(Y))
    num, start, of_beta = 20_000, [], []
    for beta in BETAS:
        of_beta.append((beta * peak - (beta * precision).log() / 2).softmax(0))
        k = dist.Categorical(of_beta[-1]).sample((num,))
        x = center[k] + torch.randn(num) / (beta * precision[k]).sqrt()
        start.append(torch.stack([k, x], -1))
    kernel = TemperingKernel(CompositeKernel(mixture, [GibbsKernel(), fixed(step_size=0.3)]), BETAS)
    state = start_at(kernel, kernel.make_potential(), torch.stack(start, 1))
    for _ in range(3):
        state, _ = kernel.step(state)
    end = replicas_of(kernel, state)
    for r, beta in enumerate(BETAS):
        k, x = end[:, r, 0].long(), end[:, r, 1]
        assert_counts(k.bincount(minlength=3), of_beta[r])
        uniform = dist.Normal(center[k], (beta * precision[k]) ** -0.5).cdf(x)
        assert_counts(
            (uniform * 10).long().clamp(max=9).bincount(minlength=10), torch.ones(10) / 10
        )


# -- the rates of exchange -------------------------------------------------------------------------


def test_swap_rates_are_those_of_gaussians():
    """Of N(0, I / beta), U = |z|^2 / 2 is a Gamma(d / 2) over beta."""
    dim, betas, num = 3, [1.0, 0.4, 0.1], 40_000
    p = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, (dim,))
    kernel = TemperingKernel(fixed(step_size=0.5), betas)
    scale = torch.tensor(betas)[:, None].rsqrt()
    state = start_at(kernel, EnergyPotential(p), scale * torch.randn(num, 3, dim))
    for _ in range(2):
        state, _ = kernel.step(state)
    u = dist.Gamma(dim / 2, torch.tensor(betas).double()).sample((1_000_000,))
    gap = -torch.tensor(betas).diff()
    want = (gap * (u[:, :-1] - u[:, 1:])).clamp(max=0).exp()
    error = want.std(0) / num**0.5
    assert ((kernel.swap_rates - want.mean(0)).abs() < SIGMAS * error).all()


def test_swap_rates_count_every_draw_and_no_warmup():
    p = UnnormalizedEnergy(torch.square)
    kernel = TemperingKernel(LangevinKernel(p), BETAS)
    with pytest.raises(RuntimeError, match="run first"):
        _ = kernel.swap_rates
    for warmup_steps in (0, 3):
        mcmc = MCMC(kernel, 2, warmup_steps, num_chains=5, disable_progbar=True)
        mcmc.run()
        assert kernel.swap_rates.shape == (2,)
        assert ((kernel.swap_rates > 0) & (kernel.swap_rates <= 1)).all()
        assert kernel._num_swaps.tolist() == [1, 1]


def test_a_ladder_that_is_too_coarse_is_the_cause_where_chains_do_not_agree():
    def found(energy, shape, betas):
        p = UnnormalizedEnergy(energy, shape)
        mcmc = MCMC(TemperingKernel(LangevinKernel(p), betas), 200, 100, num_chains=10)
        mcmc.disable_progbar = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mcmc.run()
        return {finding.kind: finding for finding in mcmc.findings}

    # nothing crosses between these wells at beta = 1
    coarse = found(lambda x: 20 * (x**2 - 1).square().sum(-1), (4,), [1.0, 0.01])
    assert coarse.keys() >= {"r_hat", "swaps"}
    assert "1 of 1 pairs of neighbours exchange at a rate below 0.2" in coarse["swaps"].text
    assert coarse["swaps"].remedies[0].startswith("more betas than 2")
    assert found(lambda x: x.square().sum(-1), (4,), [1.0, 1e-4]) == {}  # rare, and not needed


# -- what it is for --------------------------------------------------------------------------------


def double_well(x):
    return x[..., 0] ** 4 - 6 * x[..., 0] ** 2 - x[..., 0] / 2 + x[..., 1] ** 2 / 2


def test_the_double_well():
    """P(x > 0) = .84431; chains that start in the left well stay there without exchange."""
    p = UnnormalizedEnergy(double_well, (2,))
    start = {"x": torch.tensor([-1.7, 0.0]).expand(80, 2)}

    def right(kernel):
        mcmc = MCMC(kernel, 300, 200, start, num_chains=80, disable_progbar=True)
        mcmc.run()
        return (mcmc.get_samples(group_by_chain=True)["x"][..., 0] > 0).float()

    assert (right(LangevinKernel(p)).mean(1) == 0).float().mean() > 0.5  # most have never crossed
    kernel = TemperingKernel(LangevinKernel(p), geometric_betas(0.1, 5))
    crossed = right(kernel)
    assert_mean(crossed, 0.84431)
    assert ((crossed.mean(1) > 0.5) & (crossed.mean(1) < 1)).all()  # each chain by itself
    assert kernel.swap_rates.min() > 0.2


def test_a_cold_ising_model():
    """Far below the critical temperature, the magnetization of Gibbs sweeps keeps its sign."""
    p = BoltzmannMachine(0.7, edges=lattice_edges(4, 4))
    start = {"x": torch.ones(80, 16)}

    def magnetization(kernel):
        mcmc = MCMC(kernel, 100, 100, start, num_chains=80, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples(group_by_chain=True)["x"].mean(-1)

    assert (magnetization(GibbsKernel(p)).mean(1) > 0.9).float().mean() > 0.5  # most
    m = magnetization(TemperingKernel(GibbsKernel(p), geometric_betas(0.2, 6)))
    states, log_p = states_of(EnergyPotential(p))
    probability, exact = log_p.double().softmax(0), states.mean(-1).double()
    assert_mean(m, 0.0)
    assert_mean(m.abs(), (probability * exact.abs()).sum())
    assert_mean(m == 1, probability[-1])
    assert_mean(m == -1, probability[0])


def test_draws_of_batched_energies():
    """Each row of the batch with its own replicas: two pairs of wells, at their own scales."""
    scale = torch.tensor([1.0, 30.0])
    p = UnnormalizedEnergy(
        lambda x: (x / scale) ** 4 - 6 * (x / scale) ** 2 - x / scale / 2,
        batch_shape=(2,),
        kernel=TemperingKernel(LangevinKernel(), geometric_betas(0.1, 5)),
        num_steps=400,
    )
    x, diagnostics = p.sample_with_diagnostics((1000,))
    right = (x > 0).float()
    error = (right.mean(0) - 0.84431) / (right.std(0) / 1000**0.5)
    assert (error.abs() < SIGMAS).all()
    assert diagnostics.step_size.shape == (2,)
    assert diagnostics.acceptance_rate.min() > 0.4
    assert (diagnostics.step_size != 0.1).all()


def test_draws_of_batched_discrete_energies():
    weight = torch.tensor([[3.0, 0.5], [-2.0, 1.0]])
    p = UnnormalizedEnergy(
        lambda x: -weight[:, 0] * x[..., 0] * x[..., 1] - weight[:, 1] * x.sum(-1),
        (3,),
        spin,
        batch_shape=(2,),
        kernel=TemperingKernel(GibbsKernel(), [1.0, 0.4]),
        num_steps=20,
    )
    x = p.sample((5000,))
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    log_p = -p.energy(states[:, None].expand(8, 2, 3))
    for i in range(2):
        assert_draws(x[:, i], states, log_p[:, i])


def test_constrained_latents_of_a_model():
    """Tempered on the unconstrained space, Jacobians included."""

    def model():
        pyro.sample("p", dist.Beta(0.5, 0.5))

    mcmc = MCMC(
        TemperingKernel(LangevinKernel(model), [1.0, 0.6, 0.3]),
        60,
        100,
        num_chains=300,
        disable_progbar=True,
    )
    mcmc.run()
    p = mcmc.get_samples(group_by_chain=True)["p"]
    assert_mean(p, 0.5)
    assert_mean(p < 0.1, 2 / math.pi * math.asin(0.1**0.5))


# -- adaptation, divergences -----------------------------------------------------------------------


def test_each_replica_adapts_by_itself():
    p = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, (10,))
    kernel = TemperingKernel(LangevinKernel(p, adapt_mass_matrix=False), [1.0, 0.1])
    mcmc = MCMC(kernel, 50, 150, num_chains=50, disable_progbar=True)
    mcmc.run()
    cold, hot = kernel._inner.adaptation.step_size
    assert 7 < hot / cold < 14  # the variance of exp(-U / 10) is ten times as large
    assert torch.equal(kernel.step_size, cold[None])
    assert torch.equal(kernel.step_size, cold[None])
    fields = mcmc.get_extra_fields()
    assert (fields["step_size"] == cold).all()
    assert abs(fields["acceptance_rate"].mean() - 0.574) < 0.05


def test_divergences_of_every_replica_count():
    """Only the hot replica gets to where the energy is no number."""
    p = UnnormalizedEnergy(lambda x: torch.where(x.abs() > 5, math.nan, 4 * x**2), ())
    kernel = TemperingKernel(LangevinKernel(p), [1.0, 0.02])
    mcmc = MCMC(kernel, 100, 100, num_chains=10, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_extra_fields()["diverging"].any()
    assert (mcmc.get_samples()["x"].abs() < 5).all()
    assert mcmc.get_extra_fields()["lp"].isfinite().all()


def test_states_of_probability_zero_are_not_exchanged():
    p = UnnormalizedEnergy(
        lambda x: torch.where(x.sum(-1) == 3, math.inf, -2 * x[..., 0]), (3,), constraints.boolean
    )
    kernel = TemperingKernel(GibbsKernel(p), BETAS)
    mcmc = MCMC(kernel, 1, 20, num_chains=4000, disable_progbar=True)
    mcmc.run()
    states, log_p = states_of(EnergyPotential(p))
    assert_draws(mcmc.get_samples()["x"], states, log_p)
    assert not mcmc.get_extra_fields()["diverging"].any()


# -- Pyro's contract -------------------------------------------------------------------------------


def test_under_stock_pyro():
    kernel = TemperingKernel(LangevinKernel(mixture_of_wells), geometric_betas(0.2, 3))
    mcmc = PyroMCMC(kernel, 20, 10, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (20,)
    told = mcmc.diagnostics()["swap rates"]["chain 0"]
    assert told == kernel.swap_rates.tolist()
    assert len(told) == 2
    json.dumps(told)
    mcmc.summary()


def mixture_of_wells():
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.factor("f", -((x.abs() - 2) ** 2) / 0.1)


def test_under_our_runner():
    for method in ("vectorized", "sequential"):
        kernel = TemperingKernel(LangevinKernel(mixture_of_wells), BETAS)
        mcmc = MCMC(kernel, 10, 5, num_chains=2, disable_progbar=True, chain_method=method)
        mcmc.run()
        told = mcmc.diagnostics()["swap rates"]
        assert told["chain 1"] == kernel.swap_rates.tolist()
        assert set(mcmc.get_extra_fields()) == {"lp", "acceptance_rate", "step_size", "diverging"}
        assert mcmc.to_arviz()["posterior"]["x"].shape == (2, 10)


def test_replicas_are_kept_from_step_to_step():
    """Under Pyro, too, which hands back the first one alone."""
    kernel = TemperingKernel(LangevinKernel(mixture_of_wells), [1.0, 0.1])
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(5):
        before = kernel._state.replicas.z[1].clone()
        params = kernel.sample(params)
    assert before != kernel.initial_params["x"]
    moved = kernel.sample({"x": torch.tensor(2.0)})  # a caller may move the chain
    assert abs(moved["x"] - 2) < 2


def test_seeds_pickles_and_names():
    p = UnnormalizedEnergy(frustrated, (2,), spin)
    kernel = TemperingKernel(GibbsKernel(), BETAS)
    assert repr(kernel) == "TemperingKernel(GibbsKernel(), betas=[1.0, 0.5, 0.2])"
    assert pickle.loads(pickle.dumps(kernel)).betas == (1.0, 0.5, 0.2)

    def run(kernel):
        pyro.set_rng_seed(2)
        mcmc = MCMC(kernel, 8, 8, num_chains=3, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()["x"], kernel.swap_rates

    for kernel in (
        TemperingKernel(GibbsKernel(p), BETAS),
        TemperingKernel(LangevinKernel(mixture_of_wells), torch.tensor(BETAS)),
    ):
        first, rates = run(kernel)
        for again in (kernel, kernel.copy()):
            assert torch.equal(run(again)[0], first)
        assert torch.equal(run(kernel)[1], rates)
    loaded = pickle.loads(pickle.dumps(kernel))  # of a model, after a run
    with pytest.raises(RuntimeError, match="run first"):
        _ = loaded.swap_rates
    assert torch.equal(run(loaded)[0], first)


def test_initial_params_and_potential_fn():
    kernel = TemperingKernel(
        LangevinKernel(potential_fn=lambda params: params["x"].square().sum() / 2), [1.0, 0.5]
    )
    start = {"x": torch.tensor([[3.0, -3.0], [0.0, 1.0], [2.0, 2.0]])}
    mcmc = MCMC(kernel, 5, 0, start, num_chains=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (3, 5, 2)
    kernel.initial_params = {"x": start["x"][0]}
    kernel.setup(0)
    assert torch.equal(kernel._state.replicas.z, start["x"][:1].expand(2, 2))


def test_float64():
    torch.set_default_dtype(torch.float64)
    p = UnnormalizedEnergy(frustrated, (2,), spin)
    mcmc = MCMC(TemperingKernel(GibbsKernel(p), BETAS), 5, 5, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].dtype == torch.float64


@pytest.mark.slow
def test_compiled_draws_are_the_eager_ones():
    torch.set_default_dtype(torch.float64)  # in single precision rounding may turn one acceptance

    def run(jit_compile):
        pyro.set_rng_seed(2)
        p = UnnormalizedEnergy(double_well, (2,))
        kernel = TemperingKernel(LangevinKernel(p, jit_compile=jit_compile), BETAS)
        mcmc = MCMC(kernel, 10, 25, num_chains=2, disable_progbar=True)
        mcmc.run()
        assert bool(kernel._inner._engine._graphs) == jit_compile
        return mcmc.get_samples()["x"]

    torch.testing.assert_close(run(True), run(False), rtol=1e-7, atol=1e-7)


# -- the tempered potential, bad input -------------------------------------------------------------


def test_rows_of_the_tempered_potential():
    """Rows are (chains, R, groups)."""
    shift = torch.tensor([0.0, 1.0])
    whole = EnergyPotential(UnnormalizedEnergy(lambda x: (x - shift) ** 2, batch_shape=(2,)))
    betas = torch.tensor([1.0, 0.5, 0.1])
    potential = TemperedPotential(whole, betas)
    assert potential.targets == 6
    z = torch.randn(4, 3, 2)
    value, grad = potential.value_and_grad(z.reshape(24, 1))
    torch.testing.assert_close(value.reshape(4, 3, 2), betas[:, None] * (z - shift) ** 2)
    torch.testing.assert_close(grad.reshape(4, 3, 2), betas[:, None] * 2 * (z - shift))
    torch.testing.assert_close(potential(z.reshape(24, 1)), value)


@pytest.mark.parametrize(
    ("betas", "match"),
    [
        ([1.0], "at least two"),
        ([], "at least two"),
        ([1.0, 0.0], r"lie in \(0, 1\]"),
        ([1.0, -0.5], r"lie in \(0, 1\]"),
        ([2.0, 1.0], r"lie in \(0, 1\]"),
        ([1.0, math.nan], r"lie in \(0, 1\]"),
        ([1.0, math.inf], r"lie in \(0, 1\]"),
        ([0.9, 0.5], "start at 1"),
        ([1.0, 0.2, 0.5], "and fall"),
        ([1.0, 0.5, 0.5], "and fall"),
        ([0.2, 0.5, 1.0], "start at 1"),
        (0.5, "must be a sequence of numbers"),
        (torch.tensor(0.5), "must be a sequence of numbers"),
        (torch.ones(2, 2), "must be a sequence of numbers"),
        (["hot"], "must be a sequence of numbers"),
    ],
)
def test_bad_betas(betas, match):
    with pytest.raises(ValueError, match=match):
        TemperingKernel(LangevinKernel(), betas)


def test_bad_kernels():
    tempered = TemperingKernel(LangevinKernel(), BETAS)
    for bad in (tempered, "langevin", pyro.infer.NUTS(mixture), None):
        with pytest.raises(ValueError, match="kernel must be a kernel of pyro_ebm that moves one"):
            TemperingKernel(bad, BETAS)
    warm = LangevinKernel(temperature=2.0)
    for bad in (warm, CompositeKernel(kernels=[warm, LangevinKernel(temperature=2.0)])):
        with pytest.raises(ValueError, match=r"temperature=2.0, but exchanges are between"):
            TemperingKernel(bad, BETAS)
    with pytest.raises(ValueError, match="neither a model nor a potential_fn"):
        tempered.setup(0)
    p = GaussianRBM(torch.ones(2, 1), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"GibbsKernel moves discrete sites, and \['x'\] are not"):
        TemperingKernel(GibbsKernel(p), BETAS).setup(0)
    with pytest.raises(ValueError, match=r"LangevinKernel moves continuous sites"):
        TemperingKernel(LangevinKernel(), BETAS).bind(EnergyPotential(machine()), 0)


def test_geometric_betas():
    assert geometric_betas(0.01, 3) == pytest.approx([1.0, 0.1, 0.01])
    assert geometric_betas(0.3, 2) == [1.0, 0.3]
    for lowest in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"lowest must lie in \(0, 1\)"):
            geometric_betas(lowest, 3)
    for num in (1, 2.5):
        with pytest.raises(ValueError, match="num_replicas must be an integer of at least 2"):
            geometric_betas(0.5, num)
