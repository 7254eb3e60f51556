"""Algorithms of Pyro that would go wrong without a log Z that is unknown are refused.

An energy without its log Z is fine in the losses and kernels of this package, which look at the
model first. Pyro's ELBOs and samplers do not: their calls of ``log_prob`` are checked here.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.callers import (
    Model,
    in_elbo_module,
    sampler_of_a_posterior,
)
from pyro_ebm.internals.pyro_runtime import in_svi_step

_handled: ContextVar[bool] = ContextVar("_handled", default=False)


@contextlib.contextmanager
def normalizers_handled() -> Iterator[None]:
    """Within this context an unknown log Z is no error: a loss or a sampler takes care of it."""
    if torch.compiler.is_compiling():  # nothing is checked there, and no context can be traced
        yield
        return
    token = _handled.set(True)
    try:
        yield
    finally:
        _handled.reset(token)


PosteriorCheck = Callable[[Model, tuple[object, ...], dict[str, object]], None]
"""A check of a model, its arguments and keyword arguments, which raises an error."""
_posterior_checks: list[PosteriorCheck] = []


def register_posterior_check(check: PosteriorCheck) -> None:
    """Adds a check to be made in Pyro's samplers: distributions import no models."""
    _posterior_checks.append(check)


def refuse_missing_constant(
    energy: Distribution, lags: Callable[[Tensor], bool], x: Tensor, log_prob: Tensor
) -> None:
    """Refuses algorithms of Pyro that need a log Z which is not known.

    Where a plain ELBO is trained that moves an energy, under ``SVI`` or as a module, the gradient
    of log Z is missing, and training runs away: a precision goes to 0, where :math:`E` is 0
    everywhere. The gradient in the value itself is right, so that latents with a fixed energy, and
    fixed energies as factors, may pass. Elsewhere, a posterior of latents that move the energy is
    that of another model.

    Args:
        energy: whose log Z it is.
        lags: whether a gradient moves the energy at such points without its log Z.
        x: the value of the site.
        log_prob: the log density there.

    Raises:
        ValueError: under ``SVI.step``, or in ``loss(model, guide)``, with any loss but ours.
        NormalizerError: in another algorithm of Pyro, see
            :mod:`pyro_ebm.distributions.checks.callers`.
    """
    if torch.compiler.is_compiling() or _handled.get():  # a compiler traces no check of who calls
        return
    trainer = "SVI" if in_svi_step() else None
    # a guide that draws without a gradient (scores, weights) leaves none that shows what moves
    if trainer is None or not log_prob.requires_grad:
        call = sampler_of_a_posterior()
        if call is not None and not call.is_known:
            with normalizers_handled():  # the check asks for densities too
                for check in _posterior_checks:
                    check(call.model, call.args, call.kwargs)
            call.remember()
    if not log_prob.requires_grad:
        return
    if trainer is None and in_elbo_module():
        trainer = "the ELBO"
    if trainer is not None and lags(x.detach()):
        raise ValueError(
            f"{trainer} trains something that moves {energy!r}, and a plain ELBO lacks the gradient"
            " of its log Z: use one of the losses of pyro_ebm in its place, such as"
            " ContrastiveDivergence(), or give log_normalizer= in closed form, or"
            " say constant_normalizer=True if Z does not depend on it (a location family, or minus"
            " the log of a density), or"
            " freeze a network that is not to be trained: net.requires_grad_(False)"
        )
