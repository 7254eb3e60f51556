r"""The Langevin step, written once.

The overdamped Langevin diffusion with potential :math:`U` and temperature :math:`T`,

.. math:: dz = -\nabla U(z)\, dt + \sqrt{2 T}\, dW,

leaves :math:`\exp(-U / T)` invariant. One Euler step of length :math:`\varepsilon`, in coordinates
preconditioned by :math:`\Sigma = L L^\top`, is

.. math:: z' = z - \varepsilon\, L L^\top \nabla U(z) + \sqrt{2 \varepsilon T}\, L \xi,
          \qquad \xi \sim N(0, I).

It is also one leapfrog step of Hamiltonian dynamics (:mod:`pyro_ebm.ops.steps.leapfrog`) of length
:math:`h = \sqrt{2 \varepsilon T}` for the potential :math:`U / T` with the momentum :math:`\xi`
drawn afresh, and is written as such. The step serves the Langevin kernel, the negative phase of
contrastive divergence and annealed importance sampling.

Reference:
    Roberts and Tweedie (1996), Exponential convergence of Langevin distributions and their
    discrete approximations. Rossky, Doll and Friedman (1978), Brownian dynamics as smart Monte
    Carlo simulation.
"""

from torch import Tensor

from pyro_ebm.ops.steps.leapfrog import drift, energy_change, kick
from pyro_ebm.ops.steps.precondition import Factor


def langevin_proposal(
    z: Tensor,
    grad: Tensor,
    step_size: Tensor,
    inverse_mass_sqrt: Factor | None,
    temperature: Tensor,
    noise: Tensor,
) -> Tensor:
    r"""One Euler step :math:`z' = z - \varepsilon L L^\top g + \sqrt{2 \varepsilon T}\, L \xi`.

    Args:
        z: positions, shape ``(chains, dim)``.
        grad: the gradient :math:`g = \nabla U(z)`, shape ``(chains, dim)``.
        step_size: :math:`\varepsilon`, shape ``()`` or one per chain ``(chains, 1)``.
        inverse_mass_sqrt: :math:`L`, see :func:`~pyro_ebm.ops.steps.precondition.precondition`.
        temperature: :math:`T`, shape ``()``.
        noise: :math:`\xi`, standard normal, shape ``(chains, dim)``.

    Returns:
        The new positions, shape ``(chains, dim)``.

    Example:
        >>> z, grad, noise = torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2)
        >>> langevin_proposal(z, grad, torch.tensor(0.1), None, torch.tensor(1.0), noise)
        tensor([[-0.1000, -0.1000]])
    """
    # h (xi - (h / 2T) L^T g) = sqrt(2 eps T) xi - eps L^T g
    h = (2 * step_size * temperature).sqrt()
    return drift(
        z, kick(noise, grad, h / (2 * temperature), inverse_mass_sqrt), h, inverse_mass_sqrt
    )


def langevin_log_accept_ratio(
    potential: Tensor,
    grad: Tensor,
    new_potential: Tensor,
    new_grad: Tensor,
    step_size: Tensor,
    inverse_mass_sqrt: Factor | None,
    temperature: Tensor,
    noise: Tensor,
) -> Tensor:
    r"""The log of the Metropolis-Hastings ratio of one Langevin step.

    .. math:: \log \frac{e^{-U(z') / T}\, q(z \mid z')}{e^{-U(z) / T}\, q(z' \mid z)}
              = \frac{U(z) - U(z')}{T} + \frac{|\xi|^2 - |\xi'|^2}{2}

    where :math:`\xi'` is the noise that leads from :math:`z'` back to :math:`z`.

    Args:
        potential: :math:`U(z)`, shape ``(chains,)``.
        grad: :math:`\nabla U(z)`, shape ``(chains, dim)``.
        new_potential: :math:`U(z')`, shape ``(chains,)``.
        new_grad: :math:`\nabla U(z')`, shape ``(chains, dim)``.
        step_size: as in :func:`langevin_proposal`.
        inverse_mass_sqrt: as in :func:`langevin_proposal`.
        temperature: as in :func:`langevin_proposal`.
        noise: the noise :math:`\xi` that led from :math:`z` to :math:`z'`.

    Returns:
        The log ratio, shape ``(chains,)``; above 0 where the proposal is sure to be accepted.

    Example:
        >>> one = torch.ones(1)
        >>> g = torch.zeros(1, 3)
        >>> langevin_log_accept_ratio(one, g, one + 2, g, one, None, one, torch.randn(1, 3))
        tensor([-2.])
    """
    # z - z' = -eps L L^T g' + sqrt(2 eps T) L xi'  and  z' - z = -eps L L^T g + sqrt(2 eps T) L xi
    # add up to  -xi' = xi - sqrt(eps / 2T) L^T (g + g'),  the momentum after both half kicks: the
    # ratio is the change of the energy U / T + |xi|^2 / 2, with no linear system to solve.
    half = (step_size / (2 * temperature)).sqrt()
    momentum = kick(noise, grad + new_grad, half, inverse_mass_sqrt)
    return -energy_change(potential / temperature, noise, new_potential / temperature, momentum)
