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
a temperature runs as one graph (:mod:`~pyro_ebm.normalizer.annealing.annealer`). Compiling takes
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

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.ranks import ProcessGroup, process_group_of
from pyro_ebm.normalizer.annealing.annealer import Annealer
from pyro_ebm.normalizer.annealing.choices import checked_betas, kernel_of, path_of
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.annealing.pilot import pilot
from pyro_ebm.normalizer.annealing.schedule import TemperatureSchedule, schedule_of
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, estimate_of, warn
from pyro_ebm.normalizer.proposals import Proposal
from pyro_ebm.normalizer.tails import warn_if_improper

AGREED = 16
"""Points at which ranks see whether they have the same energy."""

FORWARD, REVERSE = "ais", "reverse_ais"


def annealed(
    p: UnnormalizedEnergy,
    method: str,
    proposal: Proposal | None = None,
    samples: Tensor | None = None,
    path: AnnealingPath | Callable[[Tensor], UnnormalizedEnergy] | None = None,
    kernel: Kernel | None = None,
    num_chains: int = 1000,
    distributed: bool = False,
    **settings: Any,
) -> NormalizerEstimate:
    """``method="ais"`` and ``"reverse_ais"`` of :func:`~pyro_ebm.estimate_log_normalizer`."""
    ranks = process_group_of(num_chains if samples is None else len(samples), distributed)
    ranks.seed(alike=True)  # one path and one pilot run on all ranks
    way = path_of(p, proposal, path, like=samples)
    kernel = kernel_of(kernel, p, way)
    ends = None
    if samples is not None:
        ends = way.of_energy.inner_position(samples, "the samples")
    chains = num_chains if method == FORWARD else None
    settings = {"batch_shape": p.batch_shape, "distributed": distributed, **settings}
    return annealed_along(way, kernel, chains, ends, **settings)


def annealed_along(
    way: AnnealingPath,
    kernel: Kernel,
    num_chains: int | None = 1000,
    ends: Tensor | None = None,
    batch_shape: torch.Size | tuple[()] = (),
    num_steps: int = 1,
    betas: Sequence[float] | Tensor | None = None,
    num_temperatures: int | None = None,
    ess_drop: float | None = None,
    disable_progbar: bool = False,
    distributed: bool = False,
    exact_samples: bool = False,
) -> NormalizerEstimate:
    """Annealing along a path, to its end and back.

    Args:
        way: the path.
        kernel: one that leaves each of its densities invariant.
        num_chains: chains of the forward run for each target; None for none.
        ends: draws of the target that a reverse run starts at, shape ``(n * targets, dim)``.
        batch_shape: of the estimate, with as many elements as there are targets.
        num_steps: the others are those of :func:`~pyro_ebm.estimate_log_normalizer`.
        betas: see there.
        num_temperatures: see there.
        ess_drop: see there.
        disable_progbar: see there.
        distributed: see there.
        exact_samples: see there.

    Example:
        >>> from pyro_ebm.mcmc import LangevinKernel
        >>> from pyro_ebm.normalizer import GeometricPath
        >>> p = UnnormalizedEnergy(lambda x: 2 * x**2)
        >>> path = GeometricPath.between(dist.Normal(0.0, 1.0), p)
        >>> annealed_along(path, LangevinKernel())  # log sqrt(pi / 2) = 0.226
        NormalizerEstimate(log Z = 0.2... +- 0.0..., method=ais, ESS=..., temperatures=...)
    """
    given = None if betas is None else checked_betas(betas)
    ends = None if ends is None else ends.reshape(-1, way.targets, way.dim)
    ranks = process_group_of(num_chains or len(ends if ends is not None else ()), distributed)
    disable_progbar = disable_progbar or ranks.rank > 0
    kernel.bind(way, warmup_steps=0)
    points = []
    if given is None or kernel.adapt_step_size or kernel.adapt_mass_matrix:
        points = pilot(way, kernel, disable_progbar)
    chosen = given or schedule_of(points, num_temperatures, ess_drop)
    schedule = TemperatureSchedule(points, _agreed(chosen, ranks, way))
    annealer = Annealer(way, kernel, schedule, num_steps)
    ranks.seed()

    def estimate(reverse: bool, num: int, start: Callable[[slice], Tensor]) -> NormalizerEstimate:
        ranks = process_group_of(num, distributed)
        with ranks.fail_together("annealing in reverse" if reverse else "annealing"):
            z = start(ranks.here(num))
            log_w = annealer.run(z, reverse, disable_progbar).reshape((-1,) + batch_shape)
        warn_if_improper(way.target, z, "annealing")
        return _estimate(way, schedule, ranks.rows(log_w), reverse)

    results = []
    if num_chains is not None:
        chains = range(num_chains)
        results.append(
            estimate(False, num_chains, lambda here: way.at(0.0).draw(len(chains[here])))
        )
    if ends is not None:
        results.append(estimate(True, len(ends), lambda here: ends[here].flatten(0, 1)))
    forward, backward = results[0], results[-1]
    if len(results) == 2:
        _compare(forward, backward)
    if ends is None:
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


def _estimate(
    path: AnnealingPath, schedule: TemperatureSchedule, log_w: Tensor, reverse: bool
) -> NormalizerEstimate:
    """The estimate of one direction."""
    remedy = (
        f"anneal at more temperatures than {len(schedule.betas)}, or with more transitions at each"
        " (num_steps=), or with a better kernel, or from a nearer start (proposal=)"
    )
    log_w = log_w - path.log_normalizer if reverse else log_w + path.log_normalizer
    what, more = "annealing", "num_chains="
    if reverse:
        what, more = "reverse annealing", "samples="
    estimate = estimate_of(log_w, REVERSE if reverse else FORWARD, what, remedy, reverse, more)
    return replace(estimate, betas=torch.tensor(schedule.betas, dtype=torch.float64))


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
