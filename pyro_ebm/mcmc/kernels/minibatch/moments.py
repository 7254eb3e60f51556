r"""What the gradients of minibatches tell of the step that they allow.

On a Gaussian potential of curvature :math:`F`, with subsamples that add noise of covariance
:math:`S` to its gradient, the step :math:`z' = z - \varepsilon A \hat g + \sqrt{2 \varepsilon A}
\xi` has, where all these commute, the stationary variance

.. math:: F^{-1}\, \frac{1 + \varepsilon A S / 2}{1 - \varepsilon A F / 2}
          \approx F^{-1} \left(1 + \tfrac{\varepsilon}{2} A (S + F)\right),

and the second moment of the gradient is :math:`M = \mathbb E\, \hat g \hat g^\top = S + F`. So
with :math:`A = M^{-1}` every variance is too large by the same part, :math:`\varepsilon / 2`: the
second moment of the gradients is the preconditioner, and the bias that is allowed is the step. With
a diagonal :math:`A`, or one that was found otherwise, the largest eigenvalue :math:`\lambda` of
:math:`L^\top M L`, :math:`A = L L^\top`, tells the direction of the largest bias,
:math:`\varepsilon \lambda / 2`.

The eigenvalue of a sample of :math:`T` gradients is too large. Above the bulk that noise alone
would give it is corrected, and below it there is no direction that stands out.

Reference:
    Ahn, Korattikara and Welling (2012), Bayesian posterior sampling via stochastic gradient Fisher
    scoring. Mandt, Hoffman and Blei (2017), Stochastic gradient descent as approximate Bayesian
    inference. Paul (2007), Asymptotics of sample eigenstructure for a large dimensional spiked
    covariance model.
"""

import math

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.state import to_device
from pyro_ebm.ops.steps.precondition import precondition_transposed

MAX_DENSE = 200
"""Above this dimension the preconditioner is diagonal."""
MIN_ROWS = 5
"""So many gradients for each dimension are needed for a dense one."""
MAX_KEPT = 256
"""So many gradients are kept for the largest eigenvalue."""
FLOOR = 1e-3
"""A curvature is not taken to be smaller than this part of the mean one."""


class GradientMoments:
    """The second moments of gradients in a part of the warmup.

    Args:
        dense: whether to keep the whole matrix or its diagonal.
        length: how many transitions there will be.
        device: of the gradients.
    """

    def __init__(self, dense: bool, length: int, device: torch.device):
        self.dense, self.every, self.device = dense, max(1, length // MAX_KEPT), device
        self.count, self.t = 0, 0
        self.total: Tensor | None = None
        self.kept: list[Tensor] = []
        """Gradients of one chain after another, two that follow each other at a time."""

    def add(self, grad: Tensor) -> None:
        """Adds the gradients of a transition, shape ``(chains, dim)``."""
        g = grad.double()
        total = torch.einsum("ci,cj->ij", g, g) if self.dense else g.square().sum(0)
        self.total = total if self.total is None else self.total + total
        if self.t // 2 % self.every == 0:
            self.kept.append(grad[self.t // 2 % len(grad)].clone())
        self.count, self.t = self.count + len(grad), self.t + 1

    def second_moment(self, ranks: ProcessGroup) -> Tensor:
        """M, shape ``(dim, dim)``, or its diagonal ``(dim,)``."""
        assert self.total is not None
        count = ranks.total(torch.tensor([float(self.count)], dtype=torch.double))
        return ranks.total(self.total) / float(count)

    def largest_eigenvalues(
        self, ranks: ProcessGroup, factor: Tensor | None = None
    ) -> tuple[float, float]:
        """Those of the second moment of the gradients, and of the noise of subsamples in them.

        The noise shows in the differences of gradients that follow each other.

        Args:
            ranks: whose gradients are pooled.
            factor: L, for the gradients in the coordinates that it whitens.
        """
        rows = torch.stack(self.kept).double()
        rows = precondition_transposed(None if factor is None else factor.to(rows), rows)
        pairs = rows[: len(rows) // 2 * 2].reshape(-1, 2, rows.shape[-1])
        noise = (pairs[:, 0] - pairs[:, 1]) / math.sqrt(2)
        found = torch.tensor([_largest(rows), _largest(noise)], dtype=torch.double)
        whole, of_noise = (ranks.total(found) / ranks.size).tolist()
        return whole, min(whole, of_noise)

    def state_dict(self) -> Saved:
        """What was added, for :meth:`load_state_dict`."""
        names = ("dense", "every", "count", "t", "total")
        return {**{name: getattr(self, name) for name in names}, "kept": list(self.kept)}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from what another one has added."""
        for name in ("dense", "every", "count", "t"):
            setattr(self, name, state[name])
        self.total = to_device(state["total"], self.device)
        self.kept = [to_device(x, self.device) for x in state["kept"]]


def _largest(rows: Tensor) -> float:
    r"""The largest eigenvalue of the second moment of rows ``(T, dim)``.

    A single eigenvalue :math:`\ell` above a bulk of ones shows in a sample as
    :math:`\ell + \gamma \ell / (\ell - 1)`, where :math:`\gamma = d / T`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 100)
        >>> x[:, 0] *= 5
        >>> round(float(torch.linalg.matrix_norm(x, ord=2).square() / 200)), round(_largest(x))
        (31, 30)
        >>> _largest(torch.randn(20, 1000)) < 1.1
        True
    """
    count, dim = rows.shape
    if not count:
        return 0.0
    bulk = float(rows.square().mean())
    top = float(torch.linalg.matrix_norm(rows, ord=2).square()) / count
    if not (bulk > 0 and math.isfinite(top)):
        return bulk
    share, top = dim / count, top / bulk
    if top <= (1 + math.sqrt(share)) ** 2:
        return bulk
    half = (1 + top - share) / 2
    return bulk * (half + math.sqrt(max(half**2 - top, 0.0)))


def parts_of_noise(before: Tensor, grad: Tensor) -> Tensor:
    r"""The diagonals of M, of S, and of the part of S that all chains have in common.

    That of S is half of the mean square of a change :math:`x` of the gradients, and of a common
    variance :math:`s` the mean of C chains tells:
    :math:`\mathbb E\, \bar x^2 = s + (\mathbb E\, x^2 - s) / C`.

    Args:
        before: gradients, shape ``(chains, dim)``.
        grad: those of the next transition, shape ``(chains, dim)``.

    Returns:
        Shape ``(3, dim)``.

    Example:
        >>> parts_of_noise(torch.zeros(4, 1), torch.ones(4, 1)).flatten()  # all change alike
        tensor([1.0000, 0.5000, 0.5000])
    """
    change, num = grad - before, len(grad)
    square = change.square().mean(0)
    common = (num * change.mean(0).square() - square) / max(1, num - 1)
    return torch.stack([grad.square().mean(0), square / 2, common / 2])


def largest_eigenvalue(curvature: Tensor) -> float:
    """That of a curvature ``(dim, dim)`` or its diagonal ``(dim,)``, by size."""
    values = curvature if curvature.dim() == 1 else torch.linalg.eigvalsh(curvature)
    return float(values.abs().max())


def factor_of(curvature: Tensor) -> Tensor:
    r"""The factor :math:`L` of :math:`L L^\top = |H|^{-1}`, of one target.

    Args:
        curvature: :math:`H`, shape ``(dim, dim)``, or its diagonal ``(dim,)``. Negative and very
            small curvatures, as away from a mode, count by their size, and at least by a part of
            the mean one.

    Example:
        >>> factor_of(torch.tensor([4.0, 1.0]))
        tensor([[0.5000, 1.0000]])
        >>> factor_of(torch.tensor([[4.0, 0.0], [0.0, -1.0]]))
        tensor([[[0.5000, 0.0000],
                 [0.0000, 1.0000]]])
    """
    if curvature.dim() == 1:
        return _positive(curvature).rsqrt()[None]
    scale = _positive(curvature.diagonal()).sqrt()
    values, vectors = torch.linalg.eigh(curvature / scale / scale[:, None])
    inverse = (vectors / _positive(values)) @ vectors.mT / scale / scale[:, None]
    return torch.linalg.cholesky((inverse + inverse.mT) / 2)[None]


def _positive(values: Tensor) -> Tensor:
    size = values.abs()
    mean = size.mean()
    return size.clamp_min(float(FLOOR * mean) if mean > 0 else 1.0)
