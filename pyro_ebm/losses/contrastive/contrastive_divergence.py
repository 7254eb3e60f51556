r"""Contrastive divergence: lower the energy of the data, raise that of draws of the model.

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
    latent space energy-based prior model. Du et al. (2021), Improved contrastive divergence
    training of energy-based models.
"""

import math
from collections.abc import Callable
from typing import Unpack

from torch import Tensor

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.files import Saved
from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.contrastive.chain_watch import ChainWatch
from pyro_ebm.losses.contrastive.monitor import Monitor
from pyro_ebm.losses.contrastive.negatives import Negatives, NegativeSampler
from pyro_ebm.losses.contrastive.sampler_term import sampler_divergence
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.ops.arguments import check_number


class ContrastiveDivergence(EnergyLoss):
    r"""CD-k, persistent CD and short-run maximum likelihood, as a loss for ``SVI``.

    At each energy site, observed or latent, the gradient is

    .. math:: s \Big( \sum_i m_i \nabla E(x_i)
              - \big( \textstyle\sum_i m_i \big) \frac1C \sum_c \nabla E(x'_c) \Big)

    with scale :math:`s`, mask :math:`m` and negatives :math:`x'` that no gradient flows through.
    Without persistence there is one chain for each row, so a conditional energy, or one with a
    latent in front, is contrasted row by row and its gradient reaches that latent. The reported
    loss, :math:`E(x) - E(x')` summed, is no likelihood: it hovers around 0 in good training and
    bad; watch an estimate of the likelihood. :attr:`diagnostics` show the energies, and how the
    chains do (:mod:`~pyro_ebm.losses.contrastive.chain_watch`); a warning says once when they fail.

    Args:
        kernel: any kernel, without a model; by default the energy's own, else
            :class:`~pyro_ebm.mcmc.LangevinKernel`. If it adapts its step size, that goes on all
            through training, towards its ``target_accept_prob``; its mass matrix stays the
            identity, and a schedule of steps starts anew for each gradient. One graph serves all
            of training (:mod:`~pyro_ebm.losses.contrastive.kept_kernels`): with
            ``jit_compile="auto"``, the default, of energies that come again after the first
            hundred transitions; with True a compiled one, which pays after some 10,000.
        num_steps: transitions for each gradient, the k of CD-k.
        persistent: whether chains go on from step to step, in a buffer of this loss.
        num_chains: size of the buffer; by default the number of rows at the first step. More
            chains than rows keep up better.
        restart_prob: probability, at each step, that a persistent chain starts again from the base
            of the energy, or from noise where it has none. 0.05 helps chains that stick; 1 is
            short-run maximum likelihood.
        energy_penalty: :math:`\alpha` of a penalty :math:`\alpha (E(x)^2 + E(x')^2)` that keeps
            the energies of a network from drifting; it biases the fit, and is off by default.
        monitor: estimates log Z of the energy of an observed site, as
            ``lambda p: estimate_log_normalizer(p, "ais", disable_progbar=True)``. The
            :attr:`diagnostics` then hold ``log_normalizer`` and the mean ``log_likelihood`` of the
            rows, as they were when it last ran. It uses random numbers of its own, and training
            goes on as without it.
        monitor_every: it runs at the first step, and at each of so many.
        augmentation: a random function of the persistent chains, ``(num_chains, *event)`` to the
            same, that moves them between gradients to where chains do not get by themselves: a
            rotation or a reflection of images, say. Transitions follow, so that it need not leave
            the density as it is; what they cannot undo, the energy comes to raise.
        chains_by: the name of a site of the model that holds the class of each row, or its index in
            the data, as integers from 0: persistent chains of a conditional energy, which each
            class, or row, has of its own. A label that is no site becomes one by
            ``pyro.deterministic("label", label)``. ``num_chains`` is that of a group then, by
            default as many as it has had rows in a minibatch, and a row takes one of them.
        kl_weight: of the divergence of the negatives from the model, whose gradient through the
            last Langevin step is added (:mod:`~pyro_ebm.losses.contrastive.sampler_term`): 1 as in
            improved contrastive divergence, for unadjusted chains, which it keeps from running
            off; -1 with ``num_steps=1`` is the whole derivative of Hinton's objective. Needs
            :class:`~pyro_ebm.mcmc.LangevinKernel` on the reals and several chains (of a rank, in
            distributed training), and costs two further scores, one with its derivative, and
            the distances between the chains.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for numbers out of range, a persistent chain for an energy that is conditional
            (but for ``chains_by``) or has a latent in front, data on the boundary of their
            support, or a ``kl_weight`` where no Langevin step on the reals is the last one.

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
        >>> for name in sorted(loss.diagnostics):
        ...     print(name)
        acceptance_rate
        distance_moved
        energy_data
        energy_negatives
        gradient_norm
        spread
        step_size
        step_size_trend
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        num_steps: int = 1,
        persistent: bool = False,
        num_chains: int | None = None,
        restart_prob: float = 0.0,
        energy_penalty: float = 0.0,
        monitor: Callable[[UnnormalizedEnergy], object] | None = None,
        monitor_every: int = 100,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        chains_by: str | None = None,
        kl_weight: float = 0.0,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(**kwargs)
        check_number("energy_penalty", energy_penalty)
        if energy_penalty < 0 or not math.isfinite(energy_penalty):
            raise ValueError(f"energy_penalty must be finite and >= 0, got {energy_penalty}")
        check_number("kl_weight", kl_weight)
        if not math.isfinite(kl_weight):
            raise ValueError(f"kl_weight must be finite, got {kl_weight}")
        self.negatives = NegativeSampler(
            kernel, num_steps, persistent, num_chains, restart_prob, augmentation, chains_by
        )
        self.energy_penalty, self.kl_weight = energy_penalty, kl_weight
        self.monitor = Monitor(monitor, monitor_every)
        self.watch = ChainWatch()

    def _attributes(self) -> dict[str, object]:
        monitor = {"monitor": self.monitor.estimate, "monitor_every": self.monitor.every}
        return {**vars(self), **vars(self.negatives), **monitor}

    @property
    def chains(self) -> dict[str, Tensor]:
        """The persistent chains of each site, shape ``(num_chains, *event)``.

        With ``chains_by`` ``(groups, num_chains, *event)``.
        """
        return self.negatives.chains

    @property
    def step_sizes(self) -> dict[str, Tensor]:
        """The adapted step size of each site, shape ``(1,)``."""
        return self.negatives.step_sizes

    def energy_term(self, site: EnergySite) -> Tensor:
        r""":math:`E(x') - E(x)`, with negatives :math:`x'`, shape ``(*batch)``."""
        return self.contrast(site, self.negatives.draw(site, self))

    def contrast(self, site: EnergySite, negatives: Negatives) -> Tensor:
        """The term of a site with these negatives, shape ``(*batch)``."""
        energy = negatives.energy
        e_data, e_negatives = site.energy.energy(site.x), energy.energy(negatives.x)
        self.record(
            site,
            acceptance_rate=negatives.acceptance_rate,
            step_size=negatives.step_size,
            energy_data=site.mean(e_data),
            energy_negatives=site.mean(e_negatives) if negatives.by_row else e_negatives.mean(),
        )
        if not self.evaluating:
            self.record(site, **self.watch(site, negatives))
            if site.is_observed:
                self.record(site, **self.monitor.watch(site, energy.unexpanded))
        term, contrast = -e_data, e_negatives
        if self.energy_penalty:
            term = term - self.energy_penalty * e_data.square()
            contrast = contrast - self.energy_penalty * e_negatives.square()
        if energy.base is not None:  # a learned base has a gradient too, and a latent sees it
            assert site.energy.base is not None
            term = term + site.energy.base.log_prob(site.x)
            contrast = contrast - energy.base.log_prob(negatives.x)
        if self.kl_weight:
            term = term - self.kl_weight * sampler_divergence(site, negatives, self)
        return term + (contrast if negatives.by_row else contrast.mean())

    def latent_term(self, site: EnergySite) -> Tensor:
        """:meth:`energy_term` of a draw of the guide, whose gradient goes through the data term."""
        return self.energy_term(site)

    def state_dict(self) -> Saved:
        """Chains, step sizes and what was seen of them, to go on exactly where training stopped."""
        return {
            **self.monitor.state_dict(),
            "watch": self.watch.state_dict(),
            "kernels": self.negatives.kept.state_dict(),
            "chains": {name: chain.clone() for name, chain in self.chains.items()},
            "started": {name: has.clone() for name, has in self.negatives.started.items()},
            "step_sizes": {name: step.clone() for name, step in self.step_sizes.items()},
        }

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        grouped, started = self.negatives.chains_by is not None, state.get("started", {})
        if state["chains"] and bool(started) != grouped:
            raise ValueError(
                f"the chains that are loaded are of {'one density' if grouped else 'groups'}, and"
                f" this loss has chains_by={self.negatives.chains_by!r}"
            )
        self.monitor.load_state_dict(state)
        self.watch.load_state_dict(state["watch"])
        if "kernels" in state:  # older files have neither
            self.negatives.kept.load_state_dict(state["kernels"])
        for mine, saved in (
            (self.chains, state["chains"]),
            (self.negatives.started, started),
            (self.step_sizes, state["step_sizes"]),
        ):
            mine.clear()
            mine.update({name: value.clone() for name, value in saved.items()})
