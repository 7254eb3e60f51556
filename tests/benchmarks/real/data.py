"""Data of the real posteriors, as arrays that their models take, and the published answers.

The files in ``tests/data/posteriors`` are those of posteriordb (BSD 3-clause, Stan developers),
which its README there cites.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.models import groups_data, schools_data

FOLDER = Path(__file__).parents[2] / "data" / "posteriors"

Arrays = tuple[np.ndarray, ...]
Data = dict[str, Any]
Reference = dict[str, dict[str, float]]


def load(file: str) -> dict[str, Any]:
    """What a file holds: name, data and reference."""
    path = FOLDER / f"{file}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return json.loads(gzip.decompress(path.with_suffix(".json.gz").read_bytes()))


def _design(*columns: Any) -> np.ndarray:
    """Columns beside each other, after one of ones; numbers are spread over the rows."""
    columns = np.broadcast_arrays(*columns)
    return np.stack([np.ones(len(columns[0])), *columns], 1)


def _levels(x: np.ndarray, *levels: int) -> list[np.ndarray]:
    return [x == level for level in levels]


def _standardized(x: np.ndarray) -> np.ndarray:
    """By two standard deviations, which compares with a binary input (Gelman 2008)."""
    return (x - x.mean()) / (2 * x.std(ddof=1))


def earn_height(d: Data) -> Arrays:
    return _design(d["height"]), d["earn"]


def logearn_interaction(d: Data) -> Arrays:
    return _design(d["height"], d["male"], d["height"] * d["male"]), np.log(d["earn"])


def kidscore_interaction_z(d: Data) -> Arrays:
    hs, iq = _standardized(d["mom_hs"]), _standardized(d["mom_iq"])
    return _design(hs, iq, hs * iq), d["kid_score"]


def kidscore_mom_work(d: Data) -> Arrays:
    return _design(*_levels(d["mom_work"], 2, 3, 4)), d["kid_score"]


def kidscore_momiq(d: Data) -> Arrays:
    return _design(d["mom_iq"]), d["kid_score"]


def logmesquite_logvash(d: Data) -> Arrays:
    area, shape = d["diam1"] * d["diam2"], d["diam1"] / d["diam2"]
    logs = [area * d["canopy_height"], area, shape, d["total_height"]]
    return _design(*map(np.log, logs), d["group"]), np.log(d["weight"])


def mesquite(d: Data) -> Arrays:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    return _design(*(d[name] for name in names)), d["weight"]


def nes(d: Data) -> Arrays:
    age = _levels(d["age_discrete"], 2, 3, 4)
    others = (d[name] for name in ("educ1", "gender", "income"))
    return _design(d["real_ideo"], d["race_adj"], *age, *others), d["partyid7"]


def diamonds(d: Data) -> Arrays:
    x = d["X"][:, 1:]
    return x - x.mean(0), d["Y"]


def blr(d: Data) -> Arrays:
    return d["X"], d["y"]


def arma11(d: Data) -> Arrays:
    return (d["y"],)


def gp_pois_regr(d: Data) -> Arrays:
    return d["x"], d["k"]


def hmm_example(d: Data) -> Arrays:
    return (d["y"],)


def stochastic_volatility(d: Data) -> Arrays:
    return (d["y"],)


def arrays(file: str, prepare: Callable[[Data], Arrays]) -> Arrays:
    """What a model takes, in double precision."""
    data = {name: np.asarray(value, float) for name, value in load(file)["data"].items()}
    return tuple(np.asarray(x, float) for x in prepare(data))


# ---- hierarchies, whose answers are known -----------------------------------------------------


def hierarchy() -> Arrays:
    """998 groups of one observation each, those of :func:`tests.benchmarks.models.groups`."""
    return tuple(x.astype(float) for x in groups_data())


def schools() -> Arrays:
    """Eight schools, of :func:`tests.benchmarks.models.schools`: standard errors and effects."""
    return tuple(x.astype(float) for x in schools_data())


def hierarchy_reference(which: tuple[int, ...]) -> Reference:
    """Its posterior moments, those of some groups, counted from 0."""
    (y,) = hierarchy()
    mu, tau = np.linspace(0.5, 1.5, 401), np.linspace(1e-6, 1.5, 601)
    return _two_levels(y, np.ones_like(y), mu, tau, -((tau / 2) ** 2) / 2, which)


def schools_reference() -> Reference:
    """The posterior moments of eight schools."""
    sigma, y = schools()
    mu, tau = np.linspace(-25.0, 30.0, 401), (np.arange(6000) + 0.5) / 40
    return _two_levels(y, sigma, mu, tau, -np.log1p((tau / 5) ** 2), tuple(range(8)))


def _two_levels(
    y: np.ndarray,
    sigma: np.ndarray,
    mu: np.ndarray,
    tau: np.ndarray,
    log_prior: np.ndarray,
    which: tuple[int, ...],
) -> Reference:
    r"""Moments by quadrature over the two parameters that all groups share.

    .. math:: y_j \mid \mu, \tau \sim N(\mu, \sigma_j^2 + \tau^2), \qquad
              \eta_j \mid \mu, \tau, y \sim
              N\Bigl(\frac{\tau (y_j - \mu)}{\sigma_j^2 + \tau^2},
              \frac{\sigma_j^2}{\sigma_j^2 + \tau^2}\Bigr), \qquad \mu \sim N(0, 5^2)

    Args:
        y: observations, shape ``(groups,)``.
        sigma: their standard deviations, of the same shape.
        mu: points of the quadrature, evenly spaced.
        tau: the same.
        log_prior: of ``tau``.
        which: groups whose moments are wanted, counted from 0.
    """
    mu = mu[:, None]
    log_density = log_prior - 0.5 * (mu / 5) ** 2
    for s in np.unique(sigma):  # all groups of one standard deviation at once
        same = y[sigma == s]
        squares = ((same - same.mean()) ** 2).sum() + len(same) * (same.mean() - mu) ** 2
        variance = s**2 + tau**2
        log_density = log_density - 0.5 * (len(same) * np.log(variance) + squares / variance)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()

    def moments(mean: np.ndarray, variance: Any = 0.0) -> dict[str, float]:
        first = (weight * mean).sum()
        second = (weight * (mean**2 + variance)).sum()
        return {"mean": first, "sd": np.sqrt(second - first**2), "mcse_mean": 0.0}

    found = {"mu": moments(mu + 0 * tau), "tau": moments(tau + 0 * mu)}
    for j in which:
        variance = sigma[j] ** 2 + tau**2
        mean = tau * (y[j] - mu) / variance
        found[f"eta[{j + 1}]"] = moments(mean, sigma[j] ** 2 / variance)
    return found
