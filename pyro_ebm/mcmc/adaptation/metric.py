r"""The mass matrix: the covariance of the draws, pooled over chains, and its factor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.state import to_device


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
        """The covariance of the positions of all ranks together; a collective call."""
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
        """The sums so far, for :meth:`load_state_dict`."""
        return {"count": self.count, "mean": self.mean, "moment": self.moment}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from the sums of another one."""
        self.count = state["count"]
        self.mean, self.moment = (to_device(state[name], device) for name in ("mean", "moment"))

    def _outer(self, delta: Tensor) -> Tensor:
        if self.dense:
            return torch.einsum("cgi,cgj->gij", delta, delta)
        return delta.square().sum(0)


def mass_matrix_factor(pool: PooledCovariance, old: Tensor) -> Tensor:
    """The factor of a new inverse mass matrix.

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
    n, new = pool.count, pool.covariance()
    prior = 1e-3 * old.square()
    if pool.dense:  # the diagonal of L L^T is the row sum of squares
        prior = torch.diag_embed(prior.sum(-1) + new.diagonal(dim1=-2, dim2=-1))
    new = (n * new + 5 * prior) / (n + 5)
    return cholesky_or_diagonal(new) if pool.dense else new.sqrt()


def cholesky_or_diagonal(covariance: Tensor) -> Tensor:
    """The Cholesky factors of a batch; the diagonal's root where rounding made one indefinite."""
    inverse_mass_sqrt, info = torch.linalg.cholesky_ex(covariance)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1).sqrt())
    # laid out by rows, as the first one: a compiled graph is for one layout
    return torch.where((info == 0)[:, None, None], inverse_mass_sqrt, diagonal).contiguous()
