r"""Warmup: the step size and the mass matrix, learned in Stan's windows.

A warmup has a *fast* start in which chains find the bulk and only the step size adapts, *slow*
windows of doubling length at whose ends the covariance of the draws becomes the new mass matrix,
and a *fast* end that settles the step size. Covariances are pooled over the chains of a target, so
that many chains learn in a short warmup what one chain needs a long one for.

Until the fast end each chain has a step size of its own. A Metropolis-adjusted chain that starts
far out rejects every step of the size that suits the bulk, and would stand there, unseen in the
mean acceptance of the others, and spoil the covariance; with its own small step it comes in. The
fast end starts from the median of a target's step sizes, and adapts one for all of its chains.

Where chains are shared out over processes, "all" are those of all of them
(:mod:`pyro_ebm.mcmc.ranks`): means and medians each time that they are taken, covariances
once, at the end of a window.

Reference:
    Stan Development Team, Stan Reference Manual, "HMC algorithm parameters". Nesterov (2009),
    Primal-dual subgradient methods for convex problems. Hoffman and Gelman (2014), The No-U-Turn
    sampler.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.adaptation.dual_averaging import TensorAveraging
from pyro_ebm.mcmc.adaptation.metric import PooledCovariance, mass_matrix_factor
from pyro_ebm.mcmc.ranks import current
from pyro_ebm.mcmc.state import to_device

START_BUFFER, FIRST_WINDOW, END_BUFFER = 75, 25, 50
POOLED_AT_ONCE = 2**16  # numbers


def slow_windows(warmup_steps: int) -> list[tuple[int, int]]:
    """The windows ``[start, end)`` after which the mass matrix is renewed.

    Example:
        >>> slow_windows(500)
        [(75, 100), (100, 150), (150, 250), (250, 450)]
        >>> slow_windows(100)
        [(15, 90)]
        >>> slow_windows(10)
        []
    """
    if warmup_steps < 20:
        return []
    start, size, end = START_BUFFER, FIRST_WINDOW, warmup_steps - END_BUFFER
    if warmup_steps < START_BUFFER + FIRST_WINDOW + END_BUFFER:
        start = int(0.15 * warmup_steps)
        end = warmup_steps - int(0.1 * warmup_steps)
        size = end - start
    windows = []
    while start < end:
        stop = start + size
        if stop + 2 * size > end:  # the next window would not fit: take what is left
            stop = end
        windows.append((start, stop))
        start, size = stop, 2 * size
    return windows


def settling_step(warmup_steps: int) -> int:
    """The step at which the fast end begins, and the chains of a target share one step size.

    Example:
        >>> settling_step(500), settling_step(100), settling_step(10)
        (450, 90, 5)
    """
    windows = slow_windows(warmup_steps)
    return windows[-1][1] if windows else warmup_steps // 2


class Adaptation:
    r"""Step size :math:`\varepsilon` and mass matrix of the chains of each target.

    The inverse mass matrix is the covariance :math:`\Sigma = L L^\top` of the draws; kernels use
    its factor :math:`L`.

    Args:
        targets: number of targets.
        dim: dimension of a position.
        warmup_steps: length of the warmup.
        step_size: the first step size.
        like: a tensor of the dtype and device.
        adapt_step_size: whether to adapt it.
        adapt_mass_matrix: whether to adapt it; the identity otherwise.
        full_mass: dense or diagonal.
        target_accept_prob: the mean acceptance probability to reach.
        max_step_size: no step size is larger, if given.

    Attributes:
        inverse_mass_sqrt: :math:`L`, shape ``(targets, dim)`` or ``(targets, dim, dim)``; None is
            the identity.
    """

    def __init__(
        self,
        targets: int,
        dim: int,
        warmup_steps: int,
        step_size: float,
        like: Tensor,
        adapt_step_size: bool,
        adapt_mass_matrix: bool,
        full_mass: bool,
        target_accept_prob: float,
        max_step_size: float | None = None,
    ):
        self.max_step_size = max_step_size
        self.targets, self.warmup_steps = targets, warmup_steps
        self.adapt_step_size, self.adapt_mass_matrix = adapt_step_size, adapt_mass_matrix
        self.full_mass, self.target_accept_prob = full_mass, target_accept_prob
        self.step_size = torch.full((targets,), step_size, dtype=like.dtype, device=like.device)
        self.t = 0
        self._windows = slow_windows(warmup_steps) if adapt_mass_matrix else []
        self.inverse_mass_sqrt: Tensor | None = None
        if self._windows:
            ones = torch.ones(targets, dim, dtype=like.dtype, device=like.device)
            self.inverse_mass_sqrt = torch.diag_embed(ones) if full_mass else ones
        self.ranks = current()
        self._typical = torch.empty(0), torch.empty(0)  # of which step sizes, and the median
        self._own = False  # whether each chain has a step size of its own
        self._pool = PooledCovariance(targets, full_mass)
        self._waiting: list[Tensor] = []  # positions to be pooled
        self.restart(self.step_size)

    @property
    def step_size(self) -> Tensor:
        """Shape ``(targets,)``; from :meth:`start` to the fast end of the warmup ``(chains,)``.

        It changes by another tensor in its place: what is computed of one is kept, so never write
        into it.
        """
        return self._step_size

    @step_size.setter
    def step_size(self, step_size: Tensor) -> None:
        top = self.max_step_size
        self._step_size = step_size if top is None else step_size.clamp(max=top)

    @property
    def active(self) -> bool:
        """Whether the warmup is still running."""
        return self.t < self.warmup_steps

    def start(self, num_chains: int) -> None:
        """Gives each of this many chains a step size of its own."""
        if self.adapt_step_size and self.t < settling_step(self.warmup_steps):
            self._own = True
            self.restart(self.step_size.repeat(num_chains // self.step_size.shape[0]))

    def pooled(self, accept_prob: Tensor) -> Tensor:
        """The mean over the chains that share a step size, of the shape of ``step_size``."""
        sharing = accept_prob.reshape(-1, self.step_size.shape[0])
        return sharing.mean(0) if self._own else self.ranks.mean(sharing)

    def typical_step_size(self) -> Tensor:
        """The median of each target's step sizes, shape ``(targets,)``."""
        if self._typical[0] is not self.step_size:
            self._typical = self.step_size, self._median(self.step_size)
        return self._typical[1]

    def _median(self, step_size: Tensor) -> Tensor:
        if self._own:
            step_size = self.ranks.rows(step_size)
        return step_size.reshape(-1, self.targets).median(0).values

    def restart(self, step_size: Tensor) -> None:
        """Starts the search for the step size again, from here."""
        self.step_size = step_size
        self._averaging = TensorAveraging(self.step_size.log())

    def update(self, z: Tensor, accept_prob: Tensor) -> bool:
        """Learns from one transition of all chains.

        Args:
            z: the new positions, shape ``(chains, dim)``.
            accept_prob: the acceptance probabilities, shape ``(chains,)``.

        Returns:
            Whether the mass matrix is new, so that the step size must be found again.
        """
        if not self.active:
            return False
        renewed = False
        if self.adapt_step_size:
            error = self.target_accept_prob - self.pooled(accept_prob)
            self._averaging.step(error)
            now, average = self._averaging.get_state()
            self.step_size = now.exp()
            if self.t + 1 == settling_step(self.warmup_steps):
                self.restart(self._median(average.exp()))
                self._own = False
        if self._windows and self.t >= self._windows[0][0]:
            self._waiting.append(z)
            if len(self._waiting) * z.numel() >= POOLED_AT_ONCE:
                self._pool_positions()
            if self.t + 1 == self._windows[0][1]:
                self._renew_factor()
                self._windows.pop(0)
                renewed = True
        self.t += 1
        if self.t == self.warmup_steps and self.adapt_step_size:
            self.step_size = self._averaging.get_state()[1].exp()
        return renewed

    def state_dict(self) -> dict[str, Any]:
        """What was learned so far, for :meth:`load_state_dict`."""
        return {
            "t": self.t,
            "step_size": self.step_size,
            "own": self._own,
            "inverse_mass_sqrt": self.inverse_mass_sqrt,
            "windows": list(self._windows),
            "covariance": self._pool.state_dict(),
            "waiting": list(self._waiting),  # to be pooled together, as they would have been
            "averaging": self._averaging.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another adaptation with the same arguments was."""
        device = self.step_size.device
        self.t, self._windows = state["t"], list(state["windows"])
        self._own = state["own"]
        self.step_size = to_device(state["step_size"], device)
        self.inverse_mass_sqrt = to_device(state["inverse_mass_sqrt"], device)
        self._pool.load_state_dict(state["covariance"], device)
        waiting = state.get("waiting", ())  # in older files everything is pooled
        self._waiting = [to_device(z, device) for z in waiting]
        self._averaging.load_state_dict(state["averaging"], device)

    def _pool_positions(self) -> None:
        if self._waiting:  # each target's rows stay that target's
            self._pool.update(torch.cat(self._waiting))
            self._waiting = []

    def _renew_factor(self) -> None:
        self._pool_positions()
        pool = self._pool.over_ranks(self.ranks)
        if pool.count < 2:
            return
        assert self.inverse_mass_sqrt is not None
        self.inverse_mass_sqrt = mass_matrix_factor(pool, self.inverse_mass_sqrt)
        self._pool = PooledCovariance(self.targets, self.full_mass)
