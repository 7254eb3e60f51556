r"""The accept-reject step of Metropolis and Hastings, for a batch of chains.

A proposal is accepted with probability :math:`\min(1, r)`. A proposal at which the potential or
its gradient is not finite, or whose ratio is no number, has :math:`r = 0`: it is rejected, whatever
the arithmetic made of it.

Reference:
    Metropolis et al. (1953), Equation of state calculations by fast computing machines.
    Hastings (1970), Monte Carlo sampling methods using Markov chains and their applications.
"""

import torch
from torch import Tensor


def metropolis_accept(
    log_ratio: Tensor, valid: Tensor, log_uniform: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Acceptance probability :math:`\min(1, r)` and the decision :math:`\log u < \log r`.

    Args:
        log_ratio: :math:`\log r`, shape ``(chains,)``; NaN counts as :math:`r = 0`.
        valid: whether the proposal may be accepted at all, boolean, shape ``(chains,)``.
        log_uniform: :math:`\log u` with :math:`u` uniform on (0, 1), shape ``(chains,)``; see
            :func:`log_uniform`.

    Returns:
        The acceptance probability, shape ``(chains,)``, and the boolean decision, shape
        ``(chains,)``.

    Example:
        >>> log_ratio = torch.tensor([0.5, -0.5, float("nan")])
        >>> valid = torch.tensor([True, True, False])
        >>> metropolis_accept(log_ratio, valid, torch.full((3,), -0.7))
        (tensor([1.0000, 0.6065, 0.0000]), tensor([ True,  True, False]))
    """
    log_ratio = torch.where(valid & ~log_ratio.isnan(), log_ratio, -torch.inf)
    return log_ratio.clamp(max=0.0).exp(), log_uniform < log_ratio


def log_uniform(like: Tensor) -> Tensor:
    r"""Draws of :math:`\log u` with :math:`u` uniform on (0, 1], all finite.

    ``torch.rand`` can be 0, one time in :math:`2^{24}` in single precision, and :math:`\log 0`
    would accept a proposal of any probability.

    Args:
        like: a tensor of the shape, dtype and device wanted.

    Example:
        >>> bool((log_uniform(torch.empty(100_000)).mean() + 1).abs() < 0.02)  # its mean is -1
        True
    """
    return torch.log1p(-torch.rand_like(like))


def select(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the accepted chains, ``old`` for the others.

    Args:
        accepted: boolean, shape ``(chains,)``.
        new: shape ``(chains, ...)``.
        old: shape ``(chains, ...)``.

    Example:
        >>> select(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """
    if new.dim() > 1:
        accepted = accepted.reshape(accepted.shape + (1,) * (new.dim() - 1))
    return torch.where(accepted, new, old)
