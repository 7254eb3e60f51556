"""Posterior draws as positions of a model's potential: a run's, those in ArviZ data, tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.diagnostics.results import Results
from pyro_ebm.distributions.checks.boundary import check_inside
from pyro_ebm.distributions.core.supports import as_function, plain_support, stated_support
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.runs import latents_of, side_runs
from pyro_ebm.models.sites.site import to_support
from pyro_ebm.ops.arguments import shown

MIN_DRAWS = 4
"""Of each chain: half of them fit a proposal, and an autocorrelation is that of the others."""


def draws_of(source: object) -> dict[str, Tensor]:
    """The draws of each site, shape ``(chains, draws, *site)``.

    Args:
        source: a :class:`pyro_ebm.MCMC` or ``pyro.infer.MCMC`` after its run, ArviZ data with a
            group ``posterior``, or a mapping of such tensors.

    Raises:
        TypeError: for anything else.

    Example:
        >>> draws_of({"x": torch.zeros(4, 100)})["x"].shape
        torch.Size([4, 100])
    """
    if isinstance(source, Mapping) and all(isinstance(x, Tensor) for x in source.values()):
        return dict(source)
    data: Any = source
    if hasattr(data, "posterior"):  # an InferenceData, or a DataTree with such a group
        return {
            str(name): torch.as_tensor(variable.values.copy())
            for name, variable in data.posterior.data_vars.items()
            if variable.dims[:2] == ("chain", "draw")
        }
    try:
        return dict(Results.of(source).samples)
    except TypeError as error:
        raise TypeError(
            "draws must be a pyro_ebm.MCMC or pyro.infer.MCMC after its run, ArviZ data with a"
            " posterior, or a dict of tensors of shape (chains, draws, *site), got"
            f" {shown(source)}"
        ) from error


@torch.no_grad()
def positions_of(draws: Mapping[str, Tensor], target: ModelPotential) -> Tensor:
    """The positions of posterior draws, shape ``(chains, draws, dim)``.

    Args:
        draws: of each of its sites; others are left out.
        target: the potential of the model.

    Raises:
        ValueError: if there are no draws of a site, or of another shape; or they lie on the
            boundary of its support.

    Example:
        >>> target = ModelPotential(lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)))
        >>> positions_of({"x": torch.ones(4, 100)}, target).shape
        torch.Size([4, 100, 1])
    """
    if missing := sorted(set(target.names) - draws.keys()):
        raise ValueError(
            f"there are no draws of site(s) {missing}, which the model has: there are those of"
            f" {sorted(draws)}. Keep all sites, and give the model that was sampled"
        )
    with side_runs():
        sites = latents_of(target.bound.trace())
    chains = draws[target.names[0]].shape[:2] if target.names else torch.Size((1, 1))
    params = {}
    for site in target.sites:
        x, fn = draws[site.name], sites[site.name]["fn"]
        like = to_support(site.transform, torch.zeros(site.shape, dtype=site.dtype))
        if x.shape != chains + like.shape or chains.numel() == 0:
            want = (*chains, *like.shape)
            raise ValueError(
                f"the draws of site {site.name!r} have shape {tuple(x.shape)}, and the model wants"
                f" {want}, (chains, draws, *site)"
            )
        x = x.to(site.device, site.dtype)
        if site.support_values is None:
            what = f"the draws of site {site.name!r}"
            support = plain_support(stated_support(fn))
            check_inside(support, x, what, "sample in torch.float64")
        elif why := site.objection(x.flatten(0, 1)):
            raise ValueError(f"the draws of site {site.name!r} must hold {why}")
        params[site.name] = z = as_function(site.transform)(x)
        if (idle := target.idle.get(site.name)) is not None:  # normal, by whomever it was drawn
            params[site.name] = torch.where(idle, torch.randn_like(z), z)
    return target.ravel(params)
