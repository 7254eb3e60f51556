"""Boltzmann machines: training beside scikit-learn's, and Gibbs sweeps beside a bare torch loop.

    python -m tests.benchmarks.boltzmann

Both train a machine of 64 visible and 16 hidden units on scikit-learn's digits (pixel > 7), in
turns, and are judged by the exact log-likelihood of the test digits as time passes. Each runs at
several budgets; a row is one budget. Settings are the best that a small search found for either:
scikit-learn's learning rate among .01, .02, .03, .05, .1 and batch 10 or 100; ours with batch 100.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import BernoulliRBM

from pyro_ebm.distributions import RBM, BoltzmannMachine, lattice_edges
from pyro_ebm.losses import fit_rbm
from pyro_ebm.mcmc import EnergyPotential, GibbsKernel
from tests.benchmarks import report

NUM_HIDDEN = 16
EPOCHS = {"pyro_ebm": (5, 10, 20, 40, 80), "scikit-learn": (5, 10, 20, 40, 80, 160)}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    bits = (load_digits().data > 7).astype(np.float32)
    train, test = train_test_split(bits, test_size=0.25, random_state=0)
    return torch.tensor(train), torch.tensor(test)


def log_likelihood(machine: RBM, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((-machine.energy(x)).mean() - machine.exact_log_normalizer())


def ours(train: torch.Tensor, num_epochs: int, seed: int) -> tuple[float, int, RBM]:
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    net = RBM.module(64, NUM_HIDDEN, train, centered=True)
    fit_rbm(net, train, num_epochs, batch_size=100, lr=0.03, disable_progbar=True)
    return time.perf_counter() - start, num_epochs * (len(train) // 100), net()


def scikit_learn(train: torch.Tensor, num_epochs: int, seed: int) -> tuple[float, int, RBM]:
    x = train.numpy()
    start = time.perf_counter()
    machine = BernoulliRBM(NUM_HIDDEN, learning_rate=0.03, n_iter=num_epochs, random_state=seed)
    machine.fit(x)
    seconds = time.perf_counter() - start
    parts = machine.components_.T, machine.intercept_visible_, machine.intercept_hidden_
    found = RBM(*(torch.tensor(part, dtype=torch.float32) for part in parts))
    return seconds, num_epochs * -(-len(x) // 10), found


def training(rounds: int, seed: int, quick: bool) -> list[dict[str, Any]]:
    train, test = digits()
    rows = []
    for r in range(rounds):
        for i in range(max(map(len, EPOCHS.values()))):
            for name, fit in (("pyro_ebm", ours), ("scikit-learn", scikit_learn)):
                if i >= len(EPOCHS[name]) or (quick and i):
                    continue
                epochs = EPOCHS[name][i]
                seconds, steps, machine = fit(train, epochs, seed + r)
                rows.append(
                    {
                        "name": name,
                        "epochs": epochs,
                        "steps": steps,
                        "seconds": seconds,
                        "log_likelihood": log_likelihood(machine, test),
                    }
                )
    return rows


def bare_sweeps(side: int, coupling: float, num_chains: int, num_sweeps: int) -> float:
    """The checkerboard in the fewest lines of torch; seconds."""
    s = 2.0 * torch.randint(2, (num_chains, side, side)) - 1
    parity = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    start = time.perf_counter()
    for _ in range(num_sweeps):
        for colour in (0, 1):
            field = s.roll(1, 1) + s.roll(-1, 1) + s.roll(1, 2) + s.roll(-1, 2)
            up = torch.rand_like(s) < (2 * coupling * field).sigmoid()
            s = torch.where(parity == colour, torch.where(up, 1.0, -1.0), s)
    return time.perf_counter() - start


def our_sweeps(side: int, coupling: float, num_chains: int, num_sweeps: int, jit: bool) -> float:
    kernel = GibbsKernel(jit_compile=jit)
    potential = EnergyPotential(
        BoltzmannMachine(torch.tensor(coupling), edges=lattice_edges(side, side))
    )
    kernel.bind(potential, 0)
    state = kernel.init(potential.initial(num_chains))
    for _ in range(2):
        state, _ = kernel.step(state)
    start = time.perf_counter()
    for _ in range(num_sweeps):
        state, _ = kernel.step(state)
    return time.perf_counter() - start


def sweeps(rounds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    runs = {
        "pyro_ebm": partial(our_sweeps, jit=False),
        "pyro_ebm, compiled": partial(our_sweeps, jit=True),
        "bare torch": bare_sweeps,
    }
    num_sweeps = 20 if quick else 300
    for _ in range(rounds):
        for chains in (1,) if quick else (1, 100):
            for name, run in runs.items():
                seconds = run(32, 0.44, chains, num_sweeps)
                rows.append({"name": name, "chains": chains, "per_second": num_sweeps / seconds})
    return rows


def grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def tables(train_rows: list[dict[str, Any]], sweep_rows: list[dict[str, Any]]) -> str:
    lines = ["RBM 64-16 on digits, exact test log-likelihood (median over rounds)", ""]
    lines.append(f"{'':16}{'epochs':>8}{'steps/s':>10}{'seconds':>10}{'nats':>10}")
    for (name, epochs), group in sorted(grouped(train_rows, "name", "epochs").items()):
        seconds = median(r["seconds"] for r in group)
        value = median(r["log_likelihood"] for r in group)
        rate = report.number(group[0]["steps"] / seconds)
        lines.append(f"{name:16}{epochs:8}{rate:>10}{seconds:10.2f}{value:10.2f}")
    lines += ["", "Gibbs sweeps per second, Ising 32 x 32 torus", ""]
    for (name, chains), group in grouped(sweep_rows, "name", "chains").items():
        lines.append(f"{name:22}{chains:5} chains{report.spread(group, 'per_second'):>26}")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in EPOCHS:
        groups = [g for (n, _), g in sorted(grouped(rows, "name", "epochs").items()) if n == name]
        x = [median(r["seconds"] for r in g) for g in groups]
        y = [median(r["log_likelihood"] for r in g) for g in groups]
        ax.plot(x, y, "o-", label=name)
    ax.set(xscale="log", xlabel="seconds of training", ylabel="exact test log-likelihood, nats")
    ax.set_title("RBM, 64 visible and 16 hidden units", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="does it run at all?")
    parser.add_argument("--output", type=Path, default=Path("benchmarks-output"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1 if args.quick else args.rounds
    train_rows = training(rounds, args.seed, args.quick)
    sweep_rows = sweeps(rounds, args.quick)
    text = tables(train_rows, sweep_rows)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = {"about": report.machine(1), "training": train_rows, "sweeps": sweep_rows}
    (args.output / "boltzmann.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    picture(train_rows, args.output / "boltzmann.png")
    print(f"\nrows and picture are in {args.output}")


if __name__ == "__main__":
    main()
