"""The real posteriors: each a Pyro model, its data, and the published means and deviations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.models import groups, schools
from tests.benchmarks.real import data, pyro_models

Samples = dict[str, np.ndarray]
"""Each site's draws, shape ``(chains, draws, *site)``."""

KNOWN_GROUPS = tuple(range(0, 998, 71))


@dataclass(frozen=True)
class RealPosterior:
    """A model with data, and what is known of its posterior."""

    name: str
    model: Callable[..., None]
    """In Pyro, of the tensors of the data; in NumPyro it has the same name."""
    dim: int
    """Of the unconstrained space."""
    arrays: Callable[[], data.Arrays]
    """The data, in double precision."""
    reference_fn: Callable[[], data.Reference]
    derive: Callable[[Samples, data.Arrays], Samples] = lambda samples, arrays: samples
    """Adds the published quantities that are functions of sites."""
    double: bool = False
    """Whether single precision is not enough, for anybody."""

    @cached_property
    def reference(self) -> data.Reference:
        """Mean, standard deviation and Monte Carlo error of every quantity, from 1 on:
        ``beta[1]``."""
        return self.reference_fn()

    def tensors(self) -> tuple[Tensor, ...]:
        """The data, in torch's default type."""
        return tuple(torch.tensor(x, dtype=torch.get_default_dtype()) for x in self.arrays())

    def quantities(self, samples: Samples) -> np.ndarray:
        """The draws of every quantity of the reference, shape ``(chains, draws, quantities)``."""
        samples = self.derive({k: np.asarray(x, float) for k, x in samples.items()}, self.arrays())
        columns = []
        for quantity in self.reference:
            name, _, index = quantity.partition("[")
            place = (int(index[:-1]) - 1,) if index else ()
            columns.append(samples[name][(..., *place)])
        return np.stack(columns, -1)


def _derive_gp(samples: Samples, arrays: data.Arrays) -> Samples:
    """The function values f = L f~."""
    x = arrays[0]
    distance = (x[:, None] - x) / samples["rho"][..., None, None]
    covariance = samples["alpha"][..., None, None] ** 2 * np.exp(-(distance**2) / 2)
    scale_tril = np.linalg.cholesky(covariance + 1e-10 * np.eye(len(x)))
    return {**samples, "f": (scale_tril @ samples["f_tilde"][..., None])[..., 0]}


def _derive_hmm(samples: Samples, arrays: data.Arrays) -> Samples:
    """Both means, and the rows of the transition matrix."""
    first, theta = samples["mu_1"], samples["theta"]
    mu = np.stack([first, first + samples["gap"]], -1)
    return {"mu": mu, "theta1": theta[..., 0, :], "theta2": theta[..., 1, :]}


def _derive_volatility(samples: Samples, arrays: data.Arrays) -> Samples:
    """The logarithm of each day's variance."""
    walk = samples["sigma"][..., None] * samples["walk"].cumsum(-1)
    return {**samples, "log_variance": samples["mu"][..., None] + walk}


def _published(
    file: str, prepare: Callable[..., data.Arrays], model: Callable[..., None], dim: int, **other
) -> RealPosterior:
    return RealPosterior(
        prepare.__name__,
        model,
        dim,
        lambda: data.arrays(file, prepare),
        lambda: data.load(file)["reference"],
        **other,
    )


_FLAT = pyro_models.flat_regression

REAL = {
    p.name: p
    for p in (
        _published("arma-arma11", data.arma11, pyro_models.arma11, 4),
        _published("earnings-earn_height", data.earn_height, _FLAT, 3),
        _published("earnings-logearn_interaction", data.logearn_interaction, _FLAT, 5),
        _published(
            "gp_pois_regr-gp_pois_regr",
            data.gp_pois_regr,
            pyro_models.gp_pois_regr,
            13,
            derive=_derive_gp,
            double=True,
        ),
        _published(
            "hmm_example-hmm_example",
            data.hmm_example,
            pyro_models.hmm_example,
            4,
            derive=_derive_hmm,
        ),
        _published(
            "kidiq_with_mom_work-kidscore_interaction_z", data.kidscore_interaction_z, _FLAT, 5
        ),
        _published("kidiq_with_mom_work-kidscore_mom_work", data.kidscore_mom_work, _FLAT, 5),
        _published("kidiq-kidscore_momiq", data.kidscore_momiq, pyro_models.kidscore_momiq, 3),
        _published("mesquite-logmesquite_logvash", data.logmesquite_logvash, _FLAT, 7),
        _published("mesquite-mesquite", data.mesquite, _FLAT, 8),
        _published("nes1996-nes", data.nes, _FLAT, 10),
        _published("diamonds-diamonds", data.diamonds, pyro_models.diamonds, 26),
        _published("sblri-blr", data.blr, pyro_models.blr, 6),
        _published(
            "stochastic_volatility",
            data.stochastic_volatility,
            pyro_models.stochastic_volatility,
            252,
            derive=_derive_volatility,
        ),
        RealPosterior(
            "hierarchy",
            groups,
            1000,
            data.hierarchy,
            lambda: data.hierarchy_reference(KNOWN_GROUPS),
        ),
        RealPosterior("eight_schools", schools, 10, data.schools, data.schools_reference),
    )
}
