"""Which sites an exchange move is for: those of whose log Z nothing is left over."""

from typing import Any

import torch
from pyro.ops.provenance import detach_provenance, get_provenance
from torch.distributions import TransformedDistribution

from pyro_ebm.distributions.core.supports import as_function, is_unbounded
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.distributions.mixture import Mixture
from pyro_ebm.models.checks.intractability import MovingNormalizer, NormalizerError
from pyro_ebm.models.sites.latents import SampleSite


def refuse_parts(one: MovingNormalizer) -> None:
    """A log Z cancels if latents move the energy, and nothing else about the site.

    Args:
        one: the site, and what moves of it.

    Raises:
        NormalizerError: if something else does.
    """
    for part in one.parts:
        if part == "energy":
            continue
        why = (
            "an auxiliary drawn at one of its values may lie outside the support at another: write"
            " the density of x as one on a fixed support"
            if part == "support"
            else "how many factors 1 / Z there are depends on it, and they do not cancel: give"
            " log_normalizer="
        )
        alone = one._replace(parts={part: one.parts[part]})
        raise NormalizerError(f"{alone}. This is not for ExchangeKernel: {why}")


def refuse_site(one: MovingNormalizer, node: SampleSite) -> None:
    """A log Z cancels if there is one factor of it for each row, on a support that stays.

    Args:
        one: the site.
        node: it, in a trace of the model that follows what depends on the latents.

    Raises:
        NormalizerError: for a site that is scaled, a mixture of energies, or a moving support.
    """
    scale = torch.as_tensor(node["scale"])
    if not bool((scale == 1).all()):
        raise NormalizerError(
            f"{one}. This is not for ExchangeKernel: the site is scaled by"
            f" {scale.flatten()[0].item():g} (poutine.scale, or a plate), and that power of Z does"
            " not cancel: give log_normalizer="
        )
    fn: Any = node["fn"]
    x = detach_provenance(node["value"])
    energy = find_energy(fn)
    if energy is None or (isinstance(energy, Mixture) and energy.is_normalized):
        raise NormalizerError(
            f"{one}. This is not for ExchangeKernel: a weight of a {type(fn).__name__} is the share"
            " of its component, which its unknown Z is part of. Where weights multiply e^{-E}"
            " instead, say so by mixture(weights, components, unnormalized_weights=True)"
        )
    if is_unbounded(energy.support):
        return
    while not isinstance(fn, UnnormalizedEnergy):
        for transform in reversed(fn.transforms if isinstance(fn, TransformedDistribution) else []):
            x = as_function(transform.inv)(x)
            if latents := get_provenance(x):
                moved = one._replace(parts={"support": latents})
                raise NormalizerError(
                    f"{moved}. This is not for ExchangeKernel: an auxiliary drawn at one of its"
                    " values may lie outside the support at another"
                )
        fn = fn.base_dist
