"""Kernels on minibatches: unbiased gradients, and draws whose bias is the one in theory."""

import itertools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc import MCMC as PyroMCMC

from pyro_ebm import (
    MCMC,
    ConvergenceWarning,
    LangevinKernel,
    SGHMCKernel,
    SGLDKernel,
    TemperingKernel,
    UnnormalizedEnergy,
)
from pyro_ebm.mcmc import (
    ChEESKernel,
    CompositeKernel,
    MinibatchPotential,
    ModelPotential,
    NormalizerError,
    PolynomialDecay,
)
from pyro_ebm.models.subsamples import PlateSize, draw_rows
from tests.statistics import assert_mean

KERNELS = [SGLDKernel, SGHMCKernel]


def effective_size(x):
    """Of draws (chains, draws, ...), with chains by the hundred: by the variance of their means."""
    return x.var((0, 1)) / x.mean(1).var(0) * len(x)


def run(kernel, *args, samples=200, warmup=100, chains=4, **settings):
    mcmc = MCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **settings)
    mcmc.run(*args)
    return mcmc


# -- the potential at some rows, and of all --------------------------------------------------------


def table(y, rows=None, columns=None):
    """A table in nested plates, with a site between them."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", 5, subsample_size=rows, dim=-2) as i:
        pyro.sample("first", dist.Normal(mu, 1.0), obs=y[i, :1])
        with pyro.plate("columns", 4, subsample_size=columns, dim=-1) as j:
            pyro.sample("y", dist.Normal(mu, scale), obs=y[i[:, None], j])


@pytest.mark.parametrize("own", [False, True])
def test_the_mean_over_all_subsamples_of_nested_plates_is_that_of_all_the_data(own):
    y, z = torch.randn(5, 4), torch.randn(1, 2)
    potential = MinibatchPotential(table, (y, 2, 3))
    some = [
        {"rows": torch.tensor(i), "columns": torch.tensor(j)}
        for i in itertools.combinations(range(5), 2)
        for j in itertools.combinations(range(4), 3)
    ]
    if own:  # each chain at rows of its own
        rows = {name: torch.stack([each[name] for each in some]) for name in some[0]}
        value, grad = potential.value_and_grad_at(z.expand(len(some), -1), rows)
    else:
        parts = [potential.value_and_grad_at(z, rows) for rows in some]
        value, grad = (torch.cat(part) for part in zip(*parts, strict=True))
    want, want_grad = ModelPotential(table, (y,)).value_and_grad(z)
    assert value.std() > 0.1
    torch.testing.assert_close(value.mean(), want[0])
    torch.testing.assert_close(grad.mean(0), want_grad[0])


def test_all_the_data_are_those_of_the_blocks_though_sizes_do_not_divide():
    y, z = torch.randn(5, 4), torch.randn(1, 2)
    whole = ModelPotential(table, (y,))
    potential = MinibatchPotential(table, (y, 2, 3))  # 5 = 2 + 2 + 1, 4 = 3 + 1
    value, grad = potential.of_all_rows(z[0])
    want, want_grad = whole.value_and_grad(z)
    torch.testing.assert_close(value, want[0])
    torch.testing.assert_close(grad, want_grad[0])
    hessian = torch.autograd.functional.hessian(lambda z: whole(z[None])[0], z[0])
    products = potential.hessian_products(z[0], torch.eye(2))
    torch.testing.assert_close(products, hessian, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("size", "n"), [(8, 3), (30, 3)])  # by a permutation, and by trials
def test_subsamples_are_uniform_and_without_replacement(size, n, together):
    plates, cpu = {"data": PlateSize(size, n)}, torch.device("cpu")
    if together:
        rows = torch.cat([draw_rows(plates, 1000, cpu)["data"] for _ in range(4)])
    else:
        rows = torch.stack([draw_rows(plates, None, cpu)["data"] for _ in range(4000)])
    assert (rows.sort(-1).values.diff(dim=-1) > 0).all()
    share = torch.bincount(rows.flatten(), minlength=size) / 4000
    p = n / size
    assert (share - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / 4000)


def test_a_model_without_subsampling_is_seen_whole():
    y = torch.randn(5, 4)
    potential = MinibatchPotential(table, (y,))
    assert potential.draw_rows() == {}
    want, got = (
        p.value_and_grad(torch.ones(2, 2)) for p in (ModelPotential(table, (y,)), potential)
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(potential.of_all_rows(torch.ones(2))[1], want[1][0])


def test_missing_data_that_are_masked_are_found_in_any_row():
    y = torch.randn(12)
    y[7] = torch.nan

    def model(y, n=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample_size=n) as rows:
            some = y[rows]
            with poutine.mask(mask=~some.isnan()):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=some)

    potential = MinibatchPotential(model, (y, 3))
    value, grad = potential.of_all_rows(torch.zeros(1))
    torch.testing.assert_close(
        grad, ModelPotential(model, (y,)).value_and_grad(torch.zeros(1, 1))[1][0]
    )
    assert value.isfinite()


# -- stationary distributions in closed form -------------------------------------------------------


def means(y, precision, n):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=n) as rows:
        pyro.sample("y", dist.MultivariateNormal(mu, precision_matrix=precision), obs=y[rows])


def gaussian_case(n=10):
    """Data, and of their posterior the curvature F, the mean, and the noise S of subsamples."""
    y = torch.randn(100, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    precision = torch.tensor([[1.0, 0.3], [0.3, 2.0]])
    curvature = 100 * precision + torch.eye(2) / 100
    mean = torch.linalg.solve(curvature, precision @ y.sum(0))
    # without replacement: Var(sum) = n (1 - n / N) Cov(y), with the denominator N - 1
    noise = (100**2 / n) * (1 - n / 100) * precision @ y.T.cov() @ precision
    return (y, precision, n), curvature, mean, noise


def stationary(a, q):
    """The covariance C = A C A' + Q of x' = A x + noise."""
    d = len(a)
    identity = torch.eye(d * d, dtype=a.dtype)
    return torch.linalg.solve(identity - torch.kron(a, a), q.reshape(-1)).reshape(d, d)


@pytest.mark.parametrize("step_size", [1e-3, 4e-3])
@pytest.mark.parametrize("make", KERNELS)
def test_on_a_gaussian_the_covariance_is_the_one_in_theory(make, step_size):
    args, F, mean, S = gaussian_case()
    eps, a, eye = step_size, 1.0, torch.eye(2)
    kernel = make(means, step_size=step_size, precondition_steps=False, shared_rows=False)
    if make is SGHMCKernel:
        #  u' = (1 - a) u - a eps (F z + noise) + a sqrt(2 eps) xi,   z' = z + u'
        a = kernel.friction
        A = torch.cat(
            [
                torch.cat([eye - a * eps * F, (1 - a) * eye], 1),
                torch.cat([-a * eps * F, (1 - a) * eye], 1),
            ]
        )
        q = a**2 * (eps**2 * S + 2 * eps * eye)
        want = stationary(A, torch.cat([torch.cat([q, q], 1), torch.cat([q, q], 1)]))[:2, :2]
    else:
        want = stationary(eye - eps * F, eps**2 * S + 2 * eps * eye)
    exact = torch.linalg.inv(F)
    assert want.trace() / exact.trace() > 1.05  # a bias that shows
    warmup = int(8 / (eps * float(torch.linalg.eigvalsh(F)[0])))
    start = {"mu": mean + 0.1 * torch.randn(100, 2)}
    settings = {"initial_params": start, "check_convergence": False}
    mcmc = run(kernel, *args, samples=150, warmup=warmup, chains=100, **settings)
    x = mcmc.get_samples(group_by_chain=True)["mu"] - mean
    assert (x.mean((0, 1)).abs() < 4.5 * (want.diagonal() / effective_size(x)).sqrt()).all()
    products = x[..., :, None] * x[..., None, :]
    # of products of Gaussians: Var(x_i x_j) = C_ii C_jj + C_ij^2
    spread = (want.diagonal()[:, None] * want.diagonal() + want**2).sqrt()
    error = spread / effective_size(products.flatten(2)).sqrt().reshape(2, 2)
    assert ((products.mean((0, 1)) - want).abs() < 4.5 * error).all()


@pytest.mark.parametrize("make", KERNELS)
def test_a_learned_step_has_the_bias_that_was_asked_for(make):
    args, F, mean, _ = gaussian_case()
    kernel = make(means, variance_bias=0.2, shared_rows=False)
    mcmc = run(kernel, *args, samples=150, warmup=300, chains=100, check_convergence=False)
    x = mcmc.get_samples(group_by_chain=True)["mu"] - mean
    white = x @ torch.linalg.cholesky(F)  # of covariance 1 in the posterior
    bias = white.var((0, 1)) - 1
    error = 4.5 * (2 / effective_size(white.square())).sqrt()
    assert (bias > 0.05 - error).all()
    assert (bias < 0.3 + error).all()
    assert 0.1 < kernel.estimated_bias < 0.35
    assert "dense preconditioner" in repr(kernel)


def test_control_variates_take_the_noise_from_gaussian_gradients():
    args, F, mean, _ = gaussian_case(n=2)  # whose gradients differ by constants alone
    kernel = SGLDKernel(means, control_variates=True)
    mcmc = run(kernel, *args, samples=150, warmup=60, chains=100)
    x = mcmc.get_samples(group_by_chain=True)["mu"] - mean
    # preconditioned by the Hessian: 1 / (1 - eps / 2) in every direction
    eps = kernel.mean_step_size
    assert 0.15 < eps < 0.25
    white = x @ torch.linalg.cholesky(F)
    error = 4.5 * (2 / effective_size(white.square())).sqrt()
    assert ((white.var((0, 1)) - 1 / (1 - eps / 2)).abs() < error).all()
    at_mode = ModelPotential(means, (args[0], args[1], None)).value_and_grad(mean[None])[0]
    lp = mcmc.get_extra_fields(group_by_chain=True)["lp"]  # and it has no noise either
    assert_mean(lp + at_mode, -1 / (1 - eps / 2))


# -- posteriors ------------------------------------------------------------------------------------


def logistic(X, y, n=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(X), subsample_size=n) as rows:
        X, y = (X, y) if n is None else (X[rows], y[rows])
        pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


def logistic_data(rows, columns):
    X = torch.randn(rows, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    return X, torch.bernoulli(torch.sigmoid(X @ (0.5 * torch.randn(columns))))


def by_importance(X, y, num=4000):
    """Mean and sd of the posterior, from a Gaussian at the mode that is reweighted."""
    potential = MinibatchPotential(logistic, (X, y))
    z = torch.zeros(X.shape[1])
    for _ in range(6):
        hessian = potential.hessian_products(z, torch.eye(len(z)))
        z = z - torch.linalg.solve(hessian, potential.of_all_rows(z)[1])
    p = dist.MultivariateNormal(z, precision_matrix=(hessian + hessian.T) / 2)
    w = p.sample((num,))
    scores = w.double() @ X.double().T
    log_p = (scores * y - torch.nn.functional.softplus(scores)).sum(-1) - w.square().sum(-1) / 2
    weight = (log_p - p.log_prob(w)).softmax(0)[:, None]
    assert 1 / weight.square().sum() > num / 2  # the effective number of draws
    mean = (weight * w).sum(0)
    return mean, (weight * (w - mean).square()).sum(0).sqrt()


def test_logistic_regression_by_minibatches():
    X, y = logistic_data(20_000, 10)
    mean, sd = by_importance(X, y)
    kernel = SGLDKernel(logistic, control_variates=True)
    mcmc = run(kernel, X, y, 200, samples=600, warmup=100, chains=40)
    w = mcmc.get_samples()["w"]
    assert ((w.mean(0) - mean) / sd).abs().max() < 0.1
    assert (w.std(0) / sd - 1).abs().max() < 0.15
    assert kernel.estimated_bias < 0.25


@pytest.mark.slow
def test_a_hundred_thousand_rows_beside_mala():
    N, d, n = 100_000, 15, 400
    X, y = logistic_data(N, d)
    mala = run(LangevinKernel(logistic), X, y, samples=1000, warmup=500, chains=8)
    kernel = SGLDKernel(logistic, control_variates=True)
    mcmc = run(kernel, X, y, n, samples=2000, warmup=300, chains=16)
    # the center: a look at all rows, a descent, and up to 6 gradients and Hessians by d products
    of_center = N + 1000 * n + 6 * N * (2 + d)
    rows, of_mala = 16 * 2300 * 2 * n + of_center, 8 * 1500 * N
    assert rows < of_mala / 20
    want, w = mala.get_samples()["w"], mcmc.get_samples()["w"]
    error, ratio = ((w.mean(0) - want.mean(0)) / want.std(0)).abs(), w.std(0) / want.std(0)
    assert error.max() < 0.1
    assert (ratio - 1).abs().max() < 0.15
    print(f"rows 1/{of_mala / rows:.0f}, {error.max():.3f} sd, {ratio.max():.3f}")


def test_constrained_sites_move_on_the_reals():
    y = 0.5 * torch.randn(2000)

    def model(y):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=50) as rows:
            pyro.sample("y", dist.Normal(0.0, precision.rsqrt()), obs=y[rows])

    mcmc = run(SGLDKernel(model, control_variates=True), y, samples=500, chains=20)
    posterior = dist.Gamma(2.0 + 1000, 1.0 + float(y.square().sum()) / 2)
    x = mcmc.get_samples()["precision"]
    assert abs(float((x.mean() - posterior.mean) / posterior.variance.sqrt())) < 0.15
    assert abs(float(x.std() / posterior.variance.sqrt()) - 1) < 0.15


def test_the_center_may_be_given_as_values_of_the_sites():
    y = 1.0 + torch.randn(400)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=20) as rows:
            pyro.sample("y", dist.Normal(mu, scale), obs=y[rows])

    at = {"mu": y.mean(), "scale": y.std()}
    kernel = SGLDKernel(model, control_variates=at)
    mcmc = run(kernel, y, chains=10, save_warmup=True)
    assert abs(float(mcmc.get_samples()["mu"].mean() - y.mean())) < 0.02
    first = mcmc.get_warmup_samples(group_by_chain=True)["mu"][:, 0]
    assert (first - y.mean()).abs().max() < 0.3  # of sd .05
    for bad, match in [
        ({"mu": y.mean()}, r"\['mu'\], the model has \['mu', 'scale'\]"),
        ({"mu": y.mean(), "scale": torch.tensor(-1.0)}, r"'scale'\] must be a value"),
        ({"mu": torch.zeros(2), "scale": y.std()}, r"'mu'\] must be a value"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(SGLDKernel(model, control_variates=bad), y)


def test_energies_inside_of_a_subsampled_plate():
    y = torch.randn(30)

    def model(y, as_energy):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 30, subsample_size=7) as rows:
            energy = UnnormalizedEnergy(lambda x: (x - mu) ** 2 / 2, constant_normalizer=True)
            pyro.sample("y", energy if as_energy else dist.Normal(mu, 1.0), obs=y[rows])

    z = torch.randn(3, 1)
    energy, normal = (MinibatchPotential(model, (y, kind)) for kind in (True, False))
    rows = energy.draw_rows(3)
    got, want = (p.value_and_grad_at(z, rows)[1] for p in (energy, normal))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shared", [True, False, None])
def test_chains_see_the_same_rows_or_their_own(shared):
    y = torch.randn(50)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    kernel = SGLDKernel(model, step_size=1e-14, precondition_steps=False, shared_rows=shared)
    start = {"mu": torch.zeros(5)}
    mcmc = run(
        kernel, y, samples=30, warmup=0, chains=5, initial_params=start, check_convergence=False
    )
    lp = mcmc.get_extra_fields(group_by_chain=True)["lp"]
    assert lp[0].std() > 1  # fresh rows at each step
    assert (lp.std(0).max() < 0.01) == bool(shared)


@pytest.mark.parametrize("kernel", [SGLDKernel, SGHMCKernel])
def test_rows_are_shared_by_default_where_control_variates_leave_little_noise(kernel):
    center = {"mu": torch.zeros(())}
    shared = [kernel(means, control_variates=x).shared_rows for x in (False, True, center)]
    assert shared == [False, True, True]
    given = [kernel(means, control_variates=x, shared_rows=not x) for x in (False, True)]
    assert [k.shared_rows for k in given] == [True, False]


# -- schedules, what is said of the bias -----------------------------------------------------------


def test_steps_fall_by_the_schedule_after_the_warmup():
    args, _, _, _ = gaussian_case()
    decay = PolynomialDecay(offset=10, power=0.5)
    mcmc = run(
        SGLDKernel(means, step_size=0.05, schedule=decay),
        *args,
        samples=40,
        check_convergence=False,
    )
    step_size = mcmc.get_extra_fields(group_by_chain=True)["step_size"][0]
    t = torch.arange(40)
    torch.testing.assert_close(step_size, 0.05 * (1 + t / 10) ** -0.5)
    with pytest.raises(ValueError, match=r"schedule gave 0\.0 after 3 draws"):
        run(SGLDKernel(means, step_size=0.05, schedule=lambda t: 1.0 * (t < 3)), *args)


def test_the_summary_says_that_the_draws_are_biased(capsys):
    args, _, _, _ = gaussian_case()
    mcmc = run(SGLDKernel(means, control_variates=True), *args, chains=10)
    mcmc.summary()
    said = capsys.readouterr().out
    assert "SGLDKernel makes no Metropolis test" in said
    assert re.search(r"variances too large \(by some [\d.]+ % at most", said)


@pytest.mark.parametrize("shared", [True, False])
def test_the_summary_says_by_how_much_shared_rows_make_chains_agree(shared, capsys):
    y, n, eps, draws = torch.randn(100), 5, 2e-3, 1000

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y), subsample_size=n) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    kernel = SGLDKernel(
        model, step_size=eps, precondition_steps=False, variance_bias=1.0, shared_rows=shared
    )
    start = {"mu": y.mean() + 0.1 * torch.randn(20)}
    mcmc = run(kernel, y, samples=draws, warmup=20, chains=20, initial_params=start)
    S = (100**2 / n) * (1 - n / 100) * float(y.var())
    rho = eps * S / (eps * S + 2) if shared else 0.0  # the part of eps^2 S in eps^2 S + 2 eps
    # Var of a mean of T squares of differences of neighbours, over their mean: 3 / T
    error = 5 * math.sqrt(3 / draws) * max(rho, 0.1)
    assert abs((kernel.excess_of_ess - 1) / 19 - rho) < error
    mcmc.summary()
    assert ("err together" in capsys.readouterr().out) == shared


def test_chains_of_a_super_chain_start_together_at_the_center():
    args, _, _, _ = gaussian_case()
    kernel = SGLDKernel(means, step_size=1e-12, precondition_steps=False, control_variates=True)
    mcmc = run(
        kernel, *args, samples=4, warmup=0, chains=6, num_superchains=2, check_convergence=False
    )
    (z,) = mcmc.get_samples(group_by_chain=True).values()
    starts = z[:, 0].reshape(2, 3, -1)
    torch.testing.assert_close(starts, starts[:, :1].expand_as(starts), atol=1e-4, rtol=0)
    assert (starts[0] - starts[1]).abs().min() > 1e-3


def test_a_bias_that_is_far_too_large_is_a_finding():
    args, _, _, _ = gaussian_case()
    kernel = SGLDKernel(means, step_size=4e-3, precondition_steps=False)
    with pytest.warns(ConvergenceWarning, match=r"variances too large by some .* control_variates"):
        run(kernel, *args, samples=400, chains=20)


# -- what is refused -------------------------------------------------------------------------------


def simple(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


@pytest.mark.parametrize("kernel", [LangevinKernel(simple, adjusted=False), ChEESKernel(simple)])
def test_other_kernels_point_to_these(kernel):
    with pytest.raises(NotImplementedError, match=r"'data' subsamples 2 of 6.* use SGLDKernel or"):
        run(kernel, torch.zeros(6))


@pytest.mark.parametrize("make", KERNELS)
def test_latents_of_each_row_are_refused_by_name(make):
    def model(y):
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            x = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])

    match = "'local' is a latent of each row of the subsampled plate 'data'"
    with pytest.raises(NotImplementedError, match=match):
        run(make(model), torch.randn(6))


def test_a_moving_normalizer_is_refused():
    def model(y):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            pyro.sample("y", UnnormalizedEnergy(lambda x: precision * x**4), obs=y[rows])

    with pytest.raises(NormalizerError, match="'y'"):
        run(SGLDKernel(model), torch.randn(6))


def test_data_that_are_not_indexed_by_the_rows_are_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 60, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"same density whichever rows .*'data'"):
        run(SGLDKernel(model), torch.randn(6))


def test_data_that_the_model_does_not_take_are_found_in_any_row():
    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Bernoulli(p), obs=y[rows])

    with pytest.raises(ValueError, match="within the support"):
        run(SGLDKernel(model), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 2.0]))


@pytest.mark.parametrize("make", KERNELS)
def test_arguments(make):
    for settings, match in [
        ({"step_size": 0.0}, "step_size"),
        ({"variance_bias": -1.0}, "variance_bias"),
        ({"schedule": 3}, "schedule"),
        ({"control_variates": "mode"}, "control_variates"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            make(simple, **settings)
    with pytest.raises(ValueError, match="learns its step size in the warmup"):
        run(make(simple), torch.randn(6), warmup=0)
    with pytest.raises(ValueError, match="cannot be inside of another kernel"):
        run(TemperingKernel(make(table), [1.0, 0.5]), torch.randn(5, 4))
    with pytest.raises(ValueError, match="cannot be inside of another kernel"):
        run(CompositeKernel(table, kernels=[make()]), torch.randn(5, 4))


def test_friction_lies_in_the_unit_interval():
    with pytest.raises(ValueError, match=r"friction must lie in \(0, 1\], got 1.5"):
        SGHMCKernel(friction=1.5)


# -- runners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KERNELS)
def test_runs_one_chain_at_a_time_and_under_pyro(make):
    args, F, mean, _ = gaussian_case()
    kernel = make(means, control_variates=True)
    mcmc = run(kernel, *args, chains=1, chain_method="sequential")
    stock = PyroMCMC(kernel, 200, warmup_steps=50, disable_progbar=True)
    stock.run(*args)
    sd = torch.linalg.inv(F).diagonal().sqrt()
    for sampler in (mcmc, stock):
        assert ((sampler.get_samples()["mu"].mean(0) - mean) / sd).abs().max() < 0.8


def test_graphs_give_the_draws_of_the_model():
    args, _, _, _ = gaussian_case()
    draws = []
    for jit_compile in (False, "capture"):
        pyro.set_rng_seed(0)
        kernel = SGHMCKernel(
            means, step_size=1e-3, precondition_steps=False, jit_compile=jit_compile
        )
        mcmc = run(kernel, *args, samples=20, warmup=0, check_convergence=False)
        draws.append(mcmc.get_samples()["mu"])
    torch.testing.assert_close(*draws, rtol=1e-3, atol=1e-3)
