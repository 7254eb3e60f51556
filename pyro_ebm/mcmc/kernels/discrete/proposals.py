r"""Proposals of :class:`~pyro_ebm.mcmc.MHKernel` for discrete sites: flip a variable, swap two."""

import copy

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.discrete.variables import Variables, gumbel
from pyro_ebm.mcmc.kernels.gradient_free.proposals import Proposal
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.ops.arguments import check_count


class DiscreteProposal(Proposal):
    """A symmetric proposal that sees a position as variables; a new one writes ``sample``."""

    symmetric = True
    discrete = True
    _variables: Variables | None = None

    def bind(self, potential: Potential) -> "DiscreteProposal":
        """This proposal for the variables of a potential's discrete sites."""
        new = copy.copy(self)
        like = torch.empty(0, dtype=potential.dtype, device=potential.device)
        new._variables = Variables(potential.sites, like)
        return new

    @property
    def variables(self) -> Variables:
        """The variables, once bound."""
        if self._variables is None:
            raise RuntimeError(f"{type(self).__name__} is not bound to a potential")
        return self._variables


class Flip(DiscreteProposal):
    """Gives variables chosen at random other values, uniformly.

    Their number is uniform on 1 to ``num_flips``. (Were it always the same, bits could not reach
    every state: an even number of flips keeps the parity of their sum.)

    Args:
        num_flips: how many distinct variables at most; all others keep their values.

    Raises:
        ValueError: for a number below 1, or (when run) above that of the variables.

    Example:
        >>> from pyro_ebm.mcmc import MCMC, MHKernel
        >>> p = UnnormalizedEnergy(lambda x: -x.sum(-1), (5,), dist.constraints.boolean)
        >>> kernel = MHKernel(p, proposal=Flip())
        >>> mcmc = MCMC(kernel, 2000, 50, num_chains=10, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].mean()  # 1 / (1 + exp(-1)) = .731
        tensor(0.7...)
    """

    def __init__(self, num_flips: int = 1):
        self.num_flips = check_count("num_flips", num_flips)

    def sample(self, z: Tensor) -> Tensor:
        """Positions with 1 to ``num_flips`` variables changed."""
        variables = self.variables
        total = sum(variables.counts)
        if self.num_flips > total:
            raise ValueError(f"num_flips={self.num_flips}, but there are {total} variables")
        picked = torch.rand(z.shape[0], total, dtype=z.dtype, device=z.device)
        number = torch.randint(self.num_flips, (z.shape[0], 1), device=z.device)
        picked = picked >= picked.topk(self.num_flips, -1).values.gather(-1, number)
        stays = variables.by_variable(variables.moves(z, torch.zeros_like(z)).stays)
        chosen = []
        for own, flips in zip(stays, picked.split(variables.counts, -1), strict=True):
            # one of the other support values, uniformly; a variable with a single one keeps it
            noise = gumbel(own.shape, z).masked_fill(own, -torch.inf)
            other = torch.zeros_like(own).scatter(-1, noise.argmax(-1, keepdim=True), True)
            chosen.append(other & flips[..., None])
        return variables.after(z, variables.flat(chosen))


class Swap(DiscreteProposal):
    """Exchanges the values of two variables of one site, chosen at random.

    Sums are kept (the magnetization of spins, the number of ones), so that by itself it moves
    within a layer of constant sum; a start decides which.

    Raises:
        ValueError: (when run) for several sites, or fewer than two variables.

    Example:
        >>> from pyro_ebm.mcmc import MCMC, MHKernel
        >>> p = UnnormalizedEnergy(lambda x: -x[..., 0], (3,), dist.constraints.boolean)
        >>> start = {"x": torch.tensor([[1.0, 0.0, 0.0]]).expand(20, 3)}
        >>> kernel = MHKernel(p, proposal=Swap())
        >>> mcmc = MCMC(kernel, 1000, 50, start, num_chains=20, disable_progbar=True)
        >>> mcmc.run()
        >>> x = mcmc.get_samples()["x"]
        >>> x.sum(-1).unique(), x[:, 0].mean()  # e / (e + 2) = .576
        (tensor([1.]), tensor(0.5...))
    """

    def bind(self, potential: Potential) -> "DiscreteProposal":
        """This proposal, if there is one site with at least two variables."""
        new = super().bind(potential)
        counts = new.variables.counts
        if len(counts) != 1 or counts[0] < 2:
            raise ValueError(
                f"Swap exchanges two variables of one site, the sites {potential.names} have"
                f" {counts} variables"
            )
        return new

    def sample(self, z: Tensor) -> Tensor:
        """Positions with two variables exchanged."""
        n = self.variables.counts[0]
        x = z.reshape(z.shape[0], n, -1)
        first = torch.randint(n, z.shape[:1], device=z.device)
        second = (first + torch.randint(1, n, z.shape[:1], device=z.device)) % n
        rows = torch.arange(z.shape[0], device=z.device)
        new = x.clone()
        new[rows, first], new[rows, second] = x[rows, second], x[rows, first]
        return new.reshape(z.shape)
