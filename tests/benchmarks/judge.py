"""How good draws are: effective sizes, R-hat, and whether samplers agree.

Bulk and tail effective sizes and rank-normalized R-hat are ArviZ's, of the worst quantity. R-hat is
taken over half chains. Where it is well above 1.01, an effective size means nothing.

Agreement is judged by the first two moments of every quantity. A sampler's moment differs from the
mean of the others', weighted by precision, by

    z = (own - others) / sqrt(mcse(own)^2 + mcse(others)^2)

standard errors; the largest |z| of all quantities and both moments is told. Some 3 is what chance
does among fifty; 6 is a sampler that is wrong, or has not converged.
"""

from typing import Any

import arviz as az
import numpy as np

MOST = 32  # quantities that are judged, of a model that has more

Samples = dict[str, np.ndarray]


def quantities(samples: Samples) -> np.ndarray:
    """Draws of numbers, shape ``(chains, draws, n)``; of many alike, evenly spaced ones.

    Elements that are 0 or 1 by construction, as in a Cholesky factor, are left out.
    """
    few, many = [], []
    for name in sorted(samples):
        x = samples[name].reshape(*samples[name].shape[:2], -1).astype(np.float64)
        fixed = ((x == 0) | (x == 1)).all((0, 1))
        x = x[..., ~fixed]
        (few if x.shape[-1] <= 8 else many).append(x)
    room = max(MOST - sum(x.shape[-1] for x in few), 1)
    for x in many:
        chosen = np.linspace(0, x.shape[-1] - 1, min(room // len(many), x.shape[-1]))
        few.append(x[..., chosen.round().astype(int)])
    return np.concatenate(few, -1)


def judge(samples: Samples) -> dict[str, Any]:
    """The worst effective sizes and R-hat, and the moments with their standard errors."""
    x = quantities(samples)
    columns = [np.ascontiguousarray(x[..., i]) for i in range(x.shape[-1])]
    halves = x.shape[1] // 2
    split = [np.concatenate([c[:, :halves], c[:, halves : 2 * halves]]) for c in columns]
    moments = [m for c in columns for m in (c, np.square(c))]
    with np.errstate(all="ignore"):
        size = [float(az.ess(m, method="mean")) for m in moments]
        return {
            "ess": float(min(az.ess(c, method="bulk") for c in columns)),
            "tail_ess": float(min(az.ess(c, method="tail") for c in columns)),
            "r_hat": float(max(az.rhat(c, method="rank") for c in split)),
            "moments": [float(m.mean()) for m in moments],
            "errors": [float(m.std() / np.sqrt(n)) for m, n in zip(moments, size)],
        }


def agreement(own: dict[str, Any], others: list[dict[str, Any]], mean: float | None) -> float:
    """The largest ``|z|`` against the others that converged, NaN if none did."""
    errors = np.array(own["errors"])
    moments = np.array(own["moments"])
    if mean is not None:  # every other one is a mean, and known
        return float(np.abs((moments[::2] - mean) / errors[::2]).max())
    good = [other for other in others if other["r_hat"] < 1.02]
    if not good:
        return float("nan")
    weights = np.array([other["errors"] for other in good]) ** -2.0
    theirs = (weights * np.array([other["moments"] for other in good])).sum(0) / weights.sum(0)
    return float(np.abs((moments - theirs) / np.sqrt(errors**2 + 1 / weights.sum(0))).max())
