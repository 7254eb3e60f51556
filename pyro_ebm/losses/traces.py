"""The traces of model and guide: which energy sites there are, and what a loss refuses of them."""

from collections.abc import Callable, Iterable, Mapping

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.core.introspection import modules
from pyro_ebm.distributions.energy import find_energy
from pyro_ebm.losses.sites import EnergySite, find_site
from pyro_ebm.models.runs import site_of
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.leaves import leaves


def traces_of(
    model: Model, guide: Model, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Trace, Trace, dict[str, SampleSite]]:
    """The traces of model and guide, and the guide's nodes at observed sites: the noise.

    Raises:
        ValueError: for a guide that is no function, or seems to be the model.
    """
    if not callable(guide):
        raise ValueError(
            f"guide must be a function, got {shown(guide)}: where there are no latents, one"
            " that does nothing, as in lambda x: None"
        )
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    noise = {
        name: site_of(guide_trace, name)
        for name, site in samples(model_trace).items()
        if site["is_observed"] and name in guide_trace
    }
    for name in noise:
        guide_trace.remove_node(name)
    for name, site in samples(guide_trace).items():
        if site["is_observed"] and find_energy(site["fn"]) is not None:
            raise ValueError(
                f"the guide observes the energy site {name!r}, and the model has no such site: are"
                " model and guide swapped? It is SVI(model, guide, optim, loss)"
            )
    return model_trace, guide_trace, noise


def samples(trace: Trace) -> dict[str, SampleSite]:
    """The sample sites of a trace, by name."""
    nodes = trace.nodes.items()
    return {name: site_of(trace, name) for name, site in nodes if site["type"] == "sample"}


def parameters_in(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters of a trace, by name."""
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
    return {name: value.unconstrained() for name, value in values.items() if value is not None}


def replaced_parameters(trace: Trace) -> dict[int, str]:
    """Parameters of networks that were registered, for which Pyro's store holds others.

    The store keeps the first of a name, whatever ``pyro.module`` or a ``PyroModule`` brings later.

    Returns:
        The name that ``pyro.module`` was given, or that of the parameter in a ``PyroModule``, by
        the identity of the parameter that came later.

    Example:
        >>> def model(net):
        ...     pyro.module("energy", net)
        >>> nets = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> traces = [pyro.poutine.trace(model).get_trace(net) for net in nets]
        >>> [list(replaced_parameters(trace).values()) for trace in traces]
        [[], ['energy']]
    """
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "param" and node["value"] is not None:
            for given in node["args"][1:]:
                if isinstance(given, nn.Parameter) and given is not node["value"].unconstrained():
                    found[id(given)] = name.partition("$$$")[0]
    return found


def not_finite(*traces: Trace) -> list[str]:
    """The names of the sites whose terms are NaN or infinite."""
    sites = [pair for trace in traces for pair in samples(trace).items()]
    return [name for name, site in sites if not torch.isfinite(site["log_prob_sum"]).all()]


def energy_sites(model_trace: Trace, noise: Mapping[str, SampleSite]) -> dict[str, EnergySite]:
    """The energy sites of a model's trace, by name."""
    nodes = samples(model_trace)
    latents = {
        name: site["value"]
        for name, site in nodes.items()
        if not site["is_observed"] and site["value"].requires_grad
    }
    return {
        name: find_site(
            name,
            site,
            noise=noise.get(name),
            latents=[value for other, value in latents.items() if other != name],
            nodes=nodes,
        )
        for name, site in nodes.items()
        if find_energy(site["fn"]) is not None
    }


def check_guide(
    loss: str,
    sites: Mapping[str, EnergySite],
    guide_trace: Trace,
    elsewhere: Iterable[str],
    needs_noise: bool,
) -> None:
    """Raises a ValueError where the guide samples too much or too little.

    Args:
        loss: the name of the loss.
        sites: the energy sites.
        guide_trace: without the noise.
        elsewhere: observed sites without an energy that the guide samples.
        needs_noise: whether the loss needs noise at observed energy sites.
    """
    for name, site in sites.items():
        if site.guide_fn is not None and not needs_noise:
            raise ValueError(
                f"the guide samples the observed site {name!r}: {loss} needs no"
                " noise. Use NCE or FlowNCE, or take it out of the guide"
            )
        if not site.is_observed and name not in guide_trace:
            raise ValueError(
                f"the guide does not sample the latent energy {name!r}: give it a distribution"
                " there, its approximate posterior"
            )
    if elsewhere:
        raise ValueError(
            f"the guide samples {sorted(elsewhere)}, which the model observes and which are no"
            " energy sites: a guide holds latents, and the noise of energy sites"
        )


def refuse_score_function(sites: list[str], guide_trace: Trace) -> None:
    """Raises a ValueError for a guide without reparametrized draws before sites without log Z."""
    for name, node in samples(guide_trace).items():
        if not is_identically_zero(node["score_parts"].score_function):
            raise ValueError(
                f"the guide's site {name!r} has no reparametrized draws, and the gradient of"
                f" its score function needs the log Z of {sites}: use a distribution with"
                " rsample there"
            )


def refuse_untrained(
    loss: Tensor,
    held: Iterable[Tensor],
    model: Callable[..., object],
    trainer: str = "SVI",
    replaced: Mapping[int, str] | None = None,
) -> None:
    """Raises a ValueError for a leaf of the loss that would not be trained.

    Args:
        loss: the loss.
        held: the parameters that are trained, and points that are no parameters.
        model: where to look for the leaf's name.
        trainer: who trains them.
        replaced: see :func:`replaced_parameters`.
    """
    known, replaced = {id(p) for p in held}, replaced or {}
    for leaf in leaves(loss):
        if id(leaf) in replaced:
            raise ValueError(f"{trainer} would not train this network: {older(replaced[id(leaf)])}")
        if id(leaf) not in known:
            raise ValueError(
                f"a parameter of shape {tuple(leaf.shape)}{_where(leaf, model)} takes part in"
                f" the loss, but {trainer} does not see it and would never train it: write"
                ' pyro.module("name", net) in the model, or detach it; or train'
                " loss(model, guide) with a torch optimiser"
            )


def older(*names: str) -> str:
    """That networks or parameters have the names of older ones, and what to do."""
    return (
        f"Pyro's parameter store holds an older {', '.join(map(repr, names))}, and keeps it: call"
        " pyro.clear_param_store() before a new one is registered, or give that another name"
    )


def _where(leaf: Tensor, model: Callable[..., object]) -> str:
    for module in modules(model):
        for name, parameter in module.named_parameters():
            if parameter is leaf:
                return f" ({name!r} of {type(module).__name__})"
    return ""
