r"""Pathfinder: draws of an approximate posterior, found on the way down to a mode.

A quasi-Newton descent knows, at each of its positions :math:`z`, an estimate :math:`H` of the
inverse Hessian of the potential :math:`U`, and so a normal approximation of the posterior there,

.. math:: q(\phi) = \mathcal N\bigl(\phi \mid z - H \nabla U(z),\ H\bigr).

Early positions lie out in the tails, and late ones near the mode, which in a funnel has no part of
the distribution. The best approximation is on the way: that of the largest evidence lower bound
:math:`\mathbb E_q[-U(\phi) - \log q(\phi)]`. Several paths give draws of several normals, which are
weighted, :math:`w = e^{-U(\phi)} / q(\phi)`, the weights Pareto-smoothed, and resampled.

All paths descend in one batch. L-BFGS keeps the last :math:`J` steps :math:`s` and changes of the
gradient :math:`y`, rows of :math:`S` and :math:`Y`. With the upper triangle :math:`R` of
:math:`S Y^\top`, its diagonal :math:`\eta`, and a diagonal estimate :math:`\alpha`,

.. math::

    H = \mathrm{diag}(\alpha) + \beta^\top \gamma\, \beta, \qquad
    \beta = \begin{pmatrix} Y \mathrm{diag}(\alpha) \\ S \end{pmatrix}, \qquad
    \gamma = \begin{pmatrix} 0 & -R^{-1} \\ -R^{-\top} &
        R^{-\top} (\mathrm{diag}(\eta) + Y \mathrm{diag}(\alpha) Y^\top) R^{-1} \end{pmatrix},

so that a direction costs :math:`O(J d)`, and so does a draw: with the thin factorization
:math:`\alpha^{-1/2} \beta^\top = Q T` and :math:`L L^\top = 1 + T \gamma T^\top`,

.. math:: \phi = z - H \nabla U + \alpha^{1/2} \bigl(u + Q (L - 1) Q^\top u\bigr), \qquad
    \log |H| = \sum \log \alpha + 2 \log |L| .

Reference:
    Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder: Parallel quasi-Newton variational
    inference. Byrd, Nocedal and Schnabel (1994), Representations of quasi-Newton matrices.
    Gilbert and Lemarechal (1989), Some numerical experiments with variable-storage algorithms.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics.convergence import REPARAMETRISE, Finding, warn
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.sites.joint_start import JointStart
from pyro_ebm.models.sites.latents import InitStrategy
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.pareto import MAX_PARETO_K, MIN_WEIGHTS, pareto_smoothed

LENGTHS = 2.0 ** torch.arange(2, -14, -1, dtype=torch.float64)
"""Steps along a direction; all are tried in one batch."""
CURVATURE = 1e-12
"""A pair of step and change counts if s.y is above this part of y.y."""
ELBO_DRAWS = 10
"""By so many draws of each approximation its evidence lower bound is estimated."""


class Normal(NamedTuple):
    """A normal distribution for each path, with a diagonal and low-rank covariance."""

    mean: Tensor
    """Shape ``(paths, d)``."""
    alpha: Tensor
    """Shape ``(paths, d)``."""
    q: Tensor
    """Shape ``(paths, d, r)`` with r = min(d, 2 J)."""
    chol: Tensor
    """L, shape ``(paths, r, r)``."""

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws ``(num, paths, d)``, and their log density ``(num, paths)``."""
        u = torch.randn(num, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        low = torch.einsum("pdr,npd->npr", self.q, u)
        low = torch.einsum("prk,npk->npr", self.chol, low) - low
        phi = self.mean + self.alpha.sqrt() * (u + torch.einsum("pdr,npr->npd", self.q, low))
        log_det = self.alpha.log().sum(-1) + 2 * self.chol.diagonal(0, -2, -1).log().sum(-1)
        d = self.mean.shape[-1]
        return phi, -(u.square().sum(-1) + log_det + d * math.log(2 * math.pi)) / 2


class Paths(NamedTuple):
    """Where descents are, and what they know of the curvature there."""

    z: Tensor
    """Positions, shape ``(paths, d)``."""
    u: Tensor
    """Potentials, shape ``(paths,)``."""
    grad: Tensor
    """Gradients, shape ``(paths, d)``."""
    alpha: Tensor
    """The diagonal estimate of the inverse Hessian, shape ``(paths, d)``."""
    s: Tensor
    """The last steps, 0 where there were none yet, shape ``(paths, J, d)``."""
    y: Tensor
    """The changes of the gradient on them, shape ``(paths, J, d)``."""

    def low_rank(self) -> tuple[Tensor, Tensor]:
        r""":math:`\beta`, shape ``(paths, 2 J, d)``, and :math:`\gamma`, ``(paths, 2 J, 2 J)``."""
        s_y = self.s @ self.y.mT
        eta = s_y.diagonal(0, -2, -1)
        one = torch.eye(eta.shape[-1], dtype=eta.dtype, device=eta.device)
        r = s_y.triu() + torch.diag_embed((eta == 0).to(eta.dtype))  # 1 where there is no pair
        r_inv = torch.linalg.solve_triangular(r, one.expand_as(r), upper=True)
        scaled = self.alpha[:, None] * self.y
        corner = r_inv.mT @ (torch.diag_embed(eta) + scaled @ self.y.mT) @ r_inv
        top = torch.cat([torch.zeros_like(r_inv), -r_inv], -1)
        gamma = torch.cat([top, torch.cat([-r_inv.mT, corner], -1)], -2)
        return torch.cat([scaled, self.s], -2), gamma

    def direction(self) -> Tensor:
        """The quasi-Newton step, minus H times the gradient, shape ``(paths, d)``."""
        beta, gamma = self.low_rank()
        low = beta.mT @ (gamma @ (beta @ self.grad[..., None]))
        return -(self.alpha * self.grad + low[..., 0])

    def normal(self) -> Normal:
        """The approximation of the posterior here; L is NaN where H is not positive definite."""
        beta, gamma = self.low_rank()
        q, t = torch.linalg.qr((beta / self.alpha.sqrt()[:, None]).mT)
        one = torch.eye(t.shape[-2], dtype=t.dtype, device=t.device)
        chol, info = torch.linalg.cholesky_ex(one + t @ gamma @ t.mT)
        chol = torch.where((info == 0)[:, None, None], chol, torch.nan)
        return Normal(self.z + self.direction(), self.alpha, q, chol)

    def at(self, z: Tensor, u: Tensor, grad: Tensor) -> "Paths":
        """The paths one step further, at the positions ``z``."""
        s, y = z - self.z, grad - self.grad
        s_y = (s * y).sum(-1)
        ok = s_y > CURVATURE * y.square().sum(-1)
        #   1 / alpha'  =  a / (b alpha) + y^2 / b - a s^2 / (b c alpha^2)
        b = torch.where(ok, s_y, 1.0)[:, None]
        a = (self.alpha * y.square()).sum(-1, keepdim=True)
        c = (s.square() / self.alpha).sum(-1, keepdim=True)
        inverse = (a / self.alpha + y.square() - a * s.square() / (c * self.alpha.square())) / b
        new = ok & ((inverse > 0) & inverse.isfinite()).all(-1)
        pairs = ok[:, None, None]
        return Paths(
            *(z, u, grad, torch.where(new[:, None], 1 / inverse, self.alpha)),
            torch.where(pairs, torch.cat([self.s[:, 1:], s[:, None]], 1), self.s),
            torch.where(pairs, torch.cat([self.y[:, 1:], y[:, None]], 1), self.y),
        )


class Pathfinder:
    """The best normal approximation of each path, and weighted draws of all of them.

    Args:
        potential: of the posterior, on continuous sites.
        num_paths: how many descents there are.
        num_draws: of all paths together.
        max_iterations: the most steps of a descent.
        history: how many steps it remembers, J.

    Attributes:
        z: draws, shape ``(num_draws, d)``.
        weights: their normalized importance weights, Pareto-smoothed, shape ``(num_draws,)``.
        pareto_k: the tail of the weights (:func:`pyro_ebm.ops.pareto.pareto_k`); above .7 the
            draws, resampled, may be far from the posterior. Infinite of fewer than 25 draws.
        elbo: the evidence lower bounds, shape ``(num_paths,)``.
        num_iterations: of the longest descent.

    Raises:
        ValueError: if no path has found a normal approximation.

    Warns:
        ConvergenceWarning: if the Pareto k of the weights is above .7, or cannot be estimated.
    """

    def __init__(
        self,
        potential: Potential,
        num_paths: int = 16,
        num_draws: int = 1000,
        max_iterations: int = 200,
        history: int = 6,
    ):
        self.potential = potential
        each = -(-num_draws // num_paths)
        normal = self._descend(potential.initial(num_paths), max_iterations, history)
        phi, log_q = normal.draw(each)
        log_w = (-self._potentials(phi) - log_q).flatten()
        keep = log_w.isfinite()
        if not keep.any():
            raise ValueError(
                "Pathfinder found no normal approximation with a finite density: start chains by"
                " init_to_uniform, or at draws of a guide"
            )
        self.z = phi.flatten(0, 1)[keep].to(potential.dtype)
        log_w, self.pareto_k = log_w[keep], math.inf
        if len(log_w) >= MIN_WEIGHTS:
            log_w, self.pareto_k = pareto_smoothed(log_w)
        self.weights = log_w.softmax(0)
        self._warn_of_tail()

    def _warn_of_tail(self) -> None:
        """Says so if the weights cannot make up for what the approximations miss."""
        if self.pareto_k <= MAX_PARETO_K:
            return
        found = f"have a Pareto k of {self.pareto_k:.2f} (up to {MAX_PARETO_K} is good)"
        if math.isinf(self.pareto_k):
            found = f"of {len(self.z)} draws are too few, or too unlike, to have their tail judged"
        text = (
            f"Pathfinder's importance weights {found}: its draws may be far from the posterior, and"
            " serve as starts of chains with the usual warmup, not as draws of it"
        )
        warn([Finding("pareto_k", text, [REPARAMETRISE, "a larger num_draws"])], stacklevel=4)

    def _potentials(self, phi: Tensor) -> Tensor:
        """The potential of positions ``(num, paths, d)``, infinite where it is NaN."""
        with torch.no_grad():
            u = self.potential(phi.flatten(0, 1).to(self.potential.dtype)).double()
        return torch.where(u.isnan(), math.inf, u).reshape(phi.shape[:2])

    def _descend(self, z: Tensor, max_iterations: int, history: int) -> Normal:
        """The best approximation on each path from the positions ``z``."""
        at, u, grad = (x.double() for x in (z, *self.potential.value_and_grad(z)))
        none = at.new_zeros(len(z), history, z.shape[-1])
        alpha = 1 / grad.norm(dim=-1, keepdim=True).clamp(min=1)
        paths = Paths(at, u, grad, alpha.expand_as(at), none, none)
        best, self.elbo = paths.normal(), torch.full_like(paths.u, -math.inf)
        tolerance, self.num_iterations = torch.finfo(z.dtype).eps, 0
        lengths = LENGTHS.to(z.device)[:, None, None]
        for _ in range(max_iterations):
            tried = paths.z + lengths * paths.direction()
            u, best_length = self._potentials(tried).min(0)
            moves = u < paths.u - tolerance * (1 + paths.u.abs())
            if not moves.any():
                break
            self.num_iterations += 1
            there = tried.gather(0, best_length[None, :, None].expand_as(tried[:1]))[0]
            there = torch.where(moves[:, None], there, paths.z)
            now = self.potential.value_and_grad(there.to(z.dtype))
            paths = paths.at(there, *(x.double() for x in now))
            normal = paths.normal()
            phi, log_q = normal.draw(ELBO_DRAWS)
            elbo = (-self._potentials(phi) - log_q).mean(0)
            better = moves & (elbo > self.elbo)  # false where it is NaN
            self.elbo = torch.where(better, elbo, self.elbo)
            best = Normal(*(
                torch.where(better.reshape(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(normal, best, strict=True)
            ))  # fmt: skip
        return best


def init_to_pathfinder(
    model: Model,
    *args: object,
    num_paths: int = 16,
    num_draws: int = 1000,
    max_iterations: int = 200,
    max_plate_nesting: int | None = None,
    fallback: InitStrategy | None = None,
    **kwargs: object,
) -> "PathfinderStart":
    """Starts each chain at a draw of Pathfinder, all sites together.

    The descents are made here, before the run, for all paths in one batch.

    Args:
        model: the Pyro model that is to be sampled.
        *args: of the model.
        num_paths: how many descents there are, from uniform starts.
        num_draws: how many draws they give together, of which the chains' starts are resampled.
        max_iterations: the most steps of a descent.
        max_plate_nesting: as in Pyro's kernels, for discrete latents that are summed out.
        fallback: where sites start that are not the model's that was given, see
            :func:`init_to_guide`; discrete sites start at a draw from their prior.
        **kwargs: of the model.

    Returns:
        An ``init_strategy``, with the ``pathfinder`` that was found.

    Raises:
        ValueError: if the model has no continuous site, or no path finds a normal approximation.

    Warns:
        ConvergenceWarning: if the Pareto k of the importance weights is above .7: the draws are
            then starts and no more.

    Reference:
        Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder: Parallel quasi-Newton variational
        inference.

    Example:
        >>> from pyro_ebm import MCMC, ChEESKernel
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.tensor(2.0)
        >>> start = init_to_pathfinder(model, y)
        >>> start.pathfinder.pareto_k < 0.7
        True
        >>> kernel = ChEESKernel(model, init_strategy=start)
        >>> MCMC(kernel, 20, 20, num_chains=20, disable_progbar=True).run(y)
    """
    check_count("num_paths", num_paths, 1)
    check_count("num_draws", num_draws, 1)
    check_count("max_iterations", max_iterations, 1)
    potential = ModelPotential(model, args, kwargs, max_plate_nesting=max_plate_nesting)
    if not potential.dim:
        has = f"only the discrete sites {sorted(potential.summed_out)}"
        raise ValueError(
            "init_to_pathfinder descends in continuous sites, and the model has"
            f" {has if potential.summed_out else 'no latent sites'}: leave init_strategy out"
        )
    return PathfinderStart(Pathfinder(potential, num_paths, num_draws, max_iterations), fallback)


class PathfinderStart(JointStart):
    """Starts at draws of Pathfinder, see :func:`init_to_pathfinder`.

    Args:
        pathfinder: has the draws.
        fallback: where sites start that it does not have.
    """

    def __init__(self, pathfinder: Pathfinder, fallback: InitStrategy | None = None):
        super().__init__(self._resample, fallback, "Pathfinder")
        self.pathfinder = pathfinder

    def _resample(self, num: int) -> dict[str, Tensor]:
        found = self.pathfinder
        rows = torch.multinomial(found.weights, num, replacement=True)
        return found.potential.constrain(found.z[rows])
