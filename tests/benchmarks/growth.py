"""Question 6: how does the time of a transition grow, and how much memory does a run need?

python -m tests.benchmarks.growth
python -m tests.benchmarks.growth --device cuda
"""

import resource
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm import MCMC, LangevinKernel
from tests.benchmarks import report
from tests.benchmarks.harness import (
    Options,
    Question,
    Row,
    count_for,
    progress,
    seconds_of,
    versions,
)
from tests.benchmarks.transitions import Run
from tests.benchmarks.workers import Worker

PREFACE = """
Time of one compiled transition of `LangevinKernel`, all chains in one, as one number grows and the
others stay: chains (10 dimensions, standard normal), dimensions (100 chains, standard normal), data
rows (logistic regression on 10 features, 100 chains). BlackJAX's MALA on the same densities, in one
jitted loop, stands beside it. Then the peak memory of whole runs of 1,000 chains in 100 dimensions,
each in a process of its own. Beyond that of the shortest run it should grow by the draws
themselves, 4 bytes a number, and a little for the statistics of each draw.
"""

AXES = {
    "chains": (1, 10, 100, 1000, 10_000),
    "dimensions": (2, 10, 100, 1000, 10_000),
    "data rows": (10, 100, 1000, 10_000, 100_000),
}
FIXED = {"chains": 100, "dimensions": 10, "data rows": 0}
MEMORY = {"chains": 1000, "dim": 100, "draws": (10, 500, 1000)}
STATUS = FilePath("/proc/self/status")


def normal(zero: Tensor) -> None:
    pyro.sample("x", dist.Normal(zero, 1.0).to_event(1))


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def problem(sizes: dict[str, int], device: str) -> tuple[Any, tuple[Tensor, ...], float]:
    """A model, its data, and a step size that is accepted."""
    if sizes["data rows"]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(sizes["data rows"], sizes["dimensions"], generator=generator)
        y = (torch.rand(len(x), generator=generator) < x[:, 0].sigmoid()).float()
        return logistic, (x.to(device), y.to(device)), 1 / (1 + len(x))
    zero = torch.zeros(sizes["dimensions"], device=device)
    return normal, (zero,), 0.5 / sizes["dimensions"] ** (1 / 3)


def ours(sizes: dict[str, int], device: str) -> Run:
    model, data, step_size = problem(sizes, device)
    kernel = LangevinKernel(
        model,
        step_size=step_size,
        adapt_step_size=False,
        adapt_mass_matrix=False,
        jit_compile=True,
        ignore_jit_warnings=True,
    )
    potential = kernel.make_potential(*data)
    z = kernel.initial_position(potential, sizes["chains"])
    kernel.bind(potential, 0)
    state = kernel.init(z)

    @torch.no_grad()
    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, _ = kernel.step(state)

    run(3)
    return run


def blackjax_mala(sizes: dict[str, int]) -> Run:
    """The same densities in JAX, written by hand."""
    import blackjax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_default_device", jax.devices("cpu")[0])

    _, data, step_size = problem(sizes, "cpu")
    arrays = [jnp.asarray(x.numpy()) for x in data]

    def log_density(z: Any) -> Any:
        prior = -0.5 * (z**2).sum()
        if len(arrays) == 1:
            return prior
        x, y = arrays
        logits = x @ z
        return prior + (y * logits - jnp.logaddexp(0.0, logits)).sum()

    mala = blackjax.mala(log_density, step_size)
    key = jax.random.PRNGKey(0)
    start = jax.random.normal(key, (sizes["chains"], sizes["dimensions"]))
    states = jax.vmap(mala.init)(start)

    @jax.jit
    def loop(key: Any, states: Any, n: int) -> Any:
        def body(_: int, carry: Any) -> Any:
            key, states = carry
            key, now = jax.random.split(key)
            keys = jax.random.split(now, sizes["chains"])
            return key, jax.vmap(mala.step)(keys, states)[0]

        return jax.lax.fori_loop(0, n, body, (key, states))

    def run(n: int) -> None:
        jax.block_until_ready(loop(key, states, n))

    run(3)
    return run


def peak_memory(chains: int, dim: int, draws: int) -> int:
    """Of this process, in bytes, after a run."""
    mcmc = MCMC(LangevinKernel(normal), draws, 20, num_chains=chains, disable_progbar=True)
    mcmc.run(torch.zeros(dim))
    mcmc.get_samples(group_by_chain=True)
    if STATUS.exists():  # a process inherits the other figure from the one that started it
        told = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(told["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def nothing() -> None:
    """What a worker does first."""


def sizes_of(quick: bool) -> Iterator[tuple[str, int, dict[str, int]]]:
    for axis, values in AXES.items():
        for value in values[:2] if quick else values:
            yield axis, value, {**FIXED, axis: value}


def measure(options: Options) -> list[Row]:
    tasks = []
    device = options.device
    for axis, value, sizes in sizes_of(options.quick):
        pyro.set_rng_seed(options.seed)
        runs = {"pyro_ebm": (ours(sizes, device), versions("pyro-ebm", "torch"))}
        if device == "cpu":
            runs["BlackJAX"] = blackjax_mala(sizes), versions("blackjax", "jax")
        for contestant, (run, used) in runs.items():
            n = count_for(run, 0.02 if options.quick else 0.1, device)
            tasks.append((axis, value, contestant, n, run, used))
        progress(f"ready: {value:,} {axis}")
    rows = []
    for i, (axis, value, contestant, n, run, used) in options.rotate(tasks):
        seconds = seconds_of(lambda run=run, n=n: run(n), device) / n
        rows.append(
            {
                "question": "time",
                "axis": axis,
                "size": value,
                "contestant": contestant,
                "round": i,
                "seed": options.seed,
                "settings": f"{n} transitions",
                "versions": used,
                "seconds": seconds,
            }
        )
    order = [task[:3] for task in tasks]
    rows.sort(key=lambda r: order.index((r["axis"], r["size"], r["contestant"])))
    return rows + (memory(options) if device == "cpu" else [])


def memory(options: Options) -> list[Row]:
    """Of runs in processes of their own."""
    chains, dim = MEMORY["chains"], MEMORY["dim"]
    rows = []
    for draws in MEMORY["draws"][:2] if options.quick else MEMORY["draws"]:
        worker = Worker(nothing, options.threads)
        peak = worker.run(peak_memory, chains, dim, draws, seconds=300)
        worker.stop()
        rows.append(
            {
                "question": "memory",
                "draws": draws,
                "chains": chains,
                "dim": dim,
                "round": 0,
                "seed": options.seed,
                "settings": f"{chains} chains, {dim} dimensions",
                "versions": versions("pyro-ebm", "torch"),
                "bytes": peak,
                "of_draws": 4 * draws * chains * dim,
            }
        )
        progress(f"memory of {draws} draws: {peak / 1e6:.0f} MB")
    return rows


def tables(rows: list[Row]) -> str:
    header = ["growing", "size", "pyro_ebm", "BlackJAX", "to BlackJAX"]
    lines = []
    times = [row for row in rows if row["question"] == "time"]
    for (axis, size), same in report.grouped(times, "axis", "size").items():
        groups = report.grouped(same, "contestant")
        peer = groups.get(("BlackJAX",), [])
        own = groups[("pyro_ebm",)]
        cells = [
            report.spread([r["seconds"] for r in g], report.duration) if g else "-"
            for g in (own, peer)
        ]
        ratio = report.paired(peer, own, "seconds")
        lines.append([axis, f"{size:,}", *cells, report.number(ratio)])
    first = report.table(header, lines)
    used = [row for row in rows if row["question"] == "memory"]
    if not used:
        return first
    header = ["draws", "peak, MB", "the draws themselves, MB", "beyond the shortest run, in draws"]
    lines = []
    for row in used:
        more = row["of_draws"] - used[0]["of_draws"]
        rate = (row["bytes"] - used[0]["bytes"]) / more if more else float("nan")
        megabytes = [f"{row[key] / 1e6:,.0f}" for key in ("bytes", "of_draws")]
        lines.append([f"{row['draws']:,}", *megabytes, report.number(rate)])
    return f"{first}\n\n{report.table(header, lines)}"


def pictures(rows: list[Row], path: FilePath) -> None:
    times = [row for row in rows if row["question"] == "time"]
    used = [row for row in rows if row["question"] == "memory"]
    count = len(AXES) + bool(used)
    fig, axes = plt.subplots(1, count, figsize=(3.8 * count, 3.8), layout="constrained")
    for ax, axis in zip(axes, AXES):
        here = [row for row in times if row["axis"] == axis]
        groups = report.grouped(here, "contestant", "size")
        label = "seconds of a transition"
        report.lines(ax, groups, "seconds", xlabel=axis, ylabel=label, title=f"growing {axis}")
        ax.tick_params(axis="x", labelsize=8)
    axes[0].legend(fontsize=8)
    if used:
        x = [row["draws"] for row in used]
        axes[-1].plot(x, [row["bytes"] / 1e6 for row in used], "o-", color="#c0392b", label="peak")
        base = used[0]["bytes"] - used[0]["of_draws"]
        ideal = [(base + row["of_draws"]) / 1e6 for row in used]
        axes[-1].plot(x, ideal, "--", color="#707b7c", label="draws + constant")
        axes[-1].set(xlabel="draws of 1,000 chains, 100-d", ylabel="MB", ylim=(0, None))
        axes[-1].set_title("peak memory", fontsize=10)
        axes[-1].legend(fontsize=8)
        axes[-1].grid(alpha=0.25)
    report.save(fig, path.with_suffix(".png"))


QUESTION = Question(
    name="growth",
    title="Growth",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    packages=("blackjax", "jax"),
    rounds=3,
    minutes=2.0,
    devices=("cpu", "cuda"),
)

if __name__ == "__main__":
    QUESTION.main()
