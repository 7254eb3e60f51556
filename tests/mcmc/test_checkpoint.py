"""A run that stops anywhere and goes on is the run that never stopped, to the last bit."""

import datetime
import errno
import functools
import inspect
import pickle
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc import NUTS
from torch.utils._pytree import tree_flatten

import pyro_ebm.mcmc
from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy, files
from pyro_ebm.distributions import RBM, BoltzmannMachine, lattice_edges
from pyro_ebm.files import CheckpointError
from pyro_ebm.mcmc import (
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    DiscreteLangevinKernel,
    ExchangeKernel,
    Flip,
    FlowKernel,
    GibbsKernel,
    GibbsWithGradientsKernel,
    Independence,
    Kernel,
    SGHMCKernel,
    SGLDKernel,
    TemperingKernel,
)
from tests.mcmc import killed_run
from tests.ranks import processes

DATA = torch.tensor([0.5, -1.0, 2.0])


def regression(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.sum(), scale), obs=y)


def subsampled(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(x.sum(), scale), obs=y[rows])


def clusters(y):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    x = pyro.sample("x", dist.Normal(1.0 * k, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def coupling(y):
    J = pyro.sample("J", dist.Uniform(0.0, 1.0))
    spins = torch.where(y > 0, 1.0, -1.0).repeat(3)
    pyro.sample("s", BoltzmannMachine(J, edges=lattice_edges(3, 3)), obs=spins)


def doubly_intractable(y):
    precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=y)


def both(y):
    doubly_intractable(y)
    pyro.sample("z", dist.Normal(0.0, 1.0))


def bits():
    logits = torch.tensor([0.3, -0.4, 0.1, 0.8])
    return UnnormalizedEnergy(lambda x: -(x @ logits), (4,), dist.constraints.boolean)


def rbm():
    generator = torch.Generator().manual_seed(0)
    return RBM(torch.randn(4, 3, generator=generator), torch.zeros(4), torch.zeros(3))


# name: a fresh kernel, and whether its model takes the data
KERNELS = {
    "langevin": (lambda: LangevinKernel(regression), True),
    "langevin-dense": (lambda: LangevinKernel(regression, full_mass=True), True),
    "langevin-schedule": (
        lambda: LangevinKernel(
            regression, step_size=lambda t: 0.1 / (1 + t) ** 0.3, adjusted=False
        ),
        True,
    ),
    "barker": (lambda: BarkerKernel(regression), True),
    "chees": (lambda: ChEESKernel(regression), True),
    "chees-dense": (lambda: ChEESKernel(regression, full_mass=True), True),
    "chees-unit": (lambda: ChEESKernel(regression, adapt_mass_matrix=False), True),
    "sgld": (lambda: SGLDKernel(subsampled), True),
    "sgld-center": (lambda: SGLDKernel(subsampled, control_variates=True), True),
    "sghmc": (lambda: SGHMCKernel(subsampled, shared_rows=False), True),
    "walk": (lambda: MHKernel(regression), True),
    "independence": (
        lambda: MHKernel(
            regression, proposal=Independence(dist.Normal(torch.zeros(3), 1.5).to_event(1))
        ),
        True,
    ),
    "gibbs": (lambda: GibbsKernel(lambda y: pyro.sample("k", dist.Categorical(y.exp()))), True),
    "gibbs-blocks": (lambda: GibbsKernel(rbm()), False),
    "flip": (lambda: MHKernel(bits(), proposal=Flip(2)), False),
    "gibbs-with-gradients": (lambda: GibbsWithGradientsKernel(bits()), False),
    "discrete-langevin": (lambda: DiscreteLangevinKernel(bits()), False),
    "composite": (lambda: CompositeKernel(clusters), True),
    "composite-chees": (lambda: CompositeKernel(clusters, [GibbsKernel(), ChEESKernel()]), True),
    "tempering": (lambda: TemperingKernel(LangevinKernel(regression), [1.0, 0.5, 0.2]), True),
    "tempering-chees": (lambda: TemperingKernel(ChEESKernel(regression), [1.0, 0.5]), True),
    "flow": (lambda: FlowKernel(LangevinKernel(regression), num_fit_steps=10), True),
    "tempering-gibbs": (lambda: TemperingKernel(GibbsKernel(rbm()), [1.0, 0.5]), False),
    "tempering-composite": (lambda: TemperingKernel(CompositeKernel(clusters), [1.0, 0.5]), True),
    "exchange": (lambda: ExchangeKernel(coupling), True),
    "exchange-chain": (lambda: ExchangeKernel(doubly_intractable, num_inner_steps=3), True),
    "exchange-composite": (
        lambda: CompositeKernel(both, [ExchangeKernel(num_inner_steps=3), LangevinKernel()]),
        True,
    ),
}


def test_every_kernel_is_here():
    kernels = {x for x in vars(pyro_ebm.mcmc).values() if isinstance(x, type)}
    kernels = {x for x in kernels if issubclass(x, Kernel) and not inspect.isabstract(x)}
    assert kernels == {type(make()) for make, _ in KERNELS.values()}


class Stop(Exception):
    """Ends a run in its middle."""


class StopAt:
    """A hook that ends the run after some transitions, warmup and all."""

    def __init__(self, *stops):
        self.stops, self.t = list(stops), 0

    def __call__(self, kernel, params, stage, i):
        self.t += 1
        if self.t in self.stops:
            raise Stop


def sampler(kernel, path, num_samples=20, warmup_steps=25, chains=3, **settings):
    settings = {"checkpoint_every": 4, "disable_progbar": True, **settings}
    return MCMC(kernel, num_samples, warmup_steps, num_chains=chains, checkpoint=path, **settings)


def learned(kernel):
    """All numbers that a kernel has learned and counted, and words as numbers."""
    leaves, _ = tree_flatten(kernel.state_dict())
    return [list(x.encode()) if isinstance(x, str) else x for x in leaves if x is not None]


def everything(mcmc):
    """Draws, statistics, and where the random numbers are."""
    found = {
        **{f"draws of {k}": v for k, v in mcmc.get_samples(group_by_chain=True).items()},
        **{f"statistic {k}": v for k, v in mcmc.get_extra_fields(group_by_chain=True).items()},
        "the random state after": torch.get_rng_state(),
        **{f"learned {i}": torch.as_tensor(x) for i, x in enumerate(learned(mcmc.kernel))},
    }
    if mcmc.save_warmup:
        warmup = mcmc.get_warmup_samples(group_by_chain=True)
        found |= {f"warmup of {k}": v for k, v in warmup.items()}
    return found


def assert_identical(mcmc, wanted):
    found = mcmc if isinstance(mcmc, dict) else everything(mcmc)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def uninterrupted(make, path, data, **settings):
    pyro.set_rng_seed(0)
    mcmc = sampler(make(), path, **settings)
    mcmc.run(*data)
    return everything(mcmc)


@functools.cache
def whole_run(name, **settings):
    """An uninterrupted run without a file, made once for all tests."""
    return uninterrupted(KERNELS[name][0], None, (DATA,), **settings)


def interrupted(make, path, data, *stops, **settings):
    """A run that ends and is resumed, in a new sampler with another random state, several times."""
    pyro.set_rng_seed(0)
    mcmc = sampler(make(), path, hook_fn=StopAt(stops[0]), **settings)
    with pytest.raises(Stop):
        mcmc.run(*data)
    for i, stop in enumerate(stops[1:]):
        pyro.set_rng_seed(100 + i)
        mcmc = sampler(make(), path, hook_fn=StopAt(stop), **settings)
        with pytest.raises(Stop):
            mcmc.resume(*data)
    pyro.set_rng_seed(200)
    mcmc = sampler(make(), path, **settings)
    mcmc.resume(*data)
    return mcmc


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_goes_on_exactly(tmp_path, name):
    make, takes_data = KERNELS[name]
    data = (DATA,) if takes_data else ()
    whole = uninterrupted(make, tmp_path / "a", data, num_samples=10)
    # in warmup before the first window, in it, after its end, and while sampling
    stopped = interrupted(make, tmp_path / "b", data, 2, 8, 9, 12, num_samples=10)
    assert_identical(stopped, whole)


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"save_warmup": True},
        {"thinning": 3},
        {"save_params": ["scale"]},
        {"chains": 1},
        {"warmup_steps": 0, "num_samples": 45},
        {"draws_device": "cpu", "checkpoint_every": datetime.timedelta(microseconds=1)},
        {"checkpoint_every": 1000},
        {"initial_params": {"scale": torch.zeros(3), "x": torch.ones(3, 2)}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_goes_on_exactly(tmp_path, settings):
    make = KERNELS["langevin"][0]
    whole = uninterrupted(make, tmp_path / "a", (DATA,), **settings)
    assert_identical(interrupted(make, tmp_path / "b", (DATA,), 2, 17, 13, **settings), whole)


def test_a_checkpoint_changes_no_draw(tmp_path):
    whole = uninterrupted(KERNELS["chees"][0], tmp_path / "a", (DATA,))
    assert_identical(whole_run("chees"), whole)


def test_checkpoints_cost_as_much_late_as_early(tmp_path, monkeypatch):
    written = []
    save = files.save

    def measured(path, *args):
        checksum = save(path, *args)
        written.append(Path(path).stat().st_size)
        return checksum

    monkeypatch.setattr(files, "save", measured)
    pyro.set_rng_seed(0)
    mcmc = sampler(LangevinKernel(regression), tmp_path / "a", 600, 20, checkpoint_every=20)
    mcmc.run(DATA)
    early, late = sum(written[10:20]), sum(written[-11:-1])
    assert late < 1.05 * early


def test_a_compiled_run_goes_on_exactly(tmp_path):
    def make():
        return LangevinKernel(regression, jit_compile="capture")

    whole = uninterrupted(make, tmp_path / "a", (DATA,))
    assert_identical(interrupted(make, tmp_path / "b", (DATA,), 2, 30), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["langevin", "chees", "walk", "gibbs-blocks", "tempering"])
def test_a_compiled_run_of_each_kernel_goes_on_exactly(tmp_path, name):
    make, takes_data = KERNELS[name]

    def compiled():
        kernel = make()
        getattr(kernel, "kernel", kernel).jit_compile = True
        return kernel

    data = (DATA,) if takes_data else ()
    whole = uninterrupted(compiled, tmp_path / "a", data)
    assert_identical(interrupted(compiled, tmp_path / "b", data, 2, 30), whole)


# -- killed ----------------------------------------------------------------------------------------


def kill(tmp_path, kernel, kills):
    """Kills runs in other processes, and goes on from the last one here."""
    with ProcessPoolExecutor(1, processes) as pool:
        told = pool.submit(killed_run.killed, tmp_path, kernel, kills).result()
    mcmc = killed_run.sampler(kernel, told["path"])
    if told["path"].exists():
        mcmc.resume(killed_run.DATA)
    else:
        pyro.set_rng_seed(0)
        mcmc.run(killed_run.DATA)
    wanted = files.load(tmp_path / "reference", killed_run.KIND)
    assert killed_run.same(killed_run.result(mcmc), wanted)
    return told


def test_a_run_killed_at_any_moment_loses_nothing(tmp_path):
    kill(tmp_path, "langevin", 6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", killed_run.KERNELS)
def test_a_run_killed_many_times_loses_nothing(tmp_path, kernel):
    told = kill(tmp_path, kernel, 60)
    assert min(told["warmup"], told["sampling"]) >= 3, told
    assert told["finished"] >= 1, told


# -- more draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinning", [1, 3])
@pytest.mark.parametrize("with_file", [False, True])
def test_an_extended_run_is_the_longer_run(tmp_path, thinning, with_file):
    make = KERNELS["chees"][0]
    whole = whole_run("chees", num_samples=40, thinning=thinning)
    pyro.set_rng_seed(0)
    mcmc = sampler(make(), tmp_path / "a" if with_file else None, thinning=thinning)
    mcmc.run(DATA)
    mcmc.extend(7)
    mcmc.extend(13)
    assert_identical(mcmc, whole)
    assert len(mcmc.diagnostics()["divergences"]) == 3
    assert mcmc.to_arviz().posterior["x"].shape == (3, 40 // thinning, 2)


def test_an_extension_is_resumed_too(tmp_path):
    make = KERNELS["langevin"][0]
    whole = uninterrupted(make, None, (DATA,), num_samples=40, save_warmup=True)
    mcmc = interrupted(make, tmp_path / "a", (DATA,), 30, save_warmup=True)
    mcmc.hook_fn = StopAt(13)
    with pytest.raises(Stop):
        mcmc.extend(20)
    pyro.set_rng_seed(100)
    mcmc = sampler(make(), tmp_path / "a", save_warmup=True)
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)


def test_an_extension_that_is_killed_at_once_is_not_forgotten(tmp_path):
    make = KERNELS["langevin"][0]
    whole = whole_run("langevin", num_samples=40)
    mcmc = sampler(make(), tmp_path / "a", checkpoint_every=10**6)
    pyro.set_rng_seed(0)
    mcmc.run(DATA)
    mcmc.hook_fn = StopAt(1)
    with pytest.raises(Stop):
        mcmc.extend(20)
    mcmc = sampler(make(), tmp_path / "a", checkpoint_every=10**6)
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)


@pytest.mark.parametrize("where", ["prior", "datum"])
def test_a_model_that_is_another_by_little_is_told_from_it(tmp_path, where):
    """Under many data, which are read from elsewhere, float32 potentials are tens of thousands."""
    y = torch.randn(20_000) + 1
    prior = torch.tensor(0.0)

    def model():
        b = pyro.sample("b", dist.Normal(prior, 1.0))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + 0 * b, 1.0), obs=y)

    def make(**kwargs):
        path, every = tmp_path / "a", 5
        kernel = LangevinKernel(model)
        return MCMC(
            kernel,
            20,
            20,
            num_chains=3,
            disable_progbar=True,
            checkpoint=path,
            checkpoint_every=every,
            **kwargs,
        )

    with pytest.raises(Stop):
        make(hook_fn=StopAt(12)).run()
    if where == "prior":
        prior += 3
    else:
        y[0] += 5
    with pytest.raises(CheckpointError, match="the model is another one"):
        make().resume()


def test_a_finished_run_is_resumed_without_a_transition(tmp_path):
    make = KERNELS["chees"][0]
    whole = uninterrupted(make, tmp_path / "a", (DATA,))
    mcmc = sampler(make(), tmp_path / "a", hook_fn=StopAt(1))
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)


def test_run_starts_anew(tmp_path):
    mcmc = sampler(LangevinKernel(regression), None)
    for _ in range(2):
        pyro.set_rng_seed(0)
        mcmc.run(DATA)
        found = everything(mcmc)
    assert found["draws of x"].shape[1] == 20
    assert_identical(whole_run("langevin"), found)


def test_what_cannot_be_extended(tmp_path):
    kernel = LangevinKernel(regression)
    mcmc = sampler(kernel, None)
    with pytest.raises(RuntimeError, match="call run, or resume, first"):
        mcmc.extend(5)
    mcmc.run(DATA)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        mcmc.extend(0)
    sampler(kernel, None).run(DATA)
    with pytest.raises(RuntimeError, match="was used for another run since"):
        mcmc.extend(5)
    one = MCMC(kernel, 5, chain_method="sequential", disable_progbar=True)
    one.run(DATA)
    with pytest.raises(RuntimeError, match="vectorized"):
        one.extend(5)


def test_a_run_that_was_read_keeps_its_draws_once(tmp_path):
    mcmc = sampler(LangevinKernel(regression), None, save_warmup=True)
    mcmc.run(DATA)
    for record in mcmc.runner.chains.records.values():
        assert record.store.values == {}


def test_a_sampler_pickles_after_its_run(tmp_path):
    mcmc = sampler(MHKernel(UnnormalizedEnergy(torch.square)), tmp_path / "a")
    mcmc.run()
    again = pickle.loads(pickle.dumps(mcmc))
    assert_identical(again.get_samples(), mcmc.get_samples())
    with pytest.raises(RuntimeError, match="call run, or resume, first"):
        again.extend(5)


# -- what does not belong together -----------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    """A run in its middle."""
    pyro.set_rng_seed(0)
    with pytest.raises(Stop):
        sampler(LangevinKernel(regression), tmp_path / "a", hook_fn=StopAt(33)).run(DATA)
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_samples": 30}, "num_samples is 30, and was 20"),
        ({"warmup_steps": 30}, "warmup_steps is 30, and was 25"),
        ({"chains": 4}, "num_chains is 4, and was 3"),
        ({"thinning": 2}, "thinning is 2, and was 1"),
        ({"save_warmup": True}, "save_warmup is True, and was False"),
        ({"save_params": ["x"]}, "save_params[0] is 'x', and was 'scale'"),
    ],
)
def test_other_settings(stopped, settings, says):
    with pytest.raises(CheckpointError, match=re.escape(says)) as error:
        sampler(LangevinKernel(regression), stopped, **settings).resume(DATA)
    assert f"{stopped} is of another run" in str(error.value)


def wider(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), scale).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (
            lambda: LangevinKernel(regression, step_size=0.2),
            "the kernel.step_size is 0.2, and was 0.1",
        ),
        (
            lambda: LangevinKernel(regression, full_mass=True),
            "the kernel.full_mass is True, and was 'auto'",
        ),
        (lambda: LangevinKernel(regression, jit_compile="capture"), "jit_compile is 'capture'"),
        (lambda: BarkerKernel(regression), "the kernel is BarkerKernel, and was LangevinKernel"),
        (lambda: LangevinKernel(wider), "site 'x' is (3,) float32, and was (2,) float32"),
        (
            lambda: LangevinKernel(pyro.poutine.scale(regression, 1.1)),
            "the model is another one: at the positions that were saved its potential",
        ),
    ],
)
def test_other_kernels_and_models(stopped, kernel, says):
    with pytest.raises(CheckpointError, match=re.escape(says)):
        sampler(kernel(), stopped).resume(DATA)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DATA + 0.01, "argument[0] is tensor (3,) float32"),
        (DATA.double(), "float64"),
        (torch.zeros(4), "argument[0] is tensor (4,)"),
    ],
)
def test_other_data(stopped, data, says):
    with pytest.raises(CheckpointError, match=re.escape(says)):
        sampler(LangevinKernel(regression), stopped).resume(data)


def test_other_proposals(tmp_path):
    def make(scale):
        q = dist.Normal(torch.zeros(3), scale).to_event(1)
        return MHKernel(regression, proposal=Independence(q))

    with pytest.raises(Stop):
        sampler(make(1.0), tmp_path / "a", hook_fn=StopAt(9)).run(DATA)
    with pytest.raises(CheckpointError, match=r"the kernel\.proposal\.distribution"):
        sampler(make(1.1), tmp_path / "a").resume(DATA)


def test_parameters_are_data_too(tmp_path):
    net = torch.nn.Linear(2, 1)

    def model():
        pyro.module("net", net)
        pyro.sample("x", UnnormalizedEnergy(lambda x: net(x)[..., 0] + x.square().sum(-1), (2,)))

    with pytest.raises(Stop):
        sampler(LangevinKernel(model), tmp_path / "a", hook_fn=StopAt(9)).run()
    torch.nn.init.ones_(net.weight)
    with pytest.raises(CheckpointError, match="the model is another one"):
        sampler(LangevinKernel(model), tmp_path / "a").resume()


def test_never_a_new_start_where_there_is_no_file(tmp_path):
    mcmc = sampler(LangevinKernel(regression), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="start with run"):
        mcmc.resume(DATA)
    with pytest.raises(RuntimeError, match="nothing to resume from: give a file"):
        sampler(LangevinKernel(regression), None).resume(DATA)


def test_never_a_new_start_over_another_run(stopped):
    mcmc = sampler(LangevinKernel(regression), stopped)
    before = stopped.read_bytes()
    with pytest.raises(CheckpointError, match=r"is there already: go on from it with resume\("):
        mcmc.run(DATA)
    assert stopped.read_bytes() == before
    stopped.unlink()
    with pytest.raises(CheckpointError, match=r"a\.draws holds the draws of another run"):
        mcmc.run(DATA)
    shutil.rmtree(f"{stopped}.draws")
    mcmc.run(DATA)


def test_a_checkpoint_of_an_earlier_version_is_refused_with_a_sentence(stopped):
    payload = files.load(stopped, "an MCMC run")
    del payload["format"]
    files.save(stopped, payload, "an MCMC run")
    with pytest.raises(CheckpointError, match="was written by an earlier version of pyro_ebm"):
        sampler(LangevinKernel(regression), stopped).resume(DATA)


def test_draws_that_are_missing_or_others(stopped, tmp_path):
    def resume():
        sampler(LangevinKernel(regression), stopped).resume(DATA)

    first, second = (Path(f"{stopped}.draws", f"0000{i}.draws") for i in range(2))
    kept = [path.read_bytes() for path in (first, second)]
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00001\.draws is missing"):
        resume()
    second.write_bytes(kept[0])
    with pytest.raises(CheckpointError, match="does not go on from the file of draws before it"):
        resume()
    second.write_bytes(kept[1][:-1])
    with pytest.raises(CheckpointError, match=r"00001\.draws is cut short"):
        resume()
    pyro.set_rng_seed(1)
    with pytest.raises(Stop):
        sampler(LangevinKernel(regression), tmp_path / "b", hook_fn=StopAt(33)).run(DATA)
    shutil.rmtree(f"{stopped}.draws")
    shutil.copytree(tmp_path / "b.draws", f"{stopped}.draws")
    with pytest.raises(CheckpointError, match="are not those of"):
        resume()


def test_a_state_that_is_cut_short_and_the_one_before_it(stopped):
    whole = whole_run("langevin")
    stopped.write_bytes(stopped.read_bytes()[:-100])
    mcmc = sampler(LangevinKernel(regression), stopped)
    with pytest.raises(CheckpointError, match="The file before it is whole: to go on from there"):
        mcmc.resume(DATA)
    files.previous(stopped).replace(stopped)
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)


def test_a_draws_file_that_no_state_speaks_of_is_replaced(stopped):
    """As after a kill between the two."""
    whole = whole_run("langevin")
    files.previous(stopped).replace(stopped)
    mcmc = sampler(LangevinKernel(regression), stopped, checkpoint_every=3)
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)
    again = sampler(LangevinKernel(regression), stopped)
    again.resume(DATA)
    assert_identical(again, whole)


def test_another_machine_is_a_warning(stopped):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    mcmc = sampler(LangevinKernel(regression), stopped)
    try:
        with pytest.warns(UserWarning, match="not to the last bit: the number of threads is 2"):
            mcmc.resume(DATA)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "1h", datetime.timedelta(0), None])
def test_how_often(every):
    with pytest.raises(ValueError, match=r"checkpoint_every must be .*timedelta\(minutes=1\)"):
        sampler(LangevinKernel(regression), "a", checkpoint_every=every)


@pytest.mark.parametrize("what", ["checkpoint", "store", "draws_device"])
def test_one_chain_after_another_is_refused(what):
    for kernel, method in ((LangevinKernel(regression), "sequential"), (NUTS(regression), None)):
        with pytest.raises(ValueError, match=f'{what}= needs chain_method="vectorized"'):
            MCMC(kernel, 5, chain_method=method, **{what: "cpu"})


# -- faults ----------------------------------------------------------------------------------------


class FullDisk:
    """``os.fsync`` on a disk that is full from one call to another."""

    def __init__(self, first, last):
        self.calls, self.full = 0, range(first, last)
        self.fsync = files.os.fsync

    def __call__(self, handle):
        self.calls += 1
        if self.calls in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.fsync(handle)


def test_a_full_disk_leaves_the_run_going_and_the_last_file_whole(tmp_path, monkeypatch):
    make = KERNELS["langevin"][0]
    whole = whole_run("langevin")
    monkeypatch.setattr(files.os, "fsync", FullDisk(30, 10**6))
    pyro.set_rng_seed(0)
    mcmc = sampler(make(), tmp_path / "a")
    with pytest.warns(UserWarning, match="could not be written .*No space left.* goes on") as told:
        mcmc.run(DATA)
    assert sum("could not be written" in str(w.message) for w in told) == 1
    assert_identical(mcmc, whole)
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(OSError, match="No space left"):  # the first 20 draws are not on the disk
        mcmc.extend(20)

    monkeypatch.undo()
    assert 0 < files.load(tmp_path / "a", "an MCMC run")["run"]["t"] < 45
    again = sampler(make(), tmp_path / "a")
    again.resume(DATA)
    assert_identical(again, whole)
    again.extend(20)
    assert_identical(again, whole_run("langevin", num_samples=40))


@pytest.mark.parametrize("first", range(15, 27))
def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, first):
    make = KERNELS["langevin"][0]
    whole = whole_run("langevin")
    monkeypatch.setattr(files.os, "fsync", FullDisk(first, first + 3))
    pyro.set_rng_seed(0)
    mcmc = sampler(make(), tmp_path / "a")
    with pytest.warns(UserWarning, match="goes on"):
        mcmc.run(DATA)
    assert_identical(mcmc, whole)
    again = sampler(make(), tmp_path / "a", hook_fn=StopAt(1))
    again.resume(DATA)  # all is on the disk by now
    assert_identical(again, whole)


def test_a_place_that_cannot_be_written_is_an_error_before_the_run(tmp_path):
    mcmc = sampler(LangevinKernel(regression), tmp_path / "no such folder" / "a")
    with pytest.raises(OSError, match="no such folder"):
        mcmc.run(DATA)


class Interrupt(StopAt):
    """Ctrl-C after some transitions."""

    def __call__(self, kernel, params, stage, i):
        try:
            super().__call__(kernel, params, stage, i)
        except Stop:
            raise KeyboardInterrupt from None


def test_an_interrupt_keeps_the_draws_and_the_checkpoint(tmp_path):
    make = KERNELS["langevin"][0]
    whole = whole_run("langevin")
    pyro.set_rng_seed(0)
    mcmc = sampler(make(), tmp_path / "a", hook_fn=Interrupt(38))
    with pytest.warns(UserWarning, match="interrupted: 13 of 20 draws"):
        mcmc.run(DATA)
    assert torch.equal(mcmc.get_samples(group_by_chain=True)["x"], whole["draws of x"][:, :13])
    with pytest.raises(RuntimeError, match="resume it from a checkpoint"):
        mcmc.extend(7)
    mcmc.hook_fn = None
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)


def test_an_interrupt_of_the_warmup_keeps_the_checkpoint(tmp_path):
    make = KERNELS["langevin"][0]
    whole = whole_run("langevin")
    pyro.set_rng_seed(0)
    with pytest.raises(KeyboardInterrupt):
        sampler(make(), tmp_path / "a", hook_fn=Interrupt(11)).run(DATA)
    mcmc = sampler(make(), tmp_path / "a")
    mcmc.resume(DATA)
    assert_identical(mcmc, whole)
