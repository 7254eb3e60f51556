r"""A *learned* energy as a prior: one step of the score, or many of a chain?

A prior of images can be written down by hand. Here it is learned, from digits, by denoising score
matching: add noise to an image, y = x + sigma xi, and teach a network to point back. What it has
learned is the score of the *noised* images, and Tweedie's formula makes it an estimate at once:

    E[x | y] = y + sigma^2 grad log p_sigma(y)           p_sigma: the density of noised images

one gradient of one energy, and no sampling. But it is an answer to one question only: Gaussian
noise, of just this sigma, on every pixel. An energy of images with *less* noise s < sigma is a
prior like any other. Put it in a Pyro model, and the posterior answers whatever is asked:

    x ~ h(x) exp(-E(x)) / Z                        images with noise s; learned, and nobody knows Z
    y ~ N(x, sqrt(sigma^2 - s^2))                  more noise, on the pixels that are seen

Markov chains draw x, and Tweedie's step of size s^2 takes its little noise off. The table holds
the PSNR of both ways, and of the best linear guess (the posterior mean under a Gaussian prior with
the digits' moments): for noise on all pixels, which Tweedie's step alone can do; and for noise with
two columns of pixels missing, which it cannot.
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits

from pyro_ebm import MCMC, ChEESKernel, UnnormalizedEnergy, fit
from pyro_ebm.losses import DenoisingScoreMatching, gaussian_noise
from pyro_ebm.nn import MLPEnergy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE = 0.4  # sigma, of the images to restore, in units of the grey scale 0..1
SMALL = 0.2  # s, of the prior

# ---- the energies ------------------------------------------------------------------------------


def learn_energy(x, sigma, num_steps, batch_size=128):
    """An energy of digits with noise sigma: a network that tilts a Gaussian."""
    pyro.clear_param_store()
    net = MLPEnergy(64, hidden=(256, 256))
    density = UnnormalizedEnergy(net, base=gaussian_noise(x + sigma * torch.randn_like(x), 1.0))

    def model(x):
        pyro.module("energy", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", density, obs=x)

    loss = DenoisingScoreMatching(sigma=sigma)
    fit(model, lambda x: None, loss, x, num_steps, batch_size, lr=1e-3, disable_progbar=True)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return density


# ---- the estimates -----------------------------------------------------------------------------


def tweedie(density, y, sigma):
    """The posterior mean of each image, in one step of the score of the noised images."""
    return y + sigma**2 * density.score(y)


def linear(train, y, seen):
    """The posterior mean if images were Gaussian: m + C A' (A C A' + sigma^2)^-1 (y - A m)."""
    mean, cov = train.mean(0), train.T.cov()
    k = cov[:, seen] @ torch.linalg.inv(cov[seen][:, seen] + NOISE**2 * torch.eye(int(seen.sum())))
    return mean + (y[:, seen] - mean[seen]) @ k.T


def sampled(prior, y, seen, num_samples, num_chains):
    """The posterior mean of all images at once, by chains over a plate of images."""
    extra = math.sqrt(NOISE**2 - SMALL**2)

    def model(y):
        with pyro.plate("images", len(y)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x[:, seen], extra).to_event(1), obs=y[:, seen])

    kernel = ChEESKernel(model)  # the warmup is as long as the run
    mcmc = MCMC(kernel, num_samples, num_chains=num_chains, disable_progbar=True)
    mcmc.run(y)
    return tweedie(prior, mcmc.get_samples()["x"], SMALL).mean(0)


# ---- the report --------------------------------------------------------------------------------


def psnr(image, clean):
    """Peak signal-to-noise ratio in decibels, the mean over images."""
    return -10 * torch.log10((image - clean).square().mean(-1)).mean().item()


def picture(rows, path):
    columns = {}
    for kind, images in rows.items():
        for name, image in images.items():
            if image is not None:
                columns["clean" if name == "clean" else f"{kind}:\n{name}"] = image
    figure, axes = plt.subplots(
        4, len(columns), figsize=(12, 6.2), layout="constrained",
        subplot_kw={"xticks": [], "yticks": []},
    )  # fmt: skip
    for column, (name, images) in zip(axes.T, columns.items()):
        column[0].set_title(name)
        for ax, image in zip(column, images):
            ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Restores digits under a learned energy.")
    parser.add_argument("--num-steps", type=int, default=2500, help="gradient steps of each energy")
    parser.add_argument("--num-images", type=int, default=20, help="to restore")
    parser.add_argument("--num-samples", type=int, default=200, help="draws of each chain")
    parser.add_argument("--num-chains", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("examples/output/denoise.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for networks this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    x = x[torch.randperm(len(x))]
    clean, train = x[: args.num_images], x[200:]
    y = clean + NOISE * torch.randn_like(clean)

    start = time.perf_counter()
    noised = learn_energy(train, NOISE, args.num_steps)
    prior = learn_energy(train, SMALL, args.num_steps)
    print(f"two energies: {time.perf_counter() - start:.0f} s")

    everything = torch.ones(8, 8, dtype=torch.bool)
    stripe = everything.clone()
    stripe[:, 3:5] = False
    rows = {}
    for kind, seen in {"noise": everything.flatten(), "with a gap": stripe.flatten()}.items():
        start = time.perf_counter()
        rows[kind] = {
            "clean": clean,
            "seen": torch.where(seen, y, 0.5),
            "linear": linear(train, y, seen),
            "Tweedie": tweedie(noised, y, NOISE) if seen.all() else None,
            "chains": sampled(prior, y, seen, args.num_samples, args.num_chains),
        }
        print(f"\n{kind} ({time.perf_counter() - start:.0f} s): PSNR")
        for name, image in rows[kind].items():
            if name != "clean" and image is not None:
                print(f"  {name:10}{psnr(image, clean):6.2f} dB")
    picture(rows, args.output)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
