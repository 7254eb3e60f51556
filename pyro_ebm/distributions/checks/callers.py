r"""Finds the algorithm of Pyro that evaluates an energy whose constant is unknown.

A weight :math:`p(\theta)\, e^{-E_\theta(x)} / q(\theta)` that lacks :math:`Z(\theta)` is that of
another posterior. Algorithms of this package look at the model before they start. Pyro's own do
not, and evaluate an energy when their handlers are gone: on Pyro's stack they look like a call by
hand. Python's stack holds the algorithm's own function, and in it the
model and its arguments, to which the same check is applied. Seen are

- ``Importance`` (``CSIS`` too), ``vectorized_importance_weights``, ``psis_diagnostic`` and
  ``WeighedPredictive``;
- ``HMC``, ``NUTS``, ``RandomWalkKernel`` and ``initialize_model``, but where ``torch.jit`` traces
  their potential;
- ``AutoLaplaceApproximation.laplace_approximation``;
- an ELBO by hand, as a number or a module. (Under ``SVI.step``, and in a module, as that of
  :func:`~pyro_ebm.fit`, gradients tell more: parameters, too, may not move an energy without its
  log Z. Around an ELBO's ``differentiable_loss`` they are the user's concern, who may add the
  gradient of log Z.)

Not seen are densities of traces that are made by hand, ``infer_discrete``, and ``SMCFilter``, whose
particles come from earlier calls.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from pyro.infer import HMC, Importance, WeighedPredictive
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.enum import get_importance_trace
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine import Trace
from pyro.poutine.runtime import default_process_message

Model = Callable[..., object]
"""A model, or a guide, of Pyro."""


class Call(NamedTuple):
    """An algorithm that is running, with the model that it was given."""

    model: Model
    args: tuple[object, ...]
    kwargs: dict[str, object]
    owner: object
    """The object of the algorithm; None of a function."""

    @property
    def is_known(self) -> bool:
        """Whether this object has passed the check with this model and these arguments."""
        return self.owner is not None and _known.get(self.owner) == self._key

    def remember(self) -> None:
        """Records that it is in order: an importance sampler evaluates it once for each draw."""
        if self.owner is not None:
            _known[self.owner] = self._key

    @property
    def _key(self) -> tuple[int, ...]:
        # an ELBO sees other data at each step
        given = () if isinstance(self.owner, ELBO) else (*self.args, *self.kwargs.values())
        # a method is another object whenever it is looked up
        model = (getattr(self.model, part, self.model) for part in ("__self__", "__func__"))
        return tuple(map(id, (*model, *given)))


def sampler_of_a_posterior() -> Call | None:
    """The outermost of Pyro's algorithms that weigh the latents of a model, if one is running."""
    found, elbo = None, False
    for frame in _frames():
        if frame.f_code in _SAMPLERS or (elbo and isinstance(frame.f_locals.get("self"), ELBO)):
            found = frame
        elbo = elbo or frame.f_code is get_importance_trace.__code__
    if found is None or torch.jit.is_tracing():
        return None
    local = found.f_locals
    owner = local.get("self")
    model = local.get("model", getattr(owner, "model", None))
    args, kwargs = (local.get(name, local.get(f"model_{name}")) for name in ("args", "kwargs"))
    return None if model is None else Call(model, tuple(args or ()), dict(kwargs or {}), owner)


def in_elbo_module() -> bool:
    """Whether ``elbo(model, guide)``, a module to be trained, is being evaluated."""
    return any(frame.f_code is ELBOModule.forward.__code__ for frame in _frames())


def site_at_hand() -> dict[str, Any] | None:
    """The sample site of Pyro that is drawn, or evaluated by a trace, if one is.

    Example:
        >>> class Named(dist.Bernoulli):
        ...     def sample(self, sample_shape=()):
        ...         return torch.tensor(float(site_at_hand()["name"]))
        >>> trace = pyro.poutine.trace(lambda: pyro.sample("3", Named(0.5))).get_trace()
        >>> trace.nodes["3"]["value"], site_at_hand()
        (tensor(3.), None)
    """
    for frame in _frames():
        if frame.f_code in _SITES:
            local = frame.f_locals
            return local["site"] if "site" in local else local["msg"]
    return None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _support_values(*functions: FunctionType) -> frozenset[CodeType]:
    return frozenset(function.__code__ for function in functions)


_SAMPLERS = _support_values(
    Importance._traces,
    vectorized_importance_weights,
    WeighedPredictive.forward,
    HMC.setup,
    RandomWalkKernel.setup,
    initialize_model,
    AutoLaplaceApproximation.laplace_approximation,
)
_SITES = _support_values(
    default_process_message,
    InitMessenger._pyro_sample,
    Trace.log_prob_sum,
    Trace.compute_log_prob,
    Trace.compute_score_parts,
)
_known: weakref.WeakKeyDictionary[object, tuple[int, ...]] = weakref.WeakKeyDictionary()
