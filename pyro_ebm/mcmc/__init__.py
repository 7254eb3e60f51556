"""How you sample: kernels on flat batches of chains, and their runner.

Pyro's own ``HMC`` and ``NUTS`` stand beside this package's kernels.
"""

from pyro.infer.mcmc import HMC, NUTS, StreamingMCMC

from pyro_ebm.mcmc.barker import BarkerKernel
from pyro_ebm.mcmc.chees import ChEESKernel
from pyro_ebm.mcmc.composite import CompositeKernel
from pyro_ebm.mcmc.discrete_gradient import DiscreteLangevinKernel, GibbsWithGradientsKernel
from pyro_ebm.mcmc.discrete_proposals import Flip, Swap
from pyro_ebm.mcmc.energy_potential import EnergyPotential
from pyro_ebm.mcmc.exchange import ExchangeKernel
from pyro_ebm.mcmc.gibbs import GibbsKernel
from pyro_ebm.mcmc.inner_steps import InnerStepsReport, inner_steps_report
from pyro_ebm.mcmc.integer_walk import IntegerWalk
from pyro_ebm.mcmc.kernel import Info, Kernel, State
from pyro_ebm.mcmc.langevin import LangevinKernel
from pyro_ebm.mcmc.metropolis import Independence, MHKernel, Proposal, RandomWalk
from pyro_ebm.mcmc.model import ModelPotential
from pyro_ebm.mcmc.normalizer_check import NormalizerError, check_normalizers
from pyro_ebm.mcmc.potential import FunctionPotential, Potential, Site
from pyro_ebm.mcmc.runner import MCMC
from pyro_ebm.mcmc.short_run import ChainDiagnostics
from pyro_ebm.mcmc.tempering import TemperingKernel, geometric_betas

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
    "FunctionPotential",
    "GibbsKernel",
    "GibbsWithGradientsKernel",
    "Independence",
    "Info",
    "InnerStepsReport",
    "IntegerWalk",
    "Kernel",
    "LangevinKernel",
    "MHKernel",
    "ModelPotential",
    "NormalizerError",
    "Potential",
    "Proposal",
    "RandomWalk",
    "Site",
    "State",
    "StreamingMCMC",
    "Swap",
    "TemperingKernel",
    "check_normalizers",
    "geometric_betas",
    "inner_steps_report",
]
