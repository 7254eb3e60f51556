"""Runs of a Pyro model, at the places where its latents start or at given ones."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform, init_to_value
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.models.sites.init import started
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite
from pyro_ebm.ops.eval_mode import called_in_eval_mode
from pyro_ebm.ops.rows import random_state_put_back

MAX_TRIES = 20


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """A Pyro model with its arguments; a distribution is a model of one site ``"x"``.

    Example:
        >>> def model(loc):
        ...     k = pyro.sample("k", dist.Bernoulli(0.5))
        ...     return pyro.sample("x", dist.Normal(loc + k, 1.0))
        >>> bound = BoundModel(model, (torch.tensor(2.0),))
        >>> sorted(latents_of(bound.trace()))
        ['k', 'x']
        >>> value_of(bound.trace_at({"x": torch.tensor(0.5)}), "x")
        tensor(0.5000)
    """

    model: Model
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = dataclasses.field(default_factory=dict)
    init_strategy: InitStrategy = init_to_uniform
    """Gives values to the latents, as in Pyro's kernels."""

    def __post_init__(self) -> None:
        if isinstance(self.model, Distribution):
            object.__setattr__(self, "model", functools.partial(_sample_site, self.model))

    def with_model(self, model: Model) -> "BoundModel":
        """Another model, such as this one under a handler, with the same arguments."""
        return dataclasses.replace(self, model=model)

    def trace(self) -> poutine.Trace:
        """A trace at a start; discrete latents, which have none, are drawn.

        A start at which a matrix of the model is singular is drawn again.
        """
        run = InitMessenger(started(self.init_strategy))(self.model)
        for _ in range(MAX_TRIES - 1):
            with contextlib.suppress(torch.linalg.LinAlgError):
                return poutine.trace(run).get_trace(*self.args, **self.kwargs)
        return poutine.trace(run).get_trace(*self.args, **self.kwargs)

    def unvalidated_trace(self) -> poutine.Trace:
        """A trace at a start, whether its distributions' arguments are valid or not."""
        with pyro.validation_enabled(False), poutine.block():
            return self.trace()

    def trace_at(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        """A trace that is conditioned on values of latents."""
        given = poutine.condition(self.model, dict(values))
        return poutine.trace(given).get_trace(*self.args, **self.kwargs)

    def starting_at(self, trace: poutine.Trace) -> "BoundModel":
        """The model whose latents start where those of a trace are."""
        values = {name: value_of(trace, name) for name in latents_of(trace)}
        return dataclasses.replace(self, init_strategy=init_to_value(values=values))


def _sample_site(distribution: Any) -> Tensor:
    return pyro.sample("x", distribution)


def site_of(trace: poutine.Trace, name: str) -> SampleSite:
    """A sample site of a trace."""
    node: Any = trace.nodes[name]
    return node


def is_subsample(site: SampleSite) -> bool:
    """Whether a site is a choice of data."""
    message: Any = site
    return site_is_subsample(message)


def sample_sites(trace: poutine.Trace) -> dict[str, SampleSite]:
    """The sample sites of a trace but for choices of data."""
    return {
        name: site_of(trace, name)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def latents_of(trace: poutine.Trace) -> dict[str, SampleSite]:
    """The sites of a trace that are neither observed nor choices of data."""
    return {k: node for k, node in sample_sites(trace).items() if not node["is_observed"]}


def value_of(trace: poutine.Trace, name: str) -> Tensor:
    """The value of a site, detached."""
    return site_of(trace, name)["value"].detach()


@contextlib.contextmanager
def side_runs() -> Iterator[list[nn.Module]]:
    """Within this context runs of a model leave nothing behind, and draws from energies are cheap.

    Networks are in evaluation mode, handlers outside see no site, and the global random states are
    afterwards as they were.

    Yields:
        A list that holds, at the end, the networks that were called.
    """
    with (
        random_state_put_back(),
        starting_points_only(),
        poutine.block(),
        called_in_eval_mode() as called,
    ):
        yield called
