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

What it brings is measured in nats, by the log-likelihood of held-out digits: an average over draws
of the guide, weighted by importance (Burda et al., 2016). In a latent space this small log Z can be
had in the same way.
"""

import argparse
import math
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
from pyro_ebm.losses import ContrastiveDivergence, gaussian_noise
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
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))

    def likelihood(self, z):
        return dist.Normal(self.decoder(z).sigmoid(), SCALE).to_event(1)

    def posterior(self, x):
        mean, log_sd = self.encoder(x).chunk(2, -1)
        return dist.Normal(mean, log_sd.exp()).to_event(1)

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


def log_mean_exp(x, dim):
    return x.logsumexp(dim) - math.log(x.shape[dim])


@torch.no_grad()
def log_normalizer(digits, z, n=50_000):
    """Log Z = log E_q[h exp(-E) / q], q a Gaussian like the codes z and wider; its ESS."""
    if digits.energy is None:
        return torch.tensor(0.0), n
    q = gaussian_noise(z, width=1.3)
    points = q.sample((n,))
    log_weight = digits.prior().unnormalized_log_prob(points) - q.log_prob(points)
    ess = (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()
    return log_mean_exp(log_weight, 0), float(ess)


@torch.no_grad()
def log_likelihood(digits, x, log_z, n=100):
    """Log p(x) = log E_q[p(x | z) p(z) / q(z | x)] of each digit."""
    q = digits.posterior(x)
    z = q.sample((n,))
    prior = digits.prior()
    log_prior = (prior.log_prob if digits.energy is None else prior.unnormalized_log_prob)(z)
    log_weight = digits.likelihood(z).log_prob(x) + log_prior - log_z - q.log_prob(z)
    return log_mean_exp(log_weight, 0)


def picture(x, runs, path):
    (_, first), (_, second) = runs.items()
    names = list(runs)
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 7.4), layout="constrained")
    panels = {
        "real digits": x,
        f"generated, {names[0]}": first["x"],
        f"generated, {names[1]}": second["x"],
        "the real digits from their codes": second["again"],
    }
    for ax, (name, images) in zip(axes.flat, panels.items()):
        tiles = nn.functional.pad(images[:80].reshape(8, 10, 8, 8), (1, 1, 1, 1), value=0.4)
        ax.imshow(tiles.transpose(1, 2).reshape(80, 100), cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
    for ax, (name, run) in zip(axes[1, 1:], runs.items()):
        mean = run["codes"].mean(0)
        plane = torch.linalg.svd(run["codes"] - mean, full_matrices=False).Vh[:2].T
        for points, color, label in (
            (run["codes"], "black", "codes of real digits"),
            (run["z"], "tab:orange", "draws of the prior"),
        ):
            ax.plot(*((points - mean) @ plane)[:900].T, ".", ms=4, mew=0, alpha=0.6, color=color)
            ax.plot([], [], "o", color=color, label=label)
        ax.set_title(f"latent space, {name}")
        ax.legend(fontsize="small", frameon=False, loc="upper right")
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Digits from a latent space with an energy.")
    parser.add_argument("--num-steps", type=int, default=1500, help="gradient steps of each")
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
    print(f"{'':16}seconds  held-out log-likelihood, nats   log Z (effective sample size)")
    for name, loss in losses.items():
        pyro.set_rng_seed(0)
        digits = Digits(args.latent_dim, learned_prior=name == "energy prior")
        start = time.perf_counter()
        train(digits, loss, train_x, args.num_steps)
        seconds = time.perf_counter() - start
        z, generated = digits.generate(args.num_samples)
        with torch.no_grad():
            codes = digits.posterior(test_x).sample()
            again = digits.decoder(codes).sigmoid()
        runs[name] = {"z": z, "x": generated, "codes": codes, "again": again}
        log_z, ess = log_normalizer(digits, codes)
        log_p = log_likelihood(digits, test_x, log_z)
        error = log_p.std() / len(log_p) ** 0.5
        print(f"{name:16}{seconds:7.0f}{log_p.mean():14.2f} +- {error:.2f}", end="")
        print(f"{log_z:24.2f} ({ess:.0f})" if name == "energy prior" else "")
    picture(test_x, runs, args.output)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
