"""A run becomes ArviZ data: nothing lost, nothing misnamed, and alike in both ArviZ generations."""

import functools
import math
import warnings
from unittest import mock

import arviz
import arviz_base
import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer import HMC, NUTS, Predictive
from pyro.infer.mcmc import StreamingMCMC

from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy, to_arviz

INSTALLED = int(arviz.__version__.split(".")[0])
# With ArviZ 0.x the form of 1.x (an xarray.DataTree) can be made and tested too.
GENERATIONS = [1] if INSTALLED else [0, 1]

STATS = ["lp", "acceptance_rate", "step_size", "diverging"]


@pytest.fixture(params=GENERATIONS, ids=lambda generation: f"arviz{generation}")
def generation(request, monkeypatch):
    if request.param != INSTALLED:
        monkeypatch.setattr(arviz, "__version__", f"{request.param}.0.0")
    return request.param


def groups(data):
    """The groups as xarray datasets, whatever holds them."""
    if isinstance(data, xarray.DataTree):
        return {name: node.to_dataset() for name, node in data.children.items()}
    return {name: data[name] for name in data.groups()}


def ours(kernel, *args, draws=8, warmup=8, chains=2, **kwargs):
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def stock(kernel, *args, draws=8, chains=2):
    """Pyro's own MCMC, one chain after another whatever the machine."""
    one_core = mock.patch("pyro.infer.mcmc.api.mp.cpu_count", return_value=1)
    with one_core, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "num_chains=.* is more than available_cpu")
        mcmc = pyro.infer.MCMC(kernel, draws, draws, num_chains=chains, disable_progbar=True)
        mcmc.run(*args)
    return mcmc


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.5), obs=y)


Y = torch.tensor([2.0, -1.0, 0.5])

RUNS = {
    "ours-langevin": lambda: ours(LangevinKernel(schools), Y),
    "ours-mh": lambda: ours(MHKernel(schools), Y),
    "ours-sequential": lambda: ours(LangevinKernel(schools), Y, chain_method="sequential"),
    "ours-nuts": lambda: ours(NUTS(schools), Y),
    "stock-langevin": lambda: stock(LangevinKernel(schools), Y),
    "stock-mh": lambda: stock(MHKernel(schools), Y),
    "stock-nuts": lambda: stock(NUTS(schools), Y),
    "stock-hmc": lambda: stock(HMC(schools), Y),
}


@functools.cache
def done(run):
    """Runs are read, not changed: one of each is enough."""
    return RUNS[run]()


# -- the groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_posterior_holds_the_draws(run, generation):
    mcmc = done(run)
    data = to_arviz(mcmc)
    assert isinstance(data, xarray.DataTree) == (generation == 1)
    found = groups(data)
    assert set(found) == {"posterior", "sample_stats", "observed_data"}
    posterior = found["posterior"]
    assert {k: v.dims for k, v in posterior.items()} == {
        "mu": ("chain", "draw"),
        "theta": ("chain", "draw", "school"),
    }
    for name, value in mcmc.get_samples(group_by_chain=True).items():
        np.testing.assert_array_equal(posterior[name], value.numpy())
    for dim, size in {"chain": 2, "draw": 8, "school": 3}.items():
        np.testing.assert_array_equal(posterior[dim], np.arange(size))
    assert found["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(found["observed_data"]["y"], Y.numpy())


@pytest.mark.parametrize("run", RUNS)
def test_sample_stats_have_the_names_of_arviz(run):
    mcmc = done(run)
    stats = groups(to_arviz(mcmc))["sample_stats"]
    told = run.endswith(("langevin", "mh", "sequential"))
    assert list(stats) == (STATS if told else ["diverging"])  # no energy without a momentum
    assert all(v.dims == ("chain", "draw") and v.shape == (2, 8) for v in stats.values())
    assert stats["diverging"].dtype == bool
    if told:
        # lp = -U(z), and on the real line it is the log joint density itself
        posterior = groups(to_arviz(mcmc))["posterior"]
        mu, theta = (torch.tensor(posterior[name].values) for name in ("mu", "theta"))
        lp = (
            dist.Normal(0.0, 2.0).log_prob(mu)
            + dist.Normal(mu[..., None], 1.0).log_prob(theta).sum(-1)
            + dist.Normal(theta, 1.5).log_prob(Y).sum(-1)
        )
        np.testing.assert_allclose(stats["lp"], lp.numpy(), rtol=1e-4)


def test_twelve_chains_keep_their_order():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    mcmc = stock(LangevinKernel(model), draws=3, chains=12)
    found = groups(to_arviz(mcmc))
    lp = dist.Normal(0.0, 1.0).log_prob(torch.tensor(found["posterior"]["x"].values))
    np.testing.assert_allclose(found["sample_stats"]["lp"], lp.numpy(), rtol=1e-4)

    # as NUTS tells it: the indices of the divergent draws of each chain
    mcmc._diagnostics = [{"divergences": [2] if chain in (1, 10) else []} for chain in range(12)]
    diverging = groups(to_arviz(mcmc))["sample_stats"]["diverging"]
    assert list(zip(*np.nonzero(diverging.values))) == [(1, 2), (10, 2)]


def test_thinned_runs_with_more_chains_than_draws(generation):
    mcmc = ours(LangevinKernel(schools), Y, draws=9, chains=50, thinning=3)
    found = groups(to_arviz(mcmc))
    assert dict(found["posterior"].sizes) == {"chain": 50, "draw": 3, "school": 3}
    assert dict(found["sample_stats"].sizes) == {"chain": 50, "draw": 3}


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_saved_warmup(method, generation):
    mcmc = ours(LangevinKernel(schools), Y, save_warmup=True, chain_method=method)
    found = groups(to_arviz(mcmc))
    warmup = mcmc.get_warmup_samples(group_by_chain=True)
    for name in ("mu", "theta"):
        np.testing.assert_array_equal(found["warmup_posterior"][name], warmup[name].numpy())
    assert found["warmup_posterior"]["theta"].dims == ("chain", "draw", "school")
    if method == "vectorized":
        stats = found["warmup_sample_stats"]
        assert list(stats) == STATS
        np.testing.assert_array_equal(stats["lp"], mcmc.results.warmup_fields["lp"].numpy())
    mcmc = ours(LangevinKernel(schools), Y, warmup=0, save_warmup=True, chain_method=method)
    assert set(groups(to_arviz(mcmc))) == {"posterior", "sample_stats", "observed_data"}


def test_runs_without_a_model(generation):
    energy = UnnormalizedEnergy(lambda x: x.square().sum(-1), event_shape=(2,))
    found = groups(to_arviz(ours(LangevinKernel(energy))))
    assert set(found) == {"posterior", "sample_stats"}
    assert found["posterior"]["x"].dims == ("chain", "draw", "x_dim_0")

    def potential(params):
        return params["z"].square().sum()

    start = {"z": torch.zeros(3)}
    mcmc = ours(LangevinKernel(potential_fn=potential), chains=1, initial_params=start)
    assert groups(to_arviz(mcmc))["posterior"]["z"].dims == ("chain", "draw", "z_dim_0")
    with pytest.raises(ValueError, match="observes no data"):
        to_arviz(mcmc, log_likelihood=True)


# -- dimensions and coordinates ------------------------------------------------------------------


def nested(x):
    pyro.sample("scalar", dist.Normal(0.0, 1.0))
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        pyro.sample("w", dist.Dirichlet(torch.ones(4)))
        pyro.sample("m", dist.Normal(0.0, 1.0).expand([2, 3, 2]).to_event(2))
    with rows, columns:
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b[..., None], 1.0).expand([3, 2, 5]).to_event(1), obs=x)


def test_nested_plates_and_event_dims(generation):
    x = torch.randn(3, 2, 5)
    mcmc = ours(LangevinKernel(nested), x)
    found = groups(to_arviz(mcmc, log_likelihood=True))
    assert {k: v.dims[2:] for k, v in found["posterior"].items()} == {
        "scalar": (),
        "a": ("row", "a_dim_1"),
        "b": ("row", "column"),
        "w": ("column", "w_dim_1"),
        "m": ("column", "m_dim_1", "m_dim_2"),
    }
    assert found["posterior"]["m"].shape == (2, 8, 2, 3, 2)  # 2 is not always the column
    assert found["observed_data"]["x"].dims == ("row", "column", "x_dim_2")
    log_likelihood = found["log_likelihood"]["x"]
    assert log_likelihood.dims == ("chain", "draw", "row", "column")
    b = mcmc.get_samples(group_by_chain=True)["b"]
    want = dist.Normal(b[..., None], 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(log_likelihood, want.numpy(), rtol=1e-5, atol=1e-5)


def test_names_and_labels_of_the_user(generation):
    x = torch.randn(3, 2, 5)
    data = ours(LangevinKernel(nested), x).to_arviz(
        log_likelihood=True,
        dims={"x": ["group", None, "time"], "w": [None, "part"], "a": ["group"]},
        coords={"group": ["i", "j", "k"], "part": np.arange(4) / 4, "column": ("u", "v")},
    )
    found = groups(data)
    assert found["observed_data"]["x"].dims == ("group", "column", "time")
    assert found["log_likelihood"]["x"].dims == ("chain", "draw", "group", "column")
    assert found["posterior"]["w"].dims == ("chain", "draw", "column", "part")
    assert found["posterior"]["a"].dims == ("chain", "draw", "group", "a_dim_1")
    assert found["posterior"]["b"].dims == ("chain", "draw", "row", "column")
    assert list(found["observed_data"]["group"].values) == ["i", "j", "k"]
    assert list(found["posterior"]["column"].values) == ["u", "v"]
    assert found["posterior"]["w"].sel(part=0.75, column="v").shape == (2, 8)


def test_a_plate_may_be_called_draw(generation):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("draw", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    found = groups(to_arviz(ours(LangevinKernel(model), Y), log_likelihood=True))
    assert found["observed_data"]["y"].dims == ("y_dim_0",)
    assert found["log_likelihood"]["y"].dims == ("chain", "draw", "y_dim_0")


# -- predictive draws ----------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_posterior_predictive(parallel, generation):
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("extra", dist.Normal(mu, 1.0), obs=None if y is None else torch.zeros(()))
        with pyro.plate("school", 3):
            pyro.factor("penalty", -mu.square())
            pyro.sample("y", dist.Normal(mu, 1.5), obs=y)

    mcmc = ours(LangevinKernel(model), Y)
    drawn = Predictive(model, mcmc.get_samples(), parallel=parallel)()
    assert drawn["extra"].shape == (16, 1)  # an axis of size 1 where other sites have the plate
    found = groups(to_arviz(mcmc, posterior_predictive=drawn))["posterior_predictive"]
    assert {k: v.dims for k, v in found.items()} == {
        "extra": ("chain", "draw"),
        "y": ("chain", "draw", "school"),
    }
    np.testing.assert_array_equal(found["y"], drawn["y"].reshape(2, 8, 3))
    grouped = {"y": drawn["y"].reshape(2, 8, 3).numpy()}
    again = groups(to_arviz(mcmc, posterior_predictive=grouped))["posterior_predictive"]
    xarray.testing.assert_equal(again["y"], found["y"])
    other = to_arviz(mcmc, posterior_predictive={"y": torch.zeros(16, 5)})  # not our 3 schools
    assert other["posterior_predictive"]["y"].dims == ("chain", "draw", "y_dim_0")
    with pytest.raises(ValueError, match=r"posterior_predictive\['y'\] .* got \(5, 3\)"):
        to_arviz(mcmc, posterior_predictive={"y": drawn["y"][:5]})


def test_prior(generation):
    mcmc = ours(LangevinKernel(schools), Y)
    drawn = Predictive(poutine.uncondition(schools), num_samples=7)(Y)
    found = groups(to_arviz(mcmc, prior=drawn))
    assert {k: v.shape for k, v in found["prior"].items()} == {"mu": (1, 7), "theta": (1, 7, 3)}
    assert found["prior"]["theta"].dims == ("chain", "draw", "school")
    assert list(found["prior_predictive"]) == ["y"]
    np.testing.assert_array_equal(found["prior_predictive"]["y"][0], drawn["y"])
    with pytest.raises(ValueError, match="got \\(\\)"):
        to_arviz(mcmc, prior={"mu": torch.tensor(0.0)})


# -- both generations, and what ArviZ makes of it ------------------------------------------------


def same(a, b):
    a, b = groups(a), groups(b)
    assert list(a) == list(b)
    for name in a:
        xarray.testing.assert_identical(a[name].drop_attrs(), b[name].drop_attrs())


def test_both_generations_agree(monkeypatch):
    x = torch.randn(3, 2, 5)
    mcmc = ours(LangevinKernel(nested), x, save_warmup=True)
    made = []
    for generation in GENERATIONS:
        if generation != INSTALLED:
            monkeypatch.setattr(arviz, "__version__", f"{generation}.0.0")
        data = to_arviz(
            mcmc,
            log_likelihood=True,
            posterior_predictive={"x": x.expand(16, 3, 2, 5)},
            prior={"scalar": torch.ones(4), "x": torch.zeros(4, 3, 2, 5)},
            coords={"row": ["p", "q", "r"]},
        )
        made.append(xarray.DataTree.from_dict(groups(data)))
        same(made[-1], made[0])
    assert list(made[0].children) == [
        *("posterior", "posterior_predictive", "log_likelihood", "sample_stats"),
        *("prior", "prior_predictive", "observed_data"),
        *("warmup_posterior", "warmup_sample_stats"),
    ]
    assert made[0]["posterior"].attrs["inference_library"] == "pyro"


def test_as_arviz_itself_would_build_it(monkeypatch):
    monkeypatch.setattr(arviz, "__version__", "1.0.0")
    mcmc = ours(LangevinKernel(schools), Y)
    numpy = {k: v.numpy() for k, v in mcmc.get_samples(group_by_chain=True).items()}
    fields = {k: v.numpy() for k, v in mcmc.get_extra_fields(group_by_chain=True).items()}
    want = arviz_base.from_dict(
        {"posterior": numpy, "sample_stats": fields, "observed_data": {"y": Y.numpy()}},
        dims={"theta": ["school"], "y": ["school"]},
    )
    same(to_arviz(mcmc), want)


def test_arviz_computes_with_it_and_saves_it(generation, tmp_path):
    data = to_arviz(ours(LangevinKernel(schools), Y, draws=50, chains=4), log_likelihood=True)
    library = arviz if generation == INSTALLED else arviz_stats
    summary = library.summary(data)
    assert set(summary.index) == {"mu", "theta[0]", "theta[1]", "theta[2]"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
        loo = library.loo(data, pointwise=True)
    assert loo.elpd_i.dims == ("school",) if hasattr(loo, "elpd_i") else loo.loo_i.shape == (3,)
    assert loo.n_data_points == 3
    assert math.isfinite(float(library.rhat(data)["mu"]))
    data.to_netcdf(tmp_path / "run.nc")
    for name, dataset in groups(data).items():
        with xarray.open_dataset(tmp_path / "run.nc", group=name) as stored:
            xarray.testing.assert_equal(stored, dataset)


if INSTALLED == 0:  # ArviZ 1.x has no from_pyro

    @pytest.mark.parametrize("run", RUNS)
    def test_arviz_from_pyro(run):
        mcmc = done(run)
        mine, theirs = to_arviz(mcmc), arviz.from_pyro(mcmc, dims={"theta": ["school"]})
        xarray.testing.assert_equal(mine["posterior"], theirs["posterior"])
        mine, theirs = mine["sample_stats"], theirs["sample_stats"]
        xarray.testing.assert_equal(mine["diverging"], theirs["diverging"])


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", [MCMC, pyro.infer.MCMC])
def test_before_the_run(runner):
    with pytest.raises(RuntimeError, match="call run first"):
        to_arviz(runner(LangevinKernel(schools), 5))


def test_what_keeps_no_draws():
    with pytest.raises(TypeError, match="got dict"):
        to_arviz({"mu": torch.zeros(3)})
    with pytest.raises(TypeError, match="got StreamingMCMC"):
        to_arviz(StreamingMCMC(LangevinKernel(schools), 5))
    with pytest.raises(TypeError, match="loglik"):
        to_arviz(done("ours-langevin"), loglik=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dims": {"nu": ["a"]}}, r"dims names \['nu'\], the sites are \['mu', 'theta', 'y'\]"),
        ({"dims": {"mu": ["a"]}}, r"dims\['mu'\] has 1 names, but in posterior there are 0"),
        ({"dims": {"theta": "ab"}}, r"dims\['theta'\] must be a list"),
        ({"dims": {"theta": ["chain"]}}, "after chain and draw"),
        ({"coords": {"person": [1]}}, r"coords names \['person'\], .* \['school'\]"),
        ({"coords": {"draw": range(8)}}, r"coords names \['draw'\]"),
        ({"coords": {"school": "ab"}}, r"coords\['school'\] must be 3 labels, for 'theta' in"),
        ({"coords": {"school": ["a", "b"]}}, r"posterior, got 2"),
        ({"unnormalized": True}, "give log_likelihood=True"),
    ],
)
def test_names_that_do_not_fit(arguments, says):
    with pytest.raises(ValueError, match=says):
        to_arviz(done("ours-langevin"), **arguments)
