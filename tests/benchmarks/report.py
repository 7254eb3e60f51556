"""Rows of a measurement as a table, as JSON, as a picture."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch

OTHERS = "<!-- by other commands -->"
"""Where the part of a page begins that is not rewritten with the posteriors."""

PACKAGES = ("pyro-ebm", "pyro-ppl", "torch", "arviz", "numpy")

COLUMNS = {
    "chains": lambda g: str(g[0]["chains"]),
    "warmup + draws": lambda g: f"{g[0]['warmup']} + {g[0]['draws']}",
    "whole, s": lambda g: spread(g, "whole"),
    "warm, s": lambda g: spread(g, "warm"),
    "transitions/s": lambda g: spread(g, "transitions_per_second"),
    "ESS/s, whole": lambda g: spread(g, "ess_per_second_whole"),
    "ESS/s, warm": lambda g: spread(g, "ess_per_second_warm"),
    "min ESS": lambda g: number(median(r["ess"] for r in g)),
    "max R-hat": lambda g: f"{max(r['r_hat'] for r in g):.3f}",
}


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads,
        "device": "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def number(x: float) -> str:
    """Three significant digits.

    >>> number(0.12345), number(12.345), number(12345.6)
    ('0.123', '12.3', '12,300')
    """
    if abs(x) >= 100:
        digits = len(str(int(abs(x)))) - 3
        return f"{round(x, -digits):,.0f}"
    return f"{x:.3g}"


def spread(group: list[dict[str, Any]], key: str) -> str:
    """Median, and the range over the rounds."""
    values = [row[key] for row in group]
    middle = number(median(values))
    return (
        middle if len(values) == 1 else f"{middle} ({number(min(values))}..{number(max(values))})"
    )


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The rounds of each sampler and number of chains, in the order of the rows."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sampler"], row["chains"]), []).append(row)
    return groups


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    lines = [["sampler", *COLUMNS]]
    for group in grouped(rows).values():
        name = group[0]["sampler"]
        if group[0]["arguments"]:
            name += f", {group[0]['arguments']}"
        lines.append([name, *(column(group) for column in COLUMNS.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def picture(results: dict[str, list[dict[str, Any]]], titles: dict[str, str], path: Path) -> None:
    """ESS per second against chains: medians, with the range over the rounds."""
    fig, axes = plt.subplots(
        2, len(results), figsize=(5.2 * len(results), 7.5), layout="constrained", squeeze=False
    )
    for column, (name, rows) in enumerate(results.items()):
        samplers = list(dict.fromkeys(row["sampler"] for row in rows))
        for ax, what in zip(axes[:, column], ("whole", "warm")):
            for i, sampler in enumerate(samplers):
                groups = [g for (s, _), g in grouped(rows).items() if s == sampler]
                values = [[row[f"ess_per_second_{what}"] for row in g] for g in groups]
                middle = [median(v) for v in values]
                ax.errorbar(
                    [g[0]["chains"] for g in groups],
                    middle,
                    [
                        [m - min(v) for m, v in zip(middle, values)],
                        [max(v) - m for m, v in zip(middle, values)],
                    ],
                    fmt="o--" if "Kernel" not in sampler or sampler.startswith("Random") else "o-",
                    color=f"C{i}",
                    capsize=3,
                    label=sampler,
                )
            ax.set(xscale="log", yscale="log", xlabel="chains", ylabel=f"min bulk ESS / s, {what}")
            ax.set_xticks([1, 4, 64], ["1", "4", "64"])
            ax.minorticks_off()
            ax.set_title(titles[name], fontsize=10)
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def markdown(
    results: dict[str, list[dict[str, Any]]],
    titles: dict[str, str],
    about: dict[str, Any],
    command: str,
    preface: str,
) -> str:
    """A page of the documentation."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        "# Benchmarks",
        preface.strip(),
        f"Measured in {about['date'][:7]} on {about['cores']} cores, CPU only, torch threads:"
        f" {about['threads']}, rounds: {about['rounds']}, seeds from {about['seed']} on;"
        f" Python {about['python']},\n{versions}.\nThis page is written by",
        f"```sh\n{command}\n```",
    ]
    for name, rows in results.items():
        parts += [f"## {titles[name]}", table(rows)]
    return "\n\n".join(parts) + "\n"
