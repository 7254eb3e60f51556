r"""Bridge sampling: log Z from draws of the density and draws of a proposal.

For any bridge :math:`h` between a normalized :math:`q` and :math:`p = \tilde p / Z`,

.. math:: Z = \frac{\mathbb E_q[h(z)\, \tilde p(z)]}{\mathbb E_p[h(z)\, q(z)]} .

Of all of them :math:`h \propto 1 / (s_1 p + s_2 q)`, with :math:`s` the shares of the two sets of
draws, has the least error. It holds :math:`Z` itself, and is found by iterating the equation. The
weights are bounded: neither density needs to be wider than the other, they need to overlap.

The relative error of :math:`\hat Z`, squared, is

.. math:: \frac{\operatorname{Var}_q(f_1)}{n_2\, \mathbb E_q(f_1)^2}
          + \frac{\operatorname{Var}_p(f_2)}{n_1\, \mathbb E_p(f_2)^2}, \qquad
          f_1 = \frac{p}{s_1 p + s_2 q}, \quad f_2 = \frac{q}{s_1 p + s_2 q},

with :math:`n_1` the effective number of the draws of :math:`p`, if those are correlated.

Reference:
    Meng and Wong (1996), Simulating ratios of normalizing constants via a simple identity: a
    theoretical exploration. Frühwirth-Schnatter (2004), Estimating marginal likelihoods for mixture
    and Markov switching models using bridge sampling techniques.
"""

import copy

import torch
from pyro.ops.stats import effective_sample_size as chain_sample_size
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.normalizer.estimate_result import (
    NormalizerEstimate,
    check_weights,
    effective_sample_size,
    log_mean_exp,
    warn,
    warn_if_unreliable,
)
from pyro_ebm.normalizer.proposals import Proposal, checked_proposal, has_exact_draws
from pyro_ebm.normalizer.site_starts import fitted_start
from pyro_ebm.normalizer.starts import DistributionStart, Start
from pyro_ebm.normalizer.tails import warn_if_improper

NUM_STEPS = 500
"""Transitions, at least, of the short chains that draws are taken from."""

MAX_R_HAT = 1.1

MIN_ESS = 25.0
"""Fewer than of other weights: those of a bridge are bounded."""

MAX_ITERATIONS = 1000
TOLERANCE = 1e-10


def bridge(
    p: UnnormalizedEnergy,
    proposal: Proposal | None = None,
    samples: Tensor | None = None,
    num_samples: int = 2000,
) -> NormalizerEstimate:
    """``method="bridge"`` of :func:`~pyro_ebm.estimate_log_normalizer`."""
    if samples is None:
        samples = _drawn(p, num_samples)
    if proposal is not None:
        proposal = checked_proposal(proposal, p)
    target = EnergyPotential(p, like=samples)
    z = target.inner_position(samples, "the samples")
    start = None if proposal is None else DistributionStart(proposal, target)
    return bridge_to(target, z[None], start, num_samples, p.batch_shape)


def bridge_to(
    target: Potential,
    z: Tensor,
    start: Start | None = None,
    num_samples: int | None = None,
    batch_shape: torch.Size | tuple[()] = (),
) -> NormalizerEstimate:
    r"""The optimal bridge between draws of a potential and those of a start.

    Args:
        target: :math:`-\log \tilde p` on positions.
        z: draws of it, shape ``(chains, draws * targets, dim)``, of each chain in their order.
        start: :math:`q`; by default one that is fitted to the first half of each chain, and the
            bridge is then between it and the second half.
        num_samples: draws of it for each target, by default as many as of the potential.
        batch_shape: of the estimate, with as many elements as there are targets.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: x**2 / 2)
        >>> bridge_to(EnergyPotential(p), torch.randn(4, 1000, 1))  # log sqrt(2 pi) = 0.919
        NormalizerEstimate(log Z = 0.9... +- 0.00..., method=bridge, ESS=...)
    """
    num = z.shape[1] // target.targets
    if start is None:
        num_fitted = num // 2
        start = fitted_start(target, z[:, : num_fitted * target.targets].flatten(0, 1))
        z, num = z[:, num_fitted * target.targets :], num - num_fitted
    if num_samples is None:
        num_samples = num * len(z)
    there = start.sample(num_samples)
    # log p~ - log q at the draws of p and at those of q
    log_ratio = [
        (start(points) - target(points)).double().reshape(-1, target.targets)
        for points in (z.flatten(0, 1), there)
    ]
    check_weights(-log_ratio[0], "bridge sampling, at the samples,")
    check_weights(log_ratio[1], "bridge sampling, at the proposal's draws,")
    log_z, error, ess = (x.reshape(batch_shape) for x in meng_wong(*log_ratio, chains=len(z)))
    remedy = "the draws of density and proposal hardly overlap, use a proposal that is nearer"
    least = min(len(part) for part in log_ratio)
    warn_if_improper(target, there, "bridge sampling")
    warn_if_unreliable(
        "bridge sampling", ess, least, None, remedy, MIN_ESS, "either way", "samples="
    )
    return NormalizerEstimate(log_z.to(z), error.to(z), "bridge", ess=ess.to(z))


def meng_wong(
    log_ratio_p: Tensor, log_ratio_q: Tensor, chains: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The optimal bridge, iterated.

    Args:
        log_ratio_p: :math:`\log \tilde p - \log q` at draws of :math:`p`, shape ``(n_1, targets)``;
            correlated ones in their order, one chain after another.
        log_ratio_q: the same at draws of :math:`q`, shape ``(n_2, targets)``.
        chains: of how many chains of equal length the draws of :math:`p` are.

    Returns:
        :math:`\log \hat Z`, its standard error, and the smaller of the effective sample sizes of
        :math:`f_1` and :math:`f_2`, each of shape ``(targets,)``.

    Example:
        >>> x, y = torch.randn(5000, 1), torch.randn(5000, 1)  # of p = q, with Z = e^2
        >>> meng_wong(0 * x + 2.0, 0 * y + 2.0)[0]
        tensor([2.])
    """
    n_p, n_q = (float(len(x)) for x in (log_ratio_p, log_ratio_q))
    size = torch.full_like(log_ratio_p[0], n_p)
    log_z = torch.zeros_like(size)
    log_f1, log_f2 = log_ratio_q, log_ratio_p
    for _ in range(2):  # with the draws of p counted, then with their effective number
        share = size / (size + n_q)
        log_z = _iterated(log_ratio_p, log_ratio_q, log_z, share)
        # f_1 = (p~ / Z q) / (s_1 p~ / Z q + s_2), and f_2 = 1 / (s_1 p~ / Z q + s_2)
        log_f1 = log_ratio_q - log_z - _log_mix(log_ratio_q - log_z, share)
        log_f2 = -_log_mix(log_ratio_p - log_z, share)
        f2 = log_f2.exp().reshape((chains, -1) + log_f2.shape[1:])
        size = chain_sample_size(f2, chain_dim=0, sample_dim=1)
        size = torch.where(size.isfinite(), size, n_p).clamp(1.0, n_p)
    variance = _relative_variance(log_f1) / n_q + _relative_variance(log_f2) / size
    ess = torch.minimum(effective_sample_size(log_f1), effective_sample_size(log_f2) * size / n_p)
    return log_z, variance.sqrt(), ess


def _iterated(at_p: Tensor, at_q: Tensor, log_z: Tensor, share: Tensor) -> Tensor:
    last = log_z
    for _ in range(MAX_ITERATIONS):
        #     E_q[ p~ / (s_1 p~ / Z + s_2 q) ]   E_q[ (p~ / q) / (s_1 p~ / Z q + s_2) ]
        # Z = -------------------------------- = --------------------------------------
        #     E_p[ q  / (s_1 p~ / Z + s_2 q) ]   E_p[     1    / (s_1 p~ / Z q + s_2) ]
        above = log_mean_exp(at_q - _log_mix(at_q - log_z, share))
        below = log_mean_exp(-_log_mix(at_p - log_z, share))
        last, log_z = log_z, above - below
        if (log_z - last).abs().max() < TOLERANCE:
            return log_z
    raise ValueError(
        f"the bridge has not settled in {MAX_ITERATIONS} iterations (log Z still moves by"
        f" {float((log_z - last).abs().max()):.3g}): samples and proposal hardly overlap. Give a"
        " proposal nearer to the density, or use method='ais'"
    )


def _log_mix(log_ratio: Tensor, share: Tensor) -> Tensor:
    """``log(s_1 exp(log_ratio) + s_2)``."""
    return torch.logaddexp(share.log() + log_ratio, (1 - share).log())


def _relative_variance(log_f: Tensor) -> Tensor:
    f = (log_f - log_f.amax(0)).exp()
    return f.var(0) / f.mean(0).square()


def _drawn(p: UnnormalizedEnergy, num: int) -> Tensor:
    """Draws of the density: exact ones if there are any, else the ends of short chains."""
    if hasattr(p, "exact_sample"):
        try:
            return p.exact_sample(torch.Size((num,)))
        except ValueError:  # too many units
            pass
    elif has_exact_draws(p):
        return p.sample((num,))
    p = copy.copy(p)
    p.num_steps = max(p.num_steps, NUM_STEPS)
    x, diagnostics = p.sample_with_diagnostics((num,))
    if not (diagnostics.r_hat < MAX_R_HAT).all():
        warn(
            f"bridge sampling from the ends of {p.num_steps} transitions that have not converged,"
            f" R-hat is {float(diagnostics.r_hat.max()):.3g}: log Z may be off by more than the"
            " stated error. Raise num_steps of the distribution, or give samples="
        )
    return x
