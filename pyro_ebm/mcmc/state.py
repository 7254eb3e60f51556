"""Where the chains of a kernel are, and what happened in a transition."""

from typing import NamedTuple

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
    """Whether the proposal was rejected because it went astray, boolean, shape ``(chains,)``."""


def nothing_moved(state: State) -> Info:
    """What happened where a model has no latent to move."""
    accept_prob = torch.ones_like(state.potential)
    return Info(accept_prob, torch.zeros_like(accept_prob, dtype=torch.bool))
