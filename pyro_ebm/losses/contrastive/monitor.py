"""Estimates of log Z and of the likelihood while a loss trains."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.files import Saved
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count, shown


class Monitor:
    """Estimates log Z of a site's energy, at the first step and at each of so many.

    It uses random numbers of its own, so that training goes on as without it.

    Args:
        estimate: a function from an energy to its log Z, or to an estimate with a ``value``.
        every: after how many steps it is called again.

    Raises:
        TypeError: for an estimate that is no function.
        ValueError: for a number of steps below 1.
    """

    def __init__(self, estimate: Callable[[UnnormalizedEnergy], object] | None, every: int):
        if estimate is not None and not callable(estimate):
            raise TypeError(f"monitor must be a function of an energy, got {shown(estimate)}")
        self.estimate, self.every = estimate, check_count("monitor_every", every)
        self._steps_seen: dict[str, int] = {}
        self._found: dict[str, dict[str, Tensor]] = {}

    def watch(self, site: EnergySite, energy: UnnormalizedEnergy) -> dict[str, Tensor]:
        """``log_normalizer`` and the mean ``log_likelihood`` of the rows, as last estimated."""
        if self.estimate is None:
            return {}
        seen = self._steps_seen.get(site.name, 0)
        self._steps_seen[site.name] = seen + 1
        if seen % self.every == 0:
            cuda = [site.x.device] if site.x.device.type == "cuda" else []
            with torch.random.fork_rng(cuda), torch.no_grad():
                estimate = self.estimate(energy)
                log_z = torch.as_tensor(getattr(estimate, "value", estimate)).to(site.x.device)
                density = site.energy.unnormalized_log_prob(site.x)
            self._found[site.name] = {
                "log_normalizer": log_z.detach().mean(),
                "log_likelihood": site.mean(density - log_z),
            }
        return self._found[site.name]

    def state_dict(self) -> Saved:
        """The number of steps seen, and the last estimates."""
        found = {name: dict(values) for name, values in self._found.items()}
        return {"steps_seen": dict(self._steps_seen), "monitored": found}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._steps_seen = dict(state["steps_seen"])
        self._found = {name: dict(values) for name, values in state["monitored"].items()}
