r"""Whether the gradient of a function accounts for its changes.

.. math:: f(b) - f(a) = \int_0^1 \nabla f(a + t\,(b - a))^\top (b - a)\, dt

holds for every function whose gradient autograd computes in full, kinks included. Where a part of
:math:`f` jumps, or reads its points by an index, an argmax or a comparison, the left side has a
term that the right side lacks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_POINTS = 16


@torch.no_grad()
def gradient_tells_all(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]], a: Tensor, b: Tensor
) -> bool:
    r"""Whether the integral of the gradient from :math:`a` to :math:`b` is the change of values.

    The integral is a midpoint sum, and its error the difference to one of half as many points. It
    is taken over all rows together; rows with a value that is not finite do not count.

    Args:
        value_and_grad: gives the values ``(rows,)`` and gradients ``(rows, d)`` of points.
        a: where lines start, shape ``(rows, d)``.
        b: where they end, of the same shape.

    Example:
        >>> from pyro_ebm.ops import value_and_grad
        >>> def f(x):
        ...     return x.square().sum(-1)
        >>> def g(x):  # the gradient of the second term is lost
        ...     return f(x) + (x[:, 0] > 0).to(x)
        >>> a, b = -torch.rand(10, 2), torch.rand(10, 2)
        >>> [gradient_tells_all(lambda x: value_and_grad(h, x), a, b) for h in (f, g)]
        [True, False]
    """

    def integral(num: int) -> Tensor:
        slopes = [
            (value_and_grad(a + (k + 0.5) / num * (b - a))[1] * (b - a)).sum(-1) for k in range(num)
        ]
        return torch.stack(slopes).mean(0)

    start, end = value_and_grad(a)[0], value_and_grad(b)[0]
    change, fine, coarse = end - start, integral(NUM_POINTS), integral(NUM_POINTS // 2)
    counts = (change + fine + coarse).isfinite()
    if not counts.any():
        return True  # nothing to tell by

    def size(x: Tensor) -> Tensor:
        return x[counts].square().mean().sqrt()

    rounding = 100 * torch.finfo(a.dtype).eps * (size(start) + size(end))
    allowed = 4 * size(fine - coarse) + 1e-3 * size(change) + rounding
    return bool(size(change - fine) <= allowed)
