r"""Langevin dynamics, with and without the Metropolis correction.

The proposal follows the gradient downhill and adds noise
(:func:`~pyro_ebm.ops.steps.langevin.langevin_proposal`). Accepted or rejected by Metropolis' rule
it is MALA and leaves the target exactly invariant. Always accepted it is the unadjusted Langevin
algorithm (ULA), whose stationary distribution is off by :math:`O(\varepsilon)`: on
:math:`N(0, s^2)` its variance is :math:`s^2 / (1 - \varepsilon / 2 s^2)`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.mcmc.engine.engine import JitCompile
from pyro_ebm.mcmc.kernels.base import Kernel, check_positive
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.steps.langevin import langevin_log_accept_ratio, langevin_proposal
from pyro_ebm.ops.steps.metropolis import log_uniform, metropolis_accept

MAX_ENERGY_ERROR = 1000.0  # a log ratio below minus this is a divergence, as in NUTS


def refuse_temperature(kernel: Kernel, why: str) -> None:
    """Refuses a kernel that samples at another temperature than 1, or holds one.

    Args:
        kernel: any kernel.
        why: what cannot be with it.

    Raises:
        ValueError: names the kernel, its temperature, and the reason.
    """
    for part in (kernel, *getattr(kernel, "kernels", ())):
        if (temperature := getattr(part, "temperature", 1.0)) != 1:
            raise ValueError(f"{part!r} has temperature={temperature}, but {why}: leave it at 1")


class LangevinKernel(Kernel):
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
        full_mass: whether :math:`\Sigma` is dense or diagonal.
        target_accept_prob: mean acceptance probability to adapt to; 0.574 is optimal in high
            dimension.
        transforms: from the supports to the reals, where they should not be Pyro's.
        max_plate_nesting: as in Pyro's kernels.
        jit_compile: False, ``"capture"``, True or ``"auto"``: whether to run the transition as a
            graph, and whether to compile that (:mod:`pyro_ebm.mcmc.engine.engine`). Compiling takes
            seconds, and pays in long runs.
        ignore_jit_warnings: whether to silence warnings of the capture.
        init_strategy: where chains start, as in Pyro's kernels.

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

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float | Callable[[int], float] = 0.1,
        adjusted: bool = True,
        temperature: float = 1.0,
        adapt_step_size: bool | None = None,
        adapt_mass_matrix: bool | None = None,
        full_mass: bool = False,
        target_accept_prob: float = 0.574,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: JitCompile = False,
        ignore_jit_warnings: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
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
            model=model,
            potential_fn=potential_fn,
            step_size=_scheduled(schedule, 0) if callable(step_size) else step_size,
            adapt_step_size=adjusted if adapt_step_size is None else adapt_step_size,
            adapt_mass_matrix=adjusted if adapt_mass_matrix is None else adapt_mass_matrix,
            full_mass=full_mass,
            target_accept_prob=target_accept_prob,
            transforms=transforms,
            max_plate_nesting=max_plate_nesting,
            jit_compile=jit_compile,
            ignore_jit_warnings=ignore_jit_warnings,
            init_strategy=init_strategy,
        )
        self.adjusted, self.temperature, self.schedule = adjusted, float(temperature), schedule

    def draw(self, state: State) -> tuple[Any, ...]:
        """The step size, factor, temperature, noise, and the uniform if one decides."""
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
        inverse_mass_sqrt: Tensor | None,
        temperature: Tensor,
        noise: Tensor,
        log_u: Tensor | None,
    ) -> tuple[State, Info]:
        """One Langevin step, and its acceptance or rejection if ``adjusted``."""
        assert state.grad is not None
        z = langevin_proposal(state.z, state.grad, step_size, inverse_mass_sqrt, temperature, noise)
        new = self.evaluate(z)
        assert new.grad is not None
        valid = new.potential.isfinite() & new.grad.isfinite().all(-1)
        if log_u is None:
            return self.choose(valid, new, state), Info(valid.to(z.dtype), ~valid)
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
        accept_prob, accepted = metropolis_accept(log_ratio, valid, log_u)
        diverging = ~(valid & (log_ratio >= -MAX_ENERGY_ERROR))  # NaN diverges too
        return self.choose(accepted, new, state), Info(accept_prob, diverging)

    def _release(self) -> None:
        super()._release()
        self._temperature: tuple[float, Tensor] | None = None  # a number, and its tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_temperature": None}


def _scheduled(schedule: Callable[[int], float] | None, t: int) -> float:
    assert schedule is not None
    step_size = float(schedule(t))
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"the step_size schedule gave {step_size} at step {t}: it must be > 0")
    return step_size
