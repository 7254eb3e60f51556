"""NumPyro's and BlackJAX's samplers, as their documentation runs many chains.

NumPyro: NUTS with ``chain_method="vectorized"``. BlackJAX, on the potential of the same NumPyro
model: NUTS after ``window_adaptation`` of each chain; HMC after ``chees_adaptation`` with its
pooled diagonal mass matrix; MALA, whose one step size dual averaging tunes to a mean acceptance of
0.574 over the chains. Adaptation and sampling are one compiled loop each, over all chains, and
draws are brought to the supports within the time. All in float32.

``whole`` is a first run, from the model to the draws, with tracing and compiling. ``warm`` is a
second run of the same compiled objects. What is still compiled in it (NumPyro does, in each run) is
told by JAX itself, and subtracted. A run of more than :data:`LONG` seconds is not made twice: its
warm time is that of the first run without what JAX says of compiling.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from tests.benchmarks.jax_models import MODELS
from tests.benchmarks.models import POSTERIORS, Posterior

TARGET_OF_MALA = 0.574
LONG = 5.0

Samples = dict[str, np.ndarray]
_compiling: list[tuple[float, float]] = []


def setup() -> None:
    """What a process does first: imports are paid here, and what follows listens to XLA."""
    numpyro.set_platform("cpu")
    jax.monitoring.register_event_duration_secs_listener(_listen)
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()


def _listen(event: str, seconds: float, **kwargs: Any) -> None:
    if event.startswith("/jax/core/compile"):
        now = time.perf_counter()
        _compiling.append((now - seconds, now))


def compiling() -> float:
    """Seconds of tracing and compiling that JAX told of; what is nested is counted once."""
    total, until = 0.0, 0.0
    for begin, end in sorted(_compiling):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    _compiling.clear()
    return total


def measure(
    sampler: str, posterior: str, chains: int, warmup: int, draws: int, seed: int
) -> dict[str, Any]:
    """One run with compilation and one without: seconds, and the draws of the first."""
    build = {
        "NumPyro NUTS": _numpyro_nuts,
        "BlackJAX NUTS": _blackjax_nuts,
        "BlackJAX ChEES": _blackjax_chees,
        "BlackJAX MALA": _blackjax_mala,
    }[sampler]
    compiling()
    start = time.perf_counter()
    run = build(POSTERIORS[posterior], chains, warmup, draws, seed)
    samples = jax.block_until_ready(run())
    whole = time.perf_counter() - start
    warm = whole - compiling()
    if warm < LONG:
        start = time.perf_counter()
        jax.block_until_ready(run())
        warm = time.perf_counter() - start - compiling()
    jax.clear_caches()
    return {
        "whole": whole,
        "warm": warm,
        "samples": {name: np.asarray(x) for name, x in samples.items()},
    }


Run = Callable[[], Any]
"""Runs from the start, with the same seed, and gives each site's draws ``(chains, draws, ...)``."""


def _numpyro_nuts(posterior: Posterior, chains: int, warmup: int, draws: int, seed: int) -> Run:
    kernel = numpyro.infer.NUTS(MODELS[posterior.name], dense_mass=posterior.dense)
    mcmc = numpyro.infer.MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    data = [jnp.asarray(x) for x in posterior.data()]

    def run() -> Any:
        mcmc.run(jax.random.PRNGKey(seed), *data)
        return mcmc.get_samples(group_by_chain=True)

    return run


class Target:
    """A NumPyro model as BlackJAX sees it: a log density, starts, and the way to the supports.

    Args:
        model: the model.
        data: its arguments.
        chains: how many starts are needed.
        seed: of the starts, and of ``key``.
    """

    def __init__(self, model: Callable[..., Any], data: Any, chains: int, seed: int):
        self.key, start = jax.random.split(jax.random.PRNGKey(seed))
        data = tuple(jnp.asarray(x) for x in data)
        info = numpyro.infer.util.initialize_model(
            jax.random.split(start, chains), model, model_args=data
        )
        self.start = info.param_info.z
        self.potential, self.constrain = info.potential_fn, info.postprocess_fn

    def log_density(self, position: Any) -> Any:
        return -self.potential(position)


def loop(
    step: Callable[..., Any], constrain: Callable[..., Any], draws: int, chains: int
) -> Callable[..., Any]:
    """A compiled loop of transitions of all chains that collects the draws."""

    def run(key: Any, states: Any, parameters: Any) -> Any:
        def body(states: Any, key: Any) -> Any:
            states = step(jax.random.split(key, chains), states, parameters)
            return states, states.position

        _, positions = jax.lax.scan(body, states, jax.random.split(key, draws))
        samples = jax.vmap(jax.vmap(constrain))(positions)
        return {name: jnp.swapaxes(x, 0, 1) for name, x in samples.items()}

    return jax.jit(run)


def _blackjax_nuts(posterior: Posterior, chains: int, warmup: int, draws: int, seed: int) -> Run:
    import blackjax

    target = Target(MODELS[posterior.name], posterior.data(), chains, seed)
    adaptation = blackjax.window_adaptation(
        blackjax.nuts,
        target.log_density,
        is_mass_matrix_diagonal=not posterior.dense,
        adaptation_info_fn=blackjax.adaptation.base.get_filter_adapt_info_fn(),
    )

    def adapt(key: Any, position: Any) -> Any:
        (state, parameters), _ = adaptation.run(key, position, warmup)
        return state, (parameters["step_size"], parameters["inverse_mass_matrix"])

    kernel = blackjax.nuts.build_kernel()

    def step(keys: Any, states: Any, parameters: Any) -> Any:
        return jax.vmap(lambda k, s, p: kernel(k, s, target.log_density, *p)[0])(
            keys, states, parameters
        )

    adapt_all = jax.jit(jax.vmap(adapt))
    sample = loop(step, target.constrain, draws, chains)

    def run() -> Any:
        first, second = jax.random.split(target.key)
        states, parameters = adapt_all(jax.random.split(first, chains), target.start)
        return sample(second, states, parameters)

    return run


def _blackjax_chees(posterior: Posterior, chains: int, warmup: int, draws: int, seed: int) -> Run:
    import blackjax
    import optax

    target = Target(MODELS[posterior.name], posterior.data(), chains, seed)
    adaptation = blackjax.chees_adaptation(
        target.log_density,
        chains,
        mass_matrix_estimation="diagonal",
        adaptation_info_fn=blackjax.adaptation.base.get_filter_adapt_info_fn(),
    )
    functions: dict[str, Any] = {}

    def adapt(key: Any, positions: Any) -> Any:
        (states, parameters), _ = adaptation.run(key, positions, 0.1, optax.adam(0.025), warmup)
        for name in ("next_random_arg_fn", "integration_steps_fn"):
            functions[name] = parameters[name]
        numbers = ("step_size", "inverse_mass_matrix", "integration_steps_params")
        return states, tuple(parameters[name] for name in numbers)

    def step(keys: Any, states: Any, parameters: Any) -> Any:
        kernel = blackjax.dynamic_hmc.build_kernel(**functions)
        return jax.vmap(lambda k, s: kernel(k, s, target.log_density, *parameters)[0])(keys, states)

    adapt_all = jax.jit(adapt)
    sample = loop(step, target.constrain, draws, chains)

    def run() -> Any:
        first, second = jax.random.split(target.key)
        states, parameters = adapt_all(first, target.start)
        return sample(second, states, parameters)

    return run


def _blackjax_mala(posterior: Posterior, chains: int, warmup: int, draws: int, seed: int) -> Run:
    import blackjax
    from blackjax.optimizers.dual_averaging import dual_averaging

    target = Target(MODELS[posterior.name], posterior.data(), chains, seed)
    kernel = blackjax.mala.build_kernel()
    start, update, final = dual_averaging()

    def transition(keys: Any, states: Any, step_size: Any) -> Any:
        return jax.vmap(lambda k, s: kernel(k, s, target.log_density, step_size))(keys, states)

    def adapt(key: Any, positions: Any) -> Any:
        def body(carry: Any, key: Any) -> Any:
            states, tuning = carry
            keys = jax.random.split(key, chains)
            states, info = transition(keys, states, jnp.exp(tuning.log_x))
            gap = TARGET_OF_MALA - jnp.nan_to_num(info.acceptance_rate).mean()
            return (states, update(tuning, gap)), None

        states = jax.vmap(lambda p: blackjax.mala.init(p, target.log_density))(positions)
        begin = (states, start(1e-3))
        (states, tuning), _ = jax.lax.scan(body, begin, jax.random.split(key, warmup))
        return states, final(tuning)

    adapt_all = jax.jit(adapt)
    sample = loop(lambda k, s, p: transition(k, s, p)[0], target.constrain, draws, chains)

    def run() -> Any:
        first, second = jax.random.split(target.key)
        states, step_size = adapt_all(first, target.start)
        return sample(second, states, step_size)

    return run
