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
    (2007), Some extensions of score matching (half-lines). Song et al. (2019), Sliced score
    matching. Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.
    Vincent (2011), A connection between score matching and denoising autoencoders. Wang et al.
    (2020), A Wasserstein minimum velocity approach to learning unnormalized models (control
    variates).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.distributions.checks.boundary import (
    boundary_error,
    elementwise,
    ends_of,
    margins,
    too_many,
)
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.losses.smoothness import refuse_jumping_score
from pyro_ebm.ops.arguments import check_count, shown
from pyro_ebm.ops.score import draw_probes, projected_divergence, row_divergence, value_and_grad

METHODS = ("exact", "hutchinson")
NEAR_BOUNDARY = 0.02
"""So near to the boundary, as a part of the interval or of the mean distance, is beside it."""


class ScoreMatching(EnergyLoss):
    r"""Score matching with the exact trace of the Hessian, or Hutchinson's estimate of it.

    .. math:: J = \mathbb E \sum_i \partial_i s_i + \tfrac12 |s|^2
              \approx \mathbb E\, v^\top (\nabla s)\, v + \tfrac12 |s|^2

    The exact trace costs one backward pass for each dimension of the event (d = 2: 3 passes in
    all; d = 784: 785), Hutchinson's one for each probe, with variance
    :math:`2 \sum_{i \ne j} H_{ij}^2` (Rademacher probes).

    It does not see the relative weight of far modes: between them the data say nothing of the
    score. A learned log Z has no part in it. And it needs a second derivative that is there: of a
    piecewise linear energy it sees nothing, see :mod:`~pyro_ebm.losses.smoothness`.

    Args:
        method: ``"exact"`` or ``"hutchinson"``.
        num_projections: number of Hutchinson's probes.
        distribution: of the probes, ``"rademacher"`` or ``"gaussian"``.
        num_particles: draws from the guide for each gradient.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

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
        num_particles: int = 1,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, **kwargs)
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        check_count("num_projections", num_projections)
        draw_probes(distribution, (), torch.zeros(1, 1))  # an unknown name is an error now
        self.method, self.num_projections, self.distribution = method, num_projections, distribution

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        x, weight, s = _score(self, site)
        field = weight * s
        if self.method == "exact":
            divergence = row_divergence(field, x)
        else:
            probes = draw_probes(self.distribution, (self.num_projections,), x)
            divergence = projected_divergence(field, x, probes)[0].mean(0)
        objective = divergence + (weight * s.square()).sum(-1) / 2
        self.record(site, score_norm=site.mean(s.detach().norm(dim=-1).reshape(site.batch_shape)))
        return -objective.reshape(site.batch_shape)


class SlicedScoreMatching(EnergyLoss):
    r"""Score matching along random directions :math:`v`.

    .. math:: J = \mathbb E\, v^\top (\nabla s)\, v + \tfrac12 (v^\top s)^2,

    or, with ``variance_reduced``, the closed form :math:`\frac12 |s|^2` of the last term's mean
    (for probes with unit covariance). One backward pass for each projection, in any dimension.

    Args:
        num_projections: number of directions for each row.
        variance_reduced: whether to use the closed form.
        distribution: of the directions: ``"rademacher"``, ``"gaussian"``, or ``"sphere"`` (of
            radius :math:`\sqrt d`).
        num_particles: draws from the guide for each gradient.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: for an unknown distribution, a support with a boundary that no weight is known
            for, or (when used) an energy whose score jumps.

    Example:
        >>> loss = SlicedScoreMatching(num_projections=2)
    """

    def __init__(
        self,
        num_projections: int = 1,
        variance_reduced: bool = True,
        distribution: str = "rademacher",
        num_particles: int = 1,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, **kwargs)
        check_count("num_projections", num_projections)
        draw_probes(distribution, (), torch.zeros(1, 1))
        self.num_projections, self.distribution = num_projections, distribution
        self.variance_reduced = variance_reduced

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        x, weight, s = _score(self, site)
        probes = draw_probes(self.distribution, (self.num_projections,), x)
        divergence, _ = projected_divergence(weight * s, x, probes)
        if self.variance_reduced:
            square = (weight * s.square()).sum(-1)
        else:
            square = (probes * weight.sqrt() * s).sum(-1).square()
        self.record(site, score_norm=site.mean(s.detach().norm(dim=-1).reshape(site.batch_shape)))
        return -(divergence + square / 2).mean(0).reshape(site.batch_shape)


class DenoisingScoreMatching(EnergyLoss):
    r"""Score matching on noised data: :math:`\tilde x = x + \sigma \xi`, :math:`\xi \sim N(0, I)`.

    .. math:: J = \tfrac12 \mathbb E\, | \sigma\, s(\tilde x) + \xi |^2

    No Hessian at all: one score for each row. It fits the *noised* density
    :math:`p * N(0, \sigma^2)`, e.g. :math:`N(0, s^2 + \sigma^2)` for :math:`N(0, s^2)`. A small
    :math:`\sigma` has a variance of order :math:`1 / \sigma^2`, which the control variate removes;
    a large one blurs. With several, each row draws one of them.

    Args:
        sigma: the noise's standard deviation, in the units of the data, or several.
        control_variate: whether to subtract :math:`\sigma\, \xi^\top s(x)`, which has mean 0;
            costs a second score.
        num_particles: draws from the guide for each gradient.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: for a sigma that is not positive, or a constrained support.

    Example:
        >>> loss = DenoisingScoreMatching(sigma=[0.1, 0.3, 1.0])
    """

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.1,
        control_variate: bool = False,
        num_particles: int = 1,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, **kwargs)
        try:
            sigmas = torch.as_tensor(sigma, dtype=torch.float64).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"sigma must be a number or several, such as [0.1, 0.5], got {shown(sigma)}"
            ) from error
        if not (sigmas.numel() and sigmas.isfinite().all() and (sigmas > 0).all()):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        self.sigma, self.control_variate = sigmas, control_variate

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`-J` of each row, shape ``(*batch)``."""
        if boundary_weight(site.energy.support, site.x) is not None:
            raise ValueError(
                f"site {site.name!r}: noise would leave the support {site.energy.support}. Use"
                " ScoreMatching, which weights the boundary, or transform the data to the reals"
            )
        _checked(self, site, hessian=False)
        x = site.x
        rows = site.batch_shape + (1,) * site.energy.event_dim
        sigmas = self.sigma.to(x)
        sigma = sigmas  # of one element, or one drawn for each row
        if len(sigmas) > 1:
            sigma = sigmas[torch.randint(len(sigmas), rows, device=x.device)]
        noise = torch.randn_like(x)
        log_prob = site.energy.unnormalized_log_prob
        _, s = value_and_grad(log_prob, self.points(x + sigma * noise), create_graph=True)
        objective = (sigma * s + noise).square() / 2
        if self.control_variate:
            _, clean = value_and_grad(log_prob, self.points(x), create_graph=True)
            objective = objective - sigma * noise * clean - noise.square() / 2
        objective = objective.reshape(site.batch_shape + (-1,)).sum(-1)
        norm = s.detach().reshape(site.batch_shape + (-1,)).norm(dim=-1)
        self.record(site, score_norm=site.mean(norm))
        return -objective


def _score(loss: EnergyLoss, site: EnergySite) -> tuple[Tensor, Tensor, Tensor]:
    """Flat points, the weight and the score, each ``(rows, d)``; the score is differentiable."""
    shape, d = site.x.shape, max(site.energy.event_shape.numel(), 1)
    x = loss.points(site.x.reshape(-1, d))
    log_prob = _checked(loss, site, hessian=True)
    _, s = value_and_grad(log_prob, x, create_graph=True)
    weight = boundary_weight(site.energy.support, x.reshape(shape))
    if weight is False:
        raise ValueError(
            f"site {site.name!r}: score matching has no weight for the boundary of the support"
            f" {site.energy.support}. Use ContrastiveDivergence or NCE, or transform the data to"
            " the reals"
        )
    if weight is None:
        return x, torch.ones_like(x), s
    with torch.no_grad():
        _check_boundary(site)
    return x, weight.reshape(-1, d), s


def _check_boundary(site: EnergySite) -> None:
    """Refuses data that pile up on the boundary, or beside it, as clamped data do.

    On it their weight is 0, and nothing is learned of them. A pile beside it is no density that
    could be integrated by parts: with :math:`w = x^2` its terms go with
    :math:`w' / w = 2 / x`.
    """
    support, x = site.energy.support, site.x
    ends = ends_of(support)
    bad = torch.zeros_like(x, dtype=torch.bool)
    for margin in margins(elementwise(support), x):
        rows = margin.reshape(site.batch_shape.numel(), -1)
        least = rows.amin(0)
        scale = rows.mean(0) if None in ends else (ends[1] - ends[0]) * torch.ones_like(least)
        piled = (rows == least) & (least < NEAR_BOUNDARY * scale)
        piled &= piled.sum(0) > 1
        bad |= (piled | (rows == 0)).reshape(x.shape)
    if too_many(bad, len(site.batch_shape)):
        why = "or pile up beside it, where score matching gives them no weight, or a wrong one"
        ways = ["use ContrastiveDivergence(persistent=True)"]
        raise boundary_error(support, x, bad, f"the data at site {site.name!r}", why, ways)


def _checked(loss: EnergyLoss, site: EnergySite, hessian: bool) -> Callable[[Tensor], Tensor]:
    """The log density of flat points ``(rows, d)``, and whether it is smooth enough now and then.

    Args:
        loss: which knows whether it is time to look.
        site: the site.
        hessian: whether the objective needs a second derivative.
    """
    shape = site.x.shape

    def log_prob(flat: Tensor) -> Tensor:
        return site.energy.unnormalized_log_prob(flat.reshape(shape)).reshape(-1)

    if loss.looks_closely:
        x = site.x.reshape(-1, max(site.energy.event_shape.numel(), 1))
        refuse_jumping_score(site.name, log_prob, x, site.energy.modules, hessian)
    return log_prob


def boundary_weight(support: Any, x: Tensor) -> Any:
    r"""A weight that is 0 at the boundary: squared distance to it.

    Returns:
        None on the reals, False where no weight is known, else :math:`w_i(x_i)`, the shape of x:
        :math:`(x - a)^2` on half-lines, :math:`((x - a)(b - x) / (b - a))^2` on boxes.

    Example:
        >>> boundary_weight(dist.constraints.positive, torch.tensor([2.0]))
        tensor([4.])
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.real)):
        return None
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if support.is_discrete or support.event_dim or (low is None and high is None):
        return False
    if low is None:
        return (torch.as_tensor(high) - x).square()
    if high is None:
        return (x - low).square()
    return ((x - low) * (high - x) / (high - low)).square()
