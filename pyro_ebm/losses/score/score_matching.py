r"""Score matching: fit the gradient of the log density, in which log Z does not appear.

The Fisher divergence :math:`\frac12 \mathbb E_{p} |\nabla \log p - \nabla \log p_\theta|^2`
between data and model equals, up to a constant and after integration by parts,

.. math:: J(\theta) = \mathbb E_{p} \sum_i \Big[ \partial_i s_i(x) + \tfrac12 s_i(x)^2 \Big],
          \qquad s = \nabla_x \log p_\theta .

The integration by parts needs :math:`p(x)\, s(x)` to vanish at the boundary. On half-lines and
boxes a weight :math:`w_i(x_i)` that is 0 there takes care of it:
:math:`J = \mathbb E \sum_i [\partial_i (w_i s_i) + \frac12 w_i s_i^2]`.

Reference:
    Hyvarinen (2005), Estimation of non-normalized statistical models by score matching. Hyvarinen
    (2007), Some extensions of score matching (half-lines). Hutchinson (1989), A stochastic
    estimator of the trace of the influence matrix.
"""

from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.score.weighted_score import weighted_score
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.score import draw_probes, projected_divergence, row_divergence

METHODS = ("exact", "hutchinson")


class ScoreMatching(EnergyLoss):
    r"""Score matching with the exact trace of the Hessian, or Hutchinson's estimate of it.

    .. math:: J = \mathbb E \sum_i \partial_i s_i + \tfrac12 |s|^2
              \approx \mathbb E\, v^\top (\nabla s)\, v + \tfrac12 |s|^2

    The exact trace costs one backward pass for each dimension of the event (d = 2: 3 passes in
    all; d = 784: 785), Hutchinson's one for each probe, with variance
    :math:`2 \sum_{i \ne j} H_{ij}^2` (Rademacher probes).

    It is blind to the relative weight of far modes, since there are no data between them. A learned
    log Z has no part in it. And it needs a second derivative, which for a piecewise linear energy
    is 0 almost everywhere, see :mod:`~pyro_ebm.losses.score.smoothness`.

    Args:
        method: ``"exact"`` or ``"hutchinson"``.
        num_projections: number of Hutchinson's probes.
        distribution: of the probes, ``"rademacher"`` or ``"gaussian"``.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for an unknown method, a support with a boundary that no weight is known for, or
            (when used) an energy whose score jumps, as that of a network of ReLU does.

    Example:
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> from pyro.infer import SVI
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), ScoreMatching())
        >>> x = 0.5 * torch.randn(1000)
        >>> _ = [svi.step(x) for _ in range(300)]
        >>> bool((pyro.param("precision") * x.square().mean() - 1).abs() < 0.01)
        True
    """

    def __init__(
        self,
        method: str = "exact",
        num_projections: int = 1,
        distribution: str = "rademacher",
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        check_count("num_projections", num_projections)
        draw_probes(distribution, (), torch.zeros(1, 1))  # an unknown name is an error now
        self.method, self.num_projections, self.distribution = method, num_projections, distribution

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        x, weight, s = weighted_score(self, site)
        field = weight * s
        if self.method == "exact":
            divergence = row_divergence(field, x)
        else:
            probes = draw_probes(self.distribution, (self.num_projections,), x)
            divergence = projected_divergence(field, x, probes)[0].mean(0)
        objective = divergence + (weight * s.square()).sum(-1) / 2
        return -objective.reshape(site.batch_shape)
