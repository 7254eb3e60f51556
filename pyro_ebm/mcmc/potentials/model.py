"""A Pyro model, with its arguments, as a potential."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_uniform, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform, identity_transform

from pyro_ebm.distributions.checks.boundary import inside
from pyro_ebm.distributions.checks.elbo_guard import normalizers_handled
from pyro_ebm.distributions.checks.energy_calls import EnergyCallError
from pyro_ebm.distributions.core.introspection import modules
from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.distributions.core.supports import plain_support
from pyro_ebm.distributions.core.wrappers import unmasked
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.potentials.base import FunctionPotential
from pyro_ebm.models.checks.fixed_density import FixedLatents, moving_support, random_part
from pyro_ebm.models.checks.fixed_supports import moving_supports
from pyro_ebm.models.checks.intractability import check_normalizers
from pyro_ebm.models.checks.validity import Checked, Unvalidated, invalid_parts, what_to_check
from pyro_ebm.models.masks import FillMasked, idle_elements, masked_elements, with_normal
from pyro_ebm.models.provenance import HostReads, trace_latents
from pyro_ebm.models.sites.discrete_sites import (
    OTHER_WAYS,
    UNBOUNDED,
    WithinBounds,
    is_integer,
    site_support_values,
)
from pyro_ebm.models.sites.given_transforms import check_transform
from pyro_ebm.models.sites.init import latents_of, started, trace_from_start
from pyro_ebm.models.sites.latents import DataError, refuse_arrays, transform_of, without_density
from pyro_ebm.models.sites.site import Site, to_support
from pyro_ebm.ops.arguments import check_callable, check_mapping
from pyro_ebm.ops.eval_mode import called_in_eval_mode, unique

MAX_OPEN_TRIES = 10


class ModelPotential(FunctionPotential):
    r"""The potential of a Pyro model given its arguments.

    Latents, if there are any, are transformed to the reals, enumerable discrete latents are summed
    out, and a model whose unknown log Z depends on a latent is refused
    (:func:`~pyro_ebm.models.checks.intractability.check_normalizers`).

    Args:
        model: a Pyro model, or a distribution: a model of one site ``"x"``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        transforms: from a site's support to the reals, for sites that want another than Pyro's.
        max_plate_nesting: as in Pyro's kernels; needed with enumerated sites.
        init_strategy: where chains start, as in Pyro's kernels; honoured for each chain. Discrete
            sites start at draws from their prior.
        keep_discrete: whether discrete latents are sites to be sampled, and not summed out.

    Raises:
        NormalizerError: if an unknown or learned log Z depends on a latent.
        ValueError: if the support of a latent depends on another, the model is not one fixed
            density (:mod:`pyro_ebm.models.checks.fixed_density`), ``transforms`` do not map
            supports onto the reals, or the model is not valid (where ``pyro.enable_validation``
            has it checked): the run that finds its sites is the only one that is validated. Later
            states that are not valid have no density (:mod:`pyro_ebm.models.checks.validity`).

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

    idle: Mapping[str, Tensor] = MappingProxyType({})
    """Elements of masked latents that nothing depends on, see :mod:`pyro_ebm.models.masks`."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
        keep_discrete: bool = False,
    ):
        check_callable("model", model, "a Pyro model, or a distribution")
        if transforms is not None:
            check_mapping("transforms", transforms, Transform, "transforms")
        if isinstance(model, Distribution):
            model = functools.partial(_sample_site, model)
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.init_strategy, self.keep_discrete = init_strategy, keep_discrete
        self._fixed = FixedLatents()
        held = modules(model)
        with starting_points_only(), poutine.block(), called_in_eval_mode() as called:
            fill = FillMasked()
            self.model = fill(model)
            trace = self._run_in_the_open()
            fill.looks = False
            self.model = model = self.model if fill.names else model
            self._refuse_subsampling(trace)
            self._check_normalizers()
            reads = HostReads()
            with reads:
                tracked = self._tracked(trace)
            all_transforms = self._find_transforms(trace, transforms or {})
            self._checked = what_to_check(tracked, trace, reads.latents)
            model = self._unvalidated = self._fixed(Unvalidated(self._checked)(model))
            latents = {name: node["fn"] for name, node in latents_of(trace).items()}
            support_values = {
                name: site_support_values(name, latents[name]) for name in all_transforms
            }
            for name in self._moving_supports.intersection(support_values):
                support_values[name] = UNBOUNDED  # whole numbers whose bounds move
            whole = [name for name, values in support_values.items() if values is UNBOUNDED]
            potential_fn = functools.partial(
                _potential, model, args, self.kwargs, all_transforms, whole
            )
            if any(map(_is_discrete, latents.values())) and not keep_discrete:
                self._fixed.enumerates = True
                # the run in the open was validated, and the normalizers have been checked
                with pyro.validation_enabled(False), normalizers_handled():
                    _, potential_fn, _, _ = initialize_model(  # sums the discrete sites out
                        model,
                        args,
                        self.kwargs,
                        transforms=all_transforms,
                        max_plate_nesting=max_plate_nesting,
                        init_strategy=started(init_strategy),
                        initial_params={},
                    )
        # discrete latents that are summed out, at some value
        self._summed_out = {
            name: _value(trace, name) for name in latents_of(trace) if name not in all_transforms
        }
        sites = []
        for name, transform in all_transforms.items():
            value = _to_reals(transform, _value(trace, name))
            site = Site(name, value.shape, value.dtype, transform, value.device)
            sites.append(site._replace(support_values=support_values[name]))
        super().__init__(potential_fn, sites, modules=unique(held, called))
        if any(_is_masked(node) for node in latents_of(trace).values()):
            self._without_idle()
        if not any(site.dtype.is_floating_point for site in sites):  # as precise as the density
            log_p = torch.as_tensor(trace.log_prob_sum())
            self.dtype = torch.promote_types(self.dtype, log_p.dtype)
            self.device = self.device if sites else log_p.device

    def _without_idle(self) -> None:
        """Gives masked elements that nothing depends on a density, so that they do not drift."""
        run = (self.model, self.args, self.kwargs, self.init_strategy)
        with self._quiet(), starting_points_only(), poutine.block(), torch.random.fork_rng(()):
            found = masked_elements(functools.partial(trace_latents, *run))
            masked = {name: where for name, where in found.items() if name in self.names}
            if masked:
                parts = (self.potential_fn, self._somewhere, self.transforms, masked)
                self.idle = idle_elements(*parts)
        if self.idle:
            self.potential_fn = functools.partial(with_normal, self.potential_fn, self.idle)

    def _somewhere(self) -> dict[str, Tensor]:
        z = torch.cat([site.start(1, self.dtype) for site in self.sites], -1)
        return self.unravel(z[0])

    def _check_normalizers(self) -> None:
        check_normalizers(self.model, self.args, self.kwargs, self.init_strategy)

    def _run(self, model: Callable[..., Any]) -> poutine.Trace:
        return trace_from_start(model, self.args, self.kwargs, self.init_strategy)

    def _run_in_the_open(self) -> poutine.Trace:
        """A run before any transform: it registers the parameters, and Pyro validates it."""
        trace, tries = None, 0
        while trace is None:
            try:
                trace = self._run(self._fixed(self.model))
                _check_shapes(trace)
                refuse_arrays(trace)
                with warnings.catch_warnings():  # a start of no density is another's concern
                    warnings.filterwarnings("ignore", "Encountered", UserWarning)
                    trace.log_prob_sum()
            except (ValueError, torch.linalg.LinAlgError) as error:
                # a random start may give a distribution arguments that it does not take
                trace, tries = None, tries + 1
                if isinstance(error.__cause__ or error, EnergyCallError | DataError):
                    raise  # it is the same at any start
                if tries == MAX_OPEN_TRIES:
                    self._blame_start(error)
                    raise
            except (RuntimeError, TypeError) as error:
                reason, kind = without_density(trace), type(error)
                if reason is None or kind not in (RuntimeError, TypeError, NotImplementedError):
                    raise
                if kind is NotImplementedError:
                    kind, reason = ValueError, f"{reason}; rewrite it, or see pyro.infer.reparam"
                raise kind(f"{reason}: {error}") from error
        return trace

    def _blame_start(self, error: Exception) -> None:
        bad: list[str] = []
        with pyro.validation_enabled(False), contextlib.suppress(RuntimeError, TypeError):
            trace = self._run(Unvalidated()(self.model))
            bad = _not_finite_sites(trace, {})
        if bad:
            raise ValueError(
                f"the model is not valid in {MAX_OPEN_TRIES} tries: {'; '.join(bad)} ({error})"
            ) from error

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

    def _tracked(self, trace: poutine.Trace) -> poutine.Trace:
        """A run at the same latents in which tensors know which of them they come from."""
        values = {name: _value(trace, name) for name in latents_of(trace)}
        again = init_to_value(values=values)
        return trace_latents(self.model, self.args, self.kwargs, again)

    def _find_transforms(
        self, trace: poutine.Trace, given: Mapping[str, Transform]
    ) -> dict[str, Transform]:
        """From the support of each continuous latent to the reals."""
        values = {name: _value(trace, name) for name in latents_of(trace)}
        again = init_to_value(values=values)
        moving = moving_supports(self.model, self.args, self.kwargs, again)
        self._moving_supports = frozenset(moving)
        found = {}
        for name, node in latents_of(trace).items():
            support, enumerable = node["fn"].support, node["fn"].has_enumerate_support
            if not self.keep_discrete and enumerable:
                continue
            if not self.keep_discrete and support.is_discrete:
                way = "use MHKernel(proposal=IntegerWalk()), in a CompositeKernel beside this one"
                raise ValueError(
                    f"site {name!r} is discrete and cannot be summed out: this kernel moves"
                    f" continuous latents only. So {way if is_integer(support) else OTHER_WAYS}"
                )
            if name in moving and not is_integer(support):
                latents = sorted(moving[name]) or "another latent"
                raise ValueError(moving_support(name, str(latents)))
            if name in given and not support.is_discrete:
                found[name] = given[name]
                value = _value(trace, name)
                check_transform(name, given[name], support, value)
            elif support.is_discrete:
                found[name] = identity_transform
            else:
                found[name] = transform_of(name, node["fn"])
        reals = [name for name in found if not trace.nodes[name]["fn"].support.is_discrete]
        if unknown := given.keys() - set(reals):
            raise ValueError(
                f"transforms= names {sorted(unknown)}, but the continuous latent sites are"
                f" {sorted(reals)}"
            )
        return found

    def _draw(self, num_chains: int) -> Tensor:
        radius = _uniform_radius(self.init_strategy)
        if radius is not None and all(site.support_values is None for site in self.sites):
            z = torch.empty(num_chains, self.dim, dtype=self.dtype, device=self.device)
            return z.uniform_(-radius, radius)
        return torch.stack([self._draw_one() for _ in range(num_chains)])

    def _draw_one(self) -> Tensor:
        with torch.no_grad(), self._quiet(), starting_points_only(), poutine.block():
            try:
                trace = self._run(self._unvalidated)
            except torch.linalg.LinAlgError:  # no start: the next try draws another
                nothing = {"dtype": self.dtype, "device": self.device}
                return torch.full((self.dim,), torch.nan, **nothing)
        return self.ravel({s.name: _position(s, trace) for s in self.sites})

    def blame(self, z: Tensor) -> str:
        """What is not finite at the position ``(dim,)``, in words."""
        parts = zip(self.sites, z.split(self.sizes), strict=True)
        if infinite := [site.name for site, part in parts if part.isinf().any()]:
            return f"site(s) {infinite} start on the boundary of the support, or at infinity"
        with self._quiet(), starting_points_only(), poutine.block():
            try:
                bad = _not_finite_sites(self._trace_at(z), self._checked)
            except torch.linalg.LinAlgError as error:
                return f"a matrix in the model is singular ({error})"
        return "; ".join(bad) if bad else super().blame(z)

    def random_part(self, z: Tensor) -> str:
        """What of a random potential is random at positions ``(chains, dim)``, in words."""
        with self._quiet(), starting_points_only(), poutine.block():
            return random_part([functools.partial(self._trace_at, row) for row in z])

    def _trace_at(self, z: Tensor) -> poutine.Trace:
        """A run of the model at a position ``(dim,)``."""
        given = {**self._summed_out, **self.constrain(z)}
        conditioned = poutine.condition(self._unvalidated, given)
        return poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)


def lone_energy(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    init_strategy: Callable[..., Any] = init_to_uniform,
) -> tuple[str, UnnormalizedEnergy] | None:
    """The energy of a model that consists of it and of nothing else, with the site's name.

    Its own blocks can then be resampled: nothing else weighs on them.

    Example:
        >>> p = UnnormalizedEnergy(torch.square)
        >>> lone_energy(lambda: pyro.sample("y", p), (), {})
        ('y', UnnormalizedEnergy(energy=square, event_shape=(), log_normalizer=unknown))
    """
    if isinstance(model, Distribution):
        model = functools.partial(_sample_site, model)
    reads = HostReads()
    try:
        with torch.random.fork_rng(devices=()), starting_points_only(), called_in_eval_mode():
            with poutine.block():
                trace = trace_from_start(model, args, kwargs, init_strategy)
            with reads:
                trace_latents(model, args, kwargs, init_strategy)
    except (ValueError, torch.linalg.LinAlgError):
        return None  # an unlucky start of a model with more sites: ModelPotential tries again
    if reads.latents:
        return None  # a branch may have factors on its other side
    nodes = {name: n for name, n in trace.nodes.items() if n["type"] == "sample"}
    if len(nodes) != 1:
        return None
    ((name, node),) = nodes.items()
    scale = torch.as_tensor(node["scale"])
    plain = not node["is_observed"] and node["mask"] is None and scale.dim() == 0 and scale == 1
    fn = node["fn"]
    bare = isinstance(fn, UnnormalizedEnergy) and not fn.batch_shape
    return (name, fn) if plain and bare and site_support_values(name, fn) is not UNBOUNDED else None


def _is_discrete(fn: Any) -> bool:
    return fn.has_enumerate_support or fn.support.is_discrete


def _is_masked(node: Any) -> bool:
    mask = unmasked(node["fn"], node["mask"])[1]
    return mask is not None and not bool(mask.all())


def _check_shapes(trace: poutine.Trace) -> None:
    for name, node in latents_of(trace).items():
        want, got = tuple(node["fn"].shape()), tuple(_value(trace, name).shape)
        if got != want:
            raise ValueError(f"init_strategy starts site {name!r} at shape {got}, not {want}")


def _not_finite_sites(trace: poutine.Trace, checked: Mapping[str, Checked]) -> list[str]:
    bad: list[str] = []
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node):
            log_prob = node["fn"].log_prob(node["value"])
            if not log_prob.isfinite().all():
                what = "nan" if log_prob.isnan().any() else "infinite"
                parts = invalid_parts(node["fn"], _value(trace, name), checked.get(name))
                why = "".join(f", as {part}" for part in parts)
                bad.append(f"the log density of site {name!r} is {what}{why}")
    return bad


def _potential(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    transforms: dict[str, Transform],
    whole: Sequence[str],
    params: dict[str, Tensor],
) -> Tensor:
    """``U`` of one chain: minus the log joint density, minus the Jacobians of z -> x.

    The sites ``whole`` of whole numbers are proposed outside of their support too, where the
    potential is infinite.
    """
    x = {name: to_support(transforms[name], z) for name, z in params.items()}
    at_x = WithinBounds(whole)(poutine.condition(model, x))
    trace = poutine.trace(at_x).get_trace(*args, **kwargs)
    if not transforms:
        return -torch.as_tensor(trace.log_prob_sum())
    jacobians = [t.log_abs_det_jacobian(x[name], params[name]) for name, t in transforms.items()]
    potential = torch.stack([term.sum() for term in jacobians]).sum() - trace.log_prob_sum()
    for name in whole:
        inside = trace.nodes[name]["fn"].support.check(x[name]).all()
        potential = potential.where(inside, torch.inf)
    return potential


def _sample_site(distribution: Any) -> Tensor:
    return pyro.sample("x", distribution)


def _value(trace: poutine.Trace, name: str) -> Tensor:
    value: Any = trace.nodes[name]["value"]
    return value.detach()


def _position(site: Site, trace: poutine.Trace) -> Tensor:
    """The unconstrained value of a site, infinite where the value lies on the boundary."""
    x, fn = _value(trace, site.name), cast(Any, trace.nodes[site.name]["fn"])
    z = _to_reals(site.transform, x)
    if site.support_values is None and site.transform is not identity_transform:
        try:
            support = plain_support(fn.support)
        except NotImplementedError:  # it does not tell
            return z
        if not inside(support, x, site.transform.inv).all():
            return torch.full_like(z, torch.inf)
    return z


def _to_reals(transform: Transform, x: Tensor) -> Tensor:
    z: Any = transform(x)
    return z


def _uniform_radius(init_strategy: Callable[..., Any]) -> float | None:
    """The radius of Pyro's uniform start, which can be drawn for all chains at once."""
    if init_strategy is init_to_uniform:
        return 2.0
    if isinstance(init_strategy, functools.partial) and init_strategy.func is init_to_uniform:
        return init_strategy.keywords.get("radius", 2.0)
    return None
