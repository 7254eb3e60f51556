"""pyro_ebm: energy-based models in Pyro.

Write an energy in a model (:class:`UnnormalizedEnergy`, :class:`RBM`, :func:`product`, ...), sample
it (:class:`MCMC` with :class:`LangevinKernel`, :class:`GibbsKernel`, ...), fit it (``SVI`` with
:class:`ContrastiveDivergence` and the other losses), check it (:func:`to_arviz`,
:func:`estimate_log_normalizer`).
"""

from pyro_ebm import nn
from pyro_ebm.diagnostics import to_arviz
from pyro_ebm.distributions import (
    RBM,
    BoltzmannMachine,
    DeepBeliefNetwork,
    ExponentialFamily,
    GaussianRBM,
    Potts,
    UnnormalizedEnergy,
    mixture,
    negation,
    product,
)
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    FlowNCE,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
    load_training,
    save_training,
)
from pyro_ebm.mcmc import (
    MCMC,
    BarkerKernel,
    ChEESKernel,
    CompositeKernel,
    DiscreteLangevinKernel,
    ExchangeKernel,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    NormalizerError,
    TemperingKernel,
)
from pyro_ebm.normalizer import estimate_log_normalizer, mean_log_likelihood
from pyro_ebm.ops import fisher_divergence, score

__version__ = "0.1.0"

__all__ = [
    "MCMC",
    "NCE",
    "RBM",
    "BarkerKernel",
    "BoltzmannMachine",
    "ChEESKernel",
    "CompositeKernel",
    "ContrastiveDivergence",
    "DeepBeliefNetwork",
    "DenoisingScoreMatching",
    "DiscreteLangevinKernel",
    "ExchangeKernel",
    "ExponentialFamily",
    "FlowNCE",
    "GaussianRBM",
    "GibbsKernel",
    "GibbsWithGradientsKernel",
    "LangevinKernel",
    "MHKernel",
    "NormalizerError",
    "Potts",
    "RankingNCE",
    "ScoreMatching",
    "SlicedScoreMatching",
    "TemperingKernel",
    "UnnormalizedEnergy",
    "__version__",
    "estimate_log_normalizer",
    "fisher_divergence",
    "load_training",
    "mean_log_likelihood",
    "mixture",
    "negation",
    "product",
    "save_training",
    "score",
    "to_arviz",
]
