"""How much mass there is: estimates of log Z, and likelihoods."""

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
