r"""Discrete supports: which values an element may take, and distributions that know their blocks.

A discrete event is a set of *variables*, each of which takes one of :math:`K` *support values* in
:math:`\mathbb R^b`: a binary element one of ``[0], [1]``, a spin one of ``[-1], [1]``, a one-hot
row one of the :math:`K` unit vectors. Samplers of discrete states see nothing else: a flat event
of ``n * b`` numbers is ``n`` variables of ``b`` coordinates.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from pyro.distributions import Categorical, constraints
from torch import Tensor

from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.ops.integration.enumerate import states, values_of_states

MAX_SUPPORT_VALUES = 10_000


class _Spin(constraints.Constraint):
    """Elements that are -1 or 1."""

    is_discrete = True
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        """Whether each element is -1 or 1."""
        return value.abs() == 1

    def __repr__(self) -> str:
        return "spin"


spin = _Spin()


def support_values_of(support: constraints.Constraint, event_shape: torch.Size) -> Tensor | None:
    r"""The values of each variable of a discrete event, shape ``(K, b)``; None if continuous.

    Args:
        support: the support of a whole event.
        event_shape: shape of one event.

    Returns:
        The values that a variable can take. An event has ``event_shape.numel() / b`` variables.

    Raises:
        ValueError: for a discrete support without two finite bounds that all elements share.

    Example:
        >>> support_values_of(constraints.boolean, torch.Size([3]))
        tensor([[0.],
                [1.]])
        >>> support_values_of(constraints.one_hot, torch.Size([5, 3])).shape
        torch.Size([3, 3])
        >>> support_values_of(constraints.positive, torch.Size([])) is None
        True
    """
    if not support.is_discrete:
        return None
    support = elementwise(support)
    if isinstance(support, type(constraints.one_hot)):
        return torch.eye(event_shape[-1])
    if isinstance(support, type(constraints.boolean)):
        return torch.tensor([[0.0], [1.0]])
    if isinstance(support, _Spin):
        return torch.tensor([[-1.0], [1.0]])
    low, high = (_one_number(getattr(support, f"{e}_bound", None)) for e in ("lower", "upper"))
    if low is None or high is None or not high - low < MAX_SUPPORT_VALUES:
        raise ValueError(
            f"the discrete support {support} is not a finite set of values that all elements"
            " share: use constraints.boolean, spin, one_hot, or an integer_interval with numbers"
            " as bounds"
        )
    return torch.arange(low, high + 1)[:, None]


def _one_number(bound: Tensor | float | None) -> float | None:
    if bound is None:
        return None
    bound = torch.as_tensor(bound, dtype=torch.get_default_dtype())
    number = float(bound.flatten()[0])
    return number if math.isfinite(number) and bool((bound == number).all()) else None


class Enumeration(NamedTuple):
    """What is summed over states."""

    log_f: Callable[[Tensor], Tensor]
    """Maps flat states ``(chunk, n * b)`` to ``(chunk, *batch)``, the parameters' batch."""
    support_values: Tensor
    """The values of each variable, shape ``(K, b)``."""
    variables: int
    """The number n of variables that are enumerated."""
    chunk_size: int
    """How many states are held at once."""

    def draw(self, shape: torch.Size, batch_shape: torch.Size, max_states: int) -> Tensor:
        """Exact draws of the variables that are enumerated, through a table of all states.

        Args:
            shape: how many of each batch element.
            batch_shape: which the parameters' batch broadcasts to.
            max_states: how many states are still few enough.

        Returns:
            Flat states, shape ``(*shape, *batch_shape, n * b)``.

        Raises:
            ValueError: if there are more states.
        """
        logits = values_of_states(*self, max_states=max_states).movedim(0, -1)
        if logits.numel() == logits.shape[-1]:  # one table for all rows of a plate
            which = Categorical(logits=logits.flatten()).sample(shape + batch_shape)
        else:
            logits = logits.expand(batch_shape + logits.shape[-1:])
            which = Categorical(logits=logits).sample(shape)
        return states(self.support_values, self.variables)[which]


@runtime_checkable
class BlockGibbs(Protocol):
    r"""A distribution that can resample its variables in blocks, each given the rest.

    One *sweep* leaves the distribution exactly invariant. It is a pure function of the points and
    of random numbers drawn beforehand, batched over everything in front of the event.
    """

    supports_tempering: bool
    r"""Whether a sweep can leave :math:`e^{-\beta E}` invariant at other :math:`\beta` than 1."""

    def gibbs_noise(self, x: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a sweep of points ``(*sample, *batch, *event)``."""
        ...

    def gibbs_sweep(self, x: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None) -> Tensor:
        r"""New points, of the shape of ``x``.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.
            noise: what :meth:`gibbs_noise` gave.
            beta: inverse temperatures that broadcast with ``(*sample, *batch)``; None is 1.
        """
        ...
