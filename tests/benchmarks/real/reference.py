"""Makes the answers of the stochastic volatility, whose data are simulated.

python -m tests.benchmarks.real.reference
"""

import json

import arviz as az
import jax
import numpy as np
import numpyro

from tests.benchmarks.real.data import FOLDER
from tests.benchmarks.real.numpyro_models import stochastic_volatility

NAME = "stochastic_volatility"
DAYS = 250
CHAINS, WARMUP, DRAWS = 6, 600, 1500


def simulate() -> np.ndarray:
    """A year of returns, in per cent."""
    generator = np.random.default_rng(3)
    log_variance = 0.2 * generator.standard_normal(DAYS).cumsum()
    return np.round(np.exp(log_variance / 2) * generator.standard_normal(DAYS), 4)


def main() -> None:
    numpyro.enable_x64()
    y = simulate()
    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(stochastic_volatility, target_accept_prob=0.9),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(0), y)
    samples = {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}
    walk = samples["sigma"][..., None] * samples["walk"].cumsum(-1)
    log_variance = samples["mu"][..., None] + walk
    quantities = {"mu": samples["mu"], "sigma": samples["sigma"]}
    for day in range(0, DAYS, 18):
        quantities[f"log_variance[{day + 1}]"] = log_variance[..., day]
    reference = {}
    for name, x in quantities.items():
        size = min(float(az.ess(x, method=m)) for m in ("mean", "bulk"))
        print(f"{name}: ESS {size:.0f}, R-hat {float(az.rhat(x)):.4f}")
        numbers = {"mean": x.mean(), "sd": x.std(), "mcse_mean": x.std() / np.sqrt(size)}
        reference[name] = {key: round(float(value), 8) for key, value in numbers.items()}
    document = {"name": NAME, "data": {"y": y.tolist()}, "reference": reference}
    path = FOLDER / f"{NAME}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
