"""Gibbs sweeps of an Ising torus, beside a bare torch loop.

    python -m tests.benchmarks.boltzmann

(Training of Boltzmann machines is in :mod:`tests.benchmarks.training`.)
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch

from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
from pyro_ebm.mcmc import EnergyPotential, GibbsKernel
from tests.benchmarks import report
from tests.benchmarks.harness import Options, Question, Row, count_for, seconds_of, versions

PREFACE = """
Gibbs sweeps per second of a 32 x 32 Ising torus at its critical temperature, all chains in one. The
bare loop is a checkerboard by rolls, which knows no other graph.
"""

SIDE, COUPLING = 32, 0.44

Run = Callable[[int], Any]


def ours(chains: int, jit: bool) -> Run:
    kernel = GibbsKernel(jit_compile=jit)
    edges = lattice_edges(SIDE, SIDE)
    potential = EnergyPotential(BoltzmannMachine(torch.tensor(COUPLING), edges=edges))
    kernel.bind(potential, 0)
    state = kernel.init(potential.initial(chains))

    @torch.no_grad()
    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, _ = kernel.step(state)

    run(3)
    return run


def bare(chains: int) -> Run:
    s = 2.0 * torch.randint(2, (chains, SIDE, SIDE)) - 1
    parity = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2

    def run(n: int) -> None:
        nonlocal s
        for _ in range(n):
            for colour in (0, 1):
                field = s.roll(1, 1) + s.roll(-1, 1) + s.roll(1, 2) + s.roll(-1, 2)
                up = torch.rand_like(s) < (2 * COUPLING * field).sigmoid()
                s = torch.where(parity == colour, torch.where(up, 1.0, -1.0), s)

    run(3)
    return run


def measure(options: Options) -> list[Row]:
    tasks = []
    for chains in (1,) if options.quick else (1, 100):
        pyro.set_rng_seed(options.seed)
        runs = {
            "pyro_ebm, compiled": ours(chains, True),
            "pyro_ebm, eager": ours(chains, False),
            "bare loop": bare(chains),
        }
        for contestant, run in runs.items():
            n = count_for(run, 0.05 if options.quick else 0.3)
            tasks.append((chains, contestant, n, run))
    rows = []
    for i, (chains, contestant, n, run) in options.rotate(tasks):
        seconds = seconds_of(lambda run=run, n=n: run(n)) / n
        rows.append(
            {
                "chains": chains,
                "contestant": contestant,
                "round": i,
                "seed": options.seed,
                "settings": f"{n} sweeps",
                "versions": versions("pyro-ebm", "torch"),
                "seconds": seconds,
                "per_second": 1 / seconds,
            }
        )
    order = [task[:2] for task in tasks]
    return sorted(rows, key=lambda r: order.index((r["chains"], r["contestant"])))


def tables(rows: list[Row]) -> str:
    header = ["chains", "contestant", "time of a sweep", "sweeps/s", "to the bare loop"]
    lines = []
    for (chains,), same in report.grouped(rows, "chains").items():
        groups = report.grouped(same, "contestant")
        for (name,), group in groups.items():
            lines.append(
                [
                    f"{chains:,}",
                    name,
                    report.spread([r["seconds"] for r in group], report.duration),
                    report.spread([r["per_second"] for r in group]),
                    report.number(report.paired(group, groups[("bare loop",)], "per_second")),
                ]
            )
    return report.table(header, lines)


QUESTION = Question(
    name="boltzmann",
    title="Gibbs sweeps",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    rounds=5,
    minutes=0.5,
)

if __name__ == "__main__":
    QUESTION.main()
