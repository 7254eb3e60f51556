r"""Scores and gradients of batched functions.

The *score* of a density is the gradient of its logarithm in the point,
:math:`s(x) = \nabla_x \log p(x)`. The unknown constant :math:`\log Z` does not depend on
:math:`x`, so the score of an energy-based model is known: :math:`s(x) = -\nabla_x E(x)`.

Batches are differentiated in one sweep: entry ``i`` of the output must depend on row ``i`` of the
input alone.

Reference:
    Hyvarinen (2005), Estimation of non-normalized statistical models by score matching.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_grad(
    function: Callable[[Tensor], Tensor], x: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Values :math:`f(x_i)` and gradients :math:`\nabla f(x_i)` of a batch of points.

    Args:
        function: maps ``(*batch, *event)`` to ``(*batch)``, row by row.
        x: points, shape ``(*batch, *event)``, of a floating dtype.
        create_graph: whether the results can be differentiated again.

    Returns:
        The values, shape ``(*batch)``, and the gradients, the shape of ``x``. They are detached
        unless ``create_graph``. Works inside :func:`torch.no_grad`.

    Raises:
        TypeError: if ``x`` is not floating.

    Example:
        >>> value_and_grad(lambda x: (x**2).sum(-1), torch.tensor([[1.0, 2.0]]))
        (tensor([5.]), tensor([[2., 4.]]))
    """
    if not x.is_floating_point():
        raise TypeError(
            f"a gradient needs floating points, got dtype {x.dtype}: use x.float(), or a method"
            " that needs no gradient"
        )
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        value = function(x)
        if value.requires_grad:
            (grad,) = torch.autograd.grad(
                value.sum(), x, create_graph=create_graph, allow_unused=True
            )
        else:  # a function that is constant in x
            grad = None
    if grad is None:
        grad = torch.zeros_like(x)
    return (value, grad) if create_graph else (value.detach(), grad.detach())


def score(
    log_density: Callable[[Tensor], Tensor], x: Tensor, *, create_graph: bool = False
) -> Tensor:
    r"""The score :math:`\nabla_x \log p(x)` of a log density known up to a constant.

    Args:
        log_density: maps ``(*batch, *event)`` to ``(*batch)``.
        x: points, shape ``(*batch, *event)``.
        create_graph: whether the score can be differentiated again.

    Returns:
        The score, shape ``(*batch, *event)``.

    Example:
        >>> score(dist.Normal(1.0, 2.0).log_prob, torch.tensor([3.0]))
        tensor([-0.5000])
    """
    return value_and_grad(log_density, x, create_graph=create_graph)[1]
