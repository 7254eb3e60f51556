"""Nested R-hat is the paper's, and runs that start in super-chains are judged by it."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size
from scipy.stats import f, norm

from pyro_ebm import MCMC, LangevinKernel, MHKernel
from pyro_ebm.diagnostics import findings, nested_r_hat
from pyro_ebm.diagnostics.chain_statistics import Elements
from pyro_ebm.diagnostics.superchains import effective_draws, variance_ratio
from pyro_ebm.files import CheckpointError
from tests.statistics import assert_mean_of_rows

NORMAL = dist.Normal(torch.zeros(3), 1.0).to_event(1)
STILL = {"step_size": 1e-9, "adapt_step_size": False, "adapt_mass_matrix": False}


def run(num_samples=10, warmup_steps=30, kernel=None, seed=0, **settings):
    pyro.set_rng_seed(seed)
    settings = {"num_chains": 60, "num_superchains": 6, "disable_progbar": True, **settings}
    mcmc = MCMC(kernel or LangevinKernel(NORMAL), num_samples, warmup_steps, **settings)
    mcmc.run()
    return mcmc


def by_the_paper(f):
    """Equations (5) to (8) of Margossian et al., for ``f[n][m][k]``, sum by sum."""
    num_n, num_m, num_k = f.shape
    of_chain = [[sum(f[n, m, k] for n in range(num_n)) / num_n for k in range(num_k)]
                for m in range(num_m)]  # fmt: skip
    of_super = [sum(of_chain[m][k] for m in range(num_m)) / num_m for k in range(num_k)]
    overall = sum(of_super) / num_k
    between = sum((mean - overall) ** 2 for mean in of_super) / (num_k - 1)
    within = 0.0
    for k in range(num_k):
        if num_m > 1:
            squares = ((of_chain[m][k] - of_super[k]) ** 2 for m in range(num_m))
            within += sum(squares) / (num_m - 1)
        if num_n > 1:
            squares = ((f[n, m, k] - of_chain[m][k]) ** 2
                       for m in range(num_m) for n in range(num_n))  # fmt: skip
            within += sum(squares) / (num_n - 1) / num_m
    return (1 + between / (within / num_k)) ** 0.5


@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 6, 2), (7, 1, 3), (2, 2, 2)])
def test_the_formula_of_the_paper(shape):
    values = np.random.default_rng(0).normal(size=shape).cumsum(0)
    x = torch.from_numpy(values).permute(2, 1, 0).flatten(0, 1)  # super-chains lead
    got = nested_r_hat(x, shape[2])
    assert float(got) == pytest.approx(by_the_paper(values), rel=1e-12)
    of_two = nested_r_hat(torch.stack([x, 3 - 2 * x], -1), shape[2])
    torch.testing.assert_close(of_two, got.expand(2))


@pytest.mark.parametrize(("a", "b"), [(3, 20), (9, 90), (15, 2000)])
def test_the_quantile_of_a_variance_ratio(a, b):
    for z in (1.0, 2.5, 3.5):
        assert variance_ratio(a, b, z) == pytest.approx(f.isf(norm.sf(z), a, b), rel=0.05)


@pytest.mark.parametrize("draws", [1, 10])
def test_its_expectation_on_stationary_chains(draws):
    x = torch.randn(8 * 25, draws, 4000, dtype=torch.float64)
    squared = nested_r_hat(x, 8).square()
    # B is independent of W = W / N + W, whose mean square error is below 1e-2 of it
    within = 1 + 1 / draws if draws > 1 else 1.0
    dof = 8 * 24 if draws == 1 else 8 * 25 * (draws - 1)
    inverse = 1 / within * (1 + 2 / dof)  # E[1 / W], up to 1 / dof^2
    assert_mean_of_rows(squared, 1 + inverse / (25 * draws))


def test_no_variance_and_none_inside():
    assert nested_r_hat(torch.ones(6, 2), 3).isnan()
    assert nested_r_hat(torch.arange(3.0).repeat_interleave(4)[:, None], 3).isinf()


@pytest.mark.parametrize(
    ("num", "shape", "why"),
    [
        (4, (6, 5), "num_superchains=4 must divide num_chains=6"),
        (1, (6, 5), "num_superchains must be"),
        (2.0, (6, 5), "num_superchains must be"),
        (6, (6, 1), "at least two draws in each super-chain"),
    ],
)
def test_what_has_no_nested_r_hat(num, shape, why):
    with pytest.raises(ValueError, match=why):
        nested_r_hat(torch.zeros(shape), num)


def test_it_sees_what_few_draws_hide_from_r_hat():
    """A bias of .3 deviations that each start leaves: R-hat of 10 draws is larger by chance."""
    x = torch.randn(1000, 10)
    assert findings({"x": x}, {}, num_superchains=10) == []
    x = x + 0.3 * torch.linspace(-1.5, 1.5, 10).repeat_interleave(100)[:, None]
    assert findings({"x": x}, {}) == []
    (found,) = findings({"x": x}, {}, num_superchains=10)
    assert found.kind == "r_hat"
    value = float(nested_r_hat(x, 10))
    assert found.text.startswith(f"nested R-hat is {value:.4g} at 'x': the super-chains do not")


@pytest.mark.parametrize("draws", [1, 2, 4, 20])
def test_converged_chains_are_not_blamed(draws):
    for num_chains in (20, 100, 1000):
        x = torch.randn(num_chains, draws, 30)
        assert findings({"x": x}, {}, num_superchains=10) == []
        assert findings({"x": x**3}, {}, num_superchains=10) == []  # heavy tails


def test_chains_of_a_superchain_start_together():
    mcmc = run(1, 0, LangevinKernel(NORMAL, **STILL), check_convergence=False)
    x = mcmc.get_samples(group_by_chain=True)["x"].reshape(6, 10, 3)
    assert (x - x[:, :1]).abs().max() < 1e-3
    assert (x[:, 0, 0].sort().values.diff() > 1e-2).all()


def test_the_warning_the_summary_and_the_table_are_nested(capsys):
    with pytest.warns(UserWarning, match=r"nested R-hat is \S+ at 'x"):
        mcmc = run(1, 2, LangevinKernel(NORMAL, **STILL))
    x = mcmc.get_samples(group_by_chain=True)["x"]
    torch.testing.assert_close(mcmc.diagnostics()["x"]["r_hat"], nested_r_hat(x, 6))
    assert mcmc.diagnostics()["x"]["n_eff"].tolist() == [60] * 3
    mcmc.summary()
    printed = capsys.readouterr().out
    assert f"{float(nested_r_hat(x, 6)[2]):.2f}" in printed.splitlines()[4]
    assert "R-hat is nested, of 6 super-chains of 10 chains" in printed
    good = run(10, 40)
    assert good.findings == ()
    assert good.diagnostics()["x"]["r_hat"].max() < 1.1


def test_the_layout_is_kept(tmp_path):
    files = {"checkpoint": tmp_path / "a.ckpt"}
    data = run(**files).to_arviz()
    assert data.posterior.attrs["num_superchains"] == 6
    assert "num_superchains" not in run(num_superchains=None).to_arviz().posterior.attrs
    again = MCMC(LangevinKernel(NORMAL), 10, 30, num_chains=60, disable_progbar=True, **files)
    with pytest.raises(CheckpointError, match="num_superchains is not there, and was 6"):
        again.resume()
    again.num_superchains = 6
    again.resume()
    assert again.results.num_superchains == 6
    stored = run(store=tmp_path / "a.zarr")
    assert stored.to_arviz().posterior.attrs["num_superchains"] == 6


def test_given_starts_are_checked():
    starts = torch.randn(6, 3).repeat_interleave(10, 0)
    assert run(2, 2, initial_params={"x": starts}).results.shape == (60, 2)
    with pytest.raises(ValueError, match=r"repeat_interleave\(10, 0\) of one start"):
        run(initial_params={"x": torch.randn(60, 3)})
    with pytest.raises(ValueError, match="must divide num_chains=60"):
        run(num_superchains=7)
    with pytest.raises(ValueError, match="num_superchains=60 of one chain with one draw"):
        run(num_samples=5, thinning=5, num_superchains=60)
    with pytest.raises(ValueError, match='num_superchains= needs chain_method="vectorized"'):
        run(chain_method="sequential")


def test_elements_of_many_sites():
    x = {"a": torch.randn(20, 5), "b": torch.randn(20, 5, 2)}
    elements = Elements(x, num_superchains=4)
    got = elements.r_hat(elements.take(torch.tensor([0, 2])))
    want = torch.stack([nested_r_hat(x["a"].double(), 4), nested_r_hat(x["b"].double(), 4)[1]])
    torch.testing.assert_close(got, want)
    assert run(4, 4, MHKernel(NORMAL)).diagnostics()["x"]["r_hat"].shape == (3,)


def test_effective_draws_are_bounded_where_few_draws_are_antithetic():
    x = torch.tensor([1.0, -1.0]).repeat(4, 5) + 0.1 * torch.randn(4, 10)
    assert float(effective_sample_size(x)) < 0  # of a negative autocorrelation time
    assert float(effective_draws(x)) == pytest.approx(40 * math.log10(40))
    independent = torch.randn(4, 1000)
    torch.testing.assert_close(effective_draws(independent), effective_sample_size(independent))
