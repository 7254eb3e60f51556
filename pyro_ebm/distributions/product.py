r"""Products and ratios of densities: energies that add up.

.. math:: \prod_i p_i(x)^{c_i} \propto \Big[ \prod_i h_i(x)^{c_i} \Big] e^{-\sum_i c_i E_i(x)}

Such a density needs no normalizer of its parts; its own does not follow from theirs.

Bases multiply as the densities do. One of them stays the ``base`` of the result, where chains
start, and the log densities of the others become terms of its energy. An ordinary distribution is
a base without an energy.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.arguments import checked_coefficient
from pyro_ebm.distributions.core.linear import LinearEnergy, Term
from pyro_ebm.distributions.core.noise_levels import on_ladder
from pyro_ebm.distributions.core.supports import contains, is_finite, same_support, support_of
from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.parts import as_part, check_shapes


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
        constant_normalizer: True says that :math:`Z` of the product does not depend on any latent.
            That it holds for each part is not enough: two location families that move apart
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
        UnnormalizedEnergy(energy=ring, event_shape=(2,), base=Independent, log_normalizer=unknown)
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
        constant_normalizer: True says that :math:`Z` of the ratio does not depend on any latent.

    Raises:
        ValueError: if the weight is not positive, shapes or supports do not fit, or the ratio
            of members of an exponential family has no finite :math:`Z`.

    Warns:
        IntegrabilityWarning: if :math:`Z` may be infinite.

    Reference:
        Du, Li and Mordatch (2020), Compositional visual generation with energy based models.

    Example:
        >>> p = negation(dist.Bernoulli(0.5), dist.Bernoulli(0.8), weight=1.0)
        >>> p.log_density_ratio(torch.tensor(0.0), torch.tensor(1.0)).exp()  # .8 / .2
        tensor(4.)
    """
    checked = [as_part("a", a), as_part("b", b)]
    batch_shape = check_shapes("the ratio", checked)
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
            terms += [(c * inner, f) for inner, f in part.terms]
            base = part.base
        if base is not None:
            bases.append((c, base))
    possible = [i for i, (c, _) in enumerate(bases) if not isinstance(c, Tensor) and c == 1]
    fitting = [i for i in possible if same_support(support_of(bases[i][1]), support)]
    chosen = next(iter(fitting + possible), None)
    terms += [(-c, unvalidated(h).log_prob) for i, (c, h) in enumerate(bases) if i != chosen]
    known = not terms and chosen in fitting  # the base alone is left
    p = UnnormalizedEnergy(
        LinearEnergy(terms, len(parts[0].event_shape)),
        parts[0].event_shape,
        support,
        batch_shape,
        None if chosen is None else cast(TorchDistribution, bases[chosen][1]),
        log_normalizer=0.0 if known else None,
        kernel=kernel,
        num_steps=num_steps,
        constant_normalizer=constant_normalizer,
    )
    p.starts = next((part for part in energies if part.has_starts), None)
    p.normalized_parts = () if known else None
    combine = partial(
        _combined,
        coefficients=coefficients,
        support=support,
        constant_normalizer=constant_normalizer,
    )
    return on_ladder(p, parts, combine)


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
