"""A Pyro model, with its arguments, as a potential."""

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions.transforms import Transform, identity_transform

from pyro_ebm.distributions.checks.boundary import inside
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.checks.elbo_guard import normalizers_handled
from pyro_ebm.distributions.core.introspection import modules
from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.distributions.core.supports import as_function, plain_support, stated_support
from pyro_ebm.distributions.core.wrappers import unmasked
from pyro_ebm.mcmc.potentials.function import FunctionPotential
from pyro_ebm.models.checks.first_run import validated_trace
from pyro_ebm.models.checks.fixed_density import FixedLatents, random_part
from pyro_ebm.models.checks.fixed_supports import moving_supports
from pyro_ebm.models.checks.intractability import check_normalizers
from pyro_ebm.models.checks.validity import Unvalidated, not_finite_sites, what_to_check
from pyro_ebm.models.masks import FillMasked, idle_elements, masked_elements, with_normal
from pyro_ebm.models.provenance import HostReads, trace_latents
from pyro_ebm.models.runs import BoundModel, latents_of, side_runs, site_of, value_of
from pyro_ebm.models.sites.discrete_sites import UNBOUNDED, WithinBounds, site_support_values
from pyro_ebm.models.sites.init import started
from pyro_ebm.models.sites.joint_start import JointStart
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite, init_near_zero, support_of
from pyro_ebm.models.sites.site import Site, to_support
from pyro_ebm.models.transforms import transforms_of
from pyro_ebm.ops.arguments import check_callable, check_mapping
from pyro_ebm.ops.eval_mode import called_in_eval_mode, unique


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
        model: Model,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: InitStrategy = init_near_zero,
        keep_discrete: bool = False,
    ):
        check_callable("model", model, "a Pyro model, or a distribution")
        if transforms is not None:
            check_mapping("transforms", transforms, Transform, "transforms")
        self.bound = given = BoundModel(model, args, dict(kwargs or {}), init_strategy)
        held = modules(given.model)
        self.bound = given = given.with_model(self._prepared(given.model))
        self._fixed = FixedLatents()
        with starting_points_only(), poutine.block(), called_in_eval_mode() as called:
            fill = FillMasked()
            self.bound = given.with_model(fill(given.model))
            trace = self._first_run()
            fill.looks = False
            self.bound = self.bound if fill.names else given
            self._check_normalizers()
            there = self.bound.starting_at(trace)
            with HostReads() as reads:
                tracked = trace_latents(there)
            moving = moving_supports(there)
            mapped = transforms_of(trace, transforms or {}, moving, keep_discrete)
            self.checked = what_to_check(tracked, trace, reads.latents)
            self._unvalidated = self.bound.with_model(
                self._fixed(Unvalidated(self.checked)(self.bound.model))
            )
            latents = {name: node["fn"] for name, node in latents_of(trace).items()}
            values = {  # of whole numbers whose bounds move: none
                name: UNBOUNDED if name in moving else site_support_values(name, latents[name])
                for name in mapped
            }
            whole = [name for name, support_values in values.items() if support_values is UNBOUNDED]
            potential_fn = functools.partial(_potential, self._unvalidated, mapped, whole)
            if any(map(_is_discrete, latents.values())) and not keep_discrete:
                self._fixed.enumerates = True
                # the first run was validated, and the normalizers have been checked
                with pyro.validation_enabled(False), normalizers_handled():
                    _, potential_fn, _, _ = initialize_model(  # sums the discrete sites out
                        self._unvalidated.model,
                        args,
                        self.bound.kwargs,
                        transforms=mapped,
                        max_plate_nesting=max_plate_nesting,
                        init_strategy=started(init_strategy),
                        initial_params={},
                    )
        self.summed_out = {name: value_of(trace, name) for name in latents if name not in mapped}
        """Discrete latents that are summed out, at some value."""
        self._spaces = {}
        if isinstance(init_strategy, JointStart):
            sampled = {name: latents[name] for name in mapped}
            init_strategy.check_sites(sampled)
            self._spaces = {k: (fn.shape(), support_of(k, fn)[0]) for k, fn in sampled.items()}
        sites = []
        for name, transform in mapped.items():
            z = as_function(transform)(value_of(trace, name))
            sites.append(Site(name, z.shape, z.dtype, transform, z.device, values[name]))
        super().__init__(potential_fn, sites, modules=unique(held, called))
        if any(_is_masked(node) for node in latents_of(trace).values()):
            self._without_idle()
        if not any(site.dtype.is_floating_point for site in sites):  # as precise as the density
            log_p = torch.as_tensor(trace.log_prob_sum())
            self.dtype = torch.promote_types(self.dtype, log_p.dtype)
            self.device = self.device if sites else log_p.device

    @property
    def idle_log_normalizer(self) -> float:
        r"""The log of the integral over idle elements: :math:`\log \sqrt{2 \pi}` of each."""
        return sum(int(where.sum()) for where in self.idle.values()) * math.log(2 * math.pi) / 2

    def _without_idle(self) -> None:
        """Gives masked elements that nothing depends on a density, so that they do not drift."""
        with self.evaluating(), side_runs():
            found = masked_elements(functools.partial(trace_latents, self.bound))
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
        bound = self.bound
        check_normalizers(bound.model, bound.args, bound.kwargs, bound.init_strategy)

    def _prepared(self, model: Model) -> Model:
        """The model under the handlers without which it is no fixed density, if there are any."""
        return model

    def _first_run(self) -> poutine.Trace:
        return validated_trace(self.bound.with_model(self._fixed(self.bound.model)))

    def _draw(self, num_chains: int) -> Tensor:
        radius = _uniform_radius(self.bound.init_strategy)
        if radius is not None and all(site.support_values is None for site in self.sites):
            z = torch.empty(num_chains, self.dim, dtype=self.dtype, device=self.device)
            return z.uniform_(-radius, radius)
        strategy = self.bound.init_strategy
        if (
            isinstance(strategy, JointStart)
            and (z := self._joint(strategy, num_chains)) is not None
        ):
            return z
        return torch.stack([self._draw_one() for _ in range(num_chains)])

    def _joint(self, strategy: JointStart, num_chains: int) -> Tensor | None:
        """Positions of all chains at once, if the draws have values of every site."""
        given = strategy.draw(num_chains)
        if not all(site.name in given for site in self.sites):
            return None
        values = {}
        for site in self.sites:
            x = given[site.name].to(self.device, site.dtype)
            strategy.check_values(site.name, x, *self._spaces[site.name])
            values[site.name] = as_function(site.transform)(x)
        return self.ravel(values)

    def _draw_one(self) -> Tensor:
        with torch.no_grad(), self.evaluating(), starting_points_only(), poutine.block():
            try:
                trace = self._unvalidated.trace()
            except torch.linalg.LinAlgError:  # no start: the next try draws another
                nothing = {"dtype": self.dtype, "device": self.device}
                return torch.full((self.dim,), torch.nan, **nothing)
        return self.position_of(trace)

    def position_of(self, trace: poutine.Trace) -> Tensor:
        """The position ``(dim,)`` of a run's latents, infinite for those on a boundary."""
        return self.ravel({s.name: _position(s, trace) for s in self.sites})

    def blame(self, z: Tensor) -> str:
        """What is not finite at the position ``(dim,)``, in words."""
        parts = zip(self.sites, z.split(self.sizes), strict=True)
        if infinite := [site.name for site, part in parts if part.isinf().any()]:
            return f"site(s) {infinite} start on the boundary of the support, or at infinity"
        with self.evaluating(), starting_points_only(), poutine.block():
            try:
                bad = not_finite_sites(self.trace_at(z), self.checked)
            except torch.linalg.LinAlgError as error:
                return f"a matrix in the model is singular ({error})"
        return "; ".join(bad) if bad else super().blame(z)

    def random_part(self, z: Tensor) -> str:
        """What of a random potential is random at positions ``(chains, dim)``, in words."""
        with self.evaluating(), starting_points_only(), poutine.block():
            return random_part([functools.partial(self.trace_at, row) for row in z])

    def trace_at(self, z: Tensor) -> poutine.Trace:
        """A run of the model at a position ``(dim,)``."""
        return self._unvalidated.trace_at({**self.summed_out, **self.constrain(z)})


def _is_discrete(fn: TorchDistribution) -> bool:
    return fn.has_enumerate_support or stated_support(fn).is_discrete


def _is_masked(node: SampleSite) -> bool:
    mask = unmasked(node["fn"], node["mask"])[1]
    return mask is not None and not bool(mask.all())


def _potential(
    bound: BoundModel,
    transforms: dict[str, Transform],
    whole: Sequence[str],
    params: dict[str, Tensor],
) -> Tensor:
    """``U`` of one chain: minus the log joint density, minus the Jacobians of z -> x.

    The sites ``whole`` of whole numbers are proposed outside of their support too, where the
    potential is infinite.
    """
    x = {name: to_support(transforms[name], z) for name, z in params.items()}
    at_x = WithinBounds(whole)(poutine.condition(bound.model, x))
    trace = poutine.trace(at_x).get_trace(*bound.args, **bound.kwargs)
    if not transforms:
        return -torch.as_tensor(trace.log_prob_sum())
    jacobians = [t.log_abs_det_jacobian(x[name], params[name]) for name, t in transforms.items()]
    potential = torch.stack([term.sum() for term in jacobians]).sum() - trace.log_prob_sum()
    for name in whole:
        inside = trace.nodes[name]["fn"].support.check(x[name]).all()
        potential = potential.where(inside, torch.inf)
    return potential


def _position(site: Site, trace: poutine.Trace) -> Tensor:
    """The unconstrained value of a site, infinite where the value lies on the boundary."""
    x, fn = value_of(trace, site.name), site_of(trace, site.name)["fn"]
    z = as_function(site.transform)(x)
    if site.support_values is None and site.transform is not identity_transform:
        try:
            support = plain_support(stated_support(fn))
        except NotImplementedError:  # the distribution has none
            return z
        if not inside(support, x, site.transform.inv).all():
            return torch.full_like(z, torch.inf)
    return z


def _uniform_radius(init_strategy: InitStrategy) -> float | None:
    """The radius of Pyro's uniform start, which can be drawn for all chains at once."""
    if init_strategy is init_near_zero:
        return 1.0
    if init_strategy is init_to_uniform:
        return 2.0
    if isinstance(init_strategy, functools.partial) and init_strategy.func is init_to_uniform:
        return init_strategy.keywords.get("radius", 2.0)
    return None
