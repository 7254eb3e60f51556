"""The evidence of the data under a model: its marginal likelihood.

``estimate`` chooses among the methods, ``bridge`` is one of them, and ``compare`` puts models
beside each other; ``draws`` brings posterior draws to positions, ``contents`` is what an estimate
must know of a model. ``model_path`` leads from the
prior of a model, or a guide, to its joint density, which ``proper`` sees to be one;
``model_starts`` are the densities that it starts at. ``smc`` tempers a population.
"""

from pyro_ebm.evidence.compare import compare_evidence
from pyro_ebm.evidence.estimate import log_evidence
from pyro_ebm.evidence.result import EvidenceEstimate
from pyro_ebm.evidence.smc.sampler import SMC

__all__ = ["SMC", "EvidenceEstimate", "compare_evidence", "log_evidence"]
