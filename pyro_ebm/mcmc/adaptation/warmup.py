r"""Warmup: the step size and the mass matrix, learned window by window.

At the end of each window the positions of its transitions, with the gradients there if the kernel
has them, become the new mass matrix (:mod:`pyro_ebm.mcmc.adaptation.metric`). All is pooled over
the chains of a target, so that many chains learn in a short warmup what one chain needs a long one
for. With gradients the windows begin with the first steps and double; without them they are Stan's,
in which chains first find the bulk.

Until the last window has ended each chain has a step size of its own. A Metropolis-adjusted chain
that starts far out rejects every step of the size that suits the bulk, and would stand there,
unseen in the mean acceptance of the others; with its own small step it comes in. While it is out,
which its potential tells beside those of the others, neither the mass matrix nor the shared step
size is learned from it. (The lengths of trajectories are, in the first half of the warmup, which
brings it in.) The end of the warmup starts from the median of a target's step sizes, and adapts one
for all of its chains.

Where chains are shared out over processes, "all" are those of all of them
(:mod:`pyro_ebm.mcmc.ranks`): means and medians each time that they are taken, mass matrices once,
at the end of a window.

Reference:
    Stan Development Team, Stan Reference Manual, "HMC algorithm parameters". Nesterov (2009),
    Primal-dual subgradient methods for convex problems. Hoffman and Gelman (2014), The No-U-Turn
    sampler.
"""

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.dual_averaging import TensorAveraging
from pyro_ebm.mcmc.adaptation.metric import Kind, MetricWindow, first_factor, new_window
from pyro_ebm.mcmc.adaptation.population import Population
from pyro_ebm.mcmc.adaptation.windows import growing_windows, slow_windows
from pyro_ebm.mcmc.ranks import current
from pyro_ebm.mcmc.state import to_device
from pyro_ebm.ops.steps.precondition import Factor, LowRank


class Adaptation:
    r"""Step size :math:`\varepsilon` and mass matrix of the chains of each target.

    The inverse mass matrix is :math:`\Sigma = L L^\top`; kernels use its factor :math:`L`.

    Args:
        targets: number of targets.
        dim: dimension of a position.
        warmup_steps: length of the warmup.
        step_size: the first step size.
        like: a tensor of the dtype and device.
        adapt_step_size: whether to adapt it.
        adapt_mass_matrix: whether to adapt it; the identity otherwise.
        kind: of which kind the mass matrix is.
        from_gradients: whether it is learned from positions and gradients, or from positions alone.
        target_accept_prob: the mean acceptance probability to reach.
        max_step_size: no step size is larger, if given.

    Attributes:
        inverse_mass_sqrt: :math:`L`; None is the identity.
        population: which chains are out.
        num_restarts: how many times a chain that was stranded started anew.
    """

    def __init__(
        self,
        targets: int,
        dim: int,
        warmup_steps: int,
        step_size: float,
        like: Tensor,
        adapt_step_size: bool,
        adapt_mass_matrix: bool,
        kind: Kind,
        from_gradients: bool,
        target_accept_prob: float,
        max_step_size: float | None = None,
    ):
        self.max_step_size = max_step_size
        self.targets, self.dim, self.warmup_steps = targets, dim, warmup_steps
        self.adapt_step_size, self.adapt_mass_matrix = adapt_step_size, adapt_mass_matrix
        self.kind: Kind = kind
        self.target_accept_prob = target_accept_prob
        self.step_size = torch.full((targets,), step_size, dtype=like.dtype, device=like.device)
        self.t = self.num_restarts = 0
        self._schedule = growing_windows if from_gradients else slow_windows
        self._windows = self._schedule(warmup_steps) if adapt_mass_matrix else []
        self.inverse_mass_sqrt: Factor | None = None
        self._window: MetricWindow | None = None
        if self._windows:
            ones = torch.ones(targets, dim, dtype=like.dtype, device=like.device)
            self.inverse_mass_sqrt = first_factor(kind, ones)
            self._open_window()
        self.ranks = current()
        self.population = Population(targets, dim)
        self._typical = torch.empty(0), torch.empty(0)  # of which step sizes, and the median
        self._own = False  # whether each chain has a step size of its own
        self.restart(self.step_size)

    @property
    def step_size(self) -> Tensor:
        """Shape ``(targets,)``; from :meth:`start` to the fast end of the warmup ``(chains,)``.

        It changes by another tensor in its place: what is computed of one is kept, so never write
        into it.
        """
        return self._step_size

    @step_size.setter
    def step_size(self, step_size: Tensor) -> None:
        top = self.max_step_size
        self._step_size = step_size if top is None else step_size.clamp(max=top)

    @property
    def own_step_sizes(self) -> bool:
        """Whether each chain has a step size of its own for now."""
        return self._own

    @property
    def active(self) -> bool:
        """Whether the warmup is still running."""
        return self.t < self.warmup_steps

    def start(self, num_chains: int) -> None:
        """Gives each of this many chains a step size of its own."""
        if self.adapt_step_size and self.t < self.settling_step:
            self._own = True
            self.restart(self.step_size.repeat(num_chains // self.step_size.shape[0]))

    @property
    def settling_step(self) -> int:
        """The step from which the chains of a target share one step size."""
        windows = self._schedule(self.warmup_steps)
        return windows[-1][1] if windows else self.warmup_steps // 2

    @property
    def exploring(self) -> bool:
        """Whether chains are still on their way to the others, in the first half of the warmup."""
        return 2 * self.t < self.warmup_steps and not self.population.settled

    def lenient(self, potential: Tensor) -> Tensor:
        """Potentials, in warmup higher by the error that chains which are out may make."""
        return potential + self.population.tolerance(potential) if self._own else potential

    def pooled(self, accept_prob: Tensor) -> Tensor:
        """The mean over the chains that share a step size, of the shape of ``step_size``."""
        sharing = accept_prob.reshape(-1, self.step_size.shape[0])
        if self._own:
            return sharing.mean(0)
        return self.population.mean(sharing, self.ranks)

    def typical_step_size(self) -> Tensor:
        """The median of each target's step sizes, shape ``(targets,)``."""
        if self._typical[0] is not self.step_size:
            self._typical = self.step_size, self._median(self.step_size)
        return self._typical[1]

    def _median(self, step_size: Tensor) -> Tensor:
        if self._own:
            step_size = self.ranks.rows(step_size)
        return step_size.reshape(-1, self.targets).median(0).values

    def restart(self, step_size: Tensor) -> None:
        """Starts the search for the step size again, from here."""
        self.step_size = step_size
        self._averaging = TensorAveraging(self.step_size.log())

    def update(
        self,
        z: Tensor,
        accept_prob: Tensor,
        potential: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> bool:
        """Learns from one transition of all chains.

        Args:
            z: the new positions, shape ``(chains, dim)``.
            accept_prob: the acceptance probabilities, shape ``(chains,)``.
            potential: the potentials there, shape ``(chains,)``; without them no chain is out.
            grad: the gradients there, shape ``(chains, dim)``, if the kernel has them.

        Returns:
            Whether the mass matrix is new, so that the step size must be found again.
        """
        if not self.active:
            return False
        if potential is not None:
            self.population.add(potential)
        if self.adapt_step_size:
            error = self.target_accept_prob - self.pooled(accept_prob)
            self._averaging.step(error)
            now, average = self._averaging.get_state()
            self.step_size = now.exp()
            if self.t + 1 == self.settling_step:
                self.population.look(self.ranks)
                self.restart(self._median(average.exp()))
                self._own = False
        renewed = self._learn_mass_matrix(z, grad)
        self.t += 1
        if self.t == self.warmup_steps and self.adapt_step_size:
            self.step_size = self._averaging.get_state()[1].exp()
        return renewed

    def _learn_mass_matrix(self, z: Tensor, grad: Tensor | None) -> bool:
        """Adds a transition to the window; whether it was the last one, and the factor is new."""
        if self._window is None or self.t < self._windows[0][0]:
            return False
        end = self._windows[0][1]
        if self.population.out is None:  # judged by the steps before those that a chain may add to
            self.population.look(self.ranks)
        self._window.add(z, grad, self.population.inside(z))
        if self.t + 1 < end:
            return False
        assert self.inverse_mass_sqrt is not None
        self.inverse_mass_sqrt = self._window.factor(self.inverse_mass_sqrt, self.ranks)
        self.population.look(self.ranks)
        self._windows.pop(0)
        if not self._windows and isinstance(self.inverse_mass_sqrt, LowRank):
            self.inverse_mass_sqrt = self.inverse_mass_sqrt.trimmed()
        self._open_window()
        return True

    def _open_window(self) -> None:
        self._window = None
        if self._windows:
            start, end = self._windows[0]
            self._window = new_window(self.kind, self.targets, self.dim, end - start)

    def state_dict(self) -> Saved:
        """What was learned so far, for :meth:`load_state_dict`."""
        factor = self.inverse_mass_sqrt
        return {
            "t": self.t,
            "num_restarts": self.num_restarts,
            "step_size": self.step_size,
            "own": self._own,
            "inverse_mass_sqrt": list(factor) if isinstance(factor, LowRank) else factor,
            "windows": list(self._windows),
            "window": None if self._window is None else self._window.state_dict(),
            "population": self.population.state_dict(),
            "averaging": self._averaging.state_dict(),
        }

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another adaptation with the same arguments was."""
        device = self.step_size.device
        self.t, self._windows = state["t"], [(start, end) for start, end in state["windows"]]
        self._own, self.num_restarts = state["own"], state["num_restarts"]
        self.step_size = to_device(state["step_size"], device)
        factor = state["inverse_mass_sqrt"]
        if isinstance(factor, list):
            factor = LowRank(*(to_device(part, device) for part in factor))
        self.inverse_mass_sqrt = to_device(factor, device)
        self._open_window()
        if self._window is not None:
            self._window.load_state_dict(state["window"], device)
        self.population.load_state_dict(state["population"], device)
        self._averaging.load_state_dict(state["averaging"], device)
