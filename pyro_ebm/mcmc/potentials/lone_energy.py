"""Models that consist of one energy."""

import torch

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.models.provenance import HostReads, trace_latents
from pyro_ebm.models.runs import BoundModel, side_runs
from pyro_ebm.models.sites.discrete_sites import UNBOUNDED, site_support_values


def lone_energy(bound: BoundModel) -> tuple[str, UnnormalizedEnergy] | None:
    """The energy of a model that consists of it and of nothing else, with the site's name.

    Its own blocks can then be resampled: nothing else weighs on them.

    Example:
        >>> p = UnnormalizedEnergy(torch.square)
        >>> lone_energy(BoundModel(lambda: pyro.sample("y", p)))
        ('y', UnnormalizedEnergy(energy=square, event_shape=(), log_normalizer=unknown))
    """
    try:
        with side_runs():
            trace = bound.trace()
            with HostReads() as reads:
                trace_latents(bound)
    except (ValueError, torch.linalg.LinAlgError):
        return None  # an unlucky start of a model with more sites: ModelPotential tries again
    if reads.latents:
        return None  # a branch may have factors on its other side
    nodes = {name: n for name, n in trace.nodes.items() if n["type"] == "sample"}
    if len(nodes) != 1:
        return None
    ((name, node),) = nodes.items()
    scale = torch.as_tensor(node["scale"])
    plain = not node["is_observed"] and node["mask"] is None and scale.dim() == 0 and scale == 1
    fn = node["fn"]
    bare = isinstance(fn, UnnormalizedEnergy) and not fn.batch_shape
    if not (plain and bare) or site_support_values(name, fn) is UNBOUNDED:
        return None
    return name, fn
