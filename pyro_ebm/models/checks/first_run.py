"""The first run of a model, the only one that Pyro validates: what is wrong with it, in words."""

import contextlib
import warnings

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm.distributions.checks.energy_calls import EnergyCallError
from pyro_ebm.models.checks.validity import Unvalidated, not_finite_sites
from pyro_ebm.models.runs import BoundModel, latents_of, sample_sites, value_of
from pyro_ebm.models.sites.joint_start import StartError
from pyro_ebm.ops.arguments import is_array, shown

MAX_TRIES = 100


class DataError(ValueError):
    """An observed value is no tensor."""


def validated_trace(bound: BoundModel, subsamples: bool = False) -> poutine.Trace:
    """A trace before any transform, which registers the parameters, and which Pyro validates.

    A random start may give a distribution arguments that it does not take: others are tried.

    Args:
        bound: the model.
        subsamples: whether plates may subsample.

    Raises:
        ValueError: if the model is not valid at any of 100 starts, its data are no tensors, or
            ``init_strategy`` gives values of other shapes; it names the site.
        NotImplementedError: if a plate subsamples.
    """
    for i in range(MAX_TRIES):
        trace = None
        try:
            trace = bound.trace()
            _refuse_shapes(trace)
            _refuse_arrays(trace)
            with warnings.catch_warnings():  # a start of no density is another's concern
                warnings.filterwarnings("ignore", "Encountered", UserWarning)
                trace.log_prob_sum()
        except (ValueError, torch.linalg.LinAlgError) as error:
            if isinstance(error.__cause__ or error, EnergyCallError | DataError | StartError):
                raise  # it is the same at any start
            if i == MAX_TRIES - 1:
                _blame_start(bound, error)
                raise
        except (RuntimeError, TypeError) as error:
            reason, kind = _without_density(trace), type(error)
            if reason is None or kind not in (RuntimeError, TypeError, NotImplementedError):
                raise
            if kind is NotImplementedError:
                kind, reason = ValueError, f"{reason}; rewrite it, or see pyro.infer.reparam"
            raise kind(f"{reason}: {error}") from error
        else:
            if not subsamples:
                _refuse_subsampling(trace)
            return trace
    raise AssertionError


def _refuse_shapes(trace: poutine.Trace) -> None:
    for name, node in latents_of(trace).items():
        want, got = tuple(node["fn"].shape()), tuple(value_of(trace, name).shape)
        if got != want:
            raise ValueError(f"init_strategy starts site {name!r} at shape {got}, not {want}")


def _refuse_arrays(trace: poutine.Trace) -> None:
    """Raises a DataError for an observed array or list, which torch's densities do not take."""
    for name, node in sample_sites(trace).items():
        x = node["value"]
        array = not isinstance(x, Tensor) and is_array(x) and getattr(x, "ndim", 1) > 0
        if node["is_observed"] and array:
            raise DataError(
                f"the data at site {name!r} must be a tensor, got {shown(x)}: use torch.as_tensor"
            )


def _without_density(trace: poutine.Trace | None) -> str | None:
    """In words, the first site whose log density could not be computed."""
    for name, node in sample_sites(trace).items() if trace is not None else ():
        if "log_prob_sum" not in node:
            fn, x = node["fn"], node["value"]
            what = f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else shown(x)
            return (
                f"site {name!r} has no log density: {type(fn).__name__} of shape"
                f" {tuple(fn.shape())} cannot compute it, or not at a value of {what}"
            )
    return None


def _blame_start(bound: BoundModel, error: Exception) -> None:
    bad: list[str] = []
    with pyro.validation_enabled(False), contextlib.suppress(RuntimeError, TypeError):
        bad = not_finite_sites(bound.with_model(Unvalidated()(bound.model)).trace(), {})
    if bad:
        raise ValueError(
            f"the model is not valid in {MAX_TRIES} tries: {'; '.join(bad)} ({error})"
        ) from error


def _refuse_subsampling(trace: poutine.Trace) -> None:
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not site_is_subsample(node):
            continue
        size, subsample_size = node["fn"].size, node["fn"].subsample_size
        if subsample_size is not None and subsample_size < size:
            raise NotImplementedError(
                f"plate {name!r} subsamples {subsample_size} of {size}, and this kernel needs the"
                " density of all the data: give the plate no subsample_size, or use SGLDKernel or"
                " SGHMCKernel, which look at another subsample in each step"
            )
