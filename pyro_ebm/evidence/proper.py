"""Whether a model is a density whose integral over its latents is the evidence of its data.

A posterior is known up to a constant, and kernels sample it. The evidence *is* that constant, so
nothing may be left out of the density: no log Z, no factor of an improper prior, and no likelihood
that is not one.
"""

from collections.abc import Collection

import torch
from pyro.distributions import ImproperUniform

from pyro_ebm.distributions.core.wrappers import composite_part, unmasked, walk
from pyro_ebm.distributions.energy import energies_of
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.checks.intractability import NormalizerError
from pyro_ebm.models.runs import sample_sites, side_runs
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.ops.arguments import shown


def check_proper(potential: ModelPotential, improper: Collection[str] = ()) -> None:
    """Refuses a model that has no evidence.

    Args:
        potential: of the model, which has refused a log Z that moves.
        improper: latent sites that may have an improper prior.

    Raises:
        NormalizerError: for an energy whose log Z is unknown or learned, or a composite likelihood.
        ValueError: for a latent whose prior is improper, or scaled, or a likelihood that is scaled
            by a fraction; both name the site.

    Example:
        >>> def model(x):
        ...     pyro.sample("x", UnnormalizedEnergy(torch.square), obs=x)
        >>> check_proper(ModelPotential(model, (torch.zeros(()),)))
        Traceback (most recent call last):
        ...
        pyro_ebm.models.checks.intractability.NormalizerError: site 'x' is an energy whose log Z ...
    """
    with side_runs():
        sites = sample_sites(potential.bound.trace())
    for name, site in sites.items():
        if composite_part(site["fn"]) is not None:
            raise NormalizerError(
                f"site {name!r} is a composite likelihood, which is no density of its data: a model"
                " with it has a composite posterior, and no evidence"
            )
        if name in improper and not site["is_observed"]:
            continue
        for p in energies_of(site["fn"]):
            if not p.is_normalized:
                raise NormalizerError(
                    f"site {name!r} is an energy whose log Z is {p.normalizer_state}, and the"
                    " evidence needs it: give p.normalized(estimate_log_normalizer(p)), with which"
                    " draws of the model as it is are those of the same posterior:"
                    " log_evidence(model, ..., draws=mcmc)"
                )
        if site["is_observed"]:
            _check_power(name, site)
        else:
            _check_prior(name, site, potential)


def _check_power(name: str, site: SampleSite) -> None:
    scale = torch.as_tensor(site["scale"])
    if not bool((scale == scale.round()).all()):  # a whole number is a count of equal rows
        raise ValueError(
            f"the likelihood of site {name!r} is scaled by {shown(site['scale'])} (poutine.scale),"
            " and a power of a density is no density of the data: evaluate it on all data, once"
        )


def _check_prior(name: str, site: SampleSite, potential: ModelPotential) -> None:
    if not bool((torch.as_tensor(site["scale"]) == 1).all()):
        raise ValueError(
            f"the prior of site {name!r} is scaled (poutine.scale), and a power of a density is no"
            " density: take the latent out of the scale"
        )
    flat = next(
        (type(p).__name__ for p in walk(site["fn"]) if isinstance(p, ImproperUniform)), None
    )
    fn, mask, _ = unmasked(site["fn"], site["mask"])
    if flat is None and mask is not None:
        counts = mask.expand(fn.batch_shape)
        if (idle := potential.idle.get(name)) is not None:
            counts = counts.reshape(counts.shape + (1,) * (idle.dim() - counts.dim())) | idle
        flat = None if bool(counts.all()) else "masked"
    if flat is not None:
        raise ValueError(
            f"site {name!r} has an improper prior ({flat}), so that the evidence is only defined up"
            " to a factor: give it a proper one; or, where all models that are compared have this"
            f" prior, say shared_improper=[{name!r}]"
        )
