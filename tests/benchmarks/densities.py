r"""How well does each loss fit a density in the plane?

    python -m tests.benchmarks.densities

Every loss trains the same network, an energy MLP 2-128-128-1 that tilts a broad Gaussian, through
``SVI`` on data drawn anew at each step. (Those of noise levels train one that sees the level and
Fourier features too, and average its weights; the density is that at the smallest level.) The exact
density p of each set is known, and the model's log Z is a sum over a grid, so the divergence

.. math:: KL(p \| p_\theta) = \int p(x) \, (\log p(x) - \log h(x) + E(x) + \log Z) \, dx

has no Monte Carlo error. Prints one table of it and, for the losses that learn log Z, a second one
with the mean squared error of the log density on data and the error of the learned log Z; draws
every fitted density beside the data.

Settings are those of :func:`methods`, the same for all sets. Losses that run chains take fewer
steps, so that one column costs about as much as another.
"""

import argparse
import csv
import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_ebm import UnnormalizedEnergy, datasets, geometric_ladder, noise_conditional
from pyro_ebm.distributions.flow import FlowDistribution, fit_flow, neural_spline_flow
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    CooperativeTraining,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    EnergyLoss,
    FlowNCE,
    RankingNCE,
    RecoveryLikelihood,
    ScoreMatching,
    SlicedScoreMatching,
    gaussian_noise,
)
from pyro_ebm.mcmc import LangevinKernel
from pyro_ebm.nn import MLPEnergy, NoiseConditionalMLP
from pyro_ebm.plots import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BOX = (-6.0, 6.0, -6.0, 6.0)  # on which densities are compared

TOY_SETS: dict[str, datasets.PlanarDistribution] = {
    "eight_gaussians": datasets.EightGaussians(),
    "two_moons": datasets.TwoMoons(),
    "rings": datasets.Rings(),
    "checkerboard": datasets.Checkerboard(),
    "pinwheel": datasets.Pinwheel(),
}

# ---- the losses and their settings -------------------------------------------------------------


@dataclasses.dataclass
class Method:
    """A loss with what it needs."""

    loss: Callable[[Any], EnergyLoss]
    """Makes the loss, given a Gaussian wider than the data."""
    pace: float = 1.0
    """Steps, as a fraction of ``--steps``."""
    batch: int = 256
    lr: float = 1e-2
    """Adam's; falls to a twentieth by the end."""
    noise: str | None = None
    """What the guide holds: nothing, a broad ``"gaussian"``, or a ``"flow"``."""
    learns_log_z: bool = False
    levels: tuple[float, ...] = ()
    """Of a noise-conditional energy, which has a network of its own, and averaged weights."""


WIDTH = 1.5  # of the base, in spreads of the data
LADDER = geometric_ladder(4.0, 0.02, 40)
COARSE = geometric_ladder(4.0, 0.03, 8)
UNADJUSTED = LangevinKernel(adjusted=False, step_size=0.02)


def methods() -> dict[str, Method]:
    chains = {"num_steps": 10, "persistent": True, "num_chains": 512, "restart_prob": 0.05}
    slow = 4e-3  # at 1e-2 the energy outruns the chains, and masses appear where nobody looks
    return {
        "CD-1": Method(lambda broad: ContrastiveDivergence(num_steps=1), lr=slow),
        "CD-10": Method(lambda broad: ContrastiveDivergence(num_steps=10), pace=0.5, lr=slow),
        "CD-10 short": Method(
            lambda broad: ContrastiveDivergence(
                LangevinKernel.short_run(broad, 0.005 / WIDTH**2), num_steps=10
            ),
            pace=0.5,
            lr=slow,
        ),
        "PCD-10": Method(lambda broad: ContrastiveDivergence(**chains), pace=0.5, lr=slow),
        # Unadjusted chains at a rate at which they run off but for the term of Du et al. (2021).
        "PCD-10 KL": Method(
            lambda broad: ContrastiveDivergence(UNADJUSTED, **chains, kl_weight=1.0), pace=0.5
        ),
        "Cooperative": Method(
            lambda broad: CooperativeTraining(num_steps=10), pace=0.5, lr=slow, noise="flow"
        ),
        "ScoreMatching": Method(lambda broad: ScoreMatching(), lr=6e-3),
        "Sliced": Method(lambda broad: SlicedScoreMatching(), lr=6e-3),
        "Denoising": Method(lambda broad: DenoisingScoreMatching(0.1, control_variate=True)),
        "Levels": Method(
            lambda broad: DenoisingScoreMatching(dual=True),
            pace=3,
            batch=512,
            lr=5e-3,
            levels=LADDER,
        ),
        "Levels (x alone)": Method(
            lambda broad: DenoisingScoreMatching(), pace=3, batch=512, lr=5e-3, levels=LADDER
        ),
        "Recovery": Method(lambda broad: RecoveryLikelihood(), lr=1e-3, levels=COARSE),
        "Discrepancy": Method(lambda broad: EnergyDiscrepancy(time=1.0)),
        "NCE": Method(
            lambda broad: NCE(noise_ratio=4, init_log_normalizer=True),
            noise="gaussian",
            learns_log_z=True,
        ),
        "RankingNCE": Method(lambda broad: RankingNCE(noise_ratio=4), noise="gaussian"),
        # After Gao et al. (2020), who take batches of 1000, Adam at 1e-3 (energy) and 7e-4 (flow),
        # and threshold 0.6. A good flow has no mass between and around the data, and what the
        # energy does there stays unseen: hence the fifth of broad noise.
        "FlowNCE": Method(
            lambda broad: FlowNCE(broad_noise=broad, broad_weight=0.2, init_log_normalizer=True),
            batch=500,
            lr=5e-3,
            noise="flow",
            learns_log_z=True,
        ),
    }


# ---- one fit -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Fit:
    """What is left of a trained energy."""

    toy: str
    method: str
    kl: float
    seconds: float
    steps: int
    log_density: Tensor
    """On the grid, normalized there."""
    mse: float = math.nan
    """Mean squared error of the log density on data, with the learned log Z."""
    log_z_error: float = math.nan
    """Learned log Z minus that of the grid."""
    flow_kl: float = math.nan


def fit(name: str, method_name: str, steps: int, points: int, seed: int, warm_up: int) -> Fit:
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    toy, method = TOY_SETS[name], methods()[method_name]
    steps = max(int(method.pace * steps), 1)
    some = toy.draw(5000)
    base = gaussian_noise(some, width=WIDTH, full_covariance=False)
    net: Any = MLPEnergy(2, hidden=(128, 128))
    if method.levels:
        net = NoiseConditionalMLP(2, spread=float(some.std()))
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(1 - 10 / steps))

    def density(log_z=None):
        if method.levels:
            return noise_conditional(net, method.levels, event_shape=(2,))
        return UnnormalizedEnergy(net, base=base, log_normalizer=log_z)

    def model(x):
        pyro.module("energy", net)
        log_z = pyro.param("log_z", torch.tensor(0.0)) if method.learns_log_z else None
        with pyro.plate("data", len(x)):
            pyro.sample("x", density(log_z), obs=x)

    guide, flow = noise_guide(method, base)
    start = time.perf_counter()
    if flow is not None:
        fit_flow(flow, toy.draw(50_000), warm_up, batch_size=500, disable_progbar=True)
    svi = SVI(model, guide, optimizer(method.lr, steps), method.loss(base))
    for _ in range(steps):
        svi.step(toy.draw(method.batch))
        if method.levels:
            averaged.update_parameters(net)
    seconds = time.perf_counter() - start

    log_z = pyro.param("log_z").detach() if method.learns_log_z else None
    if method.levels:
        net.load_state_dict(averaged.module.state_dict())
    p = density()
    result = compare(toy, p.unnormalized_log_prob, points)
    fitted = Fit(name, method_name, result.kl, seconds, steps, result.log_density)
    if log_z is not None:
        x = toy.draw(10_000)
        with torch.no_grad():
            error = p.unnormalized_log_prob(x) - log_z - toy.log_prob(x)
        fitted.mse = float(error.square().mean())
        fitted.log_z_error = float(log_z) - result.log_z
    if flow is not None:
        fitted.flow_kl = compare(toy, flow().log_prob, points).kl
    return fitted


def noise_guide(method: Method, base: Any) -> tuple[Callable[..., None], Any]:
    """The guide, which holds the noise, and the flow if that is what the noise is."""
    if method.noise is None:
        return lambda x: None, None
    flow = neural_spline_flow(features=2, transforms=3) if method.noise == "flow" else None

    def guide(x):
        if flow is not None:
            pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", base if flow is None else FlowDistribution(flow()))

    return guide, flow


def optimizer(lr: float, steps: int) -> Any:
    """Adam with a rate for each player, which falls exponentially to a twentieth."""

    def rates(name: str) -> dict[str, float]:
        rate = 7e-4 if name.startswith("flow") else 2e-2 if name == "log_z" else lr
        # A loss is a sum over rows, so gradients are in the hundreds: without clip_norm,
        # ClippedAdam cuts every element at 10, which turns the gradient's direction.
        return {"lr": rate, "lrd": 0.05 ** (1 / steps), "clip_norm": math.inf}

    return pyro.optim.ClippedAdam(rates)


@dataclasses.dataclass
class Comparison:
    kl: float
    log_z: float
    log_density: Tensor


@torch.no_grad()
def compare(
    toy: datasets.PlanarDistribution, log_prob: Callable[[Tensor], Tensor], points: int
) -> Comparison:
    """KL(p || model) and the model's log Z, by sums over a grid."""
    x, cell = grid(BOX, points)
    exact = toy.log_prob(x)
    log_p = log_prob(x.reshape(-1, 2)).reshape(exact.shape)
    log_z = float(log_p.double().flatten().logsumexp(0)) + math.log(cell)
    log_p = log_p - log_z
    p = exact.exp()
    kl = torch.where(p > 0, p * (exact - log_p), 0.0).double().sum() * cell
    return Comparison(float(kl), log_z, log_p)


# ---- the report --------------------------------------------------------------------------------


def table(fits: list[Fit], sets: list[str], names: list[str]) -> str:
    found = {(f.toy, f.method): f for f in fits}
    width = max(len(name) for name in sets) + 2
    lines = ["KL(data || model) in nats", "", " " * width + "".join(f"{n:>15}" for n in names)]
    for toy in sets:
        row = "".join(f"{found[toy, n].kl:15.3f}" for n in names)
        lines.append(f"{toy:<{width}}{row}")
    seconds = [sum(found[toy, n].seconds for toy in sets) / len(sets) for n in names]
    lines.append(f"{'seconds':<{width}}" + "".join(f"{s:15.0f}" for s in seconds))
    lines.append(f"{'steps':<{width}}" + "".join(f"{found[sets[0], n].steps:15d}" for n in names))
    learned = [n for n in names if methods()[n].learns_log_z]
    if learned:
        lines += ["", "With the learned log Z: mean squared error of the log density on data,"]
        lines += ["error of log Z, and KL(data || flow) of the noise", ""]
        for name in learned:
            for toy in sets:
                f = found[toy, name]
                flow = "" if math.isnan(f.flow_kl) else f"{f.flow_kl:10.3f}"
                lines.append(f"{name:<12}{toy:<{width}}{f.mse:10.3f}{f.log_z_error:+10.3f}{flow}")
    return "\n".join(lines)


def picture(fits: list[Fit], sets: list[str], names: list[str], path: Path) -> None:
    found = {(f.toy, f.method): f for f in fits}
    columns = ["data", "exact", *names]
    figure, axes = plt.subplots(
        len(sets),
        len(columns),
        figsize=(1.9 * len(columns), 2.0 * len(sets) + 0.3),
        squeeze=False,
        layout="constrained",
        subplot_kw={"xticks": [], "yticks": [], "aspect": "equal"},
    )
    for row, name in zip(axes, sets):
        toy = TOY_SETS[name]
        points = found[name, names[0]].log_density.shape[0]
        exact = toy.log_prob(grid(BOX, points)[0]).exp()
        top = float(exact.max()) * 1.1
        row[0].plot(*toy.draw(3000).T, ".", ms=1, color="black", alpha=0.4, mew=0)
        row[0].set_ylabel(name.replace("_", " "))
        panels = [exact, *(found[name, n].log_density.exp() for n in names)]
        for ax, density in zip(row[1:], panels):
            ax.imshow(density, origin="lower", extent=BOX, cmap="viridis", vmin=0, vmax=top)
        for ax, n in zip(row[2:], names):
            ax.text(
                0.03, 0.03, f"KL {found[name, n].kl:.2f}", color="white", transform=ax.transAxes
            )
        for ax in row:
            ax.set(xlim=(-4.8, 4.8), ylim=(-4.8, 4.8))
    for ax, title in zip(axes[0], columns):
        ax.set_title(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits densities in the plane by every loss.")
    parser.add_argument("--losses", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--sets", nargs="+", default=list(TOY_SETS), choices=list(TOY_SETS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=500, help="of the flow, by likelihood")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it all run?")
    parser.add_argument("--workers", type=int, default=2, help="processes, a fit each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks-output"))
    args = parser.parse_args()

    steps, points, warm_up = (20, 120, 20) if args.quick else (args.steps, 480, args.warm_up)
    # the dearest first, so that no process is left with one at the end
    tasks = [(toy, name) for name in reversed(args.losses) for toy in args.sets]
    start, fits = time.perf_counter(), []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(fit, *task, steps, points, args.seed, warm_up) for task in tasks]
        for job in jobs:
            fits.append(job.result())
            f = fits[-1]
            print(f"{f.method:<14} {f.toy:<16} KL {f.kl:7.3f}   {f.seconds:5.0f} s", flush=True)

    args.output.mkdir(parents=True, exist_ok=True)
    report = table(fits, args.sets, args.losses)
    print(f"\n{report}\n\n{time.perf_counter() - start:.0f} s in all")
    (args.output / "densities.txt").write_text(report + "\n", encoding="utf-8")
    with open(args.output / "densities.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["loss", "set", "kl", "mse", "log_z_error", "flow_kl", "steps", "seconds"])
        for f in fits:
            numbers = (f.kl, f.mse, f.log_z_error, f.flow_kl)
            writer.writerow([f.method, f.toy, *numbers, f.steps, f.seconds])
    picture(fits, args.sets, args.losses, args.output / "densities.png")
    print(f"The table and the picture are in {args.output}/")


if __name__ == "__main__":
    main()
