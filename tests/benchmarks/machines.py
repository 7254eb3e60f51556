"""How long until a restricted Boltzmann machine reaches a given exact likelihood.

A machine of 64 visible and 16 hidden units on scikit-learn's digits (pixel > 7), judged after each
epoch by the exact log-likelihood of test digits; judging is not counted. The first round tries
every setting of a small grid for either library, later rounds those that were the first to reach a
target.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import BernoulliRBM

from pyro_ebm.distributions import RBM, RBMModule
from pyro_ebm.losses import fit_rbm
from tests.benchmarks.harness import Options, Row, progress, versions

NUM_HIDDEN = 16
TARGETS = (-22.0, -21.0, -20.5)  # nats
GRIDS = {
    # the rate falls to a twentieth over the epochs, so their number is a setting
    "pyro_ebm fit_rbm": {
        "num_epochs": (5, 10, 20, 40),
        "batch_size": (20, 50, 100),
        "lr": (0.03,),
    },
    "scikit-learn": {
        "num_epochs": (100,),
        "batch_size": (10, 100),
        "lr": (0.01, 0.02, 0.03, 0.05, 0.1),
    },
}

Curve = list[tuple[float, float]]
"""Seconds of training and exact test log-likelihood, epoch by epoch."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    bits = (load_digits().data > 7).astype(np.float32)
    train, test = train_test_split(bits, test_size=0.25, random_state=0)
    return torch.tensor(train), torch.tensor(test)


def log_likelihood(machine: RBM, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((-machine.energy(x)).mean() - machine.exact_log_normalizer())


def ours(x: torch.Tensor, test: torch.Tensor, seed: int, **settings: Any) -> Curve:
    pyro.set_rng_seed(seed)
    curve: Curve = []
    judging = 0.0

    def watch(epoch: int, told: dict[str, float]) -> None:
        nonlocal judging
        now = time.perf_counter()
        curve.append((now - start - judging, log_likelihood(net(), test)))
        judging += time.perf_counter() - now

    start = time.perf_counter()
    net = RBMModule(64, NUM_HIDDEN, x, centered=True)
    fit_rbm(net, x, callback=watch, disable_progbar=True, **settings)
    return curve


def scikit_learn(
    x: torch.Tensor, test: torch.Tensor, seed: int, num_epochs: int, batch_size: int, lr: float
) -> Curve:
    data, curve, seconds = x.numpy(), [], 0.0
    start = time.perf_counter()
    machine = BernoulliRBM(
        NUM_HIDDEN, learning_rate=lr, batch_size=batch_size, n_iter=0, random_state=seed
    ).fit(data)
    rng = np.random.RandomState(seed)
    for epoch in range(num_epochs):  # the loop of its own fit
        for i in range(0, len(data), batch_size):
            machine._fit(data[i : i + batch_size], rng)
        seconds += time.perf_counter() - start
        parts = machine.components_.T, machine.intercept_visible_, machine.intercept_hidden_
        found = RBM(*(torch.tensor(part, dtype=torch.float32) for part in parts))
        if epoch < 10 or epoch % 3 == 0:
            curve.append((seconds, log_likelihood(found, test)))
        start = time.perf_counter()
    return curve


FITS: dict[str, Callable[..., Curve]] = {"pyro_ebm fit_rbm": ours, "scikit-learn": scikit_learn}


def grid(contestant: str, quick: bool) -> Iterator[dict[str, Any]]:
    axes = GRIDS[contestant]
    for values in itertools.product(*(v[:1] if quick else v for v in axes.values())):
        yield dict(zip(axes, values))


def first_at(curve: Curve, target: float) -> float | None:
    """Seconds until the target is reached, None if it is not."""
    return next((seconds for seconds, value in curve if value >= target), None)


def measure(options: Options) -> list[Row]:
    train, test = digits()
    ours(train, test, 0, num_epochs=1, batch_size=100)
    best: dict[tuple[str, float], dict[str, Any]] = {}
    rows: list[Row] = []
    for i, contestant in options.rotate(list(FITS)):
        seed = options.seed + i
        tried: Sequence[dict[str, Any]] = list(grid(contestant, options.quick))
        if i:
            tried = [s for j, s in enumerate(tried) if s in best.values()]
        curves = [FITS[contestant](train, test, seed, **settings) for settings in tried]
        for target in TARGETS:
            reached = [first_at(curve, target) for curve in curves]
            seconds, found = min(
                ((s, settings) for s, settings in zip(reached, tried) if s is not None),
                key=lambda pair: pair[0],
                default=(None, {}),
            )
            if not i:
                best[contestant, target] = found
            rows.append(
                {
                    "question": "machine",
                    "case": f"RBM to {target} nats",
                    "target": target,
                    "contestant": contestant,
                    "round": i,
                    "seed": seed,
                    "settings": ", ".join(f"{k} {v}" for k, v in found.items()),
                    "versions": versions("scikit-learn" if "scikit" in contestant else "pyro-ebm"),
                    "seconds": seconds,
                    "curves": [{"settings": s, "curve": c} for s, c in zip(tried, curves)]
                    if target == TARGETS[0]
                    else [],
                }
            )
        progress(f"{i + 1}: RBM, {contestant}")
    return rows
