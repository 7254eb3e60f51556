"""How fast is annealed importance sampling, beside a bare torch loop of the same arithmetic?

    python -m tests.benchmarks.annealing

Two tables. The first counts chains x temperatures per second of the annealing alone, on

- ``wells``: sixteen double wells, 32 dimensions, an energy of a few operations; Langevin;
- ``network``: an energy network 2-128-128-1; Langevin;
- ``machine``: a restricted Boltzmann machine of 784 visible and 500 hidden units; Gibbs sweeps.

The bare loops are written for their target alone: they keep energies and gradients from one
temperature to the next by hand, know neither supports, batches nor infinities, and share step size
and temperatures with ours. Each samples in turn, the order turned by one each round.

The second is error against time, of whole runs: ours with its pilot, that finds the temperatures
and step sizes, and the bare loop, which is handed what a pilot found, free of charge. The error is
the root mean square over seeds, in nats.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import pyro
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions import RBM
from pyro_ebm.mcmc import Kernel
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.normalizer import UnreliableEstimateWarning, estimate_log_normalizer
from pyro_ebm.normalizer.annealed import anneal, kernel_of, path_of
from pyro_ebm.normalizer.ladder import Ladder, ladder_of, pilot
from pyro_ebm.normalizer.path import Path

DOUBLE_WELL = 10.29348


def double_well(x: Tensor) -> Tensor:
    x, y = x.unbind(-1)
    return x.square().square() - 6 * x.square() - x / 2 + y.square() / 2


def wells(x: Tensor) -> Tensor:
    return double_well(x.unflatten(-1, (16, 2))).sum(-1)


# ---- the bare loops ----------------------------------------------------------------------------


def bare_langevin(
    energy: Callable[[Tensor], Tensor],
    mean: Tensor,
    scale: Tensor,
    num: int,
    betas: list[float],
    steps: list[Tensor],
    factors: list[Tensor],
) -> Tensor:
    """Log weights of the path from a Gaussian to an energy on the reals."""

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            u = energy(z)
            (g,) = torch.autograd.grad(u.sum(), z)
        return u.detach(), g

    constant = scale.log().sum() + mean.numel() / 2 * math.log(2 * math.pi)
    z = mean + scale * torch.randn(num, mean.numel())
    log_w = torch.zeros(num)
    (u1, g1), units = value_and_grad(z), (z - mean) / scale
    u0, g0 = units.square().sum(-1) / 2 + constant, units / scale
    for t, (a, b) in enumerate(pairwise(betas), 1):
        log_w += (b - a) * (u0 - u1)
        if b == 1:
            break
        step, factor = steps[t], factors[t]
        noise, log_u = torch.randn_like(z), torch.rand(num).log()
        g = torch.lerp(g0, g1, b)
        new = z - step * factor.square() * g + (2 * step).sqrt() * factor * noise
        (v1, h1), units = value_and_grad(new), (new - mean) / scale
        v0, h0 = units.square().sum(-1) / 2 + constant, units / scale
        h = torch.lerp(h0, h1, b)
        back = (step / 2).sqrt() * factor * (g + h) - noise
        log_ratio = torch.lerp(u0 - v0, u1 - v1, b)
        log_ratio += (noise.square() - back.square()).sum(-1) / 2
        ok = log_u < log_ratio
        row = ok[:, None]
        z, u0, u1 = torch.where(row, new, z), torch.where(ok, v0, u0), torch.where(ok, v1, u1)
        g0, g1 = torch.where(row, h0, g0), torch.where(row, h1, g1)
    return log_w


def bare_gibbs(p: RBM, logits: Tensor, num: int, betas: list[float]) -> Tensor:
    """Log weights of the path from independent visible units to a machine."""
    w, b, c = p.weights, p.visible_bias, p.hidden_bias
    x = (torch.rand(num, len(b)) < logits.sigmoid()).to(w.dtype)
    constant = softplus(logits).sum()

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ logits - constant, x @ b, x @ w + c

    def minus_energy(start: Tensor, visible: Tensor, hidden: Tensor, beta: float) -> Tensor:
        return torch.lerp(start, visible, beta) + softplus(beta * hidden).sum(-1)

    start, visible, hidden = parts(x)
    log_w, now = torch.zeros(num), minus_energy(start, visible, hidden, 0.0)
    for beta in betas[1:]:
        log_w += minus_energy(start, visible, hidden, beta) - now
        if beta == 1:
            break
        z = (torch.rand_like(hidden) < (beta * hidden).sigmoid()).to(w.dtype)
        field = torch.lerp(logits, z @ w.T + b, beta)
        x = (torch.rand_like(x) < field.sigmoid()).to(w.dtype)
        start, visible, hidden = parts(x)
        now = minus_energy(start, visible, hidden, beta)
    return log_w + len(c) * math.log(2.0)


# ---- the targets -------------------------------------------------------------------------------


class Target:
    """An energy with what a pilot found, for ours and for the bare loop."""

    def __init__(self, p: UnnormalizedEnergy, chains: int, num_temperatures: int | None):
        self.p, self.chains = p, chains
        self.path: Path = path_of(p)
        self.kernel: Kernel = kernel_of(None, p, self.path)
        self.kernel.bind(self.path, 0)
        levels = pilot(self.path, self.kernel, disable_progbar=True)
        self.ladder = Ladder(levels, ladder_of(levels, num_temperatures))

    def ours(self) -> Tensor:
        z = self.path.at(0.0).draw(self.chains)
        return anneal(self.path, self.kernel, self.ladder, z, self.ladder.betas)

    @torch.no_grad()
    def bare(self) -> Tensor:
        betas = self.ladder.betas
        if isinstance(self.p, RBM):
            return bare_gibbs(self.p, self.path.loc, self.chains, betas)
        steps, factors = [], []
        for beta in betas:
            self.ladder.set(self.kernel, beta)
            steps.append(self.kernel.adaptation.step_size[0])
            factors.append(self.kernel.adaptation.factor[0])
        start = self.path.start
        return bare_langevin(
            self.p._energy, start.mean[0], start.factor[0], self.chains, betas, steps, factors
        )


def targets(chains: int, num_temperatures: int) -> dict[str, Target]:
    net = MLPEnergy(2, hidden=(128, 128)).requires_grad_(False)
    bowl = UnnormalizedEnergy(lambda x: net(x) + x.square().sum(-1) / 2, event_shape=(2,))
    machine = RBM(0.05 * torch.randn(784, 500), torch.zeros(784), torch.zeros(500))
    return {
        "wells": Target(UnnormalizedEnergy(wells, event_shape=(32,)), chains, num_temperatures),
        "network": Target(bowl, chains, num_temperatures),
        "machine": Target(machine, max(chains // 10, 2), max(num_temperatures // 5, 3)),
    }


# ---- the tables --------------------------------------------------------------------------------


def speed(chains: int, num_temperatures: int, rounds: int) -> None:
    print(f"{'chains x temperatures / s':28}{'ours':>12}{'bare loop':>12}{'ratio':>8}")
    for name, target in targets(chains, num_temperatures).items():
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        runs = [("ours", target.ours), ("bare", target.bare)]
        for _, run in runs:
            run()
        for i in range(rounds):
            for label, run in runs[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                run()
                seconds[label].append(time.perf_counter() - start)
        count = target.chains * (len(target.ladder.betas) - 1)
        rates = [count / median(seconds[label]) for label in ("ours", "bare")]
        label = f"{name}, {target.chains} chains"
        print(f"{label:28}{rates[0]:12.3g}{rates[1]:12.3g}{rates[0] / rates[1]:8.2f}")


def error_against_time(chains: int, ladders: list[int], seeds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    machine = RBM(torch.randn(64, 16, generator=generator), torch.zeros(64), torch.zeros(16))
    p = UnnormalizedEnergy(double_well, event_shape=(2,))
    cases = {"double well": (p, DOUBLE_WELL), "machine 64 x 16": (machine, None)}
    print(f"\n{'root mean square error, nats':28}{'ours':>16}{'bare loop':>20}")
    for name, (p, log_z) in cases.items():
        truth = float(machine.exact_log_normalizer()) if log_z is None else log_z
        for num in ladders:
            errors: dict[str, list[float]] = {"ours": [], "bare": []}
            seconds: dict[str, list[float]] = {"ours": [], "bare": []}
            target = Target(p, chains, num)
            for seed in range(seeds):
                pyro.set_rng_seed(seed)
                start = time.perf_counter()
                found = estimate_log_normalizer(
                    p, "ais", num_chains=chains, num_temperatures=num, disable_progbar=True
                )
                seconds["ours"].append(time.perf_counter() - start)
                errors["ours"].append(float(found) - truth)
                start = time.perf_counter()
                log_w = target.bare()
                seconds["bare"].append(time.perf_counter() - start)
                errors["bare"].append(float(log_w.logsumexp(0)) - math.log(chains) - truth)
            cells = []
            for label in ("ours", "bare"):
                error = math.sqrt(sum(e * e for e in errors[label]) / seeds)
                cells.append(f"{error:9.4f} in {median(seconds[label]):.2f} s")
            print(f"{name + f', {num} temperatures':32}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--num-temperatures", type=int, default=101)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    warnings.simplefilter("ignore", UnreliableEstimateWarning)
    if args.quick:
        speed(20, 11, 1)
        error_against_time(20, [10], 2)
        return
    speed(args.chains, args.num_temperatures, args.rounds)
    error_against_time(args.chains, [10, 30, 100, 300], args.seeds)


if __name__ == "__main__":
    main()
