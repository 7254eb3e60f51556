r"""Flow-contrastive estimation: an energy and a flow teach each other.

Noise-contrastive estimation learns an energy by telling the data from noise, and learns most from
noise that is hard to tell from the data. So let the noise learn as well (Gao et al., 2020): a
normalizing flow q, whose draws and whose density are both at hand, plays against the energy p,

    V = mean over data of log sigma(G(x))  +  mean over x' ~ q of log sigma(-G(x')),
    G(x) = log p(x) - log q(x) ,        log p(x) = -E(x) - log Z ,

the energy to raise V, the flow to lower it. Where both have done their best, p = q = the data.

In Pyro the flow is what the *guide* samples at the name of the energy site, and one call of
`svi.step` is one move of one player: the energy while the classifier G is right about less than
`threshold` of the points, the flow while it is right more often. The flow first learns a little by
maximum likelihood, so that the game starts with a flow that covers the data.

The game gives two densities, both normalized: the flow, and the energy with its learned log Z. A
flow bends one Gaussian into eight, and cannot quite tear it: bridges of probability remain
between the modes, which the energy does not need.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.datasets import EightGaussians
from pyro_ebm.distributions.flow import FlowDistribution, fit_flow, neural_spline_flow
from pyro_ebm.losses import FlowNCE
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.plots import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- the two players ---------------------------------------------------------------------------


class Game:
    """The energy, a Pyro model; the flow, a guide."""

    def __init__(self):
        self.net = MLPEnergy(2, hidden=(128, 128))
        self.flow = neural_spline_flow(features=2, transforms=2)

    def energy(self):
        log_z = pyro.param("log_z", torch.tensor(0.0))
        return UnnormalizedEnergy(self.net, event_shape=(2,), log_normalizer=log_z)

    def model(self, x):
        pyro.module("energy", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.energy(), obs=x)

    def guide(self, x):
        pyro.module("flow", self.flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", FlowDistribution(self.flow()))


def rates(num_steps):
    """A learning rate for each player; all fall to a twentieth."""

    def of(name):
        lr = 7e-4 if name.startswith("flow") else 1e-2 if name == "log_z" else 3e-3
        # A loss is a sum over rows, in the hundreds: do not clip its gradient at 10.
        return {"lr": lr, "lrd": 0.05 ** (1 / num_steps), "clip_norm": float("inf")}

    return of


# ---- what training does not see ----------------------------------------------------------------


BOX = (-5.0, 5.0, -5.0, 5.0)


def picture(truth, densities, history, path):
    x = grid(BOX, 250)[0].reshape(-1, 2)
    figure, axes = plt.subplots(1, 2 + len(densities), figsize=(16, 3.5), layout="constrained")
    axes[0].plot(*truth.sample((1500,)).T, ".", ms=2, color="black", alpha=0.6, mew=0)
    axes[0].set(title="data")
    for ax, (name, density) in zip(axes[1:], densities.items()):
        with torch.no_grad():
            image = density(x).exp().reshape(250, 250)
        ax.imshow(image, origin="lower", extent=BOX, cmap="viridis", vmin=0, vmax=0.2)
        ax.set(title=name)
    for ax in axes[:-1]:
        ax.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xticks=[], yticks=[], aspect="equal")
    accuracy, log_z = torch.tensor(history).T
    axes[-1].plot(accuracy, color="tab:blue", lw=1)
    axes[-1].set(title="the game", xlabel="step", ylim=(0.4, 0.75))
    axes[-1].set_ylabel("accuracy, smoothed", color="tab:blue")
    twin = axes[-1].twinx()
    twin.plot(log_z, color="tab:red")
    twin.set_ylabel("learned log Z", color="tab:red")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Eight Gaussians by an energy against a flow.")
    parser.add_argument("--warm-up", type=int, default=200, help="likelihood steps of the flow")
    parser.add_argument("--num-steps", type=int, default=1500, help="moves of the game")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument(
        "--threshold", type=float, default=0.57, help="accuracy of a change of turn"
    )
    parser.add_argument("--output", type=Path, default=Path("examples/output/flow_nce.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for tensors this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    truth, game = EightGaussians(), Game()

    start = time.perf_counter()
    fit_flow(game.flow, truth.sample((20_000,)), args.warm_up, 500, disable_progbar=True)
    warm_flow = neural_spline_flow(features=2, transforms=2)
    warm_flow.load_state_dict(game.flow.state_dict())
    warmed = time.perf_counter() - start

    loss = FlowNCE(threshold=args.threshold, init_log_normalizer=True)
    optim = pyro.optim.ClippedAdam(rates(args.num_steps))
    svi = SVI(game.model, game.guide, optim, loss=loss)
    history, turns = [], 0
    for _ in range(args.num_steps):
        turns += loss.turn == "energy"
        svi.step(truth.sample((args.batch_size,)))
        history.append((loss.accuracy, pyro.param("log_z").item()))
    played = time.perf_counter() - start - warmed

    densities = {
        "the flow, warmed up": warm_flow().log_prob,
        "the flow, after the game": game.flow().log_prob,
        "the energy, after the game": game.energy().log_prob,
    }
    x, cell = grid(BOX, 250)
    held_out = truth.sample((5000,))
    with torch.no_grad():
        log_z = (cell * game.energy().unnormalized_log_prob(x).exp()).sum().log()
        print(f"{args.warm_up} steps of likelihood: {warmed:.0f} s")
        print(f"{args.num_steps} moves, {turns} of them the energy's: {played:.0f} s\n")
        print(f"{'':28}log-likelihood   error of log p (both of held-out points, nats)")
        for name, density in {**densities, "the data's own": truth.log_prob}.items():
            log_p = density(held_out)
            error = (log_p - truth.log_prob(held_out)).square().mean().sqrt()
            print(f"{name:28}{log_p.mean():14.3f}{error:17.3f}")
    print(f"\nlearned log Z {pyro.param('log_z').item():.3f}, by a grid {log_z:.3f}")
    picture(truth, densities, history, args.output)
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    main()
