r"""Points on the boundary of a support, which have no position in unconstrained coordinates.

Chains move on :math:`z = T^{-1}(x)`, with :math:`T` the bijection from the reals onto the support.
At the boundary :math:`T^{-1}` is infinite, and where torch clamps it (the logit of 0 and of 1, the
last element of a simplex) it is a finite number that says nothing. A *margin* :math:`m(x)` is 0 on
the boundary and positive inside: the distance to an end of an interval, an element of a simplex,
the diagonal of a Cholesky factor. A point has a position if each of its margins is positive and
comes back from the reals,

.. math:: | m(T(T^{-1}(x))) - m(x) | \le \tfrac12 m(x) .
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.distributions.core.positive_definite import positive_definite

ROUNDED = 0.01
"""The share of the values that may have been rounded onto the boundary."""
ROUNDED_OF_ELEMENT = 0.1
"""The share of the values of one element of the event; a single one always may."""


def ends_of(support: constraints.Constraint) -> tuple[Tensor | float | None, Tensor | float | None]:
    """The ends of an interval, None for those it does not have, also for other supports.

    Example:
        >>> ends_of(dist.constraints.positive), ends_of(dist.constraints.unit_interval)
        ((0.0, None), (0.0, 1.0))
    """
    support = elementwise(support)
    if support.event_dim:
        return None, None
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def margins(support: constraints.Constraint, x: Tensor) -> Iterator[Tensor]:
    """What is 0 on the boundary and positive inside; nothing for the reals and unknown supports.

    Args:
        support: a constraint that is no ``independent``.
        x: points of it.

    Example:
        >>> list(margins(dist.constraints.unit_interval, torch.tensor([0.0, 0.75])))
        [tensor([0.0000, 0.7500]), tensor([1.0000, 0.2500])]
    """
    low, high = ends_of(support)
    if low is not None:
        yield x - low
    if high is not None:
        yield high - x
    if isinstance(support, type(constraints.simplex)):
        yield x
    elif isinstance(support, type(constraints.corr_cholesky)):
        yield x.diagonal(dim1=-2, dim2=-1)
    elif isinstance(support, _MATRICES):
        yield torch.linalg.eigvalsh(x)
    elif isinstance(support, _ORDERED):
        yield x.diff(dim=-1)
        if isinstance(support, type(constraints.positive_ordered_vector)):
            yield x[..., :1]


_MATRICES = (type(positive_definite), type(constraints.corr_matrix))
_ORDERED = (type(constraints.ordered_vector), type(constraints.positive_ordered_vector))


def inside(support: constraints.Constraint, x: Tensor, bijection: Any = None) -> Tensor:
    """Whether points have a position in unconstrained coordinates; False for NaN.

    Args:
        support: a continuous support.
        x: points, shape ``(*batch, *event)``.
        bijection: from the reals onto the support; by default that of
            :func:`torch.distributions.biject_to`.

    Returns:
        Of an elementwise support one answer for each element, the shape of ``x``; of a joint one
        (a simplex, a matrix) one for each vector or matrix.

    Example:
        >>> inside(dist.constraints.unit_interval, torch.tensor([0.0, 1e-30, 0.5, 1.0]))
        tensor([False,  True,  True, False])
        >>> inside(dist.constraints.simplex, torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.5, 0.1]]))
        tensor([False,  True])
    """
    support = elementwise(support)
    if isinstance(support, constraints.cat):
        parts = x.split(support.lengths, support.dim)
        pairs = zip(support.cseq, parts, strict=True)
        return torch.cat([_broad(inside(c, part), part) for c, part in pairs], support.dim)
    if isinstance(support, constraints.stack):
        pairs = zip(support.cseq, x.unbind(support.dim), strict=True)
        return torch.stack([_broad(inside(c, part), part) for c, part in pairs], support.dim)
    bijection = bijection or biject_to(support)

    def each(of: Tensor, dims: int) -> Tensor:
        return of.flatten(of.dim() - dims).all(-1) if dims else of

    joint, definite = bijection.domain.event_dim, True
    if isinstance(support, _MATRICES):  # a bijection raises for singular ones
        definite = torch.linalg.cholesky_ex(x).info == 0
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        x = torch.where(definite[..., None, None], x, identity)
    z = bijection.inv(x)
    answer = each(z.isfinite(), joint) & definite
    least = torch.finfo(x.dtype).tiny  # what torch's samplers put in place of 0
    # positions that are not finite lead nowhere
    back = bijection(torch.where(z.isfinite(), z, 0.0))
    for margin, again in zip(margins(support, x), margins(support, back), strict=True):
        holds = (margin > least) & ((again - margin).abs() <= margin / 2)
        holds = holds | (margin == torch.inf)  # an end at infinity is no boundary
        answer = answer & each(holds, joint)
    return answer


def _broad(answer: Tensor, x: Tensor) -> Tensor:
    """One answer for each element."""
    return answer.reshape(answer.shape + (1,) * (x.dim() - answer.dim())).expand(x.shape)


def check_inside(
    support: constraints.Constraint, x: Tensor, what: str, otherwise: str | None = None
) -> None:
    """Refuses points that have no position, unless they are so few that rounding explains them.

    Args:
        support: the support of a whole event.
        x: points, shape ``(*batch, *event)``.
        what: names the points, as in "data at site 'x'".
        otherwise: another way out than to move them.

    Raises:
        ValueError: if there are too many, or any whose position is infinite.

    Example:
        >>> check_inside(dist.constraints.unit_interval, torch.tensor([0.0, 0.5, 1.0]), "the data")
        Traceback (most recent call last):
        ValueError: 2 of 3 values of the data lie on the boundary of the support ...
    """
    base = elementwise(support)
    if base.is_discrete or base is constraints.real or not x.numel():
        return
    bad = ~inside(base, x)
    if too_many(bad, x.dim() - support.event_dim) or (
        bad.any() and biject_to(base).inv(x).isinf().any()
    ):
        ways = [_way_inside(base), otherwise]
        why = "or within rounding of it, where they have no unconstrained coordinates"
        raise boundary_error(base, x, bad, what, why, ways)


def too_many(bad: Tensor, batch_dim: int) -> bool:
    """Whether more values lie on the boundary than rounding of a continuous density puts there.

    Args:
        bad: which do, shape ``(*batch, ...)``.
        batch_dim: how many of the dimensions are those of the batch.

    Example:
        >>> too_many(torch.tensor([True, True, False]), 1)
        True
        >>> too_many(torch.arange(1000) < 3, 1)
        False
    """
    if not bad.any():
        return False
    rows = bad.shape[:batch_dim].numel()
    rates = bad.reshape(rows, -1).double().mean(0)  # of each element of the event
    return bool(rates.mean() > ROUNDED) or bool(rates.max() > max(ROUNDED_OF_ELEMENT, 1 / rows))


def boundary_error(
    support: constraints.Constraint,
    x: Tensor,
    bad: Tensor,
    what: str,
    why: str,
    ways: Iterable[str | None],
) -> ValueError:
    """The error about points on the boundary.

    Args:
        support: a constraint.
        x: points, shape ``(*batch, *event)``.
        bad: which of them lie there, as in :func:`inside`.
        what: names them.
        why: what is wrong with them.
        ways: the ways out.
    """
    support = elementwise(support)
    kind, first = "values" if bad.shape == x.shape else "events", x[bad][0]
    shown = f" (such as {first.item():.7g})" if first.numel() == 1 else ""
    ways = [way for way in ways if way is not None]
    if ends_of(support)[1] is not None and bool(((x == 0) | (x == 1)).all()):
        ways.append("give data of 0 and 1 support=constraints.boolean, with ContrastiveDivergence")
    return ValueError(
        f"{int(bad.sum())} of {bad.numel()} {kind} of {what} lie on the boundary of the support"
        f" {support}{shown}, {why}: {', or '.join(ways)}"
    )


def _way_inside(support: constraints.Constraint) -> str:
    low, high = ends_of(support)
    if low is not None and high is not None:
        middle = "0.5"
        try:
            middle = f"{(float(low) + float(high)) / 2:g}"
        except (TypeError, ValueError, RuntimeError):  # ends of several elements
            middle = "(low + high) / 2"
        return (
            f"shrink them towards the middle, x = {middle} + 0.98 * (x - {middle}), after adding"
            " uniform noise to data of few levels"
        )
    if isinstance(support, type(constraints.simplex)):
        return "mix them with the uniform point, x = 0.99 * x + 0.01 / x.shape[-1]"
    if isinstance(support, type(positive_definite)):
        return "add a small multiple of the identity matrix"
    if isinstance(support, (*_MATRICES, type(constraints.corr_cholesky))):
        return "shrink the correlations, 0.99 * matrix + 0.01 * identity"
    if isinstance(support, _ORDERED):
        return "break ties"
    return "move them inside"
