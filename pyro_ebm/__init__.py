"""Energy-based models in Pyro.

Write an energy in a model:
    UnnormalizedEnergy        the density exp(-E(x)) / Z of an energy E, with Z unknown or known
    product, negation         the product of densities; one divided by a power of another
    mixture                   a mixture of densities whose Z are known
    noise_conditional         a density at every level of a ladder of noise
    geometric_ladder          the levels, each the same part of the one before
    ExponentialFamily         exp(theta . T(x)) / Z(theta), with its Z
    RBM, GaussianRBM          restricted Boltzmann machines over bits, over real numbers
    BoltzmannMachine, Potts   spins or bits, and categories, that interact in pairs
    pseudolikelihood          a likelihood of discrete data that needs no Z
    DeepBeliefNetwork         a stack of restricted Boltzmann machines
    nn                        networks as energies: MLPEnergy, ConvEnergy

Sample it:
    MCMC, SMC                 run a kernel: many chains at once; tempered particles
    LangevinKernel            Langevin dynamics, with or without a Metropolis test
    ChEESKernel, BarkerKernel Hamiltonian Monte Carlo; a proposal robust where steps overshoot
    MHKernel                  Metropolis-Hastings: random walk, independence, a proposal of yours
    GibbsKernel               Gibbs sweeps over discrete variables
    GibbsWithGradientsKernel  changes of one discrete variable, chosen by the gradient
    DiscreteLangevinKernel    changes of all discrete variables, by the gradient
    SGLDKernel, SGHMCKernel   models that look at a part of their data in each step
    CompositeKernel           kernels in turn, for discrete and continuous latents
    curvature_adjustment      corrects a posterior made with a pseudolikelihood
    TemperingKernel           replica exchange around another kernel
    FlowKernel                far moves by a flow that is fitted while chains make local ones
    ExchangeKernel            posteriors in which an unknown log Z depends on a latent
    NormalizerError           raised where a posterior needs a log Z that is unknown

Look at the result:
    ConvergenceWarning        says after a run that its draws may be wrong, and what to try
    to_arviz                  draws, log likelihoods and statistics as ArviZ data
    score, fisher_divergence  the gradient of a log density; the mean square of its differences
    plots                     densities, samples, images and the history of a training

Fit it, by fit(model, guide, loss, data) or SVI(model, guide, optim, loss=...):
    fit                       the training loop: batches, rates, averages, checkpoints
    ContrastiveDivergence     negatives from short or persistent chains
    ScoreMatching             gradients of log densities, by the trace of the Hessian
    SlicedScoreMatching       the same, along random directions
    DenoisingScoreMatching    the same, on noised data
    PseudoLikelihood          every discrete variable given all others
    EnergyDiscrepancy         a datum against points that diffused away from it and back
    RecoveryLikelihood        data given noisier ones, by short chains
    NCE, RankingNCE           data against noise, with log Z; a datum against its noise points
    FlowNCE                   data against a flow that learns
    CooperativeTraining       negatives from a flow that learns from them
    datasets                  densities in the plane with exact draws, digits, clothes, Ising spins
    save_training             writes a training to one file
    load_training             reads it, to go on exactly

Estimate its log Z:
    estimate_log_normalizer   log Z with an error: exact, quadrature, annealing, bridge, ...
    mean_log_likelihood       the mean log likelihood of data, with both of its errors
    log_evidence              the marginal likelihood of a Pyro model, with an error
    compare_evidence          a table of Bayes factors

More in pyro_ebm.distributions, .mcmc, .losses, .normalizer, .ops, .diagnostics and .files.
"""

from pyro_ebm import datasets, nn, plots
from pyro_ebm.diagnostics import ConvergenceWarning, to_arviz
from pyro_ebm.distributions import (
    RBM,
    BoltzmannMachine,
    DeepBeliefNetwork,
    ExponentialFamily,
    GaussianRBM,
    Potts,
    UnnormalizedEnergy,
    geometric_ladder,
    mixture,
    negation,
    noise_conditional,
    product,
    pseudolikelihood,
)
from pyro_ebm.evidence import SMC, compare_evidence, log_evidence
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    CooperativeTraining,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    FlowNCE,
    PseudoLikelihood,
    RankingNCE,
    RecoveryLikelihood,
    ScoreMatching,
    SlicedScoreMatching,
    fit,
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
    FlowKernel,
    GibbsKernel,
    GibbsWithGradientsKernel,
    LangevinKernel,
    MHKernel,
    NormalizerError,
    SGHMCKernel,
    SGLDKernel,
    TemperingKernel,
)
from pyro_ebm.models.curvature import curvature_adjustment
from pyro_ebm.normalizer import estimate_log_normalizer, mean_log_likelihood
from pyro_ebm.ops import fisher_divergence, score

__version__ = "0.2.0"

__all__ = [
    "MCMC",
    "NCE",
    "RBM",
    "SMC",
    "BarkerKernel",
    "BoltzmannMachine",
    "ChEESKernel",
    "CompositeKernel",
    "ContrastiveDivergence",
    "ConvergenceWarning",
    "CooperativeTraining",
    "DeepBeliefNetwork",
    "DenoisingScoreMatching",
    "DiscreteLangevinKernel",
    "EnergyDiscrepancy",
    "ExchangeKernel",
    "ExponentialFamily",
    "FlowKernel",
    "FlowNCE",
    "GaussianRBM",
    "GibbsKernel",
    "GibbsWithGradientsKernel",
    "LangevinKernel",
    "MHKernel",
    "NormalizerError",
    "Potts",
    "PseudoLikelihood",
    "RankingNCE",
    "RecoveryLikelihood",
    "SGHMCKernel",
    "SGLDKernel",
    "ScoreMatching",
    "SlicedScoreMatching",
    "TemperingKernel",
    "UnnormalizedEnergy",
    "__version__",
    "compare_evidence",
    "curvature_adjustment",
    "estimate_log_normalizer",
    "fisher_divergence",
    "fit",
    "geometric_ladder",
    "load_training",
    "log_evidence",
    "mean_log_likelihood",
    "mixture",
    "negation",
    "noise_conditional",
    "product",
    "pseudolikelihood",
    "save_training",
    "score",
    "to_arviz",
]
