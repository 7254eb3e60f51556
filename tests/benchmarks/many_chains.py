"""A thousand chains of ten draws, beside what the peers take for as many effective draws.

python -m tests.benchmarks.many_chains
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.benchmarks import report
from tests.benchmarks.defaults.contestants import SAMPLERS
from tests.benchmarks.defaults.score import MOST, MOST_Z, score, seconds_to_enough
from tests.benchmarks.harness import Options, Question, Row, progress
from tests.benchmarks.real.posteriors import REAL
from tests.benchmarks.workers import OverBudget, Worker

PREFACE = """
Eight schools, non-centred: the time from the model to 400 effective draws of every parameter
(least of bulk, tail and squared deviations), with tracing and compiling. Ours: 1,000 chains in 10
super-chains, 40 transitions of warmup, 10 draws of each chain. The peers: with the warmup of their
documented defaults, and with our layout where they run chains in one batch. Warmup and compiling
count whole, the time of the draws alone is scaled to 400 effective ones; *z* is the largest error
of a mean, in Monte Carlo errors, from quadrature; R-hat is nested for super-chains, and not told
for short chains without them, where it is large by chance. A time in brackets is not right: z above
4.5, or R-hat above 1.01 (above 1.05 with 4 or 16 chains).
"""

POSTERIOR = "eight_schools"
ENOUGH = 400
SUPERCHAINS = 10
SHORT = (1000, 40, 10)
"""Chains, warmup and draws of many short chains."""
LIMIT = 90.0


@dataclass(frozen=True)
class Setting:
    """A sampler and its lengths."""

    sampler: str
    chains: int
    warmup: int | None
    draws: int

    @property
    def short(self) -> bool:
        return (self.chains, self.warmup, self.draws) == SHORT

    @property
    def superchains(self) -> int | None:
        return SUPERCHAINS if self.short and SAMPLERS[self.sampler].ours else None


def settings() -> list[Setting]:
    """Ours and theirs with default lengths, and all that run chains in a batch with short ones."""
    found = []
    for sampler in SAMPLERS.values():
        if sampler.tuned or sampler.only:
            continue
        if not (sampler.alone or sampler.name.startswith("nutpie")):
            found.append(Setting(sampler.name, *SHORT))
        found += [
            Setting(sampler.name, chains, sampler.warmup, sampler.draws[chains])
            for chains in ((4,) if sampler.alone else (4, 16))
        ]
    return found


def measure(options: Options) -> list[Row]:
    tasks = settings()
    if options.quick:
        tasks = [Setting("pyro_ebm Langevin", *SHORT), Setting("BlackJAX ChEES", *SHORT)]
    workers = {
        "jax": Worker(_setup_jax, options.threads),
        "torch": Worker(_setup_torch, options.threads),
    }
    rows = []
    for i, task in options.rotate(tasks):
        sampler = SAMPLERS[task.sampler]
        row: Row = {
            "contestant": task.sampler,
            "chains": task.chains,
            "lengths": f"{task.chains:,} x {task.draws:,}",
            "warmup": task.warmup,
            "round": i,
            "seed": options.seed + i,
            "versions": sampler.versions,
        }
        arguments = (sampler.side, task, row["seed"])
        try:
            row |= workers[sampler.side].run(_measure, *arguments, seconds=LIMIT)
        except (OverBudget, RuntimeError) as error:
            row["failed"] = str(error)
        rows.append(row)
        progress(f"{i + 1}: {task}: {row.get('seconds', 'failed')}")
    for worker in workers.values():
        worker.stop()
    order = [(task.sampler, task.chains) for task in tasks]
    return sorted(rows, key=lambda r: (order.index((r["contestant"], r["chains"])), r["round"]))


def _setup_jax() -> None:
    from tests.benchmarks import jax_samplers

    jax_samplers.setup()


def _setup_torch() -> None:
    from tests.benchmarks import torch_samplers

    torch_samplers.setup()


def _measure(side: str, task: Setting, seed: int) -> Row:
    """In a worker: runs a sampler, and scores its draws."""
    if side == "torch":
        from tests.benchmarks.defaults.torch_side import measure as run
    else:
        from tests.benchmarks.defaults.jax_side import measure as run

    more = {} if task.superchains is None else {"num_superchains": task.superchains}
    arguments = (task.sampler, POSTERIOR, task.chains, task.warmup, task.draws, seed)
    found, samples = run(*arguments, **more)
    return {**found, **judged(task, found, REAL[POSTERIOR].quantities(samples))}


def judged(task: Setting, found: dict[str, Any], x: np.ndarray) -> Row:
    """The score of draws, shape ``(chains, draws, quantities)``, with the R-hat that suits."""
    from pyro_ebm.diagnostics import nested_r_hat

    scored = score(x, REAL[POSTERIOR].reference)
    if task.superchains is not None:
        r_hat = nested_r_hat(torch.as_tensor(x), task.superchains).max()
        scored["r_hat"] = float(r_hat.nan_to_num(MOST))
        scored["right"] = scored["z"] <= MOST_Z and scored["r_hat"] <= 1.01
    elif task.short:
        scored |= {"r_hat": None, "right": scored["z"] <= MOST_Z}
    seconds = seconds_to_enough(found["before"], found["sampling"], scored["ess"], ENOUGH)
    return {**scored, "seconds": seconds}


def tables(rows: list[Row]) -> str:
    header = ["contestant", "chains x draws", "seconds to 400", "before the first draw"]
    header += ["effective draws", "R-hat", "z"]
    lines = []
    for (name, _), group in report.grouped(rows, "contestant", "chains").items():
        done = [row for row in group if "seconds" in row]
        line = [name, group[0]["lengths"]]
        if 2 * len(done) <= len(group):
            lines.append([*line, "-", "", "", "", ""])
            continue
        seconds = report.spread([row["seconds"] for row in done])
        if 2 * sum(row["right"] for row in done) <= len(group):
            seconds = f"({seconds})"
        r_hats = [row["r_hat"] for row in done if row["r_hat"] is not None]
        line += [seconds, report.number(report.middle(done, "before"))]
        line += [report.number(report.middle(done, "ess"))]
        line += [f"{max(r_hats):.3f}" if r_hats else "", f"{max(row['z'] for row in done):.1f}"]
        lines.append(line)
    return report.table(header, lines)


QUESTION = Question(
    name="many_chains",
    title="Many short chains",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    packages=("numpyro", "blackjax", "nutpie", "jax"),
    rounds=3,
    minutes=15.0,
)

if __name__ == "__main__":
    QUESTION.main()
