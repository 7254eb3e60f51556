r"""The log ratio of an exchange move, whose largest terms cancel.

With the auxiliary :math:`y`, drawn at :math:`\theta'`, the log ratio of a move from :math:`\theta`
is

.. math:: \log r = \log \frac{p(\theta')\, q(\theta \mid \theta')}
    {p(\theta)\, q(\theta' \mid \theta)} + S(\theta') - S(\theta), \qquad
    S(\theta) = \sum_i \big( \log f(x_i \mid \theta) - \log f(y_i \mid \theta) \big),

with one term for each row :math:`i` of the data. Each difference is taken before any sum. Where
:math:`y_i = x_i`, as an inner chain that stands still leaves it, it is exactly 0, however large its
two parts: at a :math:`\theta'` far out they may be :math:`10^{30}`, and summed apart their rounding
alone would decide.

Where :math:`y_i \ne x_i` and the parts are that large, rounding does decide. With the unit of
rounding :math:`\epsilon` of the rows and

.. math:: e(\theta) = 16\, \epsilon \Big( \sum_{i:\, y_i \ne x_i}
    \max\big( |\log f(x_i \mid \theta)|, |\log f(y_i \mid \theta)| \big)^2 \Big)^{1/2}, \qquad
    e = \max(e(\theta), e(\theta')),

a move with :math:`e > 0.1` is *undecided*, and rejected. (Roundings of different rows are
independent, and their squares add. One row has :math:`16 \epsilon \max |\text{term}|`.)

*This keeps detailed balance.* Let the auxiliary be exact, and :math:`\alpha` the probability of
acceptance given :math:`y`. Before any test the flow from :math:`\theta` to :math:`\theta'` by way
of :math:`y` is :math:`\pi(\theta)\, q(\theta' \mid \theta) f(y \mid \theta') / Z(\theta')`. The
flow back by way of the same :math:`y` is
:math:`\pi(\theta')\, q(\theta \mid \theta') f(y \mid \theta) / Z(\theta)`. Their ratio is
:math:`r`, so that :math:`\alpha = \min(1, r)` forth and :math:`\min(1, 1 / r)` back make them
equal. Now :math:`e` is a function of :math:`x`, of :math:`y` and of the unordered pair
:math:`\{\theta, \theta'\}`: it is the same number for the way back. Both flows are kept, or both
are 0. The same holds where :math:`x` is latent itself and moves with :math:`\theta`, if each is
compared with its own :math:`x`. A rule that accepts if :math:`\log u < \log r - e`, or reads the
terms of one side only, has no such symmetry, and another stationary distribution.
"""

from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_ebm.models.sites.latents import SampleSite

UNITS = 16.0
UNDECIDED = 0.1
"""An error of the log ratio above this is taken to decide it."""


class Terms(NamedTuple):
    """The terms of the log ratio at one position, of the data and their auxiliaries."""

    rest: Tensor
    r"""The log density without the :math:`\log f(x_i \mid \theta)`, shape ``(chains,)``."""
    surplus: Tensor
    r""":math:`S(\theta)`, shape ``(chains,)``."""
    error: Tensor
    r""":math:`e(\theta)`, shape ``(chains,)``."""


class Surplus(NamedTuple):
    r"""One site's part of :math:`S(\theta)`."""

    value: Tensor
    square_error: Tensor
    """Its part of the squared error."""
    data: Tensor
    r""":math:`\sum_i \log f(x_i \mid \theta)`."""


def surplus_of(node: SampleSite, x: Tensor, y: Tensor, summed_apart: bool = False) -> Surplus:
    r"""The surplus of a site at a position.

    Args:
        node: the site, in a trace of the model at the position.
        x: its data, shape ``(*rows, *event)``.
        y: its auxiliary, of the same shape.
        summed_apart: whether ``data`` is to be subtracted from a sum that holds it, so that the
            rounding of all rows counts.

    Example:
        >>> node = {"fn": UnnormalizedEnergy(torch.square), "mask": None}
        >>> surplus_of(node, torch.tensor([1e9, 3.0]), torch.tensor([1e9, 2.0])).value
        tensor(-5.)
    """
    fn = node["fn"]
    log_f = [scale_and_mask(fn.log_prob(value), mask=node["mask"]) for value in (x, y)]
    same = (x == y).reshape(x.shape[: x.dim() - fn.event_dim] + (-1,)).all(-1)
    difference = torch.where(same, 0.0, log_f[0] - log_f[1])
    size = torch.maximum(*(part.abs() for part in log_f))
    if not summed_apart:
        size = torch.where(same, 0.0, size)
    error = UNITS * torch.finfo(size.dtype).eps * size
    return Surplus(difference.sum(), error.square().sum(), log_f[0].sum())


def log_ratio_of(new: Terms, old: Terms) -> tuple[Tensor, Tensor]:
    r"""The log ratio of a move, but for that of its proposals, and its error.

    Args:
        new: at :math:`\theta'`.
        old: at :math:`\theta`.

    Returns:
        Both of shape ``(chains,)``.

    Example:
        >>> new, old = (Terms(*torch.tensor([[a], [1.0], [0.5 * a]])) for a in (2.0, 5.0))
        >>> log_ratio_of(new, old)
        (tensor([-3.]), tensor([2.5000]))
    """
    log_ratio = (new.rest - old.rest) + (new.surplus - old.surplus)
    return log_ratio, torch.maximum(new.error, old.error)
