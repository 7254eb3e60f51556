"""Question 5: how fast is annealed importance sampling, beside a bare torch loop?

    python -m tests.benchmarks.annealing

The targets:

- ``wells``: sixteen double wells, 32 dimensions, an energy of a few operations; Langevin;
- ``network``: an energy network 2-128-128-1; Langevin;
- ``machine``: a restricted Boltzmann machine of 784 visible and 500 hidden units; Gibbs sweeps.

The bare loops are written for their target alone: they keep energies and gradients from one
temperature to the next by hand, know neither supports, batches nor infinities, and share step size
and temperatures with ours.
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path as FilePath

import matplotlib.pyplot as plt
import pyro
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import RBM
from pyro_ebm.mcmc import Kernel
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.normalizer import estimate_log_normalizer
from pyro_ebm.normalizer.annealing.annealer import Annealer
from pyro_ebm.normalizer.annealing.choices import kernel_of, path_of
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.annealing.pilot import pilot
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule, schedule_of
from tests.benchmarks import report
from tests.benchmarks.harness import Options, Question, Row, progress, seconds_of, versions

PREFACE = """
Annealed importance sampling beside a bare torch loop of the same arithmetic. The bare loops are
written for their target alone and keep energies and gradients by hand; step sizes and
temperatures are the same. First the annealing by itself: chains x temperatures per second, on
sixteen double wells (32-d, Langevin), an energy network 2-128-128-1 (Langevin), and a restricted
Boltzmann machine 784 x 500 (Gibbs). Then error against time, of whole runs: ours with the pilot
that finds the temperatures and step sizes, the bare loop handed what a pilot found, free of
charge; the error is the root mean square over seeds, in nats.
"""

DOUBLE_WELL = 10.29348


def double_well(x: Tensor) -> Tensor:
    x, y = x.unbind(-1)
    return x.square().square() - 6 * x.square() - x / 2 + y.square() / 2


def wells(x: Tensor) -> Tensor:
    return double_well(x.unflatten(-1, (16, 2))).sum(-1)


# ---- the bare loops ----------------------------------------------------------------------------


def bare_langevin(
    energy: Callable[[Tensor], Tensor],
    mean: Tensor,
    scale: Tensor,
    num: int,
    betas: list[float],
    steps: list[Tensor],
    factors: list[Tensor],
) -> Tensor:
    """Log weights of the path from a Gaussian to an energy on the reals."""

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            u = energy(z)
            (g,) = torch.autograd.grad(u.sum(), z)
        return u.detach(), g

    constant = scale.log().sum() + mean.numel() / 2 * math.log(2 * math.pi)
    z = mean + scale * torch.randn(num, mean.numel())
    log_w = torch.zeros(num)
    (u1, g1), units = value_and_grad(z), (z - mean) / scale
    u0, g0 = units.square().sum(-1) / 2 + constant, units / scale
    for t, (a, b) in enumerate(pairwise(betas), 1):
        log_w += (b - a) * (u0 - u1)
        if b == 1:
            break
        step, factor = steps[t], factors[t]
        noise, log_u = torch.randn_like(z), torch.rand(num).log()
        g = torch.lerp(g0, g1, b)
        new = z - step * factor.square() * g + (2 * step).sqrt() * factor * noise
        (v1, h1), units = value_and_grad(new), (new - mean) / scale
        v0, h0 = units.square().sum(-1) / 2 + constant, units / scale
        h = torch.lerp(h0, h1, b)
        back = (step / 2).sqrt() * factor * (g + h) - noise
        log_ratio = torch.lerp(u0 - v0, u1 - v1, b)
        log_ratio += (noise.square() - back.square()).sum(-1) / 2
        ok = log_u < log_ratio
        row = ok[:, None]
        z, u0, u1 = torch.where(row, new, z), torch.where(ok, v0, u0), torch.where(ok, v1, u1)
        g0, g1 = torch.where(row, h0, g0), torch.where(row, h1, g1)
    return log_w


def bare_gibbs(p: RBM, logits: Tensor, num: int, betas: list[float]) -> Tensor:
    """Log weights of the path from independent visible units to a machine."""
    w, b, c = p.weights, p.visible_bias, p.hidden_bias
    x = (torch.rand(num, len(b)) < logits.sigmoid()).to(w.dtype)
    constant = softplus(logits).sum()

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ logits - constant, x @ b, x @ w + c

    def minus_energy(start: Tensor, visible: Tensor, hidden: Tensor, beta: float) -> Tensor:
        return torch.lerp(start, visible, beta) + softplus(beta * hidden).sum(-1)

    start, visible, hidden = parts(x)
    log_w, now = torch.zeros(num), minus_energy(start, visible, hidden, 0.0)
    for beta in betas[1:]:
        log_w += minus_energy(start, visible, hidden, beta) - now
        if beta == 1:
            break
        z = (torch.rand_like(hidden) < (beta * hidden).sigmoid()).to(w.dtype)
        field = torch.lerp(logits, z @ w.T + b, beta)
        x = (torch.rand_like(x) < field.sigmoid()).to(w.dtype)
        start, visible, hidden = parts(x)
        now = minus_energy(start, visible, hidden, beta)
    return log_w + len(c) * math.log(2.0)


# ---- the targets -------------------------------------------------------------------------------


class Target:
    """An energy with what a pilot found, for ours and for the bare loop."""

    def __init__(self, p: UnnormalizedEnergy, chains: int, num_temperatures: int | None):
        self.p, self.chains = p, chains
        self.path: AnnealingPath = path_of(p)
        self.kernel: Kernel = kernel_of(None, p, self.path)
        self.kernel.bind(self.path, 0)
        points = pilot(self.path, self.kernel, disable_progbar=True)
        self.schedule = TemperatureSchedule(points, schedule_of(points, num_temperatures))
        self.annealer = Annealer(self.path, self.kernel, self.schedule)

    def ours(self) -> Tensor:
        z = self.path.at(0.0).draw(self.chains)
        return self.annealer.run(z)

    @torch.no_grad()
    def bare(self) -> Tensor:
        betas = self.schedule.betas
        if isinstance(self.p, RBM):
            return bare_gibbs(self.p, self.path.loc, self.chains, betas)
        steps, factors = [], []
        for beta in betas:
            self.schedule.set(self.kernel, beta)
            steps.append(self.kernel.adaptation.step_size[0])
            factors.append(self.kernel.adaptation.factor[0])
        start = self.path.start
        return bare_langevin(
            self.p._energy, start.mean[0], start.factor[0], self.chains, betas, steps, factors
        )


def targets(chains: int, num_temperatures: int) -> dict[str, Target]:
    net = MLPEnergy(2, hidden=(128, 128)).requires_grad_(False)
    bowl = UnnormalizedEnergy(lambda x: net(x) + x.square().sum(-1) / 2, event_shape=(2,))
    machine = RBM(0.05 * torch.randn(784, 500), torch.zeros(784), torch.zeros(500))
    return {
        "wells": Target(UnnormalizedEnergy(wells, event_shape=(32,)), chains, num_temperatures),
        "network": Target(bowl, chains, num_temperatures),
        "machine": Target(machine, max(chains // 10, 2), max(num_temperatures // 5, 3)),
    }


# ---- the question ------------------------------------------------------------------------------


def measure(
    options: Options, chains: int = 1000, num_temperatures: int = 101, seeds: int = 10
) -> list[Row]:
    if options.quick:
        chains, num_temperatures, seeds = 20, 11, 2
    pyro.set_rng_seed(options.seed)
    tasks = []
    for name, target in targets(chains, num_temperatures).items():
        for contestant, run in (("pyro_ebm", target.ours), ("bare loop", target.bare)):
            run()
            tasks.append((name, contestant, target, run))
        progress(f"ready: {name}")
    rows = []
    for i, (name, contestant, target, run) in options.rotate(tasks):
        count = target.chains * (len(target.schedule.betas) - 1)
        seconds = seconds_of(run)
        rows.append(
            {
                "question": "speed",
                "case": name,
                "contestant": contestant,
                "chains": target.chains,
                "round": i,
                "seed": options.seed,
                "settings": f"{len(target.schedule.betas)} temperatures",
                "versions": versions("pyro-ebm", "torch"),
                "seconds": seconds,
                "per_second": count / seconds,
            }
        )
    order = [task[:2] for task in tasks]
    rows.sort(key=lambda r: order.index((r["case"], r["contestant"])))
    return rows + errors(options.seed, chains, [10] if options.quick else [10, 30, 100], seeds)


def errors(first_seed: int, chains: int, counts: list[int], seeds: int) -> list[Row]:
    """Whole runs: one row for each seed."""
    generator = torch.Generator().manual_seed(0)
    machine = RBM(torch.randn(64, 16, generator=generator), torch.zeros(64), torch.zeros(16))
    well = UnnormalizedEnergy(double_well, event_shape=(2,))
    rows = []
    for name, (p, log_z) in {
        "double well": (well, DOUBLE_WELL),
        "RBM 64 x 16": (machine, None),
    }.items():
        truth = float(machine.exact_log_normalizer()) if log_z is None else log_z
        for num in counts:
            target = Target(p, chains, num)
            for seed in range(first_seed, first_seed + seeds):
                pyro.set_rng_seed(seed)
                start = time.perf_counter()
                found = estimate_log_normalizer(
                    p, "ais", num_chains=chains, num_temperatures=num, disable_progbar=True
                )
                ours, after = time.perf_counter() - start, time.perf_counter()
                log_w = target.bare()
                bare = time.perf_counter() - after
                value = float(log_w.logsumexp(0)) - math.log(chains)
                for contestant, seconds, estimate in (
                    ("pyro_ebm", ours, float(found)),
                    ("bare loop", bare, value),
                ):
                    rows.append(
                        {
                            "question": "error",
                            "case": name,
                            "contestant": contestant,
                            "chains": chains,
                            "round": seed - first_seed,
                            "seed": seed,
                            "settings": f"{num} temperatures",
                            "versions": versions("pyro-ebm", "torch"),
                            "seconds": seconds,
                            "error": estimate - truth,
                        }
                    )
    return rows


def root_mean_square(group: list[Row]) -> float:
    return math.sqrt(sum(row["error"] ** 2 for row in group) / len(group))


def tables(rows: list[Row]) -> str:
    header = ["target", "chains", "contestant", "time of one annealing", "chains x temperatures/s"]
    header += ["to the bare loop"]
    lines = []
    speed = [row for row in rows if row["question"] == "speed"]
    for (case,), same in report.grouped(speed, "case").items():
        groups = report.grouped(same, "contestant")
        for (name,), group in groups.items():
            lines.append(
                [
                    case,
                    f"{group[0]['chains']:,}",
                    name,
                    report.spread([r["seconds"] for r in group], report.duration),
                    report.spread([r["per_second"] for r in group]),
                    report.number(report.paired(group, groups[("bare loop",)], "per_second")),
                ]
            )
    first = report.table(header, lines)
    header = ["log Z of", "temperatures", "contestant", "error, nats", "time of a whole run"]
    lines = []
    found = report.grouped(
        [row for row in rows if row["question"] == "error"], "case", "settings", "contestant"
    )
    for (case, settings, name), group in found.items():
        seconds = [row["seconds"] for row in group]
        error = report.number(root_mean_square(group))
        number = settings.removesuffix(" temperatures")
        lines.append([case, number, name, error, report.spread(seconds, report.duration)])
    return f"{first}\n\n{report.table(header, lines)}"


def pictures(rows: list[Row], path: FilePath) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    speed = report.grouped(
        [row for row in rows if row["question"] == "speed"], "case", "contestant"
    )
    cases = list(dict.fromkeys(case for case, _ in speed))
    ratios = [
        report.paired(speed[case, "pyro_ebm"], speed[case, "bare loop"], "per_second")
        for case in cases
    ]
    report.bars(axes[0], cases, ratios, "annealing: ours to the bare loop")
    groups = report.grouped(
        [row for row in rows if row["question"] == "error"], "case", "contestant", "settings"
    )
    for ax, case in zip(axes[1:], dict.fromkeys(case for case, *_ in groups)):
        for contestant in ("pyro_ebm", "bare loop"):
            runs = [g for (c, name, _), g in groups.items() if (c, name) == (case, contestant)]
            x = [report.middle(group, "seconds") for group in runs]
            y = [root_mean_square(group) for group in runs]
            ax.plot(x, y, "o-", color=report.colour(contestant), label=contestant)
        ax.set(xscale="log", yscale="log", xlabel="seconds of a run", ylabel="error of log Z, nats")
        ax.set_title(case, fontsize=10)
        ax.grid(alpha=0.25, which="both")
        ax.legend(fontsize=8)
    report.save(fig, path.with_suffix(".png"))


QUESTION = Question(
    name="annealing",
    title="Annealed importance sampling",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    rounds=7,
    minutes=1.5,
    options={
        "chains": {"type": int, "default": 1000},
        "num_temperatures": {"type": int, "default": 101},
        "seeds": {"type": int, "default": 10},
    },
)

if __name__ == "__main__":
    QUESTION.main()
