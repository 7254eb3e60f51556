r"""The potential: what is sampled, as a function of flat batches of chains.

A kernel needs neither sites nor constraints nor Pyro. Its state is one tensor of unconstrained
*positions* :math:`z`, shape ``(chains, dim)``, and their *potential*

.. math:: U(z) = -\log p(x(z)) - \log \left| \det \frac{\partial x}{\partial z} \right|,

shape ``(chains,)``, where :math:`x(z)` maps the reals onto the support of every site.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.core.discrete import BlockGibbs
from pyro_ebm.models.checks.fixed_density import check_repeats
from pyro_ebm.models.sites.site import Site, to_support
from pyro_ebm.ops.score import value_and_grad

MAX_INIT_TRIES = 100
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
    """The distribution, where it can resample its own variables in blocks."""
    modules: Sequence[nn.Module] = ()
    """The networks that it evaluates, in evaluation mode."""

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
        """The map from each site's support to the reals."""
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
                self.check_repeats(z[: NUM_REPEATED * self.targets])
                return z
            # draws come with one chain of each group: those that hold a bad chain are drawn again
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
            if why := site.objection(part):
                raise ValueError(f"initial_params[{site.name!r}] must hold {why}")
        bad = self._not_finite(z)
        if bad.any():
            raise ValueError(
                f"initial_params of chain {int(bad.nonzero()[0])} are no start:"
                f" {self.blame(z[bad][0])}"
            )
        self.check_repeats(z[: NUM_REPEATED * self.targets])
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
        if all(site.support_values is not None for site in self.sites):
            with torch.no_grad():  # there may be no gradient at all
                return (self(z),)
        value, grad = self.value_and_grad(z)
        return value, self._of_reals(grad)

    def check_repeats(self, z: Tensor, draws: bool = False) -> None:
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
            listed = ", ".join(map(repr, bad))
            return f"the gradient of the potential in site(s) {listed} is not finite"
        return f"the potential is {value.item()}"
