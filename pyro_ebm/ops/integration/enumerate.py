r"""Sums over all states of discrete variables.

A set of :math:`n` variables, each with :math:`K` support values in :math:`\mathbb R^b`, has
:math:`K^n` states: state number :math:`i` has at its variables the support values of the digits of
:math:`i` in base :math:`K`, the first variable first. Sums over them,

.. math:: \log Z = \log \sum_{s} e^{\log f(s)},

run in chunks of states made by counting, so that neither the sum nor its gradient

.. math:: \nabla \log Z = \sum_s \frac{f(s)}{Z}\, \nabla \log f(s)

ever holds more than one chunk: what a chunk computed is computed again when gradients flow back.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_ebm.internals.functorch import in_transform

MAX_STATES = 2**25


def check_enumerable(num_values: int, variables: int, max_states: int = MAX_STATES) -> None:
    """Raises a ValueError if there are too many states to sum over.

    Args:
        num_values: K, how many values a variable takes.
        variables: n, how many variables there are.
        max_states: how many states are still few enough.

    Example:
        >>> check_enumerable(2, 784)
        Traceback (most recent call last):
        ValueError: 784 variables of 2 values have 2^784 states, ...
    """
    if num_values**variables > max_states:
        raise ValueError(
            f"{variables} variables of {num_values} values have {num_values}^{variables} states,"
            f" more than the {max_states:,} that may be summed over: use an estimate of log Z"
            " (annealed importance sampling), or, if you can wait, allow more"
        )


def states(
    support_values: Tensor, variables: int, start: int = 0, stop: int | None = None
) -> Tensor:
    r"""States number ``start`` to ``stop - 1``, of all :math:`K^n` by default.

    Args:
        support_values: the support values of a variable, shape ``(K, b)``.
        variables: n, how many variables there are.
        start: the number of the first state.
        stop: one more than that of the last.

    Returns:
        Flat states, shape ``(stop - start, n * b)``.

    Raises:
        ValueError: for numbers that no state has.

    Example:
        >>> states(torch.tensor([[0.0], [1.0]]), 2)
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.],
                [1., 1.]])
    """
    base, total = len(support_values), len(support_values) ** variables
    end = total if stop is None else stop
    if not 0 <= start <= end <= total:
        raise ValueError(f"states are numbered from 0 to {total - 1}, got {start} to {end - 1}")
    numbers = torch.arange(start, end, device=support_values.device)
    powers = [base**i for i in reversed(range(variables))]
    place = torch.tensor(powers, dtype=torch.long, device=support_values.device)
    digits = (numbers[:, None] // place) % base
    return support_values[digits].reshape(len(numbers), variables * support_values.shape[1])


def values_of_states(
    log_f: Callable[[Tensor], Tensor],
    support_values: Tensor,
    variables: int,
    chunk_size: int = 2**14,
    max_states: int = MAX_STATES,
) -> Tensor:
    r"""The table :math:`\log f(s)` of all states: logits of a categorical distribution over them.

    Args:
        log_f: as in :func:`log_sum_over_states`.
        support_values: as in :func:`log_sum_over_states`.
        variables: n, how many variables there are.
        chunk_size: how many states ``log_f`` gets at once.
        max_states: how many states are still few enough.

    Returns:
        Shape ``(K^n, *batch)``.

    Raises:
        ValueError: as :func:`log_sum_over_states` does.

    Example:
        >>> bits = torch.tensor([[0.0], [1.0]])
        >>> values_of_states(lambda s: s.sum(-1), bits, 2)
        tensor([0., 1., 1., 2.])
    """
    chunks = _chunks(len(support_values), variables, chunk_size, max_states)
    return torch.cat([_values(log_f, support_values, variables, *chunk) for chunk in chunks])


def log_sum_over_states(
    log_f: Callable[[Tensor], Tensor],
    support_values: Tensor,
    variables: int,
    chunk_size: int = 2**14,
    max_states: int = MAX_STATES,
) -> Tensor:
    r"""The log of a sum over all states, :math:`\log \sum_s e^{\log f(s)}`.

    Differentiable in whatever ``log_f`` is made of, as often as that is. (The transforms of
    ``torch.func`` cannot compute a chunk again: their gradients hold all of them.)

    Args:
        log_f: maps flat states, shape ``(chunk, n * b)``, to ``(chunk, *batch)``.
        support_values: the values of a variable, shape ``(K, b)``; states have their dtype and
            device.
        variables: n, how many variables there are.
        chunk_size: how many states ``log_f`` gets at once, to bound its memory.
        max_states: how many states are still few enough.

    Returns:
        Shape ``(*batch)``.

    Raises:
        ValueError: if there are more than ``max_states`` states, or ``log_f`` returns another
            shape.

    Example:
        >>> bits = torch.tensor([[0.0], [1.0]])
        >>> log_sum_over_states(lambda s: s.sum(-1), bits, 3)  # 3 log(1 + e)
        tensor(3.9398)
    """
    chunks = _chunks(len(support_values), variables, chunk_size, max_states)

    def log_sum(start: int, stop: int) -> Tensor:
        return _values(log_f, support_values, variables, start, stop).logsumexp(0)

    if len(chunks) == 1:
        return log_sum(*chunks[0])
    # log sum_s f(s) = log sum_chunks exp(log sum_{s in chunk} f(s))
    if torch.is_grad_enabled() and not in_transform():
        parts = [
            checkpoint(log_sum, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks
        ]
    else:
        parts = [log_sum(*c) for c in chunks]
    return torch.stack(parts).logsumexp(0)


def _chunks(
    num_values: int, variables: int, chunk_size: int, max_states: int
) -> list[tuple[int, int]]:
    check_enumerable(num_values, variables, max_states)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    total = num_values**variables
    return [(i, min(i + chunk_size, total)) for i in range(0, total, chunk_size)]


def _values(
    log_f: Callable[[Tensor], Tensor], support_values: Tensor, variables: int, start: int, stop: int
) -> Tensor:
    value = log_f(states(support_values, variables, start, stop))
    if value.dim() < 1 or len(value) != stop - start:
        raise ValueError(
            f"log_f must map {stop - start} states to a tensor whose first dimension is"
            f" {stop - start}, got shape {tuple(value.shape)}"
        )
    return value
