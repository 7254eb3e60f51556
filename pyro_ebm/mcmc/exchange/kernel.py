r"""The exchange algorithm: posteriors whose normalizer depends on what is sampled.

Let :math:`x` be observed through an energy that :math:`\theta` moves,
:math:`f(x \mid \theta) = e^{-E_\theta(x)}`. Its posterior is *doubly intractable*:

.. math:: p(\theta \mid x) = \frac{1}{p(x)}\; p(\theta)\, \frac{f(x \mid \theta)}{Z(\theta)},

where neither the evidence :math:`p(x)` nor :math:`Z(\theta)` is known, and Metropolis' ratio of
:math:`\theta'` to :math:`\theta` needs the second. But an *auxiliary* :math:`y`, drawn from the
model at :math:`\theta'`, may be part of the proposal. The same unknown density is then in the
numerator and in the denominator, and both constants cancel:

.. math:: r = \frac{p(\theta')\, q(\theta \mid \theta')}{p(\theta)\, q(\theta' \mid \theta)} \cdot
    \frac{f(x \mid \theta') / Z(\theta')}{f(x \mid \theta) / Z(\theta)} \cdot
    \frac{f(y \mid \theta) / Z(\theta)}{f(y \mid \theta') / Z(\theta')}
    = \frac{p(\theta')\, q(\theta \mid \theta')\, f(x \mid \theta')\, f(y \mid \theta)}
           {p(\theta)\, q(\theta' \mid \theta)\, f(x \mid \theta)\, f(y \mid \theta')} .

In words: swap :math:`x` and :math:`y` between :math:`\theta` and :math:`\theta'`, and see whether
the two are then more likely. A :math:`\theta'` whose own data :math:`y` look less like it than the
data :math:`x` do is a good explanation of :math:`x`.

With exact auxiliaries the posterior is exactly invariant. An auxiliary that an inner Markov chain
made from the data in :math:`n` steps is not quite a draw, and the answer is off by as much: at
:math:`n = 0`, where :math:`y = x`, everything cancels but the prior, and as :math:`n` grows the
answer moves from the prior to the posterior. So an inner chain that is too short *understates what
the data say*; :func:`~pyro_ebm.mcmc.exchange.inner_steps.inner_steps_report` looks for that.

Reference:
    Moller, Pettitt, Reeves and Berthelsen (2006), An efficient Markov chain Monte Carlo method for
    distributions with intractable normalising constants. Murray, Ghahramani and MacKay (2006),
    MCMC for doubly-intractable distributions. Liang (2010), A double Metropolis-Hastings sampler
    for spatial models with intractable normalizing constants (inner chains from the data).
"""

from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.exchange.auxiliary import Auxiliary, check_inner_kernel
from pyro_ebm.mcmc.exchange.potential import ExchangePotential
from pyro_ebm.mcmc.exchange.terms import UNDECIDED
from pyro_ebm.mcmc.exchange.watch import Watch
from pyro_ebm.mcmc.kernels.accept import choose, decide
from pyro_ebm.mcmc.kernels.composed.composite import BlockPotential
from pyro_ebm.mcmc.kernels.gradient_free.metropolis import MHKernel, ProposalSettings
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.arguments import check_count, shown


class ExchangeKernel(MHKernel):
    r"""Metropolis-Hastings where an unknown :math:`Z(\theta)` depends on the latents.

    .. math:: \min\left(1, \frac{p(\theta')\, f(x \mid \theta')\, f(y \mid \theta)}
              {p(\theta)\, f(x \mid \theta)\, f(y \mid \theta')}\right), \qquad
              y \sim f(\cdot \mid \theta') / Z(\theta')

    for every energy site of the model whose :math:`\log Z` is unknown (or merely learned) and
    moved by a latent: one auxiliary each, and one row of it for each row of a plate. Other sites,
    energies with a known :math:`\log Z` among them, enter as in any kernel. Such a site may be
    latent itself. Proposals are those of :class:`~pyro_ebm.MHKernel`, by default an adapted random
    walk, on the unconstrained space, for all continuous latents together; latents that move no
    :math:`Z`, and discrete ones, may be left to other kernels, as in
    ``CompositeKernel(model, [ExchangeKernel(), GibbsKernel(), LangevinKernel()])``.

    Auxiliaries are drawn, in this order of preference,

    1. exactly, where there are few enough states (at most :math:`2^{10}` to enumerate, or the
       values of a single variable): a small RBM or Ising model, an energy on a short
       ``constraints.integer_interval``, or a class of your own with an ``exact_sample``;
    2. by ``num_inner_steps`` Gibbs sweeps, where it resamples its own blocks (RBM, Ising, Potts);
    3. by ``num_inner_steps`` steps of a chain of Barker or, one discrete variable after another,
       Gibbs.

    An ``inner_kernel``, or a ``kernel`` that the energy was given, comes before all three.

    **An inexact auxiliary gives an inexact answer.** Sweeps and inner chains start at the data. At
    0 steps the draws would be those of the prior; with more they come nearer to the posterior, and
    there is no error message at too few: see
    :func:`~pyro_ebm.mcmc.exchange.inner_steps.inner_steps_report`.
    An inner kernel that is itself biased (unadjusted Langevin) adds its bias at any length, and one
    that stands still at far-out proposals gives back the prior there: that is warned of, chain by
    chain. With heavy-tailed priors :class:`~pyro_ebm.LangevinKernel` is such a one.

    Proposals whose energies are so large that rounding would decide are rejected, by a rule that
    keeps detailed balance (:mod:`~pyro_ebm.mcmc.exchange.terms`). Where moves are lost by it
    (:attr:`num_lost`), as may be in single precision with energies above 50,000, a warning says so.

    The statistic of a draw that is ``lp`` elsewhere is called ``lp_without_log_z`` here: it lacks
    :math:`-\log Z(\theta)`, and so does not tell which draw is likelier.

    Args:
        model: a Pyro model with at least one such site.
        num_inner_steps: sweeps, or steps of an inner chain; by default the ``num_steps`` of the
            energy, which is 100 unless it was given. Nearly all of the time goes there.
        inner_kernel: a kernel without a model, at temperature 1, such as ``BarkerKernel()`` or
            ``GibbsKernel()``, for the auxiliaries of its kind (continuous or discrete). It adapts
            during warmup, from transition to transition; within a chain its settings are fixed.
        **kwargs: ``proposal``, ``adapt_step_size``, ``adapt_mass_matrix``, ``full_mass``,
            ``target_accept_prob``, ``transforms``, ``max_plate_nesting`` and ``init_strategy`` of
            :class:`~pyro_ebm.MHKernel`.

    Raises:
        NormalizerError: (when run) for a Z that does not cancel: of a site that is scaled or
            subsampled, whose support, mask, shape or presence depends on a latent, which depends on
            a discrete latent, or which is a mixture of other energies.
        ValueError: for arguments out of range, an inner kernel with a model or a temperature of its
            own or made of others, or (when run) a model without a Z that moves.

    Reference:
        Murray, Ghahramani and MacKay (2006), MCMC for doubly-intractable distributions.

    Example:
        >>> from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
        >>> from pyro_ebm.mcmc import MCMC
        >>> edges = lattice_edges(3, 3)
        >>> x = BoltzmannMachine(0.2, edges=edges).exact_sample((20,))
        >>> def model(x):
        ...     J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", BoltzmannMachine(J, edges=edges), obs=x)
        >>> kernel = ExchangeKernel(model)
        >>> mcmc = MCMC(kernel, 100, num_chains=10, disable_progbar=True)
        >>> mcmc.run(x)
        >>> bool((mcmc.get_samples()["J"].mean() - 0.2).abs() < 0.1)
        True
        >>> kernel.auxiliaries
        {'x': exact draws}
    """

    samples_intractable = True
    inner_steps_factor = 1
    """How many times longer inner chains are than ``num_inner_steps`` says."""
    saved = (*MHKernel.saved, "_watch")
    _watch: Watch | None = None

    def __init__(
        self,
        model: Model | None = None,
        num_inner_steps: int | None = None,
        inner_kernel: PyroKernel | None = None,
        **kwargs: Unpack[ProposalSettings],
    ):
        if isinstance(num_inner_steps, int) and num_inner_steps < 1:
            raise ValueError(
                f"num_inner_steps must be at least 1, got {num_inner_steps}: an auxiliary that is"
                " the data themselves gives back the prior"
            )
        if num_inner_steps is not None:
            num_inner_steps = check_count("num_inner_steps", num_inner_steps)
        if inner_kernel is not None:
            check_inner_kernel("inner_kernel", inner_kernel)
            if inner_kernel.has_model:
                raise ValueError(
                    "inner_kernel must be a kernel without a model, such as BarkerKernel(): it"
                    f" moves the auxiliaries, got {shown(inner_kernel)}"
                )
        super().__init__(model, **kwargs)
        if self.discrete:
            raise ValueError(
                f"ExchangeKernel moves continuous sites, and {self.proposal!r} discrete ones"
            )
        self.num_inner_steps, self.inner_kernel = num_inner_steps, inner_kernel

    @property
    def auxiliaries(self) -> dict[str, Auxiliary]:
        """How the auxiliary of each site is drawn, and how well an inner chain moves."""
        return self._exchange.auxiliaries

    @property
    def _exchange(self) -> ExchangePotential:
        whole = _whole(self.potential)
        assert whole is not None
        return whole

    def _position(self, z: Tensor) -> Tensor:
        """The position of the whole model, where this kernel moves a block of it."""
        return self.potential.insert(z) if isinstance(self.potential, BlockPotential) else z

    def make_potential(self, *args: object, **kwargs: object) -> ExchangePotential:
        """The potential of the model at its arguments."""
        self.restore_params()
        if self.model is None:
            raise ValueError("ExchangeKernel has no model: give one, as in ExchangeKernel(model)")
        potential = ExchangePotential(
            self.model,
            args,
            kwargs,
            num_inner_steps=self.num_inner_steps,
            inner_kernel=self.inner_kernel,
            transforms=self.given_transforms,
            max_plate_nesting=self.max_plate_nesting,
            init_strategy=self.init_strategy,
            keep_discrete=self.keep_discrete,
        )
        for auxiliary in potential.auxiliaries.values():
            auxiliary.num_steps *= self.inner_steps_factor
        return potential

    def check(self, potential: Potential) -> None:
        """Raises a ValueError for a potential without auxiliary draws."""
        if _whole(potential) is None:
            raise ValueError(
                "ExchangeKernel draws auxiliaries from its model: write ExchangeKernel(model), or"
                " CompositeKernel(model, [ExchangeKernel(), ...]), and make neither a part of"
                " another kernel or of an energy"
            )
        super().check(potential)

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential, see :meth:`Kernel.bind`, and binds the inner chains to it."""
        super().bind(potential, warmup_steps)
        self._exchange.bind_auxiliaries(warmup_steps)
        self._watch = Watch(warmup_steps)

    @property
    def num_lost(self) -> int:
        """How many moves rounding would have decided, and were rejected for that.

        Those of the second half of the warmup and after it that might else have been accepted; see
        :mod:`~pyro_ebm.mcmc.exchange.terms`.
        """
        return 0 if self._watch is None else self._watch.num_lost

    def init(self, z: Tensor) -> State:
        """The state at the first positions; finds the first step sizes, inside and outside."""
        self._exchange.find_step_sizes(self._position(z), self._exchange.inner_chains)
        return super().init(z)

    def step(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, and what warmup learns from it."""
        state, info = super().step(state)
        self._exchange.learn(self._position(state.z))
        return state, info

    def move(self, state: State) -> tuple[State, Info]:
        """One transition of all chains, counted."""
        new, log_ratio, error, still, log_u = drawn = self.draw(state)
        discount = still if self.adaptation.active else torch.zeros_like(still)
        after, info = self.run_fn(state, *drawn[:3], discount, log_u)
        accepted, _ = decide(new, log_ratio, log_u, allowed=_decided(error))
        lost = (error > UNDECIDED) & new.potential.isfinite() & log_ratio.isfinite()
        lost = lost & (log_ratio + error > log_u)
        chains = self._exchange.inner_chains
        assert self._watch is not None
        self._watch.add(accepted, still, lost, chains, self.potential.dtype)
        return after, info

    def draw(self, state: State) -> tuple[State, Tensor, Tensor, Tensor, Tensor]:
        """The proposals, their log ratios and errors, how many inner chains stand still, and u."""
        new_z, log_q_ratio, log_u = super().draw(state)
        new = self.evaluate(new_z)
        # where there is no density there is no auxiliary, and no acceptance, whatever it is
        z = torch.where(new.potential.isfinite()[:, None], new_z, state.z)
        draws = self._exchange.draw(self._position(z))
        old = self._exchange.terms(self._position(state.z), draws.points)
        #      p(z') q(z | z') f(x | z') f(y | z)
        # log -----------------------------------
        #      p(z)  q(z' | z) f(x | z)  f(y | z')
        gain = state.potential - new.potential
        log_ratio, error = self._exchange.log_ratio(draws.terms, old, gain)
        self._exchange.note(draws)
        return new, log_ratio + log_q_ratio, error, draws.still, log_u

    def transition(
        self,
        state: State,
        new: State,
        log_ratio: Tensor,
        error: Tensor,
        still: Tensor,
        log_u: Tensor,
    ) -> tuple[State, Info]:
        """Accepts or rejects the proposals."""
        accepted, info = decide(new, log_ratio, log_u, allowed=_decided(error))
        # a step size is none the better for inner chains that fail
        info = info._replace(accept_prob=info.accept_prob * (1 - still))
        return choose(accepted, new, state), info

    def state_dict(self) -> Saved:
        """What was learned, by the inner chains too, see :meth:`Kernel.state_dict`."""
        return {**super().state_dict(), "auxiliaries": self._exchange.state_dict()}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another kernel was, see :meth:`Kernel.load_state_dict`."""
        super().load_state_dict(state)
        self._exchange.load_state_dict(state["auxiliaries"])


def _whole(potential: Potential) -> ExchangePotential | None:
    whole = potential.whole if isinstance(potential, BlockPotential) else potential
    return whole if isinstance(whole, ExchangePotential) else None


def _decided(error: Tensor) -> Tensor:
    return ~(error > UNDECIDED)
