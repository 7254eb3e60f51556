r"""Densities known up to a constant, as Pyro distributions.

An energy :math:`E` makes the density

.. math:: p(x) = \frac{h(x)\, e^{-E(x)}}{Z}, \qquad Z = \int h(x)\, e^{-E(x)}\, dx,

with :math:`h` a normalized *base* distribution, or 1. Low energy is likely: a text that writes
:math:`p = e^{f} / Z` has :math:`f = -E`. The constant :math:`\log Z` is in one of three states:

* *unknown*: nobody told. ``log_prob`` is then only defined up to a constant. Comparing points,
  sampling, scores and latent or factor sites need no more.
* *known*: from a closed form, an enumeration, or an estimate. The density is normalized.
* *learned*: a parameter under training. It means something after noise-contrastive estimation
  and nothing before.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.arguments import (
    check_bijection,
    checked_normalizer,
    checked_shape,
    expanded_base,
    expands,
    fixed_weights,
    lift_support,
    normalizers_minded,
    refuse_missing_constant,
)
from pyro_ebm.distributions.checks.energy_calls import NARROW, EnergyCallError, explain
from pyro_ebm.distributions.core.introspection import first_tensor, modules, readable, uniform_start
from pyro_ebm.ops.arguments import check_count, check_number, check_tensor, shown
from pyro_ebm.ops.score import score

if TYPE_CHECKING:
    from pyro_ebm.mcmc.kernels.base import Kernel
    from pyro_ebm.mcmc.short_run import ChainDiagnostics
    from pyro_ebm.normalizer.estimate_result import NormalizerEstimate

_only_starts: ContextVar[bool] = ContextVar("_only_starts", default=False)


@contextlib.contextmanager
def starting_points_only() -> Iterator[None]:
    """Within this context ``UnnormalizedEnergy.sample`` returns where its chains would start.

    Prototype traces need a value of the right shape in the support, not a draw.
    """
    token = _only_starts.set(True)
    try:
        yield
    finally:
        _only_starts.reset(token)


class UnnormalizedEnergy(TorchDistribution):
    r"""The density :math:`p(x) = h(x)\, e^{-E(x)} / Z` of an energy, with :math:`Z` unknown.

    Use it like any Pyro distribution: as a latent site, an observed site, or a factor on other
    latents (``obs=`` a tensor computed from them).

    Elements that interact belong in ``event_shape``: the elements of a plate or batch are
    independent, each with a :math:`Z` of its own.

    Args:
        energy: :math:`E`, a callable ``(*sample, *batch, *event) -> (*sample, *batch)``: a
            function, an ``nn.Module`` (registered by ``pyro.module`` if it is to be trained), or a
            ``PyroModule``.
        event_shape: shape of one point; the base's by default, else ``()``.
        support: where the density lives; the base's by default, else the reals. An elementwise
            constraint holds for each element of the event.
        batch_shape: shape of the batch of a conditional energy; the base's by default, else
            ``()``.
        base: :math:`h`, a normalized distribution: the model is then a *tilt* of it, and proper
            wherever :math:`E` is bounded below. Without one :math:`h = 1`, and that
            :math:`\int e^{-E}` is finite is for the user to see to.
        log_normalizer: :math:`\log Z` where it is known, broadcastable to ``batch_shape``. A leaf
            parameter (``nn.Parameter``, the value of ``pyro.param``) counts as *learned*,
            everything else as *known*; see ``learned_normalizer``. Where a latent or a parameter
            moves the energy, give :math:`\log Z` as a function of it: a constant is refused there,
            unless ``constant_normalizer`` says that :math:`Z` is one.
        kernel: the kernel of :meth:`sample`, without a model; by default
            :class:`~pyro_ebm.mcmc.ChEESKernel`, or :class:`~pyro_ebm.mcmc.GibbsKernel` where the
            support is discrete.
        num_steps: transitions that :meth:`sample` makes, half of them adapting the kernel.
        constant_normalizer: the user's word that :math:`Z` does not depend on any latent although
            the energy does, as in a location family :math:`E(x - \mu)`, or for an energy that is
            minus the log of a density.
        learned_normalizer: overrides the guess whether ``log_normalizer`` is learned, as for a
            tensor computed from parameters.
        validate_args: as in every distribution.

    Raises:
        ValueError: for a support whose event dimensions exceed the event's, a base of another
            shape, a normalizer of another shape or not finite, or (when called) an energy of the
            wrong shape.

    Reference:
        LeCun et al. (2006), A tutorial on energy-based learning.

    Example:
        >>> def double_well(x):  # (*batch, 2) -> (*batch)
        ...     return x[..., 0] ** 4 - 6 * x[..., 0] ** 2 + x[..., 1] ** 2 / 2
        >>> p = UnnormalizedEnergy(double_well, event_shape=(2,))
        >>> p
        UnnormalizedEnergy(energy=double_well, event_shape=(2,), log_normalizer=unknown)
        >>> x, y = torch.tensor([1.7, 0.0]), torch.tensor([0.0, 0.0])
        >>> p.log_density_ratio(x, y)  # how much likelier is x than y? No Z needed.
        tensor(8.9879)
        >>> p.sample((1000,)).shape
        torch.Size([1000, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor] | None,
        event_shape: torch.Size | tuple[int, ...] | None = None,
        support: constraints.Constraint | None = None,
        batch_shape: torch.Size | tuple[int, ...] | None = None,
        base: TorchDistribution | None = None,
        log_normalizer: Tensor | float | None = None,
        kernel: "Kernel | None" = None,
        num_steps: int = 100,
        constant_normalizer: bool = False,
        learned_normalizer: bool | None = None,
        validate_args: bool | None = None,
    ):
        if energy is not None:
            self._energy = energy
        if isinstance(energy, Distribution):
            raise ValueError(
                f"energy must be a function, got the distribution {type(energy).__name__}: its"
                " energy is lambda x: -p.log_prob(x), or give it as base= beside an energy"
            )
        if not callable(getattr(self, "_energy", None)) or isinstance(energy, type):
            raise ValueError(f"energy must be callable, got {shown(energy)}")
        num_steps = check_count("num_steps", num_steps)
        if base is not None and not isinstance(base, Distribution):
            raise ValueError(f"base must be a distribution, got {shown(base)}")
        if event_shape is None:
            event_shape = () if base is None else base.event_shape
        if batch_shape is None:
            batch_shape = () if base is None else base.batch_shape
        event_shape = checked_shape("event_shape", event_shape)
        batch_shape = checked_shape("batch_shape", batch_shape)
        if base is not None:
            base = expanded_base(base, batch_shape, event_shape)
            if (inner := find_energy(base)) is not None and not inner.is_normalized:
                raise ValueError(
                    f"base must be normalized, but the log Z of {inner!r} is"
                    f" {inner.normalizer_state}: add its energy to this one instead"
                )
        if support is None:
            support = constraints.real if base is None else base.support
        support = cast(constraints.Constraint, support)

        self._support = lift_support(support, event_shape)
        self.base = base
        self.kernel = kernel
        self.num_steps = num_steps
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
            like = self._like()
            log_normalizer = torch.tensor(
                float(log_normalizer), dtype=like.dtype, device=like.device
            )
        self._log_normalizer = checked_normalizer(log_normalizer, batch_shape)
        self._learned_normalizer = learned_normalizer
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if not self.support.is_discrete:
            check_bijection(self.support, event_shape)

    # -- the density -------------------------------------------------------------------------

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where the density lives."""
        return self._support

    def energy(self, x: Tensor) -> Tensor:
        r"""The energy :math:`E(x)`.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.

        Returns:
            Energies, shape ``(*sample, *batch)``.

        Raises:
            ValueError: if the energy function returns another shape, or does not take points of
                this shape, dtype or device.
        """
        x = self._broadcast(x)
        if x.dtype in NARROW and not self._support.is_discrete:
            raise EnergyCallError(
                f"the points of the energy {_name_of(self._energy)} are of {x.dtype}, in which"
                " arithmetic overflows: use x.float()"
            )
        with fixed_weights(self.modules):
            try:
                value = self._energy(x)
            except Exception as error:
                name, like = _name_of(self._energy), self._like()
                explain(error, self._energy, name, x, self.event_shape, like)
                raise
        want = x.shape[: x.dim() - self.event_dim]
        got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if got == want and (value.is_complex() or value.dtype == torch.bool):
            raise ValueError(
                f"the energy {self.energy_name} must be a real number at each point, got"
                f" {value.dtype}"
            )
        if got != want:
            raise ValueError(
                f"the energy {self.energy_name} must map points of shape {tuple(x.shape)}"
                f" with event_shape={tuple(self.event_shape)} to a tensor of shape {tuple(want)},"
                f" got {got}: sum over the event dimensions, squeeze a last one, or give"
                " batch_shape= to a conditional energy"
            )
        return value

    @property
    def energy_name(self) -> str:
        """What the energy function is called: its name, or the class of a module."""
        return _name_of(self._energy)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that the energy holds, as far as they can be found: looked for once."""
        if self._modules is None:
            self._modules = modules(self._energy)
        return self._modules

    def unnormalized_log_prob(self, x: Tensor) -> Tensor:
        r""":math:`\log h(x) - E(x)`: the log density without its constant.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch)``.
        """
        value = -self.energy(x)
        return value if self.base is None else self.base.log_prob(x) + value

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
        if self.constant_normalizer:  # the word holds for all that the density is made of
            with normalizers_minded():
                return self._log_prob(value)
        log_prob = self._log_prob(value)
        refuse_missing_constant(self, self.lags, value, log_prob)
        return log_prob

    def _log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.unnormalized_log_prob(value)
        return log_prob if self._log_normalizer is None else log_prob - self._log_normalizer

    def score(self, x: Tensor) -> Tensor:
        r"""The score :math:`\nabla_x \log p(x) = \nabla_x \log h(x) - \nabla_x E(x)`.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.

        Returns:
            The shape of ``x`` (broadcast against the batch).
        """
        return score(self.unnormalized_log_prob, self._broadcast(x))

    def log_density_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        r"""The exact :math:`\log p(x) - \log p(y)`: the constant cancels.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.
            y: points, of a shape that broadcasts with ``x``.

        Returns:
            Shape ``(*sample, *batch)``.
        """
        return self.unnormalized_log_prob(x) - self.unnormalized_log_prob(y)

    # -- the constant ------------------------------------------------------------------------

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
        return (*(self._normalized_parts or ()), *(() if self.base is None else (self.base,)))

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
        if self._normalized_parts is None:
            stays = log_z is None or not log_z.requires_grad or not self.is_normalized
            if stays and self._log_prob(x).requires_grad:
                return True
        # of other distributions, the log_prob speaks for itself
        return any(p.lags(x) for p in self.rests_on if isinstance(p, UnnormalizedEnergy))

    def normalized(
        self, log_normalizer: "Tensor | float | NormalizerEstimate"
    ) -> "UnnormalizedEnergy":
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
        like = self._like()
        log_z: Any = getattr(log_normalizer, "value", log_normalizer)
        if not isinstance(log_z, Tensor):
            check_number("log_normalizer", log_z)
        value = torch.as_tensor(log_z, dtype=like.dtype, device=like.device)
        if readable(value) and not value.isfinite().all():
            raise ValueError(f"log_normalizer must be finite, got {log_normalizer}")
        new._log_normalizer = checked_normalizer(value, self.batch_shape)
        new._learned_normalizer, new._normalized_parts = False, None
        if estimated := log_z is not log_normalizer or getattr(log_z, "is_estimate", False):
            new._log_normalizer = _estimate(value)
        if self._unexpanded is not None:
            # a log Z for each row belongs to the expanded energy alone
            one = value.reshape(()) if value.numel() == 1 else None
            one = _estimate(one) if estimated and one is not None else one
            new._unexpanded = None if one is None else self._unexpanded.normalized(one)
        return new

    def tempered(self, beta: Tensor | float) -> "UnnormalizedEnergy":
        r"""This density at the inverse temperature :math:`\beta`, which multiplies its *energy*.

        .. math:: p_\beta(x) \propto h(x)\, e^{-\beta E(x)}

        Without a base this is :math:`p^\beta` up to its constant; with one it is the path from the
        base (:math:`\beta = 0`) to the density (:math:`\beta = 1`). :math:`\log Z` is known at the
        numbers 0, if the base has this support, and 1, if it is known here.

        Args:
            beta: a positive number or tensor, broadcastable to ``batch_shape``; 0 needs a base.

        Raises:
            ValueError: if it is negative, infinite, 0 without a base, or of another shape.

        Example:
            >>> cold = UnnormalizedEnergy(lambda x: x**2 / 2).tempered(4.0)
            >>> cold.log_prob(torch.tensor(1.0))
            tensor(-2.)
        """
        from pyro_ebm.distributions.product import tempered  # which combines energies

        return tempered(self, beta)

    # -- draws -------------------------------------------------------------------------------

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        r"""*Approximate* draws: the last states of many short chains.

        Each of the ``sample_shape`` x ``batch_shape`` points is the end of a chain of its own,
        ``num_steps`` transitions of ``kernel`` from a draw of ``base`` (else from Pyro's uniform
        start on the unconstrained space). All chains run at once. The first half of the steps
        adapts the kernel. Draws follow the density only if the chains have converged, and chains
        do not cross between far modes: check with :meth:`sample_with_diagnostics`, and raise
        ``num_steps`` or give a ``base`` that covers the modes.

        Args:
            sample_shape: how many points.

        Returns:
            Points, shape ``(*sample_shape, *batch_shape, *event_shape)``, detached.
        """
        if _only_starts.get():
            return self.starting_points(sample_shape)
        return self._run(sample_shape, diagnose=False)[0]

    def sample_with_diagnostics(
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
    ) -> "tuple[Tensor, ChainDiagnostics]":
        r"""Draws as :meth:`sample` makes them, with the evidence for and against them.

        Args:
            sample_shape: how many points; diagnostics between chains want more than one.

        Returns:
            The draws, and :class:`~pyro_ebm.mcmc.ChainDiagnostics` of the second half of the
            chains: R-hat, effective sample size, acceptance rate, step size, divergences.

        Example:
            >>> p = UnnormalizedEnergy(lambda x: x**2 / 2)
            >>> x, diagnostics = p.sample_with_diagnostics((500,))
            >>> bool(diagnostics.r_hat < 1.1)
            True
        """
        return self._run(sample_shape, diagnose=True)

    def _run(self, sample_shape: Any, diagnose: bool) -> "tuple[Tensor, ChainDiagnostics]":
        from pyro_ebm.mcmc.short_run import short_run  # the one arrow back

        return short_run(self, checked_shape("sample_shape", sample_shape), diagnose=diagnose)

    def starting_points(
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
    ) -> Tensor:
        """Where chains start: draws of the base, else uniform on (-2, 2) before the constraint.

        A draw of the base outside the support gives way to a uniform one.

        Args:
            sample_shape: how many points.

        Returns:
            Points of the support, shape ``(*sample_shape, *batch_shape, *event_shape)``.
        """
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        with torch.no_grad():
            if self.base is None:
                return uniform_start(self.support, shape, self._like())
            x = self.base.sample(torch.Size(sample_shape))
            inside = self.support.check(x)
            if inside.all():
                return x
            # the base is wider than the support: elsewhere start as without a base
            inside = inside.reshape(inside.shape + (1,) * self.event_dim)
            return torch.where(inside, x, uniform_start(self.support, shape, x))

    def _like(self) -> Tensor:
        """A tensor of the dtype and device of the energy, as far as its sources tell."""
        like = first_tensor(
            self._energy, self.base, self._support, self.__dict__.get("_log_normalizer")
        )
        return torch.empty(()) if like is None else like.detach()

    # -- Pyro's plumbing ---------------------------------------------------------------------

    def expand(
        self, batch_shape: torch.Size | tuple[int, ...], _instance: Any = None
    ) -> "UnnormalizedEnergy":
        """A copy with a larger batch: the elements are independent and share the energy."""
        new: Any = copy.copy(self) if _instance is None else _instance
        if _instance is not None:
            vars(new).update(vars(self))
        new._unexpanded = self.unexpanded
        new._batch_shape = torch.Size(batch_shape)
        if not expands(self.batch_shape, new._batch_shape):
            raise ValueError(
                f"batch_shape={tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}"
            )
        new.base = None if self.base is None else self.base.expand(batch_shape)
        return new

    @property
    def unexpanded(self) -> "UnnormalizedEnergy":
        """The energy as it was written, before plates or ``expand`` made its batch larger."""
        return self if self._unexpanded is None else self._unexpanded

    _unexpanded: "UnnormalizedEnergy | None" = None
    _modules: tuple[nn.Module, ...] | None = None
    _normalized_parts: tuple[Distribution, ...] | None = None
    """If log Z follows from the parts' being normalized, or from a formula: these parts.

    Else it is a value of its own, which must follow where the energy moves.
    """

    def __repr__(self) -> str:
        parts = [f"energy={self.energy_name}"]
        if self.batch_shape:
            parts.append(f"batch_shape={tuple(self.batch_shape)}")
        parts.append(f"event_shape={tuple(self.event_shape)}")
        if self.base is not None:
            parts.append(f"base={type(self.base).__name__}")
        parts.append(f"log_normalizer={self.normalizer_state}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _broadcast(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        batch = x.shape[: x.dim() - self.event_dim]
        if x.shape[len(batch) :] != self.event_shape:
            raise ValueError(
                f"points of {type(self).__name__} must end in event_shape="
                f"{tuple(self.event_shape)}, got shape {tuple(x.shape)}"
            )
        if not self.batch_shape or batch[-len(self.batch_shape) :] == self.batch_shape:
            return x
        try:
            shape = torch.broadcast_shapes(batch, self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"points of shape {tuple(x.shape)} do not broadcast with batch_shape="
                f"{tuple(self.batch_shape)} of {self!r}"
            ) from error
        return x if shape == batch else x.expand(shape + self.event_shape)


def _estimate(log_z: Tensor) -> Tensor:
    """A log Z that says that it is an estimate, wherever it goes, into another density or a file.

    So do the values of ``pyro.param`` say what they are.
    """
    log_z = log_z.clone()
    vars(log_z)["is_estimate"] = True
    return log_z


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", None)
    return type(function).__name__ if name is None else name.replace("<lambda>", "lambda")


def find_energy(fn: Any) -> UnnormalizedEnergy | None:
    """The energy inside a distribution wrapped by ``to_event``, ``mask``, ``expand``, transforms.

    Example:
        >>> p = UnnormalizedEnergy(torch.square).expand([3]).to_event(1).mask(True)
        >>> find_energy(p)
        UnnormalizedEnergy(energy=square, batch_shape=(3,), event_shape=(), log_normalizer=unknown)
        >>> find_energy(dist.Normal(0, 1)) is None
        True
    """
    while not isinstance(fn, UnnormalizedEnergy):
        fn = getattr(fn, "base_dist", None)
        if fn is None:
            return None
    return fn


__all__ = ["UnnormalizedEnergy", "find_energy", "starting_points_only"]
