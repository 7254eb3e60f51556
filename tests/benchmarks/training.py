"""Question 4: how fast is training?

python -m tests.benchmarks.training
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_ebm import ContrastiveDivergence, FlowNCE, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.distributions.flow import FlowDistribution, neural_spline_flow
from pyro_ebm.mcmc.engine.engine import JitCompile
from pyro_ebm.nn import MLPEnergy
from tests.benchmarks import machines, report
from tests.benchmarks.energies import torchebm_model
from tests.benchmarks.harness import (
    Options,
    Question,
    Row,
    count_for,
    progress,
    seconds_of,
    versions,
)

PREFACE = """
*Contrastive divergence*: steps of training per second on the energy network 2-128-128-1: 256
data, 10 steps of unadjusted Langevin from each of them, Adam; *adjusted* are the steps of the
default kernel, with their acceptance test. Ours under `SVI`, and as a module
with a torch optimiser; TorchEBM's `ContrastiveDivergence` with its `LangevinDynamics`; a bare
torch loop of the same arithmetic. *Flow-NCE*: steps in which both players train, 256 data and as
many draws of a neural spline flow; the bare loop calls zuko and the network by hand. *RBM*:
seconds of training until the exact log-likelihood of test digits is reached, 64 visible and 16
hidden units, for the best settings of a small grid for either library: ours of `fit_rbm`,
scikit-learn's of `BernoulliRBM`. Compiling is not counted.
"""

BATCH, CD_STEPS, STEP_SIZE, LR = 256, 10, 0.01, 1e-3

Run = Callable[[int], Any]


def data() -> Tensor:
    """A ring of points in the plane."""
    x = torch.randn(10_000, 2)
    return 2 * x / x.norm(dim=-1, keepdim=True) + 0.1 * torch.randn(10_000, 2)


def batches() -> Any:
    """Minibatches for ever."""
    x = data()
    return itertools.cycle(x.split(BATCH)[: len(x) // BATCH])


def nothing(x: Tensor) -> None:
    """A guide."""


# ---- contrastive divergence --------------------------------------------------------------------


def our_cd(how: str, jit: JitCompile = "auto", adjusted: bool = False) -> Run:
    net, stream = MLPEnergy(2, hidden=(128, 128)), batches()
    name = f"energy {jit} {adjusted}"
    kernel = LangevinKernel(step_size=STEP_SIZE, adjusted=adjusted, jit_compile=jit)
    loss = ContrastiveDivergence(kernel, num_steps=CD_STEPS)

    def model(x: Tensor) -> None:
        if how == "SVI":
            pyro.module(name, net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, event_shape=(2,)), obs=x)

    if how == "SVI":
        svi = SVI(model, nothing, pyro.optim.Adam({"lr": LR}), loss)

        def run(n: int) -> None:
            for _ in range(n):
                svi.step(next(stream))
    else:
        module = loss(model, nothing)
        optimizer = torch.optim.Adam(net.parameters(), lr=LR)

        def run(n: int) -> None:
            for _ in range(n):
                optimizer.zero_grad()
                module(next(stream)).backward()
                optimizer.step()

    run(15)  # past the transitions after which they run as a graph
    return run


def torchebm_cd() -> Run:
    from torchebm.losses import ContrastiveDivergence as TheirDivergence
    from torchebm.samplers import LangevinDynamics

    model, stream = torchebm_model(MLPEnergy(2, hidden=(128, 128))), batches()
    sampler = LangevinDynamics(model, step_size=STEP_SIZE)
    loss = TheirDivergence(model, sampler, k_steps=CD_STEPS, energy_reg_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def run(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            value, _ = loss(next(stream))
            value.backward()
            optimizer.step()

    run(3)
    return run


def bare_cd() -> Run:
    net, stream = MLPEnergy(2, hidden=(128, 128)), batches()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)

    def run(n: int) -> None:
        for _ in range(n):
            x = next(stream)
            z = x
            for _ in range(CD_STEPS):
                z = z.detach().requires_grad_()
                (grad,) = torch.autograd.grad(net(z).sum(), z)
                z = z.detach() - STEP_SIZE * grad + math.sqrt(2 * STEP_SIZE) * torch.randn_like(z)
            optimizer.zero_grad()
            (net(x).sum() - net(z).sum()).backward()
            optimizer.step()

    run(3)
    return run


# ---- flow-contrastive estimation ---------------------------------------------------------------


def our_flow_nce() -> Run:
    net, flow, stream = MLPEnergy(2, hidden=(128, 128)), neural_spline_flow(2), batches()

    def model(x: Tensor) -> None:
        pyro.module("flow_energy", net)
        log_z = pyro.param("log_z", torch.tensor(0.0))
        p = UnnormalizedEnergy(net, event_shape=(2,), log_normalizer=log_z)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", FlowDistribution(flow()))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), FlowNCE(alternate=None))

    def run(n: int) -> None:
        for _ in range(n):
            svi.step(next(stream))

    run(3)
    return run


def bare_flow_nce() -> Run:
    net: nn.Module = MLPEnergy(2, hidden=(128, 128))
    flow, stream = neural_spline_flow(2), batches()
    log_z = torch.zeros((), requires_grad=True)
    theirs = list(flow.parameters())
    optimizer = torch.optim.Adam([*net.parameters(), log_z, *theirs], lr=LR)

    def run(n: int) -> None:
        for _ in range(n):
            x = next(stream)
            q = flow()
            noise, log_q = q.rsample_and_log_prob((len(x),))
            on_data = -net(x) - log_z - q.log_prob(x)
            on_noise = -net(noise) - log_z - log_q
            optimizer.zero_grad()
            (-logsigmoid(on_data).sum() - logsigmoid(-on_noise).sum()).backward()
            for parameter in theirs:  # the flow climbs what the energy descends
                if parameter.grad is not None:
                    parameter.grad.neg_()
            optimizer.step()

    run(3)
    return run


# ---- the question ------------------------------------------------------------------------------

CONTESTANTS: dict[tuple[str, str], Callable[[], Run]] = {
    ("CD-10 on an MLP", "pyro_ebm, SVI, compiled"): lambda: our_cd("SVI", True),
    ("CD-10 on an MLP", "pyro_ebm, torch optimiser, compiled"): lambda: our_cd("torch", True),
    ("CD-10 on an MLP", "pyro_ebm, SVI"): lambda: our_cd("SVI"),
    ("CD-10 on an MLP", "pyro_ebm, torch optimiser"): lambda: our_cd("torch"),
    ("CD-10 on an MLP", "pyro_ebm, SVI, adjusted"): lambda: our_cd("SVI", adjusted=True),
    ("CD-10 on an MLP", "TorchEBM"): torchebm_cd,
    ("CD-10 on an MLP", "bare loop"): bare_cd,
    ("Flow-NCE", "pyro_ebm, SVI"): our_flow_nce,
    ("Flow-NCE", "bare loop"): bare_flow_nce,
}
PEERS = {"CD-10 on an MLP": "TorchEBM", "Flow-NCE": "bare loop"}


def measure(options: Options) -> list[Row]:
    pyro.clear_param_store()
    tasks = []
    for (case, contestant), make in CONTESTANTS.items():
        pyro.set_rng_seed(options.seed)
        run = make()
        n = count_for(run, 0.05 if options.quick else 0.4)
        tasks.append((case, contestant, n, run))
        progress(f"ready: {case}, {contestant}")
    for *_, run in tasks:  # a new parameter in Pyro's store is a reason to compile anew
        run(3)
    rows = []
    for i, (case, contestant, n, run) in options.rotate(tasks):
        seconds = seconds_of(lambda run=run, n=n: run(n)) / n
        packages = ("torchebm", "torch") if contestant == "TorchEBM" else ("pyro-ebm", "torch")
        rows.append(
            {
                "question": "steps",
                "case": case,
                "contestant": contestant,
                "round": i,
                "seed": options.seed,
                "settings": f"{BATCH} data, Adam {LR}, {n} steps",
                "versions": versions(*packages),
                "seconds": seconds,
                "per_second": 1 / seconds,
            }
        )
    order = [task[:2] for task in tasks]
    rows.sort(key=lambda r: order.index((r["case"], r["contestant"])))
    pyro.clear_param_store()
    fewer = Options(**{**vars(options), "rounds": min(options.rounds, 3)})
    return rows + machines.measure(fewer)


def tables(rows: list[Row]) -> str:
    header = ["training", "contestant", "time of a step", "steps/s", "to the peer"]
    lines = []
    steps = [row for row in rows if row["question"] == "steps"]
    for (case,), same in report.grouped(steps, "case").items():
        groups = report.grouped(same, "contestant")
        for (name,), group in groups.items():
            ratio = report.paired(group, groups[(PEERS[case],)], "per_second")
            lines.append(
                [
                    case,
                    name,
                    report.spread([r["seconds"] for r in group], report.duration),
                    report.spread([r["per_second"] for r in group]),
                    report.number(ratio),
                ]
            )
    first = report.table(header, lines)
    header = ["exact test log-likelihood", "contestant", "settings", "seconds", "to scikit-learn"]
    lines = []
    fits = [row for row in rows if row["question"] == "machine"]
    for (target,), same in report.grouped(fits, "target").items():
        groups = report.grouped(same, "contestant")
        for (name,), group in groups.items():
            seconds = [row["seconds"] for row in group if row["seconds"] is not None]
            ratio = report.paired(group, groups[("scikit-learn",)], "seconds")
            lines.append(
                [
                    f"{target} nats",
                    name,
                    group[0]["settings"],
                    report.spread(seconds) if seconds else "not reached",
                    report.number(ratio),
                ]
            )
    return f"{first}\n\n{report.table(header, lines)}"


def pictures(rows: list[Row], path: Path) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names, ratios = [], []
    steps = [row for row in rows if row["question"] == "steps"]
    for (case,), same in report.grouped(steps, "case").items():
        groups = report.grouped(same, "contestant")
        for (name,), group in groups.items():
            if name.startswith("pyro_ebm"):
                peer = groups[(PEERS[case],)]
                names.append(f"{case}:\n{name.removeprefix('pyro_ebm, ')}, to {PEERS[case]}")
                ratios.append(report.paired(group, peer, "per_second"))
    report.bars(axes[0], names, ratios, "steps of training per second, to the peer")
    axes[0].tick_params(axis="y", labelsize=8)
    for name in machines.FITS:
        first = [row for row in rows if row["contestant"] == name and not row["round"]]
        curves = [fit["curve"] for row in first for fit in row["curves"]]
        for curve in curves:
            axes[1].plot(*zip(*curve), color=report.colour(name), lw=0.6, alpha=0.35)
        x, y = zip(*sorted(point for curve in curves for point in curve))
        best = list(itertools.accumulate(y, max))
        axes[1].step(x, best, where="post", color=report.colour(name), lw=2, label=name)
    axes[1].set(
        xscale="log", xlabel="seconds of training", ylabel="exact test log-likelihood, nats"
    )
    axes[1].set_ylim(-27, -18.5)
    for target in machines.TARGETS:
        axes[1].axhline(target, color="black", lw=0.5, ls=":")
    axes[1].set_title("RBM 64 x 16: all settings, and the best so far", fontsize=10)
    axes[1].legend(fontsize=8)
    axes[1].grid(alpha=0.25)
    report.save(fig, path.with_suffix(".png"))


QUESTION = Question(
    name="training",
    title="Training",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    packages=("torchebm", "scikit-learn"),
    rounds=7,
    minutes=3.0,
)

if __name__ == "__main__":
    QUESTION.main()
