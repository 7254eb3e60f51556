r"""Densities known up to a constant, as Pyro distributions.

An energy :math:`E` makes the density

.. math:: p(x) = \frac{h(x)\, e^{-E(x)}}{Z}, \qquad Z = \int h(x)\, e^{-E(x)}\, dx,

with :math:`h` a normalized *base* distribution, or 1. Low energy is likely: a text that writes
:math:`p = e^{f} / Z` has :math:`f = -E`. The constant :math:`\log Z` is in one of three states:

* *unknown*: ``log_prob`` is then only defined up to a constant. Comparing points,
  sampling, scores and latent or factor sites need no more.
* *known*: from a closed form, an enumeration, or an estimate. The density is normalized.
* *learned*: a parameter under training. It means something after noise-contrastive estimation
  and nothing before.
"""

from collections.abc import Callable
from functools import partial

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_ebm.distributions.checks.arguments import checked_coefficient, checked_shape
from pyro_ebm.distributions.core.linear import LinearEnergy, Term
from pyro_ebm.distributions.core.noise_levels import NoiseLevels, on_ladder
from pyro_ebm.distributions.core.sampler import (
    ChainDiagnostics,
    ChainKernel,
    registered_sampler,
    wants_only_starting_points,
)
from pyro_ebm.distributions.core.supports import same_support, support_of, uniform_start
from pyro_ebm.distributions.core.wrappers import layers, walk
from pyro_ebm.ops.arguments import check_count


class UnnormalizedEnergy(NoiseLevels):
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
            support is discrete (:class:`~pyro_ebm.mcmc.IntegerWalk` where that has no bounds).
        num_steps: transitions that :meth:`sample` makes, half of them adapting the kernel.
        constant_normalizer: True says that :math:`Z` does not depend on any latent although the
            energy does, as in a location family :math:`E(x - \mu)`, or for an energy that is
            minus the log of a density. Nothing can check it.
        learned_normalizer: whether ``log_normalizer`` is learned, where that is not to be guessed:
            a tensor computed from parameters.
        validate_args: whether ``log_prob`` refuses points outside the support; by default as Pyro
            is set.

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

    **A distribution of your own** is a subclass that overrides ``_energy``, the energy of
    points ``(*sample, *batch, *event)`` as a tensor ``(*sample, *batch)``, and hands the shapes and
    the support to this class, with ``None`` for the energy. Parameters are attributes, with the
    batch in front; ``self.like`` is a tensor of their dtype and device. Everything else comes with
    it; override what there is a better way for:

    * ``sample(sample_shape)``: exact draws ``(*sample_shape, *batch_shape, *event_shape)``;
    * ``starting_points(sample_shape)``: where chains start, of the same shape;
    * ``gibbs_noise`` and ``gibbs_sweep``, with ``supports_tempering``: draws of some variables
      given the others, see :class:`~pyro_ebm.distributions.BlockGibbs`;
    * ``tempered(beta)``: the density at another temperature, where it is one of the same class.

    Where :math:`\log Z` is known, give it as ``log_normalizer``. If it is computed from the
    parameters, ``normalized_parts = ()`` says so: then parameters and latents may move the density.

        >>> import math
        >>> class Quartic(UnnormalizedEnergy):  # p(x) = exp(-sum_i (x_i / s_i)^4) / Z
        ...     normalized_parts = ()  # log Z is a function of s
        ...
        ...     def __init__(self, scale, **kwargs):  # s > 0, shape (*batch, n)
        ...         self.scale = scale
        ...         log_z = (scale.log() + math.log(2.0) + math.lgamma(1.25)).sum(-1)
        ...         event, batch = scale.shape[-1:], scale.shape[:-1]
        ...         super().__init__(
        ...             None, event, batch_shape=batch, log_normalizer=log_z, **kwargs
        ...         )
        ...
        ...     def _energy(self, x):  # (*sample, *batch, n) -> (*sample, *batch)
        ...         return (x / self.scale).pow(4).sum(-1)
        ...
        ...     def sample(self, sample_shape=()):  # (x / s)^4 is Gamma(1/4, 1), the sign a coin
        ...         shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        ...         size = dist.Gamma(self.like.new_tensor(0.25), 1.0).sample(shape).pow(0.25)
        ...         return self.scale.detach() * size * (2 * torch.rand_like(size).round() - 1)
        >>> p = Quartic(torch.tensor([1.0, 2.0]))
        >>> p
        Quartic(event_shape=(2,), log_normalizer=known)
        >>> p.log_prob(torch.ones(3, 2)).shape, p.expand((5,)).to_event(1).sample().shape
        (torch.Size([3]), torch.Size([5, 2]))
        >>> with pyro.plate("rows", 3):  # a site, whose log density is normalized
        ...     x = pyro.sample("x", p)
    """

    starts: "UnnormalizedEnergy | None" = None
    """The density in whose starting points chains start where there is no base."""

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor] | None,
        event_shape: torch.Size | tuple[int, ...] | None = None,
        support: constraints.Constraint | None = None,
        batch_shape: torch.Size | tuple[int, ...] | None = None,
        base: TorchDistribution | None = None,
        log_normalizer: Tensor | float | None = None,
        kernel: ChainKernel | None = None,
        num_steps: int = 100,
        constant_normalizer: bool = False,
        learned_normalizer: bool | None = None,
        validate_args: bool | None = None,
    ):
        self.kernel = kernel
        self.num_steps = check_count("num_steps", num_steps)
        super().__init__(
            energy=energy,
            event_shape=event_shape,
            support=support,
            batch_shape=batch_shape,
            base=base,
            log_normalizer=log_normalizer,
            constant_normalizer=constant_normalizer,
            learned_normalizer=learned_normalizer,
            validate_args=validate_args,
        )

    @property
    def terms(self) -> tuple[Term, ...]:
        r"""The energy as a sum :math:`\sum_i c_i f_i`, of one term where it is none."""
        energy = self._energy
        return energy.terms if isinstance(energy, LinearEnergy) else ((1.0, self.energy),)

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
        beta = checked_coefficient("beta", beta, self.batch_shape, zero=self.base is not None)
        if not isinstance(beta, Tensor) and beta == 1:
            return self
        # only of a number: a tensor that happens to be 0 or 1 may be computed from a latent
        zero = not isinstance(beta, Tensor) and beta == 0
        base = self.base
        is_base = zero and base is not None and same_support(self.support, support_of(base))
        terms = [] if zero else [(beta * c, f) for c, f in self.terms]
        starts = self if self.has_starts else None
        new = UnnormalizedEnergy(
            LinearEnergy(terms, self.event_dim),
            self.event_shape,
            self.support,
            self.batch_shape,
            base,
            log_normalizer=0.0 if is_base else None,
            kernel=self.kernel,
            num_steps=self.num_steps,
        )
        new.starts, new.normalized_parts = starts, () if is_base else None
        return on_ladder(new, [self], partial(_tempered, beta))

    # -- draws -------------------------------------------------------------------------------

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        r"""*Approximate* draws: the last states of many short chains.

        Each of the ``sample_shape`` x ``batch_shape`` points is the end of a chain of its own,
        ``num_steps`` transitions of ``kernel`` from a draw of ``base`` (else from Pyro's uniform
        start on the unconstrained space). All chains run at once. The first half of the steps
        adapts the kernel. Chains of a noise-conditional energy come down its noise levels first
        (:func:`~pyro_ebm.mcmc.annealed_langevin`). Draws follow the density only if the chains have
        converged, and chains do not cross between far modes: check with
        :meth:`sample_with_diagnostics`, and raise ``num_steps`` or give a ``base`` that covers the
        modes.

        Args:
            sample_shape: how many points.

        Returns:
            Points, shape ``(*sample_shape, *batch_shape, *event_shape)``, detached.

        Warns:
            ConvergenceWarning: of chains that ran off, as for an energy of the wrong sign, and of
                four or more that disagree widely (R-hat above 10), as in modes far apart. A smaller
                R-hat is in :meth:`sample_with_diagnostics` alone.
        """
        if wants_only_starting_points():
            return self.starting_points(sample_shape)
        return self._run(sample_shape, diagnose=False)[0]

    def sample_with_diagnostics(
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
    ) -> tuple[Tensor, ChainDiagnostics]:
        r"""Draws as :meth:`sample` makes them, with the evidence for and against them.

        Args:
            sample_shape: how many points; diagnostics between chains want more than one.

        Returns:
            The draws, which are the last states of the chains, and
            :class:`~pyro_ebm.mcmc.ChainDiagnostics` of the second halves of their histories:
            R-hat, effective sample size (of the histories, so that it may exceed the number of
            draws), acceptance rate, step size, divergences.

        Example:
            >>> p = UnnormalizedEnergy(lambda x: x**2 / 2)
            >>> x, diagnostics = p.sample_with_diagnostics((500,))
            >>> bool(diagnostics.r_hat < 1.1)
            True
        """
        return self._run(sample_shape, diagnose=True)

    def _run(
        self, sample_shape: torch.Size | tuple[int, ...], diagnose: bool
    ) -> tuple[Tensor, ChainDiagnostics]:
        shape = checked_shape("sample_shape", sample_shape)
        return registered_sampler()(self, shape, diagnose=diagnose)

    def starting_points(
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
    ) -> Tensor:
        """Where chains start: draws of the base, else uniform on (-2, 2) before the constraint.

        Where a draw of the base lies outside the support, the point is a uniform one.

        Args:
            sample_shape: how many points.

        Returns:
            Points of the support, shape ``(*sample_shape, *batch_shape, *event_shape)``.
        """
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        with torch.no_grad():
            if self.base is not None:
                x = self.base.sample(torch.Size(sample_shape))
            elif self.starts is not None:
                x = self.starts.expand(self.batch_shape).starting_points(sample_shape)
            else:
                return uniform_start(self.support, shape, self.like)
            if not x.numel():  # torch's checks choke on none at all
                return x
            inside = self.support.check(x)
            if inside.all():
                return x
            # the base is wider than the support
            inside = inside.reshape(inside.shape + (1,) * self.event_dim)
            return torch.where(inside, x, uniform_start(self.support, shape, x))

    @property
    def has_starts(self) -> bool:
        """Whether chains start elsewhere than at draws of the base or uniform points."""
        own = type(self).starting_points is not UnnormalizedEnergy.starting_points
        return own or self.starts is not None

    def __repr__(self) -> str:
        parts = [f"energy={self.energy_name}"] if "_energy" in vars(self) else []
        if self.batch_shape:
            parts.append(f"batch_shape={tuple(self.batch_shape)}")
        parts.append(f"event_shape={tuple(self.event_shape)}")
        if self.base is not None:
            parts.append(f"base={type(self.base).__name__}")
        if self.sigmas:
            ends = f"{self.sigmas[0]:.3g} to {self.sigmas[-1]:.3g}"
            parts.append(f"sigmas={ends} ({len(self.sigmas)} levels)")
        parts.append(f"log_normalizer={self.normalizer_state}")
        return f"{type(self).__name__}({', '.join(parts)})"


def find_energy(fn: object) -> UnnormalizedEnergy | None:
    """The energy inside a distribution wrapped by ``to_event``, ``mask``, ``expand``, transforms.

    Example:
        >>> p = UnnormalizedEnergy(torch.square).expand([3]).to_event(1).mask(True)
        >>> find_energy(p)
        UnnormalizedEnergy(energy=square, batch_shape=(3,), event_shape=(), log_normalizer=unknown)
        >>> find_energy(dist.Normal(0, 1)) is None
        True
    """
    return next((p for p in layers(fn) if isinstance(p, UnnormalizedEnergy)), None)


def _tempered(beta: Tensor | float, parts: list[UnnormalizedEnergy]) -> UnnormalizedEnergy:
    return parts[0].tempered(beta)


def energies_of(fn: object) -> list[UnnormalizedEnergy]:
    """The energies that a distribution is made of: wrapped, or the components of a mixture.

    Example:
        >>> p = UnnormalizedEnergy(torch.square).expand([3]).to_event(1)
        >>> [energy.is_normalized for energy in energies_of(p)]
        [False]
    """
    return [p for p in walk(fn) if isinstance(p, UnnormalizedEnergy)]
