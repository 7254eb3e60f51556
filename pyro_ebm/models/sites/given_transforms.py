r"""Does a transform that a user gave map the support of a site onto the reals?

A chain moves on all of :math:`\mathbb{R}^n`, and :math:`x = T^{-1}(z)` must be a bijection onto the
support: where it leaves the support, states without a density are visited; where it reaches a part
of it only, the posterior is cut off, and no diagnostic shows it. A transform may declare its
``codomain`` and ``domain``, but one that is composed or written by a user need not; so points are
tried too. Points of the reals must come to lie in the support and
return, and so must points of the support that another bijection has reached. The logarithm of the
Jacobian's determinant, which is a part of the density of :math:`z`, is compared with automatic
differentiation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.core.supports import as_function, is_unbounded

NUM_POINTS = 8
NEAR, FAR = 2.0, 20.0
MAX_DETERMINANT = 50  # columns


def check_transform(
    name: str, transform: Transform, support: constraints.Constraint, x: Tensor
) -> None:
    """Raises a ValueError unless a transform maps the support of a site onto the reals.

    Args:
        name: of the site.
        transform: from its support to the reals.
        support: its support.
        x: a value of the site, of its shape and dtype.

    Example:
        >>> from torch.distributions.transforms import ExpTransform, SigmoidTransform
        >>> positive, x = dist.constraints.positive, torch.ones(3)
        >>> check_transform("scale", ExpTransform().inv, positive, x)
        >>> check_transform("scale", ExpTransform(), positive, x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: transforms={'scale': ExpTransform()} maps the reals to the support ...
        >>> check_transform("scale", SigmoidTransform().inv, positive, x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: transforms={'scale': ...} must map the support ...
    """
    if (why := _objection(transform, support, x)) is None:
        return
    if _objection(transform.inv, support, x) is None:
        raise ValueError(
            f"transforms={{{name!r}: {_shown(transform)}}} maps the reals to the support of site"
            f" {name!r}, and is to map the support to the reals: give its inverse, .inv"
        )
    raise ValueError(
        f"transforms={{{name!r}: {_shown(transform)}}} must map the support {support} of site"
        f" {name!r} onto the reals, one to one: {why}. Without it, Pyro's"
        " biject_to(support).inv is taken"
    )


def check_from_reals(name: str, transform: Transform, z: Tensor) -> None:
    """Raises a ValueError unless the inverse of a transform is one to one on the reals.

    Args:
        name: of a site whose support is not known.
        transform: from there to the reals.
        z: an unconstrained value of the site, of its shape and dtype.
    """
    check_codomain(name, transform)
    inverse = as_function(transform.inv)
    if why := _objection(transform, constraints.dependent, inverse(z)):
        raise ValueError(
            f"transforms={{{name!r}: {_shown(transform)}}} must map site {name!r} onto the reals,"
            f" one to one: {why}"
        )


def check_codomain(name: str, transform: Transform) -> None:
    """Raises a ValueError if the codomain that a transform declares is not the reals.

    Args:
        name: of a site.
        transform: from its support to the reals.
    """
    codomain, domain = _declared(transform, "codomain"), _declared(transform, "domain")
    if codomain is not None and not is_unbounded(codomain):
        way_out = ", such as its inverse, .inv" if domain and is_unbounded(domain) else ""
        raise ValueError(
            f"transforms={{{name!r}: {_shown(transform)}}} maps to {codomain}, and is to map site"
            f" {name!r} to the reals: give one that does{way_out}"
        )


def _objection(transform: Transform, support: constraints.Constraint, x: Tensor) -> str | None:
    """Why it is no bijection from the support to the reals, in words."""
    if not transform.bijective:
        return "it is not bijective"
    error: Exception | None = None
    for value in (x.double(), x):  # a network in it may take one dtype only
        try:
            return next(_objections(transform, support, value), None)
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as raised:
            error = raised
    return f"it fails, with {type(error).__name__} ({error})"


def _objections(transform: Transform, support: constraints.Constraint, x: Tensor) -> Iterator[str]:
    inverse, to_reals = as_function(transform.inv), as_function(transform)
    codomain, domain = _declared(transform, "codomain"), _declared(transform, "domain")
    if codomain is not None and not is_unbounded(codomain):
        yield f"it maps to {codomain}"
    like = to_reals(x)
    generator = torch.Generator(like.device).manual_seed(0)

    def uniform(like: Tensor, radius: float) -> Tensor:
        u = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        return radius * (2 * u - 1)

    for _ in range(NUM_POINTS):
        z = uniform(like, NEAR / max(like.numel(), 1) ** 0.5)  # further out, sticks are broken off
        there = inverse(z)
        if there.shape != x.shape:
            yield f"its inverse gives shape {tuple(there.shape)} for {tuple(x.shape)}"
        if not _inside(support, there):
            yield f"its inverse maps {_point(z)} to {_point(there)}, which is outside"
        if not _close(to_reals(there), z):
            yield f"it does not bring {_point(z)} back, from {_point(there)}"
        if (why := _wrong_determinant(transform.inv, z, there)) is not None:
            yield why
    try:
        onto = biject_to(support)
        like = onto.inv(x)
    except NotImplementedError:  # there is no other bijection to compare with
        return
    for radius in (NEAR, 2 * NEAR, FAR) * NUM_POINTS:
        u = uniform(like, radius)
        point = onto(u)
        if not (_close(onto.inv(point), u) and _inside(support, point)):
            continue  # so far out that it is rounded to the boundary
        if domain is not None and not _inside(domain, point):
            yield f"it is defined on {domain}, and {_point(point)} is in the support"
        z = to_reals(point)
        if not (z.isinf().any() or _close(inverse(z), point)):
            yield f"its inverse does not reach {_point(point)}"


def _wrong_determinant(inverse: Transform, z: Tensor, x: Tensor) -> str | None:
    """Whether its Jacobian's determinant is another one than the derivatives say, in words."""
    if not 0 < x.numel() == z.numel() <= MAX_DETERMINANT:  # a simplex has fewer dimensions
        return None
    try:
        got = inverse.log_abs_det_jacobian(z, x).sum()
    except NotImplementedError:
        return None
    want = torch.linalg.slogdet(jacobian(inverse, z).reshape(z.numel(), -1)).logabsdet
    if abs(got - want) <= 1e-3 * (1 + abs(want)):
        return None
    return f"its log_abs_det_jacobian at {_point(x)} gives {-got:.3g} for {-want:.3g}"


def _declared(transform: Transform, name: str) -> constraints.Constraint | None:
    """The domain or codomain that a transform declares; None if it declares none."""
    try:
        return getattr(transform, name)
    except (NotImplementedError, AttributeError):
        return None


def _inside(support: constraints.Constraint, x: Tensor) -> bool:
    if constraints.is_dependent(support):
        return bool(x.isfinite().all())
    return bool(x.isfinite().all() and support.check(x).all())


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    if a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


def _point(x: Tensor) -> str:
    values = [f"{v:.3g}" for v in x.flatten()[:3].tolist()]
    more = ", ..." if x.numel() > 3 else ""
    return values[0] if x.numel() == 1 else f"({', '.join(values)}{more})"


def _shown(transform: Transform) -> str:
    inverse = getattr(transform, "_inv", None)
    if type(transform).__name__ == "_InverseTransform":
        return f"{inverse!r}.inv"
    return repr(transform)
