"""Discrete and continuous latents of one model, moved in turn."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from pyro.infer.mcmc import MCMC as PyroMCMC
from pyro.infer.mcmc import api as pyro_api
from torch.distributions.transforms import ExpTransform

from pyro_ebm import MCMC, UnnormalizedEnergy
from pyro_ebm.distributions import spin
from pyro_ebm.mcmc import (
    CompositeKernel,
    DiscreteLangevinKernel,
    Flip,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    TemperingKernel,
)
from pyro_ebm.mcmc.kernels.composed.composite import BlockPotential
from tests.enumeration import assert_counts
from tests.statistics import SIGMAS, assert_mean, run_kernel

MEANS, SCALES, Y = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, 1.5]), 1.2


def mixture():
    """p(k | y) and p(x | k, y) are known: x | k is N(m_k, s_k^2), y | x is N(x, 1)."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    x = pyro.sample("x", dist.Normal(MEANS[k], SCALES[k]))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(Y))


def exact_mixture(num):
    evidence = dist.Normal(MEANS, (SCALES**2 + 1).sqrt()).log_prob(torch.tensor(Y))
    p = (torch.tensor([0.5, 0.3, 0.2]).log() + evidence).softmax(-1)
    k = dist.Categorical(p).sample((num,))
    variance = 1 / (1 + SCALES[k] ** -2)
    x = variance * (Y + MEANS[k] / SCALES[k] ** 2) + variance.sqrt() * torch.randn(num)
    return p, k, x


def one_hot_mixture():
    k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2])))
    x = pyro.sample("x", dist.Normal(k @ MEANS, k @ SCALES))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(Y))


def fixed(kernel):
    kernel.adapt_step_size = kernel.adapt_mass_matrix = False
    return kernel


COMBINATIONS = {
    "gibbs-langevin": lambda: [GibbsKernel(), fixed(LangevinKernel(step_size=0.4))],
    "langevin-gibbs": lambda: [fixed(LangevinKernel(step_size=0.4)), GibbsKernel()],
    "flip-walk": lambda: [MHKernel(proposal=Flip()), fixed(MHKernel())],
    "three": lambda: [GibbsKernel(), fixed(MHKernel()), fixed(LangevinKernel(step_size=0.4))],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_exact_draws_stay_exact(name):
    p, k, x = exact_mixture(20_000)
    kernel = CompositeKernel(mixture, COMBINATIONS[name]())
    z, info = run_kernel(kernel, kernel.make_potential(), torch.stack([k, x], -1), 0, 3)
    end_k, end_x = z[:, -1].T
    assert (end_k != k).double().mean() > 0.02
    assert (end_x != x).double().mean() > 0.4
    assert_counts(end_k.long().bincount(minlength=3), p)
    variance = 1 / (1 + SCALES**-2)
    for i in range(3):  # x given k, which a wrong turn would leave behind
        of_k = end_x[end_k == i]
        cdf = dist.Normal(variance[i] * (Y + MEANS[i] / SCALES[i] ** 2), variance[i].sqrt()).cdf
        assert_counts((cdf(of_k) * 8).long().clamp(0, 7).bincount(minlength=8), torch.ones(8) / 8)
    assert not info.diverging.any()


@pytest.mark.parametrize("discrete", [GibbsWithGradientsKernel, DiscreteLangevinKernel])
def test_kernels_with_gradients(discrete):
    p, k, x = exact_mixture(20_000)
    one_hot = torch.eye(3)[k]
    kernel = CompositeKernel(one_hot_mixture, [discrete(), fixed(LangevinKernel(step_size=0.4))])
    start = torch.cat([one_hot, x[:, None]], -1)
    z, info = run_kernel(kernel, kernel.make_potential(), start, 0, 3)
    assert (z[:, -1, :3] != one_hot).any(-1).double().mean() > 0.01
    assert_counts(z[:, -1, :3].sum(0).long(), p)
    assert not info.diverging.any()


Z_OF_Y = torch.tensor([0.1, 2.3, 1.0])


def shifted():
    """A continuous site between discrete ones, each in plates: three assignments and a spin."""
    data = pyro.plate("data", 3)
    with data:
        z = pyro.sample("z", dist.Bernoulli(0.4))
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Gamma(4.0, 4.0))
    s = pyro.sample("s", UnnormalizedEnergy(lambda s: -0.3 * s.sum(-1), (1,), spin))
    with data:
        pyro.sample("y", dist.Normal(m + 2 * z + 0.5 * s, scale), obs=Z_OF_Y)


def exact_shifted():
    """Marginal means of z, s and m, scale by enumeration and quadrature."""
    m = torch.linspace(-5, 5, 401).double()[:, None]
    scale = torch.linspace(0.02, 5, 400).double()
    weights, stats = [], []
    for s in (-1, 1):
        for z in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3):
            log_p = dist.Normal(0.0, 1.0).log_prob(m) + dist.Gamma(4.0, 4.0).log_prob(scale)
            log_p = log_p + dist.Bernoulli(0.4).log_prob(z).sum() + 0.3 * s
            for y, one in zip(Z_OF_Y, z, strict=True):
                log_p = log_p + dist.Normal(m + 2 * one + 0.5 * s, scale).log_prob(y)
            p = log_p.exp()
            weights.append(p.sum())
            stats.append(torch.stack([*z, torch.tensor(s), (p * m).sum() / p.sum()]))
            stats[-1] = torch.cat([stats[-1], (p * scale).sum()[None] / p.sum()])
    weights = torch.stack(weights)
    return (weights[:, None] * torch.stack(stats)).sum(0) / weights.sum()


@pytest.mark.parametrize("kernels", [None, [MHKernel(proposal=Flip(2)), MHKernel()]])
def test_a_model_of_many_sites(kernels):
    kernel = CompositeKernel(shifted, kernels)
    mcmc = MCMC(kernel, 50, 80, num_chains=400, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)
    assert {k: tuple(v.shape[2:]) for k, v in x.items()} == {
        "m": (),
        "s": (1,),
        "scale": (),
        "z": (3,),
    }
    got = torch.cat([x["z"], x["s"], x["m"][..., None], x["scale"][..., None]], -1)
    assert_mean(got, exact_shifted())
    # lp is the density of the draw on the unconstrained space
    lp = mcmc.get_extra_fields(group_by_chain=True)["lp"]
    draw = {k: v[3, 10] for k, v in x.items()}
    trace = poutine.trace(poutine.condition(shifted, draw)).get_trace()
    want = trace.log_prob_sum() + draw["scale"].log()
    torch.testing.assert_close(lp[3, 10], want, rtol=1e-4, atol=1e-4)


def test_the_block_potential_is_a_section():
    potential = CompositeKernel(shifted).make_potential()
    whole = potential.initial(4)
    for names in (["z", "s"], ["m", "scale"], ["scale"]):
        block = BlockPotential(potential, names)
        block.rest = whole.clone()
        z = whole[:, block.columns]
        torch.testing.assert_close(block(z), potential(whole))
        torch.testing.assert_close(block(z.repeat(3, 1)), potential(whole).repeat(3))
        _, grad = block.value_and_grad(z)
        torch.testing.assert_close(grad, potential.value_and_grad(whole)[1][:, block.columns])
        assert torch.equal(block.insert(z), whole)
        assert block.names == [n for n in potential.names if n in names]


# -- adaptation and statistics ---------------------------------------------------------------------


def test_each_kernel_adapts_to_its_own_block():
    def model():
        b = pyro.sample("b", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
        x = pyro.sample("x", dist.Normal(0.0, torch.tensor([0.1, 5.0])).to_event(1))
        pyro.factor("f", 0.1 * b.sum() * x[0])

    kernel = CompositeKernel(
        model, [DiscreteLangevinKernel(target_accept_prob=0.9), LangevinKernel()]
    )
    mcmc = MCMC(kernel, 20, 120, num_chains=200, disable_progbar=True)
    mcmc.run()
    (discrete, _), (continuous, _) = kernel._bound
    assert discrete.step_size.item() != 0.2
    factor = continuous.adaptation.inverse_mass_sqrt
    assert factor.shape == (1, 2, 2)
    torch.testing.assert_close(factor[0].diagonal(), torch.tensor([0.1, 5.0]), rtol=0.2, atol=0)
    # what is told is of the last
    assert kernel.adaptation is continuous.adaptation
    assert torch.equal(kernel.step_size, continuous.step_size)
    fields = mcmc.get_extra_fields()
    assert abs(fields["acceptance_rate"].mean() - 0.574) < 0.1
    assert (fields["step_size"] == continuous.step_size).all()
    assert kernel.kernels[0]._adaptation is None  # the kernels given are settings


@pytest.mark.parametrize("kernels", [None, [LangevinKernel(), GibbsKernel()]])
def test_divergences_of_any_kernel_count(kernels):
    """Only Gibbs looks at where the energy is no number."""

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(b == 1, math.nan, 0.0))

    mcmc = MCMC(CompositeKernel(model, kernels), 10, 5, num_chains=10, disable_progbar=True)
    mcmc.run()
    assert (mcmc.get_samples()["b"] == 0).all()
    assert mcmc.get_extra_fields()["diverging"].all()
    assert mcmc.get_extra_fields()["lp"].isfinite().all()


def test_starts_have_a_finite_gradient_in_the_continuous_sites():
    """The potential is finite everywhere, its gradient below 0 is not."""

    class Broken(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, grad):
            return torch.where(ctx.saved_tensors[0] < 0, math.nan, grad)

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(Broken.apply(x) + b.sqrt(), 1.0), obs=torch.tensor(1.0))

    potential = CompositeKernel(model).make_potential()
    z = potential.initial(50)
    assert (z[:, potential.names.index("x")] >= 0).all()
    assert (z[:, potential.names.index("b")] == 0).any()  # where the root has no gradient
    kernel = CompositeKernel(model)
    kernel.initial_params = {"b": torch.tensor(1.0), "x": torch.tensor(-1.0)}
    with pytest.raises(ValueError, match=r"gradient of the potential in site\(s\) 'x' is not fin"):
        kernel.setup(0)


# -- Pyro's contract -------------------------------------------------------------------------------


def test_runs_under_stock_pyro(monkeypatch, capsys):
    mcmc = PyroMCMC(CompositeKernel(shifted), 20, 10, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples(group_by_chain=True)
    assert {k: tuple(v.shape) for k, v in samples.items()} == {
        "m": (1, 20),
        "s": (1, 20, 1),
        "scale": (1, 20),
        "z": (1, 20, 3),
    }
    assert (samples["scale"] > 0).all()
    mcmc.summary()
    divergences = len(mcmc.diagnostics()["divergences"]["chain 0"])
    assert f"Number of divergences: {divergences}\n" in capsys.readouterr().out
    # one after another, from given starts
    monkeypatch.setattr(pyro_api.mp, "cpu_count", lambda: 1)
    start = {"k": torch.tensor([0, 2]), "x": torch.tensor([-1.0, 3.0])}
    kernel = CompositeKernel(mixture)
    with pytest.warns(UserWarning, match="sequentially"):
        mcmc = PyroMCMC(kernel, 15, 5, initial_params=start, num_chains=2, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (2, 15)
    assert not (x[0] == x[1]).any()
    assert len(mcmc.diagnostics()["sample_stats"]["chain 1"]["lp"]) == 15


def test_our_runner_and_arviz():
    mcmc = MCMC(CompositeKernel(mixture), 20, 10, num_chains=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["k"].dtype == torch.long
    assert mcmc.get_samples()["x"].dtype == torch.float
    data = mcmc.to_arviz(log_likelihood=True)
    assert data["posterior"]["k"].shape == (3, 20)
    assert data["log_likelihood"]["y"].shape == (3, 20)
    assert set(mcmc.diagnostics()) == {"k", "x", "divergences", "acceptance rate"}


def test_seeds_pickles_and_names():
    kernel = CompositeKernel(mixture)
    assert repr(kernel) == "CompositeKernel(mixture)"
    given = CompositeKernel(kernels=[GibbsKernel(), LangevinKernel()])
    assert repr(given) == "CompositeKernel(kernels=[GibbsKernel(), LangevinKernel()])"

    def run(kernel):
        pyro.set_rng_seed(2)
        mcmc = MCMC(kernel, 8, 8, num_chains=3, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()["x"]

    first = run(kernel)
    for again in (kernel, kernel.copy(), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(run(again), first)


def test_float64():
    torch.set_default_dtype(torch.float64)

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(b, 1.0))

    mcmc = MCMC(CompositeKernel(model), 5, 5, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert all(x.dtype == torch.float64 for x in mcmc.get_samples().values())


def test_chains_that_sites_round_go_on():
    """A float32 site beside a float64 one: what Pyro hands back is rounded, and no new start."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        pyro.sample("b", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))

    kernel = CompositeKernel(model)
    kernel.setup(0)
    params, seen = kernel.initial_params, []
    kernel.evaluate = lambda z: seen.append(z)
    for _ in range(5):
        params = kernel.sample(params)
    assert not seen


def test_a_latent_that_nobody_can_draw():
    """An improper prior has no draws, only starts."""

    def model():
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(m + b, 1.0), obs=torch.tensor(2.0))

    kernel = CompositeKernel(model, init_strategy=init_to_value(values={"m": torch.tensor(0.0)}))
    mcmc = MCMC(kernel, 200, 100, num_chains=20, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples(group_by_chain=True)
    assert_mean(samples["b"], 0.5)
    assert_mean(samples["m"] + samples["b"], 2.0)


def test_init_strategy_and_transforms():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Gamma(20.0 + b, 1.0))

    kernel = CompositeKernel(model, init_strategy=init_to_sample)
    x = kernel.make_potential().constrain(kernel.make_potential().initial(50))["x"]
    assert x.mean() > 15
    kernel = CompositeKernel(model, transforms={"x": ExpTransform().inv})
    potential = kernel.make_potential()
    assert torch.equal(potential.constrain(torch.zeros(1, 2))["x"], torch.ones(1))


def test_captured_draws_are_the_eager_ones():
    def run(jit_compile):
        pyro.set_rng_seed(2)
        kernels = [GibbsKernel(jit_compile=jit_compile), LangevinKernel(jit_compile=jit_compile)]
        kernel = CompositeKernel(mixture, kernels)
        mcmc = MCMC(kernel, 15, 25, num_chains=3, disable_progbar=True)
        mcmc.run()
        assert all(bool(k._engine._graphs) == bool(jit_compile) for k, _ in kernel._bound)
        return mcmc.get_samples()

    compiled, eager = run("capture"), run(False)
    assert torch.equal(compiled["k"], eager["k"])
    assert torch.equal(compiled["x"], eager["x"])


@pytest.mark.parametrize("jit_compile", [False, "capture"])
def test_a_second_start_is_as_good_as_the_first(jit_compile):
    """What the other kernel moved is a tensor that a graph refers to."""

    def run(starts):
        kernels = [GibbsKernel(), LangevinKernel(jit_compile=jit_compile)]
        kernel = CompositeKernel(mixture, kernels)
        potential = kernel.make_potential()
        z = potential.initial(3)
        kernel.bind(potential, 0)
        for _ in range(starts):
            pyro.set_rng_seed(0)
            state = kernel.init(z)
            for _ in range(5):
                state, _ = kernel.step(state)
        return state.z

    pyro.set_rng_seed(1)
    once = run(1)
    pyro.set_rng_seed(1)
    assert torch.equal(run(2), once)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "match"),
    [
        ([], "at least one kernel"),
        (["gibbs"], "must be kernels of pyro_ebm.*'gibbs'"),
        ([pyro.infer.NUTS(mixture)], "must be kernels of pyro_ebm"),
        ([GibbsKernel(mixture)], r"not to GibbsKernel\(mixture\)"),
        ([LangevinKernel(potential_fn=lambda params: params["x"])], "give model and transforms"),
        ([LangevinKernel(transforms={})], "give model and transforms"),
        ([CompositeKernel()], "in one list"),
        ([TemperingKernel(LangevinKernel(), [1.0, 0.5])], r"TemperingKernel\(CompositeKernel"),
    ],
)
def test_kernels_that_do_not_do(kernels, match):
    with pytest.raises(ValueError, match=match):
        CompositeKernel(mixture, kernels)


HOT = LangevinKernel(temperature=2.0)


@pytest.mark.parametrize(
    "kernels",
    [
        [GibbsKernel(), HOT],
        [HOT, MHKernel()],
        [HOT, LangevinKernel()],
    ],
)
def test_kernels_of_different_temperatures_leave_nothing_invariant(kernels):
    with pytest.raises(ValueError, match=r"the temperatures .*2\.0.*: kernels that take turns"):
        CompositeKernel(mixture, kernels)
    CompositeKernel(mixture, [HOT, LangevinKernel(temperature=2.0)])  # p^(1/T)


def test_sites_that_nothing_moves():
    with pytest.raises(ValueError, match=r"the discrete sites \['k'\]: add a GibbsKernel"):
        CompositeKernel(mixture, [LangevinKernel()]).setup(0)
    with pytest.raises(ValueError, match=r"the continuous sites \['x'\]: add a LangevinKernel"):
        CompositeKernel(mixture, [GibbsKernel()]).setup(0)
    with pytest.raises(ValueError, match=r"the values of \['k'\], which are whole numbers"):
        CompositeKernel(mixture, [GibbsWithGradientsKernel(), LangevinKernel()]).setup(0)
    with pytest.raises(ValueError, match="neither a model nor a potential_fn"):
        CompositeKernel().setup(0)
    with pytest.raises(RuntimeError, match="setup"):
        _ = CompositeKernel(mixture).potential


def test_a_model_of_one_kind_needs_no_other():
    def only_continuous():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    x = MCMC(CompositeKernel(only_continuous), 50, 50, num_chains=50, disable_progbar=True)
    x.run()
    draws = x.get_samples(group_by_chain=True)["x"]
    assert_mean(draws.square(), 1.0)
    p = UnnormalizedEnergy(
        lambda x: -x.sum(-1), (3,), constraints.boolean, kernel=CompositeKernel()
    )
    bits = p.sample((3000,))
    error = (bits.mean() - 1 / (1 + math.exp(-1))) / (bits.std() / 9000**0.5)
    assert error.abs() < SIGMAS
