r"""Langevin dynamics on minibatches (SGLD).

.. math:: z' = z - \varepsilon\, A\, \hat g(z) + \sqrt{2 \varepsilon}\, L \xi, \qquad A = L L^\top,

where :math:`\hat g` is the gradient of the potential at a subsample of the data. On a Gaussian
posterior of curvature 1 the stationary variance is
:math:`(1 + \varepsilon s / 2) / (1 - \varepsilon / 2)`, :math:`s` being the variance of
:math:`\hat g` over the subsamples: without control variates :math:`s` is about :math:`N / n`.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.accept import accept_valid
from pyro_ebm.mcmc.kernels.minibatch.control_variates import Center
from pyro_ebm.mcmc.kernels.minibatch.kernel import MinibatchKernel, Rows
from pyro_ebm.mcmc.state import Info, State
from pyro_ebm.ops.steps.langevin import langevin_proposal
from pyro_ebm.ops.steps.precondition import Factor


class SGLDKernel(MinibatchKernel):
    r"""Stochastic gradient Langevin dynamics, for models with subsampled plates.

    .. math:: z' = z - \varepsilon\, A\, \hat g(z) + \sqrt{2 \varepsilon}\, L \xi

    Every transition looks at a fresh subsample of each plate ``pyro.plate(..., subsample_size=n)``.
    **The draws are biased**: there is no Metropolis test. ``variance_bias`` bounds the error of a
    learned step as far as the posterior is Gaussian, and ``summary`` tells what it was. With
    ``precondition_steps=False``, a ``step_size`` and a ``schedule`` it is the algorithm of Welling
    and Teh.

    Args:
        model: a Pyro model, or a distribution. Without subsampled plates all the data are seen.
        potential_fn: instead of a model, see :class:`~pyro_ebm.mcmc.TransitionKernel`.
        step_size: :math:`\varepsilon`, in units of :math:`A`; by default it is learned in the
            warmup.
        schedule: a factor of the step size after ``t`` draws (0, 1, ...), as
            :class:`~pyro_ebm.mcmc.PolynomialDecay`; by default the step size is constant.
        variance_bias: the relative error of posterior variances that a learned step may make.
        precondition_steps: whether the warmup learns :math:`A`, from the second moments of the
            gradients; else it is the identity.
        control_variates: False; True, to correct the gradients by those at a mode that is found by
            descent; or the value of every site at a mode, as ``guide.median()`` gives it after SVI.
            The chains then start there. A step evaluates its rows twice, and may be far longer.
        shared_rows: whether all chains look at the same rows, which costs less, or each at its own.
            The noise of shared rows moves all chains alike, and more chains do not average it out:
            so by default they are shared with control variates, where there is little noise.
        **kwargs: ``jit_compile``, ``ignore_jit_warnings``, ``transforms``, ``max_plate_nesting``
            and ``init_strategy`` of :class:`~pyro_ebm.mcmc.TransitionKernel`.

    Raises:
        NotImplementedError: for a latent inside a subsampled plate (when run).
        ValueError: for an argument out of its range.

    Reference:
        Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics. Li,
        Chen, Carlson and Carin (2016), Preconditioned stochastic gradient Langevin dynamics for
        deep neural networks. Baker, Fearnhead, Fox and Nemeth (2019), Control variates for
        stochastic gradient MCMC.

    Example:
        >>> from pyro_ebm import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y), subsample_size=20) as rows:
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])
        >>> kernel = SGLDKernel(model, control_variates=True)
        >>> mcmc = MCMC(kernel, 300, 100, num_chains=10, disable_progbar=True)
        >>> mcmc.run(torch.linspace(-1.0, 3.0, 1000))
        >>> mu = mcmc.get_samples()["mu"]  # the posterior is N(1, 1 / 1000)
        >>> bool((mu.mean() - 1).abs() < 0.01), bool((mu.std() / 1000**-0.5 - 1).abs() < 0.15)
        (True, True)
    """

    def draw(self, state: State) -> tuple[Any, ...]:
        """Step size, preconditioner, noise, the rows of the new state, and the center."""
        self._rows = self.draw_rows(len(state.z))
        step_size, factor = self.steps_of(state)
        noise = torch.randn_like(state.z)
        return step_size, factor, noise, self._rows, self._center

    def transition(
        self,
        state: State,
        step_size: Tensor,
        factor: Factor | None,
        noise: Tensor,
        rows: Rows,
        center: Center | None,
    ) -> tuple[State, Info]:
        """One Langevin step, and the gradient there at fresh rows."""
        assert state.grad is not None
        z = langevin_proposal(state.z, state.grad, step_size, factor, state.z.new_ones(()), noise)
        return accept_valid(state, self.estimate(z, rows, center))
