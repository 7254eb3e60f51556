r"""Energies combined: products and mixtures of densities, tempered densities, contrasts.

Energies add where densities multiply (a *product of experts*: what all parts allow), and a soft
minimum of energies is a mixture (what one part allows):

.. math::

    p_1(x)\, p_2(x) \propto h_1(x) h_2(x)\, e^{-E_1(x) - E_2(x)}, \qquad
    \sum_k w_k\, p_k(x) = e^{-E(x)}, \quad
    E = -\log \sum_k e^{\log w_k + \log h_k - E_k - \log Z_k} .

A product needs no normalizer of its parts; its own does not follow from theirs. A mixture needs
all of them: a weight is the share of its component only where the component is normalized.

Bases multiply as the densities do. One of them stays the ``base`` of the result, where chains
start, and the log densities of the others become terms of its energy. An ordinary distribution is
a base without an energy.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.core.introspection import unvalidated
from pyro_ebm.distributions.core.parts import (
    as_part,
    check_shapes,
    checked_coefficient,
    held,
    is_finite,
    name_of,
    support_of,
)
from pyro_ebm.distributions.core.supports import contains, same_support
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily

Term = tuple[Tensor | float, Callable[[Tensor], Tensor]]


class IntegrabilityWarning(UserWarning):
    """A density may have an infinite normalizer, which nothing can check."""


def product(*parts: Distribution, constant_normalizer: bool = False) -> UnnormalizedEnergy:
    r"""The product of densities, normalized: a *product of experts*, each with a veto.

    .. math:: p(x) \propto \prod_i p_i(x) = \Big[ \prod_i h_i(x) \Big] e^{-\sum_i E_i(x)}

    One of the :math:`h_i`, the first whose support is that of the product (else the first of all),
    is the ``base`` of the result; the others are in its energy, as :math:`-\log h_i`. Products of
    products are one product. Chains start from the base and use the first ``kernel`` that a part
    was given, for as many steps as the part that asks for most.

    :math:`\log Z` is unknown, but for parts of one exponential family without a base measure: their
    natural parameters add up, and the result is the member at the sum. The product of one energy is
    that energy.

    Args:
        *parts: distributions of one event shape, with batch shapes that broadcast:
            energies, or ordinary distributions, whose energy is :math:`-\log p_i`. Supports are
            the same, or the narrowest lies within the others.
        constant_normalizer: the user's word that :math:`Z` of the product does not depend on any
            latent. The same word of a part does not say so: two location families that move apart
            overlap less.

    Raises:
        ValueError: if parts have other event shapes, batch shapes that do not broadcast, supports
            of which none lies within the others, or no density (a mask, a ``Delta``), or if the
            product of members of an exponential family has no finite :math:`Z`.

    Reference:
        Hinton (2002), Training products of experts by minimizing contrastive divergence.
        Du and Mordatch (2019), Implicit generation and modeling with energy-based models.

    Example:
        >>> def ring(x):
        ...     return 8 * (x.norm(dim=-1) - 2) ** 2
        >>> right = dist.Normal(torch.tensor([2.0, 0.0]), 1.0).to_event(1)
        >>> p = product(UnnormalizedEnergy(ring, event_shape=(2,)), right)
        >>> p
        Combination(energy=ring, event_shape=(2,), base=Independent, log_normalizer=unknown)
        >>> p.log_density_ratio(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0]))
        tensor(8.)
    """
    if not parts:
        raise ValueError("product needs at least one part")
    checked = [as_part(f"part {i} of the product", part) for i, part in enumerate(parts)]
    if len(checked) == 1 and isinstance(checked[0], UnnormalizedEnergy):
        return checked[0]
    check_shapes("the product", checked)
    support = support_of(checked[0])
    for i, part in enumerate(checked):
        other = support_of(part)
        if not contains(other, support):
            if not contains(support, other):
                raise ValueError(
                    f"part {i} of the product has the support {other}, a part before it {support}:"
                    " neither lies within the other. Write the part as"
                    " UnnormalizedEnergy(lambda x: -d.log_prob(x), support=...) on the common one"
                )
            support = other
    return _combined(checked, [1.0] * len(checked), support, constant_normalizer)


def negation(
    a: Distribution, b: Distribution, weight: Tensor | float, constant_normalizer: bool = False
) -> UnnormalizedEnergy:
    r"""What one density allows and another does not: *negation* of an energy.

    .. math:: p(x) \propto \frac{p_a(x)}{p_b(x)^w}
              = h_a(x)\, e^{-E_a(x) + w (E_b(x) - \log h_b(x))}

    Where :math:`p_b` has lighter tails than :math:`p_a`, the ratio grows without bound and there is
    no such density. Nothing can check that in general, hence the warning. There is none where the
    support is a finite set, or both are of one exponential family without a base measure, whose
    natural parameters then tell: the result is the member at their difference.

    Args:
        a: what is wanted, an energy or an ordinary distribution. Its base is the result's.
        b: what is not wanted, of the same event shape, on a support that holds that of ``a``.
        weight: :math:`w > 0`, broadcastable to the batch of ``a`` and ``b``.
        constant_normalizer: the user's word that :math:`Z` of the contrast does not depend on any
            latent.

    Raises:
        ValueError: if the weight is not positive, shapes or supports do not fit, or the contrast
            of members of an exponential family has no finite :math:`Z`.

    Warns:
        IntegrabilityWarning: if nobody knows that :math:`Z` is finite.

    Reference:
        Du, Li and Mordatch (2020), Compositional visual generation with energy based models.

    Example:
        >>> p = negation(dist.Bernoulli(0.5), dist.Bernoulli(0.8), weight=1.0)
        >>> p.log_density_ratio(torch.tensor(0.0), torch.tensor(1.0)).exp()  # .8 / .2
        tensor(4.)
    """
    checked = [as_part("a", a), as_part("b", b)]
    batch_shape = check_shapes("the contrast", checked)
    weight = checked_coefficient("weight", weight, batch_shape, zero=False)
    support, other = map(support_of, checked)
    if not contains(other, support):
        raise ValueError(
            f"the support of a, {support}, must lie within that of b, {other}: where p_b is 0 and"
            " p_a is not, p_a / p_b is infinite"
        )
    p = _combined(checked, [1.0, -weight], support, constant_normalizer)
    if not (p.is_normalized or is_finite(p.support, p.event_shape)):
        warnings.warn(
            f"{p!r} may have an infinite log Z: p_a / p_b^weight must fall off in every direction"
            " of the support. Chains that run away are the sign; a bounded support or a bounded"
            " energy of b is the cure",
            IntegrabilityWarning,
            stacklevel=2,
        )
    return p


def tempered(p: UnnormalizedEnergy, beta: Tensor | float) -> UnnormalizedEnergy:
    """The energy times ``beta``, see :meth:`UnnormalizedEnergy.tempered`."""
    beta = checked_coefficient("beta", beta, p.batch_shape, zero=p.base is not None)
    if not isinstance(beta, Tensor) and beta == 1:
        return p
    # Only a number tells: a tensor that happens to be 0 or 1 may be computed from a latent.
    is_zero = not isinstance(beta, Tensor) and beta == 0
    is_base = is_zero and p.base is not None and same_support(p.support, support_of(p.base))
    terms = [] if is_zero else [(beta * c, f) for c, f in _terms(p)]
    return Combination(
        terms,
        starts=p if _says_where_to_start(p) else None,
        event_shape=p.event_shape,
        support=p.support,
        batch_shape=p.batch_shape,
        base=p.base,
        log_normalizer=0.0 if is_base else None,
        kernel=p.kernel,
        num_steps=p.num_steps,
    )


class Combination(UnnormalizedEnergy):
    r"""What products, contrasts and tempered densities are: an energy that is a sum of others.

    .. math:: E(x) = \sum_i c_i f_i(x)

    Args:
        terms: pairs of :math:`c_i` and :math:`f_i`, see :class:`LinearEnergy`.
        starts: the density in whose starting points chains start where there is no base.
        **kwargs: the other arguments of :class:`~pyro_ebm.UnnormalizedEnergy`.
    """

    def __init__(self, terms: Iterable[Term], starts: UnnormalizedEnergy | None, **kwargs: Any):
        self._starts = starts
        energy = LinearEnergy(terms, len(kwargs["event_shape"]))
        super().__init__(energy, **kwargs)
        self.terms = energy.terms
        if self._log_normalizer is not None:  # the base alone is left
            self._normalized_parts = ()

    def starting_points(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Where chains start: draws of the base, else where the first part says, if one does.

        Args:
            sample_shape: how many points.

        Returns:
            Points of the support, shape ``(*sample_shape, *batch_shape, *event_shape)``.
        """
        start = super().starting_points(sample_shape)
        if self.base is not None or self._starts is None:
            return start
        x = self._starts.expand(self.batch_shape).starting_points(sample_shape)
        inside = self.support.check(x)
        return torch.where(inside.reshape(inside.shape + (1,) * self.event_dim), x, start)


class LinearEnergy:
    r"""The energy :math:`E(x) = \sum_i c_i f_i(x)` of energies and log densities.

    Args:
        terms: pairs of :math:`c_i`, a number or a tensor that broadcasts to ``(*sample, *batch)``,
            and :math:`f_i`, the method ``energy`` or ``log_prob`` of a distribution.
        event_dim: number of dimensions of an event.
    """

    def __init__(self, terms: Iterable[Term], event_dim: int):
        self.terms = tuple(terms)
        self.event_dim = event_dim
        self.held = held([x for c, f in self.terms for x in (_owner(f), c)])
        self.__name__ = _written(self.terms)

    def __call__(self, x: Tensor) -> Tensor:
        """Energies ``(*sample, *batch)`` of points ``(*sample, *batch, *event)``."""
        total = x.new_zeros(x.shape[: x.dim() - self.event_dim])
        for c, f in self.terms:
            value = f(x)
            if isinstance(c, Tensor):  # 0 times infinity is 0 here: the power 0 of a density is 1
                total = total + torch.where(c == 0, torch.zeros_like(value), c * value)
            else:
                total = total + c * value
        return total


def _combined(
    parts: Sequence[Distribution],
    coefficients: Sequence[Tensor | float],
    support: constraints.Constraint,
    constant_normalizer: bool,
) -> UnnormalizedEnergy:
    """The density proportional to the product of the parts to the power of their coefficients."""
    energies = [part for part in parts if isinstance(part, UnnormalizedEnergy)]
    batch_shape = torch.broadcast_shapes(*(part.batch_shape for part in parts))
    kernel = next((p.kernel for p in energies if p.kernel is not None), None)
    num_steps = max((p.num_steps for p in energies), default=100)
    member = _member(parts, coefficients)
    if member is not None:
        member.kernel, member.num_steps = kernel, num_steps
        return member if member.batch_shape == batch_shape else member.expand(batch_shape)
    terms: list[Term] = []
    bases: list[tuple[Tensor | float, Distribution]] = []
    for c, part in zip(coefficients, parts, strict=True):
        base = part
        if isinstance(part, UnnormalizedEnergy):
            terms += [(c * inner, f) for inner, f in _terms(part)]
            base = part.base
        if base is not None:
            bases.append((c, base))
    possible = [i for i, (c, _) in enumerate(bases) if not isinstance(c, Tensor) and c == 1]
    fitting = [i for i in possible if same_support(support_of(bases[i][1]), support)]
    chosen = next(iter(fitting + possible), None)
    terms += [(-c, unvalidated(h).log_prob) for i, (c, h) in enumerate(bases) if i != chosen]
    base: Any = None if chosen is None else bases[chosen][1]
    return Combination(
        terms,
        starts=next((p for p in energies if _says_where_to_start(p)), None),
        event_shape=parts[0].event_shape,
        support=support,
        batch_shape=batch_shape,
        base=base,
        log_normalizer=0.0 if not terms and chosen in fitting else None,
        kernel=kernel,
        num_steps=num_steps,
        constant_normalizer=constant_normalizer,
    )


def _member(
    parts: Sequence[Distribution], coefficients: Sequence[Tensor | float]
) -> ExponentialFamily | None:
    """The member of an exponential family that a product of its members is; None if it is none."""
    members: list[ExponentialFamily] = []
    for part in parts:
        try:
            members.append(ExponentialFamily.from_distribution(part))
        except ValueError:  # of no family
            return None
    first = members[0]
    if any(p.family != first.family or p.log_base_measure is not None for p in members):
        return None
    #   prod_i e^{c_i theta_i . T(x)} = e^{(sum_i c_i theta_i) . T(x)}
    theta = [
        (c[..., None] if isinstance(c, Tensor) else c) * p.natural_parameters
        for c, p in zip(coefficients, members, strict=True)
    ]
    try:
        return first.with_natural_parameters(sum(theta[1:], theta[0]))
    except ValueError as error:
        raise ValueError(
            f"the combined density is no member of {first.family}, its Z is not finite: {error}"
        ) from error


def _terms(p: UnnormalizedEnergy) -> tuple[Term, ...]:
    """The energy as a sum: its own, where it is one; nesting flattens."""
    return p.terms if isinstance(p, Combination) else ((1.0, p.energy),)


def _says_where_to_start(p: UnnormalizedEnergy) -> bool:
    return type(p).starting_points is not UnnormalizedEnergy.starting_points


def _owner(f: Any) -> Distribution:
    return f.__self__


def _written(terms: Sequence[Term]) -> str:
    """The sum as a formula, such as ``ring - 0.5 moons - log Normal``."""
    text = ""
    for c, f in terms:
        owner = _owner(f)
        factor, sign = "c ", "+"
        if not isinstance(c, Tensor):
            factor, sign = "" if abs(c) == 1 else f"{abs(c):g} ", "-" if c < 0 else "+"
        log = "" if f == getattr(owner, "energy", None) else "log "
        text += f" {sign} {factor}{log}{name_of(owner)}"
    return text.removeprefix(" + ").strip() or "0"


__all__ = ["Combination", "IntegrabilityWarning", "LinearEnergy", "negation", "product", "tempered"]
