r"""Score matching: fit the slope of the log density, in which log Z does not appear.

The score s(x) = grad log p(x) = -grad E(x) of a model needs no Z. Its distance to the score of the
data, mean |grad log p_data - s|^2 / 2, looks as if one had to know the data's density; integrated
by parts (Hyvarinen, 2005) it becomes, up to a constant,

    J = mean over the data of  div s(x) + |s(x)|^2 / 2 :

at the data, the score shall vanish, and flow in from all sides. Nothing is sampled. Three ways:

    exact       the divergence, a second derivative for each dimension
    sliced      along a random direction v, v' (grad s) v: one second derivative in any dimension
    denoising   no second derivative: add noise, x + sigma xi, and predict it, s = -xi / sigma.
                It fits the data's density blurred by sigma: small is exact but noisy, large is
                easy but blurred.

What no score matching sees is how much mass a mode has when no data lie between it and the
others: the slopes are right on both sides of the gap, and say nothing of the difference in height.
The data here are a bow and, far from it, a group with a fifth of the mass. The table says what
the fits make of that fifth, and what helps: noise wide enough to fill the gap.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import UnnormalizedEnergy, fit
from pyro_ebm.losses import (
    DenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
    gaussian_noise,
)
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.ops.score import score
from pyro_ebm.plots import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- the data: a bow of two arms and, apart from it, a group with a fifth of the mass -----------

FAR = 0.2


def data_density():
    """Ten Gaussians along a bow, and one far away."""
    angle = torch.linspace(0.0, torch.pi, 10)
    bow = 2 * torch.stack([angle.cos(), angle.sin()], -1) - torch.tensor([0.0, 0.3])
    means = torch.cat([bow, torch.tensor([[0.0, -2.7]])])
    weights = torch.cat([torch.full((10,), (1 - FAR) / 10), torch.tensor([FAR])])
    parts = dist.Normal(means, 0.3).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(weights), parts)


# ---- the model, and its training ---------------------------------------------------------------


class Energy:
    """An energy of points in the plane, and a Pyro model of data from it."""

    def __init__(self, data):
        self.net = MLPEnergy(2, hidden=(128, 128))
        self.base = gaussian_noise(data, width=2.0)

    def density(self):
        return UnnormalizedEnergy(self.net, base=self.base)

    def __call__(self, x):
        pyro.module("energy", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.density(), obs=x)


LOSSES = {
    "exact": ScoreMatching(),
    "sliced": SlicedScoreMatching(),
    "denoising 0.1": DenoisingScoreMatching(sigma=0.1, control_variate=True),
    "denoising 0.5": DenoisingScoreMatching(sigma=0.5),
}


def train(loss, data, num_steps, batch_size):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Energy(data)
    fit(model, lambda x: None, loss, data, num_steps, batch_size, disable_progbar=True)
    return model


# ---- what training does not see ----------------------------------------------------------------


BOX = (-5.0, 5.0, -5.0, 5.0)


@torch.no_grad()
def on_the_plane(p):
    """The normalized density on the grid: in two dimensions, log Z is a sum."""
    x, cell = grid(BOX, 250)
    log_p = p.unnormalized_log_prob(x) if isinstance(p, UnnormalizedEnergy) else p.log_prob(x)
    return log_p - (cell * log_p.exp()).sum().log()


def picture(truth, models, masses, path):
    names = {"data": truth, **{name: model.density() for name, model in models.items()}}
    figure, axes = plt.subplots(1, len(names), figsize=(16, 3.9), layout="constrained")
    for ax, (name, p) in zip(axes, names.items()):
        density = on_the_plane(p).exp()
        ax.imshow(density, origin="lower", extent=BOX, cmap="viridis", vmax=0.35)
        x = grid((-4, 4, -4, 4), 17)[0]
        s = score(p.unnormalized_log_prob if name != "data" else truth, x)
        s = s / s.norm(dim=-1, keepdim=True)  # directions only
        ax.quiver(*x.unbind(-1), *s.unbind(-1), color="white", alpha=0.7, scale=26, width=0.005)
        ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[])
        ax.axhline(-1.5, color="white", lw=0.8, ls=":")
        mass = masses.get(name, FAR)
        wrong = abs(mass - FAR) > 0.25 * FAR
        below = f"below the line {mass:.2f} of the mass" + (f", not {FAR:.2f}" if wrong else "")
        ax.set_title(f"{name}\n{below}", fontsize=11, color="C3" if wrong else "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="A density in the plane by score matching.")
    parser.add_argument("--num-steps", type=int, default=1200, help="gradient steps of each")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("examples/output/scores.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for tensors this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    truth = data_density()
    data, held_out = truth.sample((5000,)), truth.sample((2000,))
    true_score = score(truth, held_out)
    exact, (x, cell) = on_the_plane(truth), grid(BOX, 250)
    far = x[..., 1] < -1.5
    models, masses = {}, {}
    print(f"{'':15}seconds  score error  KL(data || model)  mass of the far group ({FAR})")
    for name, loss in LOSSES.items():
        start = time.perf_counter()
        models[name] = train(loss, data, args.num_steps, args.batch_size)
        seconds = time.perf_counter() - start
        p = models[name].density()
        error = (p.score(held_out) - true_score).square().sum(-1).mean().sqrt()
        log_p = on_the_plane(p)
        kl = (cell * exact.exp() * (exact - log_p)).sum()
        masses[name] = mass = (cell * log_p.exp())[far].sum().item()
        print(f"{name:15}{seconds:7.0f}{error:13.2f}{kl:19.3f}{mass:24.2f}")
    size = true_score.square().sum(-1).mean().sqrt()
    print(f"\nThe true score has size {size:.2f} (root mean square, at the data).")
    picture(truth, models, masses, args.output)
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    main()
