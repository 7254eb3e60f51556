r"""An energy of images: draws, halves that are made up, and what it was never shown.

A small convolutional network is an energy E(x, sigma) of images with noise of any size: of those
that are nearly noise, and, at the smallest sigma, nearly of clean images. It has no decoder: the
gradient of the energy runs back through the convolutions, and is one.

    training     dual denoising score matching at all levels, on eight of ten classes. The weights
                 are averaged
    draws        Langevin steps down the levels, and at the end Tweedie's step, which takes the last
                 noise off; the animation makes the same draws, of the same noise, all through the
                 training
    in-painting  an ordinary Pyro model: an image that is latent, of which the upper half is seen.
                 Chains start where the levels lead, and differ where the lower half is open
    the unseen   images of the two classes that were held out of the training, and held-out images
                 of the eight, ranked by energy, score norm, distance to the nearest training image
                 and an isolation forest. The area under the ROC curve is the share of pairs that a
                 score ranks right; .5 is guessing

With --fashion FOLDER the images are clothes of 28 x 28 (Debian's package dataset-fashion-mnist has
them in /usr/share/datasets/fashion-mnist), and digits in 28 x 28 are a last row that nothing should
miss. Without it they are scikit-learn's digits of 8 x 8.
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from PIL import Image
from pyro.ops.stats import split_gelman_rubin
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from torch import nn

from pyro_ebm import (
    MCMC,
    ChEESKernel,
    DenoisingScoreMatching,
    datasets,
    fit,
    geometric_ladder,
    noise_conditional,
)
from pyro_ebm.mcmc import annealed_langevin
from pyro_ebm.plots import plot_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMALL = 0.1  # the smallest sigma, in spreads of a pixel
LADDER = geometric_ladder(20.0, SMALL, 24)

# ---- the data ----------------------------------------------------------------------------------


class Images:
    """Images of mean 0 and spread 1: of eight classes to train on and to test with, and others."""

    def __init__(self, fashion):
        parts = datasets.fashion_mnist(fashion) if fashion else datasets.digits()
        train, test = parts.train, parts.test
        seen, of_test = parts.train_labels < 8, parts.test_labels
        self.mean, self.spread = train[seen].mean(), train[seen].std()
        self.train = self.scaled(train[seen][torch.randperm(int(seen.sum()))])
        self.test = self.scaled(test[of_test < 8])
        self.others = {f"class {k}": self.scaled(test[of_test == k]) for k in (8, 9)}
        if fashion:
            digits = datasets.digits().test[:, None]
            self.others["digits"] = self.scaled(
                F.interpolate(digits, (28, 28), mode="bilinear")[:, 0]
            )
        self.shape = self.train.shape[1:]

    def scaled(self, pixels):
        return (pixels - self.mean) / self.spread

    def pixels(self, x):
        return (x * self.spread + self.mean).clamp(0, 1)


# ---- the energy --------------------------------------------------------------------------------


class NoisyConv(nn.Module):
    r"""E(x, sigma) = |x|^2 / 2 tau^2 + d log tau + f(x / tau, sigma) / sigma, tau^2 = 1 + sigma^2.

    Without the network f it is a Gaussian of spread 1, with noise. Each convolution's output is
    scaled and shifted by functions of log sigma.
    """

    def __init__(self, shape, channels):
        super().__init__()
        size = torch.tensor(shape)
        strides = [1]
        while size.max() > 4:  # from 28 to 14, 7 and 4; from 8 to 4
            size = (size + 1) // 2
            strides.append(2)
        strides.append(1)  # its outputs see all of the image
        widths = [1, *(channels * min(2**i, 4) for i in range(len(strides)))]
        convs = [
            nn.Conv2d(before, after, 3, stride, padding=1)
            for before, after, stride in zip(widths, widths[1:], strides)
        ]
        modulations = [nn.Linear(64, 2 * after) for after in widths[1:]]
        for conv, modulation in zip(convs, modulations):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(modulation.weight)  # so that no level differs at first
            nn.init.zeros_(modulation.bias)
        self.convs, self.modulations = nn.ModuleList(convs), nn.ModuleList(modulations)
        self.level = nn.Sequential(nn.Linear(33, 64), nn.SiLU())
        self.last = nn.Linear(widths[-1] * int(size.prod()), 1)
        self.register_buffer("frequencies", torch.randn(16))

    def forward(self, x, sigma):
        """Energies ``(*batch)`` of images ``(*batch, height, width)`` and levels ``(*batch)``."""
        d, batch, sigma = x.shape[-2:].numel(), sigma.shape, sigma.flatten()
        tau = (1 + sigma.square()).sqrt()
        x = x.reshape(len(sigma), 1, *x.shape[-2:]) / tau[:, None, None, None]
        log_sigma = sigma.log()[:, None]
        angles = log_sigma * self.frequencies
        level = self.level(torch.cat([log_sigma / 2, angles.cos(), angles.sin()], -1))
        h = x
        for conv, modulation in zip(self.convs, self.modulations):
            scale, shift = modulation(level)[..., None, None].chunk(2, 1)
            h = F.silu(conv(h) * (1 + scale) + shift)
        f = math.sqrt(d) * self.last(h.flatten(1)).squeeze(-1)
        energy = x.flatten(1).square().sum(-1) / 2 + d * tau.log() + f / sigma
        return energy.reshape(batch)


def train_energy(x, args, seed, draw=None):
    """The density of images at all levels, and the history of its training."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    net = NoisyConv(x.shape[1:], args.channels)
    density = noise_conditional(net, LADDER, event_shape=x.shape[1:])

    def model(x):
        pyro.module("energy", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", density, obs=x)

    loss = DenoisingScoreMatching(dual=True)
    callbacks = [] if draw is None else [lambda step, numbers: draw(density, step)]
    result = fit(
        model, lambda x: None, loss, x, args.num_steps, args.batch_size, lr=args.lr,
        average=0.995,
        callbacks=callbacks, disable_progbar=True,
    )  # fmt: skip
    return density, result.history


# ---- draws -------------------------------------------------------------------------------------


def clean(density, x):
    """The mean of images without the smallest noise, given those with it."""
    return x + SMALL**2 * density.score(x)


def draws(density, n, seed=0, steps_per_level=5):
    """Images down the levels. The same seed is the same noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = annealed_langevin(density, density.starting_points((n,)), steps_per_level)
        return clean(density, x)


class Film:
    """Draws of the same noise, at steps whose logarithms are evenly spaced."""

    def __init__(self, images, num_steps, num_frames):
        self.images, self.frames = images, []
        times = torch.linspace(math.log(5), math.log(max(num_steps, 5)), num_frames).exp()
        self.times = {round(float(t)) for t in times}

    def __call__(self, density, step):
        if step in self.times:
            self.add(density)

    def add(self, density):
        x = self.images.pixels(draws(density, 24))
        x = F.pad(x, (1, 1, 1, 1))
        height, width = x.shape[1:]
        sheet = x.reshape(4, 6, height, width).transpose(1, 2).reshape(4 * height, 6 * width)
        frame = Image.fromarray((255 * (1 - sheet)).byte().numpy())
        scale = 70 // height
        self.frames.append(
            frame.resize((scale * frame.width, scale * frame.height), Image.Resampling.NEAREST)
        )

    def save(self, path):
        durations = [200] * (len(self.frames) - 1) + [3000]
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


# ---- in-painting -------------------------------------------------------------------------------


def inpaint(density, seen, num_chains, num_samples):
    """Draws of whole images, of which the upper halves are seen, and how the chains agree."""
    top = seen.shape[-2]

    def model(seen):
        with pyro.plate("images", len(seen)):
            x = pyro.sample("x", density)
            pyro.sample("seen", dist.Normal(x[..., :top, :], SMALL).to_event(2), obs=seen)

    noise = torch.randn(num_chains, *seen.shape)  # which a chain sees at every level

    def lower_energy(lower, sigma):
        upper = (seen + sigma[..., None, None] * noise).expand_as(lower)
        return density.at(sigma).energy(torch.cat([upper, lower], -2))

    levels = noise_conditional(
        lower_energy, LADDER, event_shape=seen.shape[1:], batch_shape=noise.shape[:2]
    )
    (lower,) = annealed_langevin(levels, levels.starting_points((1,)))
    starts = torch.cat([seen + SMALL * noise, lower], -2)
    mcmc = MCMC(
        ChEESKernel(model), num_samples, num_chains=num_chains, initial_params={"x": starts},
        disable_progbar=True, check_convergence=False,
    )  # fmt: skip
    mcmc.run(seen)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    r_hat = split_gelman_rubin(x[..., top:, :])
    return clean(density, x.flatten(0, 1)).reshape(x.shape), r_hat


def fills(images, seen, truth, drawn):
    """The mean squared error of lower halves, by ways to fill them in; pixels from 0 to 1."""
    top = seen.shape[-2]
    upper, lower = images.train[:, :top].flatten(1), images.train[:, top:].flatten(1)
    y, mean = seen.flatten(1), images.train.mean(0).flatten()
    near = torch.cdist(y, upper).argmin(1)
    noise = SMALL**2 * torch.eye(upper.shape[1])
    cov = torch.cat([upper, lower], 1).T.cov()
    k = torch.linalg.solve(cov[: len(noise), : len(noise)] + noise, cov[: len(noise), len(noise) :])
    ways = {
        "mean image": mean[upper.shape[1] :].expand(len(y), -1),
        "nearest upper half": lower[near],
        "linear": mean[upper.shape[1] :] + (y - mean[: upper.shape[1]]) @ k,
        "one draw": drawn[0, -1, :, top:].flatten(1),
        "mean of the draws": drawn.flatten(0, 1).mean(0)[:, top:].flatten(1),
    }
    truth = images.pixels(truth[:, top:].flatten(1))
    return {name: (images.pixels(x) - truth).square().mean().item() for name, x in ways.items()}


# ---- the unseen --------------------------------------------------------------------------------


def in_parts(score, size=500):
    return lambda x: torch.cat([score(part) for part in x.split(size)])


def anomaly_scores(density, images):
    """Functions of images, larger for the more anomalous."""

    @torch.no_grad()
    def energy(x):
        return density.energy(x)

    def norm(p):
        return lambda x: p.score(x).flatten(1).norm(dim=-1)

    energy = in_parts(energy)
    typical = energy(images.train[:1000]).mean()
    train = images.train.flatten(1)
    forest = IsolationForest(n_estimators=200, random_state=0).fit(train.numpy())
    return {
        "energy": energy,
        "typicality": lambda x: (energy(x) - typical).abs(),
        "score norm": in_parts(norm(density)),
        "score norm, sigma 1": in_parts(norm(density.at(1.0))),
        "nearest neighbour": in_parts(lambda x: torch.cdist(x.flatten(1), train).min(1).values),
        "isolation forest": lambda x: torch.tensor(-forest.score_samples(x.flatten(1).numpy())),
    }


def auroc(normal, others):
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(others))])
    return roc_auc_score(labels.numpy(), torch.cat([normal, others]).numpy())


# ---- the report --------------------------------------------------------------------------------


def picture(images, sheet, truth, top, drawn, energies, path):
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.25, 1))
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    plot_images(images.pixels(sheet), left.subplots(), num_columns=6, **grey)
    left.suptitle("draws")
    seen = truth.clone()
    seen[:, top:] = -images.mean / images.spread
    rows = [truth, seen, *drawn[:4, -1], drawn.flatten(0, 1).mean(0)]
    columns = torch.stack(rows, 1)[:6].flatten(0, 1)
    plot_images(images.pixels(columns), middle.subplots(), num_columns=len(rows), **grey)
    middle.suptitle("an image, its upper half, four draws, their mean")
    ax = right.subplots()
    values = torch.cat(list(energies.values()))
    low, high = values.quantile(0.002).item(), values.quantile(0.98).item()
    for name, v in energies.items():
        style = {"color": "black", "lw": 2.5} if name == "eight classes" else {"lw": 1.5}
        bins = torch.linspace(low, high, 60).tolist()
        ax.hist(v.clamp(low, high), bins, density=True, histtype="step", label=name, **style)
    ax.set(xlabel="energy: low is likely", yticks=[])
    ax.legend(frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="An energy of images at all levels of noise.")
    parser.add_argument("--fashion", type=Path, help="folder of the files of Fashion-MNIST")
    parser.add_argument("--num-steps", type=int, default=3000, help="gradient steps")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--channels", type=int, default=16, help="of the first convolution")
    parser.add_argument("--seeds", type=int, default=1, help="trainings; the first one is shown")
    parser.add_argument("--frames", type=int, default=14, help="of the animation")
    parser.add_argument("--num-images", type=int, default=16, help="to fill in")
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=40, help="draws of each chain")
    parser.add_argument("--output", type=Path, default=Path("examples/output/image_energy.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    images = Images(args.fashion)
    film = Film(images, args.num_steps, args.frames)
    trained = []
    for seed in range(args.seeds):
        start = time.perf_counter()
        p, history = train_energy(images.train, args, seed, None if seed else film)
        sheet = draws(p, 36, steps_per_level=20)
        steepest = history["gradient_norm"][args.num_steps // 2 :].max()
        loss = history["loss"][-100:].mean() / args.batch_size / images.shape.numel()
        print(
            f"seed {seed}: {args.num_steps} steps in {time.perf_counter() - start:.0f} s, loss per"
            f" pixel {loss:.4f}, largest gradient of the second half {steepest:.3g}, spread of the"
            f" draws {sheet.std() / images.train.std():.2f} of the data's"
        )
        trained.append((p, sheet))
    density, sheet = trained[0]
    film.add(density)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    film.save(args.output.with_suffix(".gif"))

    top = images.shape[0] // 2
    truth = images.test[: args.num_images]
    start = time.perf_counter()
    drawn, r_hat = inpaint(density, truth[:, :top], args.num_chains, args.num_samples)
    seconds = time.perf_counter() - start
    print(
        f"\nin-painting, {seconds:.0f} s, R-hat over 1.1 of {(r_hat > 1.1).float().mean():.0%} of"
        " the pixels. Mean squared error"
    )
    for name, error in fills(images, truth[:, :top], truth, drawn).items():
        print(f"  {name:20}{error:8.4f}")

    print(f"\nArea under the ROC curve\n{'':25}" + "".join(f"{n:>9}" for n in images.others))
    scores = anomaly_scores(density, images)
    normal = images.test[:2000]
    for name, score in scores.items():
        of_normal = score(normal)
        row = "".join(f"{auroc(of_normal, score(x)):9.3f}" for x in images.others.values())
        print(f"{name:25}{row}")
    groups = {"eight classes": normal, **images.others}
    energies = {name: scores["energy"](x) for name, x in groups.items()}
    picture(images, sheet, truth, top, drawn, energies, args.output)
    print(f"\nThe picture is in {args.output}, the animation beside it")


if __name__ == "__main__":
    main()
