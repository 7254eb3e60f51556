r"""Anomalies by their energy: where it is the right tool, and where it is fooled.

An energy is trained on normal points alone, and then asked about points of another kind. Two scores
of a point x, each larger for the more anomalous:

    energy       -log p(x) up to a constant: unlikely points. Its famous failure (Nalisnick et al.,
                 2019): simple, smooth images can be *likelier* than any real one, because the
                 density of a point is not the mass of its neighbourhood.
    score norm   |grad log p(x)|: points that are not where a mode is.

Beside them stand three that need no energy: scikit-learn's isolation forest and local outlier
factor, and the distance to the nearest normal point. The energy tilts the Gaussian with the moments
of the data, and is trained by denoising score matching: no sampling, no log Z. The tasks:

    malignant    tumours among benign ones, 30 numbers each
    not a 1      other digits, where normal is a one; the same for an eight
    8 or 9       digits of two kinds, where the other eight kinds are normal
    faded        digits faded towards the mean of all of them

Where normal is one kind of image, of which a hundred examples tell the shape, the energy is the
right tool. Of eight kinds of digits at once the nearest neighbour knows more, an isolation forest
is enough for tumours, and faded digits fool the energy.

Of the normal points 60 % train all the scores; the others, and the anomalies, are ranked. The
table holds the area under the ROC curve, which is the share of pairs (anomaly, normal point) in
which the anomaly has the larger score: 0.5 is guessing, and less is being fooled.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor

from pyro_ebm import UnnormalizedEnergy, fit
from pyro_ebm.losses import DenoisingScoreMatching, gaussian_noise
from pyro_ebm.nn import MLPEnergy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- the data ----------------------------------------------------------------------------------


def tasks():
    """Names, normal points, and functions that make anomalies, given those held out."""
    cancer, digits = load_breast_cancer(), load_digits()
    x = torch.tensor(cancer.data, dtype=torch.float32)
    benign = torch.tensor(cancer.target == 1)
    yield "malignant", x[benign], lambda held_out: x[~benign]

    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    kind = torch.tensor(digits.target)
    for name, k in (("not a 1", 1), ("not an 8", 8)):
        yield name, images[kind == k], lambda held_out, k=k: images[kind != k]
    known = images[kind < 8]
    yield "8 or 9", known, lambda held_out: images[kind >= 8]
    yield "faded", known, lambda held_out: 0.35 * held_out + 0.65 * known.mean(0)


# ---- the energy --------------------------------------------------------------------------------


def train_energy(x, num_steps, sigma):
    """A network that tilts a Gaussian, trained on noised points."""
    net = MLPEnergy(x.shape[1], hidden=(128, 128))
    base = gaussian_noise(x + sigma * torch.randn_like(x), width=1.0)

    def model(batch):
        pyro.module("energy", net)
        with pyro.plate("data", len(x), subsample_size=len(batch)):
            pyro.sample("x", UnnormalizedEnergy(net, base=base), obs=batch)

    loss = DenoisingScoreMatching(sigma)
    fit(
        model,
        lambda batch: None,
        loss,
        x,
        num_steps=num_steps,
        batch_size=64,
        average=0.99,
        disable_progbar=True,
    )
    return UnnormalizedEnergy(net, base=base)


# ---- the scores --------------------------------------------------------------------------------


def scores(p, train):
    """Functions of points, larger for the more anomalous."""
    forest = IsolationForest(n_estimators=200, random_state=0).fit(train.numpy())
    outliers = LocalOutlierFactor(novelty=True).fit(train.numpy())
    return {
        "energy": lambda x: -p.unnormalized_log_prob(x).detach(),
        "score norm": lambda x: p.score(x).norm(dim=-1),
        "isolation forest": lambda x: -forest.score_samples(x.numpy()),
        "local outlier factor": lambda x: -outliers.score_samples(x.numpy()),
        "nearest neighbour": lambda x: torch.cdist(x, train).amin(dim=1),
    }


def auroc(score, normal, anomalies):
    values = np.concatenate([np.asarray(score(x)) for x in (normal, anomalies)])
    return roc_auc_score(np.r_[np.zeros(len(normal)), np.ones(len(anomalies))], values)


def areas(normal, make_anomalies, num_steps, sigma):
    """The area under the curve of each score, for one split of the normal points."""
    normal = normal[torch.randperm(len(normal))]
    train, held_out = normal.split([int(0.6 * len(normal)), len(normal) - int(0.6 * len(normal))])
    anomalies = make_anomalies(held_out)
    center = train.mean(0)
    # images have one unit, the measurements of a tumour one each
    scale = train.std() if normal.shape[1] == 64 else train.std(0)
    train, held_out, anomalies = ((x - center) / scale for x in (train, held_out, anomalies))
    p = train_energy(train, num_steps, sigma)
    return {name: auroc(s, held_out, anomalies) for name, s in scores(p, train).items()}


def picture(found, path):
    """A dot for the mean of each score, a line from the least to the largest of all seeds."""
    figure, axes = plt.subplots(1, len(found), figsize=(11, 2.6), sharey=True, layout="constrained")
    for ax, (task, areas) in zip(axes, found.items()):
        for place, (name, values) in enumerate(reversed(areas.items())):
            color = "C3" if name in ("energy", "score norm") else "0.4"
            ax.plot([min(values), max(values)], [place, place], color=color, lw=1.5)
            ax.plot(np.mean(values), place, "o", color=color)
        ax.set_yticks(range(len(areas)), list(reversed(areas)))
        ax.set_title(task)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("area under the ROC curve")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Finds anomalies by an energy.")
    parser.add_argument("--seeds", type=int, default=1, help="how many splits of each task")
    parser.add_argument("--num-steps", type=int, default=1500, help="gradient steps")
    parser.add_argument("--sigma", type=float, default=0.3, help="noise, in deviations of the data")
    parser.add_argument("--output", type=Path, default=Path("examples/output/anomaly.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for networks this small, threads cost more than they bring
    start = time.perf_counter()
    found = {}
    for task, normal, make_anomalies in tasks():
        for seed in range(args.seeds):
            pyro.set_rng_seed(seed)
            row = areas(normal, make_anomalies, args.num_steps, args.sigma)
            for name, area in row.items():
                found.setdefault(task, {}).setdefault(name, []).append(area)

    names = list(found["malignant"])
    many = args.seeds > 1
    print("Area under the ROC curve" + (f", mean and range of {args.seeds} seeds" if many else ""))
    width = 22 if many else 12
    print(f"{'':22}" + "".join(f"{task:>{width}}" for task in found))
    for name in names:
        cells = []
        for task in found:
            x = found[task][name]
            cells.append(f"{np.mean(x):.3f}" + (f" ({min(x):.3f}..{max(x):.3f})" if many else ""))
        print(f"{name:22}" + "".join(f"{cell:>{width}}" for cell in cells))
    picture(found, args.output)
    print(f"\n{time.perf_counter() - start:.0f} s; the picture is in {args.output}")


if __name__ == "__main__":
    main()
