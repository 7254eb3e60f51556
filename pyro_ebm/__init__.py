"""pyro_ebm: energy-based models in Pyro.

Write an energy in a model (:class:`UnnormalizedEnergy`), sample it (:class:`MCMC` with
:class:`LangevinKernel` or :class:`MHKernel`), fit it (``SVI`` with :class:`ContrastiveDivergence`
and the other losses), check it (:func:`to_arviz`).
"""

from pyro_ebm.diagnostics import to_arviz
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    FlowNCE,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_ebm.mcmc import MCMC, LangevinKernel, MHKernel, NormalizerError
from pyro_ebm.ops import fisher_divergence, score

__version__ = "0.1.0"

__all__ = [
    "MCMC",
    "NCE",
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "FlowNCE",
    "LangevinKernel",
    "MHKernel",
    "NormalizerError",
    "RankingNCE",
    "ScoreMatching",
    "SlicedScoreMatching",
    "UnnormalizedEnergy",
    "__version__",
    "fisher_divergence",
    "score",
    "to_arviz",
]
