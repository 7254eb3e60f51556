r"""Noise-contrastive estimation: an energy *and its log Z*, by telling data from noise.

Mix the data with as many points of a noise whose density q is known, and ask of each point which
it was. The best classifier has the log odds log p(x) / q(x). So let the model be the classifier,

    G(x) = log p(x) - log q(x),    log p(x) = -E(x) - log Z ,

with log Z a parameter like any other, and train it to be right (Gutmann and Hyvarinen, 2010).
Where it is the best classifier, p is the density of the data, with the right constant: were log Z
too large, all points would look like noise.

In Pyro the noise is what the *guide* samples at the name of the energy site.

Everything depends on the noise. Three of them learn the same rings:

    narrow   half as wide as the data: where it never goes, nobody tells the energy anything
    matched  a Gaussian with the moments of the data, a little wider
    far      five times as wide: nearly every noise point is told apart at a glance

The classifier's accuracy tells: near 1/2 it can learn no more from this noise, near 1 there was
nothing to learn. In the plane the true log Z is a sum over a grid, and the learned one can be
compared with it.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.datasets import Rings
from pyro_ebm.losses import NCE, gaussian_noise
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.plots import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = Rings(noise=0.2, radii=(1.0, 2.5))

# ---- model and guide, and their training -------------------------------------------------------


class Energy:
    """An energy of points in the plane with a learned log Z: model and guide."""

    def __init__(self, noise):
        self.net = MLPEnergy(2, hidden=(128, 128))
        self.noise = noise

    def density(self):
        log_z = pyro.param("log_z", torch.tensor(0.0))
        return UnnormalizedEnergy(self.net, event_shape=(2,), log_normalizer=log_z)

    def model(self, x):
        pyro.module("energy", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.density(), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.noise)


def train(noise, data, num_steps, batch_size):
    """The trained density, its learned log Z, and the loss with its diagnostics."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    energy = Energy(noise)
    loss = NCE(noise_ratio=2, init_log_normalizer=True)

    def rates(name):  # log Z is one number, and may move faster than the network
        lr = 1e-2 if name == "log_z" else 5e-3
        # A loss is a sum over rows, in the hundreds: do not clip its gradient at 10.
        return {"lr": lr, "lrd": 0.05 ** (1 / num_steps), "clip_norm": float("inf")}

    svi = SVI(energy.model, energy.guide, pyro.optim.ClippedAdam(rates), loss=loss)
    accuracy = []
    for _ in range(num_steps):
        svi.step(data[torch.randint(len(data), (batch_size,))])
        accuracy.append(loss.diagnostics["accuracy"])
    with torch.no_grad():
        return energy.density(), torch.tensor(accuracy)


# ---- what training does not see ----------------------------------------------------------------


BOX = (-5.0, 5.0, -5.0, 5.0)


WHY = {
    "narrow": "outside it nothing was learned (grey)",
    "matched": "rings, and their log Z",
    "far": "too few points of it near the data",
}


def picture(data, fits, noises, path):
    x, _ = grid(BOX, 250)
    figure, axes = plt.subplots(1, 1 + len(fits), figsize=(14, 4.1), layout="constrained")
    panels = {"data": DATA.log_prob(x).exp()}
    for name, (p, _) in fits.items():
        density = p.log_prob(x).exp().detach()  # with the log Z it has learned
        # Where not one in 10,000 noise points falls in a unit square, the energy is a guess.
        unseen = noises[name].log_prob(x).exp() < 1e-4
        panels[name] = density.masked_fill(unseen, torch.nan)
    colors = plt.get_cmap("viridis").with_extremes(bad="0.75")
    for ax, (name, density) in zip(axes, panels.items()):
        ax.imshow(density, origin="lower", extent=BOX, cmap=colors, vmin=0, vmax=0.22)
        title = "the data and their density"
        if name == "data":
            ax.plot(*data[:800].T, ".", ms=2, color="white", alpha=0.6, mew=0)
        else:
            accuracy = fits[name][1][-100:].mean()
            title = f"{name} noise (dots): accuracy {accuracy:.2f}\n{WHY[name]}"
            ax.plot(*noises[name].sample((800,)).T, ".", ms=3, color="orange", alpha=0.8, mew=0)
        ax.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xticks=[], yticks=[])
        ax.set_title(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Rings in the plane, learned from three noises.")
    parser.add_argument("--num-steps", type=int, default=2500, help="gradient steps of each")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("examples/output/noises.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for tensors this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    data, held_out = DATA.draw(10_000), DATA.draw(5_000)
    noises = {
        "narrow": gaussian_noise(data, width=0.5),
        "matched": gaussian_noise(data, width=1.2),
        "far": gaussian_noise(data, width=5.0),
    }
    fits, (x, cell) = {}, grid(BOX, 250)
    truth = DATA.log_prob(held_out)
    print(f"{'noise':8}seconds  accuracy   log Z learned  by a grid   error of log p at the data")
    for name, noise in noises.items():
        start = time.perf_counter()
        fits[name] = p, accuracy = train(noise, data, args.num_steps, args.batch_size)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            error = (p.log_prob(held_out) - truth).square().mean().sqrt()
            log_z = (cell * p.unnormalized_log_prob(x).exp()).sum().log()
        rate = accuracy[-100:].mean()
        learned = p.log_normalizer
        print(f"{name:8}{seconds:7.0f}{rate:10.2f}{learned:16.2f}{log_z:11.2f}{error:21.2f}")
    print("\n(root mean square, in nats; the accuracy of a coin is 0.5)")
    picture(data, fits, noises, args.output)
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    main()
