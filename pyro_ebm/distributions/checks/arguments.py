"""What an energy asks of its arguments: a support, a base and a normalizer that fit its shapes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_ebm.distributions.checks.callers import sampler_of_a_posterior
from pyro_ebm.distributions.core.supports import plain_support
from pyro_ebm.ops.arguments import shown


def checked_shape(name: str, shape: Iterable[int]) -> torch.Size:
    """The shape as a ``torch.Size``.

    Raises:
        ValueError: if it is no tuple of sizes, such as a number.
    """
    try:
        sizes = torch.Size(shape)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a tuple of sizes, such as (3,), got {shown(shape)}"
        ) from error
    if any(size < 0 for size in sizes):
        raise ValueError(f"{name} must be a tuple of sizes, none below 0, got {shown(shape)}")
    return sizes


def lift_support(
    support: constraints.Constraint, event_shape: torch.Size
) -> constraints.Constraint:
    """The support of a whole event: an elementwise constraint holds for every element.

    Args:
        support: a constraint with ``event_dim`` at most ``len(event_shape)``.
        event_shape: the shape of one event.

    Raises:
        ValueError: if it is no constraint, or has more event dimensions than the event.

    Example:
        >>> from torch.distributions import constraints
        >>> lift_support(constraints.positive, torch.Size([3])).event_dim
        1
    """
    if not isinstance(support, constraints.Constraint):
        raise ValueError(
            "support must be a constraint, such as pyro.distributions.constraints.positive, got"
            f" {shown(support)}"
        )
    support = plain_support(support)
    missing = len(event_shape) - support.event_dim
    if missing < 0:
        raise ValueError(
            f"the support {support} is of events with {support.event_dim} dimension(s), but"
            f" event_shape={tuple(event_shape)} has {len(event_shape)}: give event_shape="
            " a shape with that many dimensions, or an elementwise support"
        )
    return constraints.independent(support, missing) if missing else support


def check_bijection(support: constraints.Constraint, event_shape: torch.Size) -> None:
    """Raises a ValueError unless the reals map onto the support, with events of this shape."""
    try:
        biject_to(support).inverse_shape(event_shape)
    except NotImplementedError as error:
        raise ValueError(
            f"no bijection from the reals onto the support {support} is known to"
            " torch.distributions.biject_to: register one, or use another support"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"event_shape={tuple(event_shape)} does not fit the support {support}: {error}"
        ) from error


def expands(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another.

    Example:
        >>> expands(torch.Size([3, 1]), torch.Size([3, 2])), expands((2,), torch.Size([3]))
        (True, False)
    """
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


def expanded_base(
    base: TorchDistribution, batch_shape: torch.Size, event_shape: torch.Size
) -> TorchDistribution:
    """The base with the energy's batch shape.

    Raises:
        ValueError: if its event shape is not the energy's, or its batch does not expand.
    """
    if base.event_shape != event_shape:
        hint = (
            f": write base.expand({tuple(event_shape)}).to_event({len(event_shape)})"
            if not base.event_shape
            else ""
        )
        raise ValueError(
            f"base {type(base).__name__} has event_shape={tuple(base.event_shape)}, the energy"
            f" wants {tuple(event_shape)}{hint}"
        )
    try:
        return base.expand(batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"base {type(base).__name__} has batch_shape={tuple(base.batch_shape)}, which does not"
            f" expand to the energy's {tuple(batch_shape)}"
        ) from error


def checked_normalizer(log_normalizer: Tensor | None, batch_shape: torch.Size) -> Tensor | None:
    """The normalizer, if there is one log Z for each batch element.

    Raises:
        ValueError: if its shape does not broadcast to the batch shape.
    """
    if log_normalizer is None:
        return None
    if not expands(log_normalizer.shape, batch_shape):
        raise ValueError(
            f"log_normalizer has shape {tuple(log_normalizer.shape)}, which does not broadcast to"
            f" batch_shape={tuple(batch_shape)}: there is one log Z for each batch element"
        )
    return log_normalizer


_minded: ContextVar[bool] = ContextVar("_minded", default=False)


@contextlib.contextmanager
def normalizers_minded() -> Iterator[None]:
    """Within this context somebody minds the log Z of energies: a loss, or the user's own word."""
    if torch.compiler.is_compiling():  # nothing is checked there, and no context can be traced
        yield
        return
    token = _minded.set(True)
    try:
        yield
    finally:
        _minded.reset(token)


_posterior_checks: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], None]] = []


def register_posterior_check(
    check: Callable[[Any, tuple[Any, ...], dict[str, Any]], None],
) -> None:
    """Adds a check of a model, its arguments and keyword arguments, to be made in Pyro's samplers.

    Distributions know no models: the check comes from where models are run.
    """
    _posterior_checks.append(check)


def refuse_missing_constant(
    energy: Any, lags: Callable[[Tensor], bool], x: Tensor, log_prob: Tensor
) -> None:
    """Refuses an algorithm of Pyro that would go wrong without a log Z that is not known.

    Under ``SVI`` with a plain ELBO that moves an energy the gradient of log Z is missing, and
    training runs away: a precision goes to 0, where :math:`E` is 0 everywhere. The gradient in the
    value itself is right, so that latents with a fixed energy, and fixed energies as factors, may
    pass. Elsewhere, a posterior of latents that move the energy is that of another model.

    Args:
        energy: whose log Z it is.
        lags: whether a gradient moves the energy at such points without its log Z.
        x: the value of the site.
        log_prob: the log density there.

    Raises:
        ValueError: under ``SVI.step`` with any loss but ours.
        NormalizerError: in another algorithm of Pyro, see
            :mod:`pyro_ebm.distributions.checks.callers`.
    """
    if torch.compiler.is_compiling() or _minded.get():  # a compiler traces no check of who calls
        return
    # a guide that draws without a gradient (scores, weights) leaves none to tell what moves
    if not _under_svi() or not log_prob.requires_grad:
        call = sampler_of_a_posterior()
        if call is not None and not call.is_known:
            with normalizers_minded():  # the check asks for densities too
                for check in _posterior_checks:
                    check(call.model, call.args, call.kwargs)
            call.remember()
        return
    if lags(x.detach()):
        raise ValueError(
            f"SVI trains something that moves {energy!r}, and a plain ELBO lacks the gradient of"
            " its log Z: use one of the losses of pyro_ebm, such as"
            " SVI(..., loss=ContrastiveDivergence()), or give log_normalizer= in closed form, or"
            " say constant_normalizer=True if Z does not depend on it (a location family, or minus"
            " the log of a density), or"
            " freeze a network that is not to be trained: net.requires_grad_(False)"
        )


def _under_svi() -> bool:
    """Whether ``SVI.step`` is looking for parameters to train."""
    return any(isinstance(m, TraceMessenger) and m.param_only for m in _PYRO_STACK)


class _RefuseSampling(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        raise RuntimeError(
            f"the energy draws its weight {msg['name']!r} (a PyroSample) anew whenever it is"
            " evaluated: read the weight in the model and give the energy its value, as in"
            " w = net.weight; UnnormalizedEnergy(lambda x: f(x, w))"
        )


@contextlib.contextmanager
def fixed_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context a module may not draw a weight that its model has not drawn.

    ``log_prob`` is called when the model has returned. A ``PyroSample`` read there is a fresh draw
    from its prior, not the value in the trace.

    Raises:
        RuntimeError: at such a read.
    """
    random = [m for m in modules if isinstance(m, PyroModule) and m._pyro_samples]
    if not random:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_RefuseSampling())
        for module in random:  # an active context turns the read into a sample statement
            stack.enter_context(module._pyro_context)
        yield
