"""What a run of many chains keeps, and what it shows while it runs."""

import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions.transforms import Transform
from tqdm.auto import tqdm

from pyro_ebm.mcmc.kernel import Info, Kernel, State
from pyro_ebm.mcmc.potential import Potential, to_support


class Draws:
    """Preallocated positions and statistics of all chains, kept flat and unconstrained.

    Args:
        potential: tells the sites.
        keep: the names of the sites to keep.
        num_steps: how many transitions will be added.
        thinning: every ``thinning``-th of them is kept.
        state: of the chains, tells their number.
    """

    def __init__(
        self, potential: Potential, keep: list[str], num_steps: int, thinning: int, state: State
    ):
        self.thinning = thinning
        self.count = self.seen = 0
        self.capacity, chains = num_steps // thinning, state.z.shape[0]
        self.sites = [site for site in potential.sites if site.name in keep]
        self.columns: Tensor | None = None
        if len(self.sites) < len(potential.sites):
            columns = torch.arange(potential.dim, device=state.z.device).split(potential.sizes)
            of_site = dict(zip(potential.names, columns, strict=True))
            self.columns = torch.cat([of_site[site.name] for site in self.sites])
        dim = sum(site.shape.numel() for site in self.sites)
        self.z = state.z.new_empty(self.capacity, chains, dim)
        self.stats = {
            name: state.potential.new_empty(self.capacity, chains)
            for name in (potential.lp_name, "acceptance_rate", "step_size")
        }
        self.stats["diverging"] = torch.empty_like(self.stats["step_size"], dtype=torch.bool)

    def add(self, state: State, info: Info, step_size: Tensor, own: Mapping[str, Tensor]) -> None:
        """Takes what a transition gave; the step size is that it was made with."""
        self.seen += 1
        if self.count == self.capacity or self.seen % self.thinning:
            return
        self.z[self.count] = state.z if self.columns is None else state.z[:, self.columns]
        for name, value in own.items():
            if name not in self.stats:
                self.stats[name] = value.new_empty(self.stats["step_size"].shape)
        values = (-state.potential, info.accept_prob, step_size, info.diverging, *own.values())
        for stat, value in zip(self.stats.values(), values, strict=True):
            stat[self.count] = value
        self.count += 1

    def samples(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """Each site's draws in its support, shape ``(chains, draws, *site)``."""
        z = self.z[: self.count].transpose(0, 1)
        parts = z.split([site.shape.numel() for site in self.sites], -1)
        found = {}
        for site, part in zip(self.sites, parts, strict=True):
            value = part.reshape(z.shape[:-1] + site.shape).to(site.dtype)
            transform = transforms.get(site.name)
            found[site.name] = value if transform is None else to_support(transform, value)
        return dict(sorted(found.items()))

    def fields(self) -> dict[str, Tensor]:
        """The statistics of each draw, shape ``(chains, draws)``."""
        return {name: stat[: self.count].T.contiguous() for name, stat in self.stats.items()}


class Chain:
    """The unconstrained draws of one chain that runs by itself."""

    def __init__(self) -> None:
        self.warmup: list[dict[str, Tensor]] = []
        self.warmup_stats: list[dict[str, Any]] = []
        self.draws: list[dict[str, Tensor]] = []


def stack(
    chains: list[list[dict[str, Tensor]]], transforms: Mapping[str, Transform] | None
) -> dict[str, Tensor]:
    """Each site's draws in its support, shape ``(chains, draws, *site)``."""
    if not chains[0]:
        return {}
    found = {}
    for name in chains[0][0]:
        z = torch.stack([torch.stack([params[name] for params in chain]) for chain in chains])
        transform = (transforms or {}).get(name)
        found[name] = z if transform is None else to_support(transform, z)
    return found


def warmup_fields_of(chains: list[Chain]) -> dict[str, Tensor]:
    """The statistics of each warmup step, shape ``(chains, steps)``; none of Pyro's own kernels."""
    names = chains[0].warmup_stats[0] if chains[0].warmup_stats else {}
    return {
        name: torch.tensor([[stats[name] for stats in chain.warmup_stats] for chain in chains])
        for name in names
    }


def fields_of(
    diagnostics: list[dict[str, Any]], num_draws: int, thinning: int
) -> dict[str, Tensor]:
    """The statistics of each draw from what the kernel of each chain says at its end.

    Args:
        diagnostics: one dict for each chain, with all ``"sample_stats"``, or ``"divergences"``.
        num_draws: how many draws there are after thinning; an interrupt may leave a statistic more.
        thinning: every ``thinning``-th transition is a draw.

    Returns:
        Shapes ``(chains, draws)``.
    """
    thin = slice(thinning - 1, thinning * num_draws, thinning)
    if all("sample_stats" in told for told in diagnostics):
        stats = [told["sample_stats"] for told in diagnostics]
        return {name: torch.stack([s[name][thin] for s in stats]) for name in stats[0]}
    if all("divergences" in told for told in diagnostics):
        steps = torch.arange(thinning * num_draws)
        rows = [torch.isin(steps, torch.tensor(told["divergences"])) for told in diagnostics]
        return {"diverging": torch.stack(rows)[:, thin]}
    return {}


def cut_short(got: int, wanted: int, what: str = "draws per chain") -> None:
    """Warns that a run was cut short."""
    warnings.warn(f"interrupted: {got} of {wanted} {what} are kept", stacklevel=3)


class Bar:
    """A progress bar that asks the chains for numbers only when it redraws.

    Args:
        total: number of transitions.
        num_chains: how many chains each of them moves.
        disable: whether to show nothing.
        chain: the chain, if they run one after another.
    """

    EVERY = 0.2
    """Seconds between two looks at the chains."""

    def __init__(self, total: int, num_chains: int, disable: bool, chain: int | None = None):
        self.label = f"{num_chains} chain{'s' * (num_chains > 1)}"
        if chain is not None:
            self.label = f"chain {chain}"
        self.bar = tqdm(total=total, disable=disable, desc=self.label, mininterval=self.EVERY)
        self.shown = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def update(self, stage: str, kernel: MCMCKernel, info: Info | None = None) -> None:
        """Counts a transition; without its ``info``, the kernel's ``logging`` is shown."""
        self.bar.update()
        if self.bar.disable:
            return
        now, last = time.monotonic(), self.bar.n == self.bar.total
        if now - self.shown < self.EVERY and not last:
            return
        self.shown = now
        self.bar.set_description(f"{stage}, {self.label}", refresh=False)
        if info is None:
            text = ", ".join(f"{name} {value}" for name, value in (kernel.logging() or {}).items())
        else:
            assert isinstance(kernel, Kernel)
            rate = float(info.accept_prob.mean())
            step_size = float(kernel.adaptation.step_size.mean())
            text = f"acceptance {rate:.2f}, step size {step_size:.2e}"
        self.bar.set_postfix_str(text, refresh=last)
