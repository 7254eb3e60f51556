r"""How likely are digits under a Boltzmann machine? Its log Z, squeezed from both sides.

A restricted Boltzmann machine is trained on the digits of scikit-learn, 8 x 8 pixels that are black
or white. With 16 hidden units its log Z is a sum over 2^16 states, and known. Annealed importance
sampling does without the sum, and works for machines of any size:

    forward     from independent pixels to the machine: too low, on average
    in reverse  from draws of the machine back to independent pixels: too high

Few temperatures leave a gap, many close it, and the exact value lies in between: widely between the
means of what single chains say, and closely between the logs of the mean weights of all. Where no
exact draws are to be had, data take their place, as far as the machine has learned to draw data.
Then the same for a machine too large for any sum, whose likelihood of
digits it was not trained on is compared with that of the small one.
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

from pyro_ebm.distributions import RBMModule
from pyro_ebm.losses import fit_rbm
from pyro_ebm.normalizer import (
    UnreliableEstimateWarning,
    estimate_log_normalizer,
    mean_log_likelihood,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEMPERATURES = [5, 10, 20, 50, 100, 200, 500, 1000, 2000]


def split_digits():
    bits = torch.tensor((load_digits().data > 7).astype(np.float32))
    bits = bits[torch.randperm(len(bits))]
    return bits[:1300], bits[1300:]


def trained(train, num_hidden, num_epochs):
    net = RBMModule(64, num_hidden, train, centered=True)
    fit_rbm(net, train, num_epochs, batch_size=10, lr=0.01, disable_progbar=True)
    return net.requires_grad_(False)()


def estimate(machine, method="ais", **kwargs):
    """An estimate, and whether it came with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreliableEstimateWarning)
        found = estimate_log_normalizer(machine, method, disable_progbar=True, **kwargs)
    return found, bool(caught)


# ---- the report --------------------------------------------------------------------------------


def squeeze(machine, exact, draws, data, counts):
    """Both directions at more and more temperatures, from draws of the machine and from data."""
    print(f"{'':12}{'one chain, mean':^20}{'all chains':^20}")
    print(f"{'temperatures':12}", *(f"{name:>9}" for name in ["lower", "upper"] * 2), end="")
    print(f"{'error':>8}{'ESS':>6}{'from data':>11}{'s':>7}")
    rows = []
    for num in counts:
        start = time.perf_counter()
        forward, warned = estimate(machine, num_chains=len(draws), num_temperatures=num)
        reverse, also = estimate(machine, "reverse_ais", samples=draws, num_temperatures=num)
        seconds = time.perf_counter() - start
        from_data, _ = estimate(machine, "reverse_ais", samples=data, num_temperatures=num)
        row = [
            float(bound) - exact
            for bound in (
                forward.log_weights.mean(),  # what one chain says of log Z, on average
                -reverse.log_weights.mean(),
                forward.value,
                reverse.value,
                from_data.value,
            )
        ]
        print(f"{num:12}", *(f"{bound:+9.3f}" for bound in row[:4]), end="")
        print(f"{forward.std_error:8.3f}{forward.ess:6.0f}{row[4]:+11.3f}{seconds:7.2f}", end="")
        print("  (warned)" if warned or also else "")
        rows.append((num, row, forward))
    return rows


def picture(rows, exact, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    nums, chains = [num for num, _, _ in rows], len(rows[0][2].log_weights)
    low, high, lower, upper, data = np.array([row for _, row, _ in rows]).T
    errors = [float(found.std_error) for _, _, found in rows]
    left.axhline(0, color="k", lw=1, label="exact")
    left.fill_between(nums, low, high, color="C0", alpha=0.15, label="between single chains")
    left.plot(nums, upper, "v-", color="C1", label=f"in reverse, {chains} chains")
    left.plot(nums, data, "v:", color="C2", label="in reverse, from data")
    left.errorbar(nums, lower, errors, fmt="^-", color="C0", label=f"forward, {chains} chains")
    left.set(xscale="log", xlabel="temperatures", ylabel="log Z minus the exact value, nats")
    left.set_yscale("symlog", linthresh=0.1)
    left.legend(fontsize=8)
    left.set_title("the sandwich closes")
    for (num, _, found), color in zip(
        (rows[0], rows[len(rows) // 2], rows[-1]), ("C3", "C4", "C0"), strict=True
    ):
        gaps = (found.log_weights - exact).numpy()
        bins = np.linspace(gaps.min() - 1e-3, gaps.max() + 1e-3, 30)
        right.hist(gaps, bins, density=True, color=color, alpha=0.5, label=f"{num} temperatures")
    right.axvline(0, color="k", lw=1)
    right.set(xlabel="log weight minus the exact log Z, nats", yticks=[], yscale="log")
    right.set_title("what the forward chains weigh")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="log Z of a Boltzmann machine from both sides.")
    parser.add_argument("--num-epochs", type=int, default=30, help="passes over the data")
    parser.add_argument("--num-hidden", type=int, default=16, help="of the small machine")
    parser.add_argument("--num-large", type=int, default=200, help="hidden units of the large one")
    parser.add_argument("--num-chains", type=int, default=500)
    parser.add_argument("--max-temperatures", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("examples/output/log_normalizer.png"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    train, test = split_digits()
    machine = trained(train, args.num_hidden, args.num_epochs)
    known = estimate_log_normalizer(machine, "exact")
    exact = float(known)
    print(
        f"{args.num_hidden} hidden units: exact log Z = {exact:.3f}; estimates minus that, in nats"
    )
    draws = machine.exact_sample((args.num_chains,))
    data = train[: args.num_chains]
    counts = [num for num in TEMPERATURES if num <= args.max_temperatures]
    rows = squeeze(machine, exact, draws, data, counts)
    picture(rows, exact, args.output)

    print("\nmean log-likelihood of the test digits, nats a digit")
    for what, log_z in (("exact log Z: ", known), ("annealing:   ", rows[-1][2])):
        likelihood = mean_log_likelihood(machine, test, log_z)
        print(f"  {args.num_hidden} hidden units, {what} {likelihood}")
    large = trained(train, args.num_large, args.num_epochs)
    found, _ = estimate(large, num_chains=args.num_chains, samples=data)
    result = mean_log_likelihood(large, test, found)
    print(f"  {args.num_large} hidden units, annealing:   {result}")
    print(f"    {found}")
    print("    the upper bound is from data: a bound as far as the machine draws such data")
    print(f"\nThe picture is in {args.output}")


if __name__ == "__main__":
    main()
