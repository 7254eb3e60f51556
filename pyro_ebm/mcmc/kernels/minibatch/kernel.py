r"""The base of kernels on minibatches: fresh rows at each step, and a step that is learned.

Each transition draws a subsample of every subsampled plate, and moves by the gradient
:math:`\hat g` of the potential at these rows, scaled up by Pyro to all the data. There is no
Metropolis test, which would need all the data. So the draws are those of another density, whose
error is of the size of the step: the noise of the subsamples and the length of the step make
variances too large (:mod:`~pyro_ebm.mcmc.kernels.minibatch.moments` says by how much).

The warmup learns a preconditioner and the longest step whose error stays within ``variance_bias``
(:mod:`~pyro_ebm.mcmc.kernels.minibatch.warmup`). All is held fixed after that.

Reference:
    Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics. Li, Chen,
    Carlson and Carin (2016), Preconditioned stochastic gradient Langevin dynamics for deep neural
    networks. Ma, Chen and Fox (2015), A complete recipe for stochastic gradient MCMC.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, Unpack

import torch
from torch import Tensor

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.kernels.gradient.langevin import warn_of_hidden_changes
from pyro_ebm.mcmc.kernels.minibatch.control_variates import (
    Center,
    center_near,
    descended,
    position_of,
)
from pyro_ebm.mcmc.kernels.minibatch.moments import factor_of, largest_eigenvalue, parts_of_noise
from pyro_ebm.mcmc.kernels.minibatch.warmup import MinibatchWarmup
from pyro_ebm.mcmc.kernels.transition import TransitionKernel, TransitionSettings, check_positive
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.minibatch import MinibatchPotential
from pyro_ebm.mcmc.state import Info, State, to_device
from pyro_ebm.ops.arguments import check_callable, check_mapping, shown
from pyro_ebm.ops.steps.precondition import Factor, precondition, precondition_transposed

Rows = tuple[Tensor, ...]
"""The rows of each subsampled plate, in the order of the model: ``(n,)``, or ``(chains, n)``."""
ControlVariates = Literal[False, True] | Mapping[str, Tensor]
TOO_MUCH = 3.0
"""A bias that is so many times what was allowed is a finding."""
MUCH_IN_COMMON = 1.5
"""An effective sample size that is so many times too large is told."""


class MinibatchSettings(TransitionSettings, total=False):
    """Settings that both such kernels take."""

    schedule: Callable[[int], float] | None
    variance_bias: float
    precondition_steps: bool
    control_variates: ControlVariates
    shared_rows: bool | None


class MinibatchKernel(TransitionKernel):
    r"""A kernel that sees the gradient of a minibatch, and makes no Metropolis test.

    A new one says what a transition does with the gradient, and which part of the curvature its
    bias has (:attr:`curvature_weight`).

    Args:
        **kwargs: all others are those of :class:`~pyro_ebm.SGLDKernel`.

    Raises:
        ValueError: for an argument out of its range.
    """

    curvature_weight = 1.0
    r"""c: where :math:`\varepsilon (S + c F) / 2` is the bias on a Gaussian of curvature F."""
    saved = (
        *TransitionKernel.saved,
        "_rows",
        "_warmup",
        "_center",
        "_bias",
        "_noted",
        "_num_chains",
    )
    _rows: Rows | None = None
    _warmup: MinibatchWarmup | None = None
    _center: Center | None = None
    _bias: Tensor | None = None  # sums over the draws, (3, dim)
    _noted, _num_chains = 0, 1

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float | None = None,
        schedule: Callable[[int], float] | None = None,
        variance_bias: float = 0.1,
        precondition_steps: bool = True,
        control_variates: ControlVariates = False,
        shared_rows: bool | None = None,
        **kwargs: Unpack[TransitionSettings],
    ):
        if step_size is not None:
            check_positive("step_size", step_size)
        if schedule is not None:
            check_callable("schedule", schedule)
        check_positive("variance_bias", variance_bias)
        if not isinstance(control_variates, bool):
            check_mapping("control_variates", control_variates, Tensor, "values of the sites")
        if shared_rows is not None and not isinstance(shared_rows, bool):
            raise ValueError(f"shared_rows must be True, False or None, got {shown(shared_rows)}")
        super().__init__(
            model,
            potential_fn,
            step_size=1.0 if step_size is None else step_size,
            adapt_step_size=False,
            adapt_mass_matrix=False,
            **kwargs,
        )
        self.schedule, self.variance_bias = schedule, variance_bias
        self.learns_step = step_size is None
        self.precondition_steps = precondition_steps
        self.control_variates: ControlVariates = control_variates
        corrected = control_variates is not False
        self.shared_rows = corrected if shared_rows is None else shared_rows

    # -- the potential ---------------------------------------------------------------------------

    def make_potential(self, *args: object, **kwargs: object) -> Potential:
        """The potential of the model given rows, or of the ``potential_fn``."""
        if self.model is None:
            return super().make_potential(*args, **kwargs)
        self.restore_params()
        return MinibatchPotential(
            self.model,
            args,
            kwargs,
            transforms=self.given_transforms,
            max_plate_nesting=self.max_plate_nesting,
            init_strategy=self.init_strategy,
        )

    def draw_rows(self, num_chains: int) -> Rows:
        """Fresh rows: shape ``(n,)`` for all chains, or ``(chains, n)``."""
        potential = self.potential
        if not isinstance(potential, MinibatchPotential):
            return ()
        return tuple(potential.draw_rows(None if self.shared_rows else num_chains).values())

    def estimate(self, z: Tensor, rows: Rows, center: Center | None) -> State:
        """The state at positions ``(chains, dim)``, as the rows tell."""
        potential = self.potential
        if not isinstance(potential, MinibatchPotential):
            return State(z, *potential.value_and_grad(z))
        of_plates = dict(zip(potential.given.plates, rows, strict=True))
        value, grad = potential.value_and_grad_at(z, of_plates)
        if center is not None:
            own = any(x.dim() > 1 for x in rows)
            there = center.z.expand(len(z) if own else 1, -1)
            value_there, grad_there = potential.value_and_grad_at(there, of_plates)
            value = value - value_there + center.potential
            grad = grad - grad_there + center.grad
        return State(z, value, grad)

    def evaluate(self, z: Tensor) -> State:
        """The state at positions ``(chains, dim)``, at the rows of the last transition."""
        if self._rows is None:
            self._rows = self.draw_rows(len(z))
        return self.estimate(z, self._rows, self._center)

    def check(self, potential: Potential) -> None:
        """Raises a ValueError inside of another kernel, or for sites that are not continuous."""
        if hasattr(potential, "whole"):
            raise ValueError(
                f"{type(self).__name__} makes no Metropolis test and may see a part of the data: it"
                " moves all sites, and cannot be inside of another kernel"
            )
        super().check(potential)

    # -- the start -------------------------------------------------------------------------------

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        """Prepares one chain, see :class:`~pyro_ebm.mcmc.TransitionKernel`."""
        self.starts_anew = self.given_params is None
        super().setup(warmup_steps, *args, **kwargs)

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential, see :meth:`Kernel.bind`.

        Raises:
            ValueError: without a warmup or a step size.
        """
        if self.learns_step and warmup_steps < 1:
            raise ValueError(
                f"{type(self).__name__} learns its step size in the warmup, which has no steps:"
                " give warmup_steps=, or step_size="
            )
        super().bind(potential, warmup_steps)
        ends = self._parts(warmup_steps if potential.dim else 0)
        parts = (self.learns_step, self.precondition_steps)
        biases = (self.variance_bias, self.curvature_weight)
        self._warmup = MinibatchWarmup(self.adaptation, ends, *parts, *biases)

    def init(self, z: Tensor) -> State:
        """The state at the first positions, shape ``(chains, dim)``; finds the control variates."""
        potential = self.potential
        if potential.dim and self.control_variates is not False:
            z = self._start_at_center(z)
        state = super().init(z)
        if potential.dim and self.checks_potential:
            warn_of_hidden_changes(potential, z, "use a kernel with a Metropolis test")
        return state

    def _start_at_center(self, z: Tensor) -> Tensor:
        potential, ranks = self.potential, self.adaptation.ranks
        if not isinstance(potential, MinibatchPotential):
            raise ValueError("control_variates= are of a model: a potential_fn has no rows")
        given = self.control_variates
        if isinstance(given, Mapping):
            at = position_of(potential, given)
        else:
            at = descended(potential, z[0], self.jit_compile)
        self._center = center_near(potential, at)
        # which ranks have found by random numbers of their own
        self._center = Center(*map(ranks.from_first, self._center))
        for name, part in zip(Center._fields, self._center, strict=True):
            if not part.isfinite().all():
                raise ValueError(
                    f"the {name} of all the data is not finite at the center of the"
                    " control variates: give another one, or control_variates=False"
                )
        factor, scale = factor_of(self._center.curvature), 1.0
        if self.precondition_steps:
            self.adaptation.inverse_mass_sqrt = factor
        else:
            scale = largest_eigenvalue(self._center.curvature)
        if self.learns_step:
            self.warmup.set_step(self.variance_bias, scale)
        if not self.starts_anew:
            return z
        together = self.starts_together
        noise = torch.randn_like(z[::together]).repeat_interleave(together, 0)
        return self._center.z + precondition(factor, noise)

    # -- the steps -------------------------------------------------------------------------------

    @property
    def warmup(self) -> MinibatchWarmup:
        """What the warmup learns; set by :meth:`bind`."""
        if self._warmup is None:
            raise RuntimeError(f"{type(self).__name__} is not bound to a potential: call setup")
        return self._warmup

    def _parts(self, end: int) -> tuple[int, int, int]:
        """Where the parts of a warmup of so many steps end, see :class:`MinibatchWarmup`."""
        if not self.learns_step and not self.precondition_steps:
            return 0, 0, 0
        if self.control_variates is not False:
            return 0, 0, end
        first = end // 2
        return first, first + (end - first) // 2 if self.precondition_steps else first, end

    def steps_of(self, state: State) -> tuple[Tensor, Factor | None]:
        """The step sizes of the coming transition, and the preconditioner.

        Shape ``(chains, 1)``, or, while the chains come in, of each coordinate ``(chains, dim)``.
        """
        assert state.grad is not None
        if (scaled := self.warmup.step_of(state.grad)) is not None:
            return scaled, None
        return self.step_size_of(state) * self._factor(), self.inverse_mass_sqrt

    def _factor(self) -> float:
        """What the step size is multiplied by: in the warmup, to come in, and then by schedule."""
        t = self._steps - self._warmup_steps
        if t < 0:
            return self.warmup.factor
        if self.schedule is None:
            return 1.0
        factor = float(self.schedule(t))
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"schedule gave {factor} after {t} draws: it must be > 0")
        return factor

    @property
    def step_size(self) -> Tensor | float:
        """The step size of the coming transition, ``(1,)``; before setup, the first."""
        step_size = super().step_size
        return step_size if self._adaptation is None else step_size * self._factor()

    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what warmup learns from it."""
        before, step_size = state.grad, float(torch.as_tensor(self.step_size).mean())
        state, info = super().step(state)
        if before is not None and state.grad is not None and self.potential.dim:
            if self._steps <= self._warmup_steps:
                self.warmup.learn(state.grad)
            else:
                self._note(before, state.grad, step_size)
        return state, info

    # -- the bias --------------------------------------------------------------------------------

    def _note(self, before: Tensor, grad: Tensor, step_size: float) -> None:
        """Adds to the estimates of the bias of a draw and its parts, in each coordinate."""
        factor, self._num_chains = self.adaptation.inverse_mass_sqrt, len(grad)
        white = (precondition_transposed(factor, g) for g in (before, grad))
        bias = step_size / 2 * parts_of_noise(*white)
        self._bias, self._noted = bias if self._bias is None else self._bias + bias, self._noted + 1

    @property
    def estimated_bias(self) -> float:
        """By which part the variances of the draws are too large, at most, if all is Gaussian.

        In a coordinate of the preconditioned space; NaN before there are draws.
        """
        if self._bias is None:
            return math.nan
        whole, noise, _ = self._bias / self._noted
        return float(torch.minimum(whole, noise + self.curvature_weight * whole).max())

    @property
    def excess_of_ess(self) -> float:
        """By what factor effective sample sizes of chains with the same rows are too large."""
        if self._bias is None:
            return math.nan
        common = (self._bias[2] / self._noted).clamp_min(0)
        #   Var(mean of C) = (1 + (C - 1) rho) / C,  rho the common part of 1 + (eps / 2) (S + F)
        return 1 + (self._num_chains - 1) * float((common / (1 + common)).max())

    @property
    def notes(self) -> list[str]:
        """That the draws are biased, and by how much."""
        bias = self.estimated_bias
        size = "" if math.isnan(bias) else f" (by some {100 * bias:.2g} % at most, if Gaussian)"
        found = [
            f"{type(self).__name__} makes no Metropolis test: the steps and the noise of the"
            f" subsamples make posterior variances too large{size}"
        ]
        if self.shared_rows and (excess := self.excess_of_ess) > MUCH_IN_COMMON:
            found.append(
                "all chains look at the same rows, and err together: the effective sample sizes"
                f" are up to {excess:.2g} times too large (shared_rows=False: each at its own)"
            )
        return found

    @property
    def findings(self) -> list[Finding]:
        """A bias that is far larger than was allowed."""
        bias = self.estimated_bias
        if math.isnan(bias) or bias <= TOO_MUCH * self.variance_bias:
            return []
        remedies = ["a smaller step_size", "larger subsamples", "a longer warmup (warmup_steps=)"]
        if self.control_variates is False:
            remedies.insert(0, "control_variates=True")
        if self.learns_step:
            remedies.remove("a smaller step_size")
        return [
            Finding(
                "bias",
                f"the steps and the noise of the subsamples make variances too large by some"
                f" {100 * bias:.2g} %",
                remedies,
            )
        ]

    @property
    def learned(self) -> list[str]:
        """The step size, and the preconditioner."""
        if self._adaptation is None or self._steps == 0:
            return []
        found = [f"step_size={self.mean_step_size:.3g}"] if self.learns_step else []
        factor = self.adaptation.inverse_mass_sqrt
        if factor is not None:
            kind = "dense" if isinstance(factor, Tensor) and factor.dim() == 3 else "diagonal"
            found.append(f"{kind} preconditioner")
        return found

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> Saved:
        """What was learned and drawn, see :meth:`Kernel.state_dict`."""
        state = super().state_dict()
        parts = {"center": self._center, "rows": self._rows}
        return {**state, **{k: None if x is None else list(x) for k, x in parts.items()}}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another kernel was, see :meth:`Kernel.load_state_dict`."""
        center, device = state["center"], self.potential.device
        super().load_state_dict({**state, "center": None})
        if center is not None:
            self._center = Center(*(to_device(part, device) for part in center))
        if (rows := state["rows"]) is not None:
            self._rows = tuple(to_device(x, device) for x in rows)
