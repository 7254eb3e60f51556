"""``DistributedDataParallel`` (DDP), seen from the module inside of it.

Relies on ``DistributedDataParallel._get_active_ddp_module``, and on ``parameters_to_ignore``.
"""

import torch
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm.internals.lookup import internal

_active = internal(
    "torch.nn.parallel",
    "DistributedDataParallel._get_active_ddp_module",
    "to see which ranks train together",
)


def active_data_parallel() -> DistributedDataParallel | None:
    """The DDP that a call of a module comes through; None if it comes through none."""
    if not torch.distributed.is_available():
        return None
    active = _active()
    return active if isinstance(active, DistributedDataParallel) else None


def ignored_parameters(ranks: DistributedDataParallel) -> frozenset[str]:
    """The names of the parameters that a DDP does not average."""
    return frozenset(getattr(ranks, "parameters_to_ignore", ()))
