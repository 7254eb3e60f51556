r"""The Barker proposal: the gradient chooses the sign of each jump, not its length.

Each coordinate draws a jump :math:`\xi_i` of variance :math:`2 \varepsilon`, and makes it with
probability

.. math:: \sigma(\xi_i\, \partial_i \log p(z)) = \frac{1}{1 + e^{-\xi_i\, \partial_i \log p(z)}},

or else backwards. For small steps its mean is :math:`\varepsilon\, \partial_i \log p`, that of a
Langevin step. For large ones it is not: a Langevin step is as long as the gradient says, overshoots
where that is steep, and is rejected for ever; a Barker step is no longer than its noise. As a scale
of the target becomes small beside the step, the spectral gap of MALA falls exponentially, and that
of this proposal only polynomially, as a random walk's does.

The jumps may be of nearly one length,

.. math:: \xi_i = \sqrt{2 \varepsilon} \left( \sqrt{1 - s^2} + s\, \eta_i \right),
          \qquad \eta_i \sim N(0, 1).

A small *spread* :math:`s` is twice as efficient as :math:`s = 1`, Gaussian noise, once the step
size is right. Gaussian noise holds some small jumps ready for when it is not.

Reference:
    Livingstone and Zanella (2022), The Barker proposal: combining robustness and efficiency in
    gradient-based MCMC. Vogrinc, Livingstone and Zanella (2023), Optimal design of the Barker
    proposal and other locally balanced Metropolis-Hastings algorithms (the spread).
"""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.kernels.accept import MAX_ENERGY_ERROR, accept
from pyro_ebm.mcmc.kernels.gradient.local import LocalKernel
from pyro_ebm.mcmc.kernels.transition import AdaptationSettings
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_number
from pyro_ebm.ops.steps.metropolis import log_uniform
from pyro_ebm.ops.steps.precondition import Factor, precondition, precondition_transposed


class BarkerKernel(LocalKernel):
    r"""Metropolis-Hastings with the Barker proposal: the robust relative of Langevin.

    It moves on where :class:`~pyro_ebm.LangevinKernel` rejects everything: the step size is too
    large, chains start where the potential is steep, scales differ and warmup is short. One
    gradient a transition.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        step_size: :math:`\varepsilon`, in units of :math:`L` below, half the variance of a
            jump: the first one when it is adapted.
        spread: :math:`s` in (0, 1], of the lengths of the jumps; 1 is Gaussian noise, the most
            robust. With 0.1 it is as efficient as MALA, and less robust.
        target_accept_prob: mean acceptance probability to adapt to; 0.574 is optimal in high
            dimension.
        **kwargs: ``adapt_step_size``, ``adapt_mass_matrix``, ``full_mass``, ``jit_compile``,
            ``ignore_jit_warnings``, ``transforms``, ``max_plate_nesting`` and ``init_strategy`` of
            :class:`~pyro_ebm.mcmc.TransitionKernel`. With an adapted inverse
            mass matrix :math:`\Sigma = L L^\top`, jumps are of the coordinates of :math:`L^{-1} z`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> from pyro_ebm import MCMC
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> mcmc = MCMC(BarkerKernel(model), 200, num_chains=50, disable_progbar=True)
        >>> mcmc.run(torch.tensor(2.0))
        >>> x = mcmc.get_samples()["x"]  # the posterior is N(1, 1/2)
        >>> bool((x.mean() - 1).abs() < 0.05), bool((x.var() - 0.5).abs() < 0.05)
        (True, True)
    """

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 0.1,
        spread: float = 1.0,
        target_accept_prob: float = 0.574,
        **kwargs: Unpack[AdaptationSettings],
    ):
        check_number("spread", spread)
        if not 0 < spread <= 1:
            raise ValueError(f"spread must lie in (0, 1], got {spread}: 1 is Gaussian noise")
        super().__init__(
            model, potential_fn, step_size, target_accept_prob=target_accept_prob, **kwargs
        )
        self.spread = float(spread)

    def draw(self, state: State) -> tuple[Tensor, Factor | None, Tensor, Tensor]:
        """The jumps, the inverse mass matrix, and the uniforms of signs and of the acceptance."""
        length = (1 - self.spread**2) ** 0.5 + self.spread * torch.randn_like(state.z)
        return (
            (2 * self.step_size_of(state)).sqrt() * length,
            self.inverse_mass_sqrt,
            torch.rand_like(state.z),
            log_uniform(state.potential),
        )

    def transition(
        self, state: State, jump: Tensor, inverse_mass_sqrt: Factor | None, u: Tensor, log_u: Tensor
    ) -> tuple[State, Info]:
        """One jump of every coordinate, and its acceptance or rejection."""
        assert state.grad is not None
        # the slope of log p, in whitened coordinates
        slope = -precondition_transposed(inverse_mass_sqrt, state.grad)
        jump = torch.where(u < (jump * slope).sigmoid(), jump, -jump)
        new = self.evaluate(state.z + precondition(inverse_mass_sqrt, jump))
        assert new.grad is not None
        new_slope = -precondition_transposed(inverse_mass_sqrt, new.grad)
        #   p(z') q(z | z')     exp(-U(z'))         1 + exp(-jump_i slope_i)
        #   ---------------  =  -----------  prod_i ------------------------
        #   p(z)  q(z' | z)     exp(-U(z) )         1 + exp(jump_i slope'_i)
        log_q_ratio = (softplus(-jump * slope) - softplus(jump * new_slope)).sum(-1)
        log_ratio = state.potential - new.potential + log_q_ratio
        return accept(state, new, log_ratio, log_u, MAX_ENERGY_ERROR)
