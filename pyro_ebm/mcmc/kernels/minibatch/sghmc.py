r"""Hamiltonian dynamics with friction, on minibatches (SGHMC).

A velocity :math:`u` remembers the last steps, and friction :math:`\alpha` takes out the heat that
the noise of the subsamples puts in:

.. math:: u' = (1 - \alpha)\, u - \alpha \varepsilon A\, \hat g(z) + \alpha \sqrt{2 \varepsilon}\,
          L \xi, \qquad z' = z + u'.

:math:`\alpha = 1` is the Langevin step. (In the words of the paper the learning rate is
:math:`\eta = \alpha \varepsilon`, and the noise :math:`\sqrt{2 \alpha \eta}`.) On a Gaussian of
curvature 1, with gradients of variance :math:`s`, the stationary variance is

.. math:: \frac{1 + \varepsilon s / 2}{1 - \alpha \varepsilon / (2 (2 - \alpha))}.

The noise weighs as much as for the Langevin step, the length of the step less by
:math:`\alpha / (2 - \alpha)`: it is the longer step where the subsamples are not what limits it,
as with control variates and directions of unlike scales.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.kernels.accept import accept_valid
from pyro_ebm.mcmc.kernels.minibatch.control_variates import Center
from pyro_ebm.mcmc.kernels.minibatch.kernel import MinibatchKernel, MinibatchSettings, Rows
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_number
from pyro_ebm.ops.steps.metropolis import select
from pyro_ebm.ops.steps.precondition import Factor, precondition, precondition_transposed


class SGHMCKernel(MinibatchKernel):
    r"""Stochastic gradient Hamiltonian Monte Carlo, for models with subsampled plates.

    .. math:: u' = (1 - \alpha)\, u - \alpha \varepsilon A\, \hat g(z) + \alpha \sqrt{2
              \varepsilon}\, L \xi, \qquad z' = z + u'

    Every transition looks at a fresh subsample of each plate ``pyro.plate(..., subsample_size=n)``.
    **The draws are biased**, as those of :class:`~pyro_ebm.SGLDKernel`.

    Args:
        friction: :math:`\alpha`, in (0, 1].
        **kwargs: all others are those of :class:`~pyro_ebm.SGLDKernel`.

    Raises:
        NotImplementedError: for a latent inside a subsampled plate (when run).
        ValueError: for an argument out of its range.

    Reference:
        Chen, Fox and Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo.

    Example:
        >>> from pyro_ebm import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y), subsample_size=20) as rows:
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])
        >>> kernel = SGHMCKernel(model, control_variates=True)
        >>> mcmc = MCMC(kernel, 300, 100, num_chains=10, disable_progbar=True)
        >>> mcmc.run(torch.linspace(-1.0, 3.0, 1000))
        >>> mu = mcmc.get_samples()["mu"]  # the posterior is N(1, 1 / 1000)
        >>> bool((mu.mean() - 1).abs() < 0.01), bool((mu.std() / 1000**-0.5 - 1).abs() < 0.15)
        (True, True)
    """

    saved = (*MinibatchKernel.saved, "_velocity")
    _velocity: Tensor | None = None

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float | None = None,
        friction: float = 0.3,
        **kwargs: Unpack[MinibatchSettings],
    ):
        super().__init__(model, potential_fn, step_size=step_size, **kwargs)
        check_number("friction", friction)
        if not 0 < friction <= 1:
            raise ValueError(f"friction must lie in (0, 1], got {friction}")
        self.friction = float(friction)

    @property
    def curvature_weight(self) -> float:
        """How much the curvature weighs in the bias, beside the noise."""
        return self.friction / (2 - self.friction)

    def draw(self, state: State) -> tuple[Any, ...]:
        """Velocity, step size, preconditioner, noise, the rows of the new state, and the center."""
        self._rows = self.draw_rows(len(state.z))
        velocity = torch.zeros_like(state.z) if self._velocity is None else self._velocity
        step_size, factor = self.steps_of(state)
        noise = torch.randn_like(state.z)
        return velocity, step_size, factor, noise, self._rows, self._center

    def transition(
        self,
        state: State,
        velocity: Tensor,
        step_size: Tensor,
        factor: Factor | None,
        noise: Tensor,
        rows: Rows,
        center: Center | None,
    ) -> tuple[State, Info, Tensor]:
        """One step with friction: the state, its statistics, and the velocity."""
        assert state.grad is not None
        # (1 - a) u + a (sqrt(2 eps) L xi - eps L L^T g)
        langevin = (2 * step_size).sqrt() * precondition(factor, noise)
        pull = precondition(factor, precondition_transposed(factor, state.grad))
        moved = (1 - self.friction) * velocity + self.friction * (langevin - step_size * pull)
        new = self.estimate(state.z + moved, rows, center)
        after, info = accept_valid(state, new)
        return after, info, select(~info.diverging, moved, torch.zeros_like(moved))

    def move(self, state: State) -> tuple[State, Info]:
        """One transition of all chains."""
        state, info, self._velocity = self.run_fn(state, *self.draw(state))
        return state, info
