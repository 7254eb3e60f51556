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
    conditional models (ranking). Gao et al. (2020), Flow contrastive estimation.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ebm.distributions.core.wrappers import inside_event
from pyro_ebm.distributions.energy import find_energy
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count, check_number, check_tensor
from pyro_ebm.ops.distributed import gathered
from pyro_ebm.ops.eval_mode import eval_mode


class NCE(EnergyLoss):
    r"""Noise-contrastive estimation, as a loss for ``SVI``.

    The energy's ``log_normalizer`` is a parameter of the model. The guide samples the noise at the
    name of the energy site; parameters of the noise get no gradient (fit them first, or use
    ``FlowNCE``). Noise should be like the data, and wider: narrower noise makes the variance
    explode (24 times that of maximum likelihood at half the width of a Gaussian), far noise makes
    the loss flat. :attr:`diagnostics` show the classifier's accuracy: 0.5 is noise (or a model)
    that cannot be told from the data, 1.0 a task too easy to learn from.

    Args:
        noise_ratio: :math:`\nu`, noise points for each datum. Of the precision of a Gaussian under
            noise of its own width, the variance is :math:`1 + 1 / \nu` times that of maximum
            likelihood: 2 at 1, 1.25 at 4, 1.1 at 10.
        self_normalized: whether to do without a ``log_normalizer``: the energy itself is to learn
            its constant (:math:`\log Z = 0`), which a flexible network can.
        init_log_normalizer: whether to start the parameter ``log_normalizer`` from an
            importance-sampling estimate :math:`\log \frac1n \sum e^{-E(\tilde x)} / q(\tilde x)`
            at the first step.
        num_particles: draws from the guide for each gradient.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

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

    needs_noise = True

    def __init__(
        self,
        noise_ratio: int = 4,
        self_normalized: bool = False,
        init_log_normalizer: bool = False,
        num_particles: int = 1,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, **kwargs)
        noise_ratio = check_count("noise_ratio", noise_ratio)
        self.noise_ratio, self.self_normalized = noise_ratio, self_normalized
        self.init_log_normalizer = init_log_normalizer
        self._known: set[str] = set()
        self._started: set[str] = set()

    def energy_term(self, site: EnergySite) -> Tensor:
        """The log-likelihood of the classification, shape ``(*batch)``."""
        noise, log_q_noise, log_q_data = self.noise_of(site)
        if site.name not in self._known:
            self._check_normalizer(site)
            self._known.add(site.name)
        if self.init_log_normalizer and site.name not in self._started and not self.evaluating:
            self._start_log_normalizer(site, noise, log_q_noise)
            self._started.add(site.name)
        return self.classify(site, noise, log_q_noise, log_q_data)

    def classify(
        self, site: EnergySite, noise: Tensor, log_q_noise: Tensor, log_q_data: Tensor
    ) -> Tensor:
        """The log-likelihood of the classification of each row and its noise, ``(*batch)``."""
        log_ratio = math.log(self.noise_ratio)
        logit_data = site.energy.log_prob(site.x) - log_q_data - log_ratio
        logit_noise = site.energy.log_prob(noise) - log_q_noise - log_ratio
        self.record(
            site,
            # the mean of both classes' accuracies: 1/2 for a coin, whatever the noise ratio
            accuracy=(
                site.mean((logit_data + log_ratio > 0).float())
                + site.mean((logit_noise + log_ratio <= 0).float())
            )
            / 2,
            logit_gap=site.mean(logit_data) - site.mean(logit_noise),
            energy_data=site.mean(site.energy.energy(site.x.detach())),
        )
        if site.energy.log_normalizer is not None:
            self.record(site, log_normalizer=site.energy.log_normalizer.float().mean())
        return logsigmoid(logit_data) + logsigmoid(-logit_noise).sum(0)

    def noise_of(self, site: EnergySite) -> tuple[Tensor, Tensor, Tensor]:
        r"""Noise points, their log density, and the data's log density under the noise, detached.

        Returns:
            Shapes ``(noise_ratio, *batch, *event)``, ``(noise_ratio, *batch)``, ``(*batch)``.
        """
        fn = checked_noise(site, type(self).__name__)
        with torch.no_grad():
            noise = fn.sample((self.noise_ratio,))
            if site.name not in self._known:
                check_noise_support(fn, site, noise)
            log_q_noise, log_q_data = scored(fn, noise, site), scored(fn, site.x, site)
        return noise, log_q_noise, log_q_data

    def _check_normalizer(self, site: EnergySite) -> None:
        if site.energy.log_normalizer is None and not self.self_normalized:
            raise ValueError(
                f"the energy of site {site.name!r} has no log_normalizer, which NCE learns: write"
                ' UnnormalizedEnergy(..., log_normalizer=pyro.param("log_z", torch.tensor(0.0))),'
                " or NCE(self_normalized=True) if the energy is to learn its own constant"
            )
        if self.self_normalized or site.energy.constant_normalizer:
            return
        with eval_mode(site.energy.modules):  # a look that no spectral norm notices
            log_prob = site.energy.unnormalized_log_prob(site.x.detach())
        log_z = site.energy.log_normalizer
        if site.has_latent_in(log_prob) and not site.has_latent_in(log_z):
            raise ValueError(
                f"a latent stands in front of the energy of site {site.name!r}, but its"
                " log_normalizer does not depend on it: use RankingNCE or ContrastiveDivergence,"
                " which need none, or make it a function of the latent"
            )

    def _start_log_normalizer(self, site: EnergySite, noise: Tensor, log_q: Tensor) -> None:
        parameter = site.energy.log_normalizer
        if parameter is None or not parameter.is_leaf or site.energy.normalizer_state == "known":
            raise ValueError(
                f"init_log_normalizer=True needs a parameter to start at site {site.name!r}:"
                ' log_normalizer=pyro.param("log_z", torch.tensor(0.0)) or an nn.Parameter'
            )
        with torch.no_grad():
            # Z = E_q[exp(-E) / q]
            log_weight = site.energy.unnormalized_log_prob(noise) - log_q
            # a mean over the draws, and over the rows that share an element of the parameter
            shape = (1,) * (log_weight.dim() - parameter.dim()) + tuple(parameter.shape)
            shared = [dim for dim, size in enumerate(shape) if size == 1]
            total = log_weight.logsumexp(shared).reshape(parameter.shape)
            count = torch.full_like(total, log_weight.numel() / parameter.numel())
            if self.group is not None:  # over the draws of all ranks, so that all start alike
                totals, counts = gathered(torch.stack([total, count]), self.group).unbind(1)
                total, count = totals.logsumexp(0), counts.sum(0)
            parameter.data.copy_(total - count.log())

    def state_dict(self) -> dict[str, Any]:
        """Which log normalizers have been started, and must not be again."""
        return {"started": sorted(self._started)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._started = set(state["started"])


class RankingNCE(EnergyLoss):
    r"""Ranking NCE: pick the datum out among its noise points, without any log Z.

    .. math:: \mathbb E \log \frac{e^{g(x)}}{e^{g(x)} + \sum_{j=1}^K e^{g(\tilde x_j)}},
              \qquad g = -E - \log q

    The constant of each row cancels, so a conditional energy :math:`E(x \mid c)` needs no
    :math:`\log Z(c)`; none is learned either. The guide samples the noise at the site's name.

    Args:
        noise_ratio: :math:`K`, noise points for each datum; more is better.
        num_particles: draws from the guide for each gradient.
        **kwargs: as in ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: as :class:`NCE`, but for the log normalizer.

    Example:
        >>> loss = RankingNCE(noise_ratio=16)
    """

    needs_noise = True

    def __init__(self, noise_ratio: int = 10, num_particles: int = 1, **kwargs: Any):
        super().__init__(num_particles=num_particles, **kwargs)
        noise_ratio = check_count("noise_ratio", noise_ratio)
        self.noise_ratio = noise_ratio
        self._known: set[str] = set()

    def energy_term(self, site: EnergySite) -> Tensor:
        """The log-probability of the datum among its noise, shape ``(*batch)``."""
        fn = checked_noise(site, type(self).__name__)
        with torch.no_grad():
            noise = fn.sample((self.noise_ratio,))
            if site.name not in self._known:
                check_noise_support(fn, site, noise)
                self._known.add(site.name)
            log_q_noise, log_q_data = scored(fn, noise, site), scored(fn, site.x, site)
        data = site.energy.unnormalized_log_prob(site.x) - log_q_data
        others = site.energy.unnormalized_log_prob(noise) - log_q_noise
        self.record(site, accuracy=site.mean((data > others.amax(0)).float()))
        return data - torch.cat([data[None], others]).logsumexp(0)


def checked_noise(site: EnergySite, loss: str) -> Any:
    """The noise that the guide holds for a site: one distribution for each of its rows.

    Raises:
        ValueError: if there is none, or its shape or density will not do; it names the site.
    """
    fn = site.guide_fn
    if fn is None:
        raise ValueError(
            f"{loss} needs noise: the guide must sample a normalized distribution at the name of"
            f" the energy site, pyro.sample({site.name!r}, noise), in the same plates"
        )
    inner = find_energy(fn)
    if inner is not None and not inner.is_normalized:
        raise ValueError(f"the noise at site {site.name!r} is an energy without its log Z")
    if site.x.requires_grad:
        raise ValueError(
            f"the data at site {site.name!r} are computed from a latent or a parameter, which"
            f" would move the noise too: {loss} needs fixed data. Write the energy as a function"
            " of both instead"
        )
    fn = inside_event(fn, site.inner_dims)
    got = (tuple(fn.batch_shape), tuple(fn.event_shape))
    want = (tuple(site.batch_shape), tuple(site.energy.event_shape))
    if got != want:
        raise ValueError(
            f"the noise at site {site.name!r} has batch and event shape {got[0]} and {got[1]}, the"
            f" energy's rows {want[0]} and {want[1]}: put both in the same plates, with the same"
            " to_event"
        )
    return fn


def check_noise_support(fn: Any, site: EnergySite, noise: Tensor) -> None:
    """Refuses noise that leaves the energy's support, or cannot be where the data are."""
    if not site.energy.support.check(noise).all():
        raise ValueError(
            f"the noise at site {site.name!r} leaves the energy's support {site.energy.support}:"
            " use noise on that support"
        )
    if not fn.support.check(site.x).all():
        raise ValueError(
            f"the noise at site {site.name!r} lives on {fn.support} and has no density at some of"
            " the data: it must cover them"
        )


def scored(fn: Any, x: Tensor, site: EnergySite) -> Tensor:
    """The noise's log density.

    Raises:
        ValueError: if it has none, or is 0 somewhere; it names the site.
    """
    try:
        log_q = fn.log_prob(x)
    except NotImplementedError as error:
        raise ValueError(
            f"the noise at site {site.name!r}, {type(fn).__name__}, cannot be scored: it has no"
            " log_prob. Use a distribution with a density"
        ) from error
    if not log_q.isfinite().all():
        raise ValueError(
            f"the log density of the noise at site {site.name!r} is not finite at some of the"
            " points: it must cover the data"
        )
    return log_q


def gaussian_noise(
    data: Tensor, width: float = 1.5, full_covariance: bool = True
) -> dist.TorchDistribution:
    r"""A Gaussian with the mean of the data and :math:`width^2` times their covariance.

    Args:
        data: points, shape ``(n, *event)``.
        width: how much wider than the data; at least 1 keeps NCE's variance finite.
        full_covariance: whether correlations are matched, or variances only.

    Returns:
        A distribution with the data's event shape.

    Raises:
        ValueError: for fewer than two points, points that are not finite, or a width that is not
            positive.

    Example:
        >>> noise = gaussian_noise(torch.randn(1000, 2), width=2.0)
        >>> noise.event_shape
        torch.Size([2])
    """
    check_tensor("data", data)
    check_number("width", width)
    if data.dim() < 1 or len(data) < 2 or not 0 < width < math.inf:
        raise ValueError(
            "data of two or more points and a finite width > 0 are needed, got data of shape"
            f" {tuple(data.shape)} and width={width}"
        )
    if not data.isfinite().all():
        raise ValueError("the data hold NaN or infinite values: drop those rows")
    if not data.is_floating_point():
        data = data.to(torch.get_default_dtype())
    flat = data.detach().reshape(len(data), -1)
    mean, d = flat.mean(0), flat.shape[-1]
    scale = width * flat.std(0).clamp(min=1e-3 * float(flat.std()) + 1e-12)
    event = data.shape[1:]
    if not full_covariance or d == 1:
        return dist.Normal(mean.reshape(event), scale.reshape(event)).to_event(len(event))
    # shrunk a little towards the diagonal, so that it is positive definite
    covariance = 0.99 * width**2 * flat.T.cov() + 0.01 * scale.square().diag()
    covariance = covariance + 1e-6 * scale.square().diag()
    if not (covariance.isfinite().all() and (covariance.diagonal() > 0).all()):
        raise ValueError(f"width={width} times the data leaves the numbers of {flat.dtype}")
    normal = dist.MultivariateNormal(mean, covariance)
    if len(event) == 1:
        return normal
    return dist.TransformedDistribution(
        normal, [dist.transforms.ReshapeTransform(torch.Size([d]), event)]
    )
