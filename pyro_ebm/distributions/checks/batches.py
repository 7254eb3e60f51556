r"""The check that an energy takes a batch of one point as it takes a batch of several.

An energy maps points ``(*batch, *event)`` to energies ``(*batch)``. A network that ends in
``.squeeze()`` does so for every batch but one: of a single point it drops the batch as well. In
training that is the last, short batch of an epoch. A network with ``reshape(1)`` in it takes images
one at a time, and no two.

The energy is therefore evaluated, where it is first used, at the points at hand cut to one and
copied to two, in evaluation and in training mode. Points that a model made have the dtype, the
device and the support that the energy is written for, which its constructor does not know: layers
may be lazy there, and the latents that it closes over may stand for many. Each module is checked
once for each function that calls it, which then costs a look into a dictionary.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_ebm.distributions.checks.energy_calls import EnergyCallError
from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.internals.functorch import in_transform
from pyro_ebm.ops.arguments import first_line
from pyro_ebm.ops.rows import evaluated

_seen: "weakref.WeakKeyDictionary[nn.Module, set[tuple[object, torch.Size]]]" = (
    weakref.WeakKeyDictionary()
)


def check_batches(
    energy: Callable[[Tensor], object],
    name: str,
    x: Tensor,
    value: Tensor,
    event_dim: int,
    modules: tuple[nn.Module, ...],
) -> None:
    """Refuses a network that drops a batch of one, or that takes no batch of two.

    Nothing is left of the evaluations: random state, buffers and the mode of every module are put
    back. An energy without modules is not evaluated, nor is one whose points are not tensors that
    Python may read.

    Args:
        energy: the function.
        name: what to call it.
        x: points at which it gave the right shape, ``(n, *batch, *event)``.
        value: their energies, shape ``(n, *batch)``.
        event_dim: number of event dimensions.
        modules: the modules that it evaluates.

    Raises:
        EnergyCallError: if it does not map one and two points to one and two energies.
    """
    if not modules or value.dim() == 0 or not value.numel():
        return
    function = getattr(energy, "__func__", energy)
    key = getattr(function, "__code__", type(energy)), x.shape[x.dim() - event_dim :]
    seen = _seen.setdefault(modules[0], set())
    if key in seen or in_transform() or not readable(x):
        return
    seen.add(key)
    rest = value.shape[1:]
    x = x.detach()
    for training in (False, True):
        if training and any(isinstance(m, _BatchNorm) for m in modules):
            continue  # one row has no variance: the check of rows says what to do instead
        with _in_mode(modules, training):
            one, two = (_shape_at(energy, x[[0] * n], modules) for n in (1, 2))
        mode = "training" if training else "evaluation"
        if two == (2, *rest) and one != (1, *rest):
            got = f"to {one}" if isinstance(one, tuple) else f"to nothing ({one})"
            raise EnergyCallError(
                f"the energy {name} maps points of shape {(2, *x.shape[1:])} to {two}, and of"
                f" shape {(1, *x.shape[1:])} {got} in {mode} mode: squeeze()"
                " drops a batch of one with the rest, squeeze(-1) the last dimension alone"
            )
        if one == (1, *rest) and isinstance(two, tuple) and two != (2, *rest):
            raise EnergyCallError(
                f"the energy {name} takes one point at a time: it maps points of shape"
                f" {(2, *x.shape[1:])} to {two}, not to {(2, *rest)}, in {mode} mode. Sum and take"
                " means over the event dimensions alone, and reshape to x.shape[:-1] or the like"
            )


def _shape_at(
    energy: Callable[[Tensor], object], x: Tensor, modules: tuple[nn.Module, ...]
) -> tuple[int, ...] | str:
    """The shape of the energies, or the error in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one row, which nobody asked for
            return tuple(evaluated(energy, x, modules).shape)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return first_line(error)


@contextlib.contextmanager
def _in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, mode in before:
            module.training = mode
