"""What you write in a model: energies as Pyro distributions."""

from pyro_ebm.distributions.belief_network import DeepBeliefNetwork
from pyro_ebm.distributions.discrete import BlockGibbs, spin
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.rbm import RBM, JointRBM
from pyro_ebm.distributions.rbm_module import GaussianRBMModule, RBMModule

__all__ = [
    "RBM",
    "BlockGibbs",
    "DeepBeliefNetwork",
    "GaussianRBM",
    "GaussianRBMModule",
    "JointRBM",
    "RBMModule",
    "UnnormalizedEnergy",
    "find_energy",
    "spin",
]
