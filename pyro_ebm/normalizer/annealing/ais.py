r"""Annealed importance sampling, forward and in reverse.

A chain starts at an exact draw :math:`z_0` of a known density :math:`\tilde p_0` and passes through
the densities of a :class:`~pyro_ebm.normalizer.AnnealingPath`, moved at each by a kernel that
leaves it invariant. Its weight

.. math:: w = \prod_{t=1}^T \frac{\tilde p_{\beta_t}(z_{t-1})}{\tilde p_{\beta_{t-1}}(z_{t-1})},
          \qquad \mathbb E\, w = \frac{Z_1}{Z_0},

is unbiased however badly the chains mix. But :math:`\log w` is not, it falls short of
:math:`\log Z_1 / Z_0` by about half its variance, and where the weights vary much so does the log
of their mean: the estimate is too *low*, and a likelihood that uses it too *high*.

*In reverse* a chain starts at a draw of the target and goes back to the start. The mean of its
weights is :math:`Z_0 / Z_1`, and the log of that mean too low again, so that the estimate of
:math:`\log Z` is too *high*. The two hold the truth between them, up to their errors: both are
random, and where the chains keep up they cross as often as not. The draws must be exact ones of the
target. From draws of a Markov chain that has not converged, or from data that the model would not
draw, the value in reverse is no bound, and it is called one only where the caller vouches for them.

With a kernel that is compiled, as ``kernel=LangevinKernel(jit_compile=True)``, all that happens at
a temperature runs as one graph (:mod:`~pyro_ebm.normalizer.annealing.graphed`). Compiling takes
seconds: it pays for many temperatures, or many chains.

Chains can be shared out over the ranks of a process group (``distributed=True``). All ranks then
make the same pilot run, and take the temperatures of rank 0. Each anneals its own chains with
random numbers of its own, and all get the estimate of all weights.

Reference:
    Neal (2001), Annealed importance sampling. Jarzynski (1997), Nonequilibrium equality for free
    energy differences. Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood
    using bidirectional Monte Carlo. Burda, Grosse and Salakhutdinov (2015), Accurate and
    conservative estimates of MRF log-likelihood using reverse annealing.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.distributions.core.supports import same_support, support_of
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.composed.tempering import TemperingKernel
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.potentials.base import NUM_REPEATED
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.ranks import ProcessGroup, process_group_of
from pyro_ebm.mcmc.short_run import short_run
from pyro_ebm.models.checks.fixed_density import check_repeats
from pyro_ebm.normalizer.annealing.function_path import FunctionPath
from pyro_ebm.normalizer.annealing.graphed import GraphedAnnealing
from pyro_ebm.normalizer.annealing.path import AnnealingPath, GeometricPath, TemperedPath
from pyro_ebm.normalizer.annealing.rbm_path import LayersPath
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule, pilot, schedule_of
from pyro_ebm.normalizer.estimate_result import (
    NormalizerEstimate,
    check_weights,
    effective_sample_size,
    log_mean_exp,
    stated_error,
    tail_shape,
    warn,
    warn_if_unreliable,
)
from pyro_ebm.normalizer.proposals import (
    WIDTH,
    DistributionStart,
    GaussianStart,
    checked_proposal,
    has_exact_draws,
    uniform,
)
from pyro_ebm.ops.arguments import shown

FIT_CHAINS = 500
"""Short chains that a start is fitted to."""

AGREED = 16
"""Points at which ranks see whether they have the same energy."""

FORWARD, REVERSE = "ais", "reverse_ais"


def annealed(
    p: UnnormalizedEnergy,
    method: str,
    proposal: Any = None,
    samples: Tensor | None = None,
    path: Any = None,
    kernel: Kernel | None = None,
    num_chains: int = 1000,
    num_steps: int = 1,
    betas: Sequence[float] | Tensor | None = None,
    num_temperatures: int | None = None,
    ess_drop: float | None = None,
    disable_progbar: bool = False,
    distributed: bool = False,
    exact_samples: bool = False,
) -> NormalizerEstimate:
    """``method="ais"`` and ``"reverse_ais"`` of :func:`~pyro_ebm.estimate_log_normalizer`."""
    given = None if betas is None else checked_betas(betas)
    ranks = process_group_of(num_chains if samples is None else len(samples), distributed)
    ranks.seed(alike=True)  # one path and one pilot run on all ranks
    disable_progbar = disable_progbar or ranks.rank > 0
    way = path_of(p, proposal, path, like=samples)
    kernel = kernel_of(kernel, p, way)
    kernel.bind(way, warmup_steps=0)
    levels = []
    if given is None or kernel.adapt_step_size or kernel.adapt_mass_matrix:
        levels = pilot(way, kernel, disable_progbar)
    chosen = given or schedule_of(levels, num_temperatures, ess_drop)
    schedule = TemperatureSchedule(levels, _agreed(chosen, ranks, way))
    ranks.seed()
    results = []
    if method == FORWARD:
        ranks = process_group_of(num_chains, distributed)
        with ranks.fail_together("annealing"):
            z = way.at(0.0).draw(len(range(num_chains)[ranks.here(num_chains)]))
            log_w = _log_weights(way, kernel, schedule, z, FORWARD, num_steps, disable_progbar)
        results.append(_estimate(way, schedule, ranks.rows(log_w), FORWARD))
    if samples is not None:
        z = way.target.inner_position(samples, "the samples")
        ranks = process_group_of(len(samples), distributed)
        z = z.reshape(len(samples), -1, way.dim)[ranks.here(len(samples))].flatten(0, 1)
        with ranks.fail_together("annealing in reverse"):
            log_w = _log_weights(way, kernel, schedule, z, REVERSE, num_steps, disable_progbar)
        results.append(_estimate(way, schedule, ranks.rows(log_w), REVERSE))
    forward, backward = results[0], results[-1]
    if len(results) == 2:
        _compare(forward, backward)
    if samples is None:
        return forward
    reverse = {"upper": backward.value, "upper_error": backward.std_error}
    return replace(forward, **reverse, exact_samples=exact_samples)


def _agreed(betas: list[float], ranks: ProcessGroup, path: AnnealingPath) -> list[float]:
    """The temperatures of rank 0, after a look whether all ranks have one energy."""
    if ranks.size == 1:
        return betas
    z = ranks.from_first(path.at(0.0).draw(AGREED))
    ranks.check_alike(path.at(1.0)(z), "the log density of the energy")
    num = int(ranks.from_first(torch.tensor(len(betas))))
    mine = betas if len(betas) == num else [0.0] * num
    return ranks.from_first(torch.tensor(mine, dtype=torch.float64)).tolist()


def _log_weights(
    path: AnnealingPath,
    kernel: Kernel,
    schedule: TemperatureSchedule,
    z: Tensor,
    method: str,
    num_steps: int,
    disable_progbar: bool,
) -> Tensor:
    """Of the chains in one direction, shape ``(chains, *batch)``."""
    betas = schedule.betas if method == FORWARD else schedule.betas[::-1]
    log_w = anneal(path, kernel, schedule, z, betas, num_steps, disable_progbar)
    return log_w.reshape((-1,) + path.target.energy.batch_shape)


def _estimate(
    path: AnnealingPath, schedule: TemperatureSchedule, log_w: Tensor, method: str
) -> NormalizerEstimate:
    """The estimate of one direction."""
    name = "annealing" if method == FORWARD else "reverse annealing"
    check_weights(log_w, name)
    sign = 1.0 if method == FORWARD else -1.0
    log_w = log_w + sign * path.log_normalizer
    value, ess, k = sign * log_mean_exp(log_w), effective_sample_size(log_w), tail_shape(log_w)
    remedy = (
        f"anneal at more temperatures than {len(schedule.betas)}, or with more transitions at each"
        " (num_steps=), or with a better kernel, or from a nearer start (proposal=)"
    )
    side = "too low" if method == FORWARD else "too high"
    warn_if_unreliable(name, ess, len(log_w), k, remedy, wrong_way=side)
    return NormalizerEstimate(
        value=value,
        std_error=stated_error(log_w),
        method=method,
        ess=ess,
        log_weights=log_w,
        lower=value if method == FORWARD else None,
        zeros=(log_w == -torch.inf).to(log_w.dtype).mean(0),
        pareto_k=k,
        betas=torch.tensor(schedule.betas, dtype=torch.float64),
    )


def anneal(
    path: AnnealingPath,
    kernel: Kernel,
    schedule: TemperatureSchedule,
    z: Tensor,
    betas: Sequence[float],
    num_steps: int = 1,
    disable_progbar: bool = True,
) -> Tensor:
    r"""Takes chains from the first temperature to the last.

    Args:
        path: the densities.
        kernel: bound to the path.
        schedule: its settings at each temperature.
        z: exact draws at the first temperature, shape ``(chains, dim)``.
        betas: the temperatures, in either direction.
        num_steps: transitions at each.
        disable_progbar: whether to show no progress.

    Returns:
        The log weights, shape ``(chains,)``.

    Raises:
        ValueError: if the energy is random: it gives other values at the same points.
    """
    path.at(max(betas))
    path.at(max(betas))
    some = z[: NUM_REPEATED * path.targets]
    with torch.no_grad():
        check_repeats(lambda: (path(some),), lambda: "the energy")
    path.at(betas[0])
    kernel.init(z)
    name = "anneal" if betas[0] < betas[-1] else "anneal in reverse"
    label = f"{name}, {len(z)} chain{'s' * (len(z) > 1)}"
    graphs = GraphedAnnealing.of(path, kernel, planned=num_steps * (len(betas) - 2))
    if graphs is not None:
        with tqdm(betas[1:], disable=disable_progbar, desc=label, delay=1.0) as bar:
            log_w = graphs.run(schedule, z, betas, num_steps, bar)
        if log_w is not None:
            return log_w
    state = path.at(betas[0]).state(kernel, z)
    log_w = torch.zeros_like(state.potential)
    with tqdm(betas[1:], disable=disable_progbar, desc=label, delay=1.0) as bar:
        for beta in bar:
            # log w += log p~_{t}(z) - log p~_{t-1}(z) = U_{t-1}(z) - U_t(z)
            new = path.at(beta).state(kernel, state.z)
            # a weight of 0 stays 0, wherever the chain goes
            log_w = torch.where(log_w == -torch.inf, log_w, log_w + state.potential - new.potential)
            state = new
            if beta != betas[-1]:
                schedule.set(kernel, beta)
                for _ in range(num_steps):
                    state, _ = kernel.step(state)
                    if not kernel.jit_compile:
                        path.follow(state.z, kernel.needs_grad)
    return log_w


def _compare(forward: NormalizerEstimate, backward: NormalizerEstimate) -> None:
    """Warns where the two directions disagree."""
    gap = backward.value - forward.value
    error = (forward.std_error.square() + backward.std_error.square()).sqrt()
    if (gap < -4.5 * error).any():
        warn(
            f"the lower bound exceeds the upper one by {float(-gap.min()):.3g} nats, with a"
            f" standard error of {float(error.max()):.2g}: the samples are no draws of this"
            " density, so that there is no upper bound"
        )
    if (gap > 4.5 * error).any():
        warn(
            f"the two directions are {float(gap.max()):.3g} nats apart, with a standard error of"
            f" {float(error.max()):.2g}: log Z is not within the stated error. If the samples are"
            " draws of this density it lies in between, and the chains do not keep up (more"
            " temperatures, a better kernel); if not, this may be why"
        )


# -- what to anneal along, and with ----------------------------------------------------------------


def path_of(
    p: UnnormalizedEnergy, proposal: Any = None, path: Any = None, like: Tensor | None = None
) -> AnnealingPath:
    """The path that was given, or the one that suits an energy.

    Args:
        p: the energy.
        proposal: a distribution to start at.
        path: a path, or a function from beta to an energy.
        like: points that tell dtype and device.

    Raises:
        ValueError: for a path of another kind or another energy, or an unsuitable proposal.

    Example:
        >>> type(path_of(UnnormalizedEnergy(lambda x: x**2))).__name__
        'GeometricPath'
    """
    if isinstance(path, AnnealingPath):
        if proposal is not None:
            raise ValueError("a path has its own start: give path or proposal, not both")
        end = path.target.energy
        if (end.event_shape, end.batch_shape) != (p.event_shape, p.batch_shape):
            raise ValueError(f"the path leads to {end!r}, and log Z is asked of {p!r}")
        return path
    if proposal is not None:
        proposal = checked_proposal(proposal, p)
    if like is None and proposal is not None and not p.support.is_discrete:
        like = proposal.sample()
    target = EnergyPotential(p, like=like)
    if path is not None:
        if not callable(path):
            raise ValueError(
                f"path must be a Path, or a function from beta to an energy, got {shown(path)}"
            )
        function: Any = path
        return FunctionPath(function, target, proposal)
    if proposal is None and p.base is not None and has_exact_draws(p.base):
        fits = same_support(support_of(p.base), p.support)
        proposal = checked_proposal(p.base, p) if fits else None
    if proposal is not None:
        layers = LayersPath.starting_at(proposal, target) if LayersPath.suits(p) else None
        return layers or GeometricPath(target, DistributionStart(proposal, target))
    if p.support.is_discrete and not LayersPath.suits(p):
        return TemperedPath(target) if p.base is None else GeometricPath(target, uniform(target))
    # Not to samples that a reverse run starts at: its weights would be those of draws that the
    # start was fitted to, and the upper bound too low.
    x = short_run(p, torch.Size((FIT_CHAINS,)))[0]
    if LayersPath.suits(p):
        return LayersPath.fitted(target, x)
    z = target.to_position(x)
    finite = z.isfinite().all(-1).reshape(-1, target.targets).all(-1)
    if finite.sum() < 2:
        raise ValueError("a start needs at least two finite points to be fitted to: give proposal=")
    z = z[finite.repeat_interleave(target.targets)]
    return GeometricPath(target, GaussianStart.fitted(z, target.targets, WIDTH))


def kernel_of(kernel: Kernel | None, p: UnnormalizedEnergy, path: AnnealingPath) -> Kernel:
    """A kernel that leaves each density of the path invariant.

    Args:
        kernel: what was given.
        p: the energy, whose own kernel is the next choice, if it is exact.
        path: the path; block Gibbs sweeps where it has blocks, single-site ones where it is
            discrete, else Langevin.

    Raises:
        ValueError: for a kernel that leaves another density invariant.
    """
    if kernel is None and isinstance(p.kernel, Kernel) and _objection(p.kernel, path) is None:
        kernel = p.kernel
    if kernel is None:
        discrete = path.blocks is not None or path.sites[0].support_values is not None
        kernel = GibbsKernel() if discrete else LangevinKernel()
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel must be a pyro_ebm.mcmc.Kernel, such as LangevinKernel(), got {shown(kernel)}"
        )
    if (objection := _objection(kernel, path)) is not None:
        raise ValueError(objection)
    return kernel.copy()


def _objection(kernel: Kernel, path: AnnealingPath) -> str | None:
    for part in (kernel, *getattr(kernel, "kernels", ())):
        if not getattr(part, "adjusted", True):
            return (
                f"{part!r} with adjusted=False does not leave the densities invariant, and the"
                " weights would be biased: use adjusted=True"
            )
        if getattr(part, "temperature", 1.0) != 1:
            return f"{part!r} has a temperature of its own, and annealing has others: leave it at 1"
        if isinstance(part, TemperingKernel):
            return "replicas do not anneal: give the kernel inside the TemperingKernel"
        if part.jit_compile and isinstance(path, FunctionPath):
            return (
                "a path given as a function makes a new energy at each temperature, which no"
                " compiled graph sees: use jit_compile=False, or write a Path"
            )
    return None


def checked_betas(betas: Any) -> list[float]:
    """Temperatures from 0 to 1.

    Raises:
        ValueError: if they do not start at 0, rise, and end at 1.

    Example:
        >>> checked_betas(torch.linspace(0, 1, 3))
        [0.0, 0.5, 1.0]
    """
    try:
        values = [float(b) for b in betas]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"betas must be a sequence of numbers, as torch.linspace(0, 1, 1000),"
            f" got {shown(betas)}"
        ) from error
    rises = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or values[0] != 0 or values[-1] != 1 or not rises:
        some = values if len(values) < 8 else [*values[:3], "...", *values[-3:]]
        raise ValueError(
            f"betas must rise from 0, the start, to 1, the target, as torch.linspace(0, 1, 1000),"
            f" got {some}"
        )
    return values


__all__ = ["anneal", "annealed", "checked_betas", "kernel_of", "path_of"]
