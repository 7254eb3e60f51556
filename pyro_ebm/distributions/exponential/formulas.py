r"""The formulas of the named exponential families, as a textbook's table has them.

Each line says how a distribution's parameters become :math:`\theta`, and back, and gives
:math:`T`, :math:`h` and :math:`\log Z` of :math:`h(x)\, e^{\theta \cdot T(x)}`. The formulas take
the components of :math:`\theta` one by one.
"""

import dataclasses
import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, lgamma
from torch import distributions as td
from torch.nn.functional import logsigmoid, softplus

from pyro_ebm.distributions.core.positive_definite import positive_definite

Components = Tensor | tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Formula:
    """A line of the table. Each formula takes its argument, then what the family holds fixed."""

    source: type | tuple[type, ...]
    """The distributions of torch that are members."""
    make: Callable[..., TorchDistribution]
    """Pyro's constructor of a member."""
    statistic: Callable[..., Components]
    """Maps x to T(x): a tuple of its components, or all of them in one tensor."""
    natural: Callable[..., Components]
    """Maps a distribution to theta: a tuple, or one tensor."""
    log_z: Callable[..., Tensor]
    """Maps theta to log Z."""
    parameters: Callable[..., dict[str, Tensor]]
    """Maps theta to the keyword arguments of the constructor."""
    log_h: Callable[..., Tensor] | None = None
    """Maps x to log h(x); None if h is 1."""
    fixed: Callable[..., tuple[object, ...]] = lambda d: ()
    """Maps a distribution to what its family holds fixed."""
    vector: bool = False
    r"""Whether the formulas take :math:`\theta` as a whole, shape ``(*batch, k)``."""
    support: constraints.Constraint | None = None
    """The support, where the one that the distribution states is another."""


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of negative numbers."""
    near = x > -math.log(2.0)
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-small.expm1()).log(), (-large.exp()).log1p())


def _log_sinhc(x: Tensor) -> Tensor:
    """log(sinh(x) / x)."""
    near = x.abs() < 0.1
    small, large = torch.where(near, x, 0.0), torch.where(near, 1.0, x.abs())
    series = small**2 / 6 - small**4 / 180 + small**6 / 2835
    return torch.where(near, series, large + (-2 * large).exp().neg().log1p() - (2 * large).log())


def _normal_log_z(a: Tensor, b: Tensor) -> Tensor:
    """The log of the integral of exp(a x + b x^2) over the reals."""
    return -(a**2) / (4 * b) + (-math.pi / b).log() / 2


def _gamma_log_z(a: Tensor, b: Tensor) -> Tensor:
    """The log of the integral of x^(a - 1) exp(-b x) over the positive numbers."""
    return lgamma(a) - a * b.log()


def _linear_and_quadratic(theta: Tensor) -> tuple[Tensor, Tensor]:
    """The vector a and the precision P of exp(a . x - x' P x / 2)."""
    n = (math.isqrt(1 + 4 * theta.shape[-1]) - 1) // 2
    half = theta[..., n:].unflatten(-1, (n, n))
    return theta[..., :n], -(half + half.mT)


def _multivariate_log_z(theta: Tensor) -> Tensor:
    a, precision = _linear_and_quadratic(theta)
    factor = torch.linalg.cholesky(precision)
    white = torch.linalg.solve_triangular(factor, a[..., None], upper=False)[..., 0]
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (white.square().sum(-1) - log_det + a.shape[-1] * math.log(2 * math.pi)) / 2


def _multivariate_parameters(theta: Tensor) -> dict[str, Tensor]:
    a, precision = _linear_and_quadratic(theta)
    return {"loc": torch.linalg.solve(precision, a), "precision_matrix": precision}


def _wishart(theta: Tensor) -> tuple[Tensor, Tensor]:
    """The df and P of the density |X|^((df - n - 1) / 2) exp(-tr(P X) / 2)."""
    n = math.isqrt(theta.shape[-1])
    half = theta[..., 1:].unflatten(-1, (n, n))
    return 2 * theta[..., 0] + n + 1, -(half + half.mT)


def _wishart_log_z(theta: Tensor) -> Tensor:
    df, precision = _wishart(theta)
    n = precision.shape[-1]
    log_det = 2 * torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return df * (n * math.log(2.0) - log_det) / 2 + torch.mvlgamma(df / 2, n)


FORMULAS = {
    "Normal": Formula(
        td.Normal,
        dist.Normal,
        statistic=lambda x: (x, x**2),
        natural=lambda d: (d.loc / d.scale**2, -0.5 / d.scale**2),
        log_z=_normal_log_z,
        parameters=lambda a, b: {"loc": -a / (2 * b), "scale": (-2 * b).rsqrt()},
    ),
    "LogNormal": Formula(
        td.LogNormal,
        dist.LogNormal,
        statistic=lambda x: (x.log(), x.log() ** 2),
        natural=lambda d: (d.loc / d.scale**2 - 1, -0.5 / d.scale**2),
        log_z=lambda a, b: _normal_log_z(a + 1, b),  # dx = x d(log x)
        parameters=lambda a, b: {"loc": -(a + 1) / (2 * b), "scale": (-2 * b).rsqrt()},
    ),
    "HalfNormal": Formula(
        td.HalfNormal,
        dist.HalfNormal,
        statistic=lambda x: (x**2,),
        natural=lambda d: (-0.5 / d.scale**2,),
        log_z=lambda b: (-math.pi / (4 * b)).log() / 2,
        parameters=lambda b: {"scale": (-2 * b).rsqrt()},
    ),
    "MultivariateNormal": Formula(
        (td.MultivariateNormal, td.LowRankMultivariateNormal),
        dist.MultivariateNormal,
        statistic=lambda x: torch.cat([x, (x[..., None] * x[..., None, :]).flatten(-2)], -1),
        natural=lambda d: torch.cat(
            [(d.precision_matrix @ d.loc[..., None])[..., 0], -d.precision_matrix.flatten(-2) / 2],
            dim=-1,
        ),
        log_z=_multivariate_log_z,
        parameters=_multivariate_parameters,
        vector=True,
    ),
    "Wishart": Formula(
        td.Wishart,
        dist.Wishart,
        statistic=lambda x: torch.cat([x.logdet()[..., None], x.flatten(-2)], -1),
        natural=lambda d: torch.cat(
            [(d.df[..., None] - d.event_shape[-1] - 1) / 2, -d.precision_matrix.flatten(-2) / 2],
            dim=-1,
        ),
        log_z=_wishart_log_z,
        parameters=lambda a: dict(zip(("df", "precision_matrix"), _wishart(a), strict=True)),
        vector=True,
        support=positive_definite,
    ),
    "Laplace": Formula(
        td.Laplace,
        dist.Laplace,
        statistic=lambda x, loc: ((x - loc).abs(),),
        natural=lambda d: (-1 / d.scale,),
        log_z=lambda a, loc: (-2 / a).log(),
        parameters=lambda a, loc: {"loc": loc, "scale": -1 / a},
        fixed=lambda d: (d.loc,),
    ),
    "VonMises": Formula(
        td.VonMises,
        dist.VonMises,
        statistic=lambda x: (x.cos(), x.sin()),
        natural=lambda d: (d.concentration * d.loc.cos(), d.concentration * d.loc.sin()),
        log_z=lambda a, b: (2 * math.pi * torch.special.i0e(a.hypot(b))).log() + a.hypot(b),
        parameters=lambda a, b: {"loc": torch.atan2(b, a), "concentration": a.hypot(b)},
        support=constraints.interval(-math.pi, math.pi),  # one turn: Z is that of one
    ),
    "Exponential": Formula(
        td.Exponential,
        dist.Exponential,
        statistic=lambda x: (x,),
        natural=lambda d: (-d.rate,),
        log_z=lambda a: -(-a).log(),
        parameters=lambda a: {"rate": -a},
    ),
    "Gamma": Formula(
        td.Gamma,
        dist.Gamma,
        statistic=lambda x: (x.log(), x),
        natural=lambda d: (d.concentration - 1, -d.rate),
        log_z=lambda a, b: _gamma_log_z(a + 1, -b),
        parameters=lambda a, b: {"concentration": a + 1, "rate": -b},
    ),
    "InverseGamma": Formula(
        td.InverseGamma,
        dist.InverseGamma,
        statistic=lambda x: (x.log(), 1 / x),
        natural=lambda d: (-d.concentration - 1, -d.rate),
        log_z=lambda a, b: _gamma_log_z(-a - 1, -b),
        parameters=lambda a, b: {"concentration": -a - 1, "rate": -b},
    ),
    "Weibull": Formula(
        td.Weibull,
        dist.Weibull,
        statistic=lambda x, k: (x**k,),
        natural=lambda d: (-(d.scale**-d.concentration),),
        log_z=lambda a, k: -(-a * k).log(),
        parameters=lambda a, k: {"scale": (-a) ** (-1 / k), "concentration": k},
        log_h=lambda x, k: (k - 1) * x.log(),
        fixed=lambda d: (d.concentration,),
    ),
    "Pareto": Formula(
        td.Pareto,
        dist.Pareto,
        statistic=lambda x, scale: (x.log(),),
        natural=lambda d: (-d.alpha - 1,),
        log_z=lambda a, scale: (a + 1) * scale.log() - (-a - 1).log(),
        parameters=lambda a, scale: {"scale": scale, "alpha": -a - 1},
        fixed=lambda d: (d.scale,),
    ),
    "Beta": Formula(
        td.Beta,
        dist.Beta,
        statistic=lambda x: (x.log(), (-x).log1p()),
        natural=lambda d: (d.concentration1 - 1, d.concentration0 - 1),
        log_z=lambda a, b: lgamma(a + 1) + lgamma(b + 1) - lgamma(a + b + 2),
        parameters=lambda a, b: {"concentration1": a + 1, "concentration0": b + 1},
    ),
    "Dirichlet": Formula(
        td.Dirichlet,
        dist.Dirichlet,
        statistic=lambda x: x.log(),
        natural=lambda d: d.concentration - 1,
        log_z=lambda a: lgamma(a + 1).sum(-1) - lgamma((a + 1).sum(-1)),
        parameters=lambda a: {"concentration": a + 1},
        vector=True,
    ),
    "ContinuousBernoulli": Formula(
        td.ContinuousBernoulli,
        dist.ContinuousBernoulli,
        statistic=lambda x: (x,),
        natural=lambda d: (d.logits,),
        log_z=lambda a: a / 2 + _log_sinhc(a / 2),  # (e^a - 1) / a
        parameters=lambda a: {"logits": a},
    ),
    "Bernoulli": Formula(
        td.Bernoulli,
        dist.Bernoulli,
        statistic=lambda x: (x,),
        natural=lambda d: (d.logits,),
        log_z=softplus,
        parameters=lambda a: {"logits": a},
    ),
    "Binomial": Formula(
        td.Binomial,
        dist.Binomial,
        statistic=lambda x, n: (x,),
        natural=lambda d: (d.logits,),
        log_z=lambda a, n: n * softplus(a),
        parameters=lambda a, n: {"logits": a, "total_count": n},
        log_h=lambda x, n: lgamma(n + 1) - lgamma(x + 1) - lgamma(n - x + 1),
        fixed=lambda d: (d.total_count,),
    ),
    "Geometric": Formula(
        td.Geometric,
        dist.Geometric,
        statistic=lambda x: (x,),
        natural=lambda d: (logsigmoid(-d.logits),),
        log_z=lambda a: -_log1mexp(a),
        parameters=lambda a: {"logits": _log1mexp(a) - a},
    ),
    "NegativeBinomial": Formula(
        td.NegativeBinomial,
        dist.NegativeBinomial,
        statistic=lambda x, n: (x,),
        natural=lambda d: (logsigmoid(d.logits),),
        log_z=lambda a, n: -n * _log1mexp(a),
        parameters=lambda a, n: {"logits": a - _log1mexp(a), "total_count": n},
        log_h=lambda x, n: lgamma(x + n) - lgamma(x + 1) - lgamma(n),
        fixed=lambda d: (d.total_count,),
    ),
    "Poisson": Formula(
        td.Poisson,
        dist.Poisson,
        statistic=lambda x: (x,),
        natural=lambda d: (d.rate.log(),),
        log_z=torch.exp,
        parameters=lambda a: {"rate": a.exp()},
        log_h=lambda x: -lgamma(x + 1),
    ),
    "Categorical": Formula(
        td.Categorical,
        dist.Categorical,
        statistic=lambda x, k: 1.0 * (x[..., None] == torch.arange(k, device=x.device)),
        natural=lambda d: d.logits,
        log_z=lambda a, k: a.logsumexp(-1),
        parameters=lambda a, k: {"logits": a},
        fixed=lambda d: (d.logits.shape[-1],),
        vector=True,
    ),
    "OneHotCategorical": Formula(
        td.OneHotCategorical,
        dist.OneHotCategorical,
        statistic=lambda x: x,
        natural=lambda d: d.logits,
        log_z=lambda a: a.logsumexp(-1),
        parameters=lambda a: {"logits": a},
        vector=True,
    ),
    "Multinomial": Formula(
        td.Multinomial,
        dist.Multinomial,
        statistic=lambda x, n: x,
        natural=lambda d: d.logits,
        log_z=lambda a, n: n * a.logsumexp(-1),
        parameters=lambda a, n: {"logits": a, "total_count": n},
        log_h=lambda x, n: math.lgamma(n + 1) - lgamma(x + 1).sum(-1),
        fixed=lambda d: (d.total_count,),
        vector=True,
    ),
}
