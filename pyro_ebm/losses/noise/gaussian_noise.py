"""A Gaussian around the data, as noise for the guide."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.ops.arguments import check_number, check_tensor


def gaussian_noise(
    data: Tensor, width: float = 1.5, full_covariance: bool = True
) -> dist.TorchDistribution:
    r"""A Gaussian with the mean of the data and :math:`width^2` times their covariance.

    Args:
        data: points, shape ``(n, *event)``.
        width: how much wider than the data; at least 1 keeps NCE's variance finite.
        full_covariance: whether correlations are matched, or variances only.

    Returns:
        A distribution with the data's event shape.

    Raises:
        ValueError: for fewer than two points, points that are not finite, or a width that is not
            positive.

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
    scale = width * flat.std(0).clamp(min=1e-3 * float(flat.std()) + 1e-12)
    event = data.shape[1:]
    if not full_covariance or d == 1:
        return dist.Normal(mean.reshape(event), scale.reshape(event)).to_event(len(event))
    # shrunk a little towards the diagonal, so that it is positive definite
    covariance = 0.99 * width**2 * flat.T.cov() + 0.01 * scale.square().diag()
    covariance = covariance + 1e-6 * scale.square().diag()
    if not (covariance.isfinite().all() and (covariance.diagonal() > 0).all()):
        raise ValueError(f"width={width} times the data leaves the numbers of {flat.dtype}")
    normal = dist.MultivariateNormal(mean, covariance)
    if len(event) == 1:
        return normal
    return dist.TransformedDistribution(
        normal, [dist.transforms.ReshapeTransform(torch.Size([d]), event)]
    )
