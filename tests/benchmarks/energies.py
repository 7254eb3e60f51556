"""Question 3: how many steps of unadjusted Langevin per second, on energy networks?

python -m tests.benchmarks.energies
python -m tests.benchmarks.energies --device cuda
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from torch import Tensor, nn

from pyro_ebm import LangevinKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import EnergyPotential
from pyro_ebm.nn import ConvEnergy, MLPEnergy
from tests.benchmarks import report
from tests.benchmarks.harness import (
    Options,
    Question,
    Row,
    count_for,
    progress,
    seconds_of,
    versions,
)
from tests.benchmarks.transitions import Run, gradient_alone

PREFACE = """
Steps of unadjusted Langevin dynamics per second, all chains in one, on two energy networks: an MLP
2-128-128-1, and a convolutional one for images of 8 x 8 (16, then 32 channels). Ours is
`LangevinKernel(adjusted=False)`, compiled and eager, which also looks that no energy is infinite or
NaN; TorchEBM's is `LangevinDynamics.sample`; the *bare loop* is autograd in five lines. *Gradient
alone* is the limit: energy and gradient, captured and compiled, nothing around. The networks, the
step size and the weights are the same. Compiling is not counted.
"""

STEP_SIZE = 1e-3
CHAINS = (1, 100, 1000)


@dataclass(frozen=True)
class Case:
    title: str
    shape: tuple[int, ...]
    make: Callable[[], nn.Module]


CASES = {
    "mlp": Case("MLP 2-128-128-1", (2,), lambda: MLPEnergy(2, hidden=(128, 128))),
    "conv": Case("Convolutional, 8 x 8", (1, 8, 8), lambda: ConvEnergy((1, 8, 8), channels=16)),
}


def ours(net: nn.Module, x: Tensor, jit: bool) -> Run:
    p = UnnormalizedEnergy(net, event_shape=x.shape[1:])
    kernel = LangevinKernel(
        step_size=STEP_SIZE, adjusted=False, jit_compile=jit, ignore_jit_warnings=True
    )
    potential = EnergyPotential(p, like=x)
    kernel.bind(potential, 0)
    state = kernel.init(potential.to_position(x))

    @torch.no_grad()
    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, _ = kernel.step(state)

    run(3)
    return run


def limit(net: nn.Module, x: Tensor) -> Run:
    potential = EnergyPotential(UnnormalizedEnergy(net, event_shape=x.shape[1:]), like=x)
    return gradient_alone(potential, potential.to_position(x))


def torchebm_model(net: nn.Module) -> Any:
    """A network as TorchEBM takes it."""
    from torchebm.core import BaseModel

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return Model().to(next(net.parameters()).device)


def torchebm(net: nn.Module, x: Tensor) -> Run:
    from torchebm.samplers import LangevinDynamics

    sampler = LangevinDynamics(torchebm_model(net), step_size=STEP_SIZE, device=x.device)

    def run(n: int) -> None:
        sampler.sample(x=x.clone(), n_steps=n)

    run(3)
    return run


def bare(net: nn.Module, x: Tensor) -> Run:
    def run(n: int) -> None:
        z = x
        for _ in range(n):
            z = z.detach().requires_grad_()
            (grad,) = torch.autograd.grad(net(z).sum(), z)
            z = z.detach() - STEP_SIZE * grad + math.sqrt(2 * STEP_SIZE) * torch.randn_like(z)

    run(3)
    return run


def measure(options: Options) -> list[Row]:
    tasks = []
    device = options.device
    for name, case in CASES.items():
        for chains in (100,) if options.quick else CHAINS:
            pyro.set_rng_seed(options.seed)
            net = case.make().to(device).requires_grad_(False)
            x = torch.randn(chains, *case.shape, device=device)
            used = versions("pyro-ebm", "torch")
            runs = {
                "pyro_ebm, compiled": (ours(net, x, True), used),
                "pyro_ebm, eager": (ours(net, x, False), used),
                "TorchEBM": (torchebm(net, x), versions("torchebm", "torch")),
                "bare loop": (bare(net, x), versions("torch")),
                "bare gradient alone": (limit(net, x), used),
            }
            for contestant, (run, used) in runs.items():
                n = count_for(run, 0.05 if options.quick else 0.2, device)
                tasks.append((name, chains, contestant, n, run, used))
            progress(f"ready: {name}, {chains} chains")
    rows = []
    for i, (name, chains, contestant, n, run, used) in options.rotate(tasks):
        seconds = seconds_of(lambda run=run, n=n: run(n), device) / n
        rows.append(
            {
                "case": name,
                "chains": chains,
                "contestant": contestant,
                "round": i,
                "seed": options.seed,
                "settings": f"step size {STEP_SIZE}, {n} steps",
                "versions": used,
                "seconds": seconds,
                "per_second": 1 / seconds,
            }
        )
    order = [task[:3] for task in tasks]
    return sorted(rows, key=lambda r: order.index((r["case"], r["chains"], r["contestant"])))


def tables(rows: list[Row]) -> str:
    header = ["energy", "chains", "contestant", "time of one", "steps/s", "to TorchEBM"]
    header += ["to the bare loop", "over the gradient alone"]
    lines = []
    for (case, chains), same in report.grouped(rows, "case", "chains").items():
        groups = report.grouped(same, "contestant")
        for (name,), group in groups.items():
            lines.append(
                [
                    CASES[case].title,
                    f"{chains:,}",
                    name.replace("bare gradient", "gradient"),
                    report.spread([r["seconds"] for r in group], report.duration),
                    report.spread([r["per_second"] for r in group]),
                    report.number(report.paired(group, groups[("TorchEBM",)], "per_second")),
                    report.number(report.paired(group, groups[("bare loop",)], "per_second")),
                    report.number(
                        report.paired(group, groups[("bare gradient alone",)], "seconds")
                    ),
                ]
            )
    return report.table(header, lines)


def pictures(rows: list[Row], path: Path) -> None:
    cases = list(report.grouped(rows, "case"))
    fig, axes = plt.subplots(
        1, len(cases) + 1, figsize=(4.4 * (len(cases) + 1), 4.2), layout="constrained"
    )
    names, ratios = [], []
    for ax, (case,) in zip(axes, cases):
        groups = report.grouped(
            [row for row in rows if row["case"] == case], "contestant", "chains"
        )
        report.lines(
            ax,
            groups,
            "per_second",
            xlabel="chains",
            ylabel="unadjusted Langevin steps / s",
            title=CASES[case].title,
        )
        for (name, chains), group in groups.items():
            if name == "pyro_ebm, compiled":
                names.append(f"{case}, {chains:,}")
                rivals = [groups[rival, chains] for rival in ("TorchEBM", "bare loop")]
                ratios.append(min(report.paired(group, g, "per_second") for g in rivals))
    axes[0].legend(fontsize=8)
    report.bars(axes[-1], names, ratios, "ours, compiled, to the best peer")
    report.save(fig, path.with_suffix(".png"))


QUESTION = Question(
    name="energies",
    title="Unadjusted Langevin on energy networks",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    packages=("torchebm",),
    rounds=9,
    minutes=2.0,
    devices=("cpu", "cuda"),
)

if __name__ == "__main__":
    QUESTION.main()
