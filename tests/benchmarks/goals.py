"""What the package sets itself, and what the other questions measured: read from their JSON.

python -m tests.benchmarks.goals
"""

import json
import operator
from collections.abc import Iterator

from tests.benchmarks import report
from tests.benchmarks.harness import Options, Question, Row

PREFACE = """
Ratios that the package wants to reach on two cores, and those of the tables below, from the latest
run of each question: medians of the ratios of each round.
"""

Found = dict[str, list[Row]]


def load(options: Options) -> Found:
    """The rows of each question that has been asked."""
    found = {}
    for name in ("posteriors", "transitions", "energies", "training"):
        path = options.output / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def pick(rows: list[Row], **wanted: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def goals(found: Found) -> Iterator[tuple[str, str, float, float]]:
    """What is measured, how it must compare, the goal, and the ratio."""
    rows = found.get("posteriors", [])
    for posterior in ("schools", "logistic"):
        own = pick(rows, posterior=posterior, sampler="pyro_ebm ChEES")
        peer = pick(rows, posterior=posterior, sampler="NumPyro NUTS")
        for chains, when, goal in (
            (64, "warm", 8),
            (64, "whole", 3),
            (4, "warm", 3),
            (4, "whole", 1),
        ):
            ratio = report.paired(
                pick(own, chains=chains), pick(peer, chains=chains), f"ess_per_second_{when}"
            )
            measure = f"{posterior}, {chains} chains, ESS/s {when}: ChEES to NumPyro NUTS"
            yield measure, ">=", goal, ratio
        pyro = pick(rows, posterior=posterior, sampler="Pyro NUTS, jit")
        for when in ("warm", "whole"):
            ratio = report.paired(pick(own, chains=64), pyro, f"ess_per_second_{when}")
            yield f"{posterior}, 64 chains, ESS/s {when}: ChEES to Pyro NUTS, jit", ">=", 50, ratio
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
