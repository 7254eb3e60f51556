r"""Contrastive divergence: an energy learns the shape of two moons.

The gradient of the log-likelihood of an energy is a difference of two means,

    grad log p(x) = - grad E(x)  +  mean over x' ~ p of grad E(x'),

the data pull the energy down where they are, draws x' of the model push it up where *they* are,
and when the two clouds look the same nothing moves any more. The draws, called negatives, come
from a Markov chain, and the ways to run it have names:

    CD-1          from the data, one transition: cheap, but the chain never gets far from the
                  data, so nothing pushes up the energy of places that no datum is near
    CD-10         from the data, ten transitions: sees farther
    persistent    chains go on from where they were at the last gradient, with a few restarts:
                  they drift far from the data, and find the places that the model is wrong about

The energy is a small network that tilts a broad Gaussian h, p(x) = h(x) exp(-E(x)) / Z. In the
plane log Z is a sum over a grid, so we can look at what training does not see: the density.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import torch

from pyro_ebm import UnnormalizedEnergy, fit
from pyro_ebm.datasets import two_moons
from pyro_ebm.losses import ContrastiveDivergence, gaussian_noise
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.plots import grid, plot_density, plot_samples

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- the model, and its training ---------------------------------------------------------------


class Moons:
    """An energy of points in the plane, and a Pyro model of data from it."""

    def __init__(self, data):
        self.net = MLPEnergy(2, hidden=(128, 128))
        self.base = gaussian_noise(data, width=2.0)  # h: like the data, and wider

    def density(self):
        return UnnormalizedEnergy(self.net, base=self.base)

    def __call__(self, x):
        pyro.module("energy", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.density(), obs=x)


def losses(batch_size):
    """Three ways to run the chains."""
    buffer = {"persistent": True, "num_chains": 2 * batch_size, "restart_prob": 0.05}
    return {
        "CD-1": ContrastiveDivergence(num_steps=1),
        "CD-10": ContrastiveDivergence(num_steps=10),
        "persistent CD-10": ContrastiveDivergence(num_steps=10, **buffer),
    }


def train(loss, data, num_steps, batch_size):
    """A trained model, and the gap E(data) - E(negatives) at each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Moons(data)
    fitted = fit(model, lambda x: None, loss, data, num_steps, batch_size, disable_progbar=True)
    return model, fitted.history["energy_data"] - fitted.history["energy_negatives"]


# ---- what training does not see ----------------------------------------------------------------


BOX = (-6.0, 6.0, -6.0, 6.0)


def log_normalizer(p):
    """A sum over a grid of the plane."""
    x, cell = grid(BOX, 300)
    with torch.no_grad():
        return (cell * p.unnormalized_log_prob(x).exp()).sum().log()


def picture(data, models, gaps, path):
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.6), layout="constrained")
    plot_samples(data[:2000], ax=axes[0]).set(title="data")
    for ax, (name, model) in zip(axes[1:], models.items()):
        plot_density(model.density(), ax, BOX, 300, vmax=0.3).set(title=f"{name}: the density")
    for ax in axes[:4]:
        ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[], aspect="equal")
    for name, gap in gaps.items():
        window = max(len(gap) // 40, 1)
        smooth = torch.tensor(gap).unfold(0, window, window).mean(-1)
        axes[4].plot(window * torch.arange(1, len(smooth) + 1), smooth, label=name)
    axes[4].axhline(0, color="black", lw=1, ls=":")
    axes[4].set(title="E(data) - E(negatives)", xlabel="step")
    axes[4].legend(fontsize="small", frameon=False)
    axes[4].spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Two moons by three contrastive divergences.")
    parser.add_argument("--num-steps", type=int, default=1000, help="gradient steps of each")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("examples/output/contrastive.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for tensors this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    data, held_out = two_moons(5000), two_moons(5000)
    models, gaps = {}, {}
    print(f"{'':18}seconds  acceptance  log Z   log-likelihood of held-out points, nats")
    for name, loss in losses(args.batch_size).items():
        start = time.perf_counter()
        models[name], gaps[name] = train(loss, data, args.num_steps, args.batch_size)
        seconds = time.perf_counter() - start
        p = models[name].density()
        log_z = log_normalizer(p)
        with torch.no_grad():
            likelihood = (p.unnormalized_log_prob(held_out) - log_z).mean()
        rate = loss.diagnostics["acceptance_rate"]
        print(f"{name:18}{seconds:7.0f}{rate:12.2f}{log_z:7.2f}{likelihood:9.3f}")
    with torch.no_grad():
        base = models["CD-1"].base.log_prob(held_out).mean()
    print(f"{'the Gaussian alone':18}{base:35.3f}")
    picture(data, models, gaps, args.output)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
