"""A model as Pyro's own kernels evaluate it, with the checks that this package makes of its own."""

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_ebm.models.checks.fixed_density import FixedLatents, moving_support
from pyro_ebm.models.checks.fixed_supports import moving_supports
from pyro_ebm.models.checks.validity import Unvalidated, what_to_check
from pyro_ebm.models.provenance import HostReads, trace_latents
from pyro_ebm.models.runs import BoundModel, side_runs


class CheckedModel:
    """A model that raises where its latents come and go, and has no density where it is invalid.

    Args:
        bound: the model, with the arguments that it will be run with.
        rejects: whether invalid states have no density; else Pyro's validation may raise.

    Raises:
        ValueError: if the support of a latent depends on others.

    Example:
        >>> def model():
        ...     a = pyro.sample("a", dist.Normal(1.0, 1.0))
        ...     pyro.sample("y", dist.Gamma(a, 1.0), obs=torch.tensor(0.5))
        >>> a = {"a": torch.tensor(-0.5)}
        >>> checked = poutine.condition(CheckedModel(BoundModel(model), True), a)
        >>> with pyro.validation_enabled(False):
        ...     poutine.trace(checked).get_trace().log_prob_sum()
        tensor(-inf)
    """

    def __init__(self, bound: BoundModel, rejects: bool):
        self.model = model = bound.model
        self.__name__ = getattr(model, "__name__", type(model).__name__)
        with side_runs():
            try:
                validated = bound.trace()
            except ValueError:  # at an unlucky start
                validated = poutine.Trace()
            with HostReads() as reads:
                tracked = trace_latents(bound)
            for name, latents in moving_supports(bound).items():
                if not tracked.nodes[name]["fn"].support.is_discrete:
                    raise ValueError(moving_support(name, str(sorted(latents) or "another latent")))
        self._rejects = rejects
        self._handlers: list[Messenger] = [FixedLatents(enumerates=True)]
        if rejects:
            self._handlers.append(Unvalidated(what_to_check(tracked, validated, reads.latents)))

    def __call__(self, *args: object, **kwargs: object) -> object:
        """A run of the model."""
        run = self.model
        for handler in reversed(self._handlers):
            run = handler(run)
        if not self._rejects:
            return run(*args, **kwargs)
        with pyro.validation_enabled(False):  # a worker process starts with it
            return run(*args, **kwargs)
