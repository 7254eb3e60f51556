"""Losses for ``SVI`` in which energy sites need no log Z.

``base`` has the recipe for a new loss, ``sites`` the energy site of a trace. Each family of losses
has a module or a folder, and ``saving`` writes a training to one file.
"""

from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.losses.contrastive.fit_rbm import fit_layers, fit_rbm
from pyro_ebm.losses.contrastive.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.losses.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.losses.fitting.fit import FitResult, fit
from pyro_ebm.losses.module import EnergyLossModule
from pyro_ebm.losses.noise.cooperative import CooperativeTraining
from pyro_ebm.losses.noise.flow_nce import FlowNCE
from pyro_ebm.losses.noise.gaussian_noise import gaussian_noise
from pyro_ebm.losses.noise.nce import NCE
from pyro_ebm.losses.noise.ranking_nce import RankingNCE
from pyro_ebm.losses.pseudolikelihood import PseudoLikelihood
from pyro_ebm.losses.saving.training import load_training, save_training
from pyro_ebm.losses.score.denoising import DenoisingScoreMatching
from pyro_ebm.losses.score.score_matching import ScoreMatching
from pyro_ebm.losses.score.sliced import SlicedScoreMatching
from pyro_ebm.losses.sites import EnergySite

__all__ = [
    "NCE",
    "ContrastiveDivergence",
    "CooperativeTraining",
    "DenoisingScoreMatching",
    "EnergyDiscrepancy",
    "EnergyLoss",
    "EnergyLossModule",
    "EnergySite",
    "FitResult",
    "FlowNCE",
    "PseudoLikelihood",
    "RankingNCE",
    "RecoveryLikelihood",
    "ScoreMatching",
    "SlicedScoreMatching",
    "fit",
    "fit_layers",
    "fit_rbm",
    "gaussian_noise",
    "load_training",
    "save_training",
]
