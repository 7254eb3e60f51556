"""The harness of the benchmarks: what decides which numbers are shown.

The benchmarks themselves need the peers, and run by `make bench`.
"""

import doctest
import gc
import math
import time
from importlib import import_module

import numpy as np
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model

from tests.benchmarks import harness, many_chains, minibatches, report
from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.defaults import score as score_of_runs
from tests.benchmarks.defaults.contestants import SAMPLERS
from tests.benchmarks.defaults.contestants import settings as everyone
from tests.benchmarks.defaults.runs import RunFile, of_more_chains
from tests.benchmarks.defaults.score import score, seconds_to_enough
from tests.benchmarks.defaults.tables import ratio
from tests.benchmarks.defaults.tables import tables as shown
from tests.benchmarks.harness import Options
from tests.benchmarks.judge import agreement, judge, quantities
from tests.benchmarks.models import POSTERIORS
from tests.benchmarks.posteriors import QUESTION, converged, settings, tables
from tests.benchmarks.real.posteriors import REAL
from tests.benchmarks.torch_samplers import Stopwatch
from tests.benchmarks.workers import OverBudget, Worker


@pytest.mark.parametrize("module", [harness, report, score_of_runs])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_each_question_is_named_like_its_module(name):
    question = import_module(f"tests.benchmarks.{name}").QUESTION
    assert question.name == name
    parsed = harness.parser(question).parse_args(["--rounds", "2", "--quick"])
    assert (parsed.rounds, parsed.quick, parsed.device) == (2, True, "cpu")


def test_the_command_names_what_is_not_usual():
    usual = vars(harness.parser(QUESTION).parse_args([]))
    own = {name: usual.pop(name) for name in QUESTION.options}
    plain = "python -m tests.benchmarks.posteriors"
    assert QUESTION.command(Options(**usual), own) == plain
    told = QUESTION.command(
        Options(**{**usual, "quick": True, "seed": 3}), {**own, "sampler": ["Pyro NUTS, jit"]}
    )
    assert told == plain + " --seed 3 --quick --sampler 'Pyro NUTS, jit'"


def test_a_missing_peer_says_how_to_get_it():
    with pytest.raises(SystemExit, match=r"no-such-peer.*make bench"):
        harness.require(("torch", "no-such-peer"))


def test_turns():
    order = [task for _, task in Options(rounds=3).rotate("abc")]
    assert "".join(order) == "abcbcacab"
    assert [i for i, _ in Options(rounds=3, quick=True).rotate("ab")] == [0, 0]
    # the first round is finished, however long it takes; no other is begun
    assert len(list(Options(rounds=3, minutes=0.0).rotate("abc"))) == 3


def test_only_the_own_section_is_rewritten(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nwords\n\n<!-- begin a -->\nold\n<!-- end a -->\n\nmore\n", encoding="utf-8"
    )
    harness.write_section(page, "a", "new")
    harness.write_section(page, "b", "last")
    assert page.read_text(encoding="utf-8") == (
        "# Title\n\nwords\n\n<!-- begin a -->\nnew\n<!-- end a -->\n\nmore\n"
        "\n<!-- begin b -->\nlast\n<!-- end b -->\n"
    )


def test_a_picture_stands_in_the_section(tmp_path):
    question = harness.Question(
        *("seen", "Title", "Preface."),
        measure=lambda options: [],
        tables=lambda rows: "table",
        pictures=lambda rows, path: path.with_suffix(".png").write_bytes(b"png"),
        illustrated=True,
    )
    page = tmp_path / "page.md"
    question.main(["--output", str(tmp_path / "output"), "--markdown", str(page)])
    assert "Preface.\n\n![Title](_static/seen.png)\n\ntable" in page.read_text(encoding="utf-8")
    assert (tmp_path / "_static" / "seen.png").read_bytes() == b"png"


def test_ratios_are_paired_by_round():
    own = [{"round": i, "x": x} for i, x in enumerate((2.0, 20.0, 4.0))]
    other = [{"round": i, "x": x} for i, x in enumerate((1.0, 10.0, 1.0))]
    assert report.paired(own, other, "x") == 2.0
    assert np.isnan(report.paired(own, [], "x"))


def autoregression(rng, rho, chains=8, draws=2000):
    x = np.zeros((chains, draws))
    noise = rng.standard_normal((chains, draws)) * np.sqrt(1 - rho**2)
    x[:, 0] = rng.standard_normal(chains)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x


def test_judge_knows_the_effective_size():
    rng = np.random.default_rng(0)
    rho = 0.8
    found = judge({"a": autoregression(rng, rho), "b": rng.standard_normal((8, 2000))})
    # of an autoregression the mean's is n (1 - rho) / (1 + rho)
    assert found["ess"] == pytest.approx(16_000 * (1 - rho) / (1 + rho), rel=0.2)
    assert found["r_hat"] < 1.02
    assert found["errors"][0] == pytest.approx(found["ess"] ** -0.5, rel=0.2)


def test_agreement_finds_a_wrong_mean_and_a_wrong_variance():
    rng = np.random.default_rng(1)
    good = [judge({"x": rng.standard_normal((4, 1000))}) for _ in range(3)]
    assert agreement(good[0], good[1:], None) < 4
    assert agreement(good[0], [], 0.0) < 4
    shifted = judge({"x": 0.3 + rng.standard_normal((4, 1000))})
    assert agreement(shifted, good, None) > 8
    assert agreement(shifted, [], 0.0) > 8
    wide = judge({"x": 1.3 * rng.standard_normal((4, 1000))})
    assert agreement(wide, good, None) > 8
    # a chain that has not converged is no reference
    stuck = judge({"x": np.arange(4.0)[:, None] + 0.01 * rng.standard_normal((4, 1000))})
    assert np.isnan(agreement(good[0], [stuck], None))


def test_quantities_leave_out_what_is_fixed_and_thin_out_what_is_alike():
    rng = np.random.default_rng(2)
    root = np.zeros((2, 5, 2, 2))
    root[..., 0, 0], root[..., 1, 0], root[..., 1, 1] = 1, *rng.random((2, 2, 5))
    eta = np.broadcast_to(np.arange(998.0), (2, 5, 998)) + 2
    x = quantities({"root": root, "eta": eta, "mu": rng.standard_normal((2, 5))})
    assert x.shape == (2, 5, 32)
    assert x[0, 0, [3, -1]].tolist() == [2, 999]


def test_samplers_of_a_kind_run_equally_long():
    lengths = {}
    for s in settings(list(POSTERIORS), [4, 64, 1000], quick=False):
        if s.sampler in ("pyro_ebm ChEES", "NumPyro NUTS", "BlackJAX NUTS", "BlackJAX ChEES"):
            lengths.setdefault(s.chains, set()).add((s.warmup, s.draws))
    assert set(lengths) == {4, 64, 1000}
    assert all(len(found) == 1 for found in lengths.values())


def test_over_budget_and_not_converged_are_told():
    common = {"posterior": "schools", "chains": 4, "settings": "1 + 1", "budget": 45.0, "round": 0}
    rates = {f"{e}_per_second_{w}": 1.0 for e in ("ess", "tail_ess") for w in ("whole", "warm")}
    good = {"whole": 1.0, "warm": 1.0, "ess": 1.0, "r_hat": 1.001, "z": 2.0, **rates}
    rows = [
        {**common, **good, "sampler": "pyro_ebm ChEES", "r_hat": 1.3},
        {**common, **good, "sampler": "BlackJAX MALA"},
        {**common, "sampler": "NumPyro NUTS", "over_budget": "stopped"},
    ]
    told = tables(rows)
    assert "over budget (45 s)" in told
    assert "1 / 1*" in told
    assert converged(rows[1:2])
    assert not converged(rows[:1])
    assert QUESTION.name == "posteriors"


def test_a_transition_that_compiles_counts_as_a_usual_one():
    watch = Stopwatch()
    watch.first = watch.last = 1.0
    watch.gaps = [0.01] * 9 + [3.0]
    assert watch.warm(end=1.5) == pytest.approx(0.1 + 0.5)


def test_a_worker_answers_or_is_stopped():
    worker = Worker(gc.collect)
    assert worker.run(math.factorial, 5, seconds=120) == 120
    with pytest.raises(OverBudget):
        worker.run(time.sleep, 60, seconds=0.2)
    assert worker.run(math.factorial, 3, seconds=120) == 6
    worker.stop()


def published_sites(name):
    """The published means of all sites of a posterior, and standard deviations of most."""
    mean, sd = {}, {}
    for quantity, known in REAL[name].reference.items():
        site, _, index = quantity.partition("[")
        for found, number in ((mean, known["mean"]), (sd, known["sd"])):
            found[site] = [*found.get(site, []), number] if index else number
    if name == "hmm_example":
        first, second = mean.pop("mu")
        mean |= {"theta": [mean.pop("theta1"), mean.pop("theta2")]}
        mean |= {"mu_1": first, "gap": second - first}
        sd = {"mu_1": sd["mu"][0]}
    return {k: torch.tensor(x) for k, x in mean.items()}, sd


# answers that are not of every site, or of a posterior that is far from normal
NOT_BY_LAPLACE = ("gp_pois_regr", "stochastic_volatility", "hierarchy", "eight_schools")


@pytest.mark.parametrize("name", [name for name in REAL if name not in NOT_BY_LAPLACE])
def test_published_answers_are_those_of_the_model(name):
    """By Laplace's approximation around the published means, in the unconstrained space."""
    torch.set_default_dtype(torch.float64)
    posterior = REAL[name]
    _, potential, transforms, _ = initialize_model(posterior.model, posterior.tensors())
    mean, sd = published_sites(name)
    z = {site: transforms[site](x) if site in transforms else x for site, x in mean.items()}
    sizes = [x.numel() for x in z.values()]
    flat = torch.cat([x.reshape(-1) for x in z.values()]).requires_grad_()
    assert len(flat) == posterior.dim

    def energy(flat):
        return potential({s: x.reshape(z[s].shape) for s, x in zip(z, flat.split(sizes))})

    gradient = torch.autograd.functional.jacobian(energy, flat)
    covariance = torch.linalg.inv(torch.autograd.functional.hessian(energy, flat))
    scale = covariance.diagonal().sqrt()
    # a posterior mean is within a standard deviation or so of the mode, and as wide as this
    assert (covariance @ gradient / scale).abs().max() < 1.2
    scales = dict(zip(z, scale.split(sizes)))
    for site, known in sd.items():
        x = z[site].clone().requires_grad_()
        value = transforms[site].inv(x) if site in transforms else x * 1
        (slope,) = torch.autograd.grad(value.sum(), x)
        ratio = scales[site] * slope.reshape(-1) / torch.tensor(known).reshape(-1)
        assert ratio.min() > 0.8
        assert ratio.max() < 1.25


@pytest.mark.parametrize("name", NOT_BY_LAPLACE)
def test_quantities_are_those_of_the_reference(name):
    posterior = REAL[name]
    torch.set_default_dtype(torch.float64)
    start, potential, _, trace = initialize_model(posterior.model, posterior.tensors())
    assert sum(x.numel() for x in start.values()) == posterior.dim
    assert torch.isfinite(potential(start))
    draw = {k: v["value"].numpy()[None, None] for k, v in trace.nodes.items() if k in start}
    assert posterior.quantities(draw).shape == (1, 1, len(posterior.reference))


def test_the_answers_of_the_hierarchy_agree_with_importance_sampling():
    posterior, rng = REAL["hierarchy"], np.random.default_rng(0)
    (y,), known = posterior.arrays(), posterior.reference
    # a Gaussian proposal, twice as wide as the posterior of the two shared parameters
    names = ("mu", "tau")
    x = {k: known[k]["mean"] + 2 * known[k]["sd"] * rng.standard_normal(2_000) for k in names}
    x["tau"] = x["tau"].clip(1e-3)
    log_weight = sum(((x[k] - known[k]["mean"]) / known[k]["sd"] / 2) ** 2 / 2 for k in names)
    log_weight -= ((x["mu"] / 5) ** 2 + (x["tau"] / 2) ** 2) / 2
    variance = (1 + x["tau"] ** 2)[:, None]
    log_weight -= (np.log(variance) + (y - x["mu"][:, None]) ** 2 / variance).sum(1) / 2
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    x["eta[1]"] = x["tau"] * (y[0] - x["mu"]) / variance[:, 0]
    for quantity, draws in x.items():
        mean = weight @ draws
        error = np.sqrt((weight**2) @ (draws - mean) ** 2)
        assert abs(mean - known[quantity]["mean"]) < 4 * error


def test_the_answers_of_eight_schools_agree_with_weighted_draws_of_the_prior():
    posterior, rng = REAL["eight_schools"], np.random.default_rng(0)
    sigma, y = posterior.arrays()
    x = {"mu": 5 * rng.standard_normal(50_000), "tau": np.abs(5 * rng.standard_cauchy(50_000))}
    variance = sigma**2 + x["tau"][:, None] ** 2
    squares = (y - x["mu"][:, None]) ** 2 / variance
    weight = np.exp(-(np.log(variance) + squares).sum(1) / 2)
    weight /= weight.sum()
    x["eta[1]"] = x["tau"] * (y[0] - x["mu"]) / variance[:, 0]
    for quantity, draws in x.items():
        mean = weight @ draws
        error = np.sqrt((weight**2) @ (draws - mean) ** 2)
        assert abs(mean - posterior.reference[quantity]["mean"]) < 4 * error


def test_short_chains_are_judged_by_nested_r_hat_and_others_by_their_own():
    rng, known = np.random.default_rng(5), REAL["eight_schools"].reference
    mean, sd = (np.array([known[q][k] for q in known]) for k in ("mean", "sd"))
    chains, _, draws = many_chains.SHORT
    x = mean + sd * rng.standard_normal((chains, draws, len(mean)))
    found = {"before": 1.0, "sampling": 0.5}
    ours = many_chains.Setting("pyro_ebm Langevin", *many_chains.SHORT)
    good = many_chains.judged(ours, found, x)
    assert good["right"]
    assert good["r_hat"] < 1.005
    assert 1 < good["seconds"] < 1.1  # some 10,000 independent draws, of which 400 are enough
    groups = 0.3 * sd * rng.standard_normal((many_chains.SUPERCHAINS, 1, 1, len(mean)))
    apart = (x.reshape(many_chains.SUPERCHAINS, -1, *x.shape[1:]) + groups).reshape(x.shape)
    assert not many_chains.judged(ours, found, apart)["right"]
    peer = many_chains.Setting("BlackJAX ChEES", *many_chains.SHORT)
    assert many_chains.judged(peer, found, x)["r_hat"] is None
    row = {"contestant": "pyro_ebm Langevin", "chains": chains, "lengths": "1,000 x 10"}
    told = many_chains.tables([{**row, **good, **found}, {**row, "chains": 4, "failed": "why"}])
    assert f"{good['r_hat']:.3f}" in told
    one_by_one = {s.sampler for s in many_chains.settings()}
    one_by_one -= {s.sampler for s in many_chains.settings() if s.short}
    assert one_by_one == {"Pyro NUTS, jit", "nutpie", "nutpie, low rank"}


def test_minibatches_are_compared_at_equal_looks_and_with_the_truth():
    of = minibatches.case("alike", 1000, 1)
    draws = of.mean + of.sd * torch.randn(4000, len(of.mean))
    assert of.worst(draws) < 0.12  # 4.5 Monte Carlo errors of means, .07, and of deviations, .05
    assert of.worst(draws + 0.3 * of.sd) > 0.18
    assert of.worst(of.mean + 1.3 * (draws - of.mean)) > 0.18
    assert of.worst(draws * math.nan) == math.inf
    _, looks = minibatches.ours(minibatches.SGLDKernel, 400_000, of)
    assert looks == 400_000
    run = minibatches.tuned(lambda shift: (draws + shift * of.sd, 0), [(2.0,), (0.0,), (1.0,)], of)
    assert torch.equal(run()[0], draws)
    row = {"case": "alike", "contestant": "pyro_ebm SGLD", "mean": 0.123, "low": 0.95, "high": 1.1}
    told = minibatches.tables([{**row, "looks": looks, "seconds": 2.0}])
    assert "0.12" in told
    assert "0.95 to 1.10" in told


# ---- defaults on real posteriors ---------------------------------------------------------------


def test_the_score_is_that_of_the_worst_quantity():
    rng = np.random.default_rng(3)
    slow = autoregression(rng, 0.9)
    x = np.stack([rng.standard_normal(slow.shape), 2.0 + 3.0 * slow], -1)
    known = {"mean": 0.0, "sd": 1.0, "mcse_mean": 0.01}
    found = score(x, {"a": known, "b": {**known, "mean": 2.0}})
    # of an autoregression the mean's effective size is n (1 - rho) / (1 + rho)
    assert found["bulk"] == pytest.approx(16_000 * 0.1 / 1.9, rel=0.35)
    assert found["ess"] == min(found["bulk"], found["tail"], found["squares"])
    assert found["right"]
    off = score(x, {"a": {**known, "mean": 0.2}, "b": known})
    assert off["z"] > 4.5
    assert not off["right"]


def test_trajectories_of_a_shared_length_are_not_flattered():
    rng = np.random.default_rng(4)
    swing = np.resize([1.0, -1.0], 1000) * np.abs(rng.standard_normal((4, 1)))  # of a fixed size
    x = (swing + 0.01 * rng.standard_normal((4, 1000)))[..., None]
    found = score(x, {"a": {"mean": 0.0, "sd": 1.0, "mcse_mean": 0.01}})
    assert found["bulk"] > 4000  # the mean of each two is exact
    assert found["squares"] < 50  # and no chain's size is ever left
    assert found["ess"] == min(found["tail"], found["squares"])


def test_chains_that_stand_still_have_no_effective_draws():
    found = score(np.ones((4, 100, 1)), {"a": {"mean": 1.0, "sd": 1.0, "mcse_mean": 0.01}})
    assert not found["right"]
    assert found["ess"] == pytest.approx(0.0, abs=0.01)
    assert seconds_to_enough(1.0, 1.0, found["ess"]) > 1e5


def some_run(sampler, seconds, **other):
    row = {"posterior": "nes", "chains": 16, "seed": 0, "round": 0, "sampler": sampler}
    row |= {"asked": "None + 500", "versions": "1", "code": "", "limit": 60.0, "right": True}
    return {**row, "seconds": seconds, "before": 1.0, **other}


def test_runs_are_kept_and_one_that_was_stopped_is_tried_again_for_longer(tmp_path):
    file = RunFile(tmp_path / "runs.jsonl")
    done, stopped = some_run("nutpie", 3.0), some_run("NumPyro NUTS", 0.0, over_limit="stopped")
    file.add(done)
    file.add(stopped)
    again = RunFile(file.path)
    assert again.find(done) == done
    assert again.find(stopped) == stopped
    assert again.find({**stopped, "limit": 90.0}) is None
    for change in ({"seed": 1}, {"code": "other"}, {"chains": 4}, {"asked": "1 + 1"}):
        assert again.find({**done, **change}) is None
    again.clear()
    assert RunFile(file.path).find(done) is None


def test_ours_are_compared_with_the_best_peer_that_is_right():
    rows = [
        some_run("pyro_ebm ChEES", 4.0),
        some_run("pyro_ebm Langevin", 1.0, right=False),
        some_run("pyro_ebm ChEES, tuned", 2.0),
        some_run("nutpie", 8.0),
        some_run("BlackJAX ChEES", 0.5, right=False),
        some_run("NumPyro NUTS", 3.0, r_hat=1.0),
    ]
    rows[-1] = {k: v for k, v in rows[-1].items() if k != "seconds"} | {"over_limit": "stopped"}
    assert ratio(rows, tuned=False) == (0.5, True)
    assert ratio(rows, tuned=True) == (0.25, True)
    assert ratio(rows[1:2] + rows[3:], tuned=False) == (0.125, False)
    assert np.isnan(ratio(rows[:3], tuned=False)[0])
    told = shown(rows)
    assert "(0.5)" in told
    assert "0.125" not in told


def test_chains_one_after_another_each_have_a_warmup():
    four = some_run("Pyro NUTS, jit", 10.0, chains=4, before=8.0)
    assert of_more_chains(four, 16)["seconds"] == 8.0 * 4 + 2.0
    assert of_more_chains({"chains": 4, "over_limit": "stopped"}, 16)["chains"] == 16


def test_every_contestant_has_its_lengths():
    found = list(everyone(["hierarchy", "nes"], list(SAMPLERS), [4, 16, 64], quick=False))
    dense = [s for s in found if s.sampler.name == "NumPyro NUTS, dense"]
    assert {s.posterior for s in dense} == {"nes"}  # not a matrix of 1,000 dimensions
    assert {s.posterior for s in found if s.sampler.only} == {"hierarchy"}
    assert [s.chains for s in found if s.sampler.alone] == [4, 4]
    assert all(s.draws >= 250 for s in found)
    peers = {s.sampler.name for s in found if s.sampler.name.startswith(("nutpie", "Pyro "))}
    assert all(s.warmup is None for s in found if s.sampler.name in peers)  # theirs
