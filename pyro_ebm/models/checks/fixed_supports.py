r"""Is the support of a latent the same wherever the other latents are?

One transform maps a site to the reals for a whole run, so its support must not move. Tensors carry
the latents that they were computed from (:mod:`pyro_ebm.models.provenance`), which is a suspicion:
``torch.where(mu > 0, 1.0, 1.0)`` comes from ``mu``, and so do the bounds of a ``Binomial`` that
were broadcast against its probability. Bounds are a few numbers, which can be compared as they are,
without the points that an energy would have to be compared at. So further runs at other latents
decide: a support moves if its bounds, or its kind, are ever others, and a suspected one is taken
for fixed if they are the same in all of them.

A bound that moves only beyond some threshold, as ``1 + (theta - 5).relu()`` does, must not get
through, so these runs are scattered far (:mod:`pyro_ebm.models.checks.scattered`). What moves
only beyond that, or in a gap, is missed.
"""

import torch
from pyro.ops.provenance import get_provenance

from pyro_ebm.distributions.core.introspection import bounds_of, detached, tensors_of
from pyro_ebm.models.checks.intractability import NUM_RERUNS, NUM_RERUNS_AFTER_READS
from pyro_ebm.models.checks.scattered import scattered_trace
from pyro_ebm.models.provenance import HostReads, trace_latents
from pyro_ebm.models.runs import BoundModel, latents_of
from pyro_ebm.ops.rows import random_state_put_back


def moving_supports(bound: BoundModel) -> dict[str, frozenset[str]]:
    """The latents whose support moves, and those that move it, as far as is known.

    Example:
        >>> def model():
        ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
        ...     pyro.sample("u", dist.Uniform(0.0 * b, torch.where(b > 0, 1.0, 1.0)))
        ...     pyro.sample("v", dist.Uniform(0.0, 1 + (b - 5).relu()))
        ...     pyro.sample("w", dist.Uniform(0.0, b.exp().item()))
        >>> moving_supports(BoundModel(model))
        {'v': frozenset({'b'}), 'w': frozenset({'b'})}
    """
    with random_state_put_back(), HostReads() as reads:
        trace = trace_latents(bound)
    supports = {name: site["fn"].support for name, site in latents_of(trace).items()}
    suspected = {k: get_provenance(tensors_of(s)) - {k} for k, s in supports.items()}
    if not reads.latents and not any(map(tensors_of, supports.values())):
        return {}  # all bounds are plain numbers, and no latent became one
    looks = dict.fromkeys(supports, 0)
    moved = set()
    closely = reads.latents or any(suspected.values())
    with random_state_put_back():
        for i in range(NUM_RERUNS_AFTER_READS if closely else NUM_RERUNS):
            rerun = scattered_trace(bound, i)
            nodes = {} if rerun is None else rerun.nodes
            for name in supports.keys() & nodes.keys():
                same = _same(supports[name], nodes[name]["fn"].support)
                if same is not None:
                    looks[name] += 1
                    moved |= set() if same else {name}
    unseen = {name for name, latents in suspected.items() if latents and not looks[name]}
    return {k: suspected[k] or reads.latents - {k} for k in supports if k in moved | unseen}


def _same(first: object, other: object) -> bool | None:
    """Whether two supports are equal up to rounding; None where one of them is no support."""
    a, b = bounds_of(first), bounds_of(other)
    if type(first) is not type(other) or len(a) != len(b):
        return False
    found: bool | None = True
    for one, two in zip(a, b, strict=True):
        x, y = (torch.as_tensor(detached(bound)) for bound in (one, two))
        if x.shape != y.shape:
            return False
        if not y.isfinite().all() and x.isfinite().all():
            found = None  # an overflow, far out
            continue
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
        if not torch.allclose(x.double(), y.double(), rtol=100 * eps, atol=100 * eps):
            return False
    return found
