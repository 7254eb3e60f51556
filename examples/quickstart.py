r"""From points to a posterior: train an energy, sample it, measure log Z, use it as a prior.

The data are points of two moons. A network gives each point of the plane an energy E(x), and

    p(x) = h(x) exp(-E(x)) / Z,        h a wide Gaussian

is a Pyro distribution whose Z nobody knows. In a minute it is

    trained     by denoising score matching, in which Z does not appear
    sampled     by Hamiltonian chains that run side by side and share what they learn
    measured    log Z by annealed importance sampling, with its error
    a prior     of a point of which an instrument sees the horizontal place alone, with noise:
                an ordinary Pyro model with p inside. Its posterior has a part on each moon.

In the plane a sum over a grid says what each answer should be, and ArviZ says whether the chains
have converged.
"""

import argparse
import time
from pathlib import Path

import arviz as az
import matplotlib
import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import MCMC, ChEESKernel, UnnormalizedEnergy, estimate_log_normalizer, fit
from pyro_ebm.datasets import two_moons
from pyro_ebm.losses import DenoisingScoreMatching, gaussian_noise
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.plots import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEN, NOISE = 0.6, 0.25  # what the instrument shows, and its standard deviation
EXTENT = (-4.0, 4.0, -4.0, 4.0)

# ---- the energy, and two models ----------------------------------------------------------------


class Moons:
    """A network's energy, as the density of data and as the prior of one point."""

    def __init__(self, data):
        self.net = MLPEnergy(2)
        self.p = UnnormalizedEnergy(self.net, base=gaussian_noise(data, width=2.0))

    def data(self, x):
        pyro.module("energy", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.p, obs=x)

    def instrument(self, seen):
        x = pyro.sample("x", self.p)
        pyro.sample("seen", dist.Normal(x[..., 0], NOISE), obs=seen)


# ---- the steps ---------------------------------------------------------------------------------


def train(data, num_steps):
    moons = Moons(data)
    loss = DenoisingScoreMatching(0.15)
    fit(moons.data, lambda x: None, loss, data, num_steps=num_steps, disable_progbar=True)
    moons.net.requires_grad_(False)  # from here on it is a fixed density
    return moons


def sample(target, args, *data):
    """Draws of the site x, shape (chains, draws, 2), and the words on their convergence."""
    steps = (args.num_samples, args.warmup_steps)
    kernel = ChEESKernel(target)
    mcmc = MCMC(kernel, *steps, num_chains=args.num_chains, disable_progbar=True)
    mcmc.run(*data)
    judged = az.summary(mcmc.to_arviz(), var_names=["x"], kind="diagnostics", round_to="none")
    words = f"R-hat {judged['r_hat'].max():.3f}, effective draws {judged['ess_bulk'].min():,.0f}"
    return mcmc.get_samples(group_by_chain=True)["x"], words


@torch.no_grad()
def exact(p):
    """By a grid: the log unnormalized density, log Z, and the posterior."""
    x, cell = grid(EXTENT, 300)
    log_p = p.unnormalized_log_prob(x)
    posterior = log_p + dist.Normal(x[..., 0], NOISE).log_prob(torch.tensor(SEEN))
    posterior = posterior - (cell * posterior.exp()).sum().log()
    return x, log_p, (cell * log_p.exp()).sum().log().item(), posterior.exp()


# ---- the picture -------------------------------------------------------------------------------


def picture(data, moons, prior, posterior, estimate, path):
    x, log_p, log_z, truth = exact(moons.p)
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.2), layout="constrained")
    shared = {"xlim": (-3.6, 3.6), "ylim": (-3.6, 3.6), "xticks": [], "yticks": [], "aspect": 1}
    axes[0].plot(*data[:1500].T, ".", ms=3, color="0.15", alpha=0.6, mew=0)
    axes[0].set(title="the data", **shared)

    energy = (log_p.max() - log_p).clamp(max=14)
    levels = torch.linspace(0, 14, 22).tolist()
    axes[1].contourf(*x.unbind(-1), energy, levels, cmap="magma_r")
    axes[1].set(title="1. train: their energy", **shared)

    axes[2].contour(*x.unbind(-1), energy, levels[:9], cmap="magma_r", linewidths=0.6)
    axes[2].plot(*prior.flatten(0, 1)[::7][:2500].T, ".", ms=2.5, color="C0", alpha=0.5, mew=0)
    error = f"{estimate.value:.2f} ± {estimate.std_error:.2f}"
    axes[2].set(title=f"2. sample it\n3. log Z: {error}, exact {log_z:.2f}", **shared)

    points = posterior.flatten(0, 1)
    axes[3].axvspan(SEEN - 2 * NOISE, SEEN + 2 * NOISE, color="C1", alpha=0.18, lw=0)
    axes[3].axvline(SEEN, color="C1", lw=1.2)
    axes[3].contour(*x.unbind(-1), energy, levels[:9], cmap="Greys_r", linewidths=0.5, alpha=0.6)
    axes[3].plot(*points[::7][:2500].T, ".", ms=2.5, color="C0", alpha=0.5, mew=0)
    axes[3].set(
        title="4. as a prior: a point seen at the line,\nwith noise; how high is it?", **shared
    )
    side = axes[3].inset_axes([1.0, 0, 0.28, 1], sharey=axes[3])
    height, width = x[:, 0, 1], 8.0 / truth.shape[1]
    style = {"orientation": "horizontal", "histtype": "stepfilled", "color": "C0", "alpha": 0.45}
    side.hist(points[:, 1], 90, range=(-3.6, 3.6), density=True, label="drawn", **style)
    side.plot(truth.sum(1) * width, height, color="black", lw=1.3, label="exact")
    side.set(xticks=[], yticks=[], ylim=(-3.6, 3.6))
    side.legend(frameon=False, fontsize="small", loc="upper right")
    side.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- all together ------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="An energy, trained, sampled and used as a prior.")
    parser.add_argument("--num-steps", type=int, default=1500, help="gradient steps of training")
    parser.add_argument("--num-samples", type=int, default=2000, help="draws kept of each chain")
    parser.add_argument("--warmup-steps", type=int, default=300)
    parser.add_argument("--num-chains", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("examples/output/quickstart.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for tensors this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    data, start = two_moons(5000), time.process_time()

    def say(what, words):
        print(f"{what:18}{words:42}{time.process_time() - start:6.1f} s")

    moons = train(data, args.num_steps)
    say("trained", f"{args.num_steps} steps of denoising score matching")
    prior, words = sample(moons.p, args)
    say("sampled", words)
    estimate = estimate_log_normalizer(moons.p, "ais", num_chains=4000, disable_progbar=True)
    log_z = exact(moons.p)[2]
    say("log Z", f"{estimate.value:.3f} +- {estimate.std_error:.3f}, exact {log_z:.3f}")
    posterior, words = sample(moons.instrument, args, torch.tensor(SEEN))
    say("posterior", words)

    x, _, _, truth = exact(moons.p)
    upper = (truth * (x[..., 1] > 0)).sum() / truth.sum()
    drawn = (posterior[..., 1] > 0).float().mean()
    print(f"\nThe point is on the upper moon with probability {drawn:.3f}, exact {upper:.3f}")
    picture(data, moons, prior, posterior, estimate, args.output)
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    main()
