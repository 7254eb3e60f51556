"""Whether the models say what was published, in both languages.

python -m tests.benchmarks.defaults --check
python -m tests.benchmarks.defaults --check nes hmm_example

For each posterior: whether the log densities in Pyro and in NumPyro differ by the same constant at
random points of the unconstrained space, and the largest z of the means of a long run of NUTS,
which is compared with the published means (:mod:`.score`).
"""

from collections.abc import Sequence

import jax
import numpy as np
import numpyro
import pyro
import torch
from pyro.infer.mcmc.util import initialize_model

from tests.benchmarks.defaults.jax_side import measure
from tests.benchmarks.defaults.score import score
from tests.benchmarks.real.numpyro_models import MODELS
from tests.benchmarks.real.posteriors import REAL

POINTS = 6


def main(names: Sequence[str]) -> None:
    """Prints a line for each posterior."""
    numpyro.enable_x64()
    for name in names or REAL:
        posterior = REAL[name]
        gap = disagreement(name)
        lengths = (2000, 2000) if posterior.dim <= 300 else (500, 500)
        sampler = "NumPyro NUTS, dense" if posterior.dim <= 30 else "NumPyro NUTS"
        _, samples = measure(sampler, name, 4, *lengths, seed=0, double=True)
        found = score(posterior.quantities(samples), posterior.reference)
        print(
            f"{name}: log densities differ by {gap:.1e} of themselves; {sampler}, 4 chains,"
            f" {lengths[0]} + {lengths[1]}: ESS {found['ess']:.0f}, R-hat {found['r_hat']:.3f},"
            f" z {found['z']:.1f}",
            flush=True,
        )


def disagreement(name: str) -> float:
    """How much the difference of both log densities varies, relative to their size."""
    posterior = REAL[name]
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    start, potential, _, _ = initialize_model(posterior.model, posterior.tensors())
    info = numpyro.infer.util.initialize_model(
        jax.random.PRNGKey(0), MODELS[posterior.model.__name__], model_args=posterior.arrays()
    )
    found = []
    for _ in range(POINTS):
        z = {site: torch.randn_like(x) / 2 for site, x in start.items()}
        theirs = info.potential_fn({site: np.asarray(x) for site, x in z.items()})
        found.append((float(potential(z)), float(theirs)))
    ours, theirs = np.array(found).T
    return float(np.ptp(ours - theirs) / np.abs(ours).max())
