r"""Maximum pseudolikelihood: every variable of a discrete point given all others.

.. math:: J(\theta) = \mathbb E_{data} \sum_i \log p_\theta(x_i \mid x_{-i}), \qquad
          p_\theta(x_i \mid x_{-i}) = \frac{e^{-E(x)}}{\sum_{c} e^{-E(c,\, x_{-i})}}

needs no :math:`\log Z`, no noise and no chain. The maximum is where the conditionals, and hence the
density, are those of the data. It is consistent, and less efficient than maximum likelihood where
variables interact strongly. The conditionals are those of
:mod:`pyro_ebm.distributions.composite.conditionals`.

Reference:
    Besag (1975), Statistical analysis of non-lattice data. Hyvarinen (2006), Consistency of
    pseudolikelihood estimation of fully visible Boltzmann machines.
"""

from collections.abc import Iterable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.composite.conditionals import (
    blocks_of,
    checked_blocks,
    log_composite,
)
from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count


class PseudoLikelihood(EnergyLoss):
    r"""Minus the log pseudolikelihood of discrete data, as a loss for ``SVI``.

    .. math:: J = \sum_i \log p(x_i \mid x_{-i}), \quad \text{or, of m of n variables, } \quad
              J = \frac nm \sum_{i \in I} \log p(x_i \mid x_{-i}), \quad |I| = m

    It is for every energy on a finite set of values: bits, spins, categories, integers within
    bounds. Boltzmann machines, Potts models and restricted Boltzmann machines have conditionals in
    closed form, all of them for about the price of one energy. Other energies are evaluated at the
    :math:`K - 1` other values of each variable, all in one batch of :math:`n (K - 1)` points for
    each datum: where that is too large, ``subsample_size`` takes some variables a step.

    The values of the loss are no log-likelihoods. For errors of the parameters, and a posterior,
    see :func:`~pyro_ebm.pseudolikelihood` and :func:`~pyro_ebm.curvature_adjustment`.

    Args:
        blocks: indices of variables that are summed over together, for a *composite* likelihood:
            larger blocks are more efficient, and cost their :math:`K^{|B|}` states. By default
            every variable alone.
        subsample_size: m, how many of the variables, or blocks, a step takes, drawn anew at each
            and scaled to all, so that the gradient is unbiased. By default all.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for blocks that are none, or (when used) a continuous support, whole numbers
            without bounds, indices out of range, or more to subsample than there are.

    Reference:
        Varin, Reid and Firth (2011), An overview of composite likelihood methods.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
        >>> edges = lattice_edges(4, 4)
        >>> def model(x):
        ...     J = pyro.param("J", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", BoltzmannMachine(J, edges=edges), obs=x)
        >>> x = BoltzmannMachine(0.3, edges=edges).exact_sample((200,))
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), PseudoLikelihood())
        >>> _ = [svi.step(x) for _ in range(100)]
        >>> bool((pyro.param("J") - 0.3).abs() < 0.05)
        True
    """

    def __init__(
        self,
        blocks: Iterable[Sequence[int] | Tensor] | None = None,
        subsample_size: int | None = None,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        self.blocks = checked_blocks(blocks)
        self.subsample_size = subsample_size
        if subsample_size is not None:
            check_count("subsample_size", subsample_size)

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`J` of each row, shape ``(*batch)``."""
        groups, scale = blocks_of(site.energy, self.blocks), 1.0
        if self.subsample_size is not None:
            total = sum(map(len, groups))
            if self.subsample_size > total:
                raise ValueError(
                    f"site {site.name!r} has {total} variables or blocks, fewer than"
                    f" subsample_size={self.subsample_size}"
                )
            chosen = torch.zeros(total, dtype=torch.bool, device=site.x.device)
            chosen[torch.randperm(total, device=site.x.device)[: self.subsample_size]] = True
            parts = chosen.split([len(group) for group in groups])
            groups = [group[part] for group, part in zip(groups, parts, strict=True) if part.any()]
            scale = total / self.subsample_size
        term = scale * log_composite(site.energy, site.x, groups)
        self.record(site, log_pseudolikelihood=site.mean(term))
        return term
