"""A function of one chain's sites as a potential of many chains."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.singular import nan_where_singular
from pyro_ebm.models.over_chains import OverChains, Way
from pyro_ebm.models.sites.site import Site
from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.score import value_and_grad

TOLERANCE = 1e-3  # of what is compared, relative to the largest element


class FunctionPotential(Potential):
    r"""A potential given for one chain as a function of Pyro's dict of unconstrained sites.

    Many chains are evaluated at once where that gives the plain values and gradients of two chains
    (:class:`~pyro_ebm.models.over_chains.OverChains`), and else one after another, which a warning
    says once.

    Args:
        potential_fn: maps a dict of unconstrained values to a scalar :math:`U`.
        sites: see :class:`Potential`.
        modules: modules to hold in evaluation mode (dropout off) while evaluating.

    Example:
        >>> from torch.distributions.transforms import identity_transform
        >>> site = Site("x", torch.Size([2]), torch.float32, identity_transform)
        >>> potential = FunctionPotential(lambda params: params["x"].square().sum() / 2, [site])
        >>> potential(torch.ones(3, 2))
        tensor([1., 1., 1.])
    """

    def __init__(
        self,
        potential_fn: Callable[[dict[str, Tensor]], Tensor],
        sites: Sequence[Site],
        modules: Iterable[nn.Module] = (),
    ):
        super().__init__(sites)
        self.potential_fn = potential_fn
        self.modules = tuple(modules)
        self._draws = False  # whether an evaluation drew random numbers, and was the same again
        self.chains = OverChains(self._one, self._agrees, self._on_loop)

    @property
    def way(self) -> Way | None:
        """How many chains are evaluated; None if that is not decided yet."""
        return self.chains.way

    @way.setter
    def way(self, way: Way | None) -> None:
        self.chains.way = way

    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each chain, ``(chains, dim) -> (chains,)``, differentiable."""
        with self.evaluating():
            return nan_where_singular(lambda z: (self._value(z),), z)[0]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        with self.evaluating():
            value, grad = nan_where_singular(functools.partial(value_and_grad, self._value), z)
        return value, grad

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context nothing is validated, and networks are in evaluation mode."""
        # validation branches on values, which vmap forbids; the model was validated when traced
        with pyro.validation_enabled(False), eval_mode(self.modules):
            yield

    def _value(self, z: Tensor) -> Tensor:
        if self.dim == 0:  # all chains are at one place
            return self._one(z[0]).expand(z.shape[:1])
        if self._draws or self.way not in (None, "loop"):
            return self.chains(z)
        before = torch.get_rng_state()
        values = self.chains(z)
        if not torch.equal(before, torch.get_rng_state()):
            self._draws = True
            self.check_repeats(z.detach(), draws=True)
        return values

    def _one(self, z: Tensor) -> Tensor:
        value = self.potential_fn(self.unravel(z))
        if not isinstance(value, Tensor):  # Pyro's of an empty model is a number
            value = torch.as_tensor(value, dtype=z.dtype, device=z.device)
        if value.numel() != 1:
            raise ValueError(
                f"the potential of one chain must be a scalar, got shape {tuple(value.shape)}"
            )
        return value.reshape(()).to(z.dtype)

    def _agrees(self, candidate: Callable[[Tensor], Tensor], z: Tensor) -> bool | None:
        some = z[:2].detach()
        wanted = self._compared(self.chains.one_by_one, some)
        if not all(w.isfinite().all() for w in wanted):
            return None
        return all(
            bool((f - w).abs().max() <= TOLERANCE * (1 + w.abs().max()))
            for f, w in zip(self._compared(candidate, some), wanted, strict=True)
            if w.numel()
        )

    def _compared(self, function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(function, z)
        return value, self._of_reals(grad)

    def _on_loop(self, reason: str, z: Tensor) -> None:
        self.check_repeats(z[:2].detach(), draws="randomness" in reason)
        warnings.warn(
            "the model cannot be vectorized over chains, so they are evaluated one after"
            f" another, which is slower ({reason})",
            stacklevel=3,
        )
