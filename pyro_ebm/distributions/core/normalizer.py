r"""What is known of the constant of a density, :math:`\log Z`: unknown, known, or learned."""

import copy
import math
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.arguments import checked_normalizer
from pyro_ebm.distributions.checks.elbo_guard import normalizers_handled, refuse_missing_constant
from pyro_ebm.distributions.core.density import EnergyDensity
from pyro_ebm.distributions.core.discrete import Enumeration, support_values_of
from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.distributions.core.wrappers import (
    VIEWS,
    composite_part,
    innermost,
    layers,
    unvalidated,
)
from pyro_ebm.ops.arguments import check_number, check_tensor
from pyro_ebm.ops.integration.enumerate import log_sum_over_states


class Estimate(Protocol):
    """An estimate of a number, such as :class:`~pyro_ebm.NormalizerEstimate`."""

    @property
    def value(self) -> Tensor:
        """The estimate itself."""
        ...


class NormalizableDensity(EnergyDensity):
    """A density of an energy with or without its constant.

    The arguments are those of :class:`~pyro_ebm.UnnormalizedEnergy`; the others, ``**kwargs``, are
    passed to :class:`~pyro_ebm.distributions.core.density.EnergyDensity`.
    """

    normalized_parts: tuple[Distribution, ...] | None = None
    """If log Z follows from other densities' being normalized, or from a formula: these densities.

    Else log Z is a value of its own, which must follow where the energy moves.
    """

    _log_normalizer: Tensor | None = None
    _learned_normalizer: bool | None = None

    def __init__(
        self,
        *,
        log_normalizer: Tensor | float | None,
        constant_normalizer: bool,
        learned_normalizer: bool | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if (part := composite_part(self.base)) is not None:
            raise ValueError(f"base is or holds {part!r}, which has no density to tilt")
        for inner in layers(self.base):
            if isinstance(inner, NormalizableDensity) and not inner.is_normalized:
                raise ValueError(
                    f"base must be normalized, but the log Z of {inner!r} is"
                    f" {inner.normalizer_state}: add its energy to this one instead"
                )
        self.constant_normalizer = constant_normalizer
        if log_normalizer is not None and not isinstance(log_normalizer, Tensor):
            if isinstance(getattr(log_normalizer, "value", None), Tensor):
                raise ValueError(
                    "log_normalizer must be a number or a tensor, got an estimate: say"
                    " p.normalized(estimate), which keeps in mind that it is one"
                )
            check_number("log_normalizer", log_normalizer)
            if not math.isfinite(float(log_normalizer)):
                raise ValueError(f"log_normalizer must be finite, got {log_normalizer}")
            # in the energy's own precision: float32 keeps 7 digits of a double
            like = self.like
            log_normalizer = torch.tensor(
                float(log_normalizer), dtype=like.dtype, device=like.device
            )
        self._log_normalizer = checked_normalizer(log_normalizer, self.batch_shape)
        self._learned_normalizer = learned_normalizer

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`\log h(x) - E(x) - \log Z`, without the last term when :math:`Z` is unknown.

        Args:
            value: points, shape ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch)``.

        Raises:
            ValueError: under ``SVI.step`` with a plain ELBO that would train the energy without
                its log Z, and in other algorithms of Pyro that can be seen
                (:mod:`pyro_ebm.distributions.checks.callers`) if a latent moves it.
        """
        check_tensor("value", value)
        if self._validate_args and value.numel():  # torch's checks choke on none at all
            self._validate_sample(value)
        if self.constant_normalizer:  # holds for all that the density is made of
            with normalizers_handled():
                return self._log_prob(value)
        log_prob = self._log_prob(value)
        refuse_missing_constant(self, self.lags, value, log_prob)
        return log_prob

    def _log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.unnormalized_log_prob(value)
        return log_prob if self._log_normalizer is None else log_prob - self._log_normalizer

    @property
    def log_normalizer(self) -> Tensor | None:
        r""":math:`\log Z`, of a shape that broadcasts to ``batch_shape``, or None if unknown."""
        return self._log_normalizer

    @property
    def normalizer_state(self) -> Literal["unknown", "learned", "known"]:
        r"""What is known of :math:`\log Z`."""
        if self._log_normalizer is None:
            return "unknown"
        learned = self._learned_normalizer
        if learned is None:
            # pyro.param marks its values, leaves or not, by the attribute `unconstrained`
            learned = isinstance(self._log_normalizer, nn.Parameter) or hasattr(
                self._log_normalizer, "unconstrained"
            )
        return "learned" if learned else "known"

    @property
    def is_normalized(self) -> bool:
        r"""Whether ``log_prob`` is the log of a density that integrates to 1."""
        return self.normalizer_state == "known"

    @property
    def is_estimated(self) -> bool:
        r"""Whether :math:`\log Z` is an estimate, which does not follow when the energy changes."""
        return getattr(self._log_normalizer, "is_estimate", False)

    @property
    def rests_on(self) -> tuple[Distribution, ...]:
        r"""The distributions without whose :math:`\log Z` that of this density is not right."""
        if not self.is_normalized:
            return ()
        return (*(self.normalized_parts or ()), *(() if self.base is None else (self.base,)))

    def lags(self, x: Tensor) -> bool:
        r"""Whether a gradient moves the density, and its :math:`\log Z` does not follow.

        Args:
            x: points without a gradient of their own, shape ``(*sample, *batch, *event)``.

        Example:
            >>> t = torch.tensor(2.0, requires_grad=True)
            >>> constant = UnnormalizedEnergy(lambda x: t * x**2 / 2, log_normalizer=0.92)
            >>> follows = UnnormalizedEnergy(lambda x: t * x**2 / 2, log_normalizer=-t.log() / 2)
            >>> constant.lags(torch.ones(())), follows.lags(torch.ones(()))
            (True, False)
        """
        if self.constant_normalizer:
            return False
        log_z = self._log_normalizer
        if self.normalized_parts is None:
            stays = log_z is None or not log_z.requires_grad or not self.is_normalized
            if stays and self._log_prob(x).requires_grad:
                return True
        # the log_prob of other distributions carries their own constant
        return any(p.lags(x) for p in self.rests_on if isinstance(p, NormalizableDensity))

    def normalized(self, log_normalizer: Tensor | float | Estimate) -> Self:
        r"""This density with its :math:`\log Z` known: from a formula, an enumeration, an estimate.

        Args:
            log_normalizer: :math:`\log Z`, a number or a tensor that broadcasts to
                ``batch_shape``, or what :func:`~pyro_ebm.estimate_log_normalizer` returns. That
                has no gradient and belongs to the energy as it was: where a latent or a parameter
                moves the energy, it counts as unknown, and is refused.

        Raises:
            ValueError: if it is not finite, or of another shape.

        Example:
            >>> p = UnnormalizedEnergy(lambda x: x**2 / 2).normalized(0.9189)
            >>> p.log_prob(torch.tensor(0.0))
            tensor(-0.9189)
        """
        new = copy.copy(self)
        like = self.like
        log_z = getattr(log_normalizer, "value", log_normalizer)
        if not isinstance(log_z, Tensor):
            check_number("log_normalizer", log_z)
        value = torch.as_tensor(log_z, dtype=like.dtype, device=like.device)
        if readable(value) and not value.isfinite().all():
            raise ValueError(f"log_normalizer must be finite, got {log_normalizer}")
        new._log_normalizer = checked_normalizer(value, self.batch_shape)
        new._learned_normalizer, new.normalized_parts = False, None
        if estimated := log_z is not log_normalizer or getattr(log_z, "is_estimate", False):
            new._log_normalizer = _estimate(value)
        if self._unexpanded is not None:
            # a log Z for each row belongs to the expanded energy alone
            one = value.reshape(()) if value.numel() == 1 else None
            one = _estimate(one) if estimated and one is not None else one
            new._unexpanded = None if one is None else self._unexpanded.normalized(one)
        return new

    def normalized_by_formula(self, log_normalizer: Tensor | float) -> Self:
        """This density with a log Z that is computed from the parameters, whatever moves them."""
        new = self.normalized(log_normalizer)
        new.normalized_parts = ()
        return new

    def exact_log_normalizer(self, max_units: int = 25) -> Tensor:
        r""":math:`\log Z` of a density on a finite support, by a sum over all states.

        .. math:: \log Z = \log \sum_x h(x)\, e^{-E(x)}

        Of restricted Boltzmann machines only one layer is enumerated, of pairwise energies the
        sites of all colours but one, and the others are summed in closed form. Differentiable in
        the parameters, in bounded memory. Given back to the distribution, as in
        ``p.normalized(p.exact_log_normalizer())``, it normalizes the density, in a model whose
        latents move it too.

        Args:
            max_units: at most :math:`2^{\text{max\_units}}` states may be enumerated: so many
                units of two values. 20 take seconds, and each further one doubles the time.

        Returns:
            A shape that broadcasts to ``batch_shape``: that of the parameters' batch.

        Raises:
            ValueError: if there are more states, or the support is no finite set.

        Example:
            >>> counts = dist.constraints.integer_interval(0, 99)
            >>> rate = torch.tensor(4.0)
            >>> p = UnnormalizedEnergy(  # p(k) = rate^k / k! / Z
            ...     lambda k: (k + 1).lgamma() - k * rate.log(), support=counts
            ... )
            >>> p.exact_log_normalizer()  # of a Poisson that ends at 99: the rate itself
            tensor(4.0000)
        """
        return log_sum_over_states(*self._enumeration(max_units), max_states=2**max_units)

    def _enumeration(self, max_units: int) -> Enumeration:
        """What is summed over which states; raises a ValueError if there are too many."""
        p = unvalidated(self.unexpanded)
        support_values = support_values_of(p.support, p.event_shape)
        if support_values is None:
            raise ValueError(
                f"an exact log Z is a sum over a finite support, and that of {self!r} is"
                f' {self.support}: use estimate_log_normalizer, by method="quadrature" in one or'
                ' two dimensions, else "ais"'
            )
        variables = p.event_shape.numel() // support_values.shape[1]
        inner = (1,) * len(p.batch_shape) + tuple(p.event_shape)
        like, h = p.like, None if p.base is None else innermost(p.base, VIEWS)
        if h is not None and h.has_enumerate_support:  # whose points may be integers
            like = like.to(h.enumerate_support(expand=False).dtype)

        def log_f(s: Tensor) -> Tensor:  # (chunk, n * b) -> (chunk, *batch)
            return p.unnormalized_log_prob(s.to(like.dtype).reshape((len(s), *inner)))

        numel = max(p.event_shape.numel() * p.batch_shape.numel(), 1)
        return Enumeration(log_f, support_values.to(like), variables, max(2**20 // numel, 64))


def _estimate(log_z: Tensor) -> Tensor:
    """A copy of a log Z marked as an estimate, wherever it goes, into another density or a file.

    The values of ``pyro.param`` are marked in the same way.
    """
    log_z = log_z.clone()
    vars(log_z)["is_estimate"] = True
    return log_z
