"""Rows of a measurement as Markdown tables and as pictures."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]

COLOURS = {
    "pyro_ebm": "#c0392b",
    "Pyro": "#e59866",
    "NumPyro": "#2471a3",
    "BlackJAX": "#1e8449",
    "nutpie": "#6c3483",
    "TorchEBM": "#7d3c98",
    "scikit-learn": "#b7950b",
    "bare": "#707b7c",
}
MARKERS = "osD^vP*X"


def number(x: float) -> str:
    """Three significant digits.

    >>> number(0.12345), number(12.345), number(12345.6), number(float("nan"))
    ('0.123', '12.3', '12,300', '-')
    """
    if not math.isfinite(x):
        return "-"
    if abs(x) >= 100:
        digits = len(str(int(abs(x)))) - 3
        return f"{round(x, -digits):,.0f}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """A time with its unit.

    >>> duration(3.2e-5), duration(0.0123), duration(4.5)
    ('32 us', '12.3 ms', '4.5 s')
    """
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds)} s"


def spread(values: Sequence[float], form: Callable[[float], str] = number) -> str:
    """The median, and the range over the rounds.

    >>> spread([1.0, 4.0, 2.0])
    '2 (1..4)'
    """
    middle = form(median(values))
    low, high = form(min(values)), form(max(values))
    return middle if low == high else f"{middle} ({low}..{high})"


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rounds of whatever has the same keys, in the order in which they first came."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def middle(group: Sequence[Row], key: str) -> float:
    """The median of a number over the rounds, NaN where there is none."""
    values = [row[key] for row in group if row.get(key) is not None]
    return median(values) if values else math.nan


def paired(own: Sequence[Row], other: Sequence[Row], key: str) -> float:
    """The median, over the rounds that both were in, of the ratio of their numbers.

    Those of one round were measured at nearly the same time: what slows the machine for a while
    slows both.
    """
    theirs = {row["round"]: row[key] for row in other if row.get(key)}
    ratios = [
        row[key] / theirs[row["round"]]
        for row in own
        if row.get(key) is not None and row["round"] in theirs
    ]
    return median(ratios) if ratios else math.nan


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal; numbers to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]
    right = [
        all(not line[i] or line[i][0].isdigit() or line[i][0] in "-+" for line in lines)
        for i in range(len(header))
    ]

    def padded(line: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)]
        return "| " + " | ".join(parts) + " |"

    rule = "| " + " | ".join("-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right))
    return "\n".join([padded(cells[0]), rule + " |", *(padded(line) for line in cells[1:])])


def colour(contestant: str) -> str:
    """One for each library."""
    return next((c for name, c in COLOURS.items() if contestant.startswith(name)), "black")


def lines(
    ax: Any,
    groups: dict[tuple[str, Any], list[Row]],
    value: str,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Medians, with the range over the rounds, against the second key of each group; log-log."""
    contestants = list(dict.fromkeys(name for name, _ in groups))
    seen: dict[str, int] = {}
    ticks = set()
    for name in contestants:
        ours = name.startswith("pyro_ebm")
        points = []
        for (contestant, x), group in groups.items():
            values = [row[value] for row in group if row.get(value)]
            if contestant == name and values:
                points.append((x, median(values), min(values), max(values)))
        if not points:
            continue
        x, y, low, high = (list(column) for column in zip(*sorted(points)))
        ticks.update(x)
        shade = colour(name)
        mark = MARKERS[seen.setdefault(shade, 0) % len(MARKERS)]
        style = ("-", "--", ":", "-.")[seen[shade] % 4]
        seen[shade] += 1
        ax.errorbar(
            x,
            y,
            [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]],
            fmt=mark + style,
            color=shade,
            lw=2 if ours else 1.3,
            ms=5,
            capsize=2,
            label=name.replace("bare gradient", "gradient"),
        )
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    if ticks:
        ax.set_xticks(sorted(ticks), [f"{x:,}" for x in sorted(ticks)])
    ax.xaxis.minorticks_off()
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.25)


def bars(ax: Any, names: Sequence[str], ratios: Sequence[float], title: str) -> None:
    """Ratios to the best peer, on a log scale around 1."""
    shown = [(n, math.log2(r)) for n, r in zip(names, ratios) if math.isfinite(r) and r > 0]
    places = range(len(shown))[::-1]
    logs = [x for _, x in shown]
    low, high = min([0.0, *logs]), max([0.0, *logs])
    span = max(high - low, 1.0)
    ax.barh(places, logs, color=["#c0392b" if x >= 0 else "#d98880" for x in logs], height=0.6)
    for place, x in zip(places, logs):
        side, gap = ("left", 0.02) if x >= 0 else ("right", -0.02)
        ax.text(x + gap * span, place, f"{number(2**x)}x", va="center", ha=side, fontsize=8)
    left = 0.3 if low < 0 else 0.06
    right = 0.3 if high > 0 else 0.06
    ax.set_xlim(low - left * span, high + right * span)
    step = 0.5 if span <= 1.5 else max(1, math.ceil(span / 4))
    first, last = (end / step for end in ax.get_xlim())
    ticks = [t * step for t in range(math.ceil(first), math.floor(last) + 1)]
    labels = [f"1/{2**-t:.0f}" if t <= -2 else f"{2**t:.2g}" for t in ticks]
    ax.set_xticks(ticks, labels)
    ax.set_yticks(list(places), [n for n, _ in shown])
    ax.axvline(0, color="black", lw=0.8)
    ax.set_title(title, fontsize=10)
    ax.grid(axis="x", alpha=0.25)


def save(fig: Any, path: Path) -> None:
    """Writes a picture, and closes it."""
    fig.savefig(path, dpi=110)
    plt.close(fig)
