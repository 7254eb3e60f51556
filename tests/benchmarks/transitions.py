"""Question 2: how many transitions of MALA per second, bare, on the same model?

python -m tests.benchmarks.transitions
python -m tests.benchmarks.transitions --device cuda
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import LangevinKernel
from pyro_ebm.mcmc.potentials.base import Potential
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
from tests.benchmarks.models import POSTERIORS, Posterior

PREFACE = """
Transitions of MALA per second, all chains in one, at a fixed step size, without adaptation and
without keeping draws: our kernel, step by step from Python as the runner calls it, random numbers
included; BlackJAX's kernel on the potential of the same NumPyro model, mapped by `vmap` in one
jitted loop. *Gradient alone* is the limit of what a step can be: the potential and its gradient of
our model, captured and compiled, with nothing around. Ratios are to BlackJAX. Compiling is not
counted.
"""

STEP_SIZE = {"schools": 0.05, "logistic": 1e-4}
CHAINS = (1, 100, 1000)

Run = Callable[[int], Any]
"""Makes so many transitions."""


def our_transitions(posterior: Posterior, chains: int, seed: int, device: str, jit: bool) -> Run:
    """Of :class:`LangevinKernel`."""
    pyro.set_rng_seed(seed)
    kernel = LangevinKernel(
        posterior.model,
        step_size=STEP_SIZE[posterior.name],
        adapt_step_size=False,
        adapt_mass_matrix=False,
        jit_compile=jit,
        ignore_jit_warnings=True,
    )
    potential = kernel.make_potential(*posterior.tensors(device))
    z = kernel.initial_position(potential, chains)
    kernel.bind(potential, 0)
    state = kernel.init(z)

    @torch.no_grad()
    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, _ = kernel.step(state)

    run(3)
    return run


def gradient_alone(potential: Potential, z: torch.Tensor) -> Run:
    """Of a potential and its gradient, captured and compiled."""
    graph = make_fx(lambda z: potential.value_and_grad(z))(z)
    if z.device.type == "cpu":  # neither guards nor assertions in each call
        compiled = torch._inductor.compile(graph, [z], {"size_asserts": False})
    else:
        compiled = torch.compile(graph, mode="reduce-overhead", dynamic=False)

    @torch.no_grad()
    def run(n: int) -> None:
        for _ in range(n):
            compiled(z)

    run(3)
    return run


def gradients_of(posterior: Posterior, chains: int, seed: int, device: str) -> Run:
    pyro.set_rng_seed(seed)
    kernel = LangevinKernel(posterior.model)
    potential = kernel.make_potential(*posterior.tensors(device))
    return gradient_alone(potential, kernel.initial_position(potential, chains))


def blackjax_transitions(posterior: Posterior, chains: int, seed: int, device: str) -> Run:
    """Of BlackJAX's MALA."""
    import blackjax
    import jax
    from numpyro.infer.util import initialize_model

    from tests.benchmarks.jax_models import MODELS

    place = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    with jax.default_device(place):
        data = tuple(map(jax.numpy.asarray, posterior.data()))
        start, key = jax.random.split(jax.random.PRNGKey(seed))
        model = MODELS[posterior.name]
        info = initialize_model(jax.random.split(start, chains), model, model_args=data)
        mala = blackjax.mala(lambda z: -info.potential_fn(z), STEP_SIZE[posterior.name])
        states = jax.vmap(mala.init)(info.param_info.z)

        @jax.jit
        def loop(key: Any, states: Any, n: int) -> Any:
            def body(_: int, carry: Any) -> Any:
                key, states = carry
                key, now = jax.random.split(key)
                states, _ = jax.vmap(mala.step)(jax.random.split(now, chains), states)
                return key, states

            return jax.lax.fori_loop(0, n, body, (key, states))

    def run(n: int) -> None:
        with jax.default_device(place):
            jax.block_until_ready(loop(key, states, n))

    run(3)
    return run


def on_gpu() -> bool:
    """Whether JAX sees one."""
    import jax

    return any(device.platform == "gpu" for device in jax.devices())


def measure(options: Options) -> list[Row]:
    tasks = []
    device, seed = options.device, options.seed
    peers = options.device == "cpu" or on_gpu()
    if not peers:
        progress("JAX sees no GPU: BlackJAX is left out")
    for name in ("schools",) if options.quick else tuple(STEP_SIZE):
        posterior = POSTERIORS[name]
        for chains in (1, 100) if options.quick else CHAINS:
            runs: dict[str, tuple[Run, str]] = {}
            for jit in (True, False):
                label = "pyro_ebm, compiled" if jit else "pyro_ebm, eager"
                run = our_transitions(posterior, chains, seed, device, jit)
                runs[label] = run, versions("pyro-ebm", "pyro-ppl", "torch")
            runs["bare gradient alone"] = (
                gradients_of(posterior, chains, seed, device),
                versions("pyro-ebm", "torch"),
            )
            if peers:
                run = blackjax_transitions(posterior, chains, seed, device)
                runs["BlackJAX"] = run, versions("blackjax", "numpyro", "jax")
            for contestant, (run, used) in runs.items():
                n = count_for(run, 0.05 if options.quick else 0.2, device)
                tasks.append((name, chains, contestant, n, run, used))
            progress(f"ready: {name}, {chains} chains")
    rows = []
    for i, (name, chains, contestant, n, run, used) in options.rotate(tasks):
        seconds = seconds_of(lambda run=run, n=n: run(n), device) / n
        rows.append(
            {
                "case": name,
                "chains": chains,
                "contestant": contestant,
                "round": i,
                "seed": seed,
                "settings": f"step size {STEP_SIZE[name]}, {n} transitions",
                "versions": used,
                "seconds": seconds,
                "per_second": 1 / seconds,
            }
        )
    order = [task[:3] for task in tasks]
    return sorted(rows, key=lambda r: order.index((r["case"], r["chains"], r["contestant"])))


def tables(rows: list[Row]) -> str:
    header = ["model", "chains", "contestant", "time of one", "transitions/s", "to BlackJAX"]
    header += ["to the gradient alone"]
    lines = []
    for (case, chains), same in report.grouped(rows, "case", "chains").items():
        groups = report.grouped(same, "contestant")
        peer, bare = groups.get(("BlackJAX",), []), groups[("bare gradient alone",)]
        for (name,), group in groups.items():
            lines.append(
                [
                    POSTERIORS[case].title,
                    f"{chains:,}",
                    name.removeprefix("bare "),
                    report.spread([r["seconds"] for r in group], report.duration),
                    report.spread([r["per_second"] for r in group]),
                    report.number(report.paired(group, peer, "per_second")),
                    report.number(report.paired(group, bare, "seconds")),
                ]
            )
    return report.table(header, lines)


def pictures(rows: list[Row], path: Path) -> None:
    cases = list(report.grouped(rows, "case"))
    fig, axes = plt.subplots(
        1, len(cases) + 1, figsize=(4.4 * (len(cases) + 1), 4.2), layout="constrained"
    )
    names, ratios = [], []
    for ax, (case,) in zip(axes, cases):
        here = [row for row in rows if row["case"] == case]
        groups = report.grouped(here, "contestant", "chains")
        report.lines(
            ax,
            groups,
            "per_second",
            xlabel="chains",
            ylabel="MALA transitions / s",
            title=POSTERIORS[case].title,
        )
        for (name, chains), group in groups.items():
            if name == "pyro_ebm, compiled" and ("BlackJAX", chains) in groups:
                names.append(f"{case}, {chains:,}")
                ratios.append(report.paired(group, groups["BlackJAX", chains], "per_second"))
    axes[0].legend(fontsize=8)
    report.bars(axes[-1], names, ratios, "ours, compiled, to BlackJAX")
    report.save(fig, path.with_suffix(".png"))


QUESTION = Question(
    name="transitions",
    title="Transitions of MALA per second",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    packages=("blackjax", "numpyro", "jax", "scikit-learn"),
    rounds=9,
    minutes=2.0,
    devices=("cpu", "cuda"),
)

if __name__ == "__main__":
    QUESTION.main()
