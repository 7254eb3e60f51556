r"""Control variates: the gradient of a minibatch, corrected by what it is at a mode.

At a point :math:`\hat\theta` the gradient of all the data is computed once. On a subsample
:math:`S` the estimate

.. math:: \hat g(\theta) = \nabla U(\hat\theta) + \nabla U_S(\theta) - \nabla U_S(\hat\theta)

has the same mean as :math:`\nabla U_S(\theta)` and a noise that vanishes with the distance from
:math:`\hat\theta`. In the posterior of :math:`N` rows of independent data that distance is of order
:math:`N^{-1/2}`, and the noise no longer grows with :math:`N`: the steps may be as long as those of
all the data.

Reference:
    Baker, Fearnhead, Fox and Nemeth (2019), Control variates for stochastic gradient MCMC.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions.core.supports import as_function
from pyro_ebm.mcmc.engine.engine import Engine, JitCompile
from pyro_ebm.mcmc.engine.graph_guards import Dependencies
from pyro_ebm.mcmc.kernels.minibatch.moments import MAX_DENSE
from pyro_ebm.mcmc.potentials.minibatch import MinibatchPotential

DESCENT_STEPS = 1_000
FIRST_RATE, LAST_RATE = 0.1, 1e-4
MEMORY = 0.95
"""The weight of the past in the mean square of the gradients."""
NEWTON_STEPS = 5
NUM_PROBES = 20


class Center(NamedTuple):
    """The point around which gradients are corrected, and the density of all the data there."""

    z: Tensor
    """Shape ``(dim,)``."""
    potential: Tensor
    """Shape ``()``."""
    grad: Tensor
    """Shape ``(dim,)``."""
    curvature: Tensor
    """The Hessian ``(dim, dim)``; above 200 dimensions its diagonal ``(dim,)``, estimated."""


def center_at(potential: MinibatchPotential, z: Tensor) -> Center:
    """The center at a position ``(dim,)``."""
    return Center(z, *potential.of_all_rows(z), curvature_at(potential, z))


def curvature_at(potential: MinibatchPotential, z: Tensor) -> Tensor:
    """The Hessian of the potential of all the data, or its diagonal by random directions."""
    if len(z) <= MAX_DENSE:
        hessian = potential.hessian_products(z, torch.eye(len(z), dtype=z.dtype, device=z.device))
        return (hessian + hessian.mT) / 2
    #   E v * H v  is the diagonal of H, for independent signs v
    v = torch.randint(2, (NUM_PROBES, len(z)), device=z.device).to(z.dtype) * 2 - 1
    return (v * potential.hessian_products(z, v)).mean(0)


def descended(potential: MinibatchPotential, z: Tensor, jit_compile: JitCompile = False) -> Tensor:
    """A position near a mode, from another one ``(dim,)`` by descent on minibatches (RMSprop)."""
    plates = potential.given.plates

    def gradient(z: Tensor, *rows: Tensor) -> tuple[Tensor]:
        return (potential.value_and_grad_at(z, dict(zip(plates, rows, strict=True)))[1],)

    engine = Engine(gradient, jit_compile, Dependencies(potential), True, DESCENT_STEPS)
    square: Tensor | None = None
    for i in range(DESCENT_STEPS):
        (grad,) = engine(z[None], *potential.draw_rows().values())
        grad = torch.where(grad[0].isfinite(), grad[0], 0.0)
        square = grad.square() if square is None else MEMORY * square + (1 - MEMORY) * grad.square()
        rate = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (i / DESCENT_STEPS)
        z = z - rate * grad / square.sqrt().clamp_min(torch.finfo(z.dtype).tiny ** 0.5)
    return z


def center_near(potential: MinibatchPotential, z: Tensor) -> Center:
    """The center at a mode near a position ``(dim,)``.

    Newton's steps on all the data lead there, up to 200 dimensions and as long as they go downhill.
    """
    center = center_at(potential, z)
    for _ in range(NEWTON_STEPS if len(z) <= MAX_DENSE else 0):
        factor, failed = torch.linalg.cholesky_ex(center.curvature.double())
        if failed:
            break
        step = torch.cholesky_solve(center.grad.double()[:, None], factor)[:, 0]
        decrement = float(step @ center.grad.double())  # twice the fall that is to be expected
        if not math.isfinite(decrement) or decrement < 0.01 * len(z):
            break
        new = center_at(potential, center.z - step.to(z))
        if not new.potential < center.potential:
            break
        center = new
    return center


def position_of(potential: MinibatchPotential, values: Mapping[str, Tensor]) -> Tensor:
    """The position ``(dim,)`` of values of the sites in their supports.

    Raises:
        ValueError: if they have other names or shapes than the sites, or lie outside of the
            supports.
    """
    if values.keys() != set(potential.names):
        raise ValueError(
            f"control_variates has sites {sorted(values)}, the model has {sorted(potential.names)}"
        )
    params = {}
    for site in potential.sites:
        z = as_function(site.transform)(values[site.name].detach().to(site.dtype))
        if z.shape != site.shape or not z.isfinite().all():
            raise ValueError(
                f"control_variates[{site.name!r}] must be a value of the site inside of its"
                f" support, got one of shape {tuple(values[site.name].shape)} whose unconstrained"
                f" value has shape {tuple(z.shape)}, not {tuple(site.shape)}, or is not finite"
            )
        params[site.name] = z
    return potential.ravel(params).to(potential.device)
