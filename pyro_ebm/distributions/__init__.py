"""What you write in a model: energies as Pyro distributions.

``energy`` holds :class:`~pyro_ebm.UnnormalizedEnergy`, the base of all, and the recipe for one of
your own; ``product`` and ``mixture`` combine densities; ``flow`` wraps normalizing flows;
``exponential`` and ``boltzmann`` are families with a known or computable log Z; ``composite``
multiplies conditionals, which need none. ``core`` and ``checks`` hold what these stand on.
"""

from pyro_ebm.distributions.boltzmann.belief_network import DeepBeliefNetwork
from pyro_ebm.distributions.boltzmann.gaussian_rbm import GaussianRBM
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.distributions.boltzmann.potts import Potts
from pyro_ebm.distributions.boltzmann.rbm import RBM, JointRBM
from pyro_ebm.distributions.boltzmann.rbm_module import GaussianRBMModule, RBMModule
from pyro_ebm.distributions.composite.pseudolikelihood import pseudolikelihood
from pyro_ebm.distributions.core.discrete import BlockGibbs, spin
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.exponential.families import Family
from pyro_ebm.distributions.exponential.quadrature import log_normalizer_by_quadrature
from pyro_ebm.distributions.mixture import mixture
from pyro_ebm.distributions.noise_conditional import geometric_ladder, noise_conditional
from pyro_ebm.distributions.product import IntegrabilityWarning, negation, product

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
    "find_energy",
    "geometric_ladder",
    "lattice_edges",
    "log_normalizer_by_quadrature",
    "mixture",
    "negation",
    "noise_conditional",
    "product",
    "pseudolikelihood",
    "spin",
]
