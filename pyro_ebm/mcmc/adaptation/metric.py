r"""The mass matrix of a window of the warmup, pooled over chains and ranks.

Positions, and their gradients where a kernel has them, come transition by transition; at the end of
the window they make the new factor :math:`L` of the inverse mass matrix: with gradients the one of
:mod:`pyro_ebm.mcmc.adaptation.fisher`, without them that of the covariance of positions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.fisher import dense_covariance, diagonal_scales, low_rank_factor
from pyro_ebm.mcmc.ranks import ProcessGroup, current
from pyro_ebm.mcmc.state import to_device
from pyro_ebm.ops.steps.precondition import Factor, LowRank

Kind = Literal["diagonal", "dense", "low_rank"]
FullMass = bool | Literal["auto", "low_rank"]
MAX_DENSE = 200
"""The most dimensions for which ``full_mass="auto"`` is dense."""
MAX_DENSE_WORK, MAX_LOW_RANK_TARGETS = 2**27, 16
"""The most ``targets * dim**3`` of a dense matrix, and the most targets of a low-rank one."""
MAX_RANK = 32
"""The most directions of a low-rank factor."""
MAX_ROWS = 2048
"""The most rows that make a low-rank factor, unless one transition has more."""
POOLED_AT_ONCE = 2**16  # numbers


class PooledCovariance:
    r"""Welford's running mean and (co)variance of the chains of each target.

    Args:
        targets: number of targets.
        dense: whether to keep the whole matrix or its diagonal.

    Reference:
        Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance.

    Example:
        >>> stats = PooledCovariance(targets=1, dense=False)
        >>> stats.update(torch.tensor([[0.0], [2.0]]))
        >>> stats.update(torch.tensor([[4.0], [6.0]]))
        >>> stats.covariance()  # of 0, 2, 4, 6
        tensor([[6.6667]], dtype=torch.float64)
    """

    def __init__(self, targets: int, dense: bool):
        self.targets, self.dense = targets, dense
        self.count: Tensor | None = None
        self.mean: Tensor | None = None
        self.moment: Tensor | None = None

    def update(self, z: Tensor, weight: Tensor | None = None) -> None:
        """Adds positions ``(chains, dim)``, those of weight 1 of the ``weight`` ``(chains,)``."""
        z = z.double().reshape(-1, self.targets, z.shape[-1])
        weight = z.new_ones(z.shape[:2]) if weight is None else weight.to(z).reshape(z.shape[:2])
        count = weight.sum(0)
        mean = torch.einsum("cg,cgi->gi", weight, z) / count.clamp_min(1)[:, None]
        moment = self._outer(weight, z - mean)
        if self.count is None or self.mean is None or self.moment is None:
            self.count, self.mean, self.moment = count, mean, moment
            return
        # M2(a + b) = M2(a) + M2(b) + (mean_a - mean_b)^2 n_a n_b / (n_a + n_b)
        share = count / (self.count + count).clamp_min(1)
        delta = mean - self.mean
        self.moment = self.moment + moment + self._outer((self.count * share)[None], delta[None])
        self.mean = self.mean + delta * share[:, None]
        self.count = self.count + count

    def covariance(self) -> Tensor:
        """The variances ``(targets, dim)``, or covariances ``(targets, dim, dim)`` if dense."""
        if self.count is None or self.moment is None or bool((self.count < 2).any()):
            raise RuntimeError("a covariance needs at least two positions")
        return self.moment / (self.count - 1).reshape(-1, *[1] * (self.moment.dim() - 1))

    def over_ranks(self, ranks: ProcessGroup) -> "PooledCovariance":
        """The covariance of the positions of all ranks together; a collective call."""
        if ranks.size == 1 or self.count is None or self.mean is None or self.moment is None:
            return self
        # M2 = sum_r  M2_r + n_r (mean_r - mean)^2
        pooled = PooledCovariance(self.targets, self.dense)
        sums = torch.cat([self.count[:, None], self.count[:, None] * self.mean], 1)
        total = ranks.total(sums)
        pooled.count = total[:, 0]
        pooled.mean = total[:, 1:] / total[:, :1].clamp_min(1)
        between = self._outer(self.count[None], (self.mean - pooled.mean)[None])
        pooled.moment = ranks.total(self.moment + between)
        return pooled

    def state_dict(self) -> Saved:
        """The sums so far, for :meth:`load_state_dict`."""
        return {"count": self.count, "mean": self.mean, "moment": self.moment}

    def load_state_dict(self, state: Saved, device: torch.device) -> None:
        """Goes on from the sums of another one."""
        for name in ("count", "mean", "moment"):
            setattr(self, name, to_device(state[name], device))

    def _outer(self, weight: Tensor, delta: Tensor) -> Tensor:
        if self.dense:
            return torch.einsum("cg,cgi,cgj->gij", weight, delta, delta)
        return torch.einsum("cg,cgi->gi", weight, delta.square())


class MetricWindow(ABC):
    """The positions and gradients of a window, as far as a new factor needs them.

    Args:
        targets: number of targets.
        dim: dimension of a position.
        length: how many transitions the window has.
    """

    def __init__(self, targets: int, dim: int, length: int):
        self.targets, self.dim, self.length = targets, dim, length

    @abstractmethod
    def add(self, z: Tensor, grad: Tensor | None, weight: Tensor) -> None:
        """Adds the positions and gradients ``(chains, dim)`` of one transition, with weights."""

    @abstractmethod
    def factor(self, old: Factor, ranks: ProcessGroup) -> Factor:
        """The new factor, of the kind of the one so far; a collective call."""

    @abstractmethod
    def state_dict(self) -> Saved:
        """What was added so far, for :meth:`load_state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: Saved, device: torch.device) -> None:
        """Goes on from where another window was."""


class Moments(MetricWindow):
    """The means and (co)variances of positions and of gradients.

    Args:
        targets: number of targets.
        dim: dimension of a position.
        length: how many transitions the window has.
        dense: whether factors are dense or diagonal.
    """

    def __init__(self, targets: int, dim: int, length: int, dense: bool):
        super().__init__(targets, dim, length)
        self.positions = PooledCovariance(targets, dense)
        self.gradients = PooledCovariance(targets, dense)
        self._waiting: list[tuple[Tensor, Tensor | None, Tensor]] = []  # to be pooled together

    def add(self, z: Tensor, grad: Tensor | None, weight: Tensor) -> None:
        """Adds one transition, see :meth:`MetricWindow.add`."""
        self._waiting.append((z, grad, weight))
        if len(self._waiting) * z.numel() >= POOLED_AT_ONCE:
            self._pool()

    def _pool(self) -> None:
        if not self._waiting:
            return
        z, grad, weight = zip(*self._waiting, strict=True)
        weight = torch.cat(weight)
        self.positions.update(torch.cat(z), weight)
        if grad[0] is not None:
            self.gradients.update(torch.cat(grad), weight)
        self._waiting = []

    def factor(self, old: Factor, ranks: ProcessGroup) -> Factor:
        """The new factor, see :meth:`MetricWindow.factor`."""
        self._pool()
        assert isinstance(old, Tensor)
        positions = self.positions.over_ranks(ranks)
        gradients = self.gradients.over_ranks(ranks)
        if positions.count is None or bool((positions.count < 2).any()):
            return old
        if gradients.count is None:
            return covariance_factor(positions, old)
        a, b, wide = positions.covariance(), gradients.covariance(), old.double()
        if not positions.dense:
            return (wide * diagonal_scales(a / wide**2, b * wide**2)).to(old.dtype)
        #   in the coordinates w = L^{-1} z:  A' = L^{-1} A L^{-T},  B' = L^T B L
        half = torch.linalg.solve_triangular(wide, a, upper=False)
        a = torch.linalg.solve_triangular(wide, half.mT, upper=False)
        try:
            sigma = dense_covariance((a + a.mT) / 2, wide.mT @ b @ wide, positions.count)
        except torch.linalg.LinAlgError:  # of a density so flat that positions overflow
            return old
        new = (wide @ cholesky_or_diagonal(sigma)).to(old.dtype)
        return torch.where(new.isfinite().all(-1).all(-1)[:, None, None], new, old).contiguous()

    def state_dict(self) -> Saved:
        """What was added so far, for :meth:`load_state_dict`."""
        return {
            "positions": self.positions.state_dict(),
            "gradients": self.gradients.state_dict(),
            "waiting": [list(row) for row in self._waiting],
        }

    def load_state_dict(self, state: Saved, device: torch.device) -> None:
        """Goes on from where another window was."""
        self.positions.load_state_dict(state["positions"], device)
        self.gradients.load_state_dict(state["gradients"], device)
        self._waiting = [_of_device(row, device) for row in state["waiting"]]


class Rows(MetricWindow):
    """Evenly spaced positions and gradients, two thousand at most or those of one transition.

    Args:
        targets: number of targets.
        dim: dimension of a position.
        length: how many transitions the window has.
    """

    def __init__(self, targets: int, dim: int, length: int):
        super().__init__(targets, dim, length)
        self._seen = 0
        self._rows: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def add(self, z: Tensor, grad: Tensor | None, weight: Tensor) -> None:
        """Adds one transition, see :meth:`MetricWindow.add`."""
        self._seen += 1
        ranks = current()  # all keep the same transitions, whatever their shares of the chains
        chains = ranks.num_chains if ranks.size > 1 else len(z) // self.targets
        every = math.ceil(self.length * chains / MAX_ROWS)
        if (self.length - self._seen) % every == 0:
            self._rows.append((z, grad, weight))

    def factor(self, old: Factor, ranks: ProcessGroup) -> Factor:
        """The new factor, see :meth:`MetricWindow.factor`."""
        assert isinstance(old, LowRank)
        if not self._rows:
            return old
        z, grad, weight = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        z, grad, weight = (ranks.rows(x) for x in (z, grad, weight))
        weight = weight.double().unflatten(0, (-1, self.targets))
        if bool((weight.sum(0) < 2).any()):
            return old
        z, grad = (
            _centered(x.double().unflatten(0, (-1, self.targets)), weight) for x in (z, grad)
        )
        rank, scale = old.stretch.shape[-1], old.diagonal.double()
        z, grad = z / scale, grad * scale
        try:
            factors = [low_rank_factor(z[:, g], grad[:, g], rank) for g in range(self.targets)]
        except torch.linalg.LinAlgError:  # of a density so flat that positions overflow
            return old
        diagonal, *others = (torch.cat(parts) for parts in zip(*factors, strict=True))
        new = LowRank(*(x.to(old.diagonal.dtype) for x in (diagonal * scale, *others)))
        return new if all(bool(part.isfinite().all()) for part in new) else old

    def state_dict(self) -> Saved:
        """What was added so far, for :meth:`load_state_dict`."""
        return {"seen": self._seen, "rows": [list(row) for row in self._rows]}

    def load_state_dict(self, state: Saved, device: torch.device) -> None:
        """Goes on from where another window was."""
        self._seen = state["seen"]
        self._rows = [_of_device(row, device) for row in state["rows"]]


def check_full_mass(value: object, has_grad: bool) -> FullMass:
    """The setting ``full_mass`` of a kernel, if it is one.

    Raises:
        TypeError: for lists of sites, as Pyro's kernels take them.
        ValueError: for anything else, or a low rank without gradients.
    """
    if isinstance(value, list | tuple):
        raise TypeError(
            f"full_mass={value!r} are blocks of sites, and the mass matrix is learned as a whole:"
            ' use full_mass=True, which is dense, or "auto"'
        )
    if not isinstance(value, bool) and value not in ("auto", "low_rank"):
        raise ValueError(f'full_mass must be "auto", True, False or "low_rank", got {value!r}')
    if value == "low_rank" and not has_grad:
        raise ValueError(
            'full_mass="low_rank" is learned from gradients, which this kernel has not: use True,'
            " which is dense, or False"
        )
    return value


def kind_of(full_mass: FullMass, targets: int, dim: int, has_grad: bool) -> Kind:
    """The kind of mass matrix for so many targets and dimensions.

    Example:
        >>> kind_of("auto", 1, 10, has_grad=True), kind_of("auto", 1, 1000, has_grad=True)
        ('dense', 'low_rank')
        >>> kind_of("auto", 1000, 784, has_grad=True)  # a matrix for each of 1,000 targets
        'diagonal'
    """
    if full_mass == "auto":
        if dim <= MAX_DENSE and targets * dim**3 <= MAX_DENSE_WORK:
            return "dense"
        return "low_rank" if has_grad and targets <= MAX_LOW_RANK_TARGETS else "diagonal"
    if full_mass == "low_rank":
        return "low_rank"
    return "dense" if full_mass else "diagonal"


def first_factor(kind: Kind, ones: Tensor) -> Factor:
    """The identity, as a factor of a kind; ``ones`` has the shape ``(targets, dim)``."""
    if kind == "diagonal":
        return ones
    if kind == "dense":
        return torch.diag_embed(ones)
    targets, dim = ones.shape
    rank = min(dim, MAX_RANK)
    return LowRank(ones, ones.new_zeros(targets, dim, rank), ones.new_ones(targets, rank))


def new_window(kind: Kind, targets: int, dim: int, length: int) -> MetricWindow:
    """An empty window for factors of a kind."""
    if kind == "low_rank":
        return Rows(targets, dim, length)
    return Moments(targets, dim, length, dense=kind == "dense")


def covariance_factor(pool: PooledCovariance, old: Tensor) -> Tensor:
    """The factor of the covariance of positions alone.

    The covariance is shrunk, as in Stan, with the weight of five draws towards 1/1000 of the old
    inverse mass matrix. A dense matrix is also shrunk towards its diagonal: else a direction in
    which the few draws of a first window hardly moved is taken for narrow, and never moved in
    again.

    Args:
        pool: of the draws.
        old: the factor so far, shape ``(targets, dim)``, or ``(targets, dim, dim)`` if dense.

    Returns:
        The new factor, of the shape of the old one.
    """
    assert pool.count is not None
    n, new = pool.count, pool.covariance()
    n = n.reshape(-1, *[1] * (new.dim() - 1))
    prior = 1e-3 * old.double().square()
    if pool.dense:  # the diagonal of L L^T is the row sum of squares
        prior = torch.diag_embed(prior.sum(-1) + new.diagonal(dim1=-2, dim2=-1))
    new = (n * new + 5 * prior) / (n + 5)
    return (cholesky_or_diagonal(new) if pool.dense else new.sqrt()).to(old.dtype)


def cholesky_or_diagonal(covariance: Tensor) -> Tensor:
    """The Cholesky factors of a batch; the diagonal's root where rounding made one indefinite."""
    inverse_mass_sqrt, info = torch.linalg.cholesky_ex(covariance)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1).sqrt())
    # laid out by rows, as the first one: a compiled graph is for one layout
    return torch.where((info == 0)[:, None, None], inverse_mass_sqrt, diagonal).contiguous()


def _centered(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows ``(n, targets, dim)`` less their weighted means, 0 where the weight is."""
    mean = torch.einsum("ng,ngi->gi", weight, rows) / weight.sum(0)[:, None]
    return (rows - mean) * weight[..., None]


def _of_device(
    row: Sequence[Tensor | None], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    z, grad, weight = (to_device(x, device) for x in row)
    return z, grad, weight
