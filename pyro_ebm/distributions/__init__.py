"""What you write in a model: energies as Pyro distributions."""

from pyro_ebm.distributions.belief_network import DeepBeliefNetwork
from pyro_ebm.distributions.boltzmann import BoltzmannMachine
from pyro_ebm.distributions.combine import IntegrabilityWarning, contrast, product
from pyro_ebm.distributions.discrete import BlockGibbs, spin
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.exponential_family import ExponentialFamily
from pyro_ebm.distributions.families import Family
from pyro_ebm.distributions.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.integrals import log_normalizer_by_quadrature
from pyro_ebm.distributions.lattice import lattice_edges
from pyro_ebm.distributions.mixtures import mixture
from pyro_ebm.distributions.potts import Potts
from pyro_ebm.distributions.rbm import RBM, JointRBM
from pyro_ebm.distributions.rbm_module import GaussianRBMModule, RBMModule

__all__ = [
    "RBM",
    "BlockGibbs",
    "BoltzmannMachine",
    "DeepBeliefNetwork",
    "ExponentialFamily",
    "Family",
    "GaussianRBM",
    "GaussianRBMModule",
    "IntegrabilityWarning",
    "JointRBM",
    "Potts",
    "RBMModule",
    "UnnormalizedEnergy",
    "contrast",
    "find_energy",
    "lattice_edges",
    "log_normalizer_by_quadrature",
    "mixture",
    "product",
    "spin",
]
