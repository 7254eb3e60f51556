"""Estimates of log Z with their errors, and the likelihood of data.

``estimate`` chooses among the methods: exact sums and quadrature, ``importance`` sampling,
``annealing`` and the ``bridge``. ``proposals`` checks the distributions that points are drawn from,
``starts`` puts them on unconstrained positions.
"""

from pyro_ebm.normalizer.annealing.path import AnnealingPath, GeometricPath, TemperedPath
from pyro_ebm.normalizer.annealing.rbm_path import LayersPath
from pyro_ebm.normalizer.estimate import estimate_log_normalizer
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, UnreliableEstimateWarning
from pyro_ebm.normalizer.likelihood import LogLikelihood, mean_log_likelihood

__all__ = [
    "AnnealingPath",
    "GeometricPath",
    "LayersPath",
    "LogLikelihood",
    "NormalizerEstimate",
    "TemperedPath",
    "UnreliableEstimateWarning",
    "estimate_log_normalizer",
    "mean_log_likelihood",
]
