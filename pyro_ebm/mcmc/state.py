"""Where the chains of a kernel are, and what happened in a transition."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Where the chains are."""

    z: Tensor
    """Positions, shape ``(chains, dim)``."""
    potential: Tensor
    """Potentials, shape ``(chains,)``."""
    grad: Tensor | None
    """Gradients of the potential, shape ``(chains, dim)``; None if the kernel needs none."""


class Info(NamedTuple):
    """What happened in one transition."""

    accept_prob: Tensor
    """Probability of acceptance, shape ``(chains,)``."""
    diverging: Tensor
    """Whether the proposal diverged, and was rejected for that, boolean, shape ``(chains,)``."""


def nothing_moved(state: State) -> Info:
    """The statistics of a transition of a model without latents, which moves nothing."""
    accept_prob = torch.ones_like(state.potential)
    return Info(accept_prob, torch.zeros_like(accept_prob, dtype=torch.bool))


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of a tensor on the device; anything else as it is."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
