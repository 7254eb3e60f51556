r"""States in which a distribution of the model does not exist have no density.

A latent may move an argument out of its domain, as ``Gamma(a, 1)`` with :math:`a < 0`, where
the formula of the log density may well be finite. Pyro's validation raises there, and cannot run
within ``vmap`` or a graph. Here the same checks are tensor code: :math:`\log p = -\infty` where an
argument, or an observed value that a latent moves, is not allowed, and the state is rejected.

Only what depends on latents is checked, and not what shows by itself: NaN, or a matrix that has no
Cholesky factor. Nor is an argument whose numbers are those of a latent, as a view of its tensor,
where the support of that latent lies within what is allowed: a positive latent may be a scale.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, constraints
from torch.distributions.utils import lazy_property

from pyro_ebm.distributions.core.introspection import elementwise, tensors_of
from pyro_ebm.distributions.core.supports import plain_support
from pyro_ebm.distributions.core.wrappers import PARTS, VIEWS, layers, unvalidated
from pyro_ebm.models.runs import latents_of, sample_sites, value_of
from pyro_ebm.models.sites.latents import SampleSite


class Checked(NamedTuple):
    """What may become invalid at a site."""

    arguments: frozenset[str] | None
    """Names of arguments, of its distribution or of parts of it; None is all of them."""
    value: bool
    """Whether the observed value may leave the support."""


class Unvalidated(Messenger):
    """Turns validation off at every site, and gives what it forbids no density.

    Args:
        checked: of each site that needs it, what to check.

    Example:
        >>> def model(a):
        ...     pyro.sample("y", dist.Gamma(a, 1.0), obs=torch.tensor(0.5))
        >>> checked = Unvalidated({"y": Checked(frozenset({"concentration"}), False)})(model)
        >>> with pyro.validation_enabled(False):
        ...     trace = poutine.trace(checked).get_trace(torch.tensor([-0.5, 1.0]))
        ...     trace.nodes["y"]["fn"].log_prob(trace.nodes["y"]["value"])
        tensor([   -inf, -0.5000])
    """

    def __init__(self, checked: Mapping[str, Checked] | None = None):
        super().__init__()
        self.checked = {} if checked is None else checked

    def _pyro_sample(self, msg: SampleSite) -> None:
        # a part of a distribution may have been made outside the model, with validation on
        if not isinstance(msg["fn"], Distribution):
            return
        fn = unvalidated(msg["fn"])
        if (checked := self.checked.get(msg["name"])) is not None:
            whole, fn = fn, copy.copy(fn)  # two, since one that held itself would be freed late
            fn.log_prob = functools.partial(_log_prob, whole, checked)
        msg["fn"] = fn


def what_to_check(
    tracked: poutine.Trace, validated: poutine.Trace, reads: frozenset[str]
) -> dict[str, Checked]:
    """The arguments and values of each site that may become invalid as latents move.

    Args:
        tracked: a run of the model in which tensors carry the latents that they come from.
        validated: a run under the user's own validation: a distribution that was made
            with ``validate_args=False`` is not checked.
        reads: the latents whose values left the tensors; where there are any, all is checked.
    """
    found = {}
    latents = latents_of(tracked)
    for name, node in sample_sites(tracked).items():
        fn = node["fn"]
        if name in validated.nodes and _is_told_not_to(validated.nodes[name]["fn"]):
            continue
        names = {
            arg
            for part, arg, constraint in _arguments(fn)
            if reads or _may_leave(getattr(part, arg), constraint, latents)
        }
        support = _support(fn)
        value = node["is_observed"] and not isinstance(fn, Delta) and _shows(support) is False
        if value and not (reads and Distribution._validate_args):
            value = bool(get_provenance([node["value"], tensors_of(support)]))
        if names or value:
            found[name] = Checked(None if reads else frozenset(names), value)
    return found


def _may_leave(
    argument: Tensor, constraint: constraints.Constraint, latents: Mapping[str, SampleSite]
) -> bool:
    """Whether an argument moves, and is not the own value of a latent that is always allowed."""
    sources = get_provenance(argument)
    return bool(sources) and not any(
        _storage(argument) == _storage(latents[name]["value"])
        and _is_within(_support(latents[name]["fn"]), constraint)
        for name in sources & latents.keys()
    )


def _invalid_parts(fn: Distribution, value: Tensor, checked: Checked | None) -> Iterator[str]:
    """What of a site is invalid, in words."""
    if checked is None:
        return
    for part, name, constraint in _arguments(fn):
        if checked.arguments is None or name in checked.arguments:
            argument = getattr(part, name)
            if not _check(constraint, argument).all():
                yield f"the argument {name} of {type(part).__name__} is not in {constraint}"
    if checked.value and not _inside(fn, value).all():
        yield f"the value is not in the support {_support(fn)}"


def not_finite_sites(trace: poutine.Trace, checked: Mapping[str, Checked]) -> list[str]:
    """In words, the sites of a trace whose log density is not finite, and why."""
    bad: list[str] = []
    for name, node in sample_sites(trace).items():
        log_prob = node["fn"].log_prob(node["value"])
        if not log_prob.isfinite().all():
            what = "nan" if log_prob.isnan().any() else "infinite"
            parts = _invalid_parts(node["fn"], value_of(trace, name), checked.get(name))
            why = "".join(f", as {part}" for part in parts)
            bad.append(f"the log density of site {name!r} is {what}{why}")
    return bad


def _log_prob(
    fn: Distribution, checked: Checked, value: Tensor, *args: object, **kwargs: object
) -> Tensor:
    """The log density, and minus infinity where the distribution does not exist."""
    log_prob = fn.log_prob(value, *args, **kwargs)
    valid = _valid(fn, checked.arguments)
    if checked.value:
        inside = _inside(fn, value)
        valid = inside if valid is True else valid & inside
    if valid is True:
        return log_prob
    # added, and not chosen by torch.where, which would cost as much again in the backward sweep
    return log_prob + torch.where(valid, 0.0, -torch.inf).to(log_prob)


def _inside(fn: Distribution, value: Tensor) -> Tensor:
    """Where a value lies in the support, or is masked."""
    if isinstance(fn, MaskedDistribution):
        return _inside(fn.base_dist, value) | ~torch.as_tensor(fn._mask)
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims:
        return _inside(fn.base_dist, value).flatten(-fn.reinterpreted_batch_ndims).all(-1)
    return _check(_support(fn), value)


def _valid(fn: Distribution, names: frozenset[str] | None) -> Tensor | Literal[True]:
    """Where a distribution exists, of a shape that broadcasts with its batch; or True."""
    valid: Tensor | Literal[True] = True
    for inner in _parts(fn):
        ok = _valid(inner, names)
        # what is an event here is a batch of the parts: of components, of independent variables
        extra = len(inner.batch_shape) - len(fn.batch_shape)
        if ok is not True and extra > 0:
            ok = ok.expand(torch.broadcast_shapes(ok.shape, (1,) * extra))
            ok = ok.flatten(-extra).all(-1)
        valid = ok if valid is True else valid & ok
    if isinstance(fn, MaskedDistribution) and valid is not True:
        valid = valid | ~torch.as_tensor(fn._mask)
    for _, name, constraint in _own_arguments(fn):
        if names is None or name in names:
            ok = _check(constraint, getattr(fn, name))
            valid = ok if valid is True else valid & ok
    return valid


def _arguments(fn: Distribution) -> Iterator[tuple[Distribution, str, constraints.Constraint]]:
    """The distribution or the part of it, the name and the constraint of each given argument."""
    yield from _own_arguments(fn)
    for part in _parts(fn):
        yield from _arguments(part)


def _parts(fn: Distribution) -> Iterator[Distribution]:
    """The distributions that it is made of, unless its own arguments are all of theirs."""
    if not (isinstance(fn, TransformedDistribution) and fn.arg_constraints):
        for name in PARTS:
            if name != "_dirichlet" and (part := vars(fn).get(name)) is not None:
                yield part


def _own_arguments(fn: Distribution) -> Iterator[tuple[Distribution, str, constraints.Constraint]]:
    try:
        constrained = fn.arg_constraints
    except NotImplementedError:
        return
    for name, constraint in constrained.items():
        if constraints.is_dependent(constraint) or _shows(constraint):
            continue
        # the one of probs and logits that was not given is computed when asked for
        lazy = isinstance(getattr(type(fn), name, None), lazy_property)
        given = name in vars(fn) or not lazy
        if given and isinstance(getattr(fn, name, None), Tensor):
            yield fn, name, constraint


def _shows(constraint: constraints.Constraint | None) -> bool | None:
    """Whether what is not allowed gives NaN, or an error, by itself; None if it is not known."""
    if constraint is None or constraints.is_dependent(constraint):
        return None
    return elementwise(constraint) in _SHOW


_SHOW = (constraints.real, constraints.real_vector, constraints.positive_definite)


def _is_within(support: constraints.Constraint, constraint: constraints.Constraint) -> bool:
    """Whether a constraint holds on all of a support, as far as their bounds show."""
    parts = [elementwise(part) for part in (plain_support(support), constraint)]
    if constraints.simplex in parts:
        return parts[0] is parts[1]
    if not all(isinstance(part, _BOUNDED) for part in parts):
        return False
    (low, high), (least, most) = (
        [torch.as_tensor(getattr(part, name, end)) for name, end in _ENDS] for part in parts
    )
    return bool((low >= least).all() and (high <= most).all())


_BOUNDED = tuple(
    type(each)
    for each in (
        constraints.greater_than(0),
        constraints.greater_than_eq(0),
        constraints.interval(0, 1),
    )
)
_ENDS = (("lower_bound", -torch.inf), ("upper_bound", torch.inf))


def _storage(x: Tensor) -> int:
    return detach_provenance(x).untyped_storage().data_ptr()


def _check(constraint: constraints.Constraint, value: Tensor) -> Tensor:
    if constraint is constraints.simplex:  # its sum is known up to rounding only
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-3)
    return constraint.check(value)


def _support(fn: Distribution) -> Any:
    try:
        return fn.support
    except (NotImplementedError, AttributeError):
        return None


def _is_told_not_to(fn: object) -> bool:
    """Whether it was made with ``validate_args=False``, where others validate."""
    if not Distribution._validate_args:
        return False
    return any(vars(layer).get("_validate_args") is False for layer in layers(fn, VIEWS))
