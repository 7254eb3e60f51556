"""Starts as ``init_strategy``s: at draws of a guide, or of an earlier run.

Chains that start near the posterior need a shorter warmup. It is still needed: a guide is an
approximation, and a start from it says nothing of what the guide has missed.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.diagnostics.results import Results
from pyro_ebm.mcmc.running.reading import ReadableRun
from pyro_ebm.models.runs import sample_sites
from pyro_ebm.models.sites.joint_start import JointStart
from pyro_ebm.models.sites.latents import InitStrategy
from pyro_ebm.ops.arguments import check_callable, shown


def init_to_guide(
    guide: Callable[..., object],
    *args: object,
    fallback: InitStrategy | None = None,
    **kwargs: object,
) -> JointStart:
    """Starts each chain at a draw of a guide, all sites together.

    Args:
        guide: any of Pyro's, such as an ``AutoNormal`` after its training.
        *args: of the guide.
        fallback: where sites start that the guide does not have; by default uniformly, and a
            warning names them. (Discrete sites start at a draw from their prior.)
        **kwargs: of the guide.

    Returns:
        An ``init_strategy``. A run raises a ValueError if the guide has no site of the model, or
        values of another shape than the site's, or outside of its support.

    Example:
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> from pyro_ebm import MCMC, ChEESKernel
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1))
        >>> guide = AutoMultivariateNormal(model)
        >>> kernel = ChEESKernel(model, init_strategy=init_to_guide(guide))
        >>> MCMC(kernel, 10, 10, num_chains=20, disable_progbar=True).run()
    """
    check_callable("guide", guide)
    return JointStart(functools.partial(_of_guide, guide, args, kwargs), fallback, "the guide")


def _of_guide(
    guide: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object], num: int
) -> dict[str, Tensor]:
    with torch.no_grad():
        runs = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(num)]
    of_runs = [
        {
            name: site["value"]
            for name, site in sample_sites(run).items()
            if not site["infer"].get("is_auxiliary")  # of the guide alone, such as "_auto_latent"
        }
        for run in runs
    ]
    return {name: torch.stack([run[name] for run in of_runs]) for name in of_runs[0]}


def init_to_draws(source: object, fallback: InitStrategy | None = None) -> JointStart:
    """Starts each chain at a draw of an earlier run, all sites together.

    Each draw serves once, where there are enough for the chains that start together. Draws of one
    run are near each other, if it has not converged: what it missed, chains that start there may
    miss too.

    Args:
        source: a :class:`pyro_ebm.MCMC` or ``pyro.infer.MCMC`` that has run, or ArviZ data with a
            ``posterior``, of any library.
        fallback: where sites start that the draws do not have; by default uniformly, and a warning
            names them. (Discrete sites start at a draw from their prior.)

    Returns:
        An ``init_strategy``. A run raises a ValueError if the draws have no site of the model, or
        values of another shape than the site's, or outside of its support.

    Raises:
        RuntimeError: if the run has no draws.
        ValueError: for something else.

    Example:
        >>> from pyro_ebm import MCMC, ChEESKernel, LangevinKernel
        >>> normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> short = MCMC(ChEESKernel(normal), 20, 50, num_chains=10, disable_progbar=True)
        >>> short.run()
        >>> kernel = LangevinKernel(normal, init_strategy=init_to_draws(short))
        >>> MCMC(kernel, 10, 10, num_chains=100, disable_progbar=True).run()
    """
    samples = _draws_of(source)
    pooled = {name: x.detach().flatten(0, 1) for name, x in samples.items()}
    total = min((len(x) for x in pooled.values()), default=0)
    if total == 0:
        raise ValueError("init_to_draws needs a run that has draws of some site, and got none")
    draw = functools.partial(_some_rows, pooled, total)
    return JointStart(draw, fallback, "the earlier run")


def _some_rows(pooled: Mapping[str, Tensor], total: int, num: int) -> dict[str, Tensor]:
    rows = torch.randperm(total)[:num] if num <= total else torch.randint(total, (num,))
    return {name: x[rows.to(x.device)] for name, x in pooled.items()}


def _draws_of(source: object) -> Mapping[str, Tensor]:
    """The draws ``(chains, draws, *site)`` of a run or of ArviZ data."""
    posterior: Any = getattr(source, "posterior", None)
    if isinstance(source, ReadableRun) and source.has_store:
        posterior = source.to_arviz()["posterior"]
    if posterior is None:
        try:
            return Results.of(source).samples
        except TypeError as error:
            raise ValueError(
                "init_to_draws wants a pyro_ebm.MCMC, a pyro.infer.MCMC or ArviZ data with a"
                f" posterior, got {shown(source)}"
            ) from error
    found = {}
    for name in posterior.data_vars:
        x = torch.from_numpy(posterior[name].transpose("chain", "draw", ...).values.copy())
        found[str(name)] = x.to(torch.get_default_dtype()) if x.is_floating_point() else x
    return found
