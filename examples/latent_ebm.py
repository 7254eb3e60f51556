r"""An energy as the prior of a latent: digits from a latent space that is not Gaussian.

A variational autoencoder draws z from a standard Gaussian, decodes it, and calls the result a
digit. But the codes z of real digits fill the Gaussian unevenly: ten clusters and empty space
between them, and whoever draws from the empty space decodes nonsense. So let the prior learn where
the codes are (Pang et al., 2020): an energy that tilts the Gaussian,

    p(z) = N(z; 0, I) exp(-E(z)) / Z            the prior; nobody knows Z
    p(x | z) = N(x; decoder(z), s)              the decoder
    q(z | x) = N(z; m(x), v(x))                 the guide, an inference network

The ELBO holds log p(z), and with it log Z, whose gradient is an expectation under the prior. That
is what `ContrastiveDivergence` supplies, in place of `Trace_ELBO`: persistent chains walk in the
latent space, where they are cheap. Decoder and guide see the energy through the ELBO as ever; the
model and the guide are written as ever, too.

Judged by precision (is a generated digit as near to a real one as real ones are to each other?)
and recall (has each real digit a generated one as near?), after Kynkaanniemi et al. (2019).
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import nn

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.losses import ContrastiveDivergence
from pyro_ebm.nn import MLPEnergy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCALE = 0.15  # s, in units of the grey scale 0..1


# ---- the model and the guide -------------------------------------------------------------------


def network(before, after, hidden=256):
    return nn.Sequential(
        nn.Linear(before, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, after),
    )  # fmt: skip


class Digits:
    """An autoencoder of 64 pixels, with a Gaussian prior or a learned one."""

    def __init__(self, dim, learned_prior):
        self.dim = dim
        self.encoder, self.decoder = network(64, 2 * dim), network(dim, 64)
        self.energy = MLPEnergy(dim, hidden=(128, 128)) if learned_prior else None

    def prior(self, num_steps=400):
        gaussian = dist.Normal(0.0, 1.0).expand([self.dim]).to_event(1)
        if self.energy is None:
            return gaussian
        return UnnormalizedEnergy(self.energy, base=gaussian, num_steps=num_steps)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        if self.energy is not None:
            pyro.module("energy", self.energy)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z).sigmoid(), SCALE).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_sd = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_sd.exp()).to_event(1))

    @torch.no_grad()
    def generate(self, n):
        z = self.prior().sample((n,))
        return z, self.decoder(z).sigmoid()


def train(digits, loss, x, num_steps, batch_size=128):
    pyro.clear_param_store()

    def rates(name):
        lr = 5e-4 if name.startswith("energy") else 1e-3
        return {"lr": lr, "lrd": 0.1 ** (1 / num_steps), "clip_norm": float("inf")}

    svi = SVI(digits.model, digits.guide, pyro.optim.ClippedAdam(rates), loss=loss)
    for _ in range(num_steps):
        svi.step(x[torch.randint(len(x), (batch_size,))])


# ---- the report --------------------------------------------------------------------------------


def coverage(points, others, k=5):
    """Share of ``others`` within the reach of a point: the distance to its k-th neighbour."""
    reach = torch.cdist(points, points).sort(dim=1).values[:, k]
    return (torch.cdist(others, points) < reach).any(1).float().mean().item()


def codes(digits, x):
    """One draw of the guide for each digit."""
    with torch.no_grad():
        mean, log_sd = digits.encoder(x).chunk(2, -1)
        return mean + log_sd.exp() * torch.randn_like(mean)


def picture(x, runs, path):
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    panels = {"real digits": x, **{name: run["x"] for name, run in runs.items()}}
    for ax, (name, images) in zip(top.subplots(1, 3), panels.items()):
        tiles = nn.functional.pad(images[:60].reshape(6, 10, 8, 8), (1, 1, 1, 1), value=0.4)
        ax.imshow(tiles.transpose(1, 2).reshape(60, 100), cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
    for ax, (name, run) in zip(bottom.subplots(1, 2), runs.items()):
        # the plane in which codes and draws of the prior differ most would flatter; take the
        # first principal plane of the codes
        mean = run["codes"].mean(0)
        plane = torch.linalg.svd(run["codes"] - mean, full_matrices=False).Vh[:2].T
        for points, color, label in (
            (run["z"], "tab:orange", "draws of the prior"),
            (run["codes"], "black", "codes of real digits"),
        ):
            ax.plot(*((points - mean) @ plane)[:1000].T, ".", ms=3, mew=0, alpha=0.7, color=color)
            ax.plot([], [], "o", color=color, label=label)
        ax.set(title=f"latent space, {name}", aspect="equal")
        ax.legend(fontsize="small", frameon=False, loc="upper right")
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Digits from a latent space with an energy.")
    parser.add_argument("--num-steps", type=int, default=2000, help="gradient steps of each")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--num-chains", type=int, default=256, help="persistent chains")
    parser.add_argument("--num-samples", type=int, default=900, help="digits to generate")
    parser.add_argument("--output", type=Path, default=Path("examples/output/latent_ebm.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for networks this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    x = x[torch.randperm(len(x))]
    train_x, test_x = x[:897], x[897:]

    contrast = ContrastiveDivergence(
        num_steps=10, persistent=True, num_chains=args.num_chains, restart_prob=0.05
    )
    losses = {"Gaussian prior": Trace_ELBO(), "energy prior": contrast}
    runs = {}
    print(f"{'':16}seconds  precision  recall   error of reconstruction")
    for name, loss in losses.items():
        pyro.set_rng_seed(0)
        digits = Digits(args.latent_dim, learned_prior=name == "energy prior")
        start = time.perf_counter()
        train(digits, loss, train_x, args.num_steps)
        seconds = time.perf_counter() - start
        z, generated = digits.generate(args.num_samples)
        runs[name] = {"z": z, "x": generated, "codes": codes(digits, test_x)}
        with torch.no_grad():
            again = digits.decoder(runs[name]["codes"]).sigmoid()
        error = (again - test_x).square().mean().sqrt().item()
        precision, recall = coverage(test_x, generated), coverage(generated, test_x)
        print(f"{name:16}{seconds:7.0f}{precision:11.2f}{recall:8.2f}{error:14.3f}")
    ideal = coverage(test_x, train_x), coverage(train_x, test_x)
    print(f"{'real digits':16}{ideal[0]:18.2f}{ideal[1]:8.2f}")
    picture(test_x, runs, args.output)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
