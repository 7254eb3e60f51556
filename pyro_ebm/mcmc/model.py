"""A Pyro model, with its arguments, as a potential."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.provenance import get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy, starting_points_only
from pyro_ebm.distributions.util import modules, tensors_of, unvalidated
from pyro_ebm.mcmc.normalizer_check import check_normalizers, trace_latents
from pyro_ebm.mcmc.potential import FunctionPotential, Site


class ModelPotential(FunctionPotential):
    r"""The potential of a Pyro model given its arguments.

    Latents are transformed to the reals, enumerable discrete latents are summed out, and a model
    whose unknown log Z depends on a latent is refused
    (:func:`~pyro_ebm.mcmc.normalizer_check.check_normalizers`).

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        transforms: from a site's support to the reals, for sites that want another than Pyro's.
        max_plate_nesting: as in Pyro's kernels; needed with enumerated sites.
        init_strategy: where chains start, as in Pyro's kernels; honoured for each chain.

    Raises:
        NormalizerError: if an unknown or learned log Z depends on a latent.
        ValueError: if the model has no continuous latent, or the support of one depends on
            another.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> potential = ModelPotential(model, (torch.tensor(1.0),))
        >>> potential.names, potential.dim
        (['scale'], 1)
        >>> potential.constrain(torch.zeros(2, 1))  # scale = exp(z)
        {'scale': tensor([1., 1.])}
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if isinstance(model, UnnormalizedEnergy):
            model = functools.partial(_sample_site, model)
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.init_strategy = init_strategy
        with starting_points_only(), poutine.block():
            trace = self._run()  # once in the open: parameters register before any transform
            self._refuse_subsampling(trace)
            check_normalizers(model, args, self.kwargs, init_strategy)
            all_transforms = self._find_transforms(transforms or {})
            model = _Unvalidated()(model)
            potential_fn = functools.partial(_potential, model, args, self.kwargs, all_transforms)
            if any(node["fn"].has_enumerate_support for node in _latents(trace).values()):
                _, potential_fn, _, _ = initialize_model(  # Pyro's sums the discrete sites out
                    model,
                    args,
                    self.kwargs,
                    transforms=all_transforms,
                    max_plate_nesting=max_plate_nesting,
                    init_strategy=init_strategy,
                    initial_params={},
                )
        sites = []
        for name, transform in all_transforms.items():
            value = transform(trace.nodes[name]["value"].detach())
            sites.append(Site(name, value.shape, value.dtype, transform, value.device))
        super().__init__(potential_fn, sites, modules=_modules_of(model, trace))

    def _run(self) -> poutine.Trace:
        started = InitMessenger(self.init_strategy)(self.model)
        return poutine.trace(started).get_trace(*self.args, **self.kwargs)

    def _refuse_subsampling(self, trace: poutine.Trace) -> None:
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or not site_is_subsample(node):
                continue
            size, subsample_size = node["fn"].size, node["fn"].subsample_size
            if subsample_size is not None and subsample_size < size:
                raise NotImplementedError(
                    f"plate {name!r} subsamples {subsample_size} of {size}: a chain needs the"
                    " density of all the data; give the plate no subsample_size"
                )

    def _find_transforms(self, given: Mapping[str, Transform]) -> dict[str, Transform]:
        """From the support of each continuous latent to the reals."""
        trace = trace_latents(self.model, self.args, self.kwargs, self.init_strategy)
        found = {}
        for name, node in _latents(trace).items():
            if node["fn"].has_enumerate_support:
                continue
            support = node["fn"].support
            if support.is_discrete:
                raise ValueError(
                    f"site {name!r} is discrete and cannot be summed out: {type(self).__name__}"
                    " moves continuous latents only"
                )
            if latents := get_provenance(tensors_of(support)) - {name}:
                raise ValueError(
                    f"the support of site {name!r} depends on {sorted(latents)}, so no fixed"
                    " transform maps it to the reals: sample a site on a fixed support, such as"
                    " Uniform(0, 1), and compute this one from it"
                )
            found[name] = given[name] if name in given else biject_to(support).inv
        if unknown := given.keys() - found.keys():
            raise ValueError(
                f"transforms= names {sorted(unknown)}, but the continuous latent sites are"
                f" {sorted(found)}"
            )
        if not found:
            raise ValueError(
                f"the model {_name(self.model)} has no continuous latent site to sample: every"
                " sample statement is observed or discrete"
            )
        return found

    def _draw(self, num_chains: int) -> Tensor:
        radius = _uniform_radius(self.init_strategy)
        if radius is not None:
            z = torch.empty(num_chains, self.dim, dtype=self.dtype, device=self.sites[0].device)
            return z.uniform_(-radius, radius)
        return torch.stack([self._draw_one() for _ in range(num_chains)])

    def _draw_one(self) -> Tensor:
        with torch.no_grad(), starting_points_only(), poutine.block():
            trace = self._run()
        start = {site.name: trace.nodes[site.name]["value"].detach() for site in self.sites}
        return self.ravel({site.name: site.transform(start[site.name]) for site in self.sites})

    def blame(self, z: Tensor) -> str:
        conditioned = poutine.condition(self.model, self.constrain(z))
        with pyro.validation_enabled(False), poutine.block():
            trace = poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)
        bad = []
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and not site_is_subsample(node):
                log_prob = node["fn"].log_prob(node["value"])
                if not log_prob.isfinite().all():
                    what = "nan" if log_prob.isnan().any() else "infinite"
                    bad.append(f"the log density of site {name!r} is {what}")
        return "; ".join(bad) if bad else super().blame(z)


def _latents(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


def _potential(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    transforms: dict[str, Transform],
    params: dict[str, Tensor],
) -> Tensor:
    """``U`` of one chain: minus the log joint density, minus the Jacobians of z -> x."""
    x = {name: transforms[name].inv(z) for name, z in params.items()}
    trace = poutine.trace(poutine.condition(model, x)).get_trace(*args, **kwargs)
    jacobians = [t.log_abs_det_jacobian(x[name], params[name]) for name, t in transforms.items()]
    return torch.stack([term.sum() for term in jacobians]).sum() - trace.log_prob_sum()


class _Unvalidated(Messenger):
    """Lets every site see values outside its support, as proposals are."""

    def _pyro_sample(self, msg: Any) -> None:
        if getattr(msg["fn"], "_validate_args", False):
            msg["fn"] = unvalidated(msg["fn"])


def _sample_site(energy: UnnormalizedEnergy) -> Tensor:
    return pyro.sample("x", energy)


def _modules_of(model: Any, trace: poutine.Trace) -> list[nn.Module]:
    found = list(modules(model))
    for node in trace.nodes.values():
        if node["type"] == "sample" and (energy := find_energy(node["fn"])) is not None:
            found.extend(modules(energy._energy))
    return found


def _uniform_radius(init_strategy: Callable[..., Any]) -> float | None:
    """The radius of Pyro's uniform start, which can be drawn for all chains at once."""
    if init_strategy is init_to_uniform:
        return 2.0
    if isinstance(init_strategy, functools.partial) and init_strategy.func is init_to_uniform:
        return init_strategy.keywords.get("radius", 2.0)
    return None


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)
