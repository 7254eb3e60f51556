"""Step sizes that fall after the warmup."""

from dataclasses import dataclass

from pyro_ebm.mcmc.kernels.transition import check_positive


@dataclass(frozen=True)
class PolynomialDecay:
    r"""The factor :math:`(1 + t / b)^{-\gamma}` of the step size after ``t`` transitions.

    With :math:`\varepsilon = a b^{-\gamma}` these are the steps :math:`a (b + t)^{-\gamma}` of
    Welling and Teh. For :math:`\gamma` in (1/2, 1] the bias vanishes in the end; at 1/3 the
    error after many steps is least, where draws are weighted by their step size.

    Args:
        offset: :math:`b`, after how many transitions the step size falls notably.
        power: :math:`\gamma`.

    Reference:
        Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics. Teh,
        Thiery and Vollmer (2016), Consistency and fluctuations for stochastic gradient Langevin
        dynamics.

    Example:
        >>> decay = PolynomialDecay(offset=100, power=0.5)
        >>> decay(0), decay(300)
        (1.0, 0.5)
    """

    offset: float = 100.0
    power: float = 1 / 3

    def __post_init__(self) -> None:
        check_positive("offset", self.offset)
        check_positive("power", self.power)

    def __call__(self, t: int) -> float:
        """The factor after ``t`` transitions."""
        return (1 + t / self.offset) ** -self.power
