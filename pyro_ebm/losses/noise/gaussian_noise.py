"""A Gaussian around the data, as noise for the guide."""

import math
import warnings

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.ops.arguments import check_number, check_tensor

MAX_SHARE = 0.9
"""An element is nearly constant if more of the rows hold one and the same value of it,"""

MIN_SPREAD = 1e-3
"""or if its standard deviation is a smaller part of the root mean square of all."""

CONSTANT_SPREAD = 0.1
"""What part of it the Gaussian has instead of a smaller one along an element that is."""

MIN_SHRINKAGE = 0.01
"""The part by which correlations are shrunk at least, so that collinear elements have a density."""


def gaussian_noise(
    data: Tensor, width: float = 1.5, full_covariance: bool = True
) -> dist.TorchDistribution:
    r"""A Gaussian with the mean of the data and :math:`width^2` times their covariance.

    .. math:: C_{ij} = width^2\, s_i s_j \, (1 - a)\, r_{ij}, \qquad C_{ii} = width^2\, s_i^2

    The correlations :math:`r` of :math:`n` rows of :math:`d` elements are noise unless
    :math:`n \gg d`, and not even invertible for :math:`n \le d`. They are shrunk by the part
    :math:`a` that is best for a Gaussian: near 1 for few rows or no correlations, .01 for many.

    Args:
        data: points, shape ``(n, *event)``.
        width: how much wider than the data; at least 1 keeps NCE's variance finite.
        full_covariance: whether correlations are matched too, or variances only.

    Returns:
        A distribution with the data's event shape.

    Raises:
        ValueError: for fewer than two points, points that are not finite, or a width that is not
            positive.

    Warns:
        UserWarning: for elements that are nearly constant, as pixels at the margin of images.

    Reference:
        Chen, Wiesel, Eldar and Hero (2010), Shrinkage algorithms for MMSE covariance estimation.

    Example:
        >>> noise = gaussian_noise(torch.randn(1000, 2), width=2.0)
        >>> noise.event_shape
        torch.Size([2])
    """
    check_tensor("data", data)
    check_number("width", width)
    if data.dim() < 1 or len(data) < 2 or not 0 < width < math.inf:
        raise ValueError(
            "data of two or more points and a finite width > 0 are needed, got data of shape"
            f" {tuple(data.shape)} and width={width}"
        )
    if not data.isfinite().all():
        raise ValueError("the data hold NaN or infinite values: drop those rows")
    if not data.is_floating_point():
        data = data.to(torch.get_default_dtype())
    flat = data.detach().reshape(len(data), -1)
    mean, d = flat.mean(0), flat.shape[-1]
    spread, sd = float(flat.var(0).mean().sqrt()), flat.std(0)
    constant = (flat == flat.median(0).values).float().mean(0) > MAX_SHARE
    constant = constant | (sd <= MIN_SPREAD * spread)
    sd = torch.where(constant, sd.clamp(min=CONSTANT_SPREAD * spread + 1e-12), sd)
    scale = width * sd
    if not (scale.square().isfinite().all() and (scale.square() > 0).all()):
        raise ValueError(f"width={width} times the data leaves the numbers of {flat.dtype}")
    if constant.any():
        warnings.warn(
            f"{int(constant.sum())} of the data's {d} elements are nearly constant: the data have"
            f" no density there, and the Gaussian is made at least {CONSTANT_SPREAD:g} of the"
            f" typical standard deviation, {spread:.2g}, wide. Add noise to the data, here and in"
            " training, such as x + 0.1 * torch.randn_like(x), or leave those elements out",
            UserWarning,
            stacklevel=2,
        )
    event = data.shape[1:]
    if not full_covariance or d == 1:
        return dist.Normal(mean.reshape(event), scale.reshape(event)).to_event(len(event))
    correlation = ((flat - mean) / sd).T.cov()
    part = _shrinkage(correlation, len(flat))
    covariance = (1 - part) * correlation * scale[:, None] * scale
    covariance.diagonal().copy_(scale.square())
    normal = dist.MultivariateNormal(mean, covariance)
    if len(event) == 1:
        return normal
    return dist.TransformedDistribution(
        normal, [dist.transforms.ReshapeTransform(torch.Size([d]), event)]
    )


def _shrinkage(correlation: Tensor, n: int) -> float:
    r"""By which part to shrink a sample's correlations: the oracle of a Gaussian, approximated.

    .. math:: a = \frac{(1 - 2/d) \operatorname{tr} R^2 + \operatorname{tr}^2 R}
              {(n + 1 - 2/d) (\operatorname{tr} R^2 - \operatorname{tr}^2 R / d)}
    """
    d, trace = len(correlation), float(correlation.trace())
    square = float(correlation.square().sum())
    above = (n + 1 - 2 / d) * (square - trace**2 / d)
    part = ((1 - 2 / d) * square + trace**2) / above if above > 0 else 1.0
    return min(max(part, MIN_SHRINKAGE), 1.0)
