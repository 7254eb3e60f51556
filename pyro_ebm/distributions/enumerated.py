r"""Energies of discrete variables that few enough states make exact: their sums and draws.

An energy whose other variables can be summed in closed form, :math:`f(s) = \sum_r e^{-E(s, r)}`,
has :math:`Z = \sum_s f(s)`, a sum over the states :math:`s` of the variables that are left. An
exact draw is one of :math:`s` from the table of all :math:`f(s)`, then one of the rest given it.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Self, TypedDict

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.distributions.core.discrete import Enumeration, support_values_of
from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.distributions.core.sampler import ChainKernel
from pyro_ebm.distributions.energy import UnnormalizedEnergy


class EnergySettings(TypedDict, total=False):
    """What every enumerated energy takes of :class:`~pyro_ebm.UnnormalizedEnergy`."""

    log_normalizer: Tensor | float | None
    kernel: ChainKernel | None
    num_steps: int
    learned_normalizer: bool | None
    validate_args: bool | None


class EnumeratedEnergy(UnnormalizedEnergy):
    r"""An energy with an exact :math:`\log Z` and exact draws where few variables are enumerated.

    A member writes :meth:`_enumeration` and :meth:`_completed`. The arguments are those of
    :class:`~pyro_ebm.UnnormalizedEnergy`, without a base, which would not be in the sums.
    """

    def __init__(
        self,
        event_shape: torch.Size | tuple[int, ...],
        support: constraints.Constraint,
        batch_shape: torch.Size | tuple[int, ...],
        *,
        log_normalizer: Tensor | float | None = None,
        kernel: ChainKernel | None = None,
        num_steps: int = 100,
        learned_normalizer: bool | None = None,
        validate_args: bool | None = None,
    ):
        super().__init__(
            None,
            event_shape,
            support,
            batch_shape,
            log_normalizer=log_normalizer,
            kernel=kernel,
            num_steps=num_steps,
            learned_normalizer=learned_normalizer,
            validate_args=validate_args,
        )

    @torch.no_grad()
    def exact_sample(
        self, sample_shape: torch.Size | tuple[int, ...] = (), max_units: int = 20
    ) -> Tensor:
        """Independent exact draws, through a table of all states that are enumerated.

        Args:
            sample_shape: how many.
            max_units: as in :meth:`exact_log_normalizer`.

        Returns:
            Points, shape ``(*sample_shape, *batch_shape, *event_shape)``.

        Raises:
            ValueError: if there are more states.
        """
        shape = torch.Size(sample_shape)
        enumeration = self._enumeration(max_units)
        return self._completed(enumeration.draw(shape, self.batch_shape, 2**max_units))

    @abstractmethod
    def _enumeration(self, max_units: int) -> Enumeration:
        """What is summed over which states; raises a ValueError if there are too many."""

    @abstractmethod
    def _completed(self, s: Tensor) -> Tensor:
        """Points drawn given the enumerated variables, flat states ``(*sample, *batch, n * b)``."""

    def _scaled(self, beta: Tensor | float, parameters: Mapping[str, int]) -> Self:
        r"""The density :math:`\propto p(x)^\beta` of an energy that is linear in its parameters.

        Args:
            beta: a number, or a tensor that broadcasts with the batch. At 0 all states are alike,
                below it the most likely become the least.
            parameters: the attributes that ``beta`` multiplies, and the dimensions of their events.

        Raises:
            ValueError: if ``beta`` is not finite, or does not broadcast.
        """
        number = not isinstance(beta, Tensor)
        if number and beta == 1:
            return self
        scale = torch.as_tensor(beta, dtype=self.like.dtype, device=self.like.device)
        check = number or (self._validate_args and readable(scale))
        if check and not scale.isfinite().all():
            raise ValueError(f"beta must be finite, got {beta}")
        new = copy.copy(self.unexpanded)
        try:
            batch = torch.broadcast_shapes(scale.shape, self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"beta has shape {tuple(scale.shape)}, which does not broadcast with batch_shape="
                f"{tuple(self.batch_shape)}"
            ) from error
        for name, dims in parameters.items():
            setattr(new, name, scale[(...,) + (None,) * dims] * getattr(self, name))
        new._batch_shape = torch.broadcast_shapes(scale.shape, new.batch_shape)
        new._log_normalizer = new._learned_normalizer = new.normalized_parts = None
        if number and beta == 0:
            values = support_values_of(self.support, self.event_shape)
            assert values is not None
            variables = self.event_shape.numel() // values.shape[1]
            new = new.normalized_by_formula(variables * math.log(len(values)))
        return new if new.batch_shape == batch else new.expand(batch)


@torch.no_grad()
def sample_by_table(
    p: UnnormalizedEnergy,
    sample_shape: torch.Size | tuple[int, ...] = (),
    max_units: int = 20,
) -> Tensor:
    r"""Independent exact draws of an energy on a finite support, through a table of its states.

    Args:
        p: the energy.
        sample_shape: how many.
        max_units: at most :math:`2^{\text{max\_units}}` states, if there is more than one variable.

    Returns:
        Points, shape ``(*sample_shape, *batch_shape, *event_shape)``.

    Raises:
        ValueError: if there are more states, or the support is no finite set.

    Example:
        >>> few = dist.constraints.integer_interval(0, 9)
        >>> p = UnnormalizedEnergy(lambda k: 19.0 * k, support=few)
        >>> sample_by_table(p, (3,))
        tensor([0., 0., 0.])
    """
    enumeration, shape = p._enumeration(max_units), torch.Size(sample_shape)
    alone = enumeration.variables == 1
    most = len(enumeration.support_values) if alone else 2**max_units
    s = enumeration.draw(shape, p.batch_shape, most)
    return s.reshape(shape + p.batch_shape + p.event_shape)
