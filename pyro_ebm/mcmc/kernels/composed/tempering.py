r"""Replica exchange: chains at several temperatures that trade places.

A chain at a low temperature sits in its mode, one at a high temperature crosses between modes.
Replica exchange runs :math:`R` *replicas* of each chain at the inverse temperatures
:math:`1 = \beta_1 > \dots > \beta_R`, replica :math:`r` on :math:`e^{-\beta_r U}`, and after each
transition proposes to exchange neighbours, with the acceptance probability

.. math:: \min\left(1,\ e^{(\beta_r - \beta_{r+1}) (U(z_r) - U(z_{r+1}))}\right).

The product of all :math:`e^{-\beta_r U(z_r)}` stays invariant, and so the first replica has the
target itself. Even and odd pairs take turns, which carries a replica from end to end in a number
of rounds of the order of :math:`R` where a random choice needs :math:`R^2`.

Reference:
    Swendsen and Wang (1986), Replica Monte Carlo simulation of spin glasses. Geyer (1991), Markov
    chain Monte Carlo maximum likelihood. Syed, Bouchard-Cote, Deligiannidis and Doucet (2022),
    Non-reversible parallel tempering. Atchade, Roberts and Rosenthal (2011), Towards optimal
    scaling of Metropolis-coupled Markov chain Monte Carlo (exchanges at a rate of 0.23).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.kernels.accept import choose
from pyro_ebm.mcmc.kernels.base import refuse_temperature
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_count, check_number, shown
from pyro_ebm.ops.steps.metropolis import log_uniform, metropolis_accept

MIN_SWAP_RATE = 0.2
"""Neighbours that exchange more rarely are too far apart: 0.23 is best where betas are many."""


class TemperedPotential(Potential):
    r"""A potential at several inverse temperatures: row ``c`` is :math:`\beta_r U`.

    Rows are ``(chains, R, targets)``, flattened: each replica is a target of its own, and adapts by
    itself.

    Args:
        whole: the potential :math:`U`.
        betas: inverse temperatures, shape ``(R,)``.
    """

    def __init__(self, whole: Potential, betas: Tensor):
        super().__init__(whole.sites, whole.targets * len(betas))
        self.dtype, self.device, self.whole = whole.dtype, whole.device, whole
        self.betas = betas
        self.modules = whole.modules
        if whole.blocks is not None and whole.blocks.supports_tempering:
            self.blocks = whole.blocks

    def of_rows(self, num_rows: int) -> Tensor:
        r"""The :math:`\beta` of each row, shape ``(num_rows,)``."""
        betas = self.betas.repeat_interleave(self.whole.targets)
        return betas.repeat(num_rows // len(betas))

    def __call__(self, z: Tensor) -> Tensor:
        """The potential of each row, ``(rows, dim) -> (rows,)``, differentiable."""
        return self.of_rows(z.shape[0]) * self.whole(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(rows,)`` and its gradient ``(rows, dim)``, detached."""
        beta = self.of_rows(z.shape[0])
        value, grad = self.whole.value_and_grad(z)
        return beta * value, beta[:, None] * grad

    def gibbs_noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The random numbers of a block sweep of positions ``(rows, dim)``."""
        return self.whole.gibbs_noise(z)

    def gibbs_sweep(
        self, z: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        """Positions ``(rows, dim)`` after each block was resampled given the rest."""
        own = self.of_rows(z.shape[0])
        return self.whole.gibbs_sweep(z, noise, own if beta is None else own * beta)


class TemperedState(NamedTuple):
    """Where the chains are, and their replicas."""

    z: Tensor
    """Positions of the first replicas, shape ``(chains, dim)``."""
    potential: Tensor
    """Potentials of the first replicas, shape ``(chains,)``."""
    grad: Tensor | None
    """Their gradients, if the kernel has any."""
    replicas: State
    """All replicas, ``(chains x R, dim)``, with the potentials that they see."""


class TemperingKernel(PyroKernel):
    r"""Replica exchange around another kernel, all replicas of all chains in one batch.

    It crosses between modes where the kernel alone does not. The draws are those of
    :math:`\beta = 1`. A transition costs as much as that of ``len(betas)`` chains. Replicas start
    together at the first position, and need some transitions to spread; ``ContrastiveDivergence``,
    which would start them anew for each gradient, refuses it.

    Args:
        kernel: what moves the replicas, with its model: ``LangevinKernel(model)``,
            ``GibbsKernel(ising)``, ...; each replica adapts its own step size and mass matrix.
        betas: inverse temperatures from 1 downwards, in (0, 1]. Neighbours should exchange at
            rates of about 0.2 to 0.6 (:attr:`swap_rates`; where chains do not agree a lower rate
            is among the findings), and the last one should mix. Where the
            support is unbounded, :math:`e^{-\beta U}` must still be finite in mass. They act on
            the unconstrained space, Jacobians included; see
            :func:`~pyro_ebm.mcmc.kernels.composed.tempering.geometric_betas`.

    Raises:
        ValueError: for betas that do not start at 1 and fall, or leave (0, 1].

    Example:
        >>> from pyro_ebm.mcmc import LangevinKernel, MCMC
        >>> def double_well(x):
        ...     return x**4 - 6 * x**2 - x / 2
        >>> p = UnnormalizedEnergy(double_well)
        >>> kernel = TemperingKernel(LangevinKernel(p), geometric_betas(0.1, 5))
        >>> mcmc = MCMC(kernel, 1000, num_chains=10, disable_progbar=True)
        >>> mcmc.run()
        >>> (mcmc.get_samples()["x"] > 0).float().mean()  # exactly .844
        tensor(0.8...)
        >>> kernel.swap_rates.shape
        torch.Size([4])
    """

    saved = (*PyroKernel.saved, "_inner", "_swaps", "_num_swaps")
    _inner: PyroKernel | None = None
    _tempered: TemperedPotential | None = None
    _swaps: Tensor | None = None
    _num_swaps: Tensor | int = 0

    def __init__(self, kernel: PyroKernel, betas: Sequence[float] | Tensor):
        if not isinstance(kernel, PyroKernel) or isinstance(kernel, TemperingKernel):
            raise ValueError(
                "kernel must be a kernel of pyro_ebm that moves one temperature, such as"
                f" LangevinKernel(model), got {shown(kernel)}"
            )
        refuse_temperature(kernel, "exchanges are between replicas at the temperatures 1 / betas")
        super().__init__(kernel.model, kernel.potential_fn)
        self.kernel, self.betas = kernel, _checked(betas)
        self.discrete, self.needs_grad = kernel.discrete, kernel.needs_grad

    @property
    def parts(self) -> tuple[PyroKernel, ...]:
        """The kernel that moves the replicas."""
        return (self.kernel,)

    # -- many chains ---------------------------------------------------------------------------

    def make_potential(self, *args: object, **kwargs: object) -> Potential:
        """The potential of the inner kernel's model."""
        self.restore_params()
        inner = self.kernel.copy()
        inner.given_params = self.given_params
        return inner.make_potential(*args, **kwargs)

    def check(self, potential: Potential) -> None:
        """Raises a ValueError for sites that the inner kernel does not move when tempered."""
        self.kernel.check(self._at_betas(potential))

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Binds a copy of the inner kernel to the tempered potential."""
        super().bind(potential, warmup_steps)
        self._tempered = self._at_betas(potential)
        self._inner = self.kernel.copy()
        self._inner.planned_steps = self.planned_steps
        self._inner.bind(self._tempered, warmup_steps)
        self._swaps = self._tempered.betas.new_zeros(len(self.betas) - 1)

    def _at_betas(self, potential: Potential) -> TemperedPotential:
        betas = torch.tensor(self.betas, dtype=potential.dtype, device=potential.device)
        return TemperedPotential(potential, betas)

    def init(self, z: Tensor) -> TemperedState:
        """All replicas at the first positions, shape ``(chains, dim)``."""
        inner, _ = self._parts
        return self._outward(inner.init(self._replicated(z)))

    def evaluate(self, z: Tensor) -> TemperedState:
        """All replicas at the positions ``z``, shape ``(chains, dim)``."""
        inner, _ = self._parts
        return self._outward(inner.evaluate(self._replicated(z)))

    def step(self, state: TemperedState) -> tuple[TemperedState, Info]:
        """A transition of every replica, then exchanges between neighbours."""
        inner, _ = self._parts
        replicas, info = inner.step(state.replicas)
        replicas = self._exchange(replicas)
        self._steps += 1
        accept_prob = self._rows(info.accept_prob)[:, 0].reshape(-1)
        diverging = self._rows(info.diverging).any(1).reshape(-1)  # of any replica
        return self._outward(replicas), Info(accept_prob, diverging)

    def placed(self, state: TemperedState, new: State, chosen: Tensor) -> TemperedState:
        """The state with some first replicas elsewhere, see :meth:`Kernel.placed`."""
        first = choose(chosen, new, State(state.z, state.potential, state.grad))

        def replaced(x: Tensor, of_first: Tensor) -> Tensor:
            others = self._rows(x)[:, 1:]
            here = of_first.unflatten(0, (-1, 1, self.potential.targets))
            return torch.cat([here, others], 1).reshape(x.shape)

        z, potential, grad = state.replicas
        if grad is not None and first.grad is not None:
            grad = replaced(grad, first.grad)
        z, potential = replaced(z, first.z), replaced(potential, first.potential)
        return TemperedState(*first, State(z, potential, grad))

    def check_graphs(self) -> None:
        """Compares the graphs of the inner kernel, see :meth:`Kernel.check_graphs`."""
        if self._inner is not None:
            self._inner.check_graphs()

    def _exchange(self, state: State) -> State:
        _, tempered = self._parts
        betas, r = tempered.betas, len(tempered.betas)
        beta = tempered.of_rows(state.z.shape[0])
        u = self._rows(state.potential / beta)  # (chains, R, targets), at temperature 1
        #      exp(-b_r U(z_{r+1})) exp(-b_{r+1} U(z_r))
        # log -------------------------------------------  =  (b_r - b_{r+1}) (U(z_r) - U(z_{r+1}))
        #      exp(-b_r U(z_r)) exp(-b_{r+1} U(z_{r+1}))
        gap = (betas[:-1] - betas[1:])[:, None]
        log_ratio = gap * (u[:, :-1] - u[:, 1:])
        log_u = log_uniform(log_ratio)
        prob, accepted = metropolis_accept(log_ratio, ~log_ratio.isnan(), log_u)
        lower = torch.arange(r - 1, device=u.device)
        turn = (lower % 2 == self._steps % 2)[:, None]  # even pairs and odd pairs by turns
        accepted = accepted & turn
        # Each replica learns where its next state comes from: itself, or a neighbour.
        source = torch.arange(r, device=u.device)[:, None].expand(u.shape).clone()
        source[:, :-1] += accepted.long()
        source[:, 1:] -= accepted.long()
        if self._steps >= self._warmup_steps and self._swaps is not None:
            self._swaps = self._swaps + torch.where(turn, prob, 0.0).mean((0, 2))
            self._num_swaps = self._num_swaps + turn[:, 0]
        # what replica r now sees of the state that came from replica s:  U b_r / b_s
        ratio = beta / self._take(beta, source)
        grad = state.grad
        if grad is not None:
            grad = self._take(grad, source) * ratio[:, None]
        return State(self._take(state.z, source), self._take(state.potential, source) * ratio, grad)

    @property
    def swap_rates(self) -> Tensor:
        """Mean acceptance of exchanges between neighbours after warmup, shape ``(R - 1,)``."""
        if self._swaps is None:
            raise RuntimeError("there are no exchanges yet: run first")
        return self._swaps / self._num_swaps

    @property
    def causes(self) -> list[Finding]:
        """Whether neighbours exchange too rarely for replicas to come down the ladder."""
        if self._swaps is None:
            return []
        rates, low = self.swap_rates, self.swap_rates < MIN_SWAP_RATE
        if not low.any():
            return []
        hot, cold = self.betas[int(rates.argmin()) + 1], self.betas[int(rates.argmin())]
        text = (
            f"{int(low.sum())} of {len(rates)} pairs of neighbours exchange at a rate below"
            f" {MIN_SWAP_RATE:g}, betas {cold:.2g} and {hot:.2g} at {float(rates.min()):.2g}: the"
            " ladder is too coarse, and what crosses far up does not come down"
        )
        more = f"more betas than {len(self.betas)}, closest where rates are low"
        return [Finding("swaps", text, [more, "a longer run (num_samples=)"])]

    @property
    def adaptation(self) -> Adaptation:
        """The step sizes and mass matrices of all replicas."""
        return self._parts[0].adaptation

    @property
    def step_size(self) -> Tensor | float:
        """The step size of the first replicas, see :attr:`Kernel.step_size`."""
        if self._inner is None:
            return self.kernel.step_size
        step_size = torch.as_tensor(self._inner.step_size)
        return self._rows(step_size)[:, 0].reshape(-1)

    @property
    def learned(self) -> list[str]:
        """What the inner kernel has learned, in words."""
        return [] if self._inner is None else self._inner.learned

    # -- rows ----------------------------------------------------------------------------------

    @property
    def _parts(self) -> tuple[PyroKernel, TemperedPotential]:
        if self._inner is None or self._tempered is None:
            raise RuntimeError("TemperingKernel is not bound to a potential: call setup")
        return self._inner, self._tempered

    def _rows(self, x: Tensor) -> Tensor:
        """``(rows, ...)`` as ``(chains of a target, R, targets, ...)``."""
        return x.unflatten(0, (-1, len(self.betas), self.potential.targets))

    def _take(self, x: Tensor, source: Tensor) -> Tensor:
        rows = self._rows(x)
        index = source.reshape(source.shape + (1,) * (rows.dim() - 3)).expand(rows.shape)
        return rows.gather(1, index).reshape(x.shape)

    def _replicated(self, z: Tensor) -> Tensor:
        targets = z.unflatten(0, (-1, 1, self.potential.targets))
        return targets.expand(-1, len(self.betas), -1, -1).flatten(0, 2)

    def _outward(self, replicas: State) -> TemperedState:
        z, potential = (self._rows(x)[:, 0].flatten(0, 1) for x in (replicas.z, replicas.potential))
        grad = None if replicas.grad is None else self._rows(replicas.grad)[:, 0].flatten(0, 1)
        return TemperedState(z, potential, grad, replicas)

    def diagnostics(self) -> Saved:
        """Statistics of the draws, with the rates of exchange."""
        rates = [] if self._swaps is None else self.swap_rates.tolist()
        return {**super().diagnostics(), "swap rates": rates}


def geometric_betas(lowest: float, num_replicas: int) -> list[float]:
    r"""Inverse temperatures :math:`\beta_r = \beta_R^{(r - 1) / (R - 1)}` from 1 to the lowest.

    Args:
        lowest: :math:`\beta_R`, in (0, 1).
        num_replicas: :math:`R`, at least 2.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> geometric_betas(0.25, 3)
        [1.0, 0.5, 0.25]
    """
    check_number("lowest", lowest)
    if not 0 < lowest < 1:
        raise ValueError(f"lowest must lie in (0, 1), got {lowest}")
    num_replicas = check_count("num_replicas", num_replicas, least=2)
    return [lowest ** (i / (num_replicas - 1)) for i in range(num_replicas)]


def _checked(betas: Sequence[float] | Tensor) -> tuple[float, ...]:
    try:
        values = tuple(float(b) for b in betas)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"betas must be a sequence of numbers, as in [1.0, 0.5, 0.25]; got {shown(betas)}"
        ) from error
    if len(values) < 2:
        raise ValueError(f"betas must hold at least two inverse temperatures, got {list(values)}")
    if any(not (math.isfinite(b) and 0 < b <= 1) for b in values):
        raise ValueError(f"betas must lie in (0, 1], got {list(values)}")
    if values[0] != 1 or any(b <= c for b, c in pairwise(values)):
        raise ValueError(
            f"betas must start at 1, the target, and fall, as in [1.0, 0.5, 0.25]; got"
            f" {list(values)}"
        )
    return values
