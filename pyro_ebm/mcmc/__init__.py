"""How you sample: kernels on flat batches of chains, and their runner.

Pyro's own ``HMC`` and ``NUTS`` stand beside this package's kernels.
"""

from pyro.infer.mcmc import HMC, NUTS, StreamingMCMC

from pyro_ebm.mcmc.kernel import Info, Kernel, State
from pyro_ebm.mcmc.langevin import LangevinKernel
from pyro_ebm.mcmc.metropolis import Independence, MHKernel, Proposal, RandomWalk
from pyro_ebm.mcmc.model import ModelPotential
from pyro_ebm.mcmc.normalizer_check import NormalizerError, check_normalizers
from pyro_ebm.mcmc.potential import EnergyPotential, FunctionPotential, Potential, Site
from pyro_ebm.mcmc.runner import MCMC
from pyro_ebm.mcmc.short_run import ChainDiagnostics

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "ChainDiagnostics",
    "EnergyPotential",
    "FunctionPotential",
    "Independence",
    "Info",
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
    "check_normalizers",
]
