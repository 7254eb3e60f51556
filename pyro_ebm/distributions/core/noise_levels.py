"""Densities at several levels of noise, and what is made of them, level by level.

:func:`~pyro_ebm.noise_conditional` has the theory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.distributions.core.normalizer import NormalizableDensity
from pyro_ebm.ops.arguments import check_number, check_tensor, shown


class NoiseLevels(NormalizableDensity):
    """A density that may have noise levels: it is then the one at the smallest of them.

    Its arguments are those of :class:`~pyro_ebm.UnnormalizedEnergy`.
    """

    sigmas: tuple[float, ...] = ()
    """The noise levels of a noise-conditional energy, from the largest to the smallest."""
    noised = True
    """Whether its levels are one density with more and less noise; those of a product are not."""
    _at: Callable[[Tensor | float], Any] | None = None

    def at(self, sigma: Tensor | float) -> Self:
        r"""The density :math:`p(x; \sigma)` of a noise-conditional energy at a noise level.

        Args:
            sigma: :math:`\sigma`, a number, or a tensor that broadcasts with ``batch_shape``, as of
                one for each row.

        Raises:
            ValueError: if the energy has no noise levels, or sigma is not positive.

        Example:
            >>> from pyro_ebm import noise_conditional
            >>> p = noise_conditional(lambda x, sigma: x**2 / (1 + sigma**2) / 2, [1.0, 0.1])
            >>> p.at(3.0).score(torch.tensor(1.0)), p.at(torch.ones(5)).batch_shape
            (tensor(-0.1000), torch.Size([5]))
        """
        if self._at is None:
            raise ValueError(
                f"{self!r} has no noise levels: make it by noise_conditional(energy, sigmas), of an"
                " energy E(x, sigma)"
            )
        if isinstance(sigma, Tensor):
            check_tensor("sigma", sigma)
        else:
            check_number("sigma", sigma)
        values = torch.as_tensor(sigma)
        if readable(values) and not ((values > 0) & values.isfinite()).all():
            raise ValueError(f"sigma must be positive and finite, got {shown(sigma)}")
        level, shape = self._at(sigma), values.shape
        shape = torch.broadcast_shapes(self.batch_shape, shape)
        return level if level.batch_shape == shape else level.expand(shape)


Density = TypeVar("Density", bound=NoiseLevels)


def on_ladder(
    p: Density,
    parts: Sequence[object],
    combine: Callable[[list[Any]], Density],
    noised: bool = False,
) -> Density:
    """A density made of parts: noise-conditional, if one of them is.

    Args:
        p: ``combine(parts)``, the density at the smallest noise.
        parts: its parts; those that have no noise levels are the same at every level.
        combine: makes it of its parts.
        noised: whether its levels are one density with more and less noise.

    Raises:
        ValueError: if two parts have other noise levels.
    """
    ladders = {part.sigmas for part in parts if isinstance(part, NoiseLevels)} - {()}
    if len(ladders) > 1:
        raise ValueError(
            f"the parts of {p!r} have other noise levels, {' and '.join(map(str, ladders))}: give"
            " them one ladder, or combine the densities at a level of each, p.at(sigma)"
        )
    for p.sigmas in ladders:
        p._at, p.noised = partial(_combined_at, list(parts), combine), noised
    return p


def _combined_at(
    parts: list[object], combine: Callable[[list[Any]], Density], sigma: Tensor | float
) -> Density:
    return combine([p.at(sigma) if isinstance(p, NoiseLevels) and p.sigmas else p for p in parts])
