"""pyro_ebm.MCMC: what goes in, what comes out, what an interrupt leaves, what is refused."""

import math
import re

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc import HMC, NUTS
from torch.distributions.transforms import ExpTransform

from pyro_ebm import MCMC, LangevinKernel, MHKernel, NormalizerError, UnnormalizedEnergy
from pyro_ebm.diagnostics.results import fields_of
from pyro_ebm.mcmc import Kernel
from pyro_ebm.mcmc.running.progress import Bar

FIELDS = ["acceptance_rate", "diverging", "lp", "step_size"]


def model(y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(2) if y is None else y)


def normal(mean):
    pyro.sample("x", dist.Normal(mean, 1.0))


def unknown_normalizer(y):
    precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
    pyro.sample("y", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=y)


def run(*args, kernel=None, data=(), seed=0, **kwargs) -> MCMC:
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        LangevinKernel(model) if kernel is None else kernel,
        *args,
        **{"disable_progbar": True, **kwargs},
    )
    mcmc.run(*data)
    return mcmc


# -- shapes ----------------------------------------------------------------------------------------

METHODS = pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])


@METHODS
@pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel])
def test_shapes(kernel, chain_method):
    mcmc = run(7, 5, num_chains=3, kernel=kernel(model), chain_method=chain_method)
    grouped, flat = mcmc.get_samples(group_by_chain=True), mcmc.get_samples()
    assert {k: tuple(v.shape) for k, v in grouped.items()} == {"scale": (3, 7), "x": (3, 7, 2)}
    assert {k: tuple(v.shape) for k, v in flat.items()} == {"scale": (21,), "x": (21, 2)}
    assert torch.equal(grouped["x"].flatten(0, 1), flat["x"])
    assert (flat["scale"] > 0).all()
    assert mcmc.get_samples(4)["x"].shape == (4, 2)
    assert mcmc.get_samples(4, group_by_chain=True)["x"].shape == (3, 4, 2)
    assert sorted(mcmc.get_extra_fields()) == FIELDS
    for name, value in mcmc.get_extra_fields(group_by_chain=True).items():
        assert value.shape == (3, 7), name
        assert torch.equal(mcmc.get_extra_fields()[name], value.flatten())
    assert mcmc.get_extra_fields()["diverging"].dtype == torch.bool


@METHODS
def test_lp_is_the_log_density_of_the_draw(chain_method):
    mcmc = run(6, 5, num_chains=2, chain_method=chain_method, thinning=2)
    samples, lp = mcmc.get_samples(), mcmc.get_extra_fields()["lp"]
    for i in range(6):
        draw = {name: value[i] for name, value in samples.items()}
        trace = pyro.poutine.trace(pyro.condition(model, draw)).get_trace()
        want = trace.log_prob_sum() + draw["scale"].log()  # the Jacobian of e^z
        torch.testing.assert_close(lp[i], want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kernel", [NUTS, HMC, LangevinKernel])
def test_wherever_gradients_are_off(kernel, mode):
    with mode():
        mcmc = run(5, 5, kernel=kernel(model))
        assert not torch.is_grad_enabled()
    assert mcmc.get_samples()["x"].shape == (5, 2)


@METHODS
def test_thinning_keeps_every_nth_draw(chain_method):
    every = run(9, 4, num_chains=2, chain_method=chain_method)
    third = run(9, 4, num_chains=2, chain_method=chain_method, thinning=3)
    for name in ("x", "scale"):
        want = every.get_samples(group_by_chain=True)[name][:, 2::3]
        assert torch.equal(third.get_samples(group_by_chain=True)[name], want)
    for name in FIELDS:
        want = every.get_extra_fields(group_by_chain=True)[name][:, 2::3]
        assert torch.equal(third.get_extra_fields(group_by_chain=True)[name], want)
    assert run(8, 4, thinning=3, chain_method=chain_method).get_samples()["x"].shape == (2, 2)


@METHODS
def test_warmup_is_kept_on_request(chain_method):
    seen = []

    def hook(kernel, params, stage, i):
        seen.append((stage, i, params["x"].clone()))

    mcmc = run(6, 4, chain_method=chain_method, save_warmup=True, hook_fn=hook)
    assert [(stage, i) for stage, i, _ in seen] == [
        *(("Warmup", i) for i in range(4)),
        *(("Sample", i) for i in range(6)),
    ]
    hooked = torch.stack([x.reshape(2) for _, _, x in seen])
    assert torch.equal(mcmc.get_warmup_samples()["x"], hooked[:4])
    assert torch.equal(mcmc.get_samples()["x"], hooked[4:])
    assert mcmc.get_warmup_samples(group_by_chain=True)["scale"].shape == (1, 4)
    without = run(6, 4, chain_method=chain_method)
    with pytest.raises(RuntimeError, match="save_warmup=True"):
        without.get_warmup_samples()


def test_hook_stages_and_chains():
    seen = []

    def hook(kernel, params, stage, i):
        assert isinstance(kernel, Kernel)
        seen.append((stage, i, tuple(params["x"].shape)))

    run(2, 1, num_chains=3, hook_fn=hook)
    assert seen == [("Warmup", 0, (3, 2)), ("Sample", 0, (3, 2)), ("Sample", 1, (3, 2))]
    seen.clear()
    run(1, 1, num_chains=2, hook_fn=hook, chain_method="sequential")
    assert [stage for stage, *_ in seen] == ["Warmup [0]", "Sample [0]", "Warmup [1]", "Sample [1]"]
    assert seen[0][2] == (2,)


@METHODS
def test_save_params(chain_method):
    full = run(5, 4, num_chains=2, chain_method=chain_method)
    some = run(5, 4, num_chains=2, chain_method=chain_method, save_params=["x"])
    assert list(some.get_samples()) == ["x"]
    assert torch.equal(some.get_samples()["x"], full.get_samples()["x"])
    unsorted = run(5, 4, chain_method=chain_method, save_params=["x", "scale"])
    assert unsorted.get_samples()["x"].shape == (5, 2)
    with pytest.raises(ValueError, match=r"save_params names \['z'\], the sites are"):
        run(5, 4, chain_method=chain_method, save_params=["z"])


# -- starts ----------------------------------------------------------------------------------------

START = {"scale": torch.tensor([0.1, 0.2, 0.3]), "x": torch.arange(6.0).reshape(3, 2)}


@METHODS
def test_initial_params(chain_method):
    """A tiny step: the first draw is where the chain was told to start."""
    kernel = LangevinKernel(model, step_size=1e-12, adapt_step_size=False)
    mcmc = run(1, 0, START, 3, kernel=kernel, chain_method=chain_method)
    samples = mcmc.get_samples(group_by_chain=True)
    torch.testing.assert_close(samples["x"][:, 0], START["x"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(samples["scale"][:, 0], START["scale"].exp(), rtol=1e-4, atol=1e-4)
    one = {"scale": torch.tensor(0.5), "x": torch.tensor([3.0, 4.0])}
    mcmc = run(1, 0, one, kernel=kernel, chain_method=chain_method)
    torch.testing.assert_close(mcmc.get_samples()["x"][0], one["x"], rtol=1e-4, atol=1e-4)
    # they were given to those runs: the kernel has not kept them
    assert run(1, 0, num_chains=5, kernel=kernel).get_samples()["x"].unique().numel() == 10
    # those set on the kernel itself stay
    kernel.initial_params = one
    for _ in range(2):
        got = run(1, 0, kernel=kernel, chain_method=chain_method).get_samples()["x"][0]
        torch.testing.assert_close(got, one["x"], rtol=1e-4, atol=1e-4)


@METHODS
def test_initial_params_that_do_not_fit(chain_method):
    for params, num_chains, match in (
        (START, 2, r"initial_params\['scale'\] must lead with num_chains=2"),
        ({**START, "x": torch.tensor(0.0)}, 3, r"initial_params\['x'\] must lead with"),
        ({"scale": 0.0, "x": torch.zeros(2)}, 1, r"initial_params\['scale'\] must be a tensor"),
        ({"x": START["x"]}, 3, r"initial_params has sites \['x'\], the model has"),
        ({**START, "x": torch.zeros(3, 4)}, 3, r"initial_params\['x'\] must be unconstrained"),
        ({**START, "x": START["x"] * math.nan}, 3, "site 'x' is nan"),
    ):
        with pytest.raises(ValueError, match=match):
            run(2, 0, params, num_chains, chain_method=chain_method)


def half_line(params):
    """U of an Exponential(1) on the log scale, and of a standard normal."""
    z = params["s"]
    return z.exp() - z + params["x"].square().sum() / 2


@METHODS
def test_potential_fn(chain_method):
    start = {"s": torch.zeros(20), "x": torch.zeros(20, 2)}
    transforms = {"s": ExpTransform().inv}
    for of_kernel, of_runner in ((transforms, None), (None, transforms)):
        mcmc = run(
            50,
            50,
            start if chain_method == "vectorized" else {k: v[:2] for k, v in start.items()},
            20 if chain_method == "vectorized" else 2,
            kernel=LangevinKernel(potential_fn=half_line, transforms=of_kernel),
            transforms=of_runner,
            chain_method=chain_method,
        )
        assert (mcmc.get_samples()["s"] > 0).all()
        assert mcmc.get_samples(group_by_chain=True)["x"].shape[2:] == (2,)
        if chain_method == "vectorized":
            assert (mcmc.get_samples()["s"].mean() - 1).abs() < 0.2
    with pytest.raises(ValueError, match="give initial_params"):
        run(2, kernel=LangevinKernel(potential_fn=half_line), chain_method=chain_method)


# -- answers ---------------------------------------------------------------------------------------


def test_the_answer_is_right_and_the_chains_are_independent():
    mcmc = run(300, 300, num_chains=50, kernel=LangevinKernel(normal), data=(3.0,))
    x = mcmc.get_samples(group_by_chain=True)["x"]
    ess = pyro.ops.stats.effective_sample_size(x, chain_dim=0, sample_dim=1)
    assert (x.mean() - 3).abs() < 4.5 / ess.sqrt()
    # an ESS of each chain's own also says: means of independent chains spread as their ESS wants,
    # up to chi2(49) / 49, which lies between .3 and 2.2 but for 3e-6
    spread, want = x.mean(1).var(), 50 / ess
    assert 0.3 * want < spread < 2.2 * want


def test_one_seed_gives_one_run():
    for chain_method in ("vectorized", "sequential"):
        a, b, c = (
            run(5, 5, num_chains=2, chain_method=chain_method, seed=s).get_samples()["x"]
            for s in (1, 1, 2)
        )
        assert torch.equal(a, b)
        assert not (a == c).any()


@METHODS
def test_running_again_gives_fresh_chains(chain_method):
    """New data, new draws, new adaptation: as a runner that has not run before."""
    kernel = LangevinKernel(normal)
    mcmc = run(40, 40, num_chains=3, kernel=kernel, data=(1000.0,), chain_method=chain_method)
    pyro.set_rng_seed(5)
    mcmc.run(-1000.0)
    again = mcmc.get_samples()["x"]
    fresh = run(
        40,
        40,
        num_chains=3,
        kernel=LangevinKernel(normal),
        data=(-1000.0,),
        chain_method=chain_method,
        seed=5,
    )
    assert torch.equal(again, fresh.get_samples()["x"])
    for name, value in fresh.get_extra_fields().items():
        assert torch.equal(value, mcmc.get_extra_fields()[name])


def test_transforms_follow_the_arguments_of_the_run():
    def uniform(low):
        pyro.sample("x", dist.Uniform(low, low + 1))

    for chain_method in ("vectorized", "sequential"):
        mcmc = run(10, 10, kernel=LangevinKernel(uniform), data=(0.0,), chain_method=chain_method)
        mcmc.run(5.0)
        assert (mcmc.get_samples()["x"] >= 5).all()


@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_pyros_own_kernels(kernel):
    mcmc = run(60, 60, num_chains=2, kernel=kernel(normal), data=(2.0,), thinning=2)
    assert mcmc.chain_method == "sequential"
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (2, 30)
    assert (mcmc.get_samples()["x"].mean() - 2).abs() < 1
    assert list(mcmc.get_extra_fields()) == ["diverging"]
    assert mcmc.get_extra_fields(group_by_chain=True)["diverging"].shape == (2, 30)
    assert set(mcmc.diagnostics()) == {"x", "divergences", "acceptance rate"}


def test_pyros_own_kernel_on_a_potential_function():
    params = {"s": torch.zeros(2), "x": torch.zeros(2, 2)}
    kernel = NUTS(potential_fn=half_line)
    mcmc = run(5, 5, params, 2, kernel=kernel, transforms={"s": ExpTransform().inv})
    assert (mcmc.get_samples()["s"] > 0).all()
    with pytest.raises(ValueError, match="initial parameters"):
        MCMC(NUTS(potential_fn=half_line), 5)


def test_divergences_of_pyros_kernels_are_told_per_draw():
    told = [{"divergences": [0, 3]}, {"divergences": []}]
    assert fields_of(told, 4, 1)["diverging"].int().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert fields_of(told, 2, 2)["diverging"].int().tolist() == [[0, 1], [0, 0]]
    assert fields_of([{}], 2, 2) == {}


@pytest.mark.parametrize("kernel", [LangevinKernel, NUTS])
def test_parallel_keeps_what_it_is_asked_for(kernel):
    """One chain, in this process: Pyro's own runner. Worker processes: test_pyro_contract.py."""
    mcmc = run(
        12,
        6,
        kernel=kernel(model),
        chain_method="parallel",
        thinning=3,
        save_params=["x", "scale"],
    )
    assert {k: tuple(v.shape) for k, v in mcmc.get_samples(group_by_chain=True).items()} == {
        "scale": (1, 4),
        "x": (1, 4, 2),
    }
    whole = run(12, 6, kernel=kernel(model), chain_method="parallel")
    for name, value in mcmc.get_samples().items():
        assert torch.equal(value, whole.get_samples()[name][2::3])
    for value in mcmc.get_extra_fields(group_by_chain=True).values():
        assert value.shape == (1, 4)


def test_diagnostics(capsys):
    mcmc = run(50, 20, num_chains=4)
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics) == {"scale", "x", "divergences", "acceptance rate"}
    assert diagnostics["x"]["r_hat"].shape == diagnostics["x"]["n_eff"].shape == (2,)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    for chain in range(4):
        rate = diagnostics["acceptance rate"][f"chain {chain}"]
        assert rate == pytest.approx(float(fields["acceptance_rate"][chain].mean()))
        diverging = fields["diverging"][chain].nonzero().flatten().tolist()
        assert diagnostics["divergences"][f"chain {chain}"] == diverging
    mcmc.summary(prob=0.8)
    text = capsys.readouterr().out
    assert re.search(r"mean +std +median +10.0% +90.0% +n_eff +r_hat", text)
    assert "x[1]" in text
    assert f"Number of divergences: {int(fields['diverging'].sum())}\n" in text
    short = run(3, 2)
    for read in (short.diagnostics, short.summary):
        with pytest.raises(RuntimeError, match="at least 4 draws of each chain, there are 3"):
            read()


def test_divergences_are_counted():
    def cliff():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("nan", torch.where(x > 0.5, math.nan, 0.0))

    for chain_method in ("vectorized", "sequential"):
        kernel = LangevinKernel(cliff, step_size=0.5, adapt_step_size=False)
        mcmc = run(200, 5, num_chains=2, kernel=kernel, chain_method=chain_method)
        diverging = mcmc.get_extra_fields(group_by_chain=True)["diverging"]
        assert diverging.any(1).all()
        assert (mcmc.get_samples()["x"] <= 0.5).all()
        for chain in range(2):
            want = diverging[chain].nonzero().flatten().tolist()
            assert mcmc.diagnostics()["divergences"][f"chain {chain}"] == want


def test_nothing_to_read_before_a_run():
    mcmc = MCMC(LangevinKernel(model), 5)
    for read in (mcmc.get_samples, mcmc.get_extra_fields, mcmc.diagnostics, mcmc.summary):
        with pytest.raises(RuntimeError, match="call run first"):
            read()


def test_its_repr_shows_the_settings_and_what_was_drawn():
    mcmc = MCMC(LangevinKernel(normal), 6, num_chains=3, thinning=2, disable_progbar=True)
    settings = "num_samples=6, num_chains=3, disable_progbar=True, thinning=2"
    assert repr(mcmc) == f"MCMC({mcmc.kernel!r}, {settings}): not run yet"
    mcmc.run(0.0)
    assert repr(mcmc) == f"MCMC({mcmc.kernel!r}, {settings}): 3 chains of 3 draws"
    mcmc.extend(4)
    assert repr(mcmc).endswith("3 chains of 5 draws")
    other = MCMC(NUTS(normal), 6, 6, chain_method="parallel", save_params=["x"])
    assert "num_samples=6, save_params=['x'], chain_method='parallel'" in repr(other)


def test_results_hold_what_a_run_returned():
    mcmc = run(5, 4, num_chains=2, kernel=LangevinKernel(normal), data=(3.0,))
    assert mcmc.results.shape == (2, 5)
    assert mcmc.results.args == (3.0,)
    assert mcmc.results.model is normal
    assert torch.equal(mcmc.results.samples["x"], mcmc.get_samples(group_by_chain=True)["x"])
    assert repr(mcmc.results) == "Results(2 chains of 5 draws of ['x'])"


def test_the_callers_handlers_see_nothing():
    mcmc = MCMC(LangevinKernel(model), 2, disable_progbar=True)
    trace = pyro.poutine.trace(mcmc.run).get_trace()
    assert set(trace.nodes) <= {"_INPUT", "_RETURN"}


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "chain_method"),
    [
        (LangevinKernel, "vectorized"),
        (MHKernel, "sequential"),
        (LangevinKernel, "parallel"),
        (NUTS, "sequential"),
        (HMC, "parallel"),
    ],
)
def test_an_unknown_normalizer_is_refused_before_sampling(kernel, chain_method):
    calls = []

    def hook(*args):
        calls.append(args)

    mcmc = MCMC(
        kernel(unknown_normalizer),
        3,
        hook_fn=hook,
        chain_method=chain_method,
        disable_progbar=True,
        num_chains=1,
    )
    with pytest.raises(NormalizerError, match=r"'y'.*'precision'"):
        mcmc.run(torch.tensor(1.0))
    assert not calls
    with pytest.raises(RuntimeError, match="call run first"):
        mcmc.get_samples()


def test_bad_numbers():
    kernel = LangevinKernel(model)
    for kwargs, match in (
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"num_samples": -1}, "num_samples"),
        ({"num_samples": 2.5}, r"got 2\.5"),
        ({"num_samples": True}, "got True"),
        ({"num_samples": 5, "warmup_steps": -1}, "warmup_steps must be an integer of at least 0"),
        ({"num_samples": 5, "num_chains": 0}, "num_chains"),
        ({"num_samples": 5, "thinning": 0}, "thinning"),
        ({"num_samples": 5, "thinning": 6}, "thinning=6 leaves none of num_samples=5"),
        ({"num_samples": 5, "chain_method": "batched"}, "chain_method must be one of"),
        ({"num_samples": 5, "chain_method": "parallel", "save_warmup": True}, "keep no warmup"),
    ):
        with pytest.raises(ValueError, match=match):
            MCMC(kernel, **kwargs)
    with pytest.raises(ValueError, match="NUTS moves one chain at a time"):
        MCMC(NUTS(model), 5, chain_method="vectorized")
    with pytest.raises(ValueError, match=r"kernel must be an MCMC kernel, .* got <function model"):
        MCMC(model, 5)
    assert MCMC(kernel, numpy.int64(3)).num_samples == 3
    assert MCMC(kernel, 7).warmup_steps == 7


def test_validation():
    """The run that finds the sites is validated, whatever Pyro's kernels are told."""

    def wrong():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Beta(1.0, 1.0), obs=torch.tensor(2.0))

    for chain_method in ("vectorized", "sequential"):
        for disable in (True, False, None):
            with pytest.raises(ValueError, match="site 'y'"):
                run(
                    2,
                    kernel=LangevinKernel(wrong),
                    chain_method=chain_method,
                    disable_validation=disable,
                )
    seen = []

    def recorded():
        seen.append(dist.is_validation_enabled())
        pyro.sample("x", dist.Normal(0.0, 1.0))

    for disable, want in ((True, False), (False, True), (None, True)):
        seen.clear()
        run(2, 2, kernel=HMC(recorded, num_steps=1), disable_validation=disable)
        assert seen[-1] is want
        assert dist.is_validation_enabled()


# -- interrupts ------------------------------------------------------------------------------------


def interrupt(at_stage, at):
    def hook(kernel, params, stage, i):
        if stage == at_stage and i == at:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("kernel", [LangevinKernel, NUTS])
def test_an_interrupt_keeps_the_draws_of_one_chain(kernel):
    whole = run(10, 6, kernel=kernel(model), thinning=2)
    mcmc = MCMC(
        kernel(model),
        10,
        6,
        hook_fn=interrupt("Sample", 6),
        thinning=2,
        disable_progbar=True,
    )
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match="interrupted: 3 of 5 draws per chain are kept"):
        mcmc.run()
    assert torch.equal(mcmc.get_samples()["x"], whole.get_samples()["x"][:3])
    for value in mcmc.get_extra_fields(group_by_chain=True).values():
        assert value.shape == (1, 3)
    assert mcmc.kernel.initial_params is None


def test_an_interrupt_keeps_the_draws_of_all_chains():
    mcmc = MCMC(
        LangevinKernel(model),
        10,
        6,
        num_chains=3,
        hook_fn=interrupt("Sample", 4),
        save_warmup=True,
        disable_progbar=True,
    )
    with pytest.warns(UserWarning, match="interrupted: 5 of 10"):
        mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (3, 5, 2)
    assert mcmc.get_warmup_samples(group_by_chain=True)["x"].shape == (3, 6, 2)
    assert set(mcmc.diagnostics()["x"]) == {"n_eff", "r_hat"}


@pytest.mark.parametrize("kernel", [LangevinKernel, NUTS])
def test_an_interrupt_keeps_the_chains_that_are_done(kernel):
    mcmc = MCMC(
        kernel(model),
        8,
        4,
        num_chains=3,
        hook_fn=interrupt("Sample [2]", 5),
        chain_method="sequential",
        disable_progbar=True,
    )
    with pytest.warns(UserWarning, match="interrupted: 2 of 3 chains are kept"):
        mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (2, 8, 2)
    assert set(mcmc.diagnostics()["divergences"]) == {"chain 0", "chain 1"}
    mcmc.hook_fn = None
    mcmc.run()  # with as many chains as ever
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (3, 8, 2)


@METHODS
def test_an_interrupt_without_a_draw_is_raised(chain_method):
    for stage, at, thinning in (("Warmup", 2, 1), ("Sample", 0, 3)):
        mcmc = MCMC(
            LangevinKernel(model),
            6,
            4,
            hook_fn=interrupt(stage, at),
            chain_method=chain_method,
            thinning=thinning,
            disable_progbar=True,
        )
        with pytest.raises(KeyboardInterrupt):
            mcmc.run()
        with pytest.raises(RuntimeError, match="call run first"):
            mcmc.get_samples()


# -- the bar ---------------------------------------------------------------------------------------


def test_the_bar(capsys, monkeypatch):
    monkeypatch.setattr(Bar, "EVERY", 0.0)
    run(6, 4, num_chains=3, disable_progbar=False)
    text = capsys.readouterr().err
    assert re.search(
        r"warmup, 3 chains: .*acceptance [01]\.\d\d, step size \d\.\d\de[+-]\d\d", text
    )
    assert re.search(r"sample, 3 chains: 100%.* 10/10 .*acceptance", text)
    run(6, 4, num_chains=2, disable_progbar=False, chain_method="sequential")
    text = capsys.readouterr().err
    assert re.search(
        r"sample, chain 1: 100%.* 10/10 .*step size \d\.\d\de[+-]\d\d, acc. prob", text
    )
    run(6, 4, kernel=NUTS(model), disable_progbar=False)
    assert re.search(r"sample, 1 chain: 100%.*step size .*acc. prob", capsys.readouterr().err)
    run(6, 4)
    assert capsys.readouterr().err == ""


def test_the_bar_asks_the_chains_only_when_it_redraws(monkeypatch):
    asked = []

    class Info:
        @property
        def accept_prob(self):
            asked.append(1)
            return torch.ones(1)

    kernel = LangevinKernel(model)
    kernel.setup(0)
    monkeypatch.setattr(Bar, "EVERY", 1000.0)
    with Bar(1000, 1, False) as bar:
        for _ in range(1000):
            bar.update("sample", kernel, Info())
    assert len(asked) == 2  # at the first step and the last


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"x": torch.zeros(3)},
            r"initial_params\['x'\] must be unconstrained values of shape \(\)",
        ),
        ({"q": torch.zeros(())}, r"initial_params has sites \['q'\], the model has \['x'\]"),
    ],
)
def test_starts_that_do_not_fit_are_refused_for_the_kernels_of_pyro_too(params, message):
    def one():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    mcmc = MCMC(NUTS(one), 4, initial_params=params, disable_progbar=True)
    with pytest.raises(ValueError, match=message):
        mcmc.run()


def test_a_sequential_run_keeps_the_statistics_of_its_warmup():
    def one():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    mcmc = MCMC(
        LangevinKernel(one),
        5,
        warmup_steps=7,
        num_chains=2,
        chain_method="sequential",
        save_warmup=True,
        disable_progbar=True,
    )
    mcmc.run()
    assert {k: tuple(v.shape) for k, v in mcmc.results.warmup_fields.items()} == dict.fromkeys(
        ("lp", "acceptance_rate", "step_size", "diverging"), (2, 7)
    )
    x = mcmc.get_warmup_samples(group_by_chain=True)["x"]
    torch.testing.assert_close(mcmc.results.warmup_fields["lp"], dist.Normal(0.0, 1.0).log_prob(x))
    assert mcmc.to_arviz().warmup_sample_stats["lp"].shape == (2, 7)
