"""NumPyro's, BlackJAX's and nutpie's samplers on the real posteriors, as their pages run them.

NumPyro: NUTS with ``chain_method="vectorized"``. BlackJAX, mapped over chains, on the potential of
the same NumPyro model: NUTS after ``window_adaptation_low_rank``, HMC after ``chees_adaptation``.
nutpie, on the same potential: ``nutpie.sample``, its chains in as many threads as there are cores,
each gradient a call of a jitted function (as its own JAX backend makes it).

``before`` is all from the model to the first draw, with tracing, compiling and warmup, and the
compiling of what draws; ``sampling`` the rest. NumPyro compiles warmup and draws as one loop, which
must be timed apart here: the second compilation counts for nothing. nutpie's time is shared out by
its leapfrog steps.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.flatten_util import ravel_pytree

from tests.benchmarks.jax_samplers import Target, compiling, loop
from tests.benchmarks.real.numpyro_models import MODELS
from tests.benchmarks.real.posteriors import REAL, RealPosterior, Samples

Found = tuple[dict[str, Any], Any]
"""Seconds and counts, and each site's draws, shape ``(chains, draws, *site)``."""


def measure(
    sampler: str,
    posterior: str,
    chains: int,
    warmup: int | None,
    draws: int,
    seed: int,
    double: bool = False,
) -> tuple[dict[str, Any], Samples]:
    """One run: its seconds and counts, and the draws.

    In double precision if asked, if the posterior needs it, or nutpie does.
    """
    target = REAL[posterior]
    jax.config.update("jax_enable_x64", double or target.double or sampler.startswith("nutpie"))
    run = {
        "NumPyro NUTS": _numpyro_nuts,
        "NumPyro NUTS, dense": _numpyro_nuts_dense,
        "BlackJAX NUTS, low rank": _blackjax_nuts_low_rank,
        "BlackJAX ChEES": _blackjax_chees,
        "BlackJAX ChEES, diagonal": _blackjax_chees_diagonal,
        "nutpie": _nutpie,
        "nutpie, low rank": _nutpie_low_rank,
    }[sampler]
    jax.clear_caches()
    compiling()
    start = time.perf_counter()
    found, samples = run(target, chains, warmup, draws, seed)
    samples = {name: np.asarray(x) for name, x in samples.items()}
    found.setdefault("whole", time.perf_counter() - start)
    found.setdefault("before", found["whole"] - found["sampling"])
    return found, samples


def _data(posterior: RealPosterior) -> list[Any]:
    return [jnp.asarray(x) for x in posterior.arrays()]


def _numpyro_nuts(
    posterior: RealPosterior, chains: int, warmup: int, draws: int, seed: int, dense: bool = False
) -> Found:
    start = time.perf_counter()
    kernel = numpyro.infer.NUTS(MODELS[posterior.model.__name__], dense_mass=dense)
    mcmc = numpyro.infer.MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    data = _data(posterior)
    mcmc.warmup(jax.random.PRNGKey(seed), *data)
    state = jax.block_until_ready(mcmc.post_warmup_state)
    before = time.perf_counter() - start
    compiling()
    start = time.perf_counter()
    mcmc.run(state.rng_key, *data, extra_fields=("num_steps",))
    samples = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    sampling = time.perf_counter() - start - compiling()
    steps = float(mcmc.get_extra_fields()["num_steps"].sum()) / chains
    times = {"before": before, "sampling": sampling, "whole": before + sampling}
    return {**times, "draw_gradients": steps}, samples


def _numpyro_nuts_dense(*args: Any) -> Found:
    return _numpyro_nuts(*args, dense=True)


def _blackjax(
    posterior: RealPosterior,
    chains: int,
    draws: int,
    seed: int,
    prepare: Callable[[Target], tuple[Callable[..., Any], Callable[..., Any]]],
) -> Found:
    """Adapts all chains in one compiled call, and samples in another."""
    model = MODELS[posterior.model.__name__]
    target = Target(model, posterior.arrays(), chains, seed)
    adapt, step = prepare(target)
    first, second = jax.random.split(target.key)
    states, parameters = jax.block_until_ready(jax.jit(adapt)(first, target.start))
    sample = loop(step, target.constrain, draws, chains)
    compiling()
    start = time.perf_counter()
    samples = jax.block_until_ready(sample(second, states, parameters))
    return {"sampling": time.perf_counter() - start - compiling()}, samples


def _blackjax_nuts_low_rank(
    posterior: RealPosterior, chains: int, warmup: int, draws: int, seed: int
) -> Found:
    import blackjax

    def prepare(target: Target) -> tuple[Callable[..., Any], Callable[..., Any]]:
        adaptation = blackjax.window_adaptation_low_rank(blackjax.nuts, target.log_density)
        kernel = blackjax.nuts.build_kernel()

        def adapt(key: Any, position: Any) -> Any:
            (_, parameters), info = adaptation.run(key, position, warmup)
            # from the last state: the "optimal translation" that is returned lies far out
            state = jax.tree.map(lambda x: x[-1], info.state)
            return state, (parameters["step_size"], parameters["inverse_mass_matrix"])

        def step(keys: Any, states: Any, parameters: Any) -> Any:
            return jax.vmap(lambda k, s, p: kernel(k, s, target.log_density, *p)[0])(
                keys, states, parameters
            )

        return lambda key, z: jax.vmap(adapt)(jax.random.split(key, chains), z), step

    return _blackjax(posterior, chains, draws, seed, prepare)


def _blackjax_chees(
    posterior: RealPosterior,
    chains: int,
    warmup: int,
    draws: int,
    seed: int,
    mass_matrix: str | None = None,
) -> Found:
    import blackjax
    import optax

    def prepare(target: Target) -> tuple[Callable[..., Any], Callable[..., Any]]:
        adaptation = blackjax.chees_adaptation(
            target.log_density,
            chains,
            mass_matrix_estimation=mass_matrix,
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
            return jax.vmap(lambda k, s: kernel(k, s, target.log_density, *parameters)[0])(
                keys, states
            )

        return adapt, step

    return _blackjax(posterior, chains, draws, seed, prepare)


def _blackjax_chees_diagonal(*args: Any) -> Found:
    return _blackjax_chees(*args, mass_matrix="diagonal")


def _nutpie(
    posterior: RealPosterior,
    chains: int,
    warmup: int | None,
    draws: int,
    seed: int,
    low_rank: bool = False,
) -> Found:
    import nutpie
    from nutpie.compiled_pyfunc import from_pyfunc

    target = Target(MODELS[posterior.model.__name__], posterior.arrays(), 1, seed)
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], target.start))
    gradient = jax.jit(jax.value_and_grad(lambda z: target.log_density(unravel(z))))
    constrain = jax.jit(lambda z: target.constrain(unravel(z)))
    shapes = {name: x.shape for name, x in jax.eval_shape(constrain, flat).items()}
    jax.block_until_ready((gradient(flat), constrain(flat)))

    def log_density(z: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = gradient(z)
        return float(value), np.asarray(slope, dtype="float64", order="C")

    def expand(z: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(x, order="C") for name, x in constrain(z).items()}

    model = from_pyfunc(
        ndim=len(flat),
        make_logp_fn=lambda: log_density,
        make_expand_fn=lambda *seeds: expand,
        expanded_dtypes=[np.dtype("float64")] * len(shapes),
        expanded_shapes=list(shapes.values()),
        expanded_names=list(shapes),
    )
    start = time.perf_counter()
    trace = nutpie.sample(
        model,
        draws=draws,
        tune=warmup,
        chains=chains,
        seed=seed,
        progress_bar=False,
        low_rank_modified_mass_matrix=low_rank,
    )
    took = time.perf_counter() - start
    drawn = float(trace.sample_stats["n_steps"].sum()) / chains
    warmed = float(trace.warmup_sample_stats["n_steps"].sum()) / chains
    found = {
        "sampling": took * drawn / (drawn + warmed),
        "warmup": trace.warmup_sample_stats.sizes["draw"],
        "warmup_gradients": warmed,
        "draw_gradients": drawn,
    }
    return found, {name: trace.posterior[name].values for name in shapes}


def _nutpie_low_rank(*args: Any) -> Found:
    return _nutpie(*args, low_rank=True)
