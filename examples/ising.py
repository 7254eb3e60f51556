r"""The Ising model by Gibbs sampling: order out of disorder as it cools.

Spins of -1 and 1 on a square lattice with the ends joined want to agree with their four neighbours,

    p(s) prop. to exp(1/T sum over edges of s_i s_j)

Hot, they point anywhere; below the critical temperature T = 2 / log(1 + sqrt 2) = 2.269 most point
the same way. A sweep draws half of the lattice given the other half, as on a checkerboard: two
steps, whatever its size. Two numbers of each lattice:

    alignment       the mean of s_i s_j over the edges, which is known exactly for every lattice:
                    the slope of log Z, in Kaufman's closed form (1949)
    magnetisation   the absolute value of the mean spin, known for the 4 x 4 lattice by the sum
                    over all 65,536 states, and for the infinite one by Yang's formula (1952),
                    (1 - sinh(2/T)^-4)^(1/8) below the critical temperature and 0 above. A small
                    lattice is far from infinite: |m| of 16 spins is not 0 even where they are hot

ArviZ judges the chains. Near the critical temperature whole regions turn over together, slowly, and
the effective sample size falls: *critical slowing down*.
"""

import argparse
import math
import time
from pathlib import Path

import arviz as az
import matplotlib
import pyro
import torch

from pyro_ebm import MCMC
from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
from pyro_ebm.mcmc import GibbsKernel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CRITICAL = 2 / math.log(1 + math.sqrt(2))


def ising(side, temperature):
    return BoltzmannMachine(torch.tensor(1 / temperature), edges=lattice_edges(side, side))


def exact_small(temperature):
    """The mean of |m| on the 4 x 4 lattice, over all states."""
    states = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * 16) - 1
    weights = (-ising(4, temperature).energy(states)).softmax(0)
    return (weights * states.mean(-1).abs()).sum().item()


def exact_infinite(temperature):
    """Yang's spontaneous magnetisation of the infinite lattice."""
    if temperature >= CRITICAL:
        return 0.0
    return (1 - math.sinh(2 / temperature) ** -4) ** 0.125


def exact_alignment(side, temperature):
    """The mean of s_i s_j over the edges: d log Z / dK over their number, at K = 1/T.

    2 Z = (2 sinh 2K)^(n n / 2) times the sum of four products over r = 0..n-1, of 2 cosh(n g_l / 2)
    and of 2 sinh(n g_l / 2), for l = 2r + 1 and l = 2r, with cosh g_l = cosh 2K coth 2K -
    cos(pi l / n) and g_0 = 2K + log tanh K.
    """
    n, k = side, torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    level = torch.arange(2 * n, dtype=torch.float64)
    c = (2 * k).cosh() / (2 * k).tanh() - (math.pi * level / n).cos()
    g = torch.cat([(2 * k + k.tanh().log())[None], c[1:].acosh()])
    terms = []
    for g_l in (g[1::2], g[0::2]):
        terms.append((2 * (n * g_l / 2).cosh()).log().sum())
        sinh = 2 * (n * g_l / 2).sinh()
        terms.append(sinh.abs().log().sum())
        sign = sinh.detach().sign().prod()
    signs = torch.stack([torch.ones_like(sign)] * 3 + [sign])
    terms = torch.stack(terms)
    top = terms.max().detach()
    log_z = n * n / 2 * (2 * (2 * k).sinh()).log() + top + (signs * (terms - top).exp()).sum().log()
    return (torch.autograd.grad(log_z, k)[0] / len(lattice_edges(n, n))).item()


def run(side, temperature, num_samples, num_chains):
    """|m| and the alignment of every draw, shape (chains, draws), and the last states."""
    kernel = GibbsKernel(ising(side, temperature))
    # half of the chains start with all spins up, half at random: they must meet in the middle
    start = 2.0 * torch.randint(2, (num_chains, side * side)) - 1
    start[: num_chains // 2] = 1
    mcmc = MCMC(
        kernel,
        num_samples,
        num_samples,
        {"x": start},
        num_chains=num_chains,
        disable_progbar=True,
        check_convergence=False,  # cold chains keep their sign: what has to converge is |m|
    )
    mcmc.run()
    spins = mcmc.get_samples(group_by_chain=True)["x"]
    i, j = lattice_edges(side, side).unbind(-1)
    aligned = (spins[..., i] * spins[..., j]).mean(-1)
    return spins.mean(-1).abs(), aligned, spins[:, -1].reshape(-1, side, side)


def picture(temperatures, found, states, path):
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    ax = left.subplots()
    fine = torch.linspace(min(temperatures), max(temperatures), 300).tolist()
    ax.plot(fine, [exact_infinite(t) for t in fine], color="black", label="infinite lattice, exact")
    ax.plot(
        temperatures, [exact_small(t) for t in temperatures], color="C0", label="4 x 4, exact sum"
    )
    for i, (side, rows) in enumerate(found.items()):
        means, errors = [row["mean"] for row in rows], [2 * row["error"] for row in rows]
        ax.errorbar(
            temperatures, means, errors, fmt="o", color=f"C{i}", ms=4, label=f"{side} x {side}"
        )
    ax.axvline(CRITICAL, color="gray", lw=1, ls=":")
    ax.set(xlabel="temperature", ylabel="mean |magnetisation|", ylim=(0, 1.05))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    axes = right.subplots(2, 2, subplot_kw={"xticks": [], "yticks": []}).flat
    for ax, (temperature, state) in zip(axes, states.items()):
        ax.imshow(state, cmap="gray", vmin=-1, vmax=1)
        ax.set_title(f"T = {temperature:.2f}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Magnetisation of the Ising model.")
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--num-samples", type=int, default=1000, help="sweeps of each chain")
    parser.add_argument("--num-chains", type=int, default=16)
    parser.add_argument("--num-temperatures", type=int, default=13)
    parser.add_argument("--output", type=Path, default=Path("examples/output/ising.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    temperatures = torch.linspace(1.5, 3.5, args.num_temperatures).tolist()
    found, states = {}, {}
    for side in args.sides:
        start = time.perf_counter()
        print(f"\n{side} x {side}\n{'':6}{'alignment':>10}{'exact':>8}{'z':>6}{'|m|':>10}", end="")
        print(f"{'error':>8}{'4 x 4 exact' if side == 4 else 'infinite':>13}{'ESS':>8}{'R-hat':>8}")
        found[side] = []
        for temperature in temperatures:
            m, aligned, last = run(side, temperature, args.num_samples, args.num_chains)
            data = az.convert_to_dataset({"m": m.numpy(), "aligned": aligned.numpy()})
            error = az.mcse(data)
            row = {
                "mean": m.mean().item(),
                "error": float(error["m"]),
                "ess": float(az.ess(data)["m"]),
                "r_hat": float(az.rhat(data)["m"]),
            }
            found[side].append(row)
            states[temperature] = last[-1]
            known = exact_small(temperature) if side == 4 else exact_infinite(temperature)
            truth, mean = exact_alignment(side, temperature), aligned.mean().item()
            z = (mean - truth) / float(error["aligned"])
            print(
                f"{temperature:6.2f}{mean:10.4f}{truth:8.4f}{z:6.1f}{row['mean']:10.3f}"
                f"{row['error']:8.4f}{known:13.3f}{row['ess']:8.0f}{row['r_hat']:8.3f}"
            )
        print(f"{time.perf_counter() - start:.0f} s")
    print("\nz: how many standard errors the alignment is from its exact value")
    picked = [temperatures[int(i * (len(temperatures) - 1))] for i in (0.2, 0.4, 0.5, 1.0)]
    picture(temperatures, found, {t: states[t] for t in picked}, args.output)
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    main()
