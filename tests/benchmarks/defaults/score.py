r"""What a run is worth: the time to 1,000 effective draws, and whether its means are right.

The effective size of a quantity is the least of three: bulk, tail (ArviZ), and that of the squared
deviations from the mean. (Trajectories of a length that all chains share are antithetic: of the
mean alone, they are worth more than as many independent draws.) A run's is that of its worst
quantity. The time to 1,000 effective draws is

.. math:: t = t_\text{before} + t_\text{draws} \cdot 1000 / \text{ESS}

with :math:`t_\text{before}` all that comes before the first draw, from the model on: tracing,
compiling, warmup. Short runs are thus extrapolated, long ones cut.

A mean is compared with the published one in Monte Carlo errors of both,

.. math:: z = (\bar x - \mu) / \sqrt{\text{mcse}^2 + \text{mcse}_\mu^2}
"""

from typing import Any

import arviz as az
import numpy as np

from tests.benchmarks.real.data import Reference

ENOUGH = 1000
"""Effective draws."""
MOST_Z = 4.5
MOST_R_HAT = 1.05
LEAST, MOST = 1e-3, 1e9
"""In place of an effective size of nothing, and of an infinite R-hat or z."""


def score(x: np.ndarray, reference: Reference) -> dict[str, Any]:
    """Effective sizes, R-hat and z of the worst quantities.

    Args:
        x: draws, shape ``(chains, draws, quantities)``.
        reference: of the same quantities.
    """
    sizes, r_hats, z = [], [], []
    halves = x.shape[1] // 2
    with np.errstate(all="ignore"):
        for i, known in enumerate(reference.values()):
            column = np.ascontiguousarray(x[..., i])
            squares = np.square(column - column.mean())
            sizes.append(
                [
                    az.ess(column, method="bulk"),
                    az.ess(column, method="tail"),
                    az.ess(squares, method="mean"),
                ]
            )
            if np.ptp(column) == 0:  # ArviZ: as many as there are
                sizes[-1] = [0.0] * 3
            split = [column[:, :halves], column[:, halves : 2 * halves]]
            r_hats.append(az.rhat(np.concatenate(split), method="rank"))
            error = column.std() / np.sqrt(az.ess(column, method="mean"))
            z.append((column.mean() - known["mean"]) / np.hypot(error, known["mcse_mean"]))
    # chains that stand still, or are not finite, have no effective draw
    found = np.nan_to_num(np.asarray(sizes, float), nan=0.0).min(0).clip(LEAST)
    r_hat, worst = (
        float(np.nan_to_num(np.abs(x).max(), nan=MOST).clip(max=MOST)) for x in (r_hats, z)
    )
    return {
        "ess": float(found.min()),
        **dict(zip(("bulk", "tail", "squares"), found.tolist())),
        "r_hat": r_hat,
        "z": worst,
        "right": worst <= MOST_Z and r_hat <= MOST_R_HAT,
    }


def seconds_to_enough(before: float, sampling: float, ess: float, enough: float = ENOUGH) -> float:
    """The time to so many effective draws.

    >>> seconds_to_enough(2.0, 4.0, 500.0)
    10.0
    """
    return before + sampling * enough / ess
