"""pyro_ebm: energy-based models in Pyro.

Write an energy in a model (:class:`UnnormalizedEnergy`), sample it (:class:`MCMC` with
:class:`LangevinKernel` or :class:`MHKernel`), check it (:func:`to_arviz`).
"""

from pyro_ebm.diagnostics import to_arviz
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.mcmc import MCMC, LangevinKernel, MHKernel, NormalizerError

__version__ = "0.1.0"

__all__ = [
    "MCMC",
    "LangevinKernel",
    "MHKernel",
    "NormalizerError",
    "UnnormalizedEnergy",
    "__version__",
    "to_arviz",
]
