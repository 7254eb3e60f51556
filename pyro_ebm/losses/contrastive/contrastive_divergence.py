r"""Contrastive divergence: raise the energy of what the model dreams, lower that of the data.

The gradient of the log-likelihood of an energy is a difference of two means,

.. math:: \nabla_\theta \log p_\theta(x) = -\nabla_\theta E_\theta(x)
          + \mathbb E_{x' \sim p_\theta} \nabla_\theta E_\theta(x'),

and the *negatives* :math:`x'` are drawn by a Markov chain. CD-k starts the chains at the data and
makes k transitions; persistent CD goes on where the chains were, and needs chains that keep up
with the parameters; restarts from the base or from noise give short-run maximum likelihood.

Reference:
    Hinton (2002), Training products of experts by minimizing contrastive divergence. Tieleman
    (2008), Training restricted Boltzmann machines using approximations to the likelihood gradient.
    Du and Mordatch (2019), Implicit generation and modeling with energy-based models. Nijkamp et
    al. (2019), Learning non-convergent non-persistent short-run MCMC. Pang et al. (2020), Learning
    latent space energy-based prior model.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.negatives import NegativeKernels
from pyro_ebm.losses.sites import EnergySite, leaves
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.kernels.composed.tempering import TemperingKernel
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.short_run import default_kernel, own_kernel
from pyro_ebm.ops.arguments import check_count, check_number, shown
from pyro_ebm.ops.eval_mode import eval_mode

STEP_SIZE_GAIN = 0.1


class ContrastiveDivergence(EnergyLoss):
    r"""CD-k, persistent CD and short-run maximum likelihood, as a loss for ``SVI``.

    At each energy site, observed or latent, the gradient is

    .. math:: s \Big( \sum_i m_i \nabla E(x_i)
              - \big( \textstyle\sum_i m_i \big) \frac1C \sum_c \nabla E(x'_c) \Big)

    with scale :math:`s`, mask :math:`m` and negatives :math:`x'` that no gradient flows through.
    Without persistence there is one chain for each row, so a conditional energy, or one with a
    latent in front, is contrasted row by row and its gradient reaches that latent. The reported
    loss, :math:`E(x) - E(x')` summed, is no likelihood: it hovers around 0 in good training and
    bad; watch an estimate of the likelihood (:attr:`diagnostics` show the energies).

    Args:
        kernel: any kernel, without a model; by default the energy's own, else
            :class:`~pyro_ebm.mcmc.LangevinKernel`. If it adapts its step size, that goes on all
            through training, towards its ``target_accept_prob``; its mass matrix stays the
            identity, and a schedule of steps starts anew for each gradient. With ``jit_compile``
            one graph serves all of training (:mod:`~pyro_ebm.losses.contrastive.negatives`): it
            pays for networks, with several ``num_steps``.
        num_steps: transitions for each gradient, the k of CD-k.
        persistent: whether chains go on from step to step, in a buffer of this loss.
        num_chains: size of the buffer; by default the number of rows at the first step. More
            chains than rows keep up better.
        restart_prob: probability, at each step, that a persistent chain starts again from the base
            of the energy, or from noise where it has none. 0.05 helps chains that stick; 1 is
            short-run maximum likelihood.
        energy_penalty: :math:`\alpha` of a penalty :math:`\alpha (E(x)^2 + E(x')^2)` that keeps
            the energies of a network from drifting; it biases the fit, and is off by default.
        num_particles: draws from the guide for each gradient.
        monitor: estimates log Z of the energy of an observed site, as
            ``lambda p: estimate_log_normalizer(p, "ais", disable_progbar=True)``. The
            :attr:`diagnostics` then hold ``log_normalizer`` and the mean ``log_likelihood`` of the
            rows, as they were when it last ran. It uses random numbers of its own, and training
            goes on as without it.
        monitor_every: it runs at the first step, and at each of so many.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: for numbers out of range, a persistent chain for an energy that is conditional
            or has a latent in front, or data on the boundary of their support.

    Example:
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> from pyro.infer import SVI
        >>> loss = ContrastiveDivergence(num_steps=10)
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), loss)
        >>> x = 0.5 * torch.randn(1000)
        >>> _ = [svi.step(x) for _ in range(300)]
        >>> bool((pyro.param("precision") * x.var() - 1).abs() < 0.1)
        True
        >>> sorted(loss.diagnostics)
        ['acceptance_rate', 'energy_data', 'energy_negatives', 'gradient_norm', 'step_size']
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        num_steps: int = 1,
        persistent: bool = False,
        num_chains: int | None = None,
        restart_prob: float = 0.0,
        energy_penalty: float = 0.0,
        num_particles: int = 1,
        monitor: Callable[[UnnormalizedEnergy], Any] | None = None,
        monitor_every: int = 100,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, **kwargs)
        if monitor is not None and not callable(monitor):
            raise TypeError(f"monitor must be a function of an energy, got {shown(monitor)}")
        check_count("monitor_every", monitor_every)
        if kernel is not None and not isinstance(kernel, Kernel):
            raise TypeError(
                f"kernel must be a pyro_ebm.mcmc.Kernel, such as LangevinKernel(),"
                f" got {shown(kernel)}"
            )
        check_count("num_steps", num_steps)
        check_number("restart_prob", restart_prob)
        check_number("energy_penalty", energy_penalty)
        if not 0 <= restart_prob <= 1:
            raise ValueError(f"restart_prob must lie in [0, 1], got {restart_prob}")
        if energy_penalty < 0 or not math.isfinite(energy_penalty):
            raise ValueError(f"energy_penalty must be finite and >= 0, got {energy_penalty}")
        if not persistent and (num_chains is not None or restart_prob > 0):
            raise ValueError(
                "num_chains and restart_prob speak of the buffer of persistent chains: give"
                " persistent=True"
            )
        if num_chains is not None:
            check_count("num_chains", num_chains)
        self.kernel, self.num_steps, self.persistent = kernel, num_steps, persistent
        self.num_chains, self.restart_prob = num_chains, restart_prob
        self.energy_penalty = energy_penalty
        self.chains: dict[str, Tensor] = {}
        self.step_sizes: dict[str, Tensor] = {}
        self._kernels = NegativeKernels()
        self.monitor, self.monitor_every = monitor, monitor_every
        self._steps_seen: dict[str, int] = {}
        self._monitored: dict[str, dict[str, Tensor]] = {}

    def energy_term(self, site: EnergySite) -> Tensor:
        """Minus the energy of the data, plus that of the negatives, shape ``(*batch)``."""
        if self.persistent:
            energy, start = self._buffered(site)
        else:
            energy, start = site.energy, site.x.detach()
        negatives = self._run_chains(site, energy, start)
        if self.persistent and not self.evaluating:
            self.chains[site.name] = negatives
        e_data, e_negatives = site.energy.energy(site.x), energy.energy(negatives)
        self.record(
            site,
            energy_data=site.mean(e_data),
            energy_negatives=e_negatives.mean() if self.persistent else site.mean(e_negatives),
        )
        if self.monitor is not None and site.is_observed and not self.evaluating:
            self._watch(site, energy.unexpanded)
        term, contrast = -e_data, e_negatives
        if self.energy_penalty:
            term = term - self.energy_penalty * e_data.square()
            contrast = contrast - self.energy_penalty * e_negatives.square()
        if energy.base is not None:  # a learned base has a gradient too, and a latent sees it
            assert site.energy.base is not None
            term = term + site.energy.base.log_prob(site.x)
            contrast = contrast - energy.base.log_prob(negatives)
        return term + (contrast.mean() if self.persistent else contrast)

    def latent_term(self, site: EnergySite) -> Tensor:
        """As for data; the gradient reaches the guide by the first term."""
        return self.energy_term(site)

    def _watch(self, site: EnergySite, energy: UnnormalizedEnergy) -> None:
        """Every so many steps, an estimate of log Z and of the likelihood of the rows."""
        assert self.monitor is not None
        seen = self._steps_seen.get(site.name, 0)
        self._steps_seen[site.name] = seen + 1
        if seen % self.monitor_every == 0:
            cuda = [site.x.device] if site.x.device.type == "cuda" else []
            with torch.random.fork_rng(cuda), torch.no_grad():
                estimate = self.monitor(energy)
                log_z = torch.as_tensor(getattr(estimate, "value", estimate)).to(site.x.device)
                density = site.energy.unnormalized_log_prob(site.x)
            self._monitored[site.name] = {
                "log_normalizer": log_z.detach().mean(),
                "log_likelihood": site.mean(density - log_z),
            }
        self.record(site, **self._monitored[site.name])

    def _run_chains(self, site: EnergySite, energy: UnnormalizedEnergy, start: Tensor) -> Tensor:
        """The points that ``num_steps`` transitions lead to from ``start``, without gradient."""
        template = self.kernel or own_kernel(energy) or default_kernel(energy)
        if isinstance(template, TemperingKernel):
            raise ValueError(
                f"TemperingKernel at site {site.name!r}: its replicas would start anew from the"
                " first one at every gradient, and the negatives be none of the energy's. Use its"
                " inner kernel with more num_steps or persistent chains"
            )
        kernel, potential = self._kernels.bound(template, energy, start, site.name)
        kernel.checks_potential = self.looks_closely
        step_size = self.step_sizes.get(site.name)
        if step_size is not None:
            kernel.adaptation.step_size = step_size.to(start.device)
        with torch.no_grad():
            what, otherwise = f"the {site.kind} at site {site.name!r}", None
            if self.persistent:
                what = f"the persistent chains of site {site.name!r}"
            elif site.is_observed:
                otherwise = "use persistent=True, whose chains do not start at the data"
            z = potential.inner_position(start, what, otherwise).contiguous()
            if self.looks_closely:
                potential._check_repeats(z)
            state = kernel.init(z)
            rates = []
            for _ in range(self.num_steps):
                state, info = kernel.step(state)
                rates.append(info.accept_prob)
            rate = torch.stack(rates).mean(0)
            rate = rate.mean() if self.persistent else site.mean(rate.reshape(site.batch_shape))
            # of all ranks' chains, so that their step sizes stay one
            rate = self.pooled(rate, len(start) if self.persistent else site.num_rows)
            adaptation = kernel.adaptation
            self.record(site, acceptance_rate=rate, step_size=adaptation.step_size.mean())
            if kernel.adapt_step_size and not self.evaluating and rate.isfinite():
                gap = rate - adaptation.target_accept_prob
                self.step_sizes[site.name] = adaptation.step_size * (STEP_SIZE_GAIN * gap).exp()
            return potential.to_points(state.z).reshape(start.shape)

    def _buffered(self, site: EnergySite) -> tuple[UnnormalizedEnergy, Tensor]:
        """The unconditional energy of a site, and its persistent chains, some started again."""
        energy = site.energy.unexpanded
        if site.name not in self.chains:
            self._refuse_conditional(site)
        return energy, self.buffer(site.name, energy, site.batch_shape.numel(), like=site.x)

    def buffer(self, name: str, energy: UnnormalizedEnergy, num_rows: int, like: Tensor) -> Tensor:
        """The persistent chains of a site, ``(num_chains, *event)``, some of them started again.

        Args:
            name: the site's.
            energy: what the chains are of.
            num_rows: how many chains there are at first, where ``num_chains`` is not given.
            like: points that tell dtype and device.
        """
        chains = self.chains.get(name)
        if chains is None:
            chains = energy.starting_points((self.num_chains or max(num_rows, 1),))
        chains = chains.to(like)  # a file's are on the CPU
        if self.num_chains is not None and len(chains) != self.num_chains:
            raise ValueError(
                f"the buffer of site {name!r} holds {len(chains)} chains, num_chains asks for"
                f" {self.num_chains}: load a buffer of that size, or let num_chains be"
            )
        if self.restart_prob > 0:
            again = torch.rand(len(chains), device=chains.device) < self.restart_prob
            again = again.reshape((-1,) + (1,) * energy.event_dim)
            chains = torch.where(again, energy.starting_points((len(chains),)).to(chains), chains)
        return chains

    def _refuse_conditional(self, site: EnergySite) -> None:
        if site.has_latent_in(site.energy.unnormalized_log_prob(site.x.detach())):
            raise ValueError(
                f"a latent stands in front of the energy of site {site.name!r}: it is drawn anew"
                " at each step, and persistent chains would belong to its last values. Use"
                " persistent=False with more num_steps"
            )
        if site.energy.unexpanded.batch_shape or _differs_by_row(site):
            raise ValueError(
                f"the energy of site {site.name!r} is conditional: its rows have different"
                " densities, and a persistent chain would belong to no row in the next minibatch."
                " Use persistent=False with more num_steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """Chains, step sizes and what was monitored, to go on exactly where training stopped."""
        return {
            "steps_seen": dict(self._steps_seen),
            "monitored": {name: dict(reported) for name, reported in self._monitored.items()},
            "chains": {name: chain.clone() for name, chain in self.chains.items()},
            "step_sizes": {name: step.clone() for name, step in self.step_sizes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.chains = {name: chain.clone() for name, chain in state["chains"].items()}
        self.step_sizes = {name: step.clone() for name, step in state["step_sizes"].items()}
        self._steps_seen = dict(state["steps_seen"])
        self._monitored = {name: dict(reported) for name, reported in state["monitored"].items()}


def _differs_by_row(site: EnergySite) -> bool:
    """Whether the energy of one and the same point, or its gradient, depends on the row."""
    if site.batch_shape.numel() < 2:
        return False
    point = site.x.detach().reshape((-1,) + site.energy.event_shape)[0]
    with eval_mode(EnergyPotential(site.energy, like=site.x)._modules):
        energies = site.energy.energy(point.expand(site.x.shape).clone())
    apart = energies - energies.flatten()[0]
    if (apart.abs() > 1e-4 + 1e-3 * energies.abs().max()).any():
        return True
    parameters = list(leaves(energies))
    if not parameters:
        return False
    # a network whose last layer starts at 0 differs in its gradient only
    weights = torch.linspace(-1.0, 1.0, apart.numel()).to(apart).reshape(apart.shape)
    sizes = [
        sum(grad.abs().sum() for grad in grads if grad is not None)
        for grads in (
            torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            for output in ((weights * apart).sum(), energies.sum())
        )
    ]
    return bool(sizes[0] > 1e-4 * sizes[1])
