"""What you write in a model: energies as Pyro distributions."""

from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy

__all__ = ["UnnormalizedEnergy", "find_energy"]
