r"""The leapfrog step of Hamiltonian dynamics, written once.

A particle of unit mass in the whitened coordinates :math:`w = L^{-1} z` has the energy

.. math:: H(z, p) = U(z) + \tfrac12 |p|^2

and moves by :math:`\dot z = L p`, :math:`\dot p = -L^\top \nabla U(z)`. A leapfrog step of length
:math:`h` *kicks* the momentum for half of the step, lets the position *drift* for a whole one, and
kicks again. It keeps volumes, run backwards it retraces its way, and after a fixed time its energy
is off by :math:`O(h^2)`.

The Langevin step of length :math:`\varepsilon` is a leapfrog step of length
:math:`h = \sqrt{2 \varepsilon}` (:mod:`pyro_ebm.ops.steps.langevin`).

Reference:
    Duane, Kennedy, Pendleton and Roweth (1987), Hybrid Monte Carlo. Neal (2011), MCMC using
    Hamiltonian dynamics.
"""

from torch import Tensor

from pyro_ebm.ops.steps.precondition import Factor, precondition, precondition_transposed


def kick(
    momentum: Tensor, grad: Tensor, step_size: Tensor, inverse_mass_sqrt: Factor | None
) -> Tensor:
    r"""The momentum :math:`p' = p - h L^\top g` after a force was at work for a time :math:`h`.

    Args:
        momentum: :math:`p`, shape ``(chains, dim)``.
        grad: the gradient :math:`g = \nabla U(z)`, shape ``(chains, dim)``.
        step_size: :math:`h`, shape ``()`` or one per chain ``(chains, 1)``.
        inverse_mass_sqrt: :math:`L`, see :func:`~pyro_ebm.ops.steps.precondition.precondition`.

    Returns:
        The new momentum, shape ``(chains, dim)``.

    Example:
        >>> kick(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(0.1), None)
        tensor([[-0.1000, -0.1000]])
    """
    return momentum - step_size * precondition_transposed(inverse_mass_sqrt, grad)


def drift(
    z: Tensor, momentum: Tensor, step_size: Tensor, inverse_mass_sqrt: Factor | None
) -> Tensor:
    r"""The position :math:`z' = z + h L p` after a flight of a time :math:`h`.

    Args:
        z: positions, shape ``(chains, dim)``.
        momentum: :math:`p`, shape ``(chains, dim)``.
        step_size: :math:`h`, as in :func:`kick`.
        inverse_mass_sqrt: :math:`L`, as in :func:`kick`.

    Returns:
        The new positions, shape ``(chains, dim)``.

    Example:
        >>> inverse_mass_sqrt = torch.tensor([[1.0, 10.0]])
        >>> drift(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(0.1), inverse_mass_sqrt)
        tensor([[0.1000, 1.0000]])
    """
    return z + precondition(inverse_mass_sqrt, step_size * momentum)


def energy_change(
    potential: Tensor, momentum: Tensor, new_potential: Tensor, new_momentum: Tensor
) -> Tensor:
    r"""The change :math:`H(z', p') - H(z, p)` of the energy, 0 along the exact flow.

    A proposal that is a trajectory is accepted with probability
    :math:`\min(1, e^{H(z, p) - H(z', p')})`: leapfrog steps keep volumes and can be reversed, so
    that no other factor enters.

    Args:
        potential: :math:`U(z)`, shape ``(chains,)``.
        momentum: :math:`p`, shape ``(chains, dim)``.
        new_potential: :math:`U(z')`, shape ``(chains,)``.
        new_momentum: :math:`p'`, shape ``(chains, dim)``.

    Returns:
        The change, shape ``(chains,)``.

    Example:
        >>> energy_change(torch.ones(1), torch.ones(1, 2), torch.zeros(1), torch.zeros(1, 2))
        tensor([-2.])
    """
    kinetic = (new_momentum.square() - momentum.square()).sum(-1) / 2
    return new_potential - potential + kinetic
