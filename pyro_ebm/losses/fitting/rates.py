"""The optimiser of a training, and the schedule of its rate."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.params.param_store import normalize_param_name
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyro_ebm.ops.arguments import check_callable, check_number, shown

DEFAULT_RATE = 5e-3

FINAL_RATE = 0.05
"""What the rate has fallen to at the end, as a part of that at the start."""

FUSED = ("cpu", "cuda")
"""The devices on which torch has Adam as one kernel."""


def falling(fraction: float) -> float:
    """An exponential fall to a twentieth.

    Example:
        >>> [round(falling(fraction), 4) for fraction in (0.0, 0.5, 1.0)]
        [1.0, 0.2236, 0.05]
    """
    return FINAL_RATE**fraction


Optim = Optimizer | PyroOptim | Callable[..., Optimizer]
Schedule = Callable[[float], float] | LRScheduler


def adam(parameters: Iterable[Tensor], lr: float) -> Optimizer:
    """Adam, as one kernel where torch has it."""
    parameters = list(parameters)
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused)


def make_optimizer(
    optim: Optim | None, lr: float | None, parameters: Mapping[str, Tensor]
) -> tuple[Optimizer, LRScheduler | None]:
    """One torch optimiser of all parameters, and the schedule that came with it.

    Args:
        optim: as :func:`~pyro_ebm.fit` takes it.
        lr: the rate, of Adam or a class.
        parameters: by name.

    Raises:
        ValueError: for what is no optimiser, a rate out of range, or one given twice.
    """
    if lr is not None:
        check_number("lr", lr)
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if not (optim is None or isinstance(optim, type)):
            raise ValueError(f"lr: the optimiser {shown(optim)} has its own; leave one of them out")
    rate = DEFAULT_RATE if lr is None else float(lr)
    if optim is None:
        return adam(parameters.values(), rate), None
    if isinstance(optim, PyroOptim):
        return _of_pyro(optim, parameters)
    if not isinstance(optim, Optimizer):
        what = "pyro.optim.Adam({'lr': 0.001}), torch.optim.AdamW, or an optimiser of torch"
        of_pyro = getattr(optim, "__module__", "").startswith("pyro.")  # no optimiser yet
        if of_pyro or not callable(optim):
            raise ValueError(f"optim must be an optimiser, such as {what}, got {shown(optim)}")
        values = list(parameters.values())
        optim = optim(values, lr=rate) if isinstance(optim, type) else optim(values)
        if not isinstance(optim, Optimizer):
            raise ValueError(f"optim must make an optimiser, such as {what}; it made {optim!r}")
    return optim, None


def _of_pyro(
    optim: PyroOptim, parameters: Mapping[str, Tensor]
) -> tuple[Optimizer, LRScheduler | None]:
    """The torch optimiser that Pyro's makes for each parameter, for all of them."""
    if optim.pt_clip_args:
        raise ValueError("optim has clip_args, for each parameter: give clip_norm in their place")
    make: Any = optim.pt_optim_constructor
    settings = optim.pt_optim_args
    groups = list(parameters.values())
    if not isinstance(settings, dict):  # a function of the parameter's name
        store = pyro.get_param_store()
        names = [store.param_name(p) or name for name, p in parameters.items()]
        groups = [
            dict(settings(normalize_param_name(name)), params=[p])
            for name, p in zip(names, parameters.values(), strict=True)
        ]
        settings = {}
    optimizer = make(groups, **settings)
    if isinstance(optim, PyroLRScheduler):
        return optimizer, optim.pt_scheduler_constructor(optimizer, **optim.kwargs)
    return optimizer, None


def make_schedule(
    schedule: Schedule | None, own: LRScheduler | None, optimizer: Optimizer, num_steps: int
) -> LRScheduler | None:
    """The torch scheduler that is to be stepped after each step; None for a constant rate.

    Args:
        schedule: as :func:`~pyro_ebm.fit` takes it.
        own: the schedule that came with the optimiser.
        optimizer: whose rates it sets.
        num_steps: how many steps make up a training.

    Raises:
        ValueError: for what is no schedule, one given twice, or one that needs a metric.
    """
    falls = any(group.get("lrd", 1.0) != 1.0 for group in optimizer.param_groups)
    if schedule is falling and (own is not None or falls):  # by default, and the optimiser has one
        schedule = None
    if schedule is not None and (own is not None or falls):
        raise ValueError("schedule: the optimiser has its own; leave one of them out")
    made = own
    if isinstance(schedule, LRScheduler):
        made = schedule
        if made.optimizer is not optimizer:
            raise ValueError("schedule must be that of optim, got one of another optimiser")
    elif schedule is not None:
        check_callable(
            "schedule", schedule, "a function of a fraction, or a torch scheduler of optim"
        )
        made = LambdaLR(optimizer, lambda k: _checked(schedule, k / num_steps))
    if isinstance(made, ReduceLROnPlateau):
        raise ValueError("schedule: ReduceLROnPlateau waits for a metric; call it in a callback")
    return made


def _checked(schedule: Callable[[float], float], fraction: float) -> float:
    factor = schedule(fraction)
    check_number("the factor that schedule returns", factor)
    if not 0 <= factor < math.inf:
        raise ValueError(
            f"schedule must give factors that are finite and >= 0, got {factor} at {fraction:g}"
        )
    return float(factor)
