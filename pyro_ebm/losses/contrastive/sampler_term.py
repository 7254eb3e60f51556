r"""The gradient of contrastive divergence through its sampler.

The negatives of :math:`q_\theta`, the law of chains whose last Langevin step is

.. math:: x' = x - \varepsilon \nabla U_\theta(x) + \sqrt{2 \varepsilon T}\, \xi,

move with the parameters too. With :math:`\bar\theta` held fixed, their divergence from the model
at that temperature,

.. math:: KL(q_\theta \,\|\, p_{\bar\theta})
          = \mathbb E_{q_\theta}\, U_{\bar\theta}(x') / T - H(q_\theta) + \log Z

has a gradient through :math:`x'`, for which the last step alone is differentiated. The entropy of
:math:`C` chains in :math:`d` dimensions is estimated from the distance :math:`\rho_c` of each to
its :math:`k`-th nearest neighbour, as :math:`\frac dC \sum_c \log \rho_c` up to a constant.
With :math:`k = 3` the variance of its gradient, in which :math:`1 / \rho_c` appears, is finite in
every dimension.

Contrastive divergence leaves the term out. Du et al. add it to the loss, so that a step draws the
sampler to the model. The derivative of Hinton's :math:`KL(p_{data} \| p_\theta) -
KL(q_\theta \| p_\theta)` has it with the other sign.

Reference:
    Hinton (2002), Training products of experts by minimizing contrastive divergence. Kozachenko
    and Leonenko (1987), Sample estimate of the entropy of a random vector. Du et al. (2021),
    Improved contrastive divergence training of energy-based models (who take :math:`k = 1` and
    neighbours among earlier negatives).
"""

import torch
from torch import Tensor

from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.negatives import Negatives, rows_differ
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.score import value_and_grad
from pyro_ebm.ops.steps.langevin import langevin_proposal

NEIGHBOUR = 3
"""Which nearest neighbour the entropy is estimated from."""
AT_ONCE = 1024
"""Of so many points the distances to all others are held in memory."""


def sampler_divergence(site: EnergySite, negatives: Negatives, loss: EnergyLoss) -> Tensor:
    r"""A number of value 0 whose gradient is that of :math:`KL(q_\theta \| p_{\bar\theta})`.

    Args:
        site: the site.
        negatives: its negatives.
        loss: whose step it is.

    Returns:
        Shape ``()``: of a single chain, which has no neighbours, without a gradient.

    Raises:
        ValueError: for a kernel other than Langevin's, a support other than the reals, or rows
            with different densities, whose chains have no entropy of one density.
    """
    last, energy = negatives.last_step, negatives.energy
    if last is None or not is_unbounded(energy.support):
        raise ValueError(
            f"kl_weight at site {site.name!r} differentiates a Langevin step on the reals: use"
            f" LangevinKernel, and transform data on {energy.support} to the reals if they are not"
        )
    if negatives.by_row and loss.looks_closely and rows_differ(site):
        raise ValueError(
            f"the energy of site {site.name!r} is conditional: its rows have different densities,"
            " and kl_weight takes the entropy of chains of a single one. Leave it at 0"
        )
    x = loss.points(last.start)
    _, s = value_and_grad(energy.unnormalized_log_prob, x, create_graph=True)
    noise = torch.randn_like(x)
    x = langevin_proposal(x, -s, last.step_size.reshape(()), None, last.temperature, noise)
    _, there = value_and_grad(energy.unnormalized_log_prob, x.detach())
    width = energy.event_shape.numel()
    x, there = x.reshape(-1, width), there.reshape(-1, width)
    if site.mask is not None and negatives.by_row:
        rows = site.mask.reshape(-1)
        x, there = x[rows], there[rows]
    if len(x) < 2:
        return x.new_zeros(())
    divergence = -(there * x).sum(-1).mean() / last.temperature - width * log_distances(x).mean()
    return divergence - divergence.detach()


def log_distances(x: Tensor) -> Tensor:
    """The logarithms of the distances to the third nearest neighbour, or to the last of fewer.

    Args:
        x: points, shape ``(n, d)``, at least two.

    Returns:
        Shape ``(n,)``, differentiable.

    Example:
        >>> log_distances(torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]])).exp().round()
        tensor([ 7.,  6.,  4.,  7., 19.])
    """
    k = min(NEIGHBOUR, len(x) - 1)
    exact = "donot_use_mm_for_euclid_dist"
    with torch.no_grad():
        neighbour = torch.cat(
            [
                torch.cdist(part, x, compute_mode=exact).topk(k + 1, largest=False).indices[:, k]
                for part in x.split(AT_ONCE)
            ]
        )
    return torch.linalg.vector_norm(x - x[neighbour], dim=1).log()
