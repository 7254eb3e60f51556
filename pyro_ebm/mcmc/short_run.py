"""Many short chains of an energy, each giving one approximate draw."""

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_ebm.diagnostics.convergence import warn
from pyro_ebm.distributions.core.discrete import BlockGibbs
from pyro_ebm.distributions.core.sampler import ChainDiagnostics, register_sampler
from pyro_ebm.distributions.core.supports import is_finite, is_unbounded
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.mcmc.annealed import annealed_langevin
from pyro_ebm.mcmc.kernels.base import Kernel, checked_kernel, refuse_temperature
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel
from pyro_ebm.mcmc.kernels.gradient.hmc import ChEESKernel
from pyro_ebm.mcmc.kernels.gradient.langevin import LangevinKernel
from pyro_ebm.mcmc.kernels.gradient_free.integer_walk import IntegerWalk
from pyro_ebm.mcmc.kernels.gradient_free.metropolis import MHKernel
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.sample_watch import SampleWatch
from pyro_ebm.models.sites.discrete_sites import is_integer

MAX_STEPS = 30  # of a trajectory; 15 in the mean


def own_kernel(energy: UnnormalizedEnergy) -> Kernel | None:
    """The kernel that an energy was given, None if it was given none.

    Raises:
        TypeError: if it is no kernel of this package.
    """
    return None if energy.kernel is None else checked_kernel(energy.kernel)


def default_kernel(energy: UnnormalizedEnergy) -> Kernel:
    """The kernel of an energy that was given none.

    Gibbs sweeps where the distribution has blocks or a finite support, a random walk on whole
    numbers without bounds, Langevin elsewhere.

    Example:
        >>> default_kernel(UnnormalizedEnergy(torch.square))
        LangevinKernel()
        >>> default_kernel(UnnormalizedEnergy(torch.square, support=dist.constraints.boolean))
        GibbsKernel()
        >>> counts = dist.constraints.nonnegative_integer
        >>> default_kernel(UnnormalizedEnergy(torch.square, support=counts))
        MHKernel(proposal=IntegerWalk())
    """
    if isinstance(energy, BlockGibbs):
        return GibbsKernel()
    if not energy.support.is_discrete:
        return LangevinKernel()
    if is_finite(energy.support, energy.event_shape) or not is_integer(energy.support):
        return GibbsKernel()
    return MHKernel(proposal=IntegerWalk())


def sampling_kernel(energy: UnnormalizedEnergy) -> Kernel:
    """The kernel that draws from an energy: its own, else one that forgets where chains start.

    A hundred Langevin steps cross a distribution of one scale, and of scales 1 to 100 leave the
    widest coordinate where it was. Trajectories adapt to it; their length is bounded, since on a
    density that is not proper they would grow for ever.

    Example:
        >>> sampling_kernel(UnnormalizedEnergy(torch.square))
        ChEESKernel(max_steps=30)
    """
    if (own := own_kernel(energy)) is not None:
        return own
    kernel = default_kernel(energy)
    return ChEESKernel(max_steps=MAX_STEPS) if isinstance(kernel, LangevinKernel) else kernel


@torch.no_grad()
def short_run(
    energy: UnnormalizedEnergy, sample_shape: torch.Size, diagnose: bool = False
) -> tuple[Tensor, ChainDiagnostics]:
    """Runs ``sample_shape`` x ``batch_shape`` chains of ``energy.num_steps`` transitions.

    Those of a noise-conditional energy on the reals come down its noise levels before.

    Args:
        energy: what to draw from.
        sample_shape: how many draws.
        diagnose: whether to keep the chains' second halves and compare them; else the diagnostics
            but the last are empty.

    Returns:
        The last states, shape ``(*sample_shape, *batch_shape, *event_shape)``, and diagnostics.

    Raises:
        ValueError: for a kernel at another temperature than 1.

    Warns:
        ConvergenceWarning: of chains that ran off, or, of a density of real numbers, do not
            agree at all.
    """
    n, steps = sample_shape.numel(), energy.num_steps
    shape = sample_shape + energy.batch_shape + energy.event_shape
    kernel = sampling_kernel(energy)
    refuse_temperature(
        kernel,
        f"{energy!r} is to be drawn at temperature 1 (that of another, p^(1/T), is"
        " energy.tempered(1 / T))",
    )
    kernel = kernel.copy()
    if shape.numel() == 0:
        empty = energy.starting_points(sample_shape)
        nothing = torch.full(energy.batch_shape, torch.nan, device=empty.device)
        return empty, ChainDiagnostics(nothing, nothing, nothing, nothing, 0)
    potential = EnergyPotential(energy)
    kernel.planned_steps = steps
    kernel.bind(potential, warmup_steps=steps // 2)
    z = potential.initial(n * potential.targets)
    if energy.sigmas and is_unbounded(energy.support):
        z = potential.to_position(annealed_langevin(energy, potential.to_points(z)))
    state = kernel.init(z)
    history, accept = [], torch.zeros_like(state.potential)
    watch = SampleWatch(potential, z)
    diverging = torch.zeros((), dtype=torch.long, device=state.z.device)
    for step in range(steps):
        state, info = kernel.step(state)
        if step < steps // 2:
            continue
        diverging = diverging + info.diverging.sum()
        watch.add(state.z)
        if diagnose:
            history.append(potential.to_points(state.z).to(state.z.dtype))  # means of whole numbers
            accept = accept + info.accept_prob
    draws = potential.to_points(state.z).reshape(shape)
    # levels of noise share chains out among modes, and what is discrete may be constant
    shared = bool(energy.sigmas) or energy.support.is_discrete or diagnose
    warn(watch.findings(state.z, compare=not shared), stacklevel=5)
    batch = energy.batch_shape
    nothing = state.potential.new_full(batch, torch.nan)
    if not diagnose:
        return draws, ChainDiagnostics(nothing, nothing, nothing, nothing, int(diverging))
    step_size = torch.as_tensor(kernel.step_size).reshape(batch)
    rate = (accept / len(history)).reshape((-1,) + batch).mean(0)
    chains = torch.stack(history, 1).reshape((n, len(history)) + batch + (-1,))
    if len(history) < 4:
        return draws, ChainDiagnostics(nothing, nothing, rate, step_size, int(diverging))
    r_hat = split_gelman_rubin(chains, chain_dim=0, sample_dim=1)
    ess = effective_sample_size(chains, chain_dim=0, sample_dim=1)
    return draws, ChainDiagnostics(
        # a chain that never moved has no variance and an undefined R-hat: the worst there is
        torch.where(r_hat.isnan(), torch.inf, r_hat).amax(-1).reshape(batch),
        ess.amin(-1).reshape(batch),
        rate,
        step_size,
        int(diverging),
    )


register_sampler(short_run)
