"""What every energy stands on.

``EnergyDensity`` is a density up to its constant, ``NormalizableDensity`` adds what is
known of log Z, and ``UnnormalizedEnergy`` draws. Beside them: supports and their
bijections, discrete supports, the tensors and modules that callables hold, wrapped distributions,
sums of energies, and the protocol of the samplers that energies draw with.
"""
