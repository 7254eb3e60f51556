r"""The negatives of contrastive divergence: points that a Markov chain of the energy leads to.

From site to transition, a draw of negatives takes four things: a *kernel*, bound to the energy as
it is now; its *step size*, which goes on from gradient to gradient,

.. math:: \epsilon \leftarrow \epsilon\, e^{g (a - a^*)}

with acceptance rate :math:`a`, target :math:`a^*` and gain :math:`g`; a *start*, the data or
persistent chains; and the *boundary* of the support, on which no chain can start.

Persistent chains are one pool for all rows where these have one density. Where the density is a
class's or a row's own, each has a pool of its own, and a row takes a chain from that of its group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.kept_kernels import KeptKernels
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.mcmc.kernels.base import Kernel, checked_kernel
from pyro_ebm.mcmc.kernels.composed.flow import FlowKernel
from pyro_ebm.mcmc.kernels.composed.tempering import TemperingKernel
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.short_run import default_kernel, own_kernel
from pyro_ebm.ops.arguments import check_callable, check_count, check_number, shown
from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.leaves import leaves

STEP_SIZE_GAIN = 0.1


class LangevinStep(NamedTuple):
    """A transition of Langevin's, without its noise."""

    start: Tensor
    """Where it started, of the shape of the negatives."""
    step_size: Tensor
    """Shape ``()`` or ``(1,)``."""
    temperature: Tensor
    """Shape ``()``."""


class Negatives(NamedTuple):
    """Negatives of a site."""

    x: Tensor
    """Points, shape ``(*batch, *event)``, or ``(num_chains, *event)`` of one pool for all rows."""
    energy: UnnormalizedEnergy
    """The energy that the chains are of: the site's, or for one pool that of a row."""
    acceptance_rate: Tensor
    """The mean over the chains and the transitions, shape ``()``."""
    step_size: Tensor
    """The mean of the step sizes that they were drawn with, shape ``()``."""
    start: Tensor
    """Where their chains started, of the shape of ``x``."""
    adapts: bool
    """Whether the kernel adapts its step size."""
    by_row: bool
    """Whether each row has a chain of its own."""
    last_step: LangevinStep | None
    """The last transition, of Langevin's kernel."""
    restarted: Tensor | None = None
    """The fraction of persistent chains that started again, shape ``()``."""


class NegativeSampler:
    """Draws negatives, from the data or from persistent chains.

    Its arguments are those of :class:`~pyro_ebm.ContrastiveDivergence`.

    Attributes:
        chains: the persistent chains of each site, shape ``(num_chains, *event)``, or
            ``(groups, num_chains, *event)``.
        started: with groups, which of them there are yet, boolean, ``(groups, num_chains)``.
        step_sizes: the adapted step size of each site, shape ``(1,)``.

    Raises:
        ValueError: for numbers out of range, or settings of a buffer that is not there.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        num_steps: int = 1,
        persistent: bool = False,
        num_chains: int | None = None,
        restart_prob: float = 0.0,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        chains_by: str | None = None,
    ):
        if kernel is not None:
            checked_kernel(kernel)
        check_number("restart_prob", restart_prob)
        if not 0 <= restart_prob <= 1:
            raise ValueError(f"restart_prob must lie in [0, 1], got {restart_prob}")
        if augmentation is not None:
            check_callable("augmentation", augmentation, "a function of the chains")
        if chains_by is not None and not isinstance(chains_by, str):
            raise ValueError(f"chains_by must be the name of a site, got {shown(chains_by)}")
        if not persistent and (num_chains or restart_prob > 0 or augmentation or chains_by):
            raise ValueError(
                "num_chains, restart_prob, augmentation and chains_by are settings of the buffer of"
                " persistent chains: give persistent=True"
            )
        if num_chains is not None:
            check_count("num_chains", num_chains)
        self.kernel, self.num_steps = kernel, check_count("num_steps", num_steps)
        self.persistent, self.num_chains = persistent, num_chains
        self.restart_prob, self.augmentation = restart_prob, augmentation
        self.chains_by = chains_by
        self.chains: dict[str, Tensor] = {}
        self.started: dict[str, Tensor] = {}
        self.step_sizes: dict[str, Tensor] = {}
        self.kept = KeptKernels()

    def draw(self, site: EnergySite, loss: EnergyLoss) -> Negatives:
        """The negatives of a site, after ``num_steps`` transitions, without gradient.

        Args:
            site: the site.
            loss: whose step it is. In an evaluation, chains and step sizes stay as they are.
        """
        if not self.persistent:
            return self.run(site, site.energy, site.x.detach(), loss)
        if self.chains_by is not None:
            return self._draw_by_group(site, groups_of(site, self.chains_by), loss)
        energy = site.energy.unexpanded
        if site.name not in self.chains:
            _refuse_conditional(site)
        num_rows = site.batch_shape.numel()
        start, restarted = self.start(site.name, energy, num_rows, like=site.x)
        negatives = self.run(site, energy, start, loss)
        if not loss.evaluating:
            self.chains[site.name] = negatives.x
        return negatives._replace(restarted=restarted)

    @torch.no_grad()
    def run(
        self, site: EnergySite, energy: UnnormalizedEnergy, start: Tensor, loss: EnergyLoss
    ) -> Negatives:
        """The points that the transitions lead to from ``start``."""
        template = self.kernel or own_kernel(energy) or default_kernel(energy)
        if isinstance(template, TemperingKernel):
            raise ValueError(
                f"TemperingKernel at site {site.name!r}: its replicas would start anew from the"
                " first one at every gradient, and the negatives be none of the energy's. Use its"
                " inner kernel with more num_steps or persistent chains"
            )
        if isinstance(template, FlowKernel):
            raise ValueError(
                f"FlowKernel at site {site.name!r}: negatives have no warmup in which its flow is"
                " fitted. Use its inner kernel, or CooperativeTraining, with chains from a flow"
            )
        num_steps = 0 if loss.evaluating else self.num_steps
        kernel, potential = self.kept.bound(template, energy, start, site.name, num_steps)
        kernel.checks_potential = loss.looks_closely
        adaptation = kernel.adaptation
        if (step_size := self.step_sizes.get(site.name)) is not None:
            adaptation.step_size = step_size.to(start.device)
        what, otherwise = f"the {site.kind} at site {site.name!r}", None
        if self.persistent:
            what = f"the persistent chains of site {site.name!r}"
        elif site.is_observed:
            otherwise = "use persistent=True, whose chains do not start at the data"
        z = potential.inner_position(start, what, otherwise).contiguous()
        if loss.looks_closely:
            potential.check_repeats(z)
        before, state, infos = kernel.steps(kernel.init(z), self.num_steps)
        rate = torch.stack([info.accept_prob for info in infos]).mean(0)
        by_row = not self.persistent or self.chains_by is not None
        rate = site.mean(rate.reshape(site.batch_shape)) if by_row else rate.mean()
        # of all ranks' chains, so that their step sizes stay one
        rate = loss.pooled(rate, site.num_rows if by_row else len(start))
        used = adaptation.step_size
        if kernel.adapt_step_size and not loss.evaluating and rate.isfinite():
            gap = rate - adaptation.target_accept_prob
            self.step_sizes[site.name] = used * (STEP_SIZE_GAIN * gap).exp()
        last = None
        if isinstance(kernel, LangevinKernel):
            last = LangevinStep(
                potential.to_points(before.z).reshape(start.shape),
                adaptation.step_size,
                start.new_tensor(kernel.temperature),
            )
        x = potential.to_points(state.z).reshape(start.shape)
        adapts = kernel.adapt_step_size
        return Negatives(x, energy, rate, used.mean(), start, adapts, by_row, last)

    def start(
        self, name: str, energy: UnnormalizedEnergy, num_rows: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The persistent chains of a site, some of them started again.

        Args:
            name: the site's.
            energy: what the chains are of.
            num_rows: how many chains there are at first, where ``num_chains`` is not given.
            like: points of the dtype and on the device to use.

        Returns:
            The chains, ``(num_chains, *event)``, and the fraction of those that start here,
            ``()``: at first all.

        Raises:
            ValueError: if a buffer of another size was loaded.
        """
        chains, restarted = self.chains.get(name), torch.zeros(())
        if chains is None:
            chains = energy.starting_points((self.num_chains or max(num_rows, 1),))
            restarted = torch.ones(())
        elif self.augmentation is not None:
            chains = self._augmented(chains.to(like), energy, name)
        chains = chains.to(like)  # a file's are on the CPU
        if self.num_chains is not None and len(chains) != self.num_chains:
            raise ValueError(
                f"the buffer of site {name!r} holds {len(chains)} chains, num_chains is"
                f" {self.num_chains}: load a buffer of that size, or leave num_chains out"
            )
        if self.restart_prob > 0:
            again = torch.rand(len(chains), device=chains.device) < self.restart_prob
            if name in self.chains:
                restarted = again.float().mean()
            again = again.reshape((-1,) + (1,) * energy.event_dim)
            chains = torch.where(again, energy.starting_points((len(chains),)).to(chains), chains)
        return chains, restarted

    def _draw_by_group(self, site: EnergySite, groups: Tensor, loss: EnergyLoss) -> Negatives:
        """The negatives of rows that take a chain each from the pool of their group."""
        name, event = site.name, site.energy.event_shape
        if loss.looks_closely:
            _refuse_conditional(site, groups)
        rows = torch.arange(groups.numel(), device=groups.device)
        if site.mask is not None:
            rows = rows[site.mask.reshape(-1)]
        groups = groups.reshape(-1)[rows]
        # the number of each row among those of its group
        order = groups.argsort(stable=True)
        number, ranked = torch.empty_like(groups), groups[order]
        number[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(
            ranked, ranked
        )
        chains, started = self._pools(site, groups, int(number.max()) + 1 if len(rows) else 1)
        size = chains.shape[1]
        shift = torch.randint(size, (len(chains),), device=rows.device)
        slots = groups, (number + shift[groups]) % size
        goes_on = started[slots]
        if self.restart_prob > 0:
            goes_on = goes_on & (torch.rand(len(rows), device=rows.device) >= self.restart_prob)
        start = site.energy.starting_points().to(site.x).reshape(-1, *event)
        going = chains[slots]
        if self.augmentation is not None and goes_on.any():
            going[goes_on] = self._augmented(going[goes_on], site.energy, name)
        start[rows[goes_on]] = going[goes_on]
        negatives = self.run(site, site.energy, start.reshape(site.x.shape), loss)
        if not loss.evaluating:
            chains[slots] = negatives.x.reshape(-1, *event)[rows]
            started[slots] = True
            self.chains[name], self.started[name] = chains, started
        return negatives._replace(restarted=(~goes_on).float().mean())

    def _pools(self, site: EnergySite, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The pools ``(groups, num_chains, *event)``, and which chains have started, as they grow.

        Args:
            site: the site.
            groups: of its rows, shape ``(rows,)``.
            most: the rows of the most frequent group.
        """
        x, event = site.x.detach(), site.energy.event_shape
        old = self.chains.get(site.name, x.new_zeros(0, 0, *event)).to(x)  # a file's are on the CPU
        has = self.started.get(site.name, torch.zeros(0, 0, dtype=torch.bool)).to(x.device)
        most = max(most, old.shape[1])
        size = self.num_chains or most
        if most > size:
            raise ValueError(
                f"{most} rows, or chains, of one group of chains_by={self.chains_by!r} at site"
                f" {site.name!r}, num_chains is {size}: give more chains, or leave num_chains out"
            )
        shape = max(int(groups.max()) + 1 if len(groups) else 1, len(old)), size
        if shape == old.shape[:2]:
            return old, has
        chains, started = x.new_zeros(*shape, *event), has.new_zeros(shape)
        chains[: len(old), : old.shape[1]] = old
        started[: len(old), : old.shape[1]] = has
        return chains, started

    def _augmented(self, chains: Tensor, energy: UnnormalizedEnergy, name: str) -> Tensor:
        assert self.augmentation is not None
        moved = self.augmentation(chains.clone())
        same = isinstance(moved, Tensor) and moved.shape == chains.shape
        if same and moved.isfinite().all() and energy.support.check(moved).all():
            return moved.detach().to(chains)
        raise ValueError(
            f"augmentation turned the chains of site {name!r}, of shape {tuple(chains.shape)} on"
            f" {energy.support}, into {shown(moved)}: it must return points of that shape and"
            " support"
        )


def groups_of(site: EnergySite, chains_by: str) -> Tensor:
    """The group of each row of a site, integers of shape ``(*batch)``.

    Args:
        site: the site.
        chains_by: the name of the site of the model that holds them.

    Raises:
        ValueError: if there is no such site, or it does not hold an index from 0 for each row.
    """
    if chains_by not in site.nodes:
        raise ValueError(
            f"chains_by={chains_by!r}, and the model has no site of that name: it names the site"
            f" that holds the class, or the index, of each row of site {site.name!r}, such as"
            f" pyro.deterministic({chains_by!r}, index)"
        )
    value = site.nodes[chains_by]["value"].detach()
    try:
        groups = value.reshape(value.shape + (1,) * site.inner_dims).expand(site.batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"site {chains_by!r} of chains_by has shape {tuple(value.shape)}, the rows of site"
            f" {site.name!r} have {tuple(site.batch_shape)}: give one index for each row"
        ) from error
    if site.mask is not None:
        groups = torch.where(site.mask, groups, 0)
    if (groups != groups.long()).any() or (groups < 0).any():
        raise ValueError(
            f"site {chains_by!r} of chains_by must hold an integer >= 0 for each row, the class or"
            f" the index of it, got {shown(value)}"
        )
    return groups.long()


def _refuse_conditional(site: EnergySite, groups: Tensor | None = None) -> None:
    """Raises a ValueError where persistent chains would be draws of no row's density."""
    if site.has_latent_in(site.energy.unnormalized_log_prob(site.x.detach())):
        raise ValueError(
            f"a latent stands in front of the energy of site {site.name!r}: it is drawn anew"
            " at each step, and persistent chains would belong to its last values. Use"
            " persistent=False with more num_steps"
        )
    if rows_differ(site, groups):
        raise ValueError(
            f"the energy of site {site.name!r} is conditional: its rows"
            f"{'' if groups is None else ' of one group of chains_by'} have different densities,"
            " and a persistent chain would belong to no row in the next minibatch. Name by"
            " chains_by= a site whose value says which rows have one density, as the class or the"
            " index of each row; or use persistent=False with more num_steps"
        )


def rows_differ(site: EnergySite, groups: Tensor | None = None) -> bool:
    """Whether the density of one and the same point, or its gradient, depends on the row.

    Args:
        site: the site.
        groups: of rows, shape ``(*batch)``, to compare with each other alone.
    """
    if groups is None and site.energy.unexpanded.batch_shape:
        return True
    if site.batch_shape.numel() < 2:
        return False
    point = site.x.detach().reshape((-1,) + site.energy.event_shape)[0]
    with eval_mode(site.energy.modules):
        energies = -site.energy.unnormalized_log_prob(point.expand(site.x.shape).clone())
    first = torch.zeros((), dtype=torch.long, device=energies.device)
    mask = None if groups is None else site.mask
    if groups is not None:
        if mask is not None:  # rows without data are a group of their own
            groups = torch.where(mask, groups, groups.max() + 1)
        _, of_row = groups.flatten().unique(return_inverse=True)
        order = of_row.argsort(stable=True)
        first = order[torch.searchsorted(of_row[order], of_row)].reshape(energies.shape)
    apart = energies - energies.flatten()[first]
    if mask is not None:
        apart = torch.where(mask, apart, 0.0)
    if (apart.abs() > 1e-4 + 1e-3 * energies.abs().max()).any():
        return True
    parameters = list(leaves(energies))
    if not parameters:
        return False
    # a network whose last layer starts at 0 differs in its gradient only
    weights = torch.linspace(-1.0, 1.0, apart.numel()).to(apart).reshape(apart.shape)
    sizes = [
        sum(grad.abs().sum() for grad in grads if grad is not None)
        for grads in (
            torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            for output in ((weights * apart).sum(), energies.sum())
        )
    ]
    return bool(sizes[0] > 1e-4 * sizes[1])
