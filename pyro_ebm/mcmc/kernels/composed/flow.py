r"""Far moves by a normalizing flow that learns, during warmup, where the chains have been.

Local steps do not cross between modes. But many chains that start apart find many modes, and a flow
that is fitted to all of their positions proposes from anywhere to anywhere: to each chain a draw
:math:`z' \sim q`, which is accepted with probability

.. math:: \min\left(1, \frac{p(z')\, q(z)}{p(z)\, q(z')}\right).

So chains redistribute themselves over the modes that any of them has found, by their mass; and the
flow, fitted again to where they are then, proposes better. After the warmup it is frozen: local
steps and far moves both leave the target invariant, whatever the flow has learned, and the draws
are exact. A bad flow is a waste of time, and no bias.

What it cannot do is find a mode: where no chain has been, the flow has no mass to speak of. Start
chains widely, or let :class:`~pyro_ebm.TemperingKernel` make the local moves.

Reference:
    Gabrié, Rotskoff and Vanden-Eijnden (2022), Adaptive Monte Carlo augmented with normalizing
    flows. Wong, Gabrié and Foreman-Mackey (2023), flowMC: Normalizing flow enhanced sampling
    package for probabilistic inference in JAX.
"""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.distributions.core.supports import support_of
from pyro_ebm.distributions.flow import FlowDistribution, coupling_flow
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.adaptation.warmup import Adaptation
from pyro_ebm.mcmc.kernels.accept import decide
from pyro_ebm.mcmc.kernels.base import refuse_temperature
from pyro_ebm.mcmc.kernels.composed.fitted_flow import FittedFlow
from pyro_ebm.mcmc.kernels.minibatch.kernel import MinibatchKernel
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.kernels.transition import check_positive
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_count, shown
from pyro_ebm.ops.steps.metropolis import log_uniform

LEAST_RATE = 0.01
"""A flow whose proposals are accepted at a lower rate moves no chain far."""


class FlowKernel(PyroKernel):
    r"""Local moves by another kernel, and far moves by a flow that is fitted during warmup.

    A transition is one of the local kernel, and one proposal of the flow for each chain, all in one
    batch. The flow is fitted by maximum likelihood to the positions of all chains (and ranks), on
    the unconstrained space, at the ends of growing windows of the warmup, and frozen after the last
    one. It needs chains in every mode: some hundred of them, started widely (``init_strategy``,
    ``initial_params``, a ``base`` of the energy as wide as where modes may be), or local moves by
    :class:`~pyro_ebm.TemperingKernel`. All sites must be continuous.

    The statistic ``flow_acceptance_rate`` of each draw is the probability with which its far move
    was accepted, also in the warmup (``save_warmup=True``), where it is 0 before the first fit;
    :attr:`flow_rates` has its trend. ``acceptance_rate``, ``step_size`` and ``diverging`` are those
    of the local moves. A run whose far moves are accepted at a rate below .01 says so.

    Args:
        kernel: makes the local moves, and has the model: ``LangevinKernel(model)``,
            ``ChEESKernel(model)``, ``TemperingKernel(...)``, ...
        flow: a module that returns a distribution over flat positions ``(dim,)`` when called, such
            as a flow of zuko; it is copied, and the copy is trained. By default a
            :func:`~pyro_ebm.distributions.flow.coupling_flow`.
        num_fit_steps: steps of Adam in the warmup, of all fits together, each on 256 positions.
            At 0, or without a warmup, the ``flow`` is taken as it is, as one of positions that are
            not standardised.
        lr: the learning rate at the start of each fit, from where it falls to 0.

    Raises:
        ValueError: for a kernel of another temperature, of an unknown log Z, on minibatches,
            or that has a flow already; for a flow that does not fit the model, or (when run)
            discrete sites.

    Example:
        >>> from pyro_ebm import MCMC, LangevinKernel
        >>> def two_modes(x):  # three quarters of the mass near 6, the rest near -6
        ...     return -torch.logaddexp(1.0986 - (x - 6) ** 2 / 2, -((x + 6) ** 2) / 2)
        >>> kernel = FlowKernel(LangevinKernel(UnnormalizedEnergy(two_modes)), num_fit_steps=150)
        >>> starts = {"x": torch.linspace(-8, 8, 50)}  # half of them on either side
        >>> mcmc = MCMC(kernel, 200, initial_params=starts, num_chains=50, disable_progbar=True)
        >>> mcmc.run()
        >>> (mcmc.get_samples()["x"] > 0).float().mean()
        tensor(0.7...)
        >>> kernel.flow_rates[-1] > 0.5
        True
    """

    saved = (*PyroKernel.saved, "_inner", "_flow", "_rates", "_total", "_count")
    _inner: PyroKernel | None = None
    _flow: FittedFlow | None = None
    _accept_prob: Tensor | None = None
    _rates: "list[float]" = []
    _total: Tensor | float = 0.0
    _count = 0

    def __init__(
        self,
        kernel: PyroKernel,
        flow: nn.Module | None = None,
        num_fit_steps: int = 1000,
        lr: float = 5e-3,
    ):
        if not isinstance(kernel, PyroKernel) or isinstance(kernel, FlowKernel):
            raise ValueError(
                "kernel must be a kernel of pyro_ebm that makes local moves, such as"
                f" LangevinKernel(model), got {shown(kernel)}"
            )
        refuse_temperature(kernel, "far moves are between draws of the density itself")
        if any(isinstance(part, MinibatchKernel) for part in (kernel, *kernel.parts)):
            raise ValueError(
                f"{kernel!r} makes no Metropolis test and may see a part of the data: a far move is"
                " tested by the density of all the data, which it does not have"
            )
        if kernel.samples_intractable:
            raise ValueError(
                f"{kernel!r} moves sites on which an unknown log Z depends, and a far move would"
                " need that log Z: use it without a flow"
            )
        if flow is not None and not (isinstance(flow, nn.Module) and list(flow.parameters())):
            raise ValueError(
                "flow must be a module with parameters that returns a distribution when called,"
                f" such as coupling_flow(features=2), got {shown(flow)}"
            )
        check_positive("lr", lr)
        if check_count("num_fit_steps", num_fit_steps, 0) == 0 and flow is None:
            raise ValueError("num_fit_steps=0 takes a flow as it is: give one, flow=...")
        super().__init__(kernel.model, kernel.potential_fn)
        self.kernel, self.flow, self.lr = kernel, flow, float(lr)
        self.num_fit_steps = num_fit_steps
        self.needs_grad, self.max_divergences = kernel.needs_grad, kernel.max_divergences

    @property
    def parts(self) -> tuple[PyroKernel, ...]:
        """The kernel that makes the local moves."""
        return (self.kernel,)

    # -- many chains ---------------------------------------------------------------------------

    def make_potential(self, *args: object, **kwargs: object) -> Potential:
        """The potential of the local kernel's model."""
        self.restore_params()
        inner = self.kernel.copy()
        inner.given_params = self.given_params
        return inner.make_potential(*args, **kwargs)

    def check(self, potential: Potential) -> None:
        """Raises a ValueError for discrete sites, or several targets at once."""
        if potential.targets > 1:
            raise ValueError(
                "FlowKernel learns one flow of one density, and this is a batch of"
                f" {potential.targets}. Replicas go inside:"
                " FlowKernel(TemperingKernel(LangevinKernel(model), betas))"
            )
        if names := [site.name for site in potential.sites if site.support_values is not None]:
            raise ValueError(
                f"a flow proposes real numbers, and the sites {names} are discrete: use"
                " CompositeKernel, in a TemperingKernel where modes are far apart"
            )
        self.kernel.check(potential)

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Binds a copy of the local kernel, and takes a copy of the flow."""
        super().bind(potential, warmup_steps)
        self._inner, self._rates = self.kernel.copy(), []
        self._inner.planned_steps, self._inner.starts_anew = self.planned_steps, self.starts_anew
        self._inner.starts_together = self.starts_together
        self._inner.bind(potential, warmup_steps)
        if potential.dim:
            flow = coupling_flow(potential.dim) if self.flow is None else self.flow
            like = torch.empty(0, dtype=potential.dtype, device=potential.device)
            self._flow = FittedFlow(
                flow, like, potential.dim, warmup_steps, self.num_fit_steps, self.lr
            )
            _check_shape(self._flow.net(), potential.dim)

    def init(self, z: Tensor) -> State:
        """The state at the first positions, shape ``(chains, dim)``."""
        self._local.checks_potential = self.checks_potential
        return self._local.init(z)

    def evaluate(self, z: Tensor) -> State:
        """The state at the positions ``z``, shape ``(chains, dim)``."""
        return self._local.evaluate(z)

    def step(self, state: State) -> tuple[State, Info]:
        """A local transition of all chains, then a far move."""
        state, info = self._local.step(state)
        flow, warm = self._flow, self._steps < self._warmup_steps
        self._accept_prob = torch.zeros_like(state.potential)
        if flow is not None and flow.ready:
            state = self._far_move(state, flow)
            self._total, self._count = self._total + self._accept_prob.mean(), self._count + 1
        self._steps += 1
        if flow is not None and warm and (flow.learn(state.z) or self._steps == self._warmup_steps):
            self._end_window()
        return state, info

    def _far_move(self, state: State, flow: FittedFlow) -> State:
        new_z, log_q_new = flow.sample(len(state.z))
        new = super().evaluate(new_z)
        #      p(z') q(z)
        # log -----------  =  U(z) - U(z') + log q(z) - log q(z')
        #      p(z) q(z')
        log_ratio = state.potential - new.potential + flow.log_prob(state.z) - log_q_new
        accepted, info = decide(new, log_ratio, log_uniform(state.potential))
        self._accept_prob = info.accept_prob
        return self._local.placed(state, new, accepted)

    def _end_window(self) -> None:
        """Notes the rate of acceptance of the flow that was fitted again."""
        if self._count:
            self._rates = [*self._rates, float(self._total) / self._count]
        self._total, self._count = 0.0, 0

    def placed(self, state: State, new: State, chosen: Tensor) -> State:
        """The state with some chains elsewhere, see :meth:`Kernel.placed`."""
        return self._local.placed(state, new, chosen)

    def check_graphs(self) -> None:
        """Compares the graphs of the local kernel, see :meth:`Kernel.check_graphs`."""
        if self._inner is not None:
            self._inner.check_graphs()

    # -- what was learned ------------------------------------------------------------------------

    @property
    def proposal(self) -> FlowDistribution:
        """The flow as a normalized distribution of the values of the model's one site.

        A proposal for :func:`~pyro_ebm.estimate_log_normalizer`, the noise of an
        :class:`~pyro_ebm.NCE`, a guide.

        Raises:
            RuntimeError: before a run.
            ValueError: for a model of several sites.
        """
        if self._flow is None:
            raise RuntimeError("there is no flow yet: run first")
        if len(sites := self.potential.sites) != 1:
            raise ValueError(
                f"the flow is one of the sites {self.potential.names} together, and no"
                " distribution of one of them"
            )
        site, p = sites[0], self.model
        support = support_of(p) if isinstance(p, Distribution) else site.transform.domain
        return FlowDistribution(self._flow.at_site(site), support)

    @property
    def flow_rates(self) -> list[float]:
        """Mean acceptance of far moves after each fit, in time: the last one after the warmup."""
        if not self._count:
            return list(self._rates)
        return [*self._rates, float(self._total) / self._count]

    @property
    def extra_fields(self) -> dict[str, Tensor]:
        """The acceptance probability of the last far move, shape ``(chains,)``."""
        own = {} if self._accept_prob is None else {"flow_acceptance_rate": self._accept_prob}
        return {**({} if self._inner is None else self._inner.extra_fields), **own}

    @property
    def findings(self) -> list[Finding]:
        """Whether hardly any far move is accepted, beside what the local kernel finds."""
        found = [] if self._inner is None else self._inner.findings
        rate = self.flow_rates[-1] if self._count else 1.0
        if self._steps <= self._warmup_steps or rate >= LEAST_RATE:
            return found
        how = "was not fitted"
        if self._flow is not None and self._flow.losses:
            how = f"was fitted to {self._flow.losses[-1]:.3g} nats"
        remedies = [
            "a longer warmup (warmup_steps=) and more steps (num_fit_steps=)",
            "more chains (num_chains=)",
            "a larger flow (flow=coupling_flow(...))",
            "the local kernel alone",
        ]
        text = f"far moves were accepted at a rate of {rate:.2g}: the flow {how}, and moves nothing"
        return [*found, Finding("flow", text, remedies)]

    @property
    def learned(self) -> list[str]:
        """What the local kernel has learned, and how often far moves are accepted."""
        found = [] if self._inner is None else self._inner.learned
        rates = self.flow_rates
        return [*found, f"flow accepted at {rates[-1]:.2g}"] if rates else found

    def diagnostics(self) -> Saved:
        """Statistics of the draws, with the rates of far moves."""
        return {**super().diagnostics(), "flow rates": self.flow_rates}

    @property
    def adaptation(self) -> Adaptation:
        """The step size and mass matrix of the local kernel."""
        return self._local.adaptation

    @property
    def step_size(self) -> Tensor | float:
        """The step size of the local kernel, see :attr:`Kernel.step_size`."""
        return self.kernel.step_size if self._inner is None else self._inner.step_size

    @property
    def _local(self) -> PyroKernel:
        if self._inner is None:
            raise RuntimeError("FlowKernel is not bound to a potential: call setup")
        return self._inner


def _check_shape(q: Distribution, dim: int) -> None:
    if q.event_shape != (dim,) or q.batch_shape:
        raise ValueError(
            f"flow must be of batch_shape=() and event_shape=({dim},), the unconstrained position"
            f" of all sites, got {tuple(q.batch_shape)} and {tuple(q.event_shape)}"
        )
