r"""Which latents a tensor was computed from.

In a run of a model in which every latent is one of Pyro's provenance tensors, each tensor carries
the names of the latents that had a part in it. That is a suspicion: a tensor may come from a latent
and be constant all the same. Three things make it sharper.

*What reads no value has no source.* ``torch.zeros_like(mu)`` takes shape and dtype from
``mu``, as do ``new_full``, ``x.to(mu)`` and ``x.expand_as(mu)``; a tensor that is overwritten, as
by ``fill_``, has lost what it was; and ``mu * 0`` and ``mu - mu`` are 0 whatever ``mu`` is. These
leave no trace of ``mu``.

*A shape may be a value.* The length of ``mu[mu > 0]`` is a number that was read off ``mu``, and
so is the sum of ``ones_like(mu[mu > 0])``. Operations whose shape follows from values count as
reads, as ``mu.item()`` does.

*What leaves the tensors is noted.* Behind a read, or where a latent is written into a tensor that
was made without one, nothing is tracked: only further runs at other latents, which
compare values, show a dependence.
"""

from typing import Any

import torch
from pyro import poutine
from pyro.ops.provenance import (
    ProvenanceTensor,
    detach_provenance,
    get_provenance,
    track_provenance,
)
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ebm.internals.lookup import Args, Kwargs, Operation
from pyro_ebm.internals.pyro_runtime import set_provenance
from pyro_ebm.models.batched import READS
from pyro_ebm.models.runs import BoundModel, is_subsample
from pyro_ebm.models.sites.latents import SampleSite


def trace_latents(bound: BoundModel) -> poutine.Trace:
    """A trace of the model in which every tensor carries the latents that it was computed from.

    Example:
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("u", dist.Uniform(torch.zeros_like(mu), 1 + mu.exp()))
        >>> support = trace_latents(BoundModel(model)).nodes["u"]["fn"].support
        >>> get_provenance(support.lower_bound), get_provenance(support.upper_bound)
        (frozenset(), frozenset({'mu'}))
    """
    with OnlyValuesCount():
        return bound.with_model(_TrackLatents()(bound.model)).unvalidated_trace()


class _TrackLatents(Messenger):
    """Marks every latent's value by the site's name; observed values keep where they came from."""

    def _pyro_post_sample(self, msg: SampleSite) -> None:
        if not msg["is_observed"] and not is_subsample(msg):
            value = detach_provenance(msg["value"])
            msg["value"] = track_provenance(value, frozenset({msg["name"]}))


class HostReads(TorchFunctionMode):
    """Notes the latents whose values leave the tensors, where provenance is lost.

    Example:
        >>> mu = track_provenance(torch.ones(3), frozenset({"mu"}))
        >>> with HostReads() as reads:
        ...     _ = 2 * mu.sum()
        ...     before = reads.latents
        ...     _ = mu.sum().item()
        >>> before, reads.latents
        (frozenset(), frozenset({'mu'}))
    """

    def __init__(self) -> None:
        super().__init__()
        self.latents: frozenset[str] = frozenset()

    def __torch_function__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs = None
    ) -> object:
        kwargs = kwargs or {}
        if _reads(getattr(func, "__name__", ""), args):
            self.latents |= get_provenance([args, kwargs])
        return func(*args, **kwargs)


def _reads(name: str, args: tuple[object, ...]) -> bool:
    if name == "__getitem__":  # x[x > 0]
        index = args[1] if isinstance(args[1], tuple) else args[1:]
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
    if name == "where":
        return len(args) == 1
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):  # in place
        return bool(args) and not isinstance(args[0], ProvenanceTensor)
    return name in READS or name in _SHAPED


class OnlyValuesCount(TorchFunctionMode):
    """Lets tensors that no value of a latent has moved be plain, without provenance."""

    def __torch_function__(
        self, func: Operation, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _LIKE:  # shape and dtype of the first; a value to fill in keeps its source
            first = {"input": detach_provenance(kwargs["input"])} if "input" in kwargs else {}
            args, kwargs = (*map(detach_provenance, args[:1]), *args[1:]), {**kwargs, **first}
        elif name in _AS:  # and those of the second
            args, kwargs = (*args[:1], *detach_provenance(args[1:])), detach_provenance(kwargs)
        elif _is_zero(name, args):
            args = detach_provenance(args)
        elif name in _OVERWRITES and args and isinstance(args[0], ProvenanceTensor):
            set_provenance(args[0], get_provenance([args[1:], kwargs]))
        elif name == "broadcast_tensors":  # of each its own values
            parts = func(*map(detach_provenance, args), **kwargs)
            return tuple(map(track_provenance, parts, map(get_provenance, args)))
        return func(*args, **kwargs)


def _is_zero(name: str, args: tuple[object, ...]) -> bool:
    if name in _TIMES:
        return any(type(a) in (int, float) and a == 0 for a in args)
    return name in _MINUS and len(args) == 2 and args[0] is args[1]


# whose shapes follow from values
_SHAPED = {"argwhere", "bincount", "masked_select", "nonzero", "one_hot", "repeat_interleave"}
_SHAPED |= {"unique", "unique_consecutive"}

# `new` too, of which torch makes noise: tracking would hand it a shape as a tuple, which it takes
# for values
_LIKE = {f"{kind}_like" for kind in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")}
_LIKE |= {"new", *(f"new_{kind}" for kind in ("empty", "full", "ones", "tensor", "zeros"))}
_AS = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
_TIMES = {"mul", "multiply", "__mul__", "__rmul__"}
_MINUS = {"sub", "subtract", "__sub__"}
_OVERWRITES = {"bernoulli_", "cauchy_", "exponential_", "fill_", "geometric_", "log_normal_"}
_OVERWRITES |= {"normal_", "random_", "uniform_", "zero_"}
