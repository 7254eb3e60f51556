"""What annealing goes along, which kernel moves the chains, and at which temperatures."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from pyro_ebm.distributions.core.supports import same_support, support_of
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.kernels.base import Kernel, checked_kernel
from pyro_ebm.mcmc.kernels.composed.composite import CompositeKernel
from pyro_ebm.mcmc.kernels.composed.tempering import TemperingKernel
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.kernels.gradient_free.integer_walk import IntegerWalk
from pyro_ebm.mcmc.kernels.gradient_free.metropolis import MHKernel
from pyro_ebm.mcmc.kernels.transition import TransitionKernel
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.short_run import short_run
from pyro_ebm.normalizer.annealing.function_path import FunctionPath
from pyro_ebm.normalizer.annealing.path import AnnealingPath, GeometricPath, TemperedPath
from pyro_ebm.normalizer.annealing.rbm_path import LayersPath
from pyro_ebm.normalizer.proposals import Proposal, checked_proposal, has_exact_draws
from pyro_ebm.normalizer.starts import WIDTH, DistributionStart, GaussianStart, uniform
from pyro_ebm.ops.arguments import shown

FIT_CHAINS = 500
"""Short chains that a start is fitted to."""


def path_of(
    p: UnnormalizedEnergy,
    proposal: Proposal | None = None,
    path: AnnealingPath | Callable[[Tensor], UnnormalizedEnergy] | None = None,
    like: Tensor | None = None,
) -> AnnealingPath:
    """The path that was given, or else one that suits the energy.

    Args:
        p: the energy.
        proposal: a distribution to start at.
        path: a path, or a function from beta to an energy.
        like: points of the dtype and on the device to use.

    Raises:
        ValueError: for a path of another kind or another energy, or an unsuitable proposal.

    Example:
        >>> type(path_of(UnnormalizedEnergy(lambda x: x**2))).__name__
        'GeometricPath'
    """
    if isinstance(path, AnnealingPath):
        if proposal is not None:
            raise ValueError("a path has its own start: give path or proposal, not both")
        end = path.of_energy.energy
        if (end.event_shape, end.batch_shape) != (p.event_shape, p.batch_shape):
            raise ValueError(f"the path leads to {end!r}, and log Z is to be that of {p!r}")
        return path
    if proposal is not None:
        proposal = checked_proposal(proposal, p)
    if like is None and proposal is not None and not p.support.is_discrete:
        like = proposal.sample()
    target = EnergyPotential(p, like=like)
    if path is not None:
        if not callable(path):
            raise ValueError(
                "path must be an AnnealingPath, or a function from beta to an energy, got"
                f" {shown(path)}"
            )
        return FunctionPath(path, target, proposal)
    if proposal is None and p.base is not None and has_exact_draws(p.base):
        fits = same_support(support_of(p.base), p.support)
        proposal = checked_proposal(p.base, p) if fits else None
    if proposal is not None:
        layers = LayersPath.starting_at(proposal, target) if LayersPath.suits(p) else None
        return layers or GeometricPath(target, DistributionStart(proposal, target))
    if p.support.is_discrete and not LayersPath.suits(p):
        return TemperedPath(target) if p.base is None else GeometricPath(target, uniform(target))
    # Not to samples that a reverse run starts at: its weights would be those of draws that the
    # start was fitted to, and the upper bound too low.
    x = short_run(p, torch.Size((FIT_CHAINS,)))[0]
    if LayersPath.suits(p):
        return LayersPath.fitted(target, x)
    z = target.to_position(x)
    finite = z.isfinite().all(-1).reshape(-1, target.targets).all(-1)
    if finite.sum() < 2:
        raise ValueError("a start needs at least two finite points to be fitted to: give proposal=")
    z = z[finite.repeat_interleave(target.targets)]
    return GeometricPath(target, GaussianStart.fitted(z, target.targets, WIDTH))


def kernel_of(kernel: Kernel | None, p: UnnormalizedEnergy | None, path: AnnealingPath) -> Kernel:
    """A kernel that leaves each density of the path invariant.

    Args:
        kernel: what was given.
        p: the energy, if it is one, whose own kernel is the next choice, if it is exact.
        path: the path; block Gibbs sweeps where it has blocks, single-site ones of discrete sites,
            steps of whole numbers without bounds, and Langevin of continuous ones.

    Raises:
        ValueError: for a kernel that leaves another density invariant.
    """
    own = None if p is None else p.kernel
    if kernel is None and isinstance(own, Kernel) and _objection(own, path) is None:
        kernel = own
    if kernel is None:
        kernel = GibbsKernel() if path.blocks is not None else _suited(path)
    checked_kernel(kernel)
    if (objection := _objection(kernel, path)) is not None:
        raise ValueError(objection)
    return kernel.copy()


def _suited(path: AnnealingPath) -> Kernel:
    """A kernel for each kind of site that there is."""
    sites = [site for site in path.sites if site.shape.numel()]
    whole = [site for site in sites if site.is_unbounded]
    discrete = [site for site in sites if site.support_values is not None]
    kernels: list[TransitionKernel] = []
    if len(discrete) > len(whole):
        kernels.append(GibbsKernel())
    if whole:
        kernels.append(MHKernel(proposal=IntegerWalk()))
    if len(sites) > len(discrete) or not sites:
        kernels.append(LangevinKernel())
    return kernels[0] if len(kernels) == 1 else CompositeKernel(kernels=kernels)


def _objection(kernel: Kernel, path: AnnealingPath) -> str | None:
    """Why a kernel does not suit a path; None if it does."""
    for part in (kernel, *kernel.parts):
        if not getattr(part, "adjusted", True):
            return (
                f"{part!r} with adjusted=False does not leave the densities invariant, and the"
                " weights would be biased: use adjusted=True"
            )
        if part.temperature != 1:
            return f"{part!r} has a temperature of its own, and annealing has others: leave it at 1"
        if isinstance(part, TemperingKernel):
            return "replicas do not anneal: give the kernel inside the TemperingKernel"
        if part.always_graphs and isinstance(path, FunctionPath):
            return (
                "a path given as a function makes a new energy at each temperature, which no"
                " compiled graph sees: use jit_compile=False, or write an AnnealingPath"
            )
    return None


def checked_betas(betas: Iterable[float] | Tensor) -> list[float]:
    """Temperatures from 0 to 1.

    Raises:
        ValueError: if they do not start at 0, rise, and end at 1.

    Example:
        >>> checked_betas(torch.linspace(0, 1, 3))
        [0.0, 0.5, 1.0]
    """
    try:
        values = [float(b) for b in betas]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"betas must be a sequence of numbers, as torch.linspace(0, 1, 1000),"
            f" got {shown(betas)}"
        ) from error
    rises = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or values[0] != 0 or values[-1] != 1 or not rises:
        some = values if len(values) < 8 else [*values[:3], "...", *values[-3:]]
        raise ValueError(
            f"betas must rise from 0, the start, to 1, the target, as torch.linspace(0, 1, 1000),"
            f" got {some}"
        )
    return values
