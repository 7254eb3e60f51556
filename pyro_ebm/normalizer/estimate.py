r"""Estimates of :math:`\log Z = \log \int h(x)\, e^{-E(x)}\, dx`, by one function.

Which method for which density:

=================  =============================================================================
``"exact"``        finite supports with few states, and machines with one small layer
``"quadrature"``   one or two continuous dimensions
``"importance"``   where a proposal comes near: a base, a guide, a fitted flow
``"ais"``          everywhere, with a kernel that mixes; too low where the chains do not keep up
``"reverse_ais"``  too high where they do not: with ``"ais"``, a sandwich. Needs draws
``"bridge"``       where there are good draws, and a proposal that overlaps with them
=================  =============================================================================
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.checks.rows import check_rows
from pyro_ebm.distributions.core.wrappers import composite_part, unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.exponential.exponential_family import ExponentialFamily
from pyro_ebm.distributions.exponential.quadrature import (
    log_normalizer_by_quadrature,
    unconstrained_shape,
)
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.models.checks.fixed_density import check_repeats
from pyro_ebm.normalizer.annealing.ais import annealed
from pyro_ebm.normalizer.annealing.path import AnnealingPath
from pyro_ebm.normalizer.arguments import Given, check_arguments, check_numbers
from pyro_ebm.normalizer.bridge import bridge
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, warn
from pyro_ebm.normalizer.importance import importance
from pyro_ebm.normalizer.proposals import Proposal
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.rows import random_state_put_back

SMALL = 20
"""Without a method, up to 2^20 states are summed over."""

ROWS_COMPARED = 8

_ANNEALING = {
    "proposal",
    "samples",
    "path",
    "kernel",
    "num_chains",
    "num_steps",
    "betas",
    "num_temperatures",
    "ess_drop",
    "distributed",
    "exact_samples",
}
TAKES = {
    "exact": {"max_units"},
    "quadrature": set(),
    "importance": {"proposal", "num_samples"},
    "ais": _ANNEALING,
    "reverse_ais": _ANNEALING - {"num_chains"},
    "bridge": {"proposal", "samples", "num_samples"},
}
"""The arguments that each method takes."""

OPTIONS = set().union(*TAKES.values())


def estimate_log_normalizer(
    p: UnnormalizedEnergy,
    method: str | None = None,
    *,
    proposal: Proposal | None = None,
    samples: Tensor | None = None,
    path: AnnealingPath | Callable[[Tensor], UnnormalizedEnergy] | None = None,
    kernel: Kernel | None = None,
    num_samples: int | None = None,
    num_chains: int | None = None,
    num_steps: int | None = None,
    betas: Sequence[float] | Tensor | None = None,
    num_temperatures: int | None = None,
    ess_drop: float | None = None,
    max_units: int | None = None,
    disable_progbar: bool = False,
    distributed: bool = False,
    exact_samples: bool = False,
) -> NormalizerEstimate:
    r"""Estimates :math:`\log Z` of an energy, with an error.

    * ``"exact"``: a sum over all states of a finite support; of machines with hidden units and of
      pairwise energies, over the states of one layer or but one colour.
    * ``"quadrature"``: one or two dimensions, of any continuous support.
    * ``"importance"``: :math:`\hat Z = \frac1n \sum \tilde p(x_i) / q(x_i)` from ``proposal``, by
      default the energy's ``base``.
    * ``"ais"``: annealed importance sampling, a stochastic *lower* bound. With ``samples`` the
      reverse runs too, for an upper one if they are exact. A pilot run of a few chains chooses the
      temperatures, tunes the kernel at each, and is then forgotten, so that :math:`\hat Z` is
      unbiased.
    * ``"reverse_ais"``: annealing from ``samples`` back to the start, a stochastic *upper* bound if
      those are exact draws of the density.
    * ``"bridge"``: the optimal bridge between ``samples`` and draws of ``proposal``.

    Without a ``method`` it is the first of ``"exact"`` (up to :math:`2^{20}` states),
    ``"quadrature"`` and ``"ais"`` that the energy, and the arguments given, are for.

    Networks are evaluated in evaluation mode. Nothing has a gradient.

    Args:
        p: the energy. A batch of energies has an estimate for each.
        method: see above.
        proposal: a normalized distribution that covers the support, or a guide with one sample
            site: where points come from (``"importance"``, ``"bridge"``), or where annealing
            starts. Annealing starts by default at the ``base``; else at the uniform density of a
            finite support, at independent visible units for machines with hidden ones, or at a
            Gaussian on the unconstrained space, both fitted to short chains of the energy, the
            Gaussian half as wide again. Bridges start at a Gaussian (or a product) fitted to half
            of the ``samples``, which are then not used again.
        samples: independent draws of the density, shape ``(n, *batch, *event)``, or data in their
            place (see ``"reverse_ais"``). One chain of the reverse run starts at each. By default
            (``"bridge"``) exact draws of the energy if it has them, else the *approximate* ones of
            its own short chains, with a warning if those have not converged. Correlated draws of
            one chain are allowed for ``"bridge"`` alone.
        path: of annealing: a :class:`~pyro_ebm.normalizer.AnnealingPath`, or a function from a
            tensor :math:`\beta` to an energy, which is ``p`` at 1.
        kernel: of annealing, without a model: by default the energy's own if it is exact, else
            block Gibbs sweeps where there are blocks, single-site ones where the support is
            discrete, and :class:`~pyro_ebm.LangevinKernel` elsewhere.
        num_samples: points (10,000 for ``"importance"``), or draws of each density (2,000 for
            ``"bridge"``).
        num_chains: chains of annealing for each batch element, 1,000 by default.
        num_steps: transitions of each chain at each temperature, 1 by default.
        betas: the inverse temperatures, rising from 0 to 1.
        num_temperatures: how many, both ends counted; the pilot spaces them.
        ess_drop: instead, by how much the conditional effective sample size may drop from one to
            the next, a fraction such as 0.01. By default there are as many as the weights need for
            a variance of about 0.5, and at most 10,001.
        max_units: of ``"exact"``: at most :math:`2^{\text{max\_units}}` states, 25 by default.
        disable_progbar: whether long runs show no progress.
        distributed: whether annealing shares its chains out over the ranks of a process group, each
            of which calls this alike and gets the estimate of all chains.
        exact_samples: whether the ``samples`` of annealing are exact, independent draws of the
            density, such as those of an ``exact_sample``: only then is the value in reverse called
            a bound. Draws of a Markov chain, and data, are not.

    Returns:
        The estimate: its ``value`` is a plain tensor of shape ``batch_shape``, and
        ``p.normalized(estimate)`` the normalized density.

    Raises:
        ValueError: for arguments that the method does not take, a density that it is not for, a
            proposal that does not cover the support, temperatures that do not rise from 0 to 1, a
            reverse run without samples, and weights that are NaN, infinite, or all 0.

    Warns:
        UnreliableEstimateWarning: if the stated error is not to be trusted: too few effective
            weights, a tail too heavy (Pareto's k above 0.7), chains that have not converged, or two
            directions that disagree.

    Reference:
        Neal (2001), Annealed importance sampling. Meng and Wong (1996), Simulating ratios of
        normalizing constants via a simple identity. Grosse, Ghahramani and Adams (2015),
        Sandwiching the marginal likelihood using bidirectional Monte Carlo.

    Example:
        >>> def double_well(x):
        ...     return x[..., 0] ** 4 - 6 * x[..., 0] ** 2 - x[..., 0] / 2 + x[..., 1] ** 2 / 2
        >>> p = UnnormalizedEnergy(double_well, event_shape=(2,))
        >>> estimate_log_normalizer(p)
        NormalizerEstimate(log Z = 10.2935 +- 0, method=quadrature)
        >>> estimate = estimate_log_normalizer(p, "ais", num_chains=500)
        >>> bool((estimate.value - 10.2935).abs() < 4.5 * estimate.std_error)
        True
        >>> p.normalized(estimate)
        UnnormalizedEnergy(energy=double_well, event_shape=(2,), log_normalizer=known)
    """
    given = {name: value for name, value in locals().items() if name in OPTIONS}
    given = {name: value for name, value in given.items() if not (value is None or value is False)}
    _check_energy(p)
    check_numbers(given)
    whole, p = p, p.unexpanded
    _check_rows(p)
    if method is None:
        method, estimate = _chosen(p, given)
        if estimate is not None:
            return _expanded(estimate, p.batch_shape, whole.batch_shape)
    check_arguments(method, given, TAKES)
    if method == "reverse_ais" and samples is None:
        raise ValueError(
            'method="reverse_ais" goes from draws of the density to the start: give samples=, exact'
            " draws or data that the energy was fitted to"
        )
    if exact_samples and samples is None:
        raise ValueError("exact_samples=True says that the samples are exact draws: give samples=")
    if samples is not None:
        given["samples"] = _checked_samples(samples, whole)
        p = whole  # which may have samples of its own for each row
    run: dict[str, Callable[..., NormalizerEstimate]] = {
        "exact": exact,
        "quadrature": quadrature,
        "importance": importance,
        "bridge": bridge,
    }
    with torch.no_grad():
        if method in run:
            estimate = run[method](p, **given)
        else:
            estimate = annealed(p, method, **given, disable_progbar=disable_progbar)
    return _expanded(estimate, p.batch_shape, whole.batch_shape)


def exact(p: UnnormalizedEnergy, max_units: int = 25) -> NormalizerEstimate:
    """``method="exact"`` of :func:`estimate_log_normalizer`."""
    if _is_closed_form(p):
        value = p.log_normalizer
    else:
        value = p.exact_log_normalizer(max_units=max_units)
    return _certain(p, value, "exact")


def quadrature(p: UnnormalizedEnergy) -> NormalizerEstimate:
    """``method="quadrature"`` of :func:`estimate_log_normalizer`."""
    return _certain(p, log_normalizer_by_quadrature(p), "quadrature")


def _certain(p: UnnormalizedEnergy, value: Any, method: str) -> NormalizerEstimate:
    value = value.detach().expand(p.batch_shape).clone()
    return NormalizerEstimate(value, torch.zeros_like(value), method, lower=value, upper=value)


def _is_closed_form(p: UnnormalizedEnergy) -> bool:
    return isinstance(p, ExponentialFamily) and p.normalized_parts is not None


# -- the choice of a method, and checks of the arguments -------------------------------------------


def _chosen(p: UnnormalizedEnergy, given: Given) -> tuple[str, NormalizerEstimate | None]:
    """The first method that the energy and the arguments are for; an exact one is done already."""
    if given.keys() <= TAKES["exact"]:
        with contextlib.suppress(ValueError), torch.no_grad():  # it is not for this energy
            return "exact", exact(p, **{"max_units": SMALL, **given})
    if not given and not p.support.is_discrete:
        shape = unconstrained_shape(p.support, p.event_shape, p.batch_shape)
        if shape.numel() in (1, 2):
            return "quadrature", None
    return "ais", None


def _check_energy(p: object) -> None:
    if (part := composite_part(p)) is not None:
        raise ValueError(
            f"p is or holds {part!r}, a composite likelihood: it is no density up to a"
            " constant, and has no Z to estimate. Give the energy that it was made of"
        )
    if isinstance(p, UnnormalizedEnergy):
        if 0 in p.batch_shape + p.event_shape:
            raise ValueError(
                f"p has batch_shape={tuple(p.batch_shape)} and event_shape={tuple(p.event_shape)},"
                " of which one is empty: there is nothing to integrate over"
            )
        return
    if find_energy(p) is not None:
        raise ValueError(
            f"p is an energy inside {type(p).__name__}: give the energy itself, whose"
            " batch elements are independent, and sum their log Z"
        )
    raise ValueError(f"p must be an UnnormalizedEnergy, got {shown(p)}")


def _check_rows(p: UnnormalizedEnergy) -> None:
    """Refuses an energy whose rows influence each other, or that is random."""
    with random_state_put_back(), eval_mode(p.modules), torch.no_grad():
        x = p.starting_points((ROWS_COMPARED,))
        check_rows(p, x, f"the energy {p!r}")
        check_repeats(lambda: (unvalidated(p).unnormalized_log_prob(x),), lambda: "the energy")


def _checked_samples(samples: object, p: UnnormalizedEnergy) -> Tensor:
    """Draws of the density, shape ``(n, *batch, *event)``."""
    shape = p.batch_shape + p.event_shape
    if not isinstance(samples, Tensor) or samples.dim() < 1 or len(samples) < 2:
        got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"samples must be two or more points, shape (n, *batch, *event), got {got}"
        )
    if samples.shape[1:] == p.event_shape and p.batch_shape:
        samples = samples.reshape(samples.shape[:1] + (1,) * len(p.batch_shape) + p.event_shape)
        samples = samples.expand(samples.shape[:1] + shape)
    if samples.shape[1:] != shape:
        raise ValueError(
            f"samples must have shape {('n', *shape)}, got {tuple(samples.shape)}".replace("'", "")
        )
    with torch.no_grad():
        if not p.support.check(samples).all():
            raise ValueError(f"some of the samples leave the support {p.support}")
        density = unvalidated(p).unnormalized_log_prob(samples)
    if not (density > -torch.inf).all():
        bad = 1 - (density > -torch.inf).double().mean().item()
        raise ValueError(
            f"at {100 * bad:.3g}% of the samples the density is 0 or no number: they are no draws"
            " of it"
        )
    if not p.support.is_discrete:
        distinct = len(samples.reshape(len(samples), -1).unique(dim=0))
        if distinct < 0.9 * len(samples):
            warn(
                f"only {distinct} of {len(samples)} samples of a continuous density are distinct:"
                " they are no independent draws, and log Z is off by more than the stated error"
            )
    return samples


def _expanded(
    estimate: NormalizerEstimate, batch_shape: torch.Size, whole: torch.Size
) -> NormalizerEstimate:
    """The estimate of an energy, for each of the elements that share it."""
    if batch_shape == whole:
        return estimate
    fields = dict(vars(estimate))
    names = ("value", "std_error", "ess", "lower", "upper", "upper_error", "zeros", "pareto_k")
    for name in names:
        if fields[name] is not None:
            fields[name] = fields[name].expand(whole)
    if estimate.log_weights is not None:
        log_w = estimate.log_weights
        inner = (1,) * (len(whole) - len(batch_shape)) + tuple(batch_shape)
        fields["log_weights"] = log_w.reshape((len(log_w),) + inner).expand((len(log_w),) + whole)
    return NormalizerEstimate(**fields)
