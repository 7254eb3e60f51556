"""How much mass there is: estimates of log Z, and likelihoods."""

from pyro_ebm.normalizer.estimate import estimate_log_normalizer
from pyro_ebm.normalizer.evaluate import LogLikelihood, evaluate
from pyro_ebm.normalizer.layers import LayersPath
from pyro_ebm.normalizer.path import GeometricPath, Path, TemperedPath
from pyro_ebm.normalizer.result import NormalizerEstimate, UnreliableEstimateWarning

__all__ = [
    "GeometricPath",
    "LayersPath",
    "LogLikelihood",
    "NormalizerEstimate",
    "Path",
    "TemperedPath",
    "UnreliableEstimateWarning",
    "estimate_log_normalizer",
    "evaluate",
]
