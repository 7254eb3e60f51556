"""What every kernel does alike. A new kernel is a new line in ``KERNELS``."""

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
from pyro_ebm.mcmc import FunctionPotential, Independence, Proposal, RandomWalk, TemperingKernel
from pyro_ebm.mcmc.kernels.gradient.barker import BarkerKernel
from pyro_ebm.mcmc.kernels.gradient.hmc import ChEESKernel
from pyro_ebm.models.sites.site import sites_of


def model(y=None):
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    y = torch.ones(2) if y is None else y
    return pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


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


def flat():
    return dist.Normal(torch.zeros(3), 1.5).to_event(1)


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
}
COMPILED = ["langevin", "chees", "walk"]  # each of them takes seconds


@pytest.fixture(params=KERNELS)
def make(request):
    return KERNELS[request.param]


def draw(kernel, *args, chains=3, seed=0, **settings):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, 15, 25, num_chains=chains, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc.get_samples(group_by_chain=True), mcmc


# -- construct, run ------------------------------------------------------------------------------


@pytest.mark.parametrize("chains", [1, 3])
def test_runs_many_chains(make, chains):
    samples, mcmc = draw(make(model), chains=chains)
    assert {name: x.shape for name, x in samples.items()} == {
        "scale": (chains, 15),
        "x": (chains, 15, 2),
    }
    assert (samples["scale"] > 0).all()
    assert not samples["x"].requires_grad
    assert samples["x"].std() > 0.01  # it moves
    fields = mcmc.get_extra_fields(group_by_chain=True)
    own = set(mcmc.kernel.extra_fields)
    assert set(fields) == {"lp", "acceptance_rate", "step_size", "diverging"} | own
    for stat in fields.values():
        assert stat.shape == (chains, 15)
    assert ((fields["acceptance_rate"] >= 0) & (fields["acceptance_rate"] <= 1)).all()


def test_lp_is_the_log_density_of_the_draw(make):
    samples, mcmc = draw(make(model))
    scale, x = samples["scale"], samples["x"]
    want = dist.Gamma(2.0, 1.0).log_prob(scale) + scale.log()  # the Jacobian of exp
    want = want + dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    want = want + dist.Normal(x, scale[..., None]).log_prob(torch.ones(2)).sum(-1)
    torch.testing.assert_close(mcmc.get_extra_fields(group_by_chain=True)["lp"], want)


def test_same_seed_same_draws_and_nothing_is_kept_between_runs(make):
    kernel = make(model)
    first, _ = draw(kernel)
    again, _ = draw(kernel)
    fresh, _ = draw(make(model))
    other, _ = draw(kernel, seed=1)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], fresh[name])
        assert not torch.equal(first[name], other[name])


def test_runs_under_stock_pyro(make):
    kernel = make(model)
    mcmc = PyroMCMC(kernel, 15, warmup_steps=10, num_chains=1, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (15, 2)
    assert (mcmc.get_samples()["scale"] > 0).all()
    diagnostics = mcmc.diagnostics()
    assert "divergences" in diagnostics
    stats = kernel.diagnostics()["sample_stats"]
    assert all(stat.shape == (15,) for stat in stats.values())
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
    samples, _ = draw(kernel, torch.full((2,), 30.0), chains=20)
    # the scale must grow, or x follow: at y = 1 neither happens
    near, _ = draw(kernel, torch.ones(2), chains=20)
    assert samples["scale"].mean() > 2 * near["scale"].mean()


# -- dtype, pickle, repr --------------------------------------------------------------------------


def test_follows_float64(make):
    torch.set_default_dtype(torch.float64)
    samples, mcmc = draw(make(model))
    assert all(x.dtype == torch.float64 for x in samples.values())
    assert mcmc.get_extra_fields()["lp"].dtype == torch.float64
    assert mcmc.kernel.adaptation.step_size.dtype == torch.float64


def test_pickles_before_and_after_a_run(make):
    kernel = make(model)
    fresh = pickle.loads(pickle.dumps(kernel))
    want, _ = draw(kernel)
    used = pickle.loads(pickle.dumps(kernel))
    for loaded in (fresh, used):
        got, _ = draw(loaded)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_copy_has_the_settings_and_no_memory(make):
    kernel = make(model)
    draw(kernel)
    copied = kernel.copy()
    assert copied.adapt_step_size == kernel.adapt_step_size
    assert copied.full_mass == kernel.full_mass
    with pytest.raises(RuntimeError, match="setup"):
        _ = copied.potential
    assert kernel.potential is not None  # the other keeps its own
    assert copied.step_size == kernel._init_step_size


def test_repr_names_kernel_and_model(make):
    assert type(make()).__name__ in repr(make())
    assert "model" in repr(make(model))
    assert "(," not in repr(make())


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
