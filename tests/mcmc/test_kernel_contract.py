"""What every kernel does alike. A new kernel is a new line in one of the tables."""

import inspect
import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc import MCMC as PyroMCMC
from torch import nn

from pyro_ebm import MCMC, LangevinKernel, MHKernel
from pyro_ebm.distributions import BoltzmannMachine
from pyro_ebm.distributions.flow import coupling_flow
from pyro_ebm.mcmc import (
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    DiscreteLangevinKernel,
    ExchangeKernel,
    Flip,
    FlowKernel,
    FunctionPotential,
    GibbsKernel,
    GibbsWithGradientsKernel,
    Independence,
    IntegerWalk,
    Kernel,
    Proposal,
    RandomWalk,
    SGHMCKernel,
    SGLDKernel,
    TemperingKernel,
    TransitionKernel,
    accept,
)
from pyro_ebm.models.sites.site import sites_of
from pyro_ebm.ops import log_uniform


def model(y=None):
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    y = torch.ones(2) if y is None else y
    return pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def bits(y=None):
    x = pyro.sample("x", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
    return pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0) if y is None else y)


def counts(y=None):
    n = pyro.sample("n", dist.Poisson(5.0).expand([2]).to_event(1))
    return pyro.sample("y", dist.Normal(n.sum(-1), 1.0), obs=torch.tensor(9.0) if y is None else y)


def mixed(y=None):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0 + k).to_event(1))
    y = torch.ones(2) if y is None else y
    return pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def ising(y=None):
    coupling = pyro.sample("J", dist.Gamma(torch.tensor(2.0), torch.tensor(4.0)))
    y = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]) if y is None else y
    edges = torch.tensor([[0, 1], [1, 2]])
    with pyro.plate("data", 2):
        return pyro.sample("y", BoltzmannMachine(coupling, edges=edges), obs=y)


class Cauchy(Proposal):
    """An own symmetric proposal."""

    symmetric = True

    def sample(self, z):
        return z + 0.5 * torch.zeros_like(z).cauchy_()


class Drift(Proposal):
    """An own proposal with its density."""

    def sample(self, z):
        return 0.9 * z + 0.5 * torch.randn_like(z)

    def log_prob(self, new, old):
        return dist.Normal(0.9 * old, 0.5).to_event(1).log_prob(new)


def sites():
    x = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    return {"scale": dist.LogNormal(torch.tensor(0.0), 1.0), "x": x}


class Own(TransitionKernel):
    """A kernel of a user, with a setting of its own."""

    needs_grad = False

    def __init__(self, model=None, width=0.5, **kwargs):
        super().__init__(model, **kwargs)
        self.width = width

    def draw(self, state):
        return state.z + self.width * torch.randn_like(state.z), log_uniform(state.potential)

    def transition(self, state, new_z, log_u):
        new = self.evaluate(new_z)
        return accept(state, new, state.potential - new.potential, log_u)


def flat():
    return dist.Normal(torch.zeros(3), 1.5).to_event(1)


SMALL_FLOW = coupling_flow(3, transforms=1, hidden_features=(4,), bins=4)

# name: the kernel, given a model (or nothing) and other arguments of the base class
KERNELS = {
    "langevin": LangevinKernel,
    "langevin-dense": lambda *a, **k: LangevinKernel(*a, full_mass=True, **k),
    "langevin-unadjusted": lambda *a, **k: LangevinKernel(*a, adjusted=False, step_size=0.01, **k),
    "barker": BarkerKernel,
    "chees": ChEESKernel,
    "chees-dense": lambda *a, **k: ChEESKernel(*a, full_mass=True, **k),
    "walk": MHKernel,
    "walk-diagonal": lambda *a, **k: MHKernel(*a, full_mass=False, **k),
    "walk-fixed": lambda *a, **k: MHKernel(*a, proposal=RandomWalk(0.3), **k),
    "independence": lambda *a, **k: MHKernel(*a, proposal=flat(), **k),
    "independence-sites": lambda *a, **k: MHKernel(*a, proposal=sites(), **k),
    "own-symmetric": lambda *a, **k: MHKernel(*a, proposal=Cauchy(), **k),
    "own-density": lambda *a, **k: MHKernel(*a, proposal=Drift(), **k),
    "tempering": lambda *a, **k: TemperingKernel(LangevinKernel(*a, **k), [1.0, 0.5]),
    "flow": lambda *a, **k: FlowKernel(LangevinKernel(*a, **k), SMALL_FLOW, 5),
    "own": Own,
}
# Each of them takes seconds; tests/mcmc/test_engine.py compiles the first two at every run.
COMPILED = [
    pytest.param("langevin", marks=pytest.mark.slow),
    pytest.param("chees", marks=pytest.mark.slow),
    "walk",
]

# name: the kernel, given a model (or nothing), and the model
OTHERS = {
    "gibbs": (GibbsKernel, bits),
    "gibbs-with-gradients": (GibbsWithGradientsKernel, bits),
    "discrete-langevin": (DiscreteLangevinKernel, bits),
    "discrete-unadjusted": (lambda *a: DiscreteLangevinKernel(*a, adjusted=False), bits),
    "flip": (lambda *a: MHKernel(*a, proposal=Flip()), bits),
    "integer-walk": (lambda *a: MHKernel(*a, proposal=IntegerWalk()), counts),
    "tempering-discrete": (lambda *a: TemperingKernel(GibbsKernel(*a), [1.0, 0.5]), bits),
    "composite": (CompositeKernel, mixed),
    "composite-continuous": (lambda *a: CompositeKernel(*a, kernels=[ChEESKernel()]), model),
    "tempering-composite": (lambda *a: TemperingKernel(CompositeKernel(*a), [1.0, 0.5]), mixed),
    "sgld": (SGLDKernel, model),
    "sghmc": (SGHMCKernel, model),
    "exchange": (lambda *a: ExchangeKernel(*a, num_inner_steps=20), ising),
    "exchange-chain": (
        lambda *a: ExchangeKernel(
            *a, num_inner_steps=5, inner_kernel=GibbsKernel(), proposal=RandomWalk(1.0)
        ),
        ising,
    ),
    "exchange-composite": (
        lambda *a: CompositeKernel(*a, kernels=[ExchangeKernel(num_inner_steps=20)]),
        ising,
    ),
}
CASES = {**{name: (make, model) for name, make in KERNELS.items()}, **OTHERS}


@pytest.fixture(params=KERNELS)
def make(request):
    """A kernel that takes any model of continuous sites, or a ``potential_fn``."""
    return KERNELS[request.param]


@pytest.fixture(params=CASES)
def case(request):
    """A kernel, and a model that it can sample."""
    return CASES[request.param]


DRAWS = 6


def draw(kernel, *args, chains=3, seed=0, samples=DRAWS, warmup=12, **settings):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc.get_samples(group_by_chain=True), mcmc


@pytest.fixture(scope="module")
def first_runs():
    return {}


@pytest.fixture
def first(case, first_runs):
    """The draws of a new kernel from seed 0, and their run: one for all tests, which only read."""
    if case not in first_runs:
        make, model = case
        first_runs[case] = draw(make(model))
    return first_runs[case]


# -- construct, run ------------------------------------------------------------------------------


def shapes_of(model):
    trace = pyro.poutine.trace(model).get_trace()
    latents = [name for name in trace.stochastic_nodes if name != "data"]  # no plate
    return {name: trace.nodes[name]["value"].shape for name in latents}


@pytest.mark.parametrize("chains", [1, 3])
def test_runs_many_chains(case, first, chains):
    make, model = case
    samples, mcmc = first if chains == 3 else draw(make(model), chains=chains)
    assert {name: x.shape[2:] for name, x in samples.items()} == shapes_of(model)
    assert all(x.shape[:2] == (chains, DRAWS) for x in samples.values())
    assert not any(x.requires_grad for x in samples.values())
    assert any(x.float().std() > 0.01 for x in samples.values())  # it moves
    fields = mcmc.get_extra_fields(group_by_chain=True)
    own = set(mcmc.kernel.extra_fields)
    lp = mcmc.kernel.potential.lp_name
    assert set(fields) == {lp, "acceptance_rate", "step_size", "diverging"} | own
    for stat in fields.values():
        assert stat.shape == (chains, DRAWS)
    assert ((fields["acceptance_rate"] >= 0) & (fields["acceptance_rate"] <= 1)).all()


def test_lp_is_the_log_density_of_the_draw(case, first):
    _, model = case
    samples, mcmc = first
    want = torch.empty(3, DRAWS)
    for chain in range(3):
        for i in range(DRAWS):
            one = {name: x[chain, i] for name, x in samples.items()}
            trace = pyro.poutine.trace(pyro.condition(model, one)).get_trace()
            jacobian = sum(one[name].log() for name in ("scale", "J") if name in one)  # of exp
            want[chain, i] = trace.log_prob_sum() + jacobian
    lp = mcmc.get_extra_fields(group_by_chain=True)[mcmc.kernel.potential.lp_name]
    torch.testing.assert_close(lp, want)


def test_same_seed_same_draws_and_nothing_is_kept_between_runs(case, first):
    make, model = case
    want, _ = first
    kernel = pickle.loads(pickle.dumps(make(model)))
    other, _ = draw(kernel, seed=1)
    again, _ = draw(kernel)
    assert not all(torch.equal(want[name], other[name]) for name in want)
    assert all(torch.equal(want[name], again[name]) for name in want)


def test_runs_under_stock_pyro(case):
    make, model = case
    kernel = make(model)
    mcmc = PyroMCMC(kernel, 10, warmup_steps=5, num_chains=1, disable_progbar=True)
    mcmc.run()
    shapes = {name: x.shape[1:] for name, x in mcmc.get_samples().items()}
    assert shapes == shapes_of(model)
    diagnostics = mcmc.diagnostics()
    assert "divergences" in diagnostics
    stats = kernel.diagnostics()["sample_stats"]
    assert all(stat.shape == (10,) for stat in stats.values())
    json.dumps(kernel.logging())


def test_takes_a_potential_fn(make):
    def potential_fn(params):
        return params["scale"].square() / 2 + params["x"].square().sum() / 2

    kernel = make(potential_fn=potential_fn)
    kernel.initial_params = {"scale": torch.tensor(0.5), "x": torch.ones(2)}
    kernel.setup(5)
    params = kernel.initial_params
    assert torch.equal(params["x"], torch.ones(2))
    for _ in range(10):
        params = kernel.sample(params)
    assert {name: v.shape for name, v in params.items()} == {"scale": (), "x": (2,)}


def test_data_are_arguments_of_the_run(make):
    kernel = make(model)
    samples, _ = draw(kernel, torch.full((2,), 30.0), chains=20, samples=10, warmup=20)
    # the scale must grow, or x follow: at y = 1 neither happens
    near, _ = draw(kernel, torch.ones(2), chains=20, samples=10, warmup=20)
    assert samples["scale"].mean() > 2 * near["scale"].mean()


# -- dtype, pickle, repr --------------------------------------------------------------------------


def test_follows_float64(make):
    torch.set_default_dtype(torch.float64)
    samples, mcmc = draw(make(model))
    assert all(x.dtype == torch.float64 for x in samples.values())
    assert mcmc.get_extra_fields()["lp"].dtype == torch.float64
    assert mcmc.kernel.step_size.dtype == torch.float64


def test_pickles_after_a_run(case, first):  # before one: see the draws of the same seed
    make, model = case
    want, mcmc = first
    loaded = pickle.loads(pickle.dumps(mcmc.kernel))
    got, _ = draw(loaded)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert repr(loaded.copy()) == repr(make(model))


def test_a_copy_has_the_settings_and_no_memory(case, first):
    make, model = case
    kernel = first[1].kernel
    copied = kernel.copy()
    assert copied.settings == kernel.settings
    with pytest.raises(RuntimeError, match="setup"):
        _ = copied.potential
    assert kernel.potential is not None  # the other keeps its own
    assert copied.step_size == make(model).step_size
    assert copied.learned == []


def test_a_copy_with_another_setting(make):
    strategy = init_to_value(values={})
    kernel = make(model)
    changed = kernel.kernel if isinstance(kernel, TemperingKernel | FlowKernel) else kernel
    changed = changed.copy(init_strategy=strategy, target_accept_prob=0.4)
    assert (changed.init_strategy, changed.target_accept_prob) == (strategy, 0.4)
    assert "target_accept_prob=0.4" in repr(changed)


def test_a_setting_that_is_assigned_is_copied():
    kernel = LangevinKernel(model)
    kernel.target_accept_prob, kernel.adjusted = 0.7, False
    assert repr(kernel.copy()) == "LangevinKernel(model, adjusted=False, target_accept_prob=0.7)"


def test_settings_are_the_parameters_of_the_constructor(case):
    make, model = case
    kernel = make(model)
    assert list(kernel.settings) == list(inspect.signature(type(kernel)).parameters)
    with pytest.raises(TypeError, match=f"{type(kernel).__name__}: .* argument 'stepsize'"):
        kernel.copy(stepsize=1.0)


def test_repr_shows_settings_and_what_was_learned(case, first):
    make, model = case
    kernel = first[1].kernel
    before = repr(make(model))
    assert before.startswith(f"{type(kernel).__name__}(")
    assert model.__name__ in before
    assert "(," not in repr(make())
    after = repr(kernel)
    assert after.removesuffix(f" [learned {', '.join(kernel.learned)}]") == before
    learns = kernel.adaptation.adapt_step_size or getattr(kernel, "learns_step", False)
    assert ("step_size=" in after.removeprefix(before)) == learns


def test_a_kernel_is_no_kernel_of_pyro_unless_it_says_so():
    class Still(Kernel):
        """Moves nothing; of no model."""

        adaptation = None

        def init(self, z):
            return self.evaluate(z)

        def step(self, state):
            return state, None

    kernel = Still()
    potential = FunctionPotential(lambda p: p["x"].square(), sites_of({"x": torch.zeros(())}))
    kernel.bind(potential, 0)
    assert kernel.step(kernel.init(torch.ones(2, 1)))[0].potential.tolist() == [1.0, 1.0]
    assert not hasattr(kernel, "setup")


# -- bad input -----------------------------------------------------------------------------------


def test_model_and_potential_fn_exclude_each_other(make):
    with pytest.raises(ValueError, match="not both"):
        make(model, potential_fn=lambda params: params["x"])


def test_neither_model_nor_potential_fn(make):
    with pytest.raises(ValueError, match="neither a model nor a potential_fn"):
        make().setup(0)


def test_potential_fn_without_initial_params(make):
    with pytest.raises(ValueError, match="initial_params"):
        make(potential_fn=lambda params: params["x"]).setup(0)


def test_sample_before_setup(make):
    with pytest.raises(RuntimeError, match="setup"):
        make(model).sample({"x": torch.zeros(2)})


def test_an_energy_that_is_nan_at_the_start_names_its_site(make):
    def broken():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("bad", dist.Normal(x.sum() * math.nan, 1.0, validate_args=False), obs=x[0])

    with pytest.raises(ValueError, match="'bad' is nan"):
        make(broken, init_strategy=init_to_value(values={"x": torch.zeros(3)})).setup(0)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"scale": torch.tensor(0.0)}, r"\['scale'\].*\['scale', 'x'\]"),
        ({"scale": torch.tensor(0.0), "z": torch.zeros(2)}, r"\['scale', 'z'\]"),
        ({"scale": torch.tensor(0.0), "x": torch.zeros(3)}, r"'x'.*\(2,\).*\(3,\)"),
        ({"scale": torch.tensor(math.nan), "x": torch.zeros(2)}, "initial_params of chain 0"),
    ],
    ids=["missing", "name", "shape", "nan"],
)
def test_initial_params_that_do_not_fit(make, params, match):
    kernel = make(model)
    kernel.initial_params = params
    with pytest.raises(ValueError, match=match):
        kernel.setup(0)


def not_enumerable():
    k = pyro.sample("k", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(k, 1.0))


def subsampled():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=5):
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(5))


def moving_support():
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Uniform(0.0, top))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (not_enumerable, "'k' is discrete"),
        (subsampled, "'data' subsamples"),
        (moving_support, "support of site 'x' depends on"),
    ],
)
def test_models_that_cannot_be_sampled(make, bad, match):
    with pytest.raises((ValueError, NotImplementedError), match=match):
        make(bad).setup(0)


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_a_matrix_that_is_sometimes_singular_is_a_divergence(make, method):
    def sometimes():
        x = pyro.sample("x", dist.Normal(torch.ones(3), 1.0).to_event(1))
        torch.linalg.cholesky(torch.eye(2) * (1.5 + x.sum(-1)))  # raises below -1.5

    start = init_to_value(values={"x": torch.zeros(3)})
    kernel = make(sometimes, init_strategy=start)
    if isinstance(kernel, MHKernel) and isinstance(kernel.proposal, Independence):
        kernel = MHKernel(sometimes, proposal=flat(), init_strategy=start)
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, 40, 10, num_chains=2, disable_progbar=True, chain_method=method)
    mcmc.run()
    assert (mcmc.get_samples()["x"].sum(-1) > -1.5).all()


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_draws_are_the_eager_ones(name):
    make = KERNELS[name]
    torch.set_default_dtype(torch.float64)  # long trajectories let errors of rounding grow
    try:
        eager, _ = draw(make(model))
        compiled, mcmc = draw(make(model, jit_compile=True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert mcmc.kernel._engine._graphs  # it was compiled, and did not fall back
    for site in eager:
        torch.testing.assert_close(compiled[site], eager[site], rtol=1e-9, atol=1e-9)


def test_compiled_kernel_sees_parameters_change():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.center = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return (x - self.center).square().sum(-1) / 2

    net = Net()

    def potential_fn(params):
        return net(params["x"])

    kernel = LangevinKernel(jit_compile=True, step_size=0.3, adapt_step_size=False)
    potential = FunctionPotential(potential_fn, sites_of({"x": torch.zeros(2)}), modules=[net])
    kernel.bind(potential, 0)

    def gradient_seen():
        z = torch.zeros(4, 2)
        state, draws = kernel.evaluate(z), kernel.draw(kernel.evaluate(z))
        new, _ = kernel._engine(state, *draws)
        want, _ = kernel.transition(state, *draws)
        torch.testing.assert_close(new, want)
        return new

    gradient_seen()
    gradient_seen()  # from the graph
    with torch.no_grad():
        net.center.add_(3.0)  # in place
    gradient_seen()
    net.load_state_dict({"center": torch.full((2,), -2.0)}, assign=True)  # replaced
    gradient_seen()
    net.center = nn.Parameter(torch.full((2,), 5.0))
    gradient_seen()
