"""What a run says of its draws: each finding where it belongs, and nothing of a good run."""

import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc import HMC, NUTS
from pyro.ops.stats import split_gelman_rubin
from scipy.stats import binom, chi2

from pyro_ebm import (
    MCMC,
    BarkerKernel,
    ChEESKernel,
    ConvergenceWarning,
    GibbsKernel,
    LangevinKernel,
    MHKernel,
    UnnormalizedEnergy,
    product,
)
from pyro_ebm.diagnostics import Finding, Results, chain_statistics, findings
from pyro_ebm.diagnostics.chain_statistics import LEVEL, Elements, largest_r_hat, survey
from pyro_ebm.diagnostics.convergence import Sampler
from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
from pyro_ebm.ops import distributed
from tests.ranks import Ranks

NORMAL = dist.Normal(torch.zeros(5), 1.0).to_event(1)


def modes(x):
    """Two normals of unit variance, 20 apart."""
    return -torch.logaddexp(-((x + 10) ** 2) / 2, -((x - 10) ** 2) / 2)


TWO_MODES = UnnormalizedEnergy(modes)


def starts(num_chains, *elsewhere):
    """Starts near -10, and those of some chains near 10."""
    x = -10 + torch.randn(num_chains)
    x[list(elsewhere)] += 20
    return {"x": x}


def sampler(kernel, num_samples=200, warmup_steps=100, num_chains=4, **kwargs):
    return MCMC(
        kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True, **kwargs
    )


def said(call, *args):
    """The findings of a call that warns once, by their kinds, and where the warning points."""
    with pytest.warns(ConvergenceWarning) as caught:
        call(*args)
    (warning,) = caught
    first, *lines = str(warning.message).split("\n- ")
    assert first == "these draws may be wrong:"
    assert warning.filename == __file__
    return lines


def says_nothing(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        call(*args)


def kinds(found):
    return [finding.kind for finding in found]


# -- real runs -------------------------------------------------------------------------------------


def test_chains_in_another_mode_are_named():
    mcmc = sampler(LangevinKernel(TWO_MODES), num_chains=16, initial_params=starts(16, 3, 11))
    r_hat, apart = said(mcmc.run)
    worst = float(mcmc.diagnostics()["x"]["r_hat"])
    assert r_hat == f"R-hat is {worst:.3g} at 'x': the chains do not agree."
    here, there = re.fullmatch(
        r"2 of 16 chains \(3, 11\) stand apart: they are near (\S+) at 'x', the others near (\S+)\."
        r" Try TemperingKernel, which crosses between far modes; .*",
        apart,
    ).groups()
    assert float(here) == pytest.approx(10, abs=1)
    assert float(there) == pytest.approx(-10, abs=1)


def test_an_unadjusted_step_that_is_too_large_runs_off():
    kernel = LangevinKernel(dist.Normal(0.0, 1.0), step_size=5.0, adjusted=False)
    (far,) = said(sampler(kernel).run)
    assert re.match(r"all 4 chains ran off: 'x' reaches \S+e\+\d+\. Try a smaller step_size", far)


@pytest.mark.parametrize(("step_size", "way"), [(1e4, "smaller"), (1e-8, "larger")])
def test_a_fixed_step_size_at_which_chains_do_not_move(step_size, way):
    settings = {"adapt_step_size": False, "adapt_mass_matrix": False}
    kernel = BarkerKernel(NORMAL, step_size=step_size, **settings)
    found = said(sampler(kernel, num_samples=300).run)
    assert re.match(r"all 4 chains (stand still|hardly move)", found[0])
    assert f"step size {step_size:.2g}, acceptance" in found[0]
    assert f"Try a {way} step (step_size); adapt_step_size=True;" in found[0]


def funnel():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), scale).to_event(1))


def test_divergences_are_counted_and_placed():
    settings = {"adapt_step_size": False, "adapt_mass_matrix": False}
    mcmc = sampler(LangevinKernel(funnel, step_size=0.5, **settings))
    found = said(mcmc.run)
    (diverged,) = [text for text in found if "diverged" in text]
    count = int(mcmc.get_extra_fields()["diverging"].sum())
    assert diverged.startswith(f"{count} of 800 draws diverged ({100 * count / 800:.0f} %)")
    assert "most of them where" in diverged
    assert "another parametrisation (pyro.infer.reparam)" in diverged


def test_a_field_that_langevin_steps_are_too_slow_for():
    def rough(x):  # 60 sites, whose sum is hardly bounded
        return 50 * (x[..., 1:] - x[..., :-1]).square().sum(-1) + x.square().sum(-1) / 200

    field = UnnormalizedEnergy(rough, event_shape=(60,))
    mcmc = sampler(LangevinKernel(field))
    found = said(mcmc.run)
    r_hat = mcmc.diagnostics()["x"]["r_hat"]
    assert found[0].startswith(f"R-hat is {float(r_hat.max()):.3g} at 'x[{int(r_hat.argmax())}]'")
    if len(found) == 1:
        assert "; ChEESKernel, which moves further in a transition; or another" in found[0]


def test_a_product_of_two_energies_that_share_no_mode():
    other = UnnormalizedEnergy(lambda x: modes(x) + x**2 / 400)
    mcmc = sampler(LangevinKernel(product(TWO_MODES, other)), initial_params=starts(4, 0, 2))
    assert "R-hat is" in said(mcmc.run)[0]


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


GOOD = {
    "langevin": lambda: sampler(LangevinKernel(NORMAL), num_chains=16),
    "langevin, 4 chains of 100": lambda: sampler(LangevinKernel(NORMAL), 100),
    "unadjusted": lambda: sampler(LangevinKernel(NORMAL, step_size=0.5, adjusted=False), 1000),
    "chees": lambda: sampler(ChEESKernel(NORMAL)),
    "one chain": lambda: sampler(ChEESKernel(NORMAL), 500, num_chains=1),
    "sequential": lambda: sampler(ChEESKernel(NORMAL), num_chains=2, chain_method="sequential"),
    "walls": lambda: sampler(MHKernel(UnnormalizedEnergy(box)), 2000),
    "gibbs": lambda: sampler(GibbsKernel(BoltzmannMachine(torch.tensor(0.2), edges=EDGES))),
    "nuts": lambda: sampler(NUTS(NORMAL), num_chains=2),
    "no latents": lambda: sampler(LangevinKernel(lambda: None)),
    "3 draws": lambda: sampler(LangevinKernel(TWO_MODES), 3, initial_params=starts(4, 0)),
}

EDGES = lattice_edges(3, 3)


def box(x):
    return torch.where(x.abs() < 1, 0.0, math.inf)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_says_nothing(name):
    says_nothing(GOOD[name]().run)


def test_spins_that_keep_their_sign():
    cold = BoltzmannMachine(torch.tensor(2.0), edges=EDGES)
    up = torch.ones(4, 9)
    up[1] = -1
    found = said(sampler(GibbsKernel(cold), initial_params={"x": up}).run)
    assert re.match(r"R-hat is inf at 'x\[\d\]' \(and over 1.\d+ at 9 of 9 elements\)", found[0])
    assert "1 of 4 chains (1) stands apart: it is near -1" in found[1]


# -- how it is said --------------------------------------------------------------------------------


def test_it_can_be_turned_off():
    settings = {"num_samples": 50, "initial_params": starts(4, 0)}
    off = sampler(LangevinKernel(TWO_MODES), **settings, check_convergence=False)
    says_nothing(off.run)
    assert off.findings == ()
    on = sampler(LangevinKernel(TWO_MODES), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        on.run()
    assert kinds(on.findings) == ["r_hat", "apart"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning):
            on.run()
    assert on.get_samples()["x"].shape == (200,)  # the draws are kept


def test_every_way_of_running_says_it(tmp_path):
    settings = {"num_samples": 50, "initial_params": starts(4, 0)}
    for method in ("vectorized", "sequential"):
        run = sampler(LangevinKernel(TWO_MODES), **settings, chain_method=method)
        assert "1 of 4 chains (0) stands apart" in said(run.run)[1]
    stored = {"checkpoint": tmp_path / "a.ckpt", "store": tmp_path / "a.zarr"}
    for files in ({}, stored):
        run = sampler(LangevinKernel(TWO_MODES), **settings, **files)
        assert "1 of 4 chains (0) stands apart" in said(run.run)[1]
        assert "1 of 4 chains (0) stands apart" in said(run.extend, 100)[1]
    run = sampler(LangevinKernel(TWO_MODES), **settings, **stored)
    assert "1 of 4 chains (0) stands apart" in said(run.resume)[1]


def test_pyros_kernels_are_looked_at_too():
    kernel = HMC(NORMAL, step_size=3.0, num_steps=4, adapt_step_size=False)  # 2 is stable
    found = said(sampler(kernel, 30, 0, 2).run)
    assert re.match(r"\d+ of 60 draws diverged \(\d+ %\)", found[-1])


def test_a_summary_prints_it(capsys):
    mcmc = sampler(LangevinKernel(TWO_MODES), initial_params=starts(4, 0))
    found = said(mcmc.run)
    mcmc.summary()
    assert capsys.readouterr().out.endswith("\n".join(found) + "\n")


class Worried(LangevinKernel):
    @property
    def findings(self):
        return [Finding("worry", f"{self.potential.dim} dimensions are many", ["fewer"])]


def test_a_kernel_adds_a_finding_of_its_own():
    assert said(sampler(Worried(NORMAL)).run) == ["5 dimensions are many. Try fewer."]


def run_on_ranks():
    mcmc = sampler(LangevinKernel(TWO_MODES), initial_params=starts(4, 3), distributed=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run()
    return distributed.rank(), [str(warning.message) for warning in caught]


def test_the_first_rank_says_it_of_all_chains():
    with Ranks(2) as ranks:
        (_, first), (_, second) = ranks(run_on_ranks)
    assert len(first) == 1
    assert "1 of 4 chains (3) stands apart" in first[0]
    assert second == []


# -- numbers ---------------------------------------------------------------------------------------


def correlated(time, *shape):
    """Draws ``(chains, draws, ...)`` of N(0, 1) with this autocorrelation time."""
    chains, draws, *rest = shape
    rho = (time - 1) / (time + 1)
    noise = math.sqrt(1 - rho**2) * torch.randn(draws, chains, *rest)
    x = [torch.randn(chains, *rest)]
    for t in range(1, draws):
        x.append(rho * x[-1] + noise[t])
    return torch.stack(x, 1)


def test_the_worst_element_is_named_as_in_a_summary():
    x = torch.randn(4, 1000, 2, 3)
    x[:, :500, 1, 2] += 1.3
    x[:, :500, 0, 1] += 1
    (finding,) = findings({"a": torch.randn(4, 1000), "x": x}, {})
    r_hat = float(split_gelman_rubin(x[:, :, 1, 2]))
    want = f"R-hat is {r_hat:.3g} at 'x[1,2]' (and over 1.05 at 2 of 7 elements): the chains do"
    assert finding.text.startswith(want)


def test_one_chain_is_compared_with_itself():
    (finding,) = findings({"x": torch.randn(1, 400).cumsum(1)}, {})
    assert finding.text.endswith("the halves of the chain do not agree")


@pytest.mark.parametrize("shape", [(4, 100, 10), (2, 50, 5), (16, 100, 10), (1, 200, 3)])
@pytest.mark.parametrize("time", [1.0, 5.0])
def test_well_mixed_runs_are_rarely_blamed(shape, time):
    runs = 100
    x = correlated(time, *shape, runs)
    blamed = sum(bool(findings({"x": x[..., run]}, {})) for run in range(runs))
    assert binom.sf(blamed - 1, runs, 5 * LEVEL) > 1e-5  # few draws have a fatter tail


@pytest.mark.parametrize(("chains", "draws"), [(4, 10), (4, 50), (16, 10), (2, 1000)])
def test_far_modes_are_seen_however_short_the_run(chains, draws):
    x = torch.randn(chains, draws, 3)
    x[0, :, 1] += 100
    assert kinds(findings({"x": x}, {})) == ["r_hat", "apart"]


def test_the_largest_r_hat_follows_its_distribution():
    # R^2 = 1 + (tau chi2 / k - 1) / n of m = k + 1 half-chains of n draws
    for chains, draws, elements in [(4, 100, 10), (16, 1000, 1000), (1, 400, 1)]:
        n, k = draws // 2, 2 * chains - 1
        quantile = chi2.isf(LEVEL / (3 * elements), k) / k
        exact = math.sqrt(1 + (5 * quantile - 1) / n)
        assert largest_r_hat(chains, draws, elements) == pytest.approx(exact, rel=0.02)


def test_ranks_see_through_heavy_tails_and_spreads():
    heavy = torch.randn(4, 1000) / torch.randn(4, 1000)
    heavy[:2] += 2
    assert split_gelman_rubin(heavy) < 1.05
    (finding,) = findings({"x": heavy}, {})
    assert finding.text.startswith("R-hat of the ranks is 1.")
    wide = torch.randn(4, 1000)
    wide[:2] *= 3
    assert split_gelman_rubin(wide) < 1.05
    (finding,) = findings({"x": wide}, {})
    assert finding.text.startswith("R-hat of the distances from the median is 1.")


def test_elements_that_are_too_many_to_look_at(monkeypatch):
    monkeypatch.setattr(chain_statistics, "LIMIT", 2**14)
    monkeypatch.setattr(chain_statistics, "RANKED", 2**12)
    monkeypatch.setattr(chain_statistics, "BLOCK", 2**10)
    x = torch.randn(4, 1000, 30, 30)
    elements = Elements({"a": x[..., 0, 0], "x": x})
    found = survey(elements)
    assert found.num_draws == 250
    assert len(found.number) <= 2**14 // 1000
    assert findings({"x": x}, {}) == []
    x[:, 500:, 17, 23] += 20  # none of those that are evenly spaced
    (finding,) = findings({"a": x[..., 0, 0], "x": x}, {})
    r_hat = float(split_gelman_rubin(x[..., 17, 23]))
    assert finding.text.startswith(f"R-hat is {r_hat:.3g} at 'x[17,23]'")


def test_few_of_many_divergences_are_harmless():
    x = torch.randn(4, 1000)
    diverging = torch.zeros(4, 1000, dtype=torch.bool)
    fields = {"diverging": diverging}
    diverging[0, :10] = True
    assert findings({"x": x}, fields, Sampler(max_divergences=0.005)) == []
    assert kinds(findings({"x": x}, fields)) == ["diverging"]
    x, diverging = torch.randn(16, 1000), torch.zeros(16, 1000, dtype=torch.bool)
    diverging[3, :60] = True  # few of all, many of one chain
    fields = {"diverging": diverging}
    (finding,) = findings({"x": x}, fields, Sampler(max_divergences=0.005))
    assert finding.text == "60 of 16000 draws diverged (0.38 %), 60 of them in chain 3"
    diverging[:] = x > 1.0
    (finding,) = findings({"x": x}, fields, Sampler(max_divergences=0.05))
    assert "most of them where 'x' is near 1." in finding.text


def test_chains_that_stand_still_do_not_stand_apart():
    x = torch.randn(6, 200, 2)
    x[2] = 5.0
    x[4] = -7.0
    found = findings({"x": x}, {})
    assert kinds(found) == ["r_hat", "stuck"]
    assert found[1].text == "2 of 6 chains (2, 4) stand still"


@pytest.mark.parametrize(
    "samples",
    [
        {},
        {"x": torch.zeros(2, 10, 0)},
        {"x": torch.ones(2, 10, 3)},
        {"x": torch.ones(1, 4, dtype=torch.bool)},
        {"x": torch.arange(8).reshape(2, 4)},
        {"a": torch.zeros(3, 60, 0), "b": torch.randint(3, (3, 60)), "c": torch.randn(3, 60, 2)},
        {"x": torch.zeros(0, 10)},
    ],
)
def test_draws_of_every_kind_can_be_looked_at(samples):
    assert findings(samples, {}) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_draws_that_are_not_finite_are_found(value):
    x = torch.randn(2, 20, 3)
    x[1, 7, 2] = value
    (finding,) = findings({"x": x}, {})
    assert finding.text == f"draws ran off: 'x[2]' reaches {abs(value)}"


def test_results_of_pyros_own_runs_have_no_findings():
    mcmc = pyro.infer.MCMC(NUTS(NORMAL), 10, 10, disable_progbar=True)
    mcmc.run()
    assert Results.of(mcmc).findings == ()
