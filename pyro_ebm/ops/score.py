r"""Scores and gradients of batched functions.

The *score* of a density is the gradient of its logarithm in the point,
:math:`s(x) = \nabla_x \log p(x)`. The unknown constant :math:`\log Z` does not depend on
:math:`x`, so the score of an energy-based model is known: :math:`s(x) = -\nabla_x E(x)`.

Batches are differentiated in one sweep: entry ``i`` of the output must depend on row ``i`` of the
input alone.

Reference:
    Hyvarinen (2005), Estimation of non-normalized statistical models by score matching.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.internals.compilers import as_written
from pyro_ebm.ops.arguments import check_callable, check_tensor, shown
from pyro_ebm.ops.rows import rows_interact


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
    check_tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(
            f"a gradient needs floating points x, got dtype {x.dtype}: use x.float(), or a method"
            " that needs no gradient"
        )
    # a compiled function has no second derivatives
    twice = as_written() if create_graph else contextlib.nullcontext()
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        with twice:
            value = function(x)
        if not isinstance(value, Tensor):
            raise ValueError(f"the function must return a tensor at the points, got {shown(value)}")
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
    p: Callable[[Tensor], Tensor] | Distribution, x: Tensor, *, create_graph: bool = False
) -> Tensor:
    r"""The score :math:`\nabla_x \log p(x)` of a density known up to a constant.

    Args:
        p: a distribution with a ``log_prob`` that is differentiable in the point (Pyro's, torch's,
            an energy), or a log density ``(*batch, *event) -> (*batch)``.
        x: points, shape ``(*batch, *event)``.
        create_graph: whether the score can be differentiated again.

    Returns:
        The score, shape ``(*batch, *event)``, broadcast against the distribution's own batch.

    Raises:
        TypeError: for integer points, which have no score.

    Example:
        >>> score(dist.Normal(1.0, 2.0), torch.tensor([3.0]))  # (mu - x) / sigma^2
        tensor([-0.5000])
        >>> score(dist.Gamma(3.0, 2.0), torch.tensor([1.0]))  # (a - 1) / x - b
        tensor([0.])
    """
    check_tensor("x", x)
    if not isinstance(p, Distribution):
        check_callable("p", p, "a log density, or a distribution")
        return value_and_grad(p, x, create_graph=create_graph)[1]
    batch = torch.broadcast_shapes(x.shape[: x.dim() - len(p.event_shape)], p.batch_shape)
    return value_and_grad(p.log_prob, x.expand(batch + p.event_shape), create_graph=create_graph)[1]


def fisher_divergence(
    p: Callable[[Tensor], Tensor] | Distribution,
    q: Callable[[Tensor], Tensor] | Distribution,
    x: Tensor,
    event_dim: int | None = None,
) -> Tensor:
    r"""The Fisher divergence :math:`\frac12 \mathbb E_p |\nabla \log p - \nabla \log q|^2`.

    Neither density needs its constant. It is 0 only where the scores agree wherever p has mass, and
    blind to the relative weight of modes that are far apart.

    Args:
        p: the density that ``x`` are draws of; a distribution or a log density, see :func:`score`.
        q: another density.
        x: draws of p, shape ``(n, *event)``.
        event_dim: number of event dimensions; p's (or q's) own if it is a distribution.

    Returns:
        The Monte Carlo estimate, shape ``()``.

    Raises:
        ValueError: if neither density has a known number of event dimensions, or they disagree, or
            a density at one row depends on the others.

    Reference:
        Hyvarinen (2005), Estimation of non-normalized statistical models by score matching.

    Example:
        >>> x = dist.Normal(0.0, 1.0).sample((1000,))
        >>> fisher_divergence(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), x)
        tensor(0.5000)
    """
    if event_dim is None:
        known = [len(d.event_shape) for d in (p, q) if isinstance(d, Distribution)]
        if not known:
            raise ValueError(
                "give event_dim: the number of event dimensions of a function is unknown"
            )
        if len(set(known)) > 1:
            raise ValueError(f"p and q have {known[0]} and {known[1]} event dimensions: to_event?")
        event_dim = known[0]
    for name, density in (("p", p), ("q", q)):
        if not isinstance(density, Distribution):
            check_callable(name, density, "a log density, or a distribution")
    check_tensor("x", x)
    if type(event_dim) is not int or not 0 <= event_dim <= x.dim():
        raise ValueError(
            f"event_dim must be an integer from 0 to the {x.dim()} dimension(s) of x, got"
            f" {shown(event_dim)}"
        )
    for name, density in (("p", p), ("q", q)):
        if isinstance(density, Distribution):
            function, parts = density.log_prob, getattr(density, "modules", ())
            if x.shape[max(0, x.dim() - len(density.event_shape)) :] != density.event_shape:
                raise ValueError(
                    f"x must hold points of {name}, whose event_shape is"
                    f" {tuple(density.event_shape)}, got shape {tuple(x.shape)}"
                )
        else:
            function, parts = density, density.modules() if isinstance(density, nn.Module) else ()
        if rows_interact(function, x, event_dim, parts):
            raise ValueError(
                f"the log density of {name} at a row of x depends on the other rows, and is no"
                " density of one point: normalise over the dimensions of the event alone, and hold"
                " batch normalisation in evaluation mode"
            )
    difference = (score(p, x) - score(q, x)).square()
    return (
        difference.reshape(difference.shape[: difference.dim() - event_dim] + (-1,)).sum(-1).mean()
        / 2
    )


def draw_probes(distribution: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    r"""Random directions :math:`v` with :math:`\mathbb E\, v v^\top = I`.

    Args:
        distribution: ``"rademacher"`` (each element -1 or 1), ``"gaussian"``, or ``"sphere"`` (of
            radius :math:`\sqrt d`).
        shape: leading shape.
        like: points, shape ``(rows, d)``.

    Returns:
        Directions, shape ``(*shape, rows, d)``.

    Raises:
        ValueError: for an unknown distribution.

    Example:
        >>> draw_probes("sphere", (), torch.zeros(2, 4)).norm(dim=-1)
        tensor([2., 2.])
    """
    noise = torch.randn(shape + like.shape, dtype=like.dtype, device=like.device)
    if distribution == "gaussian":
        return noise
    if distribution == "rademacher":
        return torch.where(noise > 0, 1.0, -1.0).to(like.dtype)
    if distribution == "sphere":
        return noise * (like.shape[-1] ** 0.5 / noise.norm(dim=-1, keepdim=True))
    raise ValueError(
        f"distribution must be 'rademacher', 'gaussian' or 'sphere', got {distribution!r}"
    )


def row_divergence(field: Tensor, x: Tensor) -> Tensor:
    r"""The exact divergence :math:`\sum_i \partial_i f_i(x)` of a vector field, row by row.

    Costs one backward pass for each dimension.

    Args:
        field: :math:`f(x)`, computed from ``x`` row by row with a graph, shape ``(rows, d)``.
        x: points, shape ``(rows, d)``.

    Returns:
        Shape ``(rows,)``, differentiable.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> row_divergence(x**2, x).detach()
        tensor([6.])
    """
    terms = [_vjp(field[:, i].sum(), x)[:, i] for i in range(x.shape[-1])]
    return torch.stack(terms).sum(0)


def projected_divergence(field: Tensor, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    r"""Hutchinson's estimates :math:`v^\top (\nabla f)\, v` of the divergence, one for each probe.

    With a symmetric Jacobian :math:`H` and Rademacher probes their variance is
    :math:`2 \sum_{i \ne j} H_{ij}^2`, with Gaussian probes :math:`2 |H|_F^2`.

    Args:
        field: :math:`f(x)`, computed from ``x`` row by row with a graph, shape ``(rows, d)``.
        x: points, shape ``(rows, d)``.
        probes: :math:`v`, shape ``(probes, rows, d)``.

    Returns:
        The estimates, shape ``(probes, rows)``, differentiable, and :math:`v^\top f`, of the same
        shape.

    Reference:
        Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.
    """
    projections = (probes * field).sum(-1)
    estimates = [
        (v * _vjp(along.sum(), x)).sum(-1) for v, along in zip(probes, projections, strict=True)
    ]
    return torch.stack(estimates), projections


def _vjp(value: Tensor, x: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(value, x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad
