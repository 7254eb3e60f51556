"""Question 1: how much does a second of sampling bring, on five posteriors?

python -m tests.benchmarks.posteriors
python -m tests.benchmarks.posteriors --posterior schools --chains 64 --rounds 5
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from tests.benchmarks import report
from tests.benchmarks.harness import Options, Question, Row, progress, versions
from tests.benchmarks.judge import agreement, judge
from tests.benchmarks.models import POSTERIORS
from tests.benchmarks.workers import OverBudget, Worker

PREFACE = """
Effective draws per second on five posteriors. *ESS* is the smallest bulk effective size among the
latent quantities (ArviZ; of a model with many alike, 32 evenly spaced ones), *tail* the smallest
tail size. *Whole* counts everything of a first run, from the model to the draws on their
supports, tracing and compiling included, every compiler starting with an empty cache. *Warm*
counts warmup and draws, without tracing and compiling. Both divide the effective draws of the
sampling phase.

Samplers of a kind (HMC and NUTS; Langevin; random walks) run equally long: *warmup + draws*, of
each chain. Where a dense mass matrix pays (logistic, Gaussian) every sampler that can have one
has it. NumPyro's chains are vectorized, BlackJAX's mapped by `vmap`, its MALA tuned to an
acceptance of 0.574, its ChEES with its pooled diagonal mass matrix; ours are compiled
(`jit_compile=True`). Pyro's chains run one after another, so that its rates hold for any number
of them. All in single precision.

Read *R-hat* first (the largest, rank-normalized, of half chains): where it is well above 1.01 the
chains have not converged, and their ESS means nothing. *z* is the largest difference of a
posterior mean, or second moment, from what the other samplers found together (or, for the
Gaussian, from the exact mean), in standard errors: some 3 or 4 are chance, more than 6 are a
sampler that is wrong or has not converged. *Over budget*: a single run would take more than the
seconds said, or took them and was stopped; runs of more than 12 s are made once. *To the best
peer* is the ratio to the best peer that converged: with R-hat at most 1.02, or, of 1,000 chains,
which are too short for an R-hat near 1, at most 1.1 and z at most 5. `*` marks a ratio of a sampler
that did not converge itself.
"""

SAMPLERS = {  # and their kind; rivals side by side
    "pyro_ebm ChEES": "gradient",
    "NumPyro NUTS": "gradient",
    "BlackJAX NUTS": "gradient",
    "BlackJAX ChEES": "gradient",
    "Pyro NUTS, jit": "Pyro",
    "pyro_ebm Langevin": "langevin",
    "BlackJAX MALA": "langevin",
    "pyro_ebm MH": "walk",
    "Pyro random walk": "walk",
}
CHAINS = (4, 64, 1000)
MANY = 500
LONG = 12.0  # seconds; what takes as long is measured in the first round only
LENGTHS = {  # warmup and draws of a kind, for the number of chains
    "gradient": {4: (500, 1000), 64: (500, 500), 1000: (300, 100)},
    "langevin": {4: (1000, 2000), 64: (1000, 1000), 1000: (1000, 200)},
    "walk": {4: (1000, 2000), 64: (1000, 1000), 1000: (1000, 200)},
    "Pyro": {4: (150, 150)},
}


@dataclass(frozen=True)
class Setting:
    """A sampler on a posterior."""

    posterior: str
    sampler: str
    chains: int
    warmup: int
    draws: int

    @property
    def steps(self) -> int:
        return self.chains * (self.warmup + self.draws)


def settings(posteriors: list[str], chains: list[int], quick: bool) -> Iterator[Setting]:
    """The rows of the tables."""
    for posterior in posteriors:
        for c in chains:
            for sampler, kind in SAMPLERS.items():
                alone = sampler.startswith("Pyro ")  # one chain at a time
                if alone and (c > 4 or posterior not in ("schools", "logistic")):
                    continue
                if kind == "walk" and posterior in ("gaussian", "groups"):
                    continue  # not in this dimension
                lengths = LENGTHS[kind]
                warmup, draws = lengths.get(c) or lengths[min(lengths, key=lambda n: abs(n - c))]
                yield Setting(posterior, sampler, c, *((50, 50) if quick else (warmup, draws)))


class Runner:
    """Measures settings in their workers, and knows which would take too long."""

    def __init__(self, options: Options, budget: float):
        # workers import JAX or our kernels, this process neither
        self.workers = {
            "jax": Worker(_setup_jax, options.threads),
            "torch": Worker(_setup_torch, options.threads),
        }
        self.options, self.budget = options, budget
        self.known: dict[tuple[str, str], tuple[Setting, float]] = {}

    def measure(self, setting: Setting, seed: int) -> Row:
        row: Row = {
            "posterior": setting.posterior,
            "sampler": setting.sampler,
            "chains": setting.chains,
            "warmup": setting.warmup,
            "draws": setting.draws,
            "seed": seed,
            "settings": _described(setting),
            "versions": _versions(setting.sampler),
        }
        key = setting.posterior, setting.sampler
        other, seconds = self.known.get(key, (setting, 0.0))
        if seconds * setting.steps / other.steps / 2 > self.budget:
            return {**row, "over_budget": "expected"}
        kind = "jax" if "JAX" in setting.sampler or "NumPyro" in setting.sampler else "torch"
        arguments = (setting.sampler, setting.posterior, setting.chains, setting.warmup)
        try:  # JAX may run twice, and draws are judged
            found = self.workers[kind].run(
                _measure, kind, *arguments, setting.draws, seed, seconds=2 * self.budget + 30
            )
        except OverBudget:
            self.known[key] = setting, 2 * self.budget
            return {**row, "over_budget": "stopped"}
        self.known[key] = setting, found["warm"]
        if found["whole"] > self.budget:
            return {**row, "over_budget": f"{found['whole']:.0f} s"}
        return {
            **row,
            **found,
            **{
                f"{ess}_per_second_{time}": found[ess] / found[time]
                for ess in ("ess", "tail_ess")
                for time in ("whole", "warm")
            },
        }


def _setup_jax() -> None:
    from tests.benchmarks import jax_samplers

    jax_samplers.setup()


def _setup_torch() -> None:
    from tests.benchmarks import torch_samplers

    torch_samplers.setup()


def _measure(kind: str, *arguments: Any) -> dict[str, Any]:
    """In a worker: runs a sampler, and judges its draws."""
    from importlib import import_module

    module = import_module(f"tests.benchmarks.{kind}_samplers")
    found = module.measure(*arguments)
    samples = found.pop("samples")
    return {**found, **judge(samples)}


def _described(setting: Setting) -> str:
    dense = POSTERIORS[setting.posterior].dense and setting.sampler not in (
        "BlackJAX ChEES",
        "BlackJAX MALA",
        "pyro_ebm MH",
        "Pyro random walk",
    )
    return f"{setting.warmup} + {setting.draws}" + ", dense" * dense


def _versions(sampler: str) -> str:
    packages = {"NumPyro": ("numpyro", "jax"), "BlackJAX": ("blackjax", "numpyro", "jax")}
    library = sampler.split(" ")[0]
    return versions(*packages.get(library, ("pyro-ebm", "pyro-ppl", "torch")))


def measure(
    options: Options,
    posterior: list[str] | None = None,
    chains: list[int] | None = None,
    sampler: list[str] | None = None,
    budget: float = 45.0,
) -> list[Row]:
    few = options.quick and not posterior
    names = posterior or (["schools"] if few else list(POSTERIORS))
    counts = chains or ([4] if options.quick else list(CHAINS))
    todo = [
        s for s in settings(names, counts, options.quick) if not sampler or s.sampler in sampler
    ]
    runner, rows = Runner(options, budget), []
    once: set[Setting] = set()
    for i, setting in options.rotate(todo):
        if setting in once:
            continue
        row = {"round": i, **runner.measure(setting, options.seed + i)}
        rows.append(row)
        if row.get("whole", LONG) >= LONG:
            once.add(setting)
        told = row.get("over_budget") or (
            f"{row['whole']:.1f} s whole, {row['warm']:.2f} s warm, ESS {row['ess']:.0f},"
            f" R-hat {row['r_hat']:.3f}"
        )
        progress(f"{i + 1}: {setting.posterior}, {setting.sampler}, {setting.chains}: {told}")
    for worker in runner.workers.values():
        worker.stop()
    for row in rows:
        row["budget"] = budget
        same = [r for r in rows if r["posterior"] == row["posterior"] and "ess" in r]
        if "ess" in row:
            others = [r for r in same if r["sampler"] != row["sampler"]]
            row["z"] = agreement(row, others, POSTERIORS[row["posterior"]].mean)
    order = [(s.posterior, s.chains, s.sampler) for s in todo]
    return sorted(
        rows, key=lambda r: (order.index((r["posterior"], r["chains"], r["sampler"])), r["round"])
    )


# ---- the report --------------------------------------------------------------------------------


def converged(group: list[Row]) -> bool:
    """By R-hat, which short chains inflate however well they mix: many of them, also by z."""
    r_hat = report.middle(group, "r_hat")
    many = group[0]["chains"] > MANY and report.middle(group, "z") <= 5
    return r_hat <= (1.1 if many else 1.02)


def best_peer(groups: dict[Any, list[Row]], value: str) -> float:
    """The best median among peers that converged, NaN if there is none."""
    rates = [
        report.middle(group, value)
        for (sampler, *_), group in groups.items()
        if not sampler.startswith("pyro_ebm") and converged(group)
    ]
    return max(rates, default=float("nan"))


def tables(rows: list[Row]) -> str:
    # What must be read first stands first: a page shows some five columns without scrolling.
    header = ["sampler", "R-hat", "ESS/s, whole", "to the best peer, whole / warm", "whole, s", "z"]
    header += ["ESS/s, warm", "warm, s", "tail/s, whole", "tail/s, warm", "warmup + draws"]
    parts = []
    for (posterior, chains), same in report.grouped(rows, "posterior", "chains").items():
        groups = report.grouped(same, "sampler")
        lines = []
        for (sampler,), group in groups.items():
            good = [row for row in group if "ess" in row]
            cells = {"sampler": sampler, "warmup + draws": group[0]["settings"]}
            if not good:
                cells["ESS/s, whole"] = f"over budget ({group[0]['budget']:.0f} s)"
                lines.append([cells.get(column, "") for column in header])
                continue
            for when in ("whole", "warm"):
                for column, value in (("ESS", "ess"), ("tail", "tail_ess")):
                    rates = [r[f"{value}_per_second_{when}"] for r in good]
                    cells[f"{column}/s, {when}"] = report.spread(rates)
                cells[f"{when}, s"] = report.spread([r[when] for r in good])
            cells["R-hat"] = f"{max(r['r_hat'] for r in good):.3f}"
            cells["z"] = f"{report.middle(good, 'z'):.1f}"
            ratios = ""
            if sampler.startswith("pyro_ebm"):
                star = "" if converged(good) else "*"
                ratios = " / ".join(
                    report.number(
                        report.middle(good, f"ess_per_second_{when}")
                        / best_peer(groups, f"ess_per_second_{when}")
                    )
                    for when in ("whole", "warm")
                )
                ratios += star
            cells["to the best peer, whole / warm"] = ratios
            lines.append([cells[column] for column in header])
        title = f"### {POSTERIORS[posterior].title}, {chains:,} chains"
        parts.append(f"{title}\n\n{report.table(header, lines)}")
    return "\n\n".join(parts)


def pictures(rows: list[Row], path: Path) -> None:
    posteriors = list(report.grouped(rows, "posterior"))
    good = [row for row in rows if "ess" in row and converged([row])]
    fig, axes = plt.subplots(
        2,
        len(posteriors),
        figsize=(3.6 * len(posteriors) + 1, 7.4),
        layout="constrained",
        squeeze=False,
    )
    for column, (posterior,) in zip(axes.T, posteriors):
        here = [row for row in good if row["posterior"] == posterior]
        for ax, when in zip(column, ("whole", "warm")):
            report.lines(
                ax,
                report.grouped(here, "sampler", "chains"),
                f"ess_per_second_{when}",
                xlabel="chains",
                ylabel=f"min bulk ESS / s, {when}",
                title=POSTERIORS[posterior].title,
            )
    found = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles))
    names = [s for s in SAMPLERS if s in found]
    fig.legend([found[n] for n in names], names, loc="outside lower center", ncol=5, fontsize=9)
    report.save(fig, path.with_suffix(".png"))

    fig, axes = plt.subplots(
        1,
        len(posteriors),
        figsize=(3.8 * len(posteriors) + 1, 4.2),
        layout="constrained",
        squeeze=False,
    )
    for ax, (posterior,) in zip(axes[0], posteriors):
        names, ratios = [], []
        for chains in sorted({row["chains"] for row in rows}):
            here = [r for r in rows if r["posterior"] == posterior and r["chains"] == chains]
            groups = {k: g for k, g in report.grouped(here, "sampler").items() if "ess" in g[0]}
            for when in ("whole", "warm"):
                value = f"ess_per_second_{when}"
                own = [
                    report.middle(g, value)
                    for (s,), g in groups.items()
                    if s.startswith("pyro_ebm") and converged(g)
                ]
                names.append(f"{chains:,} chains, {when}")
                ratios.append(max(own, default=float("nan")) / best_peer(groups, value))
        report.bars(ax, names, ratios, POSTERIORS[posterior].title)
    fig.suptitle("Our best sampler to the best peer, min bulk ESS / s", fontsize=11)
    report.save(fig, path.with_name(f"{path.name}-ratios.png"))


QUESTION = Question(
    name="posteriors",
    title="Posteriors: effective draws per second",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    packages=("numpyro", "blackjax", "jax", "scikit-learn"),
    rounds=3,
    minutes=32.0,
    options={
        "posterior": {"choices": POSTERIORS, "action": "append", "help": "all by default"},
        "chains": {"type": int, "action": "append", "help": "4, 64 and 1000 by default"},
        "sampler": {"choices": tuple(SAMPLERS), "action": "append", "help": "all by default"},
        "budget": {"type": float, "default": 45.0, "help": "seconds of a single run"},
    },
)

if __name__ == "__main__":
    QUESTION.main()
