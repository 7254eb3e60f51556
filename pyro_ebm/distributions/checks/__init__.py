"""Checks of what is given to an energy, and errors that say the way out.

Arguments of the constructors; calls of the energy function; points on the boundary of a support;
energies whose rows influence each other; and Pyro's algorithms that need a log Z that is unknown.
"""
