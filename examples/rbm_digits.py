r"""Restricted Boltzmann machines on handwritten digits, beside scikit-learn's.

The digits of scikit-learn, 8 x 8 pixels that are black or white, three quarters to train on. With
16 hidden units a sum over 2^16 states gives log Z exactly, and so the log-likelihood of digits that
were not trained on, in nats a digit: the only judge that can be trusted. It is asked of

    independent pixels       each at its own frequency
    scikit-learn             BernoulliRBM: persistent contrastive divergence, plain gradient steps
    pyro_ebm                 the same with a centered machine, and Adam whose rate falls

with as many passes over the data, points in a batch, chains, and Gibbs sweeps in a step. Then the
hidden units of larger machines are features for a logistic regression; and then a second machine is
put on top of the first: a deep belief network, whose lower bound on the log-likelihood is compared
with the exact value of the first machine alone.
"""

import argparse
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import BernoulliRBM

from pyro_ebm.distributions import RBM, DeepBeliefNetwork, RBMModule
from pyro_ebm.losses import fit_layers, fit_rbm

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def split_digits():
    digits = load_digits()
    bits = (digits.data > 7).astype(np.float32)
    parts = train_test_split(bits, digits.target, test_size=0.25, random_state=0)
    return torch.tensor(parts[0]), torch.tensor(parts[1]), parts[2], parts[3]


# ---- the machines ------------------------------------------------------------------------------


def independent_pixels(train, *_):
    """A machine without hidden units that do anything: the frequencies of the pixels."""
    net = RBMModule(64, 1, train)
    return RBM(torch.zeros(64, 1), net.visible_bias.detach(), torch.zeros(1))


def scikit_learn(train, num_hidden, num_epochs):
    machine = BernoulliRBM(
        num_hidden, learning_rate=0.03, batch_size=10, n_iter=num_epochs, random_state=0
    ).fit(train.numpy())  # 0.03: the best of .01, .02, .03, .05, .1 at 60 passes
    parts = machine.components_.T, machine.intercept_visible_, machine.intercept_hidden_
    return RBM(*(torch.tensor(part, dtype=torch.float32) for part in parts))


def pyro_ebm(train, num_hidden, num_epochs):
    net = RBMModule(64, num_hidden, train, centered=True)
    fit_rbm(net, train, num_epochs, batch_size=10, lr=0.01, disable_progbar=True)
    return net.requires_grad_(False)()


NAMES = {
    independent_pixels: "independent pixels",
    scikit_learn: "scikit-learn",
    pyro_ebm: "pyro_ebm",
}


def log_likelihood(machine, x):
    """The mean over points, exact, in nats."""
    return machine.normalized(machine.exact_log_normalizer()).log_prob(x).mean().item()


def accuracy(features, train, test, train_labels, test_labels):
    """Of a logistic regression on features of the digits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=1000, C=10.0)
        model.fit(features(train).numpy(), train_labels)
    return model.score(features(test).numpy(), test_labels)


# ---- the report --------------------------------------------------------------------------------


def picture(machine, samples, test, path):
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    titles = ("filters: the weights of each hidden unit", "digits it was not trained on", "samples")
    for part, title, images in zip(
        figure.subfigures(1, 3, wspace=0.05), titles, (machine.weights.T[:16], test[:16], samples)
    ):
        part.suptitle(title)
        axes = part.subplots(4, 4, subplot_kw={"xticks": [], "yticks": []}).flat
        filters = title.startswith("filters")
        top = float(images.abs().max()) if filters else 1.0
        for ax, image in zip(axes, images):
            ax.imshow(
                image.reshape(8, 8),
                cmap="RdBu_r" if filters else "gray_r",
                vmin=-top if filters else 0,
                vmax=top,
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Boltzmann machines on handwritten digits.")
    parser.add_argument("--num-epochs", type=int, default=60, help="passes over the data")
    parser.add_argument("--num-hidden", type=int, default=16)
    parser.add_argument("--num-features", type=int, default=100, help="hidden units as features")
    parser.add_argument("--output", type=Path, default=Path("examples/output/rbm_digits.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # for machines this small, threads cost more than they bring
    pyro.set_rng_seed(0)
    train, test, train_labels, test_labels = split_digits()

    print(f"{args.num_hidden} hidden units: exact log-likelihood, nats a digit")
    print(f"{'':22}{'train':>8}{'test':>8}{'seconds':>9}")
    for fit in (independent_pixels, scikit_learn, pyro_ebm):
        start = time.perf_counter()
        machine = fit(train, args.num_hidden, args.num_epochs)
        seconds = time.perf_counter() - start
        values = log_likelihood(machine, train), log_likelihood(machine, test)
        print(f"{NAMES[fit]:22}{values[0]:8.2f}{values[1]:8.2f}{seconds:9.1f}")
    machine.num_steps = 2000  # Gibbs sweeps for each sample
    picture(machine, machine.sample((16,)), test, args.output)

    print("\nfeatures for a logistic regression: accuracy on the test digits")

    def of(machine):
        return lambda x: machine.hidden_given(x).mean

    labelled = train, test, train_labels, test_labels
    many = args.num_features
    theirs, large = (fit(train, many, args.num_epochs) for fit in (scikit_learn, pyro_ebm))
    for name, features in {
        "the pixels": lambda x: x,
        f"pyro_ebm, {args.num_hidden} units": of(machine),
        f"scikit-learn, {many} units": of(theirs),
        f"pyro_ebm, {many} units": of(large),
    }.items():
        print(f"  {name:26}{accuracy(features, *labelled):6.3f}")

    widths = (64, 2 * args.num_hidden, args.num_hidden)
    network = DeepBeliefNetwork(
        [RBMModule(64, widths[1], train, centered=True), RBMModule(*widths[1:], centered=True)]
    )
    settings = {"batch_size": 20, "lr": 0.01, "disable_progbar": True}
    fit_layers(network, train, num_epochs=args.num_epochs, **settings)
    network.requires_grad_(False)
    print(f"\na deep belief network of {widths} units")
    bound = network.lower_bound(test)
    print(f"  bound on the test log-likelihood{bound.mean():8.2f} nats a digit")
    print(f"  accuracy of its top as features {accuracy(network.transform, *labelled):8.3f}")
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
