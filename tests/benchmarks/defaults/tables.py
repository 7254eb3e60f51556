"""Runs on the real posteriors as tables and a picture."""

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

from tests.benchmarks import report
from tests.benchmarks.defaults.contestants import SAMPLERS
from tests.benchmarks.harness import Row
from tests.benchmarks.real.posteriors import REAL

PREFACE = """
Thirteen posteriors of posteriordb (BSD 3-clause; `tests/data/posteriors` cites it) with published
answers, and three more: stochastic volatility, whose answers are those of a long run, and a
hierarchy of 1,000 dimensions and eight schools, whose answers are known by quadrature. Every
sampler with its documented defaults, and some with settings that suit (*tuned*, *dense*,
*diagonal*).

The figure is the time in seconds from the model to 1,000 effective draws of every published
quantity, with tracing and compiling, every compiler starting with an empty cache. The effective
size is the least of bulk, tail, and that of the squared deviations. Draws are made for a fixed
number of transitions, and their time alone is scaled to 1,000; warmup and compiling count whole.

A figure in brackets is not right: a mean is more than 4.5 Monte Carlo errors (of the published
answer and of the run) off the published one, or R-hat is above 1.05. `-` was stopped after a minute
and a half, or failed. The last two columns compare ours, by default and at their best, with the
best peer that is right: below 1, ours is faster; `*` where ours is not right.

Peers: Pyro's NUTS with `jit_compile=True`, chains one after another (four are measured, and more
are reckoned from them); NumPyro's NUTS, chains vectorized, 500 transitions of warmup as in its
introduction; BlackJAX's NUTS after `window_adaptation_low_rank` (going on from the last state of
warmup: the one that it returns lies far out) and its ChEES, 1,000 transitions of warmup; nutpie on
the same JAX density, one jitted call for each gradient, its chains in threads. Gaussian process:
double precision for all, since its covariance is singular in single.
"""


def tables(rows: list[Row]) -> str:
    """One for each number of chains, then gradients of warmup."""
    parts = [_figures(same, chains) for (chains,), same in report.grouped(rows, "chains").items()]
    gradients = list(warmup_gradients(rows))
    if gradients:
        header = ["gradients in warmup", "pyro_ebm ChEES, one of 16", "nutpie, low rank", "ratio"]
        lines = [
            [name, report.number(own), report.number(peer), report.number(own / peer)]
            for name, own, peer in gradients
        ]
        parts.append(report.table(header, lines))
    return "\n\n".join(parts)


def _figures(rows: list[Row], chains: int) -> str:
    names = [s for s in SAMPLERS if any(row["sampler"] == s for row in rows)]
    lines = []
    for (posterior,), same in report.grouped(rows, "posterior").items():
        groups = {s: g for (s,), g in report.grouped(same, "sampler").items()}
        line = [posterior, str(REAL[posterior].dim)]
        line += [figure(groups.get(name, [])) for name in names]
        for tuned in (False, True):
            value, fine = ratio(same, tuned)
            line.append("" if math.isnan(value) else report.number(value) + "*" * (not fine))
        lines.append(line)
    header = ["posterior", "dim", *names, "default to best peer", "best to best peer"]
    return f"### {chains} chains\n\n{report.table(header, lines)}"


def right(group: list[Row]) -> bool:
    """Whether most rounds were."""
    return 2 * sum(bool(row.get("right")) for row in group) > len(group)


def seconds(group: list[Row]) -> float:
    """The median time to 1,000 effective draws, NaN if most rounds did not finish."""
    found = [row["seconds"] for row in group if "seconds" in row]
    found += [math.inf] * (len(group) - len(found))
    middle = sorted(found)[len(found) // 2] if found else math.inf
    return middle if math.isfinite(middle) else math.nan


def figure(group: list[Row]) -> str:
    """A cell of the table."""
    if not group:
        return ""
    value = seconds(group)
    if math.isnan(value):
        return "-"
    return report.number(value) if right(group) else f"({report.number(value)})"


def ratio(rows: list[Row], tuned: bool) -> tuple[float, bool]:
    """Our best time to that of the best peer that is right; and whether ours is right.

    Args:
        rows: of a posterior and a number of chains.
        tuned: whether ours may have other settings than their defaults.
    """
    groups = {s: g for (s,), g in report.grouped(rows, "sampler").items()}
    times = {s: seconds(g) for s, g in groups.items()}
    ours = {s: t for s, t in times.items() if SAMPLERS[s].ours and not math.isnan(t)}
    if not tuned:
        ours = {s: t for s, t in ours.items() if not SAMPLERS[s].tuned}
    peers = [
        t
        for s, t in times.items()
        if not SAMPLERS[s].ours and right(groups[s]) and not math.isnan(t)
    ]
    good = {s: t for s, t in ours.items() if right(groups[s])}
    own = min((good or ours).values(), default=math.nan)
    return own / min(peers, default=math.nan), bool(good)


def warmup_gradients(rows: list[Row]) -> Iterator[tuple[str, float, float]]:
    """Of one of 16 chains of our ChEES, and of a chain of nutpie, by default."""
    for (posterior,), same in report.grouped(rows, "posterior").items():
        found = []
        for sampler, chains in (("pyro_ebm ChEES", (16,)), ("nutpie, low rank", (16, 4, 64))):
            counts = [
                [r for r in same if r["sampler"] == sampler and r["chains"] == n] for n in chains
            ]
            found.append(
                next(
                    (x for g in counts if (x := report.middle(g, "warmup_gradients")) > 0), math.nan
                )
            )
        if not any(map(math.isnan, found)):
            yield posterior, *found


def family(sampler: str) -> str:
    """The library of a sampler."""
    return sampler.replace(",", "").split(" ")[0]


def spans_little(ax: plt.Axes) -> bool:
    """Whether the figures of one power of ten are all there is on the axis."""
    low, high = ax.get_xlim()
    return high < 10 * low


def pictures(rows: list[Row], path: Path) -> None:
    """The time of every contestant that is right; one panel for each number of chains."""
    panels = report.grouped(rows, "chains")
    names = list(dict.fromkeys(row["posterior"] for row in rows))
    fig, axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(4.2 * len(panels) + 1.6, 8.5), 0.34 * len(names) + 2.4),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    handles = {}
    for ax, ((chains,), same) in zip(axes[0], panels.items()):
        for sampler in SAMPLERS.values():
            points = []
            for i, name in enumerate(names):
                group = [r for r in same if r["posterior"] == name and r["sampler"] == sampler.name]
                if right(group) and not math.isnan(value := seconds(group)):
                    points.append((value, len(names) - 1 - i))
            if points:
                kin = [s for s in SAMPLERS if family(s) == family(sampler.name)]
                handles[sampler.name] = ax.scatter(
                    *zip(*points),
                    marker=report.MARKERS[kin.index(sampler.name)],
                    s=52 if sampler.ours else 30,
                    edgecolors=(shade := report.colour(sampler.name)),
                    facecolors="none" if sampler.tuned else shade,
                    alpha=0.85,
                    zorder=3 if sampler.ours else 2,
                )
        ax.set(xscale="log", xlabel="seconds", title=f"{chains} chains")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}" if spans_little(ax) else "")
        ax.set_yticks(range(len(names)), names[::-1])
        ax.grid(alpha=0.25)
    labels = [s for s in SAMPLERS if s in handles]
    fig.legend([handles[s] for s in labels], labels, loc="outside lower center", ncol=4, fontsize=8)
    fig.suptitle("From the model to 1,000 effective draws; only what is right", fontsize=11)
    report.save(fig, path.with_suffix(".png"))
