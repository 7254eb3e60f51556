"""What the package sets itself, and what the other questions measured: read from their JSON.

python -m tests.benchmarks.goals
"""

import json
import math
import operator
from collections.abc import Iterator
from statistics import median

from tests.benchmarks import report
from tests.benchmarks.defaults.tables import ratio, right, warmup_gradients
from tests.benchmarks.harness import Options, Question, Row
from tests.benchmarks.real.posteriors import REAL

PREFACE = """
Ratios that the package wants to reach on two cores, and those of the tables below, from the latest
run of each question: medians of the ratios of each round.
"""

Found = dict[str, list[Row]]


def load(options: Options) -> Found:
    """The rows of each question that has been asked."""
    found = {}
    for name in ("defaults", "posteriors", "transitions", "energies", "training"):
        path = options.output / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def pick(rows: list[Row], **wanted: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def goals(found: Found) -> Iterator[tuple[str, str, float, float]]:
    """What is measured, how it must compare, the goal, and the ratio."""
    yield from of_defaults(found.get("defaults", []))
    rows = found.get("posteriors", [])
    for posterior in ("schools", "logistic"):
        own = pick(rows, posterior=posterior, sampler="pyro_ebm ChEES", chains=64)
        pyro = pick(rows, posterior=posterior, sampler="Pyro NUTS, jit")
        for when in ("warm", "whole"):
            ratio = report.paired(own, pyro, f"ess_per_second_{when}")
            yield f"{posterior}, 64 chains, ESS/s {when}: ChEES to Pyro NUTS, jit", ">=", 50, ratio
    own, peer = (
        pick(rows, posterior="schools", sampler=f"{name} ChEES", chains=64)
        for name in ("pyro_ebm", "BlackJAX")
    )
    ratio = report.paired(own, peer, "ess_per_second_warm")
    yield "schools, 64 chains, ESS/s warm: ChEES to BlackJAX ChEES", ">=", 0.5, ratio
    rows = found.get("transitions", [])
    for case in ("schools", "logistic"):
        for chains, goal in ((1, 0.25), (100, 1.2), (1000, 1.5)):
            here = pick(rows, case=case, chains=chains)
            own = pick(here, contestant="pyro_ebm, compiled")
            ratio = report.paired(own, pick(here, contestant="BlackJAX"), "per_second")
            yield f"MALA transitions/s, {case}, {chains:,} at once, to BlackJAX", ">=", goal, ratio
    for question, cases in (
        ("transitions", ("schools", "logistic")),
        ("energies", ("mlp", "conv")),
    ):
        for case in cases:
            for chains in (100, 1000):
                here = pick(found.get(question, []), case=case, chains=chains)
                own = pick(here, contestant="pyro_ebm, compiled")
                bare = pick(here, contestant="bare gradient alone")
                what = f"compiled step over its gradient alone, {case}, {chains:,} chains"
                yield what, "<=", 1.3, report.paired(own, bare, "seconds")
    for chains in (1, 100, 1000):
        here = pick(found.get("energies", []), case="mlp", chains=chains)
        own, peer = (pick(here, contestant=c) for c in ("pyro_ebm, compiled", "TorchEBM"))
        ratio = report.paired(own, peer, "per_second")
        yield f"unadjusted Langevin on an MLP, {chains:,} at once, to TorchEBM", ">=", 2, ratio
    rows = found.get("training", [])
    steps = pick(rows, case="CD-10 on an MLP")
    peer = pick(steps, contestant="TorchEBM")
    for name in dict.fromkeys(row["contestant"] for row in steps):
        if name.startswith("pyro_ebm"):
            ratio = report.paired(pick(steps, contestant=name), peer, "per_second")
            yield f"CD steps/s, {name.removeprefix('pyro_ebm, ')}, to TorchEBM", ">=", 1.5, ratio
    fits = pick(rows, question="machine")
    for target in dict.fromkeys(row["target"] for row in fits):
        own, peer = (
            pick(fits, target=target, contestant=name)
            for name in ("pyro_ebm fit_rbm", "scikit-learn")
        )
        ratio = report.paired(own, peer, "seconds")
        yield f"time to {target} nats of an RBM, to scikit-learn", "<=", 0.5, ratio


def of_defaults(rows: list[Row]) -> Iterator[tuple[str, str, float, float]]:
    """Goals on the real posteriors, with default settings."""
    few = [row for row in rows if REAL[row["posterior"]].dim <= 50]
    for sampler in ("Langevin", "ChEES"):
        groups = report.grouped(pick(few, sampler=f"pyro_ebm {sampler}"), "posterior", "chains")
        share = sum(map(right, groups.values())) / len(groups) if groups else math.nan
        yield f"share of posteriors right by default, at most 50-d, {sampler}", ">=", 1, share
    for chains, most in ((16, 0.5), (64, 0.5), (4, 1.0)):
        cases = report.grouped(pick(rows, chains=chains), "posterior").values()
        ratios = [value for value, fine in (ratio(same, False) for same in cases) if fine]
        count = sum(value <= most for value in ratios) if cases else math.nan
        what = f"{chains} chains: posteriors on which our default takes at most"
        yield f"{what} {most:g} of the best peer's time to 1,000 draws", ">=", 12, count
    gradients = [own / peer for _, own, peer in warmup_gradients(rows)]
    middle = median(gradients) if gradients else math.nan
    yield "gradients in warmup, one of 16 chains to one of nutpie, low rank", "<=", 0.5, middle
    own, peer = (
        [
            {**row, "step": row["sampling"] / row["draw_gradients"]}
            for row in pick(rows, posterior="hierarchy", chains=64, sampler=f"pyro_ebm {name}")
            if "sampling" in row
        ]
        for name in ("ChEES", "ChEES, diagonal")
    )
    step = report.paired(own, peer, "step")
    yield "hierarchy, 64 chains, a default step of ChEES to one with a diagonal", "<=", 1.2, step


def measure(options: Options) -> list[Row]:
    compare = {">=": operator.ge, "<=": operator.le}
    return [
        {
            "measure": what,
            "sign": sign,
            "goal": goal,
            "ratio": ratio,
            "met": compare[sign](ratio, goal),
        }
        for what, sign, goal, ratio in goals(load(options))
        if ratio == ratio
    ]


def tables(rows: list[Row]) -> str:
    header = ["measure", "goal", "measured", "met"]
    lines = [
        [
            row["measure"],
            f"{'at least' if row['sign'] == '>=' else 'at most'} {row['goal']:g}",
            report.number(row["ratio"]),
            "yes" if row["met"] else "no",
        ]
        for row in rows
    ]
    return report.table(header, lines) if lines else "Nothing has been measured yet."


QUESTION = Question(name="goals", title="Goals", preface=PREFACE, measure=measure, tables=tables)

if __name__ == "__main__":
    QUESTION.main()
