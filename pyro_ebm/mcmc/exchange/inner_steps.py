r"""Are the inner chains of an exchange run long enough? Run it again with longer ones.

Draws from inner chains of :math:`n` steps have a bias that falls as :math:`n` grows, from that of
the prior at 0 to none. It cannot be seen in one run, whose chains may agree with each other
perfectly. Between runs at :math:`n` and at several times :math:`n` it moves the posterior, and that
can be seen, down to the Monte Carlo error of the two.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_ebm.mcmc.exchange.kernel import ExchangeKernel
from pyro_ebm.mcmc.kernels.composed.composite import CompositeKernel
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.running.mcmc import MCMC
from pyro_ebm.ops.arguments import check_count


@dataclasses.dataclass(frozen=True)
class InnerStepsReport:
    """What longer inner chains changed: element by element, each a dict from site to tensor."""

    num_steps: dict[str, tuple[int, int]]
    """The numbers of inner steps or sweeps before and after, for each energy site with some."""
    shift: dict[str, Tensor]
    """The posterior mean after minus that before, in posterior standard deviations."""
    shift_error: dict[str, Tensor]
    """Its Monte Carlo standard error, in the same unit."""
    stretch: dict[str, Tensor]
    """The log of the posterior standard deviation after over that before."""
    stretch_error: dict[str, Tensor]
    """Its Monte Carlo standard error."""
    mcmc: MCMC
    """The run with the longer chains, whose draws are the better ones."""

    @property
    def largest(self) -> float:
        """The largest shift or stretch, in standard errors; above 4 or so it is no accident."""
        found = [
            (value[name] / error[name]).abs().max()
            for value, error in (
                (self.shift, self.shift_error),
                (self.stretch, self.stretch_error),
            )
            for name in value
        ]
        return float(torch.stack(found).max())

    def __repr__(self) -> str:
        steps = ", ".join(f"{k!r} {n} -> {m}" for k, (n, m) in self.num_steps.items())
        lines = [f"inner steps of {steps}", f"{'':16}{'shift':>8}{'+-':>7}{'stretch':>9}{'+-':>7}"]
        for name, shifts in self.shift.items():
            columns = (self.shift_error, self.stretch, self.stretch_error)
            rows = zip(shifts.flatten(), *(c[name].flatten() for c in columns), strict=True)
            for i, (shift, error, stretch, stretch_error) in enumerate(rows):
                label = f"{name}[{i}]" if shifts.dim() else name
                lines.append(
                    f"{label:16}{shift:8.3f}{error:7.3f}{stretch:9.3f}{stretch_error:7.3f}"
                )
        lines.append(f"largest: {self.largest:.1f} standard errors")
        return "\n".join(lines)


def inner_steps_report(mcmc: MCMC, factor: int = 4) -> InnerStepsReport:
    r"""Runs an exchange run again with ``factor`` times as many inner steps, and compares.

    The *shift* is that of the posterior mean, in posterior standard deviations; the *stretch* is
    the log ratio of these. Both have a Monte Carlo standard error, for the two runs together. A
    shift of several errors says that the first run was biased, and the second may be: go on from
    its ``mcmc``. No such shift says that a bias, if there is one, is not much larger than the
    errors, and no more than that: chains that are stuck in one mode of the auxiliary may be so for
    ten times the steps as well, and a small factor moves a large bias but little.

    Args:
        mcmc: a :class:`~pyro_ebm.MCMC` after its run, with an
            :class:`~pyro_ebm.mcmc.ExchangeKernel` or a composite of one.
        factor: how many times longer the second run's inner chains are.

    Raises:
        ValueError: for another kernel, a factor below 2, auxiliaries that are all exact draws, or
            fewer than 4 draws of each chain.
        RuntimeError: before the run.

    Example:
        >>> from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
        >>> edges = lattice_edges(8, 8)
        >>> x = BoltzmannMachine(0.45, edges=edges).sample()
        >>> def model(x):
        ...     J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("x", BoltzmannMachine(J, edges=edges), obs=x)
        >>> kernel = ExchangeKernel(model, num_inner_steps=1)
        >>> mcmc = MCMC(kernel, 50, 30, num_chains=40, disable_progbar=True)
        >>> mcmc.run(x)
        >>> report = inner_steps_report(mcmc, factor=20)
        >>> report
        inner steps of 'x' 1 -> 20
                           shift     +-  stretch     +-
        J                 ...
        largest: ... standard errors
        >>> report.largest > 4
        True
    """
    factor = check_count("factor", factor, 2)
    before = mcmc.get_samples(group_by_chain=True)
    kernel: Any = mcmc.kernel
    if not getattr(kernel, "samples_intractable", False):
        raise ValueError(f"only an ExchangeKernel has inner steps, not {kernel!r}")
    if mcmc.num_samples // mcmc.thinning < 4:
        raise ValueError("a comparison needs at least 4 draws of each chain")
    auxiliaries = kernel.make_potential(*mcmc.results.args, **mcmc.results.kwargs).auxiliaries
    num_steps = {k: (a.num_steps, factor * a.num_steps) for k, a in auxiliaries.items()}
    num_steps = {k: pair for k, pair in num_steps.items() if pair[0] > 0}
    if not num_steps:
        raise ValueError("all auxiliaries are exact draws: there are no inner steps")
    longer = MCMC(
        _longer(kernel, factor),
        mcmc.num_samples,
        mcmc.warmup_steps,
        initial_params=mcmc.initial_params,
        num_chains=mcmc.num_chains,
        mp_context=mcmc.mp_context,
        disable_progbar=mcmc.disable_progbar,
        save_params=mcmc.save_params,
        chain_method=mcmc.chain_method,
        thinning=mcmc.thinning,
        check_convergence=mcmc.check_convergence,
    )
    longer.run(*mcmc.results.args, **mcmc.results.kwargs)
    pairs = {
        name: (_moments(before[name]), _moments(draws))
        for name, draws in longer.get_samples(group_by_chain=True).items()
    }

    def each(function: Callable[[_Moments, _Moments], Tensor]) -> dict[str, Tensor]:
        return {name: function(a, b) for name, (a, b) in pairs.items()}

    return InnerStepsReport(
        num_steps,
        each(lambda a, b: (b.mean - a.mean) / b.sd),
        each(lambda a, b: torch.hypot(a.mean_error, b.mean_error) / b.sd),
        each(lambda a, b: (b.sd / a.sd).log()),
        each(lambda a, b: torch.hypot(a.log_sd_error, b.log_sd_error)),
        longer,
    )


class _Moments(NamedTuple):
    mean: Tensor
    mean_error: Tensor
    sd: Tensor
    log_sd_error: Tensor


def _moments(draws: Tensor) -> _Moments:
    """Moments and their Monte Carlo errors of draws ``(chains, draws, *site)``."""
    draws = draws.double()
    mean, mean_error = _mean(draws)
    variance, error = _mean((draws - mean).square())
    # d log sd = d variance / (2 variance)
    return _Moments(mean, mean_error, variance.sqrt(), error / (2 * variance))


def _mean(draws: Tensor) -> tuple[Tensor, Tensor]:
    flat = draws.flatten(0, 1)
    ess = effective_sample_size(draws, chain_dim=0, sample_dim=1)
    return flat.mean(0), flat.std(0) / ess.sqrt()


def _longer(kernel: PyroKernel, factor: int) -> PyroKernel:
    if isinstance(kernel, CompositeKernel):
        return kernel.copy(kernels=[_longer(part, factor) for part in kernel.parts])
    new = kernel.copy()
    if isinstance(new, ExchangeKernel) and isinstance(kernel, ExchangeKernel):
        new.inner_steps_factor = kernel.inner_steps_factor * factor
    return new
