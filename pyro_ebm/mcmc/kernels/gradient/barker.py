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
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.nn.functional import softplus

from pyro_ebm.mcmc.engine.engine import JitCompile
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.gradient.langevin import MAX_ENERGY_ERROR
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_number
from pyro_ebm.ops.steps.metropolis import log_uniform, metropolis_accept
from pyro_ebm.ops.steps.precondition import precondition, precondition_transposed


class BarkerKernel(Kernel):
    r"""Metropolis-Hastings with the Barker proposal: the robust relative of Langevin.

    It moves on where :class:`~pyro_ebm.LangevinKernel` rejects everything: the step size is too
    large, chains start where the potential is steep, scales differ and warmup is short. One
    gradient a transition.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        step_size: :math:`\varepsilon`, in units of the adapted covariance, half the variance of a
            jump: the first one when it is adapted.
        spread: :math:`s` in (0, 1], of the lengths of the jumps; 1 is Gaussian noise, the most
            robust. With 0.1 it is as efficient as MALA, and less robust.
        adapt_step_size: whether warmup adapts :math:`\varepsilon`.
        adapt_mass_matrix: whether warmup adapts the covariance :math:`\Sigma = L L^\top`; jumps
            are then of the coordinates of :math:`L^{-1} z`.
        full_mass: whether :math:`\Sigma` is dense or diagonal.
        target_accept_prob: mean acceptance probability to adapt to; 0.574 is optimal in high
            dimension.
        transforms: from the supports to the reals, where they should not be Pyro's.
        max_plate_nesting: as in Pyro's kernels.
        jit_compile: False, ``"capture"``, True or ``"auto"``: whether to run the transition as a
            graph, and whether to compile that (:mod:`pyro_ebm.mcmc.engine.engine`).
        ignore_jit_warnings: whether to silence warnings of the capture.
        init_strategy: where chains start, as in Pyro's kernels.

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
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 0.1,
        spread: float = 1.0,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool = False,
        target_accept_prob: float = 0.574,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: JitCompile = False,
        ignore_jit_warnings: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        check_number("spread", spread)
        if not 0 < spread <= 1:
            raise ValueError(f"spread must lie in (0, 1], got {spread}: 1 is Gaussian noise")
        super().__init__(
            model=model,
            potential_fn=potential_fn,
            step_size=step_size,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            full_mass=full_mass,
            target_accept_prob=target_accept_prob,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            ignore_jit_warnings=ignore_jit_warnings,
            init_strategy=init_strategy,
        )
        self.spread = float(spread)

    def draw(self, state: State) -> tuple[Any, ...]:
        """The jumps, the factor, the uniforms of their signs and that of the acceptance."""
        length = (1 - self.spread**2) ** 0.5 + self.spread * torch.randn_like(state.z)
        return (
            (2 * self.step_size_of(state)).sqrt() * length,
            self.inverse_mass_sqrt,
            torch.rand_like(state.z),
            log_uniform(state.potential),
        )

    def transition(
        self, state: State, jump: Tensor, inverse_mass_sqrt: Tensor | None, u: Tensor, log_u: Tensor
    ) -> tuple[State, Info]:
        """One jump of every coordinate, and its acceptance or rejection."""
        assert state.grad is not None
        slope = -precondition_transposed(
            inverse_mass_sqrt, state.grad
        )  # of log p, in whitened coordinates
        jump = torch.where(u < (jump * slope).sigmoid(), jump, -jump)
        new = self.evaluate(state.z + precondition(inverse_mass_sqrt, jump))
        assert new.grad is not None
        new_slope = -precondition_transposed(inverse_mass_sqrt, new.grad)
        #   p(z') q(z | z')     exp(-U(z'))         1 + exp(-jump_i slope_i)
        #   ---------------  =  -----------  prod_i ------------------------
        #   p(z)  q(z' | z)     exp(-U(z) )         1 + exp(jump_i slope'_i)
        log_q_ratio = (softplus(-jump * slope) - softplus(jump * new_slope)).sum(-1)
        log_ratio = state.potential - new.potential + log_q_ratio
        valid = new.potential.isfinite() & new.grad.isfinite().all(-1)
        accept_prob, accepted = metropolis_accept(log_ratio, valid, log_u)
        diverging = ~(valid & (log_ratio >= -MAX_ENERGY_ERROR))  # NaN diverges too
        return self.choose(accepted, new, state), Info(accept_prob, diverging)
