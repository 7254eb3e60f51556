"""What an estimate of the evidence must know of a model: its data, discrete and improper sites."""

from collections.abc import Collection

import torch
from pyro.distributions import Delta

from pyro_ebm.diagnostics.replay import is_factor
from pyro_ebm.distributions.core.supports import stated_support
from pyro_ebm.distributions.core.wrappers import innermost, unmasked
from pyro_ebm.models.runs import BoundModel, latents_of, sample_sites, side_runs
from pyro_ebm.ops.arguments import check_names


def names_of(shared_improper: object) -> tuple[str, ...]:
    """The names of the argument ``shared_improper``, sorted; raises a ValueError for others."""
    check_names("shared_improper", shared_improper)
    assert isinstance(shared_improper, Collection)
    return tuple(sorted(shared_improper))


def looked_at(bound: BoundModel, improper: Collection[str]) -> tuple[set[str], int | None]:
    """The discrete latents of a model, and how many elements of data it has."""
    with side_runs(), torch.no_grad():
        trace = bound.trace()
    latents = latents_of(trace)
    if unknown := sorted(set(improper) - latents.keys()):
        raise ValueError(
            f"shared_improper names {unknown}, and the latents of the model are {sorted(latents)}"
        )
    num: int | None = 0
    for name, site in sample_sites(trace).items():
        if name in latents or isinstance(innermost(site["fn"]), Delta):
            continue
        if is_factor(site):
            num = None
        elif num is not None:
            fn, mask, _ = unmasked(site["fn"], site["mask"])
            size = torch.broadcast_shapes(torch.as_tensor(site["value"]).shape, fn.shape()).numel()
            counts = 1.0 if mask is None else float(mask.expand(fn.batch_shape).double().mean())
            num += round(size * counts)
    return {name for name, site in latents.items() if stated_support(site["fn"]).is_discrete}, num
