"""What the questions share: options, turns, rows, and where the answers are written.

A question measures *rows*. A row is one measurement of one contestant in one round: a dictionary
that names the case, the contestant, its settings, seed and versions, and the numbers. The same
contestant has a row in each round, and a table shows the median with the range.

Contestants take turns: each round runs them all, in an order turned by one, so that a slow minute
of the machine hits nobody alone.

An answer is printed, written as JSON and as pictures to a folder, and, with ``--markdown``, to
that question's own section of a page: what stands between the marks of its name.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

Row = dict[str, Any]
T = TypeVar("T")

OURS = ("pyro-ebm", "pyro-ppl", "torch")


@dataclass(frozen=True)
class Options:
    """How a question is asked."""

    rounds: int = 3
    minutes: float = 5.0
    """After which no further round is begun; the first is always finished."""
    seed: int = 0
    threads: int = field(default_factory=torch.get_num_threads)
    """Of torch: as many as torch would take by itself, since JAX uses all cores too."""
    device: str = "cpu"
    quick: bool = False
    output: Path = Path("benchmarks-output")
    markdown: Path | None = None

    def rotate(self, tasks: Sequence[T]) -> Iterator[tuple[int, T]]:
        """Each round's tasks, with the number of the round, in an order turned by one."""
        start = time.monotonic()
        for i in range(1 if self.quick else self.rounds):
            for task in [*tasks[i % len(tasks) :], *tasks[: i % len(tasks)]]:
                if i and time.monotonic() - start > 60 * self.minutes:
                    return
                yield i, task


@dataclass(frozen=True)
class Question:
    """One question, and how it is answered."""

    name: str
    """Of its module, its files and its section."""
    title: str
    preface: str
    measure: Callable[[Options], list[Row]]
    tables: Callable[[list[Row]], str]
    """The rows as Markdown, that also reads well in a terminal."""
    pictures: Callable[[list[Row], Path], None] | None = None
    """Writes ``<path>.png`` and others whose names begin like it."""
    packages: tuple[str, ...] = ()
    """The peers that it needs, as pip calls them."""
    rounds: int = 3
    minutes: float = 5.0
    devices: tuple[str, ...] = ("cpu",)
    illustrated: bool = False
    """Whether ``<path>.png`` stands in the section of the page too, from ``_static`` beside it."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of its own, which ``measure`` takes by name."""

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Reads the command line, and answers."""
        args = vars(parser(self).parse_args(arguments))
        own = {name: args.pop(name) for name in self.options}
        self.answer(Options(**args), **own)

    def answer(self, options: Options, **own: Any) -> list[Row]:
        """Measures, prints and writes."""
        require(self.packages)
        torch.set_num_threads(options.threads)
        options.output.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers have many
            rows = self.measure(options, **own)
        seconds = time.monotonic() - start
        about = {
            **machine(options, self.packages),
            "seconds": round(seconds),
            "load": os.getloadavg()[0],
        }
        name = self.name + f"-{options.device}" * (options.device != "cpu")
        document = {"question": name, "title": self.title, "about": about, "rows": rows}
        path = options.output / f"{name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if self.pictures is not None:
            self.pictures(rows, options.output / name)
        title = self.title + ", on a GPU" * (options.device != "cpu")
        told = f"{self.tables(rows)}\n\n{_measured(about, options)}"
        print(f"\n{title}\n\n{told}\n", flush=True)
        if options.markdown is not None:
            command = self.command(options, own)
            shown = self._show(options, name) if self.illustrated else ""
            preface = f"{self.preface.strip()}\n\n{shown}"
            section = f"## {title}\n\n{preface}{told}\nCommand: `{command}`."
            write_section(options.markdown, name, section)
        return rows

    def _show(self, options: Options, name: str) -> str:
        """Copies the picture beside the page, and returns what shows it there."""
        assert options.markdown is not None
        folder = options.markdown.parent / "_static"
        folder.mkdir(exist_ok=True)
        shutil.copy(options.output / f"{name}.png", folder / f"{name}.png")
        return f"![{self.title}](_static/{name}.png)\n\n"

    def command(self, options: Options, own: dict[str, Any]) -> str:
        """What repeats the measurement: the options that are not the usual ones."""
        usual = vars(parser(self).parse_args([]))
        words = ["python", "-m", f"tests.benchmarks.{self.name}"]
        for name, value in {**vars(options), **own}.items():
            if value != usual[name] and name not in ("output", "markdown"):
                flag = f"--{name.replace('_', '-')}"
                for one in value if isinstance(value, list) else [value]:
                    words += [flag] if one is True else [flag, str(one)]
        return shlex.join(words)


def parser(question: Question) -> argparse.ArgumentParser:
    """The command line of a question."""
    usual = Options()
    result = argparse.ArgumentParser(description=question.title)
    result.add_argument("--rounds", type=int, default=question.rounds)
    result.add_argument(
        "--minutes", type=float, default=question.minutes, help="after which no round is begun"
    )
    result.add_argument("--seed", type=int, default=usual.seed, help="of the first round")
    result.add_argument("--threads", type=int, default=usual.threads, help="of torch")
    result.add_argument("--device", choices=question.devices, default=usual.device)
    result.add_argument("--quick", action="store_true", help="does it run? figures mean nothing")
    result.add_argument("--output", type=Path, default=usual.output)
    result.add_argument("--markdown", type=Path, help="the page whose section is rewritten")
    for name, argument in question.options.items():
        result.add_argument(f"--{name.replace('_', '-')}", **argument)
    return result


def require(packages: Sequence[str]) -> None:
    """Stops with a clear message if a peer is not installed."""
    missing = [name for name in packages if not _version(name)]
    if missing:
        sys.exit(
            f"{', '.join(missing)}: not installed. These are peers that we are measured against;"
            ' `make bench` installs them, and so does pip install -e ".[bench]"'
        )


def versions(*packages: str) -> str:
    """As a row names them: ``"numpyro 0.22.0, jax 0.10.2"``."""
    return ", ".join(f"{name} {_version(name)}" for name in packages)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def machine(options: Options, packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    affinity = getattr(os, "sched_getaffinity", None)
    names = dict.fromkeys((*OURS, *packages, "numpy"))
    device = options.device
    if device == "cuda":
        device = torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count() if affinity is None else len(affinity(0)),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
    }


def _measured(about: dict[str, Any], options: Options) -> str:
    found = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['cores']} cores ({about['capability']})"
    if options.device != "cpu":
        where = f"{about['device']}, {where}"
    quick = " A smoke run: the figures mean nothing." if options.quick else ""
    return (
        f"{about['date']}, {where}, load {about['load']:.1f} at the end, {about['seconds']} s;"
        f" torch threads: {options.threads}, rounds: at most {options.rounds}, seeds from"
        f" {options.seed} on; Python {about['python']},\n{found}.{quick}"
    )


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces the section ``name`` of a page, or adds it at its end.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = Path(folder) / "page.md"
    ...     write_section(page, "a", "old"), write_section(page, "b", "B")
    ...     write_section(page, "a", "new")
    ...     print(page.read_text(encoding="utf-8"))
    (None, None)
    # Benchmarks
    <BLANKLINE>
    <!-- begin a -->
    new
    <!-- end a -->
    <BLANKLINE>
    <!-- begin b -->
    B
    <!-- end b -->
    <BLANKLINE>
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    before = before if found else before + "\n"
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """How long a call takes."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def count_for(run: Callable[[int], Any], seconds: float, device: str = "cpu") -> int:
    """How many repetitions ``run(n)`` makes in about so many seconds; it is run to find out."""
    n = 1
    while True:
        took = seconds_of(lambda n=n: run(n), device)
        if took > seconds / 4 or n >= 10**6:
            return max(1, round(n * seconds / max(took, 1e-9)))
        n *= 4
