"""Chains that start at draws of a guide, of Pathfinder, or of an earlier run."""

import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC
from pyro.infer import MCMC as PyroMCMC
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine import trace

from pyro_ebm import (
    MCMC,
    ChEESKernel,
    ConvergenceWarning,
    GibbsKernel,
    LangevinKernel,
    UnnormalizedEnergy,
)
from pyro_ebm.mcmc import ModelPotential, init_to_draws, init_to_guide, init_to_pathfinder
from pyro_ebm.mcmc.starts import pathfinder
from pyro_ebm.mcmc.starts.pathfinder import Paths
from pyro_ebm.models.sites.joint_start import JointStart
from tests.statistics import assert_mean_of_rows, assert_moments

STILL = {"step_size": 1e-9, "adapt_step_size": False, "adapt_mass_matrix": False}
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
HERE = {"mu": torch.tensor(0.0), "tau": torch.tensor(2.0), "eta": torch.zeros(8)}
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def first_draws(strategy, model=schools, data=(SIGMA, Y), num_chains=12, **settings):
    """Where chains start that stand still."""
    kernel = LangevinKernel(model, init_strategy=strategy, **STILL)
    settings |= {"check_convergence": False, "disable_progbar": True}
    mcmc = MCMC(kernel, 1, 0, num_chains=num_chains, **settings)
    mcmc.run(*data)
    return {name: x[:, 0] for name, x in mcmc.get_samples(group_by_chain=True).items()}


# -- a guide ---------------------------------------------------------------------------------------


def together(sigma, y):
    """A guide whose sites are functions of one draw."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(z))
    pyro.sample("tau", dist.Delta(z.exp()))
    with pyro.plate("school", len(y)):
        pyro.sample("eta", dist.Delta(z * torch.arange(8.0)))


@pytest.mark.parametrize("in_one_call", [True, False])
def test_a_draw_of_a_guide_is_one_for_all_sites(in_one_call):
    start = init_to_guide(together, SIGMA, Y)
    if in_one_call:
        found = first_draws(start)
        assert len(found["mu"].unique()) == 12
    else:  # as Pyro's kernels ask, one site after another, within the plates of the model
        settings = {"step_size": 1e-9, "num_steps": 1, "adapt_step_size": False}
        kernel = HMC(schools, init_strategy=start, **settings)
        mcmc = PyroMCMC(kernel, 1, 1, disable_progbar=True)
        mcmc.run(SIGMA, Y)
        found = mcmc.get_samples()
    torch.testing.assert_close(found["tau"], found["mu"].exp(), rtol=1e-3, atol=1e-3)
    eta = found["mu"][:, None] * torch.arange(8.0)
    torch.testing.assert_close(found["eta"], eta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_auto_guides(kind):
    guide = kind(schools, init_scale=1e-4)
    guide(SIGMA, Y)
    median = guide.median(SIGMA, Y)
    found = first_draws(init_to_guide(guide, SIGMA, Y))
    for name, x in found.items():
        torch.testing.assert_close(x, median[name].expand_as(x), rtol=1e-2, atol=1e-2)
    pyro.clear_param_store()
    wide = kind(schools, init_scale=0.5)
    superchains = first_draws(init_to_guide(wide, SIGMA, Y), num_superchains=4)
    mu = superchains["mu"].reshape(4, 3)
    assert (mu - mu[:, :1]).abs().max() < 1e-3 < mu[:, 0].sort().values.diff().min()


def delta(**values):
    """A guide of points, and what it has beside them."""

    def guide(sigma, y):
        pyro.sample("_auto_latent", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        for name, value in values.items():
            pyro.sample(name, dist.Delta(torch.as_tensor(value)))

    return guide


def test_sites_that_a_guide_does_not_have_start_uniformly_and_are_named():
    start = init_to_guide(delta(mu=3.0), SIGMA, Y)
    with pytest.warns(UserWarning, match=r"'eta', 'tau'\].* has \['mu'\], and start unif") as seen:
        found = first_draws(start)
    assert len(seen) == 1
    first_draws(start)  # which says it no more
    assert (found["mu"] - 3).abs().max() < 1e-3
    assert len(found["tau"].unique()) == 12
    assert found["eta"].abs().max() < 2.01


def test_pyros_kernels_say_so_too():
    kernel = HMC(schools, init_strategy=init_to_guide(delta(mu=3.0), SIGMA, Y), step_size=0.1)
    with pytest.warns(UserWarning, match="start uniformly") as seen:
        PyroMCMC(kernel, 1, 1, disable_progbar=True).run(SIGMA, Y)
    assert [str(one.message)[:15] for one in seen] == ["site(s) ['tau']", "site(s) ['eta']"]


def test_a_fallback_that_is_given_is_not_warned_of():
    start = init_to_guide(delta(mu=3.0), SIGMA, Y, fallback=init_to_value(values=HERE))
    found = first_draws(start)
    assert (found["tau"] - 2).abs().max() < 1e-3 > found["eta"].abs().max()


WRONG = {
    "no site": ({"theta": 0.0}, r"\['eta', 'mu', 'tau'\]: its own are \['theta'\]"),
    "shape": ({"eta": torch.zeros(9)}, r"shape \(9,\) for site 'eta'.* \(8,\)"),
    "support": ({"tau": -1.5}, r"site 'tau' outside of its support.*as -1\.5\)"),
    "nan": ({"mu": float("nan")}, r"site 'mu' outside of its support Real"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_guide_of_another_model(kind):
    values, message = WRONG[kind]
    start = init_to_guide(delta(**values), SIGMA, Y, fallback=init_to_value(values=HERE))
    with pytest.raises(ValueError, match="^the guide has .*" + message):
        first_draws(start)


@pytest.mark.parametrize("bad", [torch.tensor(-1.5), torch.zeros(2)])
def test_draws_of_which_one_is_wrong(bad):
    """Where they start all chains at once, and the first of them is good."""
    values = iter([*3 * [torch.tensor(1.0)], *20 * [bad]])

    def guide(sigma, y):
        pyro.sample("mu", dist.Delta(torch.tensor(0.0)))
        pyro.sample("tau", dist.Delta(next(values)))
        pyro.sample("eta", dist.Delta(torch.zeros(8)))

    with pytest.raises(ValueError, match=r"the guide has values of .*site 'tau'"):
        first_draws(init_to_guide(guide, SIGMA, Y))


def test_values_that_rounding_moved_onto_the_edge_of_a_support_are_in_it():
    p = torch.full((1000,), 1e-3) * (1 + 1e-5)  # sums to 1 to four digits
    start = JointStart(lambda num: {"p": p.expand(num, -1), "s": torch.zeros(num)})
    start.check_values("p", p[None], p.shape, dist.constraints.simplex)
    start.check_values("s", torch.zeros(1), torch.Size(), dist.constraints.positive)
    with pytest.raises(ValueError, match="outside"):
        start.check_values("p", 2 * p[None], p.shape, dist.constraints.simplex)
    with pytest.raises(ValueError, match="outside"):
        start.check_values("m", -torch.eye(2)[None], (2, 2), dist.constraints.positive_definite)


# -- an earlier run --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "pyro", "arviz", "store"])
def test_draws_of_an_earlier_run_serve_once_each(tmp_path, kind):
    store = {"store": tmp_path / "a.zarr"} if kind == "store" else {}
    kernel = ChEESKernel(schools)
    mcmc = MCMC(kernel, 3, 20, num_chains=4, disable_progbar=True, **store)
    if kind == "pyro":
        mcmc = PyroMCMC(HMC(schools, step_size=0.1, num_steps=3), 12, 5, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    source = mcmc.to_arviz() if kind == "arviz" else mcmc
    found = first_draws(init_to_draws(source))
    if kind == "store":
        before = {k: torch.from_numpy(x.values) for k, x in mcmc.to_arviz()["posterior"].items()}
        before = {k: x.flatten(0, 1) for k, x in before.items()}
    else:
        before = mcmc.get_samples()
    for name, x in found.items():
        order, there = found["mu"].argsort(), before["mu"].argsort()
        torch.testing.assert_close(x[order], before[name][there], rtol=1e-3, atol=1e-3)


def test_discrete_sites_start_where_the_draws_have_them():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(5.0 * k, 1.0))

    k = torch.tensor([0, 1, 2, 2, 1, 1])
    start = JointStart(lambda num: {"k": k[:num], "x": 5.0 * k[:num]})
    potential = ModelPotential(model, init_strategy=start, keep_discrete=True)
    assert potential.initial(6).tolist() == [[i, 5.0 * i] for i in k.tolist()]
    wrong = JointStart(lambda num: {"k": k[:num] + 3, "x": k})
    with pytest.raises(ValueError, match="values of site 'k' outside"):
        ModelPotential(model, init_strategy=wrong, keep_discrete=True)

    points = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    energy = UnnormalizedEnergy(lambda x: x.sum(-1), [2], support=dist.constraints.boolean)
    start = JointStart(lambda num: {"x": points[:num]})
    kernel = GibbsKernel(energy, init_strategy=start)
    assert torch.equal(kernel.make_potential().initial(2), points)
    kernel = GibbsKernel(energy, init_strategy=JointStart(lambda num: {"y": points[:num]}))
    with pytest.raises(ValueError, match="no site in common"):
        kernel.make_potential().initial(2)


def test_beside_sites_that_are_summed_out():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("two", 2):
            pyro.sample("x", dist.Normal(5.0 * k, 1.0))

    def start(shape):
        return JointStart(lambda num: {"x": torch.full((num, *shape), 7.0)})

    assert (first_draws(start((2,)), model, ())["x"] - 7).abs().max() < 1e-3
    settings = {"step_size": 1e-9, "num_steps": 1, "adapt_step_size": False}
    kernel = HMC(model, init_strategy=start((2,)), max_plate_nesting=1, **settings)
    kernel.setup(0)
    assert kernel.initial_params["x"].tolist() == [7.0, 7.0]
    kernel = HMC(model, init_strategy=start(()), max_plate_nesting=1, **settings)
    with pytest.raises(ValueError, match=r"shape \(\) for site 'x', which has shape \(2,\)"):
        kernel.setup(0)


def test_what_has_no_draws():
    with pytest.raises(ValueError, match="init_to_draws wants a pyro_ebm"):
        init_to_draws({"x": 3})
    with pytest.raises(RuntimeError, match="no draws yet"):
        init_to_draws(MCMC(LangevinKernel(schools), 3))


# -- Pathfinder ------------------------------------------------------------------------------------


def quadratic(hessian, steps, history):
    """Two paths on z A z / 2 after random steps, and their H by the recursion of BFGS."""
    paths, d = 2, len(hessian)
    z = torch.randn(paths, d, dtype=torch.float64)
    none = z.new_zeros(paths, history, d)
    alpha = torch.rand(paths, d, dtype=torch.float64) + 0.5
    here = Paths(z, (z @ hessian * z).sum(-1) / 2, z @ hessian, alpha, none, none)
    pairs = []
    for _ in range(steps):
        there = here.z + torch.randn_like(z)
        pairs.append((there - here.z, (there - here.z) @ hessian))
        here = here.at(there, (there @ hessian * there).sum(-1) / 2, there @ hessian)
    h = torch.diag_embed(here.alpha)
    one = torch.eye(d, dtype=torch.float64)
    for s, y in pairs[-history:]:
        rho = 1 / (s * y).sum(-1)[:, None, None]
        left = one - rho * s[:, :, None] * y[:, None]
        h = left @ h @ left.mT + rho * s[:, :, None] * s[:, None]
    return here, h


@pytest.mark.parametrize(("d", "steps", "history"), [(5, 2, 3), (5, 9, 3), (30, 4, 6), (1, 3, 2)])
def test_the_low_rank_form_is_that_of_bfgs(d, steps, history):
    a = torch.randn(d, d, dtype=torch.float64)
    here, h = quadratic(a @ a.T + torch.eye(d, dtype=torch.float64), steps, history)
    want = -(h @ here.grad[..., None])[..., 0]
    torch.testing.assert_close(here.direction(), want)
    normal = here.normal()
    torch.manual_seed(3)
    phi, log_q = normal.draw(4)
    exact = torch.distributions.MultivariateNormal(here.z + want, (h + h.mT) / 2)
    torch.testing.assert_close(log_q, exact.log_prob(phi))


def test_a_descent_ends_at_the_mode_of_a_gaussian():
    scale = torch.diag(torch.tensor([0.1, 1.0, 3.0, 10.0])) + 0.1
    target = dist.MultivariateNormal(torch.ones(4), scale_tril=scale.tril())
    start = init_to_pathfinder(target, num_draws=4000)
    found = start.pathfinder
    assert found.pareto_k < 0.7
    assert (found.elbo > -0.05).sum() > 8  # log Z is 0
    assert_mean_of_rows(first_draws(start, target, (), num_chains=800)["x"], torch.ones(4))


def test_chains_start_in_the_bulk():
    """Of a posterior whose mode, at tau = 0, holds none of it."""
    start = init_to_pathfinder(schools, SIGMA, Y)
    found = first_draws(start, num_chains=300)
    mcmc = MCMC(ChEESKernel(schools), 50, 100, num_chains=40, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    lp = mcmc.get_extra_fields()["lp"]
    z = ModelPotential(schools, (SIGMA, Y))
    params = {name: z.transforms[name](x) for name, x in found.items()}
    there = -z(z.ravel(params))
    assert lp.quantile(0.01) < there.quantile(0.1)
    assert there.quantile(0.9) < lp.quantile(0.99)


def test_a_tail_that_no_normal_covers_is_warned_of(monkeypatch):
    normal = dist.Normal(0.0, 1.0)
    monkeypatch.setattr(pathfinder, "pareto_smoothed", lambda log_w: (log_w, 0.69))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init_to_pathfinder(normal)
    monkeypatch.setattr(pathfinder, "pareto_smoothed", lambda log_w: (log_w, 0.71))
    with pytest.warns(
        ConvergenceWarning, match=r"Pareto k of 0\.71 \(up to 0\.7 is good\)"
    ) as seen:
        init_to_pathfinder(normal)
    assert seen[0].filename == __file__
    with pytest.warns(ConvergenceWarning, match="of 16 draws are too few"):
        init_to_pathfinder(normal, num_draws=16)


def test_a_descent_needs_continuous_sites():
    def model():
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"model has only the discrete sites \['k'\]"):
        init_to_pathfinder(model)
    with pytest.raises(ValueError, match="model has no latent sites"):
        init_to_pathfinder(lambda: None)


def test_starts_can_be_pickled_and_repeat():
    start = init_to_pathfinder(schools, SIGMA, Y, num_paths=4)
    again = pickle.loads(pickle.dumps(init_to_draws_of(start)))
    pyro.set_rng_seed(1)
    first = first_draws(start)
    pyro.set_rng_seed(1)
    second = first_draws(start)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first_draws(again).keys() == first.keys()


def init_to_draws_of(start):
    values = start.draw(30)
    mcmc = MCMC(LangevinKernel(schools), 1, 0, num_chains=2, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    assert values.keys() == mcmc.get_samples().keys()
    return init_to_draws(mcmc)


@pytest.mark.parametrize("argument", ["num_paths", "num_draws", "max_iterations"])
def test_arguments(argument):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        init_to_pathfinder(schools, SIGMA, Y, **{argument: 0})


def test_a_guide_is_called_with_its_arguments():
    model = trace(schools).get_trace(SIGMA, Y)
    assert model.nodes["eta"]["value"].shape == (8,)
    with pytest.raises(TypeError, match="missing 2 required"):
        first_draws(init_to_guide(together))


# -- many short chains -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", ["uniform", "pathfinder"])
def test_a_thousand_chains_of_ten_draws(start):
    strategy = (
        {} if start == "uniform" else {"init_strategy": init_to_pathfinder(schools, SIGMA, Y)}
    )
    kernel = ChEESKernel(schools, **strategy)
    mcmc = MCMC(kernel, 10, 40, num_chains=1000, num_superchains=10, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    found = mcmc.diagnostics()
    assert max(float(found[name]["r_hat"].max()) for name in ("mu", "tau", "eta")) < 1.01
    draws = mcmc.get_samples(group_by_chain=True)
    # by quadrature over (mu, tau)
    mu, tau = torch.meshgrid(
        torch.linspace(-30, 30, 301, dtype=torch.float64),
        torch.arange(0.025, 150.0, 0.05, dtype=torch.float64),
        indexing="ij",
    )
    log_p = -(mu**2) / 50 - (1 + tau**2 / 25).log()
    for y, sigma in zip(Y.double(), SIGMA.double(), strict=True):
        variance = sigma**2 + tau**2
        log_p = log_p - variance.log() / 2 - (y - mu) ** 2 / (2 * variance)
    p = log_p.flatten().softmax(0)
    mean_mu, mean_tau = float(p @ mu.flatten()), float(p @ tau.flatten())
    assert mean_mu == pytest.approx(4.41, abs=0.02)
    assert mean_tau == pytest.approx(3.6, abs=0.02)
    assert_moments(draws["mu"], mean_mu, float(p @ (mu.flatten() - mean_mu) ** 2))
    assert_moments(draws["tau"], mean_tau, float(p @ (tau.flatten() - mean_tau) ** 2))
