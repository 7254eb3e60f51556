r"""The potential: what is sampled, as a function of flat batches of chains.

A kernel knows neither sites nor constraints nor Pyro. It sees one tensor of unconstrained
*positions* :math:`z`, shape ``(chains, dim)``, and their *potential*

.. math:: U(z) = -\log p(x(z)) - \log \left| \det \frac{\partial x}{\partial z} \right|,

shape ``(chains,)``, where :math:`x(z)` maps the reals onto the support of every site.
"""

import contextlib
import functools
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn
from torch.distributions.transforms import Transform
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ebm.distributions.core.discrete import BlockGibbs
from pyro_ebm.models.batched import Batched, refuse_slow
from pyro_ebm.models.checks.fixed_density import check_repeats
from pyro_ebm.models.sites.site import Site, to_support
from pyro_ebm.ops.arguments import first_line
from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.score import value_and_grad

MAX_INIT_TRIES = 100
# What vmap may raise of a function that does without it.
_UNMAPPED = (UserWarning, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
NUM_REPEATED = 4  # chains at which the potential is evaluated again


class Potential(ABC):
    r"""A potential :math:`U` on flat positions, with the way back to the sites.

    To add a member, say how to evaluate a batch:

    Example:
        >>> from torch.distributions.transforms import identity_transform as real
        >>> class Harmonic(Potential):
        ...     def __call__(self, z):
        ...         return z.square().sum(-1) / 2
        >>> potential = Harmonic([Site("x", torch.Size([2]), torch.float32, real)])
        >>> potential.value_and_grad(torch.tensor([[1.0, 2.0]]))
        (tensor([2.5000]), tensor([[1., 2.]]))
        >>> potential.constrain(torch.tensor([[1.0, 2.0]]))
        {'x': tensor([[1., 2.]])}

    Args:
        sites: the latents, in the order of the flat position.
        targets: chains ``c`` with the same ``c % targets`` have the same target, see
            :mod:`pyro_ebm.ops.steps.precondition`.

    A model without latents has no sites: positions of dimension 0, which stand still.

    Raises:
        ValueError: if a continuous site is not floating.
    """

    lp_name = "lp"
    """What the statistic :math:`-U(z)` of a draw is called."""
    intractable_sites: frozenset[str] = frozenset()
    """The sites on which a log Z depends that the potential lacks: for exchange moves alone."""
    blocks: BlockGibbs | None = None
    """The distribution, where it knows how to resample its own variables in blocks."""

    def __init__(self, sites: Sequence[Site], targets: int = 1):
        for site in sites:
            if site.support_values is None and not site.dtype.is_floating_point:
                raise ValueError(
                    f"site {site.name!r} has dtype {site.dtype}, but positions are continuous:"
                    " start it at floating values, or marginalize it"
                )
        self.sites = tuple(sites)
        self.targets = targets
        self.sizes = [site.shape.numel() for site in sites]
        self.dim = sum(self.sizes)
        floating = [site.dtype for site in sites if site.dtype.is_floating_point]
        self.dtype = functools.reduce(torch.promote_types, floating or [torch.get_default_dtype()])
        self.device = sites[0].device if sites else torch.get_default_device()

    # -- evaluation --------------------------------------------------------------------------

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each chain, ``(chains, dim) -> (chains,)``, differentiable."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        return value_and_grad(self, z)

    # -- blocks ------------------------------------------------------------------------------

    def gibbs_noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a block sweep of positions ``(chains, dim)``."""
        raise NotImplementedError

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions ``(chains, dim)`` after each block was resampled given the rest.

        Args:
            z: positions, shape ``(chains, dim)``.
            noise: what :meth:`gibbs_noise` gave.
            beta: inverse temperatures, shape ``(chains,)``; None is 1.
        """
        raise NotImplementedError

    # -- positions and sites -----------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the sites, in order."""
        return [site.name for site in self.sites]

    @property
    def transforms(self) -> dict[str, Transform]:
        """From each site's support to the reals."""
        return {site.name: site.transform for site in self.sites}

    def ravel(self, params: Mapping[str, Tensor]) -> Tensor:
        """Flat positions ``(*batch, dim)`` of unconstrained values ``(*batch, *site.shape)``."""
        parts = [torch.empty(0, dtype=self.dtype, device=self.device)] if not self.sites else []
        for site in self.sites:
            value = params[site.name]
            batch = value.shape[: value.dim() - len(site.shape)]
            parts.append(value.reshape(batch + (-1,)).to(self.dtype))
        return torch.cat(parts, -1)

    def unravel(self, z: Tensor) -> dict[str, Tensor]:
        """Unconstrained values ``(*batch, *site.shape)`` of flat positions ``(*batch, dim)``."""
        parts = z.split(self.sizes, -1)
        return {
            site.name: part.reshape(z.shape[:-1] + site.shape).to(site.dtype)
            for site, part in zip(self.sites, parts, strict=True)
        }

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values in their supports ``(*batch, *site)`` of flat positions ``(*batch, dim)``."""
        values = self.unravel(z)
        return {site.name: to_support(site.transform, values[site.name]) for site in self.sites}

    # -- where chains start ------------------------------------------------------------------

    def initial(self, num_chains: int) -> Tensor:
        """Starting positions ``(num_chains, dim)`` at which the potential and gradient are finite.

        Raises:
            ValueError: if a chain has found none after 100 draws, or the potential is random; it
                names the site to blame.
        """
        z = self._draw(num_chains).clone()
        bad = self._not_finite(z)
        for _ in range(MAX_INIT_TRIES):
            if not bad.any():
                self._check_repeats(z[: NUM_REPEATED * self.targets])
                return z
            # draws come with one chain of each group: ask for those that hold a bad chain
            rows = bad.reshape(-1, self.targets).any(-1)
            again = rows.repeat_interleave(self.targets).nonzero().flatten()
            z[again] = torch.where(bad[again, None], self._draw(len(again)), z[again])
            bad[again] = self._not_finite(z[again])
        raise ValueError(
            f"no starting point with a finite potential and gradient in {MAX_INIT_TRIES} tries:"
            f" {self.blame(z[bad][0])}. Check the model there, or set init_strategy or"
            " initial_params"
        )

    def at(self, params: Mapping[str, Tensor], num_chains: int) -> Tensor:
        """The positions ``(num_chains, dim)`` of the user's unconstrained ``initial_params``.

        Raises:
            ValueError: if they have other names or shapes than the sites, or lie where the
                potential is not finite, or it is random.
        """
        if params.keys() != set(self.names):
            raise ValueError(
                f"initial_params has sites {sorted(params)}, the model has {sorted(self.names)}"
            )
        lead = () if num_chains == 1 else (num_chains,)
        for site in self.sites:
            want, got = lead + tuple(site.shape), tuple(params[site.name].shape)
            if got != want and got != (num_chains, *site.shape):
                raise ValueError(
                    f"initial_params[{site.name!r}] must be unconstrained values of shape {want},"
                    f" got {got}"
                )
        z = self.ravel(params).detach().reshape(num_chains, self.dim).to(self.device)
        for site, part in zip(self.sites, z.split(self.sizes, -1), strict=True):
            if site.support_values is None:
                continue
            support_values = site.support_values.to(part)
            if site.is_unbounded and (part != part.round()).any():
                raise ValueError(f"initial_params[{site.name!r}] must hold whole numbers")
            if site.is_unbounded:
                continue
            variables = part.reshape(-1, 1, support_values.shape[-1])
            if not (variables == support_values).all(-1).any(-1).all():
                raise ValueError(
                    f"initial_params[{site.name!r}] must hold the values"
                    f" {support_values.tolist()} of"
                    " a discrete site, and holds others"
                )
        bad = self._not_finite(z)
        if bad.any():
            raise ValueError(
                f"initial_params of chain {int(bad.nonzero()[0])} do not do:"
                f" {self.blame(z[bad][0])}"
            )
        self._check_repeats(z[: NUM_REPEATED * self.targets])
        return z

    def _draw(self, num_chains: int) -> Tensor:
        """Tentative starting positions, ``(num_chains, dim)``."""
        starts = [site.start(num_chains, self.dtype) for site in self.sites]
        nothing = torch.empty(num_chains, 0, dtype=self.dtype, device=self.device)
        return torch.cat([nothing, *starts], -1)

    def _not_finite(self, z: Tensor) -> Tensor:
        finite = [part.isfinite().reshape(z.shape[0], -1).all(-1) for part in self._evaluated(z)]
        return ~torch.stack(finite).all(0)

    def _evaluated(self, z: Tensor) -> tuple[Tensor, ...]:
        """The potential, and its gradient in the continuous sites if there are any."""
        if all(
            site.support_values is not None for site in self.sites
        ):  # there may be no gradient at all
            with torch.no_grad():
                return (self(z),)
        value, grad = self.value_and_grad(z)
        return value, self._of_reals(grad)

    def _check_repeats(self, z: Tensor, draws: bool = False) -> None:
        """Raises a ValueError if the potential at some chains' positions is random."""
        check_repeats(lambda: self._evaluated(z), lambda: self.random_part(z), draws)

    def random_part(self, z: Tensor) -> str:
        """What of a random potential is random at positions ``(chains, dim)``, in words."""
        return "the potential"

    def _of_reals(self, z: Tensor) -> Tensor:
        """The columns of the continuous sites."""
        parts = zip(self.sites, z.split(self.sizes, -1), strict=True)
        return torch.cat(
            [z[:, :0], *(part for site, part in parts if site.support_values is None)], -1
        )

    def blame(self, z: Tensor) -> str:
        """What is not finite at the position ``(dim,)``, in words."""
        value = self(z[None]).detach()
        if value.isfinite().all():
            grads = self.value_and_grad(z[None])[1][0].split(self.sizes)
            bad = [
                site.name
                for site, grad in zip(self.sites, grads, strict=True)
                if site.support_values is None and not grad.isfinite().all()
            ]
            return f"the gradient of the potential in site(s) {_listed(bad)} is not finite"
        return f"the potential is {value.item()}"


class FunctionPotential(Potential):
    r"""A potential given for one chain as a function of Pyro's dict of unconstrained sites.

    Many chains are evaluated by ``torch.func.vmap``, as the function is, or with the operations
    replaced that it refuses (:mod:`~pyro_ebm.models.batched`). Before it is trusted, it
    is compared with the plain evaluation of two chains; where it fails or differs, chains are
    evaluated one after another, and a warning says so once.

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
        self._modules = tuple(modules)
        self._batched = Batched(self._one)
        self._draws = False  # whether an evaluation drew random numbers, and was the same again
        self._vectorizes: bool | Literal["rewritten"] | None = None  # None: not tried yet

    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each chain, ``(chains, dim) -> (chains,)``, differentiable."""
        with self._quiet():
            return nan_where_singular(lambda z: (self._value(z),), z)[0]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        with self._quiet():
            value, grad = nan_where_singular(functools.partial(value_and_grad, self._value), z)
        return value, grad

    def _value(self, z: Tensor) -> Tensor:
        if self.dim == 0:  # all chains are at one place
            return self._one(z[0]).expand(z.shape[:1])
        if z.shape[0] == 1 or not self._can_vectorize(z):
            return self._one_by_one(z)
        try:
            return self._mapped(self._vectorizes)(z)
        except torch.linalg.LinAlgError:
            raise
        except _UNMAPPED as error:  # at these positions it does what it did nowhere before
            if get_proxy_mode() is not None:
                raise
            value = self._one_by_one(z)
            self._vectorizes, reason = False, first_line(error)
            self._check_repeats(z, draws="randomness" in reason)
            self._tell_slow(reason)
            return value

    def _mapped(self, way: bool | str | None) -> Callable[[Tensor], Tensor]:
        return self._batched if way == "rewritten" else vmap(self._one)

    def _one(self, z: Tensor) -> Tensor:
        value = self.potential_fn(self.unravel(z))
        if not isinstance(value, Tensor):  # Pyro's of an empty model is a number
            value = torch.as_tensor(value, dtype=z.dtype, device=z.device)
        if value.numel() != 1:
            raise ValueError(
                f"the potential of one chain must be a scalar, got shape {tuple(value.shape)}"
            )
        return value.reshape(()).to(z.dtype)

    def _one_by_one(self, z: Tensor) -> Tensor:
        before = torch.get_rng_state()
        values = torch.stack([self._one(row) for row in z])
        if not self._draws and not torch.equal(before, torch.get_rng_state()):
            self._draws = True
            self._check_repeats(z.detach(), draws=True)
        return values

    def _can_vectorize(self, z: Tensor) -> bool:
        if self._vectorizes is None:
            some = z[:2].detach()
            want = self._compared(self._one_by_one, some)
            if not all(w.isfinite().all() for w in want):
                return False  # nothing to compare with yet
            reason = ""
            for slow, way in itertools.product((False, True), (True, "rewritten")):
                try:
                    with contextlib.nullcontext() if slow else refuse_slow():
                        got = self._compared(self._mapped(way), some)
                    same = all(
                        ((g - w).abs().max() <= 1e-3 * (1 + w.abs().max()))
                        for g, w in zip(got, want, strict=True)
                        if w.numel()
                    )
                    if same:
                        self._vectorizes = way
                        return True
                    reason = "its vectorized value differs from its plain value"
                except _UNMAPPED as error:
                    reason = first_line(error)
            self._vectorizes = False
            self._check_repeats(some, draws="randomness" in reason)
            self._tell_slow(reason)
        return bool(self._vectorizes)

    @staticmethod
    def _tell_slow(reason: str) -> None:
        warnings.warn(
            "the model cannot be vectorized over chains, so they are evaluated one after"
            f" another, which is slower ({reason})",
            stacklevel=3,
        )

    def _compared(self, function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(function, z)
        return value, self._of_reals(grad)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        # validation branches on values, which vmap forbids; the model was validated when traced
        with pyro.validation_enabled(False), eval_mode(self._modules):
            yield


def nan_where_singular(
    function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, targets: int = 1
) -> tuple[Tensor, ...]:
    """Calls a batched function that may meet a singular matrix: NaN for the chains that do.

    torch raises for the whole batch; halving it finds the chains to blame. They get a potential
    of NaN, which is never accepted, and the others what they would have got anyway.

    Args:
        function: maps positions to potentials, or to potentials and gradients.
        z: positions, shape ``(chains, dim)``.
        targets: the least number of chains that can be evaluated at once.

    Example:
        >>> def function(z):
        ...     return (torch.linalg.cholesky(z[:, :, None])[:, 0, 0],)
        >>> nan_where_singular(function, torch.tensor([[1.0], [-1.0], [4.0]]))
        (tensor([1., nan, 2.]),)
    """
    try:
        return function(z)
    except torch.linalg.LinAlgError:
        if get_proxy_mode() is not None:  # a graph is being captured, and would split for ever
            raise
        rows = z.shape[0] // targets
        if rows <= 1:  # a potential, and a gradient for those who ask for one
            return z.new_full(z.shape[:1], torch.nan), torch.full_like(z, torch.nan)
    halves = z.split((rows + 1) // 2 * targets)
    parts = [nan_where_singular(function, half, targets) for half in halves]
    return tuple(torch.cat(part) for part in zip(*parts, strict=False))


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))
