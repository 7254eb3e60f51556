"""The state of Pyro's runner after a run, and of Pyro's optimisers between steps.

Relies on ``_samples``, ``_diagnostics``, ``_args`` and ``_kwargs`` of ``pyro.infer.MCMC``, and on
``_state_waiting_to_be_consumed`` of ``pyro.optim.PyroOptim``, the states of parameters to come.
"""

from collections.abc import Mapping
from typing import Any

from pyro.infer.mcmc.api import MCMC
from pyro.optim import PyroOptim


def has_run(mcmc: MCMC) -> bool:
    """Whether there are draws."""
    return mcmc._samples is not None


def reported_by_chains(mcmc: MCMC) -> Any:
    """The diagnostics of the kernel of each chain, in order."""
    return mcmc._diagnostics


def arguments_of_run(mcmc: MCMC) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """The arguments of the model."""
    return mcmc._args or (), mcmc._kwargs or {}


def waiting_states(optim: PyroOptim) -> dict[str, object]:
    """The states that parameters take up when they are first stepped, by name; may be changed."""
    return optim._state_waiting_to_be_consumed
