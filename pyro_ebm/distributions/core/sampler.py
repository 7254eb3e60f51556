r"""What an energy needs of the samplers above it: something that draws from an energy.

Distributions import no kernels. The package that has them registers its sampler here when it is
imported, as :mod:`pyro_ebm.mcmc` does, and :meth:`pyro_ebm.UnnormalizedEnergy.sample` calls it.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple, Protocol, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor


class ChainKernel(Protocol):
    """A kernel without a model, such as ``LangevinKernel()``, which chains of an energy run."""

    def copy(self) -> Self:
        """A kernel of the same settings, without a state."""
        ...


class ChainDiagnostics(NamedTuple):
    """The evidence for and against the draws of short chains, from their second halves.

    R-hat and the effective sample size are the worst over the event's elements, one for each batch
    element.
    """

    r_hat: Tensor
    """Split R-hat, shape ``batch_shape``; near 1 if the chains agree."""
    ess: Tensor
    """Effective sample size of the histories of all chains together, shape ``batch_shape``."""
    acceptance_rate: Tensor
    """Mean acceptance probability, shape ``batch_shape``."""
    step_size: Tensor
    """The adapted step size, shape ``batch_shape``."""
    num_divergences: int
    """Number of divergent transitions, all batch elements together."""


class Sampler(Protocol):
    """A function that draws from an energy."""

    def __call__(
        self, energy: TorchDistribution, sample_shape: torch.Size, diagnose: bool = False
    ) -> tuple[Tensor, ChainDiagnostics]:
        """Draws of shape ``(*sample_shape, *batch_shape, *event_shape)``, and their diagnostics.

        Args:
            energy: an :class:`~pyro_ebm.UnnormalizedEnergy`.
            sample_shape: how many draws.
            diagnose: whether R-hat and the like are wanted; else they may be NaN.
        """
        ...


_registered: list[Sampler] = []


def register_sampler(sampler: Sampler) -> None:
    """Makes a sampler the one that energies draw with."""
    _registered[:] = [sampler]


def registered_sampler() -> Sampler:
    """The sampler that energies draw with.

    Raises:
        RuntimeError: if none is registered.
    """
    if not _registered:
        raise RuntimeError("no sampler is registered: import pyro_ebm.mcmc, which registers one")
    return _registered[0]


_only_starts: ContextVar[bool] = ContextVar("_only_starts", default=False)


@contextlib.contextmanager
def starting_points_only() -> Iterator[None]:
    """Within this context ``UnnormalizedEnergy.sample`` returns where its chains would start.

    Prototype traces need a value of the right shape in the support, not a draw.
    """
    token = _only_starts.set(True)
    try:
        yield
    finally:
        _only_starts.reset(token)


def wants_only_starting_points() -> bool:
    """Whether :func:`starting_points_only` is active."""
    return _only_starts.get()
