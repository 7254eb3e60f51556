r"""Warmup: the step size and the mass matrix, learned in Stan's windows.

A warmup has a *fast* start in which chains find the bulk and only the step size adapts, *slow*
windows of doubling length at whose ends the covariance of the draws becomes the new mass matrix,
and a *fast* end that settles the step size. Covariances are pooled over the chains of a group, so
that many chains learn in a short warmup what one chain needs a long one for.

Until the fast end each chain has a step size of its own. A Metropolis-adjusted chain that starts
far out rejects every step of the size that suits the bulk, and would stand there, unseen in the
mean acceptance of the others, and spoil the covariance; with its own small step it comes in. The
fast end starts from the median of a group's step sizes, and adapts one for all of its chains.

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
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from pyro_ebm.mcmc.ranks import ProcessGroup, current

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
    """When the fast end begins, and the chains of a group share one step size.

    Example:
        >>> settling_step(500), settling_step(100), settling_step(10)
        (450, 90, 5)
    """
    windows = slow_windows(warmup_steps)
    return windows[-1][1] if windows else warmup_steps // 2


class PooledCovariance:
    r"""Welford's running mean and (co)variance, fed by all chains of each group at once.

    Args:
        targets: number of groups.
        dense: whether to keep the whole matrix or its diagonal.

    Reference:
        Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance.

    Example:
        >>> stats = PooledCovariance(targets=1, dense=False)
        >>> stats.update(torch.tensor([[0.0], [2.0]]))
        >>> stats.update(torch.tensor([[4.0], [6.0]]))
        >>> stats.covariance()  # of 0, 2, 4, 6
        tensor([[6.6667]])
    """

    def __init__(self, targets: int, dense: bool):
        self.targets, self.dense = targets, dense
        self.count = 0
        self.mean: Tensor | None = None
        self.moment: Tensor | None = None

    def update(self, z: Tensor) -> None:
        """Adds positions, shape ``(chains, dim)``."""
        z = z.reshape(-1, self.targets, z.shape[-1])
        count, mean = z.shape[0], z.mean(0)
        moment = self._outer(z - mean)
        if self.mean is None or self.moment is None:
            self.count, self.mean, self.moment = count, mean, moment
            return
        # M2(a + b) = M2(a) + M2(b) + (mean_a - mean_b)^2 n_a n_b / (n_a + n_b)
        total = self.count + count
        delta = mean - self.mean
        between = self._outer(delta[None]) * (self.count * count / total)
        self.moment = self.moment + moment + between
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """The variances ``(targets, dim)``, or covariances ``(targets, dim, dim)`` if dense."""
        if self.moment is None or self.count < 2:
            raise RuntimeError("a covariance needs at least two positions")
        return self.moment / (self.count - 1)

    def over_ranks(self, ranks: ProcessGroup) -> "PooledCovariance":
        """What those of all ranks were fed together; a collective call."""
        if ranks.size == 1 or self.mean is None or self.moment is None:
            return self
        # M2 = sum_r  M2_r + n_r (mean_r - mean)^2
        pooled = PooledCovariance(self.targets, self.dense)
        count = self.mean.new_tensor([self.count])
        total = ranks.total(torch.cat([count, (self.count * self.mean).flatten()]))
        pooled.count = int(total[0])
        pooled.mean = (total[1:] / total[0]).reshape(self.mean.shape)
        between = self._outer((self.mean - pooled.mean)[None]) * self.count
        pooled.moment = ranks.total(self.moment + between)
        return pooled

    def state_dict(self) -> dict[str, Any]:
        """What it was fed, see :meth:`load_state_dict`."""
        return {"count": self.count, "mean": self.mean, "moment": self.moment}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from where another one was."""
        self.count = state["count"]
        self.mean, self.moment = (to_device(state[name], device) for name in ("mean", "moment"))

    def _outer(self, delta: Tensor) -> Tensor:
        if self.dense:
            return torch.einsum("cgi,cgj->gij", delta, delta)
        return delta.square().sum(0)


class TensorAveraging(DualAveraging):
    r"""Nesterov's dual averaging for each element of a tensor, in few operations.

    Args:
        prox_center: where the search starts, and what it is drawn to.

    Example:
        >>> averaging = TensorAveraging(torch.zeros(2))
        >>> averaging.step(torch.tensor([0.0, 1.1]))
        >>> averaging.get_state()[0]
        tensor([ 0., -2.])
    """

    prox_center: Any

    def __init__(self, prox_center: Tensor):
        super().__init__(prox_center)  # pyright: ignore[reportArgumentType]

    def reset(self) -> None:
        """Starts again from the center."""
        self._t: Any = 0
        self._x_t: Any = None
        self._x_avg: Any = torch.zeros_like(self.prox_center)
        self._g_avg: Any = torch.zeros_like(self.prox_center)

    def get_state(self) -> Any:
        """The latest point, and the average of all."""
        return super().get_state()

    def step(self, g: Any) -> None:
        """Takes one more gradient, of the shape of the center."""
        self._t += 1
        t = self._t
        self._g_avg = torch.lerp(self._g_avg, g.to(self._g_avg.dtype), 1 / (t + self.t0))
        self._x_t = torch.sub(self.prox_center, self._g_avg, alpha=t**0.5 / self.gamma)
        weight = t**-self.kappa  # lerp knows no infinities, and the logarithm of 0 is one
        self._x_avg = torch.add(self._x_avg * (1 - weight), self._x_t, alpha=weight)


class Adaptation:
    r"""Step size :math:`\varepsilon` and mass matrix of the chains of each group.

    The inverse mass matrix is the covariance :math:`\Sigma = L L^\top` of the draws; kernels use
    its factor :math:`L`.

    Args:
        targets: number of groups of chains.
        dim: dimension of a position.
        warmup_steps: length of the warmup.
        step_size: the first step size.
        like: a tensor that tells dtype and device.
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
        """The median of each group's step sizes, shape ``(targets,)``."""
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
        """What it has learned, see :meth:`load_state_dict`."""
        return {
            "t": self.t,
            "step_size": self.step_size,
            "own": self._own,
            "inverse_mass_sqrt": self.inverse_mass_sqrt,
            "windows": list(self._windows),
            "covariance": self._pool.state_dict(),
            "waiting": list(self._waiting),  # to be pooled together, as they would have been
            "averaging": {name: getattr(self._averaging, name) for name in _AVERAGING},
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
        for name in _AVERAGING:
            setattr(self._averaging, name, to_device(state["averaging"][name], device))

    def _pool_positions(self) -> None:
        if self._waiting:  # rows of a group stay rows of that group
            self._pool.update(torch.cat(self._waiting))
            self._waiting = []

    def _renew_factor(self) -> None:
        self._pool_positions()
        pool = self._pool.over_ranks(self.ranks)
        if pool.count < 2:
            return
        # Shrunk, as in Stan, with the weight of five draws towards 1/1000 of what was believed
        # before. A dense matrix is also shrunk towards its diagonal: else a direction in which the
        # few draws of a first window hardly moved is taken for narrow, and never moved in again.
        n, new = pool.count, pool.covariance()
        belief = 1e-3 * _not_none(self.inverse_mass_sqrt).square()
        if self.full_mass:  # the diagonal of L L^T is the row sum of squares
            belief = torch.diag_embed(belief.sum(-1) + new.diagonal(dim1=-2, dim2=-1))
        new = (n * new + 5 * belief) / (n + 5)
        self.inverse_mass_sqrt = _cholesky(new) if self.full_mass else new.sqrt()
        self._pool = PooledCovariance(self.targets, self.full_mass)


def _cholesky(covariance: Tensor) -> Tensor:
    """The Cholesky factors of a batch; the diagonal's root where rounding made one indefinite."""
    inverse_mass_sqrt, info = torch.linalg.cholesky_ex(covariance)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1).sqrt())
    # laid out by rows, as the first one: a compiled graph is for one layout
    return torch.where((info == 0)[:, None, None], inverse_mass_sqrt, diagonal).contiguous()


_AVERAGING = ("prox_center", "_x_avg", "_g_avg", "_x_t", "_t")  # of Pyro's DualAveraging


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of a tensor on the device; anything else as it is."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
