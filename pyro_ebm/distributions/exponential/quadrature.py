r"""Log Z of energies with one or two dimensions, by quadrature.

A support other than the reals is mapped onto them by Pyro's bijection :math:`x = \phi(z)`,

.. math:: Z = \int h(x)\, e^{-E(x)}\, dx
            = \int h(\phi(z))\, e^{-E(\phi(z))} \left| \det \frac{d \phi}{d z} \right| dz .

Far out the numbers end before :math:`z` does: :math:`e^{800}` is infinite, and the sigmoid of 40
is 1. The integrand is undefined there, and must have decayed before.
"""

from collections.abc import Callable

import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributions import biject_to

from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.ops.integration.quadrature import (
    MAX_EVALUATIONS,
    Grid,
    NoIntegralError,
    find_grid,
    log_integral,
    log_sum,
)

LogDensity = Callable[[Tensor], Tensor]


def log_normalizer_by_quadrature(
    p: UnnormalizedEnergy, rtol: float | None = None, max_evaluations: int = MAX_EVALUATIONS
) -> Tensor:
    r"""The :math:`\log Z` of an energy with one or two dimensions, see :func:`log_integral`.

    Differentiable in the energy's parameters. Nodes are in double precision, unless the energy is
    a network of another. Networks are evaluated as they are: those with dropout in ``eval()``.

    Args:
        p: the energy, of any continuous support.
        rtol: relative accuracy of Z; by default that of the energy's dtype, at most the square root
            of that of doubles.
        max_evaluations: how often the energy may be evaluated for one sum.

    Returns:
        Shape ``(*batch)``, to hand to :meth:`~pyro_ebm.UnnormalizedEnergy.normalized`.

    Raises:
        ValueError: for discrete supports, more than two dimensions, and where there is no accurate
            value, as for improper densities.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x - 2 * x.log(), support=dist.constraints.positive)
        >>> log_normalizer_by_quadrature(p)  # Gamma(3, 1)
        tensor(0.6931)
    """
    q = unvalidated(p.unexpanded)
    check_dimensions(q.support, q.event_shape, q.batch_shape, f"log Z of {p!r}")
    integrand = Integrand(q.unnormalized_log_prob, q.support, q.event_shape, q.batch_shape)
    like, result = integrand.precision(q.like), q.like
    rtol = accuracy(like, result) if rtol is None else rtol
    try:
        log_z = log_integral(
            integrand, integrand.dim, q.batch_shape, rtol, max_evaluations, like=like
        )
    except NoIntegralError as error:
        way = ""
        if error.improper and p.base is None:
            way = (
                ". The energy does not grow enough far out for a finite Z, as a network need not:"
                " check its sign, or give it a base=, a normalized density to tilt, such as"
                " base=gaussian_noise(data, width=2.0)"
            )
        raise ValueError(f"log Z of {p!r}: the density {error.why}{way}") from error
    return log_z.to(result.dtype).expand(p.batch_shape)


def unconstrained_shape(
    support: constraints.Constraint, event_shape: torch.Size, batch_shape: torch.Size
) -> torch.Size:
    """The shape of an event before the bijection onto its support."""
    # of batch and event together: the bounds of a support may have the batch's shape
    return biject_to(support).inverse_shape(batch_shape + event_shape)[len(batch_shape) :]


def check_dimensions(
    support: constraints.Constraint, event_shape: torch.Size, batch_shape: torch.Size, name: str
) -> None:
    """Raises a ValueError unless there are one or two continuous dimensions.

    Args:
        support: the support of a whole event.
        event_shape: shape of a point.
        batch_shape: shape of the batch.
        name: what is to be integrated.
    """
    if support.is_discrete:
        raise ValueError(f"{name}: the support {support} is discrete, an integral is not defined")
    dim = unconstrained_shape(support, event_shape, batch_shape).numel()
    if dim not in (1, 2):
        raise ValueError(
            f"{name}: quadrature takes one or two unconstrained dimensions, and event_shape="
            f"{tuple(event_shape)} with the support {support} has {dim}. Give log_normalizer= in"
            " closed form, or estimate it"
        )


class Integrand:
    r"""The log density in unconstrained coordinates, Jacobian included.

    Args:
        log_density: ``(nodes, *batch, *event) -> (nodes, *batch)``.
        support: of a whole event.
        event_shape: shape of a point.
        batch_shape: shape of the batch.
    """

    def __init__(
        self,
        log_density: LogDensity,
        support: constraints.Constraint,
        event_shape: torch.Size,
        batch_shape: torch.Size,
    ):
        self.log_density, self.event_shape, self.batch_shape = log_density, event_shape, batch_shape
        self.bijection = biject_to(support)
        self.shape = unconstrained_shape(support, event_shape, batch_shape)
        self.dim = self.shape.numel()

    def __call__(self, z: Tensor) -> Tensor:
        """The log density at ``(nodes, *batch, dim)``; NaN where floating numbers end."""
        batch = z.shape[:-1]
        z = z.reshape(batch + self.shape)
        x = self.bijection(z)
        inverse = self.bijection.inv
        jacobian = self.bijection.log_abs_det_jacobian(z, x).reshape(batch + (-1,)).sum(-1)
        # where z cannot be told from x any more, x is not the point that was meant
        lost = ~((inverse(x) - z).abs() < 0.1).reshape(batch + (-1,)).all(-1)
        return torch.where(lost, torch.nan, self.log_density(x) + jacobian)

    def precision(self, like: Tensor) -> Tensor:
        """A double on the device of ``like``, or ``like`` itself where doubles are refused."""
        double = like.new_zeros((1,) + self.batch_shape + (self.dim,), dtype=torch.float64)
        try:
            self(double)
        except (RuntimeError, ValueError):  # float32 weights; what else there is shows again
            return like
        return double


def differentiable_log_integral(
    integrand: Callable[[Tensor], Integrand], theta: Tensor
) -> tuple[Tensor, Tensor, Grid]:
    r"""The log integrals of a family of integrands, as a function of its parameters.

    ``torch.func.vmap`` can map it, and what fails is marked: it is for proposals of a sampler, of
    which some are improper.

    Args:
        integrand: the integrand at parameters of shape ``(*batch, k)``, of their batch.
        theta: parameters, shape ``(*batch, k)``.

    Returns:
        The log integrals, NaN where there is none; why, as :func:`find_grid` says it, both of shape
        ``(*batch)``; and the grid.
    """
    log_f = integrand(theta)
    like = log_f.precision(theta.detach())
    fixed = detach_provenance(theta.detach())
    center, basis, low, high, failure, (size, holes) = _ChosenGrid.apply(fixed, integrand, like)
    grid = Grid(center, basis, low, high, int(size), bool(holes))
    value = log_sum(log_f, grid, like).to(theta.dtype)
    return torch.where(failure == 0, value, torch.nan), failure, grid


def accuracy(like: Tensor, result: Tensor) -> float:
    """The relative accuracy to ask of an integral.

    Args:
        like: of the dtype of the nodes.
        result: of the dtype of the result.
    """
    return max(torch.finfo(like.dtype).eps ** 0.5, 4 * torch.finfo(result.dtype).eps)


class _ChosenGrid(torch.autograd.Function):
    """Chooses a grid by looking at values, which ``vmap`` forbids: a mapped theta is a batch."""

    @staticmethod
    def forward(
        theta: Tensor, integrand: Callable[[Tensor], Integrand], like: Tensor
    ) -> tuple[Tensor, ...]:
        log_f = integrand(theta)
        rtol = accuracy(like, theta)
        grid, failure = find_grid(log_f, log_f.dim, log_f.batch_shape, rtol, MAX_EVALUATIONS, like)
        return *grid[:4], failure, torch.tensor([grid.size, grid.holes])

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]
    ) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def vmap(
        info: object,
        in_dims: tuple[int | None, ...],
        theta: Tensor,
        integrand: Callable[[Tensor], Integrand],
        like: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        if in_dims[0] is not None:
            theta = theta.movedim(in_dims[0], 0)
        mapped = 0 if in_dims[0] is not None else None
        return _ChosenGrid.apply(theta, integrand, like), (mapped,) * 5 + (None,)
