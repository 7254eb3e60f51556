r"""A noisy handwritten digit, restored by an energy.

Images are smooth with a few sharp edges. As a prior on 8 x 8 images x this is a Markov random
field: every pair of neighbouring pixels i ~ j pays for its difference,

    E(x) = w  sum_{i~j} ( sqrt(d^2 + (x_i - x_j)^2) - d ),

a pseudo-Huber penalty, quadratic within a smooth region (differences below d) and linear across
an edge. Adding a constant to all pixels costs nothing, so exp(-E) alone has an infinite integral;
it *tilts* a normalized base instead, in which pixels are independent and mostly within 0..1:

    p(x) = N(x; 1/2, 1/2) exp(-E(x)) / Z        the prior; nobody knows Z
    p(y | x) = N(y; x, s)                       the image seen through noise
    p(x | y) ~ p(y | x) p(x)                    the posterior; Z is the same for every x

Three samplers draw from the posterior: Langevin and Metropolis-Hastings, many chains at once, and
Pyro's NUTS, one chain after another. They must agree.
"""

import argparse
import time
from pathlib import Path

import arviz as az
import matplotlib
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits

from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import NUTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE = 0.25  # s, in units of the grey scale 0..1
WEIGHT, EDGE = 1.5, 0.1  # w, d

# ---- the model ---------------------------------------------------------------------------------


def smooth_with_edges(x):
    """E(x), from images (*batch, 8, 8) to energies (*batch)."""

    def penalty(difference):
        return ((EDGE**2 + difference**2).sqrt() - EDGE).sum((-2, -1))

    return WEIGHT * (penalty(x.diff(dim=-1)) + penalty(x.diff(dim=-2)))


def model(y):
    base = dist.Normal(0.5, 0.5).expand([8, 8]).to_event(2)
    x = pyro.sample("x", UnnormalizedEnergy(smooth_with_edges, base=base))
    pyro.sample("y", dist.Normal(x, NOISE).to_event(2), obs=y)


# ---- the samplers ------------------------------------------------------------------------------


def samplers(num_samples, warmup_steps, num_chains):
    n, w = num_samples, warmup_steps
    # The random walk learns less from a step, but a step is cheaper: every tenth is kept.
    walk = MHKernel(model, full_mass=False)
    return {
        "Langevin": MCMC(LangevinKernel(model), n, w, num_chains=num_chains),
        "Metropolis-Hastings": MCMC(walk, 10 * n, 10 * w, num_chains=num_chains, thinning=10),
        "NUTS": MCMC(NUTS(model), max(n // 5, 4), max(w // 3, 4), num_chains=2),
    }


# ---- the report --------------------------------------------------------------------------------


def psnr(image, clean):
    """Peak signal-to-noise ratio in decibels, -10 log10 of the mean squared error."""
    return -10 * torch.log10((image - clean).square().mean()).item()


def report(clean, noisy, runs, seconds, pixels):
    """Prints a row for each sampler, then some pixels as each of them sees them."""
    rows, details = {}, {}
    for name, mcmc in runs.items():
        data = mcmc.to_arviz()
        worst = az.summary(data, kind="diagnostics", round_to="none")  # one row for each pixel
        bulk, tail = worst["ess_bulk"].min(), worst["ess_tail"].min()
        rows[name] = {
            "chains": mcmc.num_chains,
            "draws": mcmc.get_samples(group_by_chain=True)["x"].shape[1],
            "seconds": f"{seconds[name]:.1f}",
            "R-hat": f"{worst['r_hat'].max():.3f}",
            "bulk ESS": f"{bulk:.0f}",
            "tail ESS": f"{tail:.0f}",
            "bulk ESS/s": f"{bulk / seconds[name]:.1f}",
            "tail ESS/s": f"{tail / seconds[name]:.1f}",
            "PSNR": f"{psnr(mcmc.get_samples()['x'].mean(0), clean):.2f} dB",
        }
        details[name] = az.summary(data).loc[[f"x[{i}, {j}]" for i, j in pixels]]

    print(f"\nPSNR: noisy image {psnr(noisy, clean):.2f} dB, posterior means as below.")
    print("R-hat is the largest of the 64 pixels, the effective sample sizes are the smallest.\n")
    print(pd.DataFrame(rows).T.to_string())
    print("\nThe pixels with the largest, the median and the smallest posterior sd (az.summary):\n")
    by_pixel = pd.concat(details).swaplevel().sort_index(level=0, sort_remaining=False)
    print(by_pixel.to_string())


# ---- the picture -------------------------------------------------------------------------------

SHADES = {"Langevin": "Blues", "Metropolis-Hastings": "Oranges", "NUTS": "Greens"}


def picture(clean, noisy, runs, pixel, path):
    draws = {name: mcmc.get_samples(group_by_chain=True)["x"] for name, mcmc in runs.items()}
    figure = plt.figure(figsize=(13, 8.4), layout="constrained")
    images, chains = figure.subfigures(2, 1, height_ratios=(1, 2.1))

    panels = {"clean\n": clean, f"noisy, {psnr(noisy, clean):.1f} dB\n": noisy}
    for name, x in draws.items():
        mean = x.mean((0, 1))
        panels[f"posterior mean, {psnr(mean, clean):.1f} dB\n{name}"] = mean
    axes = images.subplots(1, 6, subplot_kw={"xticks": [], "yticks": []})
    for ax, (title, image) in zip(axes, panels.items()):
        ax.imshow(image, cmap="gray_r", vmin=-0.25, vmax=1.25)
        ax.set_title(title, fontsize=10)
    axes[5].imshow(sd := draws["Langevin"].std((0, 1)), cmap="magma")
    axes[5].plot(pixel[1], pixel[0], "s", ms=16, mew=2, mfc="none", mec="deepskyblue")
    axes[5].set_title(f"posterior sd, {sd.min():.2f} to {sd.max():.2f}\nLangevin", fontsize=10)

    grid = chains.subplots(2, 4)
    for (name, x), trace, rank in zip(draws.items(), *grid):
        shade = plt.get_cmap(SHADES[name])
        values = x[:, :, *pixel].numpy()
        shown = min(4, len(values))
        # A chain that has converged visits all ranks among the draws of all chains equally often.
        ranks = values.ravel().argsort().argsort().reshape(values.shape) / values.size
        for chain in range(shown):
            color = shade(0.4 + 0.5 * chain / shown)
            trace.plot(values[chain, :250], color=color, lw=0.7)
            density, edges = np.histogram(ranks[chain], bins=10, range=(0, 1), density=True)
            rank.stairs(density, edges, color=color, lw=1.6)
        rank.axhline(1, color="black", lw=1, ls=":")
        rank.set(ylim=(0, 2), xlabel="rank / number of draws")
        trace.set(title=f"{name}: traces", xlabel="draw", ylabel="marked pixel")
        rank.set(title=f"{name}: ranks", ylabel="density")

        marginal, means = grid[:, 3]
        style = {"color": shade(0.75), "label": name}
        marginal.hist(values.ravel(), 30, density=True, histtype="step", lw=1.6, **style)
        if name != "NUTS":
            nuts = draws["NUTS"].mean((0, 1)).flatten()
            means.plot(nuts, x.mean((0, 1)).flatten(), "o", mfc="none", **style)
    marginal.set(title="marked pixel, all samplers", xlabel="value", ylabel="density")
    marginal.set_ylim(top=1.5 * marginal.get_ylim()[1])
    marginal.legend(fontsize="small", frameon=False)
    means.axline((0.5, 0.5), slope=1, color="black", lw=1, ls=":")
    means.set(title="means of all 64 pixels", xlabel="NUTS", ylabel="ours")
    means.legend(fontsize="small", frameon=False)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


# ---- all together ------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Restores a noisy digit under an energy prior.")
    parser.add_argument("--digit", type=int, default=0, help="which image of load_digits")
    parser.add_argument("--num-samples", type=int, default=1000, help="draws kept of each chain")
    parser.add_argument("--warmup-steps", type=int, default=500)
    parser.add_argument("--num-chains", type=int, default=32)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("examples/output/quickstart.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for tensors this small, threads cost more than they bring
    pyro.set_rng_seed(args.seed)
    clean = torch.tensor(load_digits().images[args.digit] / 16, dtype=torch.float32)
    noisy = clean + NOISE * torch.randn(8, 8)

    runs, seconds = samplers(args.num_samples, args.warmup_steps, args.num_chains), {}
    for name, mcmc in runs.items():
        print(name)
        start = time.perf_counter()
        mcmc.run(noisy)
        seconds[name] = time.perf_counter() - start

    by_sd = runs["Langevin"].get_samples()["x"].std(0).flatten().argsort().tolist()
    pixels = [divmod(by_sd[k], 8) for k in (-1, 32, 0)]
    report(clean, noisy, runs, seconds, pixels)
    picture(clean, noisy, runs, pixels[0], args.output)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
