r"""The warmup of kernels on minibatches: chains come in, and the step is learned.

Its first half leads the chains in, by Langevin steps of a length that falls, scaled in each
coordinate by the root of the mean square of its gradients (RMSprop, after Li et al. 2016). The
third quarter learns the second moments of the gradients where the chains are, and from them the
preconditioner (:mod:`~pyro_ebm.mcmc.kernels.minibatch.moments`). The last quarter begins with long
steps, by which all directions come in, and learns the step size at its end. With control variates
chains start at the center, where the preconditioner is known: all of the warmup is for the step.
"""

import math

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.kernels.minibatch.control_variates import MEMORY
from pyro_ebm.mcmc.kernels.minibatch.moments import (
    MAX_DENSE,
    MIN_ROWS,
    GradientMoments,
    factor_of,
)
from pyro_ebm.mcmc.state import to_device
from pyro_ebm.ops.steps.precondition import precondition_transposed

FIRST_RATE, LAST_RATE = 0.1, 1e-3
"""The steps of the first half fall from one to the other."""
LONGEST_STEP = 0.5
"""Those of the last quarter fall from here, in units of 1 over the largest eigenvalue."""


class MinibatchWarmup:
    """Learns the preconditioner and the step size of a run.

    Args:
        adaptation: keeps them.
        ends: after how many steps the chains are in, the preconditioner is learned, and the warmup
            is over; parts may be empty.
        learns_step: whether the step size is learned.
        preconditions: whether the preconditioner is.
        variance_bias: the relative error of variances that a step may make.
        curvature_weight: see :class:`~pyro_ebm.mcmc.MinibatchKernel`.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        ends: tuple[int, int, int],
        learns_step: bool,
        preconditions: bool,
        variance_bias: float,
        curvature_weight: float,
    ):
        self.adaptation, self.ends = adaptation, ends
        self.learns_step, self.preconditions = learns_step, preconditions
        self.variance_bias, self.curvature_weight = variance_bias, curvature_weight
        self.t = 0
        self.square: Tensor | None = None
        """The mean square of the gradients of each chain, ``(chains, dim)``."""
        self.moments = self._new_moments()

    @property
    def rate(self) -> float | None:
        """The step of the transitions that lead the chains in; None after these."""
        first = self.ends[0]
        return (
            None if self.t >= first else FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (self.t / first)
        )

    def step_of(self, grad: Tensor) -> Tensor | None:
        """The step of each coordinate while chains come in, ``(chains, dim)``; None after it."""
        if (rate := self.rate) is None:
            return None
        if self.square is None:
            self.square = grad.square()
        root = self.square.sqrt()
        return rate / root.clamp_min(torch.finfo(root.dtype).tiny ** 0.5)

    @property
    def factor(self) -> float:
        """How much longer than the step size the steps at the start of the last part are."""
        first, second, end = self.ends
        if not (self.learns_step and first and second <= self.t < end):
            return 1.0
        part = 2 * (self.t - second) / (end - second)
        return max(1.0, (LONGEST_STEP / self.variance_bias) ** (1 - part))

    def learn(self, grad: Tensor) -> None:
        """Learns from the gradients ``(chains, dim)`` at the end of a transition."""
        first, second, end = self.ends
        if self.t >= end:
            return
        self.t += 1
        t, adaptation, moments = self.t, self.adaptation, self.moments
        if self.square is not None and t <= first:
            self.square = MEMORY * self.square + (1 - MEMORY) * grad.square()
        begins = (second + end) // 2 if t > second and first else first // 2
        if t > begins:  # of the first part and the last one the second half
            in_units = t > second and self.learns_step
            factor = adaptation.inverse_mass_sqrt if in_units else None
            moments.add(precondition_transposed(factor, grad))
        if t in (first, second) and t < end:
            factor = None
            if self.preconditions:
                factor = factor_of(moments.second_moment(adaptation.ranks))
                adaptation.inverse_mass_sqrt = factor.to(grad)
            if self.learns_step:  # cautiously
                whole, _ = moments.largest_eigenvalues(adaptation.ranks, factor)
                self.set_step(self.variance_bias, whole)
            self.moments, self.square = self._new_moments(), None
        elif t == end and self.learns_step:
            whole, noise = moments.largest_eigenvalues(adaptation.ranks)
            worst = min(whole, noise + self.curvature_weight * whole)  # of S + c F
            self.set_step(2 * self.variance_bias, worst)
            self.moments = self._new_moments()

    def set_step(self, bias: float, eigenvalue: float) -> None:
        """Sets the step size to a bias over an eigenvalue, if that is a number."""
        step_size = bias / eigenvalue if eigenvalue > 0 else math.nan
        if math.isfinite(step_size):
            self.adaptation.step_size = torch.full_like(self.adaptation.step_size, step_size)

    def _new_moments(self) -> GradientMoments:
        """Second moments of the gradients in the part of the warmup that begins now."""
        first, second, end = self.ends
        length, dim = next((stop for stop in self.ends if stop > self.t), end) - self.t, self.dim
        dense = first <= self.t < second and dim <= MAX_DENSE and length >= MIN_ROWS * dim
        return GradientMoments(dense, length, self.adaptation.step_size.device)

    @property
    def dim(self) -> int:
        """The dimension of a position."""
        return self.adaptation.dim

    def state_dict(self) -> Saved:
        """What was learned so far, for :meth:`load_state_dict`."""
        return {"t": self.t, "square": self.square, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another one with the same arguments was."""
        self.t = state["t"]
        self.square = to_device(state["square"], self.adaptation.step_size.device)
        self.moments.load_state_dict(state["moments"])
