"""Langevin on minibatches beside BlackJAX and posteriors: errors after equally many rows.

python -m tests.benchmarks.minibatches
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ebm import MCMC, LangevinKernel, SGHMCKernel, SGLDKernel
from pyro_ebm.mcmc.potentials.minibatch import MinibatchPotential
from tests.benchmarks import report
from tests.benchmarks.harness import Options, Question, Row, progress, versions
from tests.mcmc.test_minibatch import by_importance, logistic, logistic_data

PREFACE = """
Bayesian logistic regression with 20,000 rows, 200 of them in each step, 20 chains: the error after
20 million looks at a row, all chains together (a thousand times through the data), of which the
steps of the first half are thrown away. *alike*: ten correlated columns of like size; *scaled*: the
same, times factors from .1 to 3. *mean*: the largest error of a posterior mean, in posterior
standard deviations; *sd*: the range of the ratios of a standard deviation to the true one. The
truth is the posterior itself by importance sampling (error of a mean .008). A look is a row in a
gradient; with control variates a step looks at 400 rows, and the search for our center counts.

Ours run with their defaults: the step size is learned. The peers have no default; theirs is the
best of a grid (of SGHMC, of step sizes and frictions) by these same errors, in a run that is not
counted; they start at the mode, and BlackJAX is handed the center of its control variates, all free
of charge. MALA on all the data is there for scale, with the looks that it took.
"""

ROWS, COLUMNS, SUBSAMPLE, CHAINS = 20_000, 10, 200, 20
BUDGET = 20_000_000
"""Looks at a row."""
STEP_SIZES = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Of SGLD, in units of 1 over the largest curvature."""
STEP_SIZES_OF_SGHMC = (0.1, 0.03)
FRICTIONS = (3.0, 1.0, 0.3)
"""Both in units of the root of the largest curvature."""

Draws = tuple[Tensor, int]
"""Draws ``(chains * draws, dim)``, and the looks that they took."""


@dataclass(frozen=True)
class Case:
    """Data, and what is known of the posterior."""

    name: str
    x: Tensor
    y: Tensor
    mode: Tensor
    curvature: float
    """The largest eigenvalue of the Hessian at the mode."""
    mean: Tensor
    sd: Tensor

    def errors(self, draws: Tensor) -> tuple[float, float, float]:
        """The largest error of a mean, the least and the largest ratio of a standard deviation."""
        ratio = draws.std(0) / self.sd
        mean = ((draws.mean(0) - self.mean) / self.sd).abs().max()
        return float(mean), float(ratio.min()), float(ratio.max())

    def worst(self, draws: Tensor) -> float:
        """One number: the larger of both errors."""
        mean, low, high = self.errors(draws)
        found = max(mean, abs(low - 1), abs(high - 1))
        return found if math.isfinite(found) else math.inf


def case(name: str, rows: int, looks: int = 4) -> Case:
    """The data of a case, and its posterior by importance sampling."""
    pyro.set_rng_seed(0)
    x, y = logistic_data(rows, COLUMNS)
    if name == "scaled":
        x = x * torch.logspace(math.log10(3.0), -1, COLUMNS)
    potential, mode = MinibatchPotential(logistic, (x, y)), torch.zeros(COLUMNS)
    for _ in range(8):
        hessian = potential.hessian_products(mode, torch.eye(COLUMNS))
        mode = mode - torch.linalg.solve(hessian, potential.of_all_rows(mode)[1])
    found = [by_importance(x, y) for _ in range(looks)]
    mean, sd = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
    return Case(name, x, y, mode, float(torch.linalg.eigvalsh(hessian)[-1]), mean, sd)


def steps_of(budget: int, looks: int = SUBSAMPLE) -> int:
    """How many steps each chain makes for so many looks."""
    return budget // (CHAINS * looks)


# -- ours ------------------------------------------------------------------------------------------


def ours(make: Callable[..., Any], budget: int, of: Case) -> Draws:
    """A kernel with its defaults, half of its steps warmup."""
    kernel = make(logistic)
    corrected, center = kernel.control_variates is True, 0
    if corrected:  # a look at all rows, a descent, and up to 6 gradients and Hessians by products
        center = len(of.x) * (1 + 6 * (2 + COLUMNS)) + 1000 * SUBSAMPLE
    looks = SUBSAMPLE * (2 if corrected else 1)
    num = max(steps_of(budget - center, looks) // 2, 2)
    mcmc = MCMC(kernel, num, num, num_chains=CHAINS, disable_progbar=True, check_convergence=False)
    mcmc.run(of.x, of.y, SUBSAMPLE)
    return mcmc.get_samples()["w"], center + 2 * num * looks * CHAINS


def mala(budget: int, of: Case) -> Draws:
    """On all the data, for scale: as long as it takes to be right."""
    num = 10 if budget < BUDGET else 250
    mcmc = MCMC(
        *(LangevinKernel(logistic), num, num),
        num_chains=CHAINS,
        disable_progbar=True,
        check_convergence=False,
    )
    mcmc.run(of.x, of.y)
    return mcmc.get_samples()["w"], 2 * num * CHAINS * len(of.x)


# -- peers -----------------------------------------------------------------------------------------


def tuned(
    run: Callable[..., Draws], grid: list[tuple[float, ...]], of: Case
) -> Callable[[], Draws]:
    """The best setting of a grid, by the errors that are told in the end."""
    pyro.set_rng_seed(1000)
    best = min(grid, key=lambda setting: of.worst(run(*setting)[0]))
    return partial(run, *best)


def with_posteriors(algorithm: str, budget: int, of: Case, lr: float, alpha: float = 0.0) -> Draws:
    """SGLD or SGHMC of posteriors, all chains in one tensor of parameters."""
    import posteriors

    of_prior = torch.distributions.Normal(0.0, 1.0)
    softplus = torch.nn.functional.softplus

    def log_posterior(w: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch  # (chains, n, dim) and (chains, n): each chain has rows of its own
        scores = torch.einsum("cnd,cd->cn", x, w)
        log_p = (scores * y - softplus(scores)).sum() * len(of.x) / y.shape[-1]
        return log_p + of_prior.log_prob(w).sum(), scores.new_zeros(())

    kind = getattr(posteriors.sgmcmc, algorithm)
    root = of.curvature**0.5
    if algorithm == "sgld":
        transform = kind.build(log_posterior, lr=lr / of.curvature)
    else:
        transform = kind.build(log_posterior, lr=lr / root, alpha=alpha * root)
    state, num, kept = transform.init(of.mode.repeat(CHAINS, 1)), steps_of(budget), []
    for t in range(num):
        rows = torch.randint(len(of.x), (CHAINS, SUBSAMPLE))
        state, _ = transform.update(state, (of.x[rows], of.y[rows]))
        if t >= num // 2:
            kept.append(state.params)
    return torch.cat(kept), num * CHAINS * SUBSAMPLE


def with_blackjax(corrected: bool, budget: int, of: Case, step_size: float) -> Draws:
    """SGLD of BlackJAX, all chains and steps in one compiled loop."""
    import blackjax
    import jax
    import jax.numpy as jnp

    x, y, mode = (jnp.asarray(a.numpy()) for a in (of.x, of.y, of.mode))
    num = steps_of(budget, SUBSAMPLE * (2 if corrected else 1))

    def log_prior(w: Any) -> Any:
        return -(w**2).sum() / 2

    def log_likelihood(w: Any, row: Any) -> Any:
        score = row[0] @ w
        return score * row[1] - jnp.logaddexp(score, 0.0)

    gradients = blackjax.sgmcmc.gradients
    gradient = gradients.grad_estimator(log_prior, log_likelihood, len(x))
    if corrected:
        gradient = gradients.control_variates(gradient, mode, (x, y))
    sgld = blackjax.sgld(gradient)

    def chain(key: Any) -> Any:
        def step(w: Any, key: Any) -> Any:
            rows, noise = jax.random.split(key)
            i = jax.random.randint(rows, (SUBSAMPLE,), 0, len(x))
            w = sgld.step(noise, w, (x[i], y[i]), step_size / of.curvature)
            return w, w

        return jax.lax.scan(step, mode, jax.random.split(key, num))[1][num // 2 :]

    keys = jax.random.split(jax.random.PRNGKey(torch.randint(2**31, ()).item()), CHAINS)
    found = torch.from_numpy(jax.device_get(jax.jit(jax.vmap(chain))(keys)).copy())
    looks = num * CHAINS * SUBSAMPLE * (2 if corrected else 1) + len(x) * corrected
    return found.flatten(0, 1), looks


def contestants(of: Case, budget: int, quick: bool) -> dict[str, tuple[str, Callable[[], Draws]]]:
    """Name, versions, and a run; those of peers with the best setting."""
    own, jax, other = (
        versions("pyro-ebm", "torch"),
        versions("blackjax", "jax"),
        versions("posteriors", "torch"),
    )
    found: dict[str, tuple[str, Callable[[], Draws]]] = {}
    for name, make in {
        "SGLD, control variates": partial(SGLDKernel, control_variates=True),
        "SGHMC, control variates": partial(SGHMCKernel, control_variates=True),
        "SGLD": SGLDKernel,
        "SGHMC": SGHMCKernel,
    }.items():
        found[f"pyro_ebm {name}"] = (own, partial(ours, make, budget, of))
    found["pyro_ebm MALA, all rows"] = (own, partial(mala, budget, of))
    if quick:
        return found
    sizes = [(size,) for size in STEP_SIZES]
    of_sghmc = list(itertools.product(STEP_SIZES_OF_SGHMC, FRICTIONS))
    for name, versions_of, run, grid in (
        ("BlackJAX SGLD, control variates", jax, partial(with_blackjax, True), sizes),
        ("BlackJAX SGLD", jax, partial(with_blackjax, False), sizes),
        ("posteriors SGLD", other, partial(with_posteriors, "sgld"), sizes),
        ("posteriors SGHMC", other, partial(with_posteriors, "sghmc"), of_sghmc),
    ):
        progress(f"{of.name}, {name}: looks for its best setting")
        found[name] = (versions_of, tuned(partial(run, budget, of), grid, of))
    return found


def measure(options: Options) -> list[Row]:
    budget = BUDGET // 100 if options.quick else BUDGET
    cases = (
        [case("alike", 1000, 1)] if options.quick else [case(n, ROWS) for n in ("alike", "scaled")]
    )
    tasks = [
        (of, name, versions_of, run)
        for of in cases
        for name, (versions_of, run) in contestants(of, budget, options.quick).items()
    ]
    rows = []
    for i, (of, name, versions_of, run) in options.rotate(tasks):
        pyro.set_rng_seed(options.seed + i)
        start = time.perf_counter()
        draws, looks = run()
        seconds = time.perf_counter() - start
        mean, low, high = of.errors(draws)
        rows.append(
            {
                "case": of.name,
                "contestant": name,
                "round": i,
                "seed": options.seed + i,
                "settings": str(getattr(run, "args", ())[1:] if "pyro_ebm" not in name else ""),
                "versions": versions_of,
                "looks": looks,
                "seconds": seconds,
                "mean": mean,
                "low": low,
                "high": high,
            }
        )
        progress(f"{i + 1}: {of.name}, {name}: mean {mean:.3f}, sd {low:.2f} to {high:.2f}")
    order = [(task[0].name, task[1]) for task in tasks]
    return sorted(rows, key=lambda r: (order.index((r["case"], r["contestant"])), r["round"]))


def tables(rows: list[Row]) -> str:
    header = ["columns", "contestant", "mean", "sd", "million looks", "seconds"]
    lines = []
    for (name, contestant), group in report.grouped(rows, "case", "contestant").items():
        low, high = report.middle(group, "low"), report.middle(group, "high")
        lines.append(
            [
                name,
                contestant,
                report.spread([row["mean"] for row in group], "{:.2f}".format),
                f"{low:.2f} to {high:.2f}",
                report.number(report.middle(group, "looks") / 1e6),
                report.spread([row["seconds"] for row in group]),
            ]
        )
    return report.table(header, lines)


QUESTION = Question(
    name="minibatches",
    title="Langevin on minibatches",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    packages=("blackjax", "jax", "posteriors"),
    rounds=3,
    minutes=15.0,
)

if __name__ == "__main__":
    QUESTION.main()
