r"""The potential: what is sampled, as a function of flat batches of chains.

A kernel knows neither sites nor constraints nor Pyro. It sees one tensor of unconstrained
*positions* :math:`z`, shape ``(chains, dim)``, and their *potential*

.. math:: U(z) = -\log p(x(z)) - \log \left| \det \frac{\partial x}{\partial z} \right|,

shape ``(chains,)``, where :math:`x(z)` maps the reals onto the support of every site.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform, identity_transform
from torch.func import grad_and_value, vmap

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.util import modules, unvalidated
from pyro_ebm.ops.score import value_and_grad

MAX_INIT_TRIES = 100


class Site(NamedTuple):
    """One latent of a model, as a kernel's position holds it."""

    name: str
    shape: torch.Size
    """Unconstrained shape of one chain's value."""
    dtype: torch.dtype
    transform: Transform
    """From the support to the reals, as in Pyro's ``kernel.transforms``."""
    device: torch.device = torch.device("cpu")


class Potential(ABC):
    r"""A potential :math:`U` on flat positions, with the way back to the sites.

    To add a member, say how to evaluate a batch:

    Example:
        >>> class Harmonic(Potential):
        ...     def __call__(self, z):
        ...         return z.square().sum(-1) / 2
        >>> real = identity_transform
        >>> potential = Harmonic([Site("x", torch.Size([2]), torch.float32, real)])
        >>> potential.value_and_grad(torch.tensor([[1.0, 2.0]]))
        (tensor([2.5000]), tensor([[1., 2.]]))
        >>> potential.constrain(torch.tensor([[1.0, 2.0]]))
        {'x': tensor([[1., 2.]])}

    Args:
        sites: the latents, in the order of the flat position.
        groups: chains ``c`` with the same ``c % groups`` have the same target, see
            :mod:`pyro_ebm.ops.precondition`.

    Raises:
        ValueError: if there are no sites, or a site is not floating.
    """

    def __init__(self, sites: Sequence[Site], groups: int = 1):
        if not sites:
            raise ValueError("the model has no latent site to sample")
        for site in sites:
            if not site.dtype.is_floating_point:
                raise ValueError(
                    f"site {site.name!r} has dtype {site.dtype}, but positions are continuous:"
                    " start it at floating values, or marginalize it"
                )
        self.sites = tuple(sites)
        self.groups = groups
        self.sizes = [site.shape.numel() for site in sites]
        self.dim = sum(self.sizes)
        self.dtype = sites[0].dtype
        for site in sites[1:]:
            self.dtype = torch.promote_types(self.dtype, site.dtype)

    # -- evaluation --------------------------------------------------------------------------

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each chain, ``(chains, dim) -> (chains,)``, differentiable."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        return value_and_grad(self, z)

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
        parts = []
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
        transforms = self.transforms
        return {name: transforms[name].inv(value) for name, value in self.unravel(z).items()}

    # -- where chains start ------------------------------------------------------------------

    def initial(self, num_chains: int) -> Tensor:
        """Starting positions ``(num_chains, dim)`` at which the potential and gradient are finite.

        Raises:
            ValueError: if a chain has found none after 100 draws; it names the site to blame.
        """
        z = self._draw(num_chains)
        bad = self._not_finite(z)
        for _ in range(MAX_INIT_TRIES):
            if not bad.any():
                return z
            z = torch.where(bad[:, None], self._draw(num_chains), z)
            bad = self._not_finite(z)
        raise ValueError(
            f"no starting point with a finite potential and gradient in {MAX_INIT_TRIES} tries:"
            f" {self.blame(z[bad][0])}. Check the model there, or set init_strategy or"
            " initial_params"
        )

    def _draw(self, num_chains: int) -> Tensor:
        """Tentative starting positions, ``(num_chains, dim)``."""
        z = torch.empty(num_chains, self.dim, dtype=self.dtype, device=self.sites[0].device)
        return z.uniform_(-2.0, 2.0)

    def _not_finite(self, z: Tensor) -> Tensor:
        value, grad = self.value_and_grad(z)
        return ~(value.isfinite() & grad.isfinite().all(-1))

    def blame(self, z: Tensor) -> str:
        """What is not finite at the position ``(dim,)``, in words."""
        value, grad = self.value_and_grad(z[None])
        if value.isfinite().all():
            grads = self.unravel(grad[0])
            bad = [name for name, g in grads.items() if not g.isfinite().all()]
            return f"the gradient of the potential in site(s) {_listed(bad)} is not finite"
        return f"the potential is {value.item()}"


class EnergyPotential(Potential):
    r"""The potential of an energy, all chains in one call of the energy.

    There are ``chains_per_group`` x ``batch_shape`` chains; each batch element is a group.

    Args:
        energy: the distribution.
        name: what to call its site.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x, support=dist.constraints.positive)
        >>> EnergyPotential(p)(torch.zeros(1, 1))  # E(exp z) - z
        tensor([1.])
    """

    def __init__(self, energy: UnnormalizedEnergy, name: str = "x"):
        self.energy: UnnormalizedEnergy = unvalidated(energy)
        start = energy.starting_points()
        self.bijection = biject_to(energy.support)
        shape = self.bijection.inverse_shape(energy.event_shape)
        site = Site(name, torch.Size(shape), start.dtype, self.bijection.inv, start.device)
        super().__init__([site], groups=max(energy.batch_shape.numel(), 1))
        self._modules = modules(energy._energy)

    def __call__(self, z: Tensor) -> Tensor:
        unconstrained = self._grouped(z)
        x = self.bijection(unconstrained)
        jacobian = self.bijection.log_abs_det_jacobian(unconstrained, x)
        batch_dim = x.dim() - self.energy.event_dim
        jacobian = jacobian.reshape(jacobian.shape[:batch_dim] + (-1,)).sum(-1)
        with eval_mode(self._modules):
            return -(self.energy.unnormalized_log_prob(x) + jacobian).reshape(-1)

    def to_position(self, x: Tensor) -> Tensor:
        """Positions ``(chains, dim)`` of points ``(n, *batch, *event)``."""
        return self.bijection.inv(x).reshape(-1, self.dim)

    def to_points(self, z: Tensor) -> Tensor:
        """Points ``(n, *batch, *event)`` of positions ``(chains, dim)``."""
        return self.bijection(self._grouped(z))

    def _grouped(self, z: Tensor) -> Tensor:
        return z.reshape((-1,) + self.energy.batch_shape + self.sites[0].shape)

    def _draw(self, num_chains: int) -> Tensor:
        return self.to_position(self.energy.starting_points((num_chains // self.groups,)))


class FunctionPotential(Potential):
    r"""A potential given for one chain as a function of Pyro's dict of unconstrained sites.

    Many chains are evaluated by ``torch.func.vmap``. Before it is trusted, it is compared with
    the plain evaluation of two chains; where it fails or differs, chains are evaluated one after
    another, and a warning says so once.

    Args:
        potential_fn: maps a dict of unconstrained values to a scalar :math:`U`.
        sites: see :class:`Potential`.
        modules: modules to hold in evaluation mode (dropout off) while evaluating.

    Example:
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
        self._vectorizes: bool | None = None

    def __call__(self, z: Tensor) -> Tensor:
        with self._quiet():
            if z.shape[0] > 1 and self._can_vectorize(z):
                return vmap(self._one)(z)
            return self._one_by_one(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with self._quiet():
            try:
                return self._value_and_grad(z)
            except torch.linalg.LinAlgError:
                # A matrix was singular in one chain: find out which, and leave the others alone.
                rows = [self._value_and_grad_or_nan(row) for row in z.split(1)]
        return torch.cat([value for value, _ in rows]), torch.cat([grad for _, grad in rows])

    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.shape[0] > 1 and self._can_vectorize(z):
            grad, value = vmap(grad_and_value(self._one))(z.detach())
            return value.detach(), grad.detach()
        return value_and_grad(self._one_by_one, z)

    def _value_and_grad_or_nan(self, z: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return value_and_grad(self._one_by_one, z)
        except torch.linalg.LinAlgError:  # U is undefined here: a proposal that is never accepted
            return z.new_full((1,), torch.nan), torch.full_like(z, torch.nan)

    def _one(self, z: Tensor) -> Tensor:
        value = self.potential_fn(self.unravel(z))
        if value.numel() != 1:
            raise ValueError(
                f"the potential of one chain must be a scalar, got shape {tuple(value.shape)}"
            )
        return value.reshape(()).to(z.dtype)

    def _one_by_one(self, z: Tensor) -> Tensor:
        return torch.stack([self._one(row) for row in z])

    def _can_vectorize(self, z: Tensor) -> bool:
        if self._vectorizes is None:
            some = z[:2].detach()
            want = value_and_grad(self._one_by_one, some)
            self._vectorizes = False  # until shown otherwise
            try:
                got = vmap(grad_and_value(self._one))(some)[::-1]
                same = all(
                    torch.allclose(g, w, rtol=1e-3, atol=1e-3, equal_nan=True)
                    for g, w in zip(got, want, strict=True)
                )
                reason = "its vectorized value differs from its plain value"
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                same, reason = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self._vectorizes = same
            if not same:
                warnings.warn(
                    "the model cannot be vectorized over chains, so they are evaluated one after"
                    f" another, which is slower ({reason})",
                    stacklevel=2,
                )
        return self._vectorizes

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        # validation branches on values, which vmap forbids; the model was validated when traced
        with pyro.validation_enabled(False), eval_mode(self._modules):
            yield


@contextlib.contextmanager
def eval_mode(found: Iterable[nn.Module]) -> Iterator[None]:
    """Holds modules in evaluation mode (no dropout, frozen batch norm) and puts the mode back.

    Example:
        >>> net = torch.nn.Dropout()
        >>> with eval_mode([net]):
        ...     net.training
        False
        >>> net.training
        True
    """
    training = [module for module in found if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sites_of(
    params: Mapping[str, Tensor], transforms: Mapping[str, Transform] | None = None
) -> list[Site]:
    """The sites of a dict of one chain's unconstrained values."""
    transforms = transforms or {}
    return [
        Site(name, value.shape, value.dtype, transforms.get(name, identity_transform), value.device)
        for name, value in params.items()
    ]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))
