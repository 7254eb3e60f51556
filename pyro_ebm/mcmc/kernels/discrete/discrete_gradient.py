r"""Kernels that let the gradient of a discrete density say which variables to change.

A density on :math:`\{0, 1\}^n` or on one-hot rows is mostly a formula that makes sense for real
:math:`x` too. Its gradient there says, to first order, what each *move* (one variable, another
support value) does to the log density,

.. math:: \log p(x') - \log p(x) \approx d(x \to x') = \nabla \log p(x)^\top (x' - x),

all moves at the price of two evaluations. The kernels propose good moves more often, and the
Metropolis test makes up for the approximation.

Reference:
    Zanella (2020), Informed proposals for local MCMC in discrete spaces. Grathwohl, Swersky,
    Hashemi, Duvenaud and Maddison (2021), Oops I took a gradient: scalable sampling for discrete
    distributions. Zhang, Liu and Liu (2022), A Langevin-like sampler for discrete distributions.
"""

from typing import Unpack

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.mcmc.kernels.accept import accept, accept_valid
from pyro_ebm.mcmc.kernels.discrete.variables import Variables, gumbel
from pyro_ebm.mcmc.kernels.transition import GraphSettings, TransitionKernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.integration.line_integral import gradient_tells_all
from pyro_ebm.ops.steps.metropolis import log_uniform

NUM_COMPARED = 16


class GradientKernel(TransitionKernel):
    """A discrete kernel that reads the gradient of the potential at the points themselves."""

    discrete = True
    _variables: Variables | None = None

    def check(self, potential: Potential) -> None:
        """Raises a ValueError for sites that are continuous, or whose values have no gradient."""
        super().check(potential)
        if potential.sites and potential.dim == 0:
            raise ValueError(f"the sites {potential.names} hold no variables: nothing can move")
        whole = [site.name for site in potential.sites if not site.dtype.is_floating_point]
        if whole:
            raise ValueError(
                f"{type(self).__name__} needs the gradient in the values of {whole}, which are"
                " whole numbers and have none: use GibbsKernel, or write the site as one-hot or"
                " binary values"
            )

    def bind(self, potential: Potential, warmup_steps: int) -> None:
        """Takes a potential, see :meth:`Kernel.bind`."""
        super().bind(potential, warmup_steps)
        like = torch.empty(0, dtype=potential.dtype, device=potential.device)
        self._variables = Variables(potential.sites, like)

    def init(self, z: Tensor) -> State:
        """The state at the first positions; refuses a density that the points do not move.

        Raises:
            ValueError: if the gradient is 0 at every start and the density is not flat, as for a
                density of indices: proposals would be blind. Or if it is not finite.
        """
        state = super().init(z)
        assert state.grad is not None
        if not state.grad.isfinite().all():
            raise ValueError(
                f"the gradient in {self.potential.names} is not finite at a starting point, though"
                " the density is: use GibbsKernel, which needs none"
            )
        if self.potential.dim and not state.grad.any() and not self._is_flat(state):
            raise ValueError(
                f"the gradient in {self.potential.names} is 0 at every starting point: the log"
                " density is no differentiable function of the points, so that"
                f" {type(self).__name__} would propose blindly. Use GibbsKernel"
            )
        return state

    def _is_flat(self, state: State) -> bool:
        """Whether random points have the density of the state's, so that a gradient of 0 is right.

        So has a machine whose couplings start at 0.
        """
        others = self._others(state.z.repeat(NUM_COMPARED, 1))
        with torch.no_grad():
            return torch.allclose(self.potential(others), state.potential.repeat(NUM_COMPARED))

    def _others(self, z: Tensor) -> Tensor:
        """Random positions, as many as these."""
        return torch.cat([s.start(len(z), z.dtype) for s in self.potential.sites], -1)

    @property
    def variables(self) -> Variables:
        """The variables of the potential's sites."""
        assert self._variables is not None
        return self._variables

    def _accept(
        self, state: State, new: State, log_q_ratio: Tensor, log_u: Tensor
    ) -> tuple[State, Info]:
        #      p(x') q(x | x')
        # log ----------------  =  U(x) - U(x') + log q(x | x') - log q(x' | x)
        #      p(x)  q(x' | x)
        log_ratio = state.potential - new.potential + log_q_ratio
        return accept(state, new, log_ratio, log_u, discrete=True)


class GibbsWithGradientsKernel(GradientKernel):
    r"""Changes one variable at a time, chosen by the gradient.

    .. math:: q(x' \mid x) \propto e^{d(x \to x') / 2},

    over all :math:`x'` that differ from :math:`x` in one variable, then accepts or rejects. It has
    nothing to tune. One transition changes one variable: a sweep's worth of :math:`n` takes
    :math:`n` transitions.

    Args:
        model: a Pyro model, or a distribution.
        **kwargs: ``jit_compile``, ``ignore_jit_warnings``, ``max_plate_nesting`` and
            ``init_strategy`` of :class:`~pyro_ebm.mcmc.TransitionKernel`.

    Raises:
        ValueError: (when run) for continuous sites, or sites of whole numbers or with a gradient
            of 0, such as ``Categorical``.

    Reference:
        Grathwohl et al. (2021), Oops I took a gradient.

    Example:
        >>> from pyro_ebm.mcmc import MCMC
        >>> p = UnnormalizedEnergy(lambda x: -x.sum(-1), (5,), dist.constraints.boolean)
        >>> kernel = GibbsWithGradientsKernel(p)
        >>> mcmc = MCMC(kernel, 200, 50, num_chains=50, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].mean()  # 1 / (1 + exp(-1)) = .731
        tensor(0.7...)
    """

    def __init__(
        self,
        model: Model | None = None,
        **kwargs: Unpack[GraphSettings],
    ):
        super().__init__(model, adapt_step_size=False, adapt_mass_matrix=False, **kwargs)

    def draw(self, state: State) -> tuple[Tensor, ...]:
        """A Gumbel variable for each move, and the uniform."""
        noise = gumbel((state.z.shape[0], self.variables.num_moves), state.z)
        return noise, log_uniform(state.potential)

    def transition(self, state: State, noise: Tensor, log_u: Tensor) -> tuple[State, Info]:
        """One move proposed, and accepted or rejected."""
        variables, z = self.variables, state.z
        log_q, stays = self._log_q(state)
        index = (log_q + noise).argmax(-1, keepdim=True)
        chosen = torch.zeros_like(stays).scatter(-1, index, True)
        new = self.evaluate(variables.after(z, chosen))
        # the way back gives the same variable its old support value
        back = variables.flat(
            [
                there.any(-1, keepdim=True) & old
                for there, old in zip(
                    variables.by_variable(chosen), variables.by_variable(stays), strict=True
                )
            ]
        )
        new_log_q, _ = self._log_q(new)
        log_q_ratio = _log_prob(new_log_q, back) - _log_prob(log_q, chosen)
        return self._accept(state, new, log_q_ratio, log_u)

    def _log_q(self, state: State) -> tuple[Tensor, Tensor]:
        """Log probabilities of the moves, and which of them would move nothing."""
        assert state.grad is not None
        moves = self.variables.moves(state.z, state.grad)
        log_q = torch.where(moves.stays, -torch.inf, moves.change / 2).log_softmax(-1)
        return log_q, moves.stays


class DiscreteLangevinKernel(GradientKernel):
    r"""Changes all variables at once, each by its own gradient: Langevin's step on discrete points.

    .. math:: q(x' \mid x) \propto \prod_i \exp\Big( \tfrac12\, g_i^\top (x'_i - x_i)
              - \frac{|x'_i - x_i|^2}{2 \alpha} \Big), \qquad g = \nabla \log p(x),

    with the step size :math:`\alpha`. Adjusted (DMALA), proposals are accepted or rejected and the
    target is exactly invariant. Unadjusted (DULA) it is biased, the more the larger :math:`\alpha`,
    and blind to what reads the points otherwise than by a formula of theirs, as indices, say: such
    a density is refused.

    Args:
        model: a Pyro model, or a distribution.
        step_size: :math:`\alpha`, the first one when it is adapted.
        adjusted: whether proposals are accepted or rejected.
        adapt_step_size: whether warmup adapts :math:`\alpha`; by default if ``adjusted``.
        target_accept_prob: mean acceptance probability to adapt to.
        **kwargs: ``jit_compile``, ``ignore_jit_warnings``, ``max_plate_nesting`` and
            ``init_strategy`` of :class:`~pyro_ebm.mcmc.TransitionKernel`.

    Raises:
        ValueError: for a step size that is not positive, or one to be adapted although unadjusted;
            (when run) for continuous sites, or sites of whole numbers or with a gradient of 0;
            unadjusted, for a density of which a part has none (a ``OneHotCategorical``, as a site
            or as the base of an energy, an ``argmax``).

    Reference:
        Zhang, Liu and Liu (2022), A Langevin-like sampler for discrete distributions.

    Example:
        >>> from pyro_ebm.mcmc import MCMC
        >>> p = UnnormalizedEnergy(lambda x: -x.sum(-1), (5,), dist.constraints.boolean)
        >>> mcmc = MCMC(DiscreteLangevinKernel(p), 200, 50, num_chains=50, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].mean()  # 1 / (1 + exp(-1)) = .731
        tensor(0.7...)
    """

    MAX_STEP_SIZE = 1e4  # from here on the distance weighs nothing

    def __init__(
        self,
        model: Model | None = None,
        step_size: float = 0.2,
        adjusted: bool = True,
        adapt_step_size: bool | None = None,
        target_accept_prob: float = 0.574,
        **kwargs: Unpack[GraphSettings],
    ):
        if adapt_step_size and not adjusted:
            raise ValueError(
                "adapt_step_size=True needs adjusted=True: the unadjusted algorithm accepts"
                " everything, so there is no acceptance to adapt to"
            )
        super().__init__(
            model,
            step_size=step_size,
            adapt_step_size=adjusted if adapt_step_size is None else adapt_step_size,
            adapt_mass_matrix=False,
            target_accept_prob=target_accept_prob,
            **kwargs,
        )
        self.adjusted = adjusted

    def init(self, z: Tensor) -> State:
        """The state at the first positions; unadjusted, the gradient must tell of all the density.

        Raises:
            ValueError: if it does not, as where some part of it is looked up by an index.
        """
        state = super().init(z)
        if self.adjusted or not self.checks_potential:
            return state
        starts = z.repeat(-(-NUM_COMPARED // z.shape[0]), 1)
        if not gradient_tells_all(self.potential.value_and_grad, starts, self._others(starts)):
            raise ValueError(
                f"a part of the log density of {self.potential.names} has no gradient in the values"
                " (as that of a OneHotCategorical, a site's own or an energy's base, which looks up"
                " an index), and adjusted=False sees nothing but gradients: use adjusted=True, or"
                " GibbsKernel"
            )
        return state

    def draw(self, state: State) -> tuple[Tensor, ...]:
        """The step size, a Gumbel variable for each move, and the uniform."""
        noise = gumbel((state.z.shape[0], self.variables.num_moves), state.z)
        return self.step_size_of(state), noise, log_uniform(state.potential)

    def transition(
        self, state: State, step_size: Tensor, noise: Tensor, log_u: Tensor
    ) -> tuple[State, Info]:
        """New values for all variables, accepted or rejected together if ``adjusted``."""
        variables = self.variables
        log_q = self._log_q(state, step_size)
        noisy = [a + b for a, b in zip(log_q, variables.by_variable(noise), strict=True)]
        chosen = [
            torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.argmax(-1, keepdim=True), True)
            for x in noisy
        ]
        new = self.evaluate(variables.after(state.z, variables.flat(chosen)))
        if not self.adjusted:
            return accept_valid(state, new)
        assert state.grad is not None
        # the way back gives every variable its old support value
        old = variables.moves(state.z, state.grad).stays
        forth = _log_prob(variables.flat(log_q), variables.flat(chosen))
        back = _log_prob(variables.flat(self._log_q(new, step_size)), old)
        return self._accept(state, new, back - forth, log_u)

    def _log_q(self, state: State, step_size: Tensor) -> list[Tensor]:
        """Log probabilities of the support values of each variable, ``(chains, n, K)`` by site."""
        assert state.grad is not None
        moves = self.variables.moves(state.z, state.grad)
        logits = moves.change / 2 - moves.distance / (2 * step_size)
        return [part.log_softmax(-1) for part in self.variables.by_variable(logits)]


def _log_prob(log_q: Tensor, chosen: Tensor) -> Tensor:
    """The log probability ``(chains,)`` of the moves chosen."""
    return torch.where(chosen, log_q, 0.0).sum(-1)
