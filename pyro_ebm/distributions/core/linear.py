"""Energies that are sums of others: of products, ratios, and densities at other temperatures."""

from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_ebm.distributions.core.density import EnergyDensity
from pyro_ebm.distributions.core.introspection import held
from pyro_ebm.distributions.core.wrappers import innermost

Term = tuple[Tensor | float, Callable[[Tensor], Tensor]]


class LinearEnergy:
    r"""The energy :math:`E(x) = \sum_i c_i f_i(x)` of energies and log densities.

    Args:
        terms: pairs of :math:`c_i`, a number or a tensor that broadcasts to ``(*sample, *batch)``,
            and :math:`f_i`, the method ``energy`` or ``log_prob`` of a distribution.
        event_dim: number of dimensions of an event.
    """

    def __init__(self, terms: Iterable[Term], event_dim: int):
        self.terms = tuple(terms)
        self.event_dim = event_dim
        self.held = held([x for c, f in self.terms for x in (_owner(f), c)])
        self.__name__ = _formula(self.terms)

    def __call__(self, x: Tensor) -> Tensor:
        """Energies ``(*sample, *batch)`` of points ``(*sample, *batch, *event)``."""
        total = x.new_zeros(x.shape[: x.dim() - self.event_dim])
        for c, f in self.terms:
            value = f(x)
            if isinstance(c, Tensor):  # 0 times infinity is 0 here: the power 0 of a density is 1
                total = total + torch.where(c == 0, torch.zeros_like(value), c * value)
            else:
                total = total + c * value
        return total


def name_of(fn: Distribution) -> str:
    """A name for a distribution: that of the energy function, else its class."""
    fn = innermost(fn, Independent)
    return fn.energy_name if isinstance(fn, EnergyDensity) else type(fn).__name__


def _owner(f: Callable[[Tensor], Tensor]) -> Distribution:
    return cast(Distribution, cast(MethodType, f).__self__)


def _formula(terms: Sequence[Term]) -> str:
    """The sum as a formula, such as ``ring - 0.5 moons - log Normal``."""
    text = ""
    for c, f in terms:
        owner = _owner(f)
        factor, sign = "c ", "+"
        if not isinstance(c, Tensor):
            factor, sign = "" if abs(c) == 1 else f"{abs(c):g} ", "-" if c < 0 else "+"
        log = "" if f == getattr(owner, "energy", None) else "log "
        text += f" {sign} {factor}{log}{name_of(owner)}"
    return text.removeprefix(" + ").strip() or "0"
