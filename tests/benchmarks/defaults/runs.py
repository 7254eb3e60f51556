"""Runs of contestants: each in a process that can be stopped, each kept in a file once it is made.

A run that is in the file is not made again, so that an interrupted measurement goes on where it
stopped. One of ours counts only for the code that made it, one that was stopped only for a limit
that is not longer.
"""

import json
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.benchmarks.defaults.contestants import Setting
from tests.benchmarks.harness import Row
from tests.benchmarks.workers import OverBudget, Worker

KEYS = ("posterior", "sampler", "chains", "seed", "asked", "versions", "code")


class RunFile:
    """Rows, one a line, that are only added to."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[self._key(row)] = row

    def find(self, row: Row) -> Row | None:
        """The run that a row asks for, if it was made."""
        found = self.rows.get(self._key(row))
        if found is None or ("over_limit" in found and found["limit"] < row["limit"]):
            return None
        return found

    def add(self, row: Row) -> None:
        """Keeps a run."""
        self.rows[self._key(row)] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def clear(self) -> None:
        """Forgets all runs."""
        self.rows.clear()
        self.path.unlink(missing_ok=True)

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in KEYS)


def code() -> str:
    """Names the code of the package, as git knows it, with what is not committed."""

    def git(*words: str) -> str:
        command, root = ["git", *words], Path(__file__).parents[3]
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    changes = git("diff", "HEAD", "--", "pyro_ebm")
    changed = "+" + sha256(changes.encode()).hexdigest()[:8] if changes else ""
    return git("rev-parse", "HEAD:pyro_ebm")[:12] + changed


class Runner:
    """Makes runs in their workers, and knows which would take too long.

    Args:
        threads: of torch.
        limit: seconds of a single run, with the score of its draws.
        file: keeps the runs.
    """

    def __init__(self, threads: int, limit: float, file: RunFile):
        # workers import JAX or our kernels, this process neither
        self.workers = {
            "jax": Worker(_setup_jax, threads),
            "torch": Worker(_setup_torch, threads),
        }
        self.limit, self.file, self.code = limit, file, code()
        self.stopped: dict[tuple[str, str], int] = {}

    def run(self, setting: Setting, seed: int) -> Row:
        """The row of a setting."""
        sampler = setting.sampler
        row: Row = {
            "posterior": setting.posterior,
            "sampler": sampler.name,
            "chains": setting.chains,
            "seed": seed,
            "asked": f"{setting.warmup} + {setting.draws}",
            "draws": setting.draws,
            "tuned": sampler.tuned,
            "versions": sampler.versions,
            "code": self.code if sampler.ours else "",
            "limit": self.limit,
        }
        found = self.file.find(row)
        if found is None:
            found = self._made(setting, row)
            self.file.add(found)
        if "over_limit" in found:
            self.stopped[setting.posterior, sampler.name] = setting.chains
        return found

    def stop(self) -> None:
        """Ends the workers."""
        for worker in self.workers.values():
            worker.stop()

    def _made(self, setting: Setting, row: Row) -> Row:
        sampler = setting.sampler
        fewer = self.stopped.get((setting.posterior, sampler.name), setting.chains)
        if fewer < setting.chains and not sampler.pooled:
            return {**row, "over_limit": "expected"}
        arguments = (sampler.side, sampler.name, setting.posterior, setting.chains)
        arguments = (*arguments, setting.warmup, setting.draws, row["seed"])
        try:
            found = self.workers[sampler.side].run(_measure, *arguments, seconds=self.limit)
        except OverBudget:
            return {**row, "over_limit": "stopped"}
        except RuntimeError as error:
            return {**row, "failed": str(error)}
        return {**row, **found}


def of_more_chains(row: Row, chains: int) -> Row:
    """What a sampler whose chains run one after another takes for more of them.

    Each has a warmup of its own; for as many draws, fewer of each are enough.
    """
    if "seconds" not in row:
        return {**row, "chains": chains}
    times = chains / row["chains"]
    before, seconds = row["before"], row["seconds"]
    return {**row, "chains": chains, "seconds": seconds + (times - 1) * before}


def _setup_jax() -> None:
    from tests.benchmarks import jax_samplers

    jax_samplers.setup()


def _setup_torch() -> None:
    from tests.benchmarks import torch_samplers

    torch_samplers.setup()


def _measure(side: str, sampler: str, posterior: str, *arguments: Any) -> dict[str, Any]:
    """In a worker: runs a sampler, and scores its draws."""
    from importlib import import_module

    from tests.benchmarks.defaults.score import score, seconds_to_enough
    from tests.benchmarks.real.posteriors import REAL

    measure: Callable[..., Any] = import_module(f"tests.benchmarks.defaults.{side}_side").measure
    found, samples = measure(sampler, posterior, *arguments)
    target = REAL[posterior]
    scored = score(target.quantities(samples), target.reference)
    seconds = seconds_to_enough(found["before"], found["sampling"], scored["ess"])
    return {**found, **scored, "seconds": seconds}
