r"""Acceptance of proposals: the rule of Metropolis and Hastings, and what counts as a divergence.

A proposal diverges if the potential there, its gradient or the log ratio is not finite, or if the
log ratio is far below what an accurate step gives. It is then rejected, and counted.
"""

import math

from torch import Tensor

from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.steps.metropolis import metropolis_accept, select

MAX_ENERGY_ERROR = 1000.0
"""A gradient step whose log ratio is below minus this is a divergence, as in NUTS."""


def accept(
    old: State,
    new: State,
    log_ratio: Tensor,
    log_u: Tensor,
    max_energy_error: float = math.inf,
    discrete: bool = False,
) -> tuple[State, Info]:
    r"""The states after proposals were accepted with probability :math:`\min(1, r)`.

    Args:
        old: where the chains are.
        new: the proposals.
        log_ratio: :math:`\log r`, shape ``(chains,)``; NaN counts as :math:`r = 0`.
        log_u: :math:`\log u` with :math:`u` uniform on (0, 1), shape ``(chains,)``.
        max_energy_error: a log ratio below minus this is a divergence. Steps along the gradient
            give ``MAX_ENERGY_ERROR`` of this function's module, 1000 as in NUTS.
        discrete: whether the space is discrete, where a state of probability 0 is no divergence.

    Returns:
        The new states, and the acceptance probabilities and divergences.

    Example:
        >>> old = State(torch.zeros(2, 1), torch.zeros(2), None)
        >>> new = State(torch.ones(2, 1), torch.tensor([1.0, math.nan]), None)
        >>> state, info = accept(old, new, old.potential - new.potential, torch.full((2,), -2.0))
        >>> state.z.flatten(), info.diverging
        (tensor([1., 0.]), tensor([False,  True]))
    """
    accepted, info = decide(new, log_ratio, log_u, max_energy_error, discrete)
    return choose(accepted, new, old), info


def decide(
    new: State,
    log_ratio: Tensor,
    log_u: Tensor,
    max_energy_error: float = math.inf,
    discrete: bool = False,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """The decision of :func:`accept`, before the states are chosen.

    Args:
        new: the proposals.
        log_ratio: as for :func:`accept`.
        log_u: as for :func:`accept`.
        max_energy_error: as for :func:`accept`.
        discrete: as for :func:`accept`.
        allowed: which proposals may be accepted at all, if not all of them, boolean, shape
            ``(chains,)``; the others do not diverge for that.

    Returns:
        Which proposals are accepted, shape ``(chains,)``, and the statistics of the transition.
    """
    valid = is_valid(new)
    allowed = valid if allowed is None else valid & allowed
    accept_prob, accepted = metropolis_accept(log_ratio, allowed, log_u)
    diverging = ~(valid & (log_ratio >= -max_energy_error))  # NaN diverges too
    if discrete:
        diverging = diverging & (new.potential != math.inf)
    return accepted, Info(accept_prob, diverging)


def accept_valid(old: State, new: State) -> tuple[State, Info]:
    """The new states, where they are valid: the acceptance of an unadjusted or exact step."""
    valid = is_valid(new)
    return choose(valid, new, old), Info(valid.to(new.potential.dtype), ~valid)


def is_valid(state: State) -> Tensor:
    """Whether potentials, and gradients if there are any, are finite, shape ``(chains,)``."""
    valid = state.potential.isfinite()
    return valid if state.grad is None else valid & state.grad.isfinite().all(-1)


def choose(accepted: Tensor, new: State, old: State) -> State:
    """The new state where ``accepted``, shape ``(chains,)``, and the old one elsewhere."""
    z = select(accepted, new.z, old.z)
    potential = select(accepted, new.potential, old.potential)
    if new.grad is None or old.grad is None:
        return State(z, potential, None)
    return State(z, potential, select(accepted, new.grad, old.grad))
