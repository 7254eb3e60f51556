"""The check that the energy of a row does not depend on the other rows of its batch."""

from collections.abc import Callable, Iterable

import pyro
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.ops.rows import rows_interact


def check_rows(energy: UnnormalizedEnergy, x: Tensor, what: str, seed: int = 0) -> None:
    """Refuses an energy whose value at a row depends on the other rows.

    Args:
        energy: the density.
        x: points, shape ``(*batch, *event)``.
        what: names the energy, as in "the energy of site 'x'".
        seed: chooses the rows to compare.

    Raises:
        ValueError: if it does; it names the layer, where one that normalises over the batch is
            found.

    Example:
        >>> p = UnnormalizedEnergy(lambda x: (x - x.mean(0)).square())
        >>> check_rows(p, torch.randn(5), "the energy")
        Traceback (most recent call last):
        ValueError: the energy depends on the other rows of its batch, and is no density of one ...
    """
    log_density = unvalidated(energy).unnormalized_log_prob
    check_function(log_density, x, energy.event_dim, energy.modules, what, seed=seed)


def check_function(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    event_dim: int,
    modules: Iterable[nn.Module],
    what: str,
    eval_mode: bool = False,
    seed: int = 0,
) -> None:
    """Refuses a function of points whose value at a row depends on the other rows.

    Args:
        function: maps ``(*batch, *event)`` to ``(*batch)``.
        x: points, shape ``(*batch, *event)``.
        event_dim: number of event dimensions.
        modules: the modules that it evaluates.
        what: names it.
        eval_mode: whether it evaluates them in evaluation mode.
        seed: chooses the rows to compare.

    Raises:
        ValueError: if the rows influence each other.
    """
    modules = tuple(modules)
    with pyro.validation_enabled(False):
        if not rows_interact(function, x, event_dim, modules, seed):
            return
    message = f"{what} depends on the other rows of its batch, and is no density of one point"
    for layer in modules:
        frozen = eval_mode or not layer.training
        if isinstance(layer, _BatchNorm) and not (frozen and layer.running_mean is not None):
            remedy = "use LayerNorm or GroupNorm"
            if layer.running_mean is not None:
                remedy = f"train in evaluation mode, net.eval(), or {remedy}"
            name = _name_in(layer, modules)
            message = f"{message}: {name} normalises over the batch. Instead {remedy}"
            break
    else:
        message += (
            ": take means, norms, softmax and attention over the dimensions of the event alone,"
            " not over those of the batch"
        )
    raise ValueError(message)


def _name_in(layer: nn.Module, modules: tuple[nn.Module, ...]) -> str:
    kind = type(layer).__name__
    for module in modules:
        for name, part in module.named_modules():
            if part is layer and name:
                return f"the layer {name!r} ({kind}) of {type(module).__name__}"
    return f"the layer {kind}"
