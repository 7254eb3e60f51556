r"""The walk of a population along a path: reweight, resample, move.

At each temperature :math:`\beta_t` the particles get the weights
:math:`\tilde p_{\beta_t}(z) / \tilde p_{\beta_{t-1}}(z)`, are resampled where these have become
uneven, and are moved by a kernel that leaves :math:`\tilde p_{\beta_t}` invariant. The mean weights
of all temperatures, multiplied, are the estimate of :math:`Z_1 / Z_0`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.evidence.smc.moves import Mover
from pyro_ebm.evidence.smc.particles import ess_share, next_beta, of_ancestors, systematic
from pyro_ebm.files import Saved, random_state, set_random_state
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.estimate_result import check_weights, log_mean_exp

MAX_TEMPERATURES = 500


class Temperature(NamedTuple):
    """What happened at a temperature."""

    beta: float
    ess: float
    """The effective sample size of the weights, as a share of the particles."""
    resampled: bool
    moves: int
    """How many transitions were made."""
    acceptance: float
    """The mean acceptance probability at the end, of the kernel that accepts least."""
    correlation: float
    """Of the potential with that before the transitions."""
    step_size: float
    ancestors: int
    """How many draws of the start have descendants."""
    log_ratio: float
    """The estimate so far of the log of the integral, over that at the start."""


class TemperedRun:
    """A population on its way.

    Args:
        path: the densities.
        kernel: bound to the path, without a warmup.
        ranks: share out the particles.
        num_particles: how many there are on all ranks.
        drop: the share of the conditional effective sample size that a temperature may cost.
        threshold: the share of effective particles below which they are resampled.
        num_moves: transitions at each temperature; None until enough.

    Attributes:
        z: positions of the particles here, shape ``(here, dim)``.
        log_w: log weights of all particles, whose mean is the estimate, shape ``(N,)``.
        ancestors: the number of the ancestor of each, shape ``(N,)``.
        temperatures: what happened.
    """

    def __init__(
        self,
        path: AnnealingPath,
        kernel: Kernel,
        ranks: ProcessGroup,
        num_particles: int,
        drop: float,
        threshold: float,
        num_moves: int | None,
    ):
        self.path, self.kernel, self.ranks = path, kernel, ranks
        self.drop, self.threshold, self.num_particles = drop, threshold, num_particles
        self.mover = Mover(kernel, ranks, num_moves)
        self.here = ranks.here(num_particles)
        self.beta = 0.0
        self.z = torch.empty(0)
        self.log_w = torch.zeros(num_particles, dtype=torch.float64, device=path.device)
        self.ancestors = torch.arange(num_particles, device=path.device)
        self.temperatures: list[Temperature] = []

    def start(self) -> None:
        """Draws the particles from the start of the path."""
        self.z = self.path.at(0.0).draw(self.here.stop - self.here.start)

    @property
    def done(self) -> bool:
        """Whether the particles are at the target."""
        return self.beta == 1.0

    def advance(self) -> None:
        """Goes on to the next temperature.

        Raises:
            ValueError: if weights are NaN or infinite, or the temperatures do not end.
        """
        if len(self.temperatures) >= MAX_TEMPERATURES:
            raise ValueError(
                f"after {MAX_TEMPERATURES} temperatures the particles have come to"
                f" beta={self.beta:.6g} only: the density may be improper, or the start too far"
                " from it. Give guide=, a density that is nearer, or a larger ess_drop="
            )
        path, first = self.path, not self.temperatures
        log_g = self._ratio()
        self.beta = next_beta(log_g, self.log_w, self.beta, self.drop)
        self.log_w = self.log_w + log_g(self.beta)
        share, log_ratio = ess_share(self.log_w), float(log_mean_exp(self.log_w))
        if resampled := share < self.threshold or (self.beta == 1.0 and share < 1 - 1e-9):
            self._resample()
        path.at(self.beta)
        moved = self.mover(self.z, self.log_w[self.here], first)
        self.z = moved.state.z
        kept = self.ancestors[self.log_w > -torch.inf]
        self.temperatures.append(
            Temperature(
                beta=self.beta,
                ess=share,
                resampled=resampled,
                moves=moved.moves,
                acceptance=moved.acceptance,
                correlation=moved.correlation,
                step_size=self.kernel.mean_step_size if path.dim else math.nan,
                ancestors=len(kept.unique()),
                log_ratio=log_ratio,
            )
        )

    def _ratio(self) -> Callable[[float], Tensor]:
        """The log weights of a step to a beta, of all particles."""
        path, beta = self.path, self.beta
        with torch.no_grad():
            parts = [self.ranks.rows(part).double() for part in path.parts(self.z)]

        def log_g(new: float) -> Tensor:
            # p~_{beta'}(z) / p~_beta(z) = exp(U_beta(z) - U_beta'(z)); a weight of 0 stays 0
            ratio = path.at(beta).combine(*parts) - path.at(new).combine(*parts)
            return torch.where(self.log_w == -torch.inf, 0.0, ratio)

        check_weights(self.log_w + log_g(1.0), "tempering")
        return log_g

    def _resample(self) -> None:
        u = float(self.ranks.from_first(torch.rand((), dtype=torch.float64)))
        index = systematic(self.log_w, u)
        self.z = self.ranks.rows(self.z)[index][self.here].contiguous()
        self.ancestors = self.ancestors[index]
        self.log_w = torch.full_like(self.log_w, float(log_mean_exp(self.log_w)))

    @property
    def log_weights(self) -> Tensor:
        """The log of what each ancestor's descendants estimate, shape ``(N,)``."""
        return of_ancestors(self.log_w, self.ancestors)

    def state_dict(self) -> Saved:
        """Everything that the coming temperatures depend on, the random state included."""
        return {
            "beta": self.beta,
            "z": self.z,
            "log_w": self.log_w,
            "ancestors": self.ancestors,
            "temperatures": [list(t) for t in self.temperatures],
            "kernel": self.kernel.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another run was."""
        device = self.path.device
        self.beta = state["beta"]
        self.z, self.log_w, self.ancestors = (
            state[name].to(device) for name in ("z", "log_w", "ancestors")
        )
        self.temperatures = [Temperature(*t) for t in state["temperatures"]]
        self.path.at(self.beta)
        self.kernel.load_state_dict(state["kernel"])

    def restore_random_state(self, state: Saved) -> None:
        """Goes on with the random numbers of another run, see :meth:`load_state_dict`."""
        set_random_state(state["random"])
