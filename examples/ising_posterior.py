r"""The coupling of an Ising model: a posterior with an unknown Z, the wrong one, and the exact one.

Spins of -1 and 1 on a square lattice with a free boundary have the density

    p(s | J) = exp(J sum over edges of s_i s_j) / Z(J),        J ~ Uniform(0, 1)

and of one picture of spins we ask for J. Z(J) is a sum over 2^100 states. Three answers:

* *exact*: a transfer matrix over the 1,024 states of a column gives Z(J) after all. It is the
  truth to compare with, and there is none for a larger lattice or another graph.
* *exchange*: for every proposed J an auxiliary picture is drawn by Gibbs sweeps, and J is accepted
  by how the two pictures would like to change places. No Z is needed.
* *naive*: leave Z out. pyro_ebm refuses to do so; it is told here that Z is constant. Then every
  aligned pair of spins argues for a larger J, and nothing argues against.
"""

import argparse
import time
from pathlib import Path

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import MCMC, ExchangeKernel, LangevinKernel, NormalizerError, UnnormalizedEnergy
from pyro_ebm.distributions import BoltzmannMachine, lattice_edges, spin

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def machine(coupling, side):
    edges = lattice_edges(side, side, periodic=False)
    return BoltzmannMachine(coupling, edges=edges, num_steps=500)


def model(x, side):
    coupling = pyro.sample("J", dist.Uniform(0.0, 1.0))
    pyro.sample("x", machine(coupling, side), obs=x)


def naive(x, side):
    coupling = pyro.sample("J", dist.Uniform(0.0, 1.0))
    energy = machine(coupling, side).energy
    p = UnnormalizedEnergy(energy, (side * side,), support=spin, constant_normalizer=True)  # wrong
    pyro.sample("x", p, obs=x)


def exact_log_z(grid, side):
    """The log Z(J) at the points of a grid, column by column of the lattice."""
    columns = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * side).double() - 1
    within, between = (columns[:, 1:] * columns[:, :-1]).sum(-1), columns @ columns.T
    log_z = []
    for coupling in grid:
        log_sum, weights = coupling * within, (coupling * between).exp()
        for _ in range(side - 1):
            top = log_sum.max()
            log_sum = top + (weights @ (log_sum - top).exp()).log() + coupling * within
        log_z.append(log_sum.logsumexp(0))
    return torch.stack(log_z)


def run(kernel, x, args):
    pyro.set_rng_seed(0)
    steps = (args.num_samples, args.warmup_steps)
    mcmc = MCMC(kernel, *steps, num_chains=args.num_chains, disable_progbar=True)
    start = time.perf_counter()
    mcmc.run(x, args.side)
    seconds = time.perf_counter() - start
    data = mcmc.to_arviz()
    draws = data["posterior"]["J"].values
    return draws, float(az.mcse(data)["J"]), float(az.rhat(data)["J"]), seconds


def row(name, mean, sd, error=None, r_hat=None, seconds=None):
    numbers = "" if error is None else f"{error:9.4f}{r_hat:8.3f}{seconds:8.1f} s"
    print(f"{name:12}{mean:8.4f}{sd:8.4f}{numbers}")


def panel(ax, grid, density, found, coupling):
    bins = np.linspace(0, 1, 81)
    for name, color in (("naive", "C3"), ("exchange", "C0")):
        ax.hist(found[name].ravel(), bins, density=True, color=color, alpha=0.45, lw=0)
    ax.plot(grid, density, color="black", lw=1.6)
    ax.axhline(1.0, color="gray", lw=1, ls=":")
    top = 1.5 * float(density.max())  # the naive one goes on
    ax.set(yticks=[], xlim=(0, 1), ylim=(0, top))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.plot(coupling, 0, "^", color="black", ms=8, clip_on=False, zorder=5)
    peak, height = float(grid[density.argmax()]), float(density.max())
    words = {"fontsize": 11, "va": "center"}
    beside = peak + 0.09
    ax.text(beside, 0.95 * height, "exact", color="black", **words)
    ax.text(beside, 0.75 * height, "ours: ExchangeKernel", color="C0", **words)
    ax.text(0.9, 0.95 * height, "Z left out", color="C3", ha="right", **words)
    ax.text(0.62, 1.25, "prior", color="gray", fontsize=9, va="bottom")


def main():
    parser = argparse.ArgumentParser(description="The posterior of the coupling of an Ising model.")
    parser.add_argument("--side", type=int, default=10)
    parser.add_argument("--couplings", type=float, nargs="+", default=[0.1, 0.4])
    parser.add_argument("--num-inner-steps", type=int, default=80, help="sweeps of an auxiliary")
    parser.add_argument("--num-samples", type=int, default=800)
    parser.add_argument("--warmup-steps", type=int, default=150)
    parser.add_argument("--num-chains", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("examples/output/ising_posterior.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    grid = (torch.arange(200).double() + 0.5) / 200
    log_z = exact_log_z(grid, args.side)
    edges = lattice_edges(args.side, args.side, periodic=False)
    figure, axes = plt.subplots(
        len(args.couplings), 2, figsize=(9, 2.9 * len(args.couplings)), width_ratios=(1, 3.2)
    )
    for (left, right), coupling in zip(axes.reshape(-1, 2), args.couplings, strict=True):
        pyro.set_rng_seed(1)
        x = machine(coupling, args.side).sample()
        products = x[edges[:, 0]] * x[edges[:, 1]]
        aligned = (products > 0).double().mean().item()
        print(f"\n{aligned:.0%} of the edges are aligned (data drawn at J = {coupling})")
        try:
            MCMC(LangevinKernel(model), 1, disable_progbar=True).run(x, args.side)
        except NormalizerError as error:
            print(f"LangevinKernel refuses: {str(error).partition('. ')[0]}\n")

        print(f"{'':12}{'mean':>8}{'sd':>8}{'error':>9}{'R-hat':>8}{'time':>10}")
        weights = (grid * products.sum() - log_z).softmax(0)
        mean = (weights * grid).sum()
        row("exact", mean, (weights * (grid - mean) ** 2).sum().sqrt())
        found = {}
        exchange = ExchangeKernel(model, num_inner_steps=args.num_inner_steps)
        for name, kernel in (("exchange", exchange), ("naive", LangevinKernel(naive))):
            found[name], *numbers = run(kernel, x, args)
            row(name, found[name].mean(), found[name].std(), *numbers)
        panel(right, grid, weights * len(grid), found, coupling)
        left.imshow(x.reshape(args.side, args.side), cmap="gray", vmin=-1, vmax=1)
        left.set(xticks=[], yticks=[])
        left.set_title(f"{aligned:.0%} of edges aligned", fontsize=10)
    right.set_xlabel("coupling J (the triangle: that of the data)", fontsize=11)
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
