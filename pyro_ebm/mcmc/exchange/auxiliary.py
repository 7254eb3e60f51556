r"""Auxiliary draws: what a model's energies would have given at other values of its latents.

An observed :math:`x` with the density :math:`f(x \mid \theta) / Z(\theta)` has as its *auxiliary* a
draw :math:`y` from that density at a :math:`\theta` of the sampler's choice. The draw is made where
the energy stands in the model: by one run of the model at :math:`\theta`, for all sites and (under
``vmap``) for all chains. How it is made depends on the site:

* *exactly*, where the distribution has an ``exact_sample`` and few enough states to enumerate, or a
  finite support of few states, or of one variable, from a table of them;
* by *sweeps*, where it resamples its own blocks;
* by an inner *chain* of any kernel elsewhere. Each row of a plate has a chain of its own.

Sweeps and chains start at the data :math:`x`. They leave :math:`f(\cdot \mid \theta) / Z(\theta)`
invariant, and so come near to a draw of it, in as many steps as mixing takes. Where they do not
move, :math:`y` is :math:`x` and nothing is learned from the data: the safe side. (Chains that went
on from one draw to the next, and stood still at some far :math:`y`, would drive :math:`\theta` to
wherever that is least likely, without end.)

Other observed sites keep their data: a site that depends on :math:`x` does not see :math:`y`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.func import grad

from pyro_ebm.distributions.core.discrete import BlockGibbs
from pyro_ebm.distributions.core.supports import as_function, is_finite
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.enumerated import sample_by_table
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.kernels.base import Kernel, refuse_temperature
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.gradient.barker import BarkerKernel
from pyro_ebm.mcmc.kernels.gradient_free.metropolis import MHKernel
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.short_run import default_kernel
from pyro_ebm.mcmc.state import to_device
from pyro_ebm.ops.arguments import shown

MAX_EXACT_UNITS = 10
"""A distribution whose exact draws enumerate more than 2^10 states is swept instead."""

CUTS = (1.0, 1.0, 1.0, 0.1)
"""Factors of the step size, in turn, in inner chains of kernels not robust to long steps."""

STANDS_STILL = 0.01
"""An inner chain whose mean acceptance is below this has not moved."""


class AuxiliaryDraw(NamedTuple):
    """The auxiliary of a site, with the statistics to which its inner chain adapts."""

    y: Tensor
    """Shape ``(*rows, *event)``."""
    position: Tensor
    """The last positions of an inner chain, shape ``(rows, dim)``; empty without one."""
    accept_prob: Tensor
    """Its mean acceptance probability, shape ``(rows,)``; empty without one."""

    @property
    def still(self) -> Tensor:
        """The share of the rows whose inner chain stood still, shape ``()``; of many, one each."""
        if self.accept_prob.shape[-1] == 0:
            return self.accept_prob.new_zeros(self.accept_prob.shape[:-1])
        return (self.accept_prob < STANDS_STILL).to(self.accept_prob.dtype).mean(-1)


class Auxiliary:
    """How the auxiliary of an energy is drawn; the base draws exactly.

    Args:
        energy: the energy, at some value of the latents.

    Attributes:
        num_steps: of a chain or of sweeps; 0 of an exact draw.
    """

    num_steps = 0

    def __init__(self, energy: UnnormalizedEnergy):
        self.takes_units = "max_units" in inspect.signature(_exact(energy)).parameters

    def bind(self, energy: UnnormalizedEnergy, x: Tensor, warmup_steps: int) -> None:
        """Forgets everything learned; the next ``warmup_steps`` draws may adapt."""

    def __call__(
        self,
        energy: UnnormalizedEnergy,
        x: Tensor,
        zero: Tensor,
        num_steps: int | None = None,
        position: Tensor | None = None,
    ) -> AuxiliaryDraw:
        """A draw.

        Args:
            energy: what to draw from.
            x: the data, shape ``(*rows, *event)``.
            zero: the number 0, of each chain its own.
            num_steps: of an inner chain, instead of its own number.
            position: where an inner chain starts, instead of at the data, shape ``(rows, dim)``.
        """
        rows = x.shape[: x.dim() - energy.event_dim - len(energy.batch_shape)]
        units = {"max_units": MAX_EXACT_UNITS} if self.takes_units else {}
        y = _exact(energy)(rows, **units).to(x.dtype)
        return AuxiliaryDraw(y, x.new_empty(0, 0), x.new_empty(0))

    def __repr__(self) -> str:
        return "exact draws"


class Sweeps(Auxiliary):
    """Block Gibbs sweeps from the data.

    Args:
        num_steps: how many.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def __call__(
        self,
        energy: UnnormalizedEnergy,
        x: Tensor,
        zero: Tensor,
        num_steps: int | None = None,
        position: Tensor | None = None,
    ) -> AuxiliaryDraw:
        """A draw by sweeps from the data; arguments as for :class:`Auxiliary`."""
        assert isinstance(energy, BlockGibbs)
        for _ in range(self.num_steps):
            x = energy.gibbs_sweep(x, energy.gibbs_noise(x), None)
        return AuxiliaryDraw(x, x.new_empty(0, 0), x.new_empty(0))

    def __repr__(self) -> str:
        return f"{self.num_steps} Gibbs sweeps"


class InnerChain(Auxiliary):
    r"""An inner Markov chain from the data, one for each row.

    Its kernel is adapted while the sampler around it warms up, and never within a chain, so that
    every one of its transitions leaves the energy's density invariant. It adapts to chains that go
    on where they were, and so see more than the neighbourhood of the data; these are no
    auxiliaries. A step that suits one :math:`\theta` may be far too long at another: the kernel
    should be one that then still moves, as :class:`~pyro_ebm.BarkerKernel` and a random walk do and
    :class:`~pyro_ebm.LangevinKernel` does not. Of other kernels than those two every fourth step is
    cut to a tenth, which helps them over one order of magnitude and no further.

    Args:
        kernel: a kernel without a model.
        num_steps: how many transitions.
    """

    def __init__(self, kernel: Kernel, num_steps: int):
        # no graph of its own: all its steps are part of one batched run of the model
        self.kernel = kernel.copy(jit_compile=False) if kernel.always_graphs else kernel.copy()
        self.num_steps = num_steps
        self._forget()

    def _forget(self) -> None:
        self.adaptation: Adaptation | None = None
        self.acceptance_rate: float | None = None
        self.position: Tensor | None = None
        """Where those that it adapts to were last, shape ``(chains, rows, dim)``."""
        self._too_short: bool | None = None

    def bind(self, energy: UnnormalizedEnergy, x: Tensor, warmup_steps: int) -> None:
        """Starts the adaptation anew; the next ``warmup_steps`` draws may adapt."""
        self._forget()
        kernel = self.kernel.copy()
        kernel.learns_from_gradients = False  # draws bring positions alone
        kernel.bind(_RowsPotential(energy, x), warmup_steps)
        self.adaptation = kernel.adaptation

    def __call__(
        self,
        energy: UnnormalizedEnergy,
        x: Tensor,
        zero: Tensor,
        num_steps: int | None = None,
        position: Tensor | None = None,
    ) -> AuxiliaryDraw:
        """A draw by a chain of the adapted kernel; arguments as for :class:`Auxiliary`."""
        potential, kernel = _RowsPotential(energy, x), self.kernel.copy()
        kernel.checks_potential = False  # once for each draw, and within vmap
        kernel.bind(potential, warmup_steps=0)
        if self.adaptation is not None:
            kernel.adaptation.step_size = self.adaptation.step_size.clone()
            kernel.adaptation.inverse_mass_sqrt = self.adaptation.inverse_mass_sqrt
        step_size = kernel.adaptation.step_size
        cuts = kernel.adapt_step_size and not isinstance(kernel, BarkerKernel | MHKernel)
        z = potential.to_position(x) if position is None else position
        # masked rows are NaN, and data may lie on the boundary: they start at 0
        state = kernel.init(torch.where(z.isfinite(), z, 0.0) + zero)
        num_steps = self.num_steps if num_steps is None else num_steps
        accept = torch.zeros_like(state.potential)
        for i in range(num_steps):
            if cuts:
                kernel.adaptation.step_size = step_size * CUTS[i % len(CUTS)]
            state, info = kernel.step(state)
            accept = accept + info.accept_prob / num_steps
        y = potential.to_points(state.z).reshape(x.shape)
        return AuxiliaryDraw(y, state.z, accept)

    @property
    def is_adapting(self) -> bool:
        """Whether draws still adapt it."""
        return self.adaptation is not None and self.adaptation.active

    def learn(self, draw: AuxiliaryDraw) -> bool:
        """Adapts to a draw of all chains; returns whether the step size must be found again."""
        assert self.adaptation is not None
        self.position = draw.position
        renewed = self.adaptation.update(draw.position.flatten(0, 1), draw.accept_prob.flatten())
        return renewed and self.adaptation.adapt_step_size

    def state_dict(self) -> Saved:
        """What was learned so far, for :meth:`load_state_dict`."""
        return {
            "adaptation": None if self.adaptation is None else self.adaptation.state_dict(),
            "acceptance_rate": self.acceptance_rate,
            "position": self.position,
            "too_short": self._too_short,
        }

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another inner chain was, after :meth:`bind`."""
        assert self.adaptation is not None
        self.adaptation.load_state_dict(state["adaptation"])
        self.acceptance_rate, self._too_short = state["acceptance_rate"], state["too_short"]
        self.position = to_device(state["position"], self.adaptation.step_size.device)

    def search(self, draw: AuxiliaryDraw) -> bool:
        """Doubles or halves the step size after a draw of one step; returns whether to go on."""
        adaptation = self.adaptation
        assert adaptation is not None
        rate = adaptation.ranks.mean(draw.accept_prob.flatten())
        too_short = float(rate) > adaptation.target_accept_prob
        if not adaptation.adapt_step_size or self._too_short not in (None, too_short):
            self._too_short = None
            return False
        adaptation.restart(adaptation.step_size * (2.0 if too_short else 0.5))
        self._too_short = too_short
        return True

    def __repr__(self) -> str:
        rate = "" if self.acceptance_rate is None else f", acceptance {self.acceptance_rate:.2f}"
        return f"{self.num_steps} steps of {self.kernel!r}{rate}"


class _RowsPotential(EnergyPotential):
    """The rows of an energy as chains that share what they adapt, differentiable under ``vmap``."""

    def __init__(self, energy: UnnormalizedEnergy, x: Tensor):
        super().__init__(energy, like=x, targets=1)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(rows,)`` and its gradient ``(rows, dim)``."""

        def total(z: Tensor) -> tuple[Tensor, Tensor]:
            value = self(z)
            return value.sum(), value

        gradient, value = grad(total, has_aux=True)(z)
        return value, gradient


def auxiliary_of(
    energy: UnnormalizedEnergy, num_steps: int | None = None, kernel: Kernel | None = None
) -> Auxiliary:
    """The way in which the auxiliary of an energy is drawn.

    A chain is by default one of Gibbs sweeps where the energy is discrete (of a walk on whole
    numbers where these have no bounds), else of Barker steps:
    the longest step that suits one value of the latents moves on at others, where one of Langevin
    would stand still.

    Args:
        energy: the energy, at some value of the latents.
        num_steps: of a chain or of sweeps; the energy's own number by default.
        kernel: of a chain, whatever else the energy could do; its own by default, if it was given
            one.

    Raises:
        ValueError: for a kernel at another temperature than 1, or made of others.

    Example:
        >>> from pyro_ebm.distributions import RBM
        >>> auxiliary_of(UnnormalizedEnergy(torch.square), num_steps=50)
        50 steps of BarkerKernel()
        >>> auxiliary_of(UnnormalizedEnergy(torch.square, support=dist.constraints.boolean))
        exact draws
        >>> small, large = (RBM(torch.zeros(n, n), torch.zeros(n), torch.zeros(n)) for n in (5, 50))
        >>> auxiliary_of(small), auxiliary_of(large)
        (exact draws, 100 Gibbs sweeps)
    """
    num_steps = energy.num_steps if num_steps is None else num_steps
    kernel = cast("Kernel | None", energy.kernel) if kernel is None else kernel
    if kernel is not None:
        check_inner_kernel("the kernel of an auxiliary", kernel)
    if kernel is None and _draws_exactly(energy):
        return Auxiliary(energy)
    if isinstance(energy, BlockGibbs) and (kernel is None or isinstance(kernel, GibbsKernel)):
        return Sweeps(num_steps)
    if kernel is None:
        kernel = default_kernel(energy) if energy.support.is_discrete else BarkerKernel()
    return InnerChain(kernel, num_steps)


def check_inner_kernel(name: str, kernel: object) -> None:
    """Raises a ValueError for a kernel that cannot draw auxiliaries.

    Args:
        name: what to call it.
        kernel: the kernel.

    Example:
        >>> from pyro_ebm import LangevinKernel
        >>> check_inner_kernel("inner_kernel", LangevinKernel(temperature=2.0))
        Traceback (most recent call last):
        ValueError: LangevinKernel has temperature=2.0, but inner_kernel is to draw ...
    """
    such = "such as LangevinKernel() or BarkerKernel()"
    plain = f"{name} must be one plain kernel, {such}, got {shown(kernel)}"
    if not isinstance(kernel, Kernel):
        raise ValueError(f"{plain}, which is no kernel of pyro_ebm")
    if kernel.parts or kernel.samples_intractable:
        raise ValueError(plain)
    refuse_temperature(kernel, f"{name} is to draw from the energy itself")


def _draws_exactly(energy: UnnormalizedEnergy) -> bool:
    if not hasattr(energy, "exact_sample") and not is_finite(energy.support, energy.event_shape):
        return False
    auxiliary = Auxiliary(energy)
    try:
        auxiliary(energy, energy.starting_points(), torch.zeros(()))
    except ValueError:  # too many states
        return False
    return True


def _exact(energy: UnnormalizedEnergy) -> Callable[..., Tensor]:
    """Draws of shape ``(*sample_shape, *batch_shape, *event_shape)``, independent.

    The function may take ``max_units``, the size that an enumeration may have, and raise a
    ValueError.
    """
    return getattr(energy, "exact_sample", partial(sample_by_table, energy))


def draw_inside(
    fn: Any, x: Tensor, draw: Callable[[UnnormalizedEnergy, Tensor], AuxiliaryDraw]
) -> AuxiliaryDraw:
    """Draws from the energy inside a distribution: wrapped, or seen through bijections.

    Args:
        fn: the distribution.
        x: a point of it.
        draw: maps the energy, and where the point lies in its support, to a draw.
    """
    if isinstance(fn, UnnormalizedEnergy):
        return draw(fn, x)
    if isinstance(fn, MaskedDistribution):
        x = without_masked(x, fn._mask, fn.event_dim)
    transforms = fn.transforms if isinstance(fn, TransformedDistribution) else []
    for transform in reversed(transforms):
        x = as_function(transform.inv)(x)
    result = draw_inside(fn.base_dist, x, draw)
    y = result.y
    for transform in transforms:
        y = as_function(transform)(y)
    return result._replace(y=y)


def without_masked(x: Tensor, mask: Tensor | bool | None, event_dim: int) -> Tensor:
    """Points with NaN in masked rows, whatever stood there; such a row has no data to start at.

    Args:
        x: points, shape ``(*rows, *event)``.
        mask: True where a row counts, of a shape that broadcasts with ``rows``.
        event_dim: how many dimensions an event has.

    Example:
        >>> without_masked(torch.ones(3), torch.tensor([True, False, True]), 0)
        tensor([1., nan, 1.])
    """
    if not isinstance(mask, Tensor) or not x.is_floating_point():
        return x
    return torch.where(mask.reshape(mask.shape + (1,) * event_dim), x, torch.nan)
