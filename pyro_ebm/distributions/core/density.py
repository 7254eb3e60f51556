r"""What an energy and a base say of a density: everything but its constant.

.. math:: \tilde p(x) = h(x)\, e^{-E(x)}, \qquad
          \nabla_x \log p = \nabla_x \log \tilde p, \qquad
          \log p(x) - \log p(y) = \log \tilde p(x) - \log \tilde p(y) .
"""

import copy
from collections.abc import Callable
from typing import Self, cast

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.arguments import checked_shape, expanded_base, expands
from pyro_ebm.distributions.checks.batches import check_batches
from pyro_ebm.distributions.checks.energy_calls import (
    NARROW,
    EnergyCallError,
    explain,
    fixed_weights,
    missing_event_shape,
    of_batch_of_one,
)
from pyro_ebm.distributions.core.introspection import first_tensor, modules, name_of_function
from pyro_ebm.distributions.core.supports import check_bijection, lift_support
from pyro_ebm.ops.arguments import check_tensor, shown
from pyro_ebm.ops.score import score


class EnergyDensity(TorchDistribution):
    """A base times the exponential of minus an energy, on a support.

    The arguments are those of :class:`~pyro_ebm.UnnormalizedEnergy`.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor] | None,
        event_shape: torch.Size | tuple[int, ...] | None,
        support: constraints.Constraint | None,
        batch_shape: torch.Size | tuple[int, ...] | None,
        base: TorchDistribution | None,
        validate_args: bool | None,
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
        if support is None:
            support = constraints.real if base is None else base.support
        self._support = lift_support(cast(constraints.Constraint, support), event_shape)
        self.base = base
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if not self._support.is_discrete:
            check_bijection(self._support, event_shape)

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
        x = self.broadcast(x)
        if x.dtype in NARROW and not self._support.is_discrete:
            raise EnergyCallError(
                f"the points of the energy {self.energy_name} are of {x.dtype}, in which"
                " arithmetic overflows: use x.float()"
            )
        want = x.shape[: x.dim() - self.event_dim]
        with fixed_weights(self.modules):
            try:
                value = self._energy(x)
                if not want and isinstance(value, Tensor) and value.dim():  # such as view(-1)
                    alone = of_batch_of_one(self._energy, x)
                    value = value if alone is None else alone
            except Exception as error:
                alone = None if want else of_batch_of_one(self._energy, x)
                if alone is None:
                    explain(error, self._energy, self.energy_name, x, self.event_shape, self.like)
                    raise
                value = alone
        got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if got == want and (value.is_complex() or value.dtype == torch.bool):
            raise ValueError(
                f"the energy {self.energy_name} must be a real number at each point, got"
                f" {value.dtype}"
            )
        if got != want:
            rest = x.shape[len(got) :] if got == tuple(want[: len(got)]) else ()
            none = not self.event_shape and not self.batch_shape and rest
            hint = missing_event_shape(rest) if none else ""
            raise ValueError(
                f"the energy {self.energy_name} must map points of shape {tuple(x.shape)}"
                f" with event_shape={tuple(self.event_shape)} to a tensor of shape {tuple(want)},"
                f" got {got}: sum over the event dimensions, squeeze a last one, or give"
                f" batch_shape= to a conditional energy{hint}"
            )
        if not self.unexpanded.batch_shape:  # else the first dimension may be of the batch
            with fixed_weights(self.modules):
                check_batches(
                    self._energy, self.energy_name, x, value, self.event_dim, self.modules
                )
        return value

    @property
    def energy_name(self) -> str:
        """The name of the energy function, or the class of a module or of the distribution."""
        return name_of_function(self._energy) if "_energy" in vars(self) else type(self).__name__

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that the energy holds, as far as they can be found."""
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

    def score(self, x: Tensor) -> Tensor:
        r"""The score :math:`\nabla_x \log p(x) = \nabla_x \log h(x) - \nabla_x E(x)`.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.

        Returns:
            The shape of ``x`` (broadcast against the batch), detached; for one that can be
            differentiated again see :func:`pyro_ebm.score`.
        """
        return score(self.unnormalized_log_prob, self.broadcast(x))

    def log_density_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        r"""The exact :math:`\log p(x) - \log p(y)`: the constant cancels.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.
            y: points, of a shape that broadcasts with ``x``.

        Returns:
            Shape ``(*sample, *batch)``.
        """
        return self.unnormalized_log_prob(x) - self.unnormalized_log_prob(y)

    # -- shapes and dtypes -------------------------------------------------------------------

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the energy, as far as its sources tell."""
        constant = vars(self).get("_log_normalizer")
        like = first_tensor(self._energy, self.base, self._support, constant)
        return torch.empty(()) if like is None else like.detach()

    def broadcast(self, x: Tensor) -> Tensor:
        """Points broadcast against the batch.

        Args:
            x: points, of a shape that broadcasts with ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch, *event)``.

        Raises:
            ValueError: for points of another event shape, or that do not broadcast.
        """
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

    def check_values(self, x: Tensor) -> None:
        """Raises a ValueError for points outside the support."""
        self._validate_sample(x)

    def expand(
        self, batch_shape: torch.Size | tuple[int, ...], _instance: Self | None = None
    ) -> Self:
        """A copy with a larger batch: the elements are independent and share the energy."""
        new = copy.copy(self) if _instance is None else _instance
        if _instance is not None:
            new.__dict__.update(vars(self))
        new._unexpanded = self.unexpanded
        new._batch_shape = torch.Size(batch_shape)
        if not expands(self.batch_shape, new._batch_shape):
            raise ValueError(
                f"batch_shape={tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}"
            )
        new.base = None if self.base is None else self.base.expand(batch_shape)
        return new

    @property
    def unexpanded(self) -> Self:
        """The energy as it was written, before plates or ``expand`` made its batch larger."""
        return self if self._unexpanded is None else self._unexpanded

    _unexpanded: Self | None = None
    _modules: tuple[nn.Module, ...] | None = None
