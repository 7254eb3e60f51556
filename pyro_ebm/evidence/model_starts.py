r"""Normalized densities over the latents of a model: its prior, or a guide.

Both are runs of a program. A draw is one run. The density at a position is that of a run whose
latents are held there, and the Jacobian of the transforms from the reals onto their supports,

.. math:: \log q(z) = \log q(x(z)) + \log \left| \det \frac{\partial x}{\partial z} \right| .

An automatic guide draws its latents as functions of others, its *auxiliary* ones, and says the
Jacobian itself: it is held at the auxiliary values that lead to a position.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous, AutoGuideList, AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.core.introspection import modules
from pyro_ebm.distributions.core.supports import same_support, support_of
from pyro_ebm.distributions.core.wrappers import improper_part
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.mcmc.potentials.function import FunctionPotential
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.checks.intractability import NormalizerError
from pyro_ebm.models.runs import BoundModel, is_subsample, latents_of, value_of
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.models.sites.site import to_support
from pyro_ebm.normalizer.proposals import has_exact_draws
from pyro_ebm.normalizer.starts import Start
from pyro_ebm.ops.arguments import check_callable
from pyro_ebm.ops.rows import random_state_put_back

MAX_TRIES = 100

Guide = Callable[..., object]


class ModelStart(Start):
    """A normalized density over the latents of a model, on its positions.

    Args:
        target: the potential of the model.
        program: draws the latents.
        potential: minus the log density that they are drawn from, on the same positions.
    """

    def __init__(self, target: ModelPotential, program: BoundModel, potential: FunctionPotential):
        self.target, self.program, self.potential = target, program, potential

    def sample(self, num: int) -> Tensor:
        """Exact draws, shape ``(num, dim)``.

        Raises:
            ValueError: if the draws of a site lie on the boundary of its support.
        """
        with torch.no_grad(), self.target.evaluating(), poutine.block():
            rows = [self._one() for _ in range(num)]
        return torch.stack(rows) if rows else torch.empty(0, self.target.dim)

    def _one(self) -> Tensor:
        z = torch.empty(0)
        drawn = ExactDraws()(self.program.model)
        for _ in range(MAX_TRIES):
            trace = poutine.trace(drawn).get_trace(*self.program.args, **self.program.kwargs)
            z = self.target.position_of(trace)
            if z.isfinite().all():
                return z
        bad = [
            site.name
            for site, part in zip(self.target.sites, z.split(self.target.sizes), strict=True)
            if not part.isfinite().all()
        ]
        raise ValueError(
            f"{MAX_TRIES} draws of site(s) {bad} lie on the boundary of the support, or at"
            " infinity, in this precision: use torch.float64, or a wider distribution"
        )

    def __call__(self, z: Tensor) -> Tensor:
        """The potential, shape ``(chains,)``."""
        return self.potential(z)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)``, detached."""
        return self.potential.value_and_grad(z)


class PriorStart(ModelStart):
    """The prior of a model: the model without its observations.

    Of a latent whose energy has no exact draws, but a base with this support that has, it is the
    base, which is normalized and proper like the prior.

    Args:
        target: the potential of the model, whose latents have proper priors.
        settings: the arguments that it was made with beside the model, its arguments included.

    Raises:
        ValueError: for an energy among the latents that has no exact draws.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 0.1), obs=y)
        >>> target = ModelPotential(model, (torch.tensor(3.0),))
        >>> PriorStart(target, {"args": (torch.tensor(3.0),)})(torch.zeros(1, 1))
        tensor([0.9189])
    """

    def __init__(self, target: ModelPotential, settings: Mapping[str, Any]):
        bound = target.bound.with_model(FromBases()(target.bound.model))
        with torch.no_grad(), poutine.block(), random_state_put_back():
            for name, site in latents_of(bound.trace()).items():
                _check_draws(name, site["fn"], "prior")
        potential = ModelPotential(Unobserved()(bound.model), **settings)
        super().__init__(target, bound, potential)

    def sample(self, num: int) -> Tensor:
        """Exact draws, shape ``(num, dim)``; masked elements that nothing depends on are normal."""
        target, z = self.target, super().sample(num)
        columns = dict(zip(target.names, z.split(target.sizes, -1), strict=True))
        for name, idle in target.idle.items():
            here = columns[name]
            columns[name] = torch.where(idle.flatten(), torch.randn_like(here), here)
        return torch.cat([z[:, :0], *columns.values()], -1)


class GuideStart(ModelStart):
    """A guide whose draws have a density.

    Args:
        target: the potential of the model.
        guide: a Pyro guide that draws the latents of the model: any without auxiliary sites, or an
            ``AutoNormal``, an ``AutoContinuous`` (of them ``AutoMultivariateNormal``), or a list
            of such.

    Raises:
        ValueError: for a guide that has other sites than the model, or no density.

    Example:
        >>> def model(y):
        ...     s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, s), obs=y)
        >>> target = ModelPotential(model, (torch.tensor(3.0),))
        >>> guide = lambda y: pyro.sample("s", dist.LogNormal(y, 1.0))
        >>> GuideStart(target, guide)(torch.tensor([[3.0]]))  # at the logarithm of s
        tensor([0.9189])
    """

    def __init__(self, target: ModelPotential, guide: Guide):
        check_callable("guide", guide, "a Pyro guide")
        model = target.bound
        bound = BoundModel(guide, model.args, model.kwargs)
        with torch.no_grad(), poutine.block(), random_state_put_back():
            trace = poutine.trace(guide).get_trace(*model.args, **model.kwargs)
        _check_guide(guide, trace, target)
        fn = functools.partial(_minus_log_q, bound, target.transforms)
        potential = FunctionPotential(fn, target.sites, modules=modules(guide))
        super().__init__(target, bound, potential)


class Unobserved(Messenger):
    """Leaves out the densities of a model's observations."""

    def _pyro_sample(self, msg: SampleSite) -> None:
        if msg["is_observed"] and not is_subsample(msg):
            msg["fn"] = msg["fn"].mask(False)


class FromBases(Messenger):
    """Puts their bases in the place of latent energies that have no exact draws."""

    def _pyro_sample(self, msg: Any) -> None:
        p: Any = msg["fn"]
        if msg["is_observed"] or not isinstance(p, UnnormalizedEnergy) or p.base is None:
            return
        fits = same_support(p.support, support_of(p.base))
        if fits and has_exact_draws(p.base) and not has_exact_draws(p):
            msg["fn"] = p.base


class ExactDraws(Messenger):
    """Draws energies exactly, and not as the ends of short chains."""

    def _pyro_sample(self, msg: Any) -> None:
        draw = getattr(msg["fn"], "exact_sample", None)
        if draw is not None and not msg["is_observed"] and not msg["done"]:
            msg["value"], msg["done"] = draw(), True


def held_at(guide: Guide, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a guide's own sites that give its latents these values.

    Args:
        guide: a guide that has run.
        x: values of the latents of one chain.
    """
    if isinstance(guide, AutoGuideList):
        return {name: value for part in guide for name, value in held_at(part, x).items()}
    if not isinstance(guide, AutoNormal | AutoContinuous):
        return dict(x)
    trace: Any = guide.prototype_trace
    sites: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    free = {name: biject_to(site["fn"].support).inv(x[name]) for name, site in sites.items()}
    if isinstance(guide, AutoNormal):
        return {f"{name}_unconstrained": value for name, value in free.items()}
    flat = torch.cat([value.reshape(-1) for value in free.values()])
    return {f"_{guide._pyro_name}_latent": flat}


def _minus_log_q(
    bound: BoundModel, transforms: Mapping[str, Transform], params: dict[str, Tensor]
) -> Tensor:
    """``-log q(z)`` of one chain."""
    x = {name: to_support(transforms[name], z) for name, z in params.items()}
    log_q = torch.as_tensor(bound.trace_at(held_at(bound.model, x)).log_prob_sum())
    jacobians = [t.log_abs_det_jacobian(x[name], params[name]) for name, t in transforms.items()]
    return torch.stack([log_q.new_zeros(()), *(term.sum() for term in jacobians)]).sum() - log_q


def _check_guide(guide: Guide, trace: poutine.Trace, target: ModelPotential) -> None:
    """Refuses a guide that has other sites than the model, or no density."""
    sites: dict[str, Any] = dict(latents_of(trace))
    auxiliary = {name for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    got, want = sorted(sites.keys() - auxiliary), sorted(target.names)
    if got != want:
        raise ValueError(f"guide must draw the latents {want} of the model, and draws {got}")
    known = held_at(guide, {name: value_of(trace, name) for name in got}).keys()
    if unknown := sorted(auxiliary - known):
        raise ValueError(
            f"guide ({type(guide).__name__}) draws its latents as functions of {unknown}, so that"
            " their density is not known: use AutoNormal, AutoMultivariateNormal, or a guide that"
            " samples the latents themselves"
        )
    for name in known:
        _check_draws(name, sites[name]["fn"], "guide")


def _check_draws(name: str, fn: Any, where: str) -> None:
    """Refuses a site without a density that is known, or without exact draws from it."""
    part = improper_part(fn) if where == "guide" else None
    if part is not None:
        raise ValueError(
            f"site {name!r} of the guide is a {part}, which is no density that integrates to 1"
        )
    energy = find_energy(fn)
    if energy is not None and not energy.is_normalized:
        raise NormalizerError(
            f"site {name!r} of the {where} is an energy whose log Z is {energy.normalizer_state}"
        )
    if not has_exact_draws(fn):
        raise ValueError(
            f"site {name!r} of the {where} is an energy whose draws are the ends of short chains:"
            " give guide=, a density with exact draws to start at, or the energy a base= that has"
            " its support"
        )
