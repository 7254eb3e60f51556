r"""Runs as ArviZ data: the draws, the statistics of the kernel, the observed values.

One converter serves :class:`pyro_ebm.MCMC` and ``pyro.infer.MCMC``. It builds every group out of
plain arrays with named axes, and only its last step depends on the ArviZ that is installed: the
result is an ``arviz.InferenceData`` before ArviZ 1.0 and an ``xarray.DataTree`` since, equal in
groups, variables, dimensions, coordinates and values.
"""

import datetime
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyro
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_ebm.diagnostics.replay import Replay, is_factor
from pyro_ebm.diagnostics.results import Results
from pyro_ebm.distributions.core.wrappers import composite_part
from pyro_ebm.ops.arguments import shown

DRAWS = ("chain", "draw")
Array = Tensor | ArrayLike


def to_arviz(
    mcmc: object,
    *,
    log_likelihood: bool = False,
    unnormalized: bool = False,
    posterior_predictive: Mapping[str, Array] | None = None,
    prior: Mapping[str, Array] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
) -> Any:
    """Converts a run to ArviZ data.

    The groups are ``posterior``; ``sample_stats``, with what the kernel reports of ``lp``,
    ``acceptance_rate``, ``step_size`` and ``diverging``; ``observed_data``; on request
    ``log_likelihood``, ``posterior_predictive``, ``prior`` and ``prior_predictive``; and
    ``warmup_posterior`` and ``warmup_sample_stats`` if the run saved its warmup. Dimensions have
    the names of the model's plates, else ``{site}_dim_{axis}``. ``pyro.factor`` and sites whose
    observed value is computed from latents are not in ``observed_data``, and values of
    ``pyro.deterministic`` in no group: compute them of the draws, ``data.posterior["a"] ** 2``.

    Args:
        mcmc: a :class:`pyro_ebm.MCMC` or ``pyro.infer.MCMC`` after its run, with any kernel.
        log_likelihood: whether to compute the log density of every observed element at every
            draw, shape ``(chains, draws, *batch)``: 0 where masked, and without
            ``poutine.scale``. The model runs anew with the arguments of the run.
        unnormalized: whether to add the observed sites whose log Z is unknown or learned, as
            ``{site}_unnormalized``: their log density up to a constant. Without it, they are left
            out with a warning.
        posterior_predictive: draws of ``pyro.infer.Predictive``, each of shape
            ``(chains * draws, *site)`` or ``(chains, draws, *site)``.
        prior: draws from the prior, each of shape ``(num, *site)``, which makes one chain, or
            ``(chains, draws, *site)``. The observed sites among them go to ``prior_predictive``.
        coords: labels of dimensions, where they should not be 0, 1, 2, ...
        dims: names of a site's dimensions after chain and draw, where they should not be those
            above; None keeps a name.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        RuntimeError: if ``mcmc`` has not run.
        TypeError: if ``mcmc`` keeps no draws.
        ValueError: for names that the run does not have, shapes that do not fit, or a
            log-likelihood that is not defined.

    Example:
        >>> from pyro_ebm import MCMC, LangevinKernel
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("person", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(LangevinKernel(model), 100, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.tensor([0.5, 1.5]))
        >>> data = to_arviz(mcmc, log_likelihood=True, coords={"person": ["Ada", "Emmy"]})
        >>> data["log_likelihood"]["y"].sel(person="Emmy").shape
        (4, 100)
    """
    if unnormalized and not log_likelihood:
        raise ValueError("unnormalized=True adds to the log-likelihood: give log_likelihood=True")
    results = Results.of(mcmc)
    run = _Run(results)
    groups = {"posterior": run.drawn(results.samples)}
    if posterior_predictive is not None:
        group = "posterior_predictive"
        groups[group] = run.predictive(group, posterior_predictive)
    if log_likelihood:
        groups["log_likelihood"] = run.log_likelihood(unnormalized)
    groups["sample_stats"] = _statistics(results.fields)
    if prior is not None:
        variables, seen = run.predictive("prior", prior), run.replay.observed
        groups["prior"] = {k: v for k, v in variables.items() if k not in seen}
        groups["prior_predictive"] = {k: v for k, v in variables.items() if k in seen}
    groups["observed_data"] = run.observed_data()
    groups["warmup_posterior"] = run.drawn(results.warmup_samples or {})
    groups["warmup_sample_stats"] = _statistics(results.warmup_fields)
    groups = {group: variables for group, variables in groups.items() if variables}
    return _to_library(
        _renamed(groups, dims or {}), coords or {}, attributes(results.num_superchains)
    )


def open_store(path: str | os.PathLike[str]) -> Any:
    """The draws that a run streamed to a Zarr store, as ArviZ data.

    They are read from the disk where they are looked at, and so may be larger than memory.

    Args:
        path: the ``store`` that was given to :class:`pyro_ebm.MCMC`.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.
    """
    import arviz
    import xarray

    tree = xarray.open_datatree(path, engine="zarr")
    return tree if _has_trees(arviz) else arviz.InferenceData.from_datatree(tree)


def attributes(num_superchains: int | None = None) -> dict[str, str | int]:
    """The attributes of each group, which say what made it, when, and of how many super-chains."""
    superchains = {} if num_superchains is None else {"num_superchains": num_superchains}
    return {
        **superchains,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "pyro_ebm",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }


class Variable(NamedTuple):
    """An array with a name for each axis."""

    values: np.ndarray
    dims: tuple[str, ...]
    site: str | None = None
    """The site it belongs to, by which the user's ``dims`` name it."""


Groups = dict[str, dict[str, Variable]]


class _Run:
    """The draws of a run, with the names that its model gives to their axes."""

    def __init__(self, results: Results):
        self.shape = results.shape
        flat = {name: value.flatten(0, 1) for name, value in results.samples.items()}
        arguments = results.model, results.args, results.kwargs
        self.replay = Replay(*arguments, flat, math.prod(self.shape))

    def dims(
        self, name: str, shape: Sequence[int], event_dim: int | None = None
    ) -> tuple[str, ...]:
        """A name for each axis of a site's value, or with ``event_dim=0`` of its log density."""
        plates = {}
        if (site := self.replay.sites.get(name)) is not None:
            event_dim = site["fn"].event_dim if event_dim is None else event_dim
            plates = {
                (frame.dim - event_dim, int(frame.size)): frame.name
                for frame in site["cond_indep_stack"]
                if frame.dim is not None and frame.name not in DRAWS
            }
        axes = enumerate(shape)
        return tuple(plates.get((i - len(shape), n), f"{name}_dim_{i}") for i, n in axes)

    def drawn(self, samples: Mapping[str, Tensor | np.ndarray]) -> dict[str, Variable]:
        """Draws of shape ``(chains, draws, *site)``."""
        return {
            name: Variable(_numpy(value), DRAWS + self.dims(name, value.shape[2:]), name)
            for name, value in samples.items()
            if value.shape[1] > 0
        }

    def observed_data(self) -> dict[str, Variable]:
        """The observed values that are the same at every draw."""
        names = [name for name in self.replay.observed if self.replay.is_data(name)]
        values = {name: _numpy(self.replay.sites[name]["value"]) for name in names}
        return {name: Variable(v, self.dims(name, v.shape), name) for name, v in values.items()}

    def predictive(self, group: str, given: Mapping[str, Array]) -> dict[str, Variable]:
        """The arrays that ``pyro.infer.Predictive`` returned, with named axes."""
        chains, draws = self.shape
        arrays = {}
        for name, value in given.items():
            array, site = _numpy(value), self.replay.sites.get(name)
            if site is not None and is_factor(site):
                continue
            if array.shape[:2] != self.shape:
                if group == "prior" and array.ndim > 0:
                    array = array[None]
                elif array.shape[:1] == (chains * draws,):
                    array = array.reshape(self.shape + array.shape[1:])
                else:
                    first = "num" if group == "prior" else str(chains * draws)
                    raise ValueError(
                        f"{group}[{name!r}] must have shape ({first}, ...) or"
                        f" ({chains}, {draws}, ...), got {array.shape}"
                    )
            if site is not None:  # Predictive puts axes of size 1 before those of some sites
                shape = array.shape[2:]
                extra = max(len(shape) - site["value"].dim(), 0)
                if shape[:extra] == (1,) * extra:
                    array = array.reshape(array.shape[:2] + shape[extra:])
            arrays[name] = array
        return self.drawn(arrays)

    def log_likelihood(self, unnormalized: bool) -> dict[str, Variable]:
        """The pointwise log-likelihood of every site that has one."""
        replay = self.replay
        if replay.undrawn:
            raise ValueError(
                "log_likelihood=True needs draws of every latent, and the run has none of"
                f" {replay.undrawn}: keep them (save_params), or write a site that is summed out"
                " as a mixture, such as MixtureSameFamily"
            )
        kept, left_out = {}, []
        for name in replay.observed:
            if not replay.is_data(name):
                left_out.append(
                    f"site {name!r} is not data: its observed value is computed from latents"
                )
            elif composite_part(replay.sites[name]["fn"]) is not None:
                left_out.append(
                    f"site {name!r} is a pseudolikelihood, and no log density of the data"
                )
            elif replay.is_normalized(name):
                kept[name] = name
            elif unnormalized:
                kept[name] = f"{name}_unnormalized"
            else:
                left_out.append(
                    f"the log Z of site {name!r} is not known, so its log density is off by a"
                    " constant: give log_normalizer= to its energy, or unnormalized=True to have"
                    f" it as '{name}_unnormalized'"
                )
        if not kept:
            reasons = "; ".join(left_out) or "the model observes no data"
            raise ValueError(f"there is no log-likelihood: {reasons}")
        for reason in left_out:
            warnings.warn(f"left out of log_likelihood: {reason}", stacklevel=3)
        result = {}
        for name, value in replay.log_density(list(kept)).items():
            batch = value.shape[1:]
            array = _numpy(value).reshape(self.shape + batch)
            result[kept[name]] = Variable(array, DRAWS + self.dims(name, batch, event_dim=0), name)
        return result


def _statistics(fields: Mapping[str, Tensor]) -> dict[str, Variable]:
    return {k: Variable(_numpy(v), DRAWS) for k, v in fields.items() if v.shape[1] > 0}


def _renamed(groups: Groups, dims: Mapping[str, Sequence[str | None]]) -> Groups:
    """The groups with the user's names of dimensions."""
    sites = {v.site for variables in groups.values() for v in variables.values() if v.site}
    if unknown := sorted(dims.keys() - sites):
        raise ValueError(f"dims names {unknown}, the sites are {sorted(sites)}")

    def rename(group: str, variable: Variable) -> Variable:
        if variable.site is None or variable.site not in dims:
            return variable
        lead = 0 if group == "observed_data" else len(DRAWS)
        given, own = dims[variable.site], variable.dims[lead:]
        if isinstance(given, str) or set(given) & set(DRAWS):
            raise ValueError(
                f"dims[{variable.site!r}] must be a list of the names after chain and draw, got"
                f" {shown(given)}"
            )
        given = list(given)
        if group == "log_likelihood":  # of a site's dimensions it has the first, the batch
            given = given[: len(own)]
        if len(given) > len(own):
            raise ValueError(
                f"dims[{variable.site!r}] has {len(given)} names, but in {group} there are"
                f" {len(own)} dimensions, {list(own)}"
            )
        given += [None] * (len(own) - len(given))
        new = tuple(name or old for name, old in zip(given, own, strict=True))
        return variable._replace(dims=variable.dims[:lead] + new)

    return {g: {k: rename(g, v) for k, v in vs.items()} for g, vs in groups.items()}


def _to_library(
    groups: Groups, coords: Mapping[str, ArrayLike], attrs: Mapping[str, str | int]
) -> object:
    """The groups as data of the ArviZ that is installed."""
    import arviz
    import xarray

    known = {d for vs in groups.values() for v in vs.values() for d in v.dims} - set(DRAWS)
    if unknown := sorted(coords.keys() - known):
        raise ValueError(f"coords names {unknown}, the dimensions are {sorted(known)}")
    datasets: dict[str, Any] = {}
    for group, variables in groups.items():
        labels = {}
        for name, variable in variables.items():
            for dim, size in zip(variable.dims, variable.values.shape, strict=True):
                labels[dim] = np.asarray(coords[dim]) if dim in coords else np.arange(size)
                if labels[dim].shape != (size,):
                    raise ValueError(
                        f"coords[{dim!r}] must be {size} labels, for {name!r} in {group}, got"
                        f" {labels[dim].size}"
                    )
        data = {name: (variable.dims, variable.values) for name, variable in variables.items()}
        datasets[group] = xarray.Dataset(data, coords=labels, attrs=attrs)
    if _has_trees(arviz):
        return xarray.DataTree.from_dict(datasets)
    return arviz.InferenceData(**datasets)


def _has_trees(arviz: ModuleType) -> bool:
    """Whether this ArviZ keeps data in an ``xarray.DataTree``."""
    return int(arviz.__version__.split(".")[0]) >= 1


def _numpy(value: Array) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
