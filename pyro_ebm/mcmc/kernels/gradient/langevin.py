r"""Langevin dynamics, with and without the Metropolis correction.

The proposal follows the gradient downhill and adds noise
(:func:`~pyro_ebm.ops.steps.langevin.langevin_proposal`). Accepted or rejected by Metropolis' rule
it is MALA and leaves the target exactly invariant. Always accepted it is the unadjusted Langevin
algorithm (ULA), whose stationary distribution is off by :math:`O(\varepsilon)`: on
:math:`N(0, s^2)` its variance is :math:`s^2 / (1 - \varepsilon / 2 s^2)`.
"""

import math
import warnings
from collections.abc import Callable
from typing import Self, Unpack

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.adaptation.metric import FullMass
from pyro_ebm.mcmc.kernels.accept import MAX_ENERGY_ERROR, accept, accept_valid
from pyro_ebm.mcmc.kernels.gradient.local import LocalKernel
from pyro_ebm.mcmc.kernels.transition import TransitionSettings, check_positive
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.integration.line_integral import gradient_tells_all
from pyro_ebm.ops.steps.langevin import langevin_log_accept_ratio, langevin_proposal
from pyro_ebm.ops.steps.metropolis import log_uniform
from pyro_ebm.ops.steps.precondition import Factor

NUM_COMPARED = 16
"""The least number of lines on which the gradient is compared with the change of U."""


class LangevinKernel(LocalKernel):
    r"""MALA (``adjusted=True``) or the unadjusted Langevin algorithm, for any number of chains.

    .. math:: z' = z - \varepsilon\, \Sigma\, \nabla U(z) + \sqrt{2 \varepsilon T}\, L \xi,
              \qquad \Sigma = L L^\top

    targets :math:`e^{-U(z) / T}` on the unconstrained space, with :math:`\Sigma` the adapted
    covariance. At temperature 1 that is the posterior; another temperature acts on the potential,
    the Jacobians of constrained sites included.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        step_size: :math:`\varepsilon`, in units of :math:`\Sigma`: the first one when it is
            adapted. Unadjusted, it may be a callable from the number of transitions made
            (0, 1, 2, ... warmup included) to the step size: with a schedule that falls to 0 slowly
            enough the bias vanishes, as for :math:`(1 + t)^{-1/3}`.
        adjusted: whether proposals are accepted or rejected (MALA); if not, all are taken, except
            those where the potential is not finite, which count as divergent.
        temperature: :math:`T`.
        adapt_step_size: whether warmup adapts :math:`\varepsilon`; by default if ``adjusted``.
        adapt_mass_matrix: whether warmup adapts :math:`\Sigma`; by default if ``adjusted``, so that
            the unadjusted algorithm is the textbook's unless asked otherwise.
        full_mass: whether :math:`\Sigma` is dense, diagonal or of low rank, see
            :class:`~pyro_ebm.mcmc.TransitionKernel`.
        target_accept_prob: mean acceptance probability to adapt to; 0.574 is optimal in high
            dimension.
        **kwargs: ``jit_compile``, ``ignore_jit_warnings``, ``transforms``, ``max_plate_nesting``
            and ``init_strategy`` of :class:`~pyro_ebm.mcmc.TransitionKernel`.

    Raises:
        ValueError: for an argument out of its range, or a step-size adaptation without
            acceptance to adapt to.

    Reference:
        Roberts and Tweedie (1996), Exponential convergence of Langevin distributions and their
        discrete approximations. Roberts and Rosenthal (1998), Optimal scaling of discrete
        approximations to Langevin diffusions. Welling and Teh (2011), Bayesian learning via
        stochastic gradient Langevin dynamics (decreasing steps).

    Example:
        >>> from pyro_ebm import MCMC
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> mcmc = MCMC(LangevinKernel(model), 200, num_chains=50, disable_progbar=True)
        >>> mcmc.run(torch.tensor(2.0))
        >>> x = mcmc.get_samples()["x"]  # the posterior is N(1, 1/2)
        >>> bool((x.mean() - 1).abs() < 0.05), bool((x.var() - 0.5).abs() < 0.05)
        (True, True)
    """

    _temperature: tuple[float, Tensor] | None = None  # a number, and its tensor

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float | Callable[[int], float] = 0.1,
        adjusted: bool = True,
        temperature: float = 1.0,
        adapt_step_size: bool | None = None,
        adapt_mass_matrix: bool | None = None,
        full_mass: FullMass = "auto",
        target_accept_prob: float = 0.574,
        **kwargs: Unpack[TransitionSettings],
    ):
        schedule = step_size if callable(step_size) else None
        if schedule is not None and (adapt_step_size or (adjusted and adapt_step_size is None)):
            raise ValueError(
                "a step_size schedule cannot be adapted: give a number, or"
                " adapt_step_size=False, or adjusted=False"
            )
        if adapt_step_size and not adjusted:
            raise ValueError(
                "adapt_step_size=True needs adjusted=True: the unadjusted algorithm accepts"
                " everything, so there is no acceptance to adapt to"
            )
        check_positive("temperature", temperature)
        super().__init__(
            model,
            potential_fn,
            step_size=_scheduled(step_size, 0) if callable(step_size) else step_size,
            adapt_step_size=adjusted if adapt_step_size is None else adapt_step_size,
            adapt_mass_matrix=adjusted if adapt_mass_matrix is None else adapt_mass_matrix,
            full_mass=full_mass,
            target_accept_prob=target_accept_prob,
            **kwargs,
        )
        self.adjusted, self.temperature, self.schedule = adjusted, float(temperature), schedule

    @classmethod
    def short_run(
        cls,
        points: Tensor | Distribution,
        fraction: float = 0.005,
        temperature: float = 1.0,
        **kwargs: Unpack[TransitionSettings],
    ) -> Self:
        r"""A fixed step without an acceptance test, for short runs of contrastive divergence.

        .. math:: \varepsilon = c\, \tfrac1d \operatorname{tr} \operatorname{Cov}(x)

        The Langevin dynamics of the literature on image energies. Of a piece of the density of
        width :math:`w` it must be well below :math:`2 w^2`, where the step is no longer stable.

        Args:
            points: data, shape ``(n, *event)``, or a base of their width, with a ``variance``.
            fraction: :math:`c`, of their mean variance. At .005 a piece of a tenth of their spread
                is drawn 15 percent too wide.
            temperature: as of the kernel.
            **kwargs: as of the kernel.

        Raises:
            ValueError: if the points have no variance that is positive and finite.

        Example:
            >>> LangevinKernel.short_run(dist.Normal(torch.zeros(2), 2.0).to_event(1))
            LangevinKernel(step_size=0.02, adjusted=False)
        """
        spread = points.var(0, correction=0) if isinstance(points, Tensor) else points.variance
        variance = float(spread.mean())
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(
                f"points must have a positive and finite variance, got {variance}: give data of"
                " several rows, or LangevinKernel(adjusted=False, step_size=...)"
            )
        check_positive("fraction", fraction)
        step_size = fraction * variance
        return cls(step_size=step_size, adjusted=False, temperature=temperature, **kwargs)

    def init(self, z: Tensor) -> State:
        """The state at the first positions; unadjusted, the gradient must tell of all the density.

        Warns:
            UserWarning: if it does not, as where a part of the energy is detached or jumps.
        """
        state = super().init(z)
        if not self.adjusted and self.checks_potential and self.potential.dim:
            warn_of_hidden_changes(self.potential, z, "use adjusted=True")
        return state

    def draw(self, state: State) -> tuple[Tensor, Factor | None, Tensor, Tensor, Tensor | None]:
        """Step size, inverse mass matrix, temperature, noise, and the uniform if ``adjusted``."""
        if self.schedule is not None:
            now = _scheduled(self.schedule, self._steps)
            self.adaptation.step_size = torch.full_like(self.adaptation.step_size, now)
        if self._temperature is None or self._temperature[0] != self.temperature:
            self._temperature = self.temperature, state.z.new_tensor(self.temperature)
        noise = torch.randn_like(state.z)
        log_u = log_uniform(state.potential) if self.adjusted else None
        return self.step_size_of(state), self.inverse_mass_sqrt, self._temperature[1], noise, log_u

    def transition(
        self,
        state: State,
        step_size: Tensor,
        inverse_mass_sqrt: Factor | None,
        temperature: Tensor,
        noise: Tensor,
        log_u: Tensor | None,
    ) -> tuple[State, Info]:
        """One Langevin step, and its acceptance or rejection if ``adjusted``."""
        assert state.grad is not None
        z = langevin_proposal(state.z, state.grad, step_size, inverse_mass_sqrt, temperature, noise)
        new = self.evaluate(z)
        if log_u is None:
            return accept_valid(state, new)
        assert new.grad is not None
        #   p(z') q(z | z')     exp(-U(z') / T)   exp(-|xi'|^2 / 2)
        #   ---------------  =  --------------- * -----------------
        #   p(z)  q(z' | z)     exp(-U(z)  / T)   exp(-|xi|^2  / 2)
        log_ratio = langevin_log_accept_ratio(
            state.potential,
            state.grad,
            new.potential,
            new.grad,
            step_size,
            inverse_mass_sqrt,
            temperature,
            noise,
        )
        return accept(state, new, log_ratio, log_u, MAX_ENERGY_ERROR)


def warn_of_hidden_changes(potential: Potential, z: Tensor, way: str) -> None:
    """Warns if the gradients at positions ``(chains, dim)`` do not tell of all the density.

    Args:
        potential: whose gradient is all that is seen.
        z: the positions.
        way: what to do, in words.
    """
    starts = z.repeat(-(-NUM_COMPARED // len(z)), 1)
    ends = starts + torch.linspace(0.1, 1.0, len(starts)).to(z)[:, None]
    if not gradient_tells_all(potential.value_and_grad, starts, ends):
        warnings.warn(
            f"the gradient of the log density of {potential.names} does not account for its changes"
            " (a part of it is detached, or jumps), and without a Metropolis test nothing but"
            f" gradients is seen, so that the draws follow another density: {way}, or repair the"
            " energy",
            stacklevel=3,
        )


def _scheduled(schedule: Callable[[int], float], t: int) -> float:
    step_size = float(schedule(t))
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"the step_size schedule gave {step_size} at step {t}: it must be > 0")
    return step_size
