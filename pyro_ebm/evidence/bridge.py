"""Bridge sampling of the evidence, from draws of the posterior."""

from dataclasses import replace

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.normalizer.bridge import MAX_R_HAT, bridge_to
from pyro_ebm.normalizer.estimate_result import NormalizerEstimate, warn
from pyro_ebm.normalizer.starts import Start

MIN_DRAWS = 16
"""Of each chain: half of them fit a proposal, and the others show how correlated they are."""


def bridge(
    target: ModelPotential, z: Tensor, start: Start | None, num_samples: int | None = None
) -> NormalizerEstimate:
    """``method="bridge"`` of :func:`~pyro_ebm.log_evidence`.

    Args:
        target: the potential of the model.
        z: draws of the posterior, shape ``(chains, draws, dim)``.
        start: where the bridge leads from; by default a Gaussian, and frequencies of discrete
            sites, fitted to half of the draws.
        num_samples: draws of it.
    """
    if z.shape[1] < MIN_DRAWS:
        raise ValueError(
            f"bridge sampling needs at least {MIN_DRAWS} draws of each chain, there are"
            f" {z.shape[1]}"
        )
    r_hat = split_gelman_rubin(z.double(), chain_dim=0, sample_dim=1)
    if (r_hat > MAX_R_HAT).any():  # NaN of a discrete variable that never moved
        columns = torch.arange(target.dim, device=z.device).split(target.sizes)
        pairs = zip(target.names, columns, strict=True)
        bad = [name for name, index in pairs if (r_hat[index] > MAX_R_HAT).any()]
        worst = float(r_hat[~r_hat.isnan()].max())
        warn(
            f"bridge sampling from chains that have not converged: R-hat is {worst:.3g}, in site(s)"
            f" {bad}. The log evidence may be off by more than the stated error: run them longer"
        )
    estimate = bridge_to(target, z, start, num_samples)
    return replace(estimate, value=estimate.value - target.idle_log_normalizer)
