"""The animation of the front page: an energy learns two moons, and its chains follow.

``python docs/_ext/front_page.py`` writes docs/_static/moons.gif: after more and more steps of
denoising score matching, the energy, and chains that Langevin steps carry along as it changes.
"""

from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from PIL import Image

from pyro_ebm import DenoisingScoreMatching, UnnormalizedEnergy, fit
from pyro_ebm.datasets import two_moons
from pyro_ebm.losses import gaussian_noise
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.plots import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXTENT = (-3.6, 3.6, -2.9, 2.9)
STEPS = [10, 20, 30, 40, 60, 80, 100, 130, 160, 200, 250, 300, 400, 500, 650, 800, 1000, 1200]


def frame(p, chains, step):
    """One picture: the energy as a landscape, and the chains on it."""
    x, _ = grid(EXTENT, 160)
    with torch.no_grad():
        log_p = p.unnormalized_log_prob(x)
    energy = (log_p.max() - log_p).clamp(max=12)
    figure, ax = plt.subplots(figsize=(4.8, 3.87))
    figure.subplots_adjust(0, 0, 1, 1)
    ax.contourf(*x.unbind(-1), energy, torch.linspace(0, 12, 19).tolist(), cmap="magma_r")
    ax.plot(*chains.T, ".", color="#1a5fb4", ms=4, mew=0, alpha=0.8)
    ax.text(0.02, 0.96, f"step {step}", transform=ax.transAxes, va="top", color="white", size=11)
    ax.set(xlim=EXTENT[:2], ylim=EXTENT[2:])
    ax.axis("off")
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return image


def main():
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    data = two_moons(5000)
    net = MLPEnergy(2)
    p = UnnormalizedEnergy(net, base=gaussian_noise(data, width=2.0))

    def model(x):
        pyro.module("energy", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    chains = gaussian_noise(data, width=2.0).sample((400,))
    frames = [frame(p, chains, 0)]

    def after(step, row):
        nonlocal chains
        for _ in range(2):
            drift = 0.01 * p.score(chains).detach()
            chains = chains + drift + (2 * 0.01) ** 0.5 * torch.randn_like(chains)
        if step in STEPS:
            frames.append(frame(p, chains, step))

    loss, options = DenoisingScoreMatching(0.15), {"average": None, "callbacks": [after]}
    fit(model, lambda x: None, loss, data, STEPS[-1], disable_progbar=True, **options)
    path = Path(__file__).parents[1] / "_static" / "moons.gif"
    colours = frames[-1].quantize(96)
    frames = [f.quantize(palette=colours, dither=Image.Dither.NONE) for f in frames]
    durations = [250] * (len(frames) - 1) + [3000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


if __name__ == "__main__":
    main()
