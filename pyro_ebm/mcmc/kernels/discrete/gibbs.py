r"""Gibbs sampling of discrete sites: in blocks where the distribution has them, else one by one.

A Gibbs step draws some variables anew from their distribution given all others, and so leaves the
target exactly invariant: nothing is rejected, nothing is tuned. Two kinds:

* *Blocks*. A restricted Boltzmann machine has two, its hidden and its visible units; a sparse
  Boltzmann machine or Potts model one for each colour of its graph. A sweep costs a few matrix
  products, however many variables.
* *Single sites*. Of any model, one variable after another, each by the potential of all its values:
  a sweep of :math:`n` variables with :math:`K` values costs :math:`n (K - 1)` evaluations of the
  model.

Reference:
    Geman and Geman (1984), Stochastic relaxation, Gibbs distributions, and the Bayesian restoration
    of images. Smolensky (1986), Information processing in dynamical systems.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.kernels.accept import accept_valid
from pyro_ebm.mcmc.kernels.discrete.variables import Variables, gumbel
from pyro_ebm.mcmc.kernels.transition import GraphSettings, TransitionKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State


class GibbsKernel(TransitionKernel):
    """One sweep over all discrete variables, each drawn given the others.

    A model that is one Boltzmann machine (RBM, Ising, Potts) and nothing else, or such a
    distribution by itself, is swept in its own blocks. Of every other model, each variable of each
    discrete site is drawn in turn from its values; the sites must have finitely many
    (``Bernoulli``, ``Categorical``, an energy on ``constraints.boolean``, ...).

    Args:
        model: a Pyro model, or a distribution.
        **kwargs: ``jit_compile`` (of a sweep of blocks, or of the draw of one variable),
            ``ignore_jit_warnings``, ``max_plate_nesting`` and ``init_strategy`` of
            :class:`~pyro_ebm.mcmc.TransitionKernel`.

    Raises:
        ValueError: (when run) if the model has continuous sites too: use a
            :class:`~pyro_ebm.mcmc.CompositeKernel`.

    Example:
        >>> from pyro_ebm.mcmc import MCMC
        >>> def model(y):
        ...     k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        ...     pyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=y)
        >>> mcmc = MCMC(GibbsKernel(model), 1000, 10, num_chains=10, disable_progbar=True)
        >>> mcmc.run(torch.tensor(1.0))
        >>> k = mcmc.get_samples()["k"]
        >>> (k[:, None] == torch.arange(3)).float().mean(0)  # exactly (.164, .406, .430)
        tensor([0.1..., 0.4..., 0.4...])
    """

    needs_grad = False
    discrete = True
    _columns: Sequence[tuple[Tensor, Tensor]] = ()

    def __init__(self, model: Model | None = None, **kwargs: Unpack[GraphSettings]):
        super().__init__(model, adapt_step_size=False, adapt_mass_matrix=False, **kwargs)

    def check(self, potential: Potential) -> None:
        """Raises a ValueError for continuous sites, but those of a distribution with blocks."""
        if potential.blocks is None:
            super().check(potential)

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential, see :meth:`Kernel.bind`."""
        super().bind(potential, warmup_steps)
        if potential.blocks is None:
            like = torch.empty(0, dtype=potential.dtype, device=potential.device)
            self._columns = Variables(potential.sites, like).columns()

    def move(self, state: State) -> tuple[State, Info]:
        """One sweep."""
        if self.potential.blocks is not None:
            return super().move(state)
        diverging = torch.zeros_like(state.potential, dtype=torch.bool)
        for columns, support_values in self._columns:
            noise = gumbel((len(support_values), state.z.shape[0]), state.z)
            state, info = self.run_fn(state, columns, support_values, noise)
            diverging = diverging | info.diverging
        return state, Info(torch.ones_like(state.potential), diverging)

    def draw(self, state: State) -> tuple[Tensor, ...]:
        """The random numbers of a sweep of blocks."""
        return self.potential.gibbs_noise(state.z)

    def transition(self, state: State, *draws: Tensor) -> tuple[State, Info]:
        """A sweep of blocks, or the draw of one variable."""
        if self.potential.blocks is None:
            return self._draw_variable(state, *draws)
        # a sweep leads to states of positive probability alone, unless a parameter is NaN
        return accept_valid(state, self.evaluate(self.potential.gibbs_sweep(state.z, draws)))

    def _draw_variable(
        self, state: State, columns: Tensor, support_values: Tensor, noise: Tensor
    ) -> tuple[State, Info]:
        z, k, chains = state.z, len(support_values), state.z.shape[0]
        now = (z[:, None, columns] - support_values).square().sum(-1).argmin(-1)
        # candidate j holds support value now + j mod K: the first is where the chain stands
        others = support_values[(now + torch.arange(1, k, device=z.device)[:, None]) % k]
        moved = z.repeat(k - 1, 1).index_copy(1, columns, others.flatten(0, 1))
        with torch.no_grad():
            potential = self.potential(moved).reshape(k - 1, chains)
        potential = torch.cat([state.potential[None], potential])
        #   P(candidate j) = exp(-U_j) / sum_i exp(-U_i), and 0 where U is not finite
        logits = torch.where(potential.isfinite(), -potential, -torch.inf)
        chosen = (logits + noise).argmax(0, keepdim=True)
        candidates = torch.cat([z[None], moved.reshape(k - 1, chains, -1)])
        new = candidates.gather(0, chosen[..., None].expand(1, chains, z.shape[1]))[0]
        # a state of probability 0 is no accident on a discrete space
        diverging = ~(potential > -torch.inf).all(0)
        accept_prob = torch.ones_like(state.potential)
        return State(new, potential.gather(0, chosen)[0], None), Info(accept_prob, diverging)
