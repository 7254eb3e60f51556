"""A start that is fitted to draws of several sites, continuous and discrete ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.normalizer.starts import GaussianStart, ProductStart, Start


class JointStart(Start):
    """Independent starts, each of some columns of the position.

    Args:
        parts: the starts, and the columns ``(size,)`` of each.

    Example:
        >>> one = GaussianStart(torch.zeros(1, 1), torch.ones(1, 1))
        >>> start = JointStart([(one, torch.tensor([1])), (one, torch.tensor([0]))])
        >>> start(torch.zeros(3, 2))  # log(2 pi)
        tensor([1.8379, 1.8379, 1.8379])
    """

    def __init__(self, parts: Sequence[tuple[Start, Tensor]]):
        self.parts = parts

    def sample(self, num: int) -> Tensor:
        """Exact draws, shape ``(num * targets, dim)``."""
        drawn = torch.cat([part.sample(num) for part, _ in self.parts], -1)
        return drawn[:, torch.cat([columns for _, columns in self.parts]).argsort()]

    def __call__(self, z: Tensor) -> Tensor:
        """The potential, shape ``(chains,)``."""
        return torch.stack([part(z[:, columns]) for part, columns in self.parts]).sum(0)


def fitted_start(target: Potential, z: Tensor) -> Start:
    """A Gaussian with the moments of draws, and the frequencies of discrete variables.

    Correlations are matched where there are five draws for each dimension.

    Args:
        target: what they are draws of.
        z: the draws, shape ``(chains, dim)``.

    Raises:
        ValueError: for whole numbers without fixed bounds.

    Example:
        >>> from pyro_ebm.mcmc.potentials.model import ModelPotential
        >>> def model():
        ...     k = pyro.sample("k", dist.Bernoulli(0.5))
        ...     pyro.sample("x", dist.Normal(k, 1.0))
        >>> potential = ModelPotential(model, keep_discrete=True)
        >>> start = fitted_start(potential, torch.tensor([[0.0, -1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> start.sample(5).shape
        torch.Size([5, 2])
    """
    columns = torch.arange(target.dim, device=z.device).split(target.sizes)
    pairs = list(zip(target.sites, columns, strict=True))
    reals = [index for site, index in pairs if site.support_values is None]
    parts: list[tuple[Start, Tensor]] = []
    if reals:
        index = torch.cat(reals)
        full = len(z) // target.targets >= 5 * len(index)
        parts.append((GaussianStart.fitted(z[:, index], target.targets, full=full), index))
    for site, index in pairs:
        if site.is_unbounded:
            raise ValueError(
                f"site {site.name!r} holds whole numbers without fixed bounds, and no proposal is"
                ' fitted to these: anneal from the prior (method="ais" or "smc"), or sum it out'
            )
        if site.support_values is not None and len(index):
            values = site.support_values.to(z)
            parts.append((ProductStart.fitted(values, z[:, index], target.targets), index))
    return parts[0][0] if len(parts) == 1 else JointStart(parts)
