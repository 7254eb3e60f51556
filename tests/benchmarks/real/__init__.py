"""Real posteriors with published answers: thirteen of posteriordb, and two of many dimensions.

``data`` reads them and writes design matrices, ``pyro_models`` and ``numpyro_models`` write each
model once, ``posteriors`` puts them together: ``REAL["nes"].model(*REAL["nes"].tensors())``.
"""
