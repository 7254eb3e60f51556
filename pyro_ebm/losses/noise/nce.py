r"""Noise-contrastive estimation: learn an energy, and its log Z, by telling data from noise.

Take :math:`\nu` noise points :math:`\tilde x \sim q` for each datum and classify with the logit
:math:`G(u) = \log p_\theta(u) - \log q(u) - \log \nu`. The objective

.. math:: \mathbb E_{data} \Big[ \log \sigma(G(x))
          + \sum_{j=1}^{\nu} \log \sigma(-G(\tilde x_j)) \Big]

is maximal where :math:`p_\theta` is the data's density *with* its constant: :math:`\log Z` may be
a free parameter. The noise is whatever normalized distribution the guide samples at the site's
name.

Reference:
    Gutmann and Hyvarinen (2010, 2012), Noise-contrastive estimation of unnormalized statistical
    models. Ma and Collins (2018), Noise contrastive estimation and negative sampling for
    conditional models.
"""

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ebm.files import Saved
from pyro_ebm.losses.base import LossSettings
from pyro_ebm.losses.noise.noise import Noise, NoiseLoss
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.distributed import gathered
from pyro_ebm.ops.eval_mode import eval_mode


class NCE(NoiseLoss):
    r"""Noise-contrastive estimation, as a loss for ``SVI``.

    The energy's ``log_normalizer`` is a parameter of the model. The guide samples the noise at the
    name of the energy site; parameters of the noise get no gradient (fit them first, or use
    ``FlowNCE``). Noise should be like the data, and wider: narrower noise makes the variance
    explode (24 times that of maximum likelihood at half the width of a Gaussian), far noise makes
    the loss flat. :attr:`diagnostics` show the classifier's accuracy: 0.5 is noise (or a model)
    that cannot be distinguished from the data, 1.0 a task too easy to learn from; and
    ``noise_tail``, the fraction of the data in the tail of the noise: many times .01 is noise that
    is too narrow.

    Args:
        noise_ratio: :math:`\nu`, noise points for each datum. Of the precision of a Gaussian under
            noise of its own width, the variance is :math:`1 + 1 / \nu` times that of maximum
            likelihood: 2 at 1, 1.25 at 4, 1.1 at 10.
        self_normalized: whether to do without a ``log_normalizer``: the energy itself is to learn
            its constant (:math:`\log Z = 0`), which a flexible network can.
        init_log_normalizer: whether to start the parameter ``log_normalizer`` from an
            importance-sampling estimate :math:`\log \frac1n \sum e^{-E(\tilde x)} / q(\tilde x)`
            at the first step.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for a missing ``log_normalizer``, a guide without noise at the site's name,
            noise of another shape or support, or noise that cannot be scored.

    Example:
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     log_z = pyro.param("log_z", torch.tensor(0.0))
        ...     p = UnnormalizedEnergy(lambda x: precision * x**2 / 2, log_normalizer=log_z)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", p, obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0))  # the noise
        >>> from pyro.infer import SVI
        >>> loss = NCE(noise_ratio=10, init_log_normalizer=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
        >>> x = 0.5 * torch.randn(2000)
        >>> _ = [svi.step(x) for _ in range(300)]
        >>> exact = 0.5 * (2 * torch.pi / pyro.param("precision")).log()
        >>> bool((pyro.param("log_z") - exact).abs() < 0.1)
        True
    """

    def __init__(
        self,
        noise_ratio: int = 4,
        self_normalized: bool = False,
        init_log_normalizer: bool = False,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(noise_ratio, **kwargs)
        self.self_normalized, self.init_log_normalizer = self_normalized, init_log_normalizer
        self._started: set[str] = set()

    def classify(self, site: EnergySite, noise: Noise) -> Tensor:
        r""":math:`\log \sigma(G(x)) + \sum_j \log \sigma(-G(\tilde x_j))`, shape ``(*batch)``."""
        log_p_data, log_p_noise = self.log_densities(site, noise)
        log_ratio = math.log(self.noise_ratio)
        logit_data = log_p_data - noise.log_q_data - log_ratio
        logit_noise = log_p_noise - noise.log_q - log_ratio
        self.record(
            site,
            # the mean of both classes' accuracies: 1/2 for a coin, whatever the noise ratio
            accuracy=(
                site.mean((logit_data + log_ratio > 0).float())
                + site.mean((logit_noise + log_ratio <= 0).float())
            )
            / 2,
            logit_gap=site.mean(logit_data) - site.mean(logit_noise),
            log_likelihood=site.mean(log_p_data),
        )
        if site.energy.log_normalizer is not None:
            self.record(site, log_normalizer=site.energy.log_normalizer.float().mean())
        return logsigmoid(logit_data) + logsigmoid(-logit_noise).sum(0)

    def log_densities(self, site: EnergySite, noise: Noise) -> tuple[Tensor, Tensor]:
        r""":math:`\log p_\theta` of the data, ``(*batch)``, and of the noise, in one pass.

        The latter has shape ``(noise_ratio, *batch)``.
        """
        log_p = site.energy.log_prob(torch.cat([site.x[None], noise.x]))
        return log_p[0], log_p[1:]

    def prepare(self, site: EnergySite, noise: Noise) -> None:
        """Checks the log normalizer of a site once, and starts it where that was asked for."""
        if site.name not in self._sites_checked:
            self._check_normalizer(site)
        if self.init_log_normalizer and site.name not in self._started and not self.evaluating:
            self._start_log_normalizer(site, noise)
            self._started.add(site.name)

    def _check_normalizer(self, site: EnergySite) -> None:
        if site.energy.log_normalizer is None and not self.self_normalized:
            raise ValueError(
                f"the energy of site {site.name!r} has no log_normalizer, which NCE learns: write"
                ' UnnormalizedEnergy(..., log_normalizer=pyro.param("log_z", torch.tensor(0.0))),'
                " or NCE(self_normalized=True) if the energy is to learn its own constant"
            )
        if self.self_normalized or site.energy.constant_normalizer:
            return
        with eval_mode(site.energy.modules):  # in which a spectral norm stays as it is
            log_prob = site.energy.unnormalized_log_prob(site.x.detach())
        log_z = site.energy.log_normalizer
        if site.has_latent_in(log_prob) and not site.has_latent_in(log_z):
            raise ValueError(
                f"a latent stands in front of the energy of site {site.name!r}, but its"
                " log_normalizer does not depend on it: use RankingNCE or ContrastiveDivergence,"
                " which need none, or make it a function of the latent"
            )

    def _start_log_normalizer(self, site: EnergySite, noise: Noise) -> None:
        parameter = site.energy.log_normalizer
        if parameter is not None and not parameter.is_leaf and parameter.requires_grad:
            raise ValueError(
                "init_log_normalizer=True starts a parameter that is the log_normalizer itself, and"
                f" that of site {site.name!r}, of shape {tuple(parameter.shape)}, is computed from"
                " one, as z[label] is from a vector with an element for each class: leave"
                " init_log_normalizer out, and give the parameter the values to start at"
            )
        if parameter is None or not parameter.is_leaf or site.energy.normalizer_state == "known":
            raise ValueError(
                f"init_log_normalizer=True needs a parameter to start at site {site.name!r}:"
                ' log_normalizer=pyro.param("log_z", torch.tensor(0.0)) or an nn.Parameter'
            )
        with torch.no_grad():
            # Z = E_q[exp(-E) / q]
            log_weight = site.energy.unnormalized_log_prob(noise.x) - noise.log_q
            # a mean over the draws, and over the rows that share an element of the parameter
            shape = (1,) * (log_weight.dim() - parameter.dim()) + tuple(parameter.shape)
            shared = [dim for dim, size in enumerate(shape) if size == 1]
            total = log_weight.logsumexp(shared).reshape(parameter.shape)
            count = torch.full_like(total, log_weight.numel() / parameter.numel())
            if self.group is not None:  # over the draws of all ranks, so that all start alike
                totals, counts = gathered(torch.stack([total, count]), self.group).unbind(1)
                total, count = totals.logsumexp(0), counts.sum(0)
            parameter.data.copy_(total - count.log())

    def state_dict(self) -> Saved:
        """Which log normalizers have been started, and must not be again."""
        return {"started": sorted(self._started)}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._started = set(state["started"])
