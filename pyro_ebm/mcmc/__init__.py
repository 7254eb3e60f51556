"""Kernels on flat batches of chains, and the runner that moves them.

A kernel moves positions ``(chains, dim)`` on a potential and sees nothing else. ``potentials``
makes one of a model or an energy, ``running`` has the public :class:`MCMC`. Pyro's own ``HMC`` and
``NUTS`` stand beside this package's kernels.
"""

from pyro.infer.mcmc import HMC, NUTS, StreamingMCMC

from pyro_ebm.distributions.core.sampler import ChainDiagnostics
from pyro_ebm.mcmc.annealed import annealed_langevin
from pyro_ebm.mcmc.engine.engine import GraphError
from pyro_ebm.mcmc.exchange.inner_steps import InnerStepsReport, inner_steps_report
from pyro_ebm.mcmc.exchange.kernel import ExchangeKernel
from pyro_ebm.mcmc.kernels.accept import accept
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.composed.composite import CompositeKernel
from pyro_ebm.mcmc.kernels.composed.flow import FlowKernel
from pyro_ebm.mcmc.kernels.composed.tempering import TemperingKernel, geometric_betas
from pyro_ebm.mcmc.kernels.discrete.discrete_gradient import (
    DiscreteLangevinKernel,
    GibbsWithGradientsKernel,
)
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.discrete.proposals import Flip, Swap
from pyro_ebm.mcmc.kernels.gradient.barker import BarkerKernel
from pyro_ebm.mcmc.kernels.gradient.hmc import ChEESKernel
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.kernels.gradient_free.integer_walk import IntegerWalk
from pyro_ebm.mcmc.kernels.gradient_free.metropolis import MHKernel
from pyro_ebm.mcmc.kernels.gradient_free.proposals import Independence, Proposal, RandomWalk
from pyro_ebm.mcmc.kernels.minibatch.kernel import MinibatchKernel
from pyro_ebm.mcmc.kernels.minibatch.schedules import PolynomialDecay
from pyro_ebm.mcmc.kernels.minibatch.sghmc import SGHMCKernel
from pyro_ebm.mcmc.kernels.minibatch.sgld import SGLDKernel
from pyro_ebm.mcmc.kernels.transition import TransitionKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.potentials.function import FunctionPotential
from pyro_ebm.mcmc.potentials.minibatch import MinibatchPotential
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.mcmc.running.mcmc import MCMC
from pyro_ebm.mcmc.starts.pathfinder import init_to_pathfinder
from pyro_ebm.mcmc.starts.strategies import init_to_draws, init_to_guide
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.models.checks.intractability import NormalizerError, check_normalizers
from pyro_ebm.models.sites.site import Site

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "BarkerKernel",
    "ChEESKernel",
    "ChainDiagnostics",
    "CompositeKernel",
    "DiscreteLangevinKernel",
    "EnergyPotential",
    "ExchangeKernel",
    "Flip",
    "FlowKernel",
    "FunctionPotential",
    "GibbsKernel",
    "GibbsWithGradientsKernel",
    "GraphError",
    "Independence",
    "Info",
    "InnerStepsReport",
    "IntegerWalk",
    "Kernel",
    "LangevinKernel",
    "MHKernel",
    "MinibatchKernel",
    "MinibatchPotential",
    "ModelPotential",
    "NormalizerError",
    "PolynomialDecay",
    "Potential",
    "Proposal",
    "RandomWalk",
    "SGHMCKernel",
    "SGLDKernel",
    "Site",
    "State",
    "StreamingMCMC",
    "Swap",
    "TemperingKernel",
    "TransitionKernel",
    "accept",
    "annealed_langevin",
    "check_normalizers",
    "geometric_betas",
    "init_to_draws",
    "init_to_guide",
    "init_to_pathfinder",
    "inner_steps_report",
]
