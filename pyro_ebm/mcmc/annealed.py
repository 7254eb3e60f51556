r"""Annealed Langevin dynamics: chains that come down the noise levels of an energy.

At each level :math:`\sigma_i`, from the largest on, the chains make Langevin steps

.. math:: x' = x + \varepsilon_i\, s(x; \sigma_i) + \sqrt{2 \varepsilon_i}\, \xi,
          \qquad \varepsilon_i = c\, \sigma_i^2,

of a size that is the same part of the width of the noise at all levels. Broad levels divide the
chains among far modes, which those that start at the smallest level do not cross. From there on
the shares lag behind, the more the faster the ladder is walked, if nothing but these steps moves
the chains. Where the levels are one density with more and less noise, a step that takes the noise
off,

.. math:: x' = x + g\, s(x; \sigma_i) + \sqrt g\, \frac{\sigma_{i+1}}{\sigma_i}\, \xi,
          \qquad g = \sigma_i^2 - \sigma_{i+1}^2,

leads from a draw at one level to one at the next, up to :math:`O(g)`, at no cost (it uses the last
score). The levels of a product are not such, and it is left out.

Reference:
    Song and Ermon (2019), Generative modeling by estimating gradients of the data distribution.
    Song et al. (2021), Score-based generative modeling through stochastic differential equations
    (predictor and corrector).
"""

import torch
from torch import Tensor

from pyro_ebm.distributions.core.supports import is_unbounded
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.kernels.transition import check_positive
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.ops.arguments import check_count, shown


@torch.no_grad()
def annealed_langevin(
    p: UnnormalizedEnergy,
    x: Tensor,
    steps_per_level: int = 20,
    step_size: float = 0.1,
    adjusted: bool = False,
) -> Tensor:
    r"""Leads points through the noise levels of an energy, from the largest to the smallest.

    ``p.sample`` does so from its starting points, and goes on by adjusted transitions at the
    smallest level. By itself the result is approximate: it has the bias of the steps and of a
    ladder that is walked in finite time.

    Args:
        p: a noise-conditional energy (:func:`~pyro_ebm.noise_conditional`), or a product of some.
        x: where chains start, shape ``(n, *batch, *event)``.
        steps_per_level: transitions at each level.
        step_size: :math:`c`; stable below 2 where the data add no curvature. (Of a tempered energy
            or a product it is divided by the sum of the coefficients.)
        adjusted: whether transitions are accepted or rejected at their level.

    Returns:
        Points, the shape of ``x``.

    Raises:
        ValueError: if the energy has no noise levels or a constrained support, or points are not
            finite.

    Example:
        >>> from pyro_ebm.distributions import noise_conditional
        >>> def energy(x, sigma):  # N(3, .5^2), and noise
        ...     return (x - 3) ** 2 / (0.25 + sigma**2) / 2
        >>> p = noise_conditional(energy, [4.0, 2.0, 1.0, 0.5, 0.25, 0.1])
        >>> x = annealed_langevin(p, p.starting_points((1000,)))
        >>> bool((x.mean() - 3).abs() < 0.1)
        True
    """
    check_count("steps_per_level", steps_per_level)
    check_positive("step_size", step_size)
    if not isinstance(p, UnnormalizedEnergy) or not p.sigmas:
        raise ValueError(
            f"p must have noise levels, as noise_conditional(energy, sigmas) does, got {shown(p)}"
        )
    if not is_unbounded(p.support):
        raise ValueError(
            f"noise leads out of the support {p.support}: annealed_langevin is for the reals. Start"
            " chains at p.starting_points(), and move them by a kernel at the smallest level"
        )
    x = p.broadcast(x)
    if not (x.is_floating_point() and x.isfinite().all()):
        raise ValueError(f"x must be finite floating points, got {shown(x)}")
    # the curvature of beta E, or of a sum, is as many times that of one
    strength = max(1.0, sum(float(torch.as_tensor(c).abs().max()) for c, _ in p.terms))
    before, grad = 0.0, x
    for sigma in p.sigmas:
        potential = EnergyPotential(p.at(sigma), like=x)
        kernel = LangevinKernel(
            step_size=step_size * sigma**2 / strength, adjusted=adjusted, adapt_step_size=False
        )
        kernel.checks_potential = False
        kernel.bind(potential, warmup_steps=0)
        z = potential.to_position(x)
        if before and p.noised:
            g = before**2 - sigma**2
            z = z - g * grad + g**0.5 * sigma / before * torch.randn_like(z)
        state = kernel.init(z)
        for _ in range(steps_per_level):
            state, _ = kernel.step(state)
        assert state.grad is not None
        x, before, grad = potential.to_points(state.z).reshape(x.shape), sigma, state.grad
    return x
