r"""Anomalies by their energy: where it works, and where it is fooled.

An energy is trained on normal digits alone, 0 to 7, and then asked about digits it has never seen
(8 and 9), digits with their middle wiped out, digits whose pixels are shuffled, and digits faded
towards the mean of all. Three scores of a point x, each larger for the more anomalous:

    energy       -log p(x) up to a constant: unlikely points. Famous for its failure (Nalisnick et
                 al., 2019): simple, smooth images can be *likelier* than any real one, because the
                 density of a point is not the mass of its neighbourhood.
    score norm   |grad log p(x)|: points that are not where a mode is.
    typicality   |E(x) - mean E of normal points|: too likely is suspicious, too. (The mean is taken
                 over some that did not train the energy: it flatters its own.)

Beside them stand two that need no energy: scikit-learn's isolation forest, and the distance to
the nearest normal digit. The energy is trained by denoising score matching: no sampling, no log Z.
Two thirds of the normal digits train all of them; the others, and the anomalies, are ranked. The
table holds the area under the ROC curve, which is the share of pairs (anomaly, normal digit) in
which the anomaly has the larger score: 0.5 is guessing, and less is being fooled.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.losses import DenoisingScoreMatching, gaussian_noise
from pyro_ebm.nn import MLPEnergy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- the data ----------------------------------------------------------------------------------


def images():
    """Normal digits to train on and to test with, and four kinds of anomalies, all (n, 64)."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    normal = torch.tensor(digits.target < 8)
    inliers = x[normal][torch.randperm(int(normal.sum()))]
    train, test = inliers[:960], inliers[960:]
    wiped = test.clone().reshape(-1, 8, 8)
    wiped[:, 3:5] = 0
    faded = 0.35 * test + 0.65 * train.mean(0)
    anomalies = {
        "unseen digits": x[~normal],
        "wiped": wiped.reshape(-1, 64),
        "shuffled": test[:, torch.randperm(64)],
        "faded": faded,
    }
    return train, test, anomalies


# ---- the energy --------------------------------------------------------------------------------


class Energy:
    """A network that tilts the Gaussian with the moments of the normal digits."""

    def __init__(self, x):
        self.net = MLPEnergy(64, hidden=(256, 256))
        self.base = gaussian_noise(x, width=1.0)

    def density(self):
        return UnnormalizedEnergy(self.net, base=self.base)

    def model(self, x):
        pyro.module("energy", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.density(), obs=x)


def train_energy(x, num_steps, sigma, batch_size=128):
    energy = Energy(x + sigma * torch.randn_like(x))
    rates = {"lr": 1e-3, "lrd": 0.05 ** (1 / num_steps), "clip_norm": float("inf")}
    loss = DenoisingScoreMatching(sigma=sigma)
    svi = SVI(energy.model, lambda x: None, pyro.optim.ClippedAdam(rates), loss=loss)
    for _ in range(num_steps):
        svi.step(x[torch.randint(len(x), (batch_size,))])
    return energy.density()


# ---- the scores --------------------------------------------------------------------------------


def scores(p, train, spared):
    """Functions of points, larger for the more anomalous."""

    @torch.no_grad()
    def energy(x):
        return -p.unnormalized_log_prob(x)

    typical = energy(spared).mean()  # of digits that did not train it: theirs is lower

    def neighbour(x):
        distance = torch.cdist(x, train)
        return distance.min(dim=1).values

    forest = IsolationForest(n_estimators=200, random_state=0).fit(train.numpy())
    return {
        "energy": energy,
        "score norm": lambda x: p.score(x).norm(dim=-1),
        "typicality": lambda x: (energy(x) - typical).abs(),
        "isolation forest": lambda x: torch.tensor(-forest.score_samples(x.numpy())),
        "nearest neighbour": neighbour,
    }


def auroc(score, normal, anomalies):
    values = torch.cat([score(normal), score(anomalies)])
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalies))])
    return roc_auc_score(labels.numpy(), values.numpy())


def picture(energy, normal, anomalies, path):
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    groups = {"normal": normal, **anomalies}
    grid = left.subplots(len(groups), 7, subplot_kw={"xticks": [], "yticks": []})
    for row, (name, x) in zip(grid, groups.items()):
        for ax, image in zip(row, x):
            ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    ax = right.subplots()
    values = {name: energy(x) for name, x in groups.items()}
    low = min(v.min() for v in values.values())
    high = max(v.quantile(0.98) for v in values.values())
    for name, v in values.items():
        style = {"color": "black", "lw": 2.5} if name == "normal" else {"lw": 1.5}
        ax.hist(
            v.clamp(max=high), torch.linspace(low, high, 60).tolist(), density=True,
            histtype="step", label=name, **style,
        )  # fmt: skip
    ax.set(title="energy: low is likely", xlabel="-log p(x), up to a constant", yticks=[])
    ax.legend(frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Finds anomalous digits by an energy.")
    parser.add_argument("--num-steps", type=int, default=3000, help="gradient steps")
    parser.add_argument("--sigma", type=float, default=0.15, help="noise, of the grey scale 0..1")
    parser.add_argument("--output", type=Path, default=Path("examples/output/anomaly.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for networks this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    train, test, anomalies = images()
    train, spared = train[160:], train[:160]
    start = time.perf_counter()
    p = train_energy(train, args.num_steps, args.sigma)
    print(
        f"{args.num_steps} steps of denoising score matching: {time.perf_counter() - start:.0f} s"
    )

    found = scores(p, train, spared)
    print(f"\nArea under the ROC curve\n{'':20}" + "".join(f"{n:>17}" for n in anomalies))
    for name, score in found.items():
        row = "".join(f"{auroc(score, test, x):17.3f}" for x in anomalies.values())
        print(f"{name:20}{row}")
    picture(found["energy"], test, anomalies, args.output)
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
