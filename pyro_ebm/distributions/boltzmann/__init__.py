"""Energies of discrete units that interact.

Units that interact in pairs: Boltzmann machines (the Ising model) and Potts models, on graphs and
lattices. Units in two layers: restricted Boltzmann machines over bits or real numbers, their
parameters as modules, and deep belief networks, which stack them.
"""
