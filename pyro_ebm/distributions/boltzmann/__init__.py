"""Energies of discrete units that interact: Boltzmann machines, Potts models, RBMs, stacks."""
