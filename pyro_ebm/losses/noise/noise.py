"""The noise at an energy site, and the base of the losses that tell data from it."""

import math
from abc import abstractmethod
from typing import NamedTuple, Unpack

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_ebm.distributions.core.supports import support_of
from pyro_ebm.distributions.core.wrappers import inside_event
from pyro_ebm.distributions.energy import find_energy
from pyro_ebm.losses.base import EnergyLoss, LossSettings
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.leaves import leaves


class Noise(NamedTuple):
    """Noise points of a site, and log densities under the noise."""

    x: Tensor
    """The points, shape ``(noise_ratio, *batch, *event)``."""
    log_q: Tensor
    """At the points, shape ``(noise_ratio, *batch)``."""
    log_q_data: Tensor
    """At the data, shape ``(*batch)``."""

    def detach(self) -> "Noise":
        """The same without gradients."""
        return Noise(*(part.detach() for part in self))


class NoiseLoss(EnergyLoss):
    """A loss that tells the data from noise which the guide samples at the site's name.

    A member defines how well it does so, by :meth:`classify`.

    Args:
        noise_ratio: noise points for each datum.
        **kwargs: those of :class:`~pyro_ebm.losses.EnergyLoss`, such as ``num_particles``.

    Raises:
        ValueError: for a guide without noise at the site's name, noise of another shape or support,
            or noise that cannot be scored.
    """

    needs_noise = True

    def __init__(self, noise_ratio: int, **kwargs: Unpack[LossSettings]):
        super().__init__(**kwargs)
        self.noise_ratio = check_count("noise_ratio", noise_ratio)
        self._sites_checked: set[str] = set()

    @abstractmethod
    def classify(self, site: EnergySite, noise: Noise) -> Tensor:
        """The log-likelihood of the classification of each row and its noise, ``(*batch)``."""

    def energy_term(self, site: EnergySite) -> Tensor:
        """The log-likelihood of the classification, shape ``(*batch)``."""
        fn = checked_noise(site, type(self).__name__)
        noise = self.noise_of(site, fn)
        self.prepare(site, noise)
        self._sites_checked.add(site.name)
        if not self.evaluating:
            self.record(site, noise_tail=tail_share(site, noise))
        return self.classify(site, noise)

    def noise_of(self, site: EnergySite, fn: TorchDistribution) -> Noise:
        """Draws of the noise ``fn`` of a site, without gradients."""
        with torch.no_grad():
            return self.scored(site, fn, fn.sample(torch.Size((self.noise_ratio,))))

    def prepare(self, site: EnergySite, noise: Noise) -> None:
        """A place for what a loss does before it classifies."""

    def scored(self, site: EnergySite, fn: TorchDistribution, x: Tensor) -> Noise:
        """Points ``(noise_ratio, *batch, *event)`` with the log densities of a noise ``fn``."""
        if site.name not in self._sites_checked:
            check_support(fn, site, x)
        return Noise(x, log_density(fn, x, site), log_density(fn, site.x, site))


TAIL = 0.01
"""The part of the noise that is its tail, by its own density."""


def tail_share(site: EnergySite, noise: Noise) -> Tensor:
    """The fraction of the data in the tail of the noise, shape ``()``.

    Data that are like the noise have :data:`TAIL` of theirs there, data that it covers less. Where
    it is many times that, the noise is narrower than the data, and the variance of what is learned
    explodes.
    """
    log_q = noise.log_q.detach()
    if site.mask is not None:
        log_q = log_q[:, site.mask]
    if log_q.numel() == 0:
        return log_q.new_tensor(math.nan)
    tail = log_q.flatten().topk(math.ceil(TAIL * log_q.numel()), largest=False).values
    return site.mean((noise.log_q_data < tail.amax()).float())


def checked_noise(site: EnergySite, loss: str) -> TorchDistribution:
    """The distribution that the guide samples at a site, one for each of its rows.

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


def check_support(fn: TorchDistribution, site: EnergySite, noise: Tensor) -> None:
    """Raises a ValueError for noise outside the energy's support, or data outside the noise's."""
    if not site.energy.support.check(noise).all():
        raise ValueError(
            f"the noise at site {site.name!r} leaves the energy's support {site.energy.support}:"
            " use noise on that support"
        )
    if not support_of(fn).check(site.x).all():
        raise ValueError(
            f"the noise at site {site.name!r} lives on {fn.support} and has no density at some of"
            " the data: it must cover them"
        )


def log_density(fn: TorchDistribution, x: Tensor, site: EnergySite) -> Tensor:
    """The noise's log density at points.

    Raises:
        ValueError: if it has no density, or one of 0 somewhere; it names the site.
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


def refuse_shared(site: EnergySite, log_q: Tensor) -> None:
    """Raises a ValueError where the energy and its noise, of log density ``log_q``, share a leaf.

    Args:
        site: the site.
        log_q: the noise's log density at some points, of any shape.
    """
    with eval_mode(site.energy.modules):  # in which a spectral norm stays as it is
        mine = {id(leaf) for leaf in leaves(site.energy.log_prob(site.x))}
    for leaf in leaves(log_q):
        if id(leaf) in mine:
            raise ValueError(
                f"site {site.name!r}: the energy and its noise share a parameter of shape"
                f" {tuple(leaf.shape)}, which both would train, each for an end of its own: give"
                " each its own"
            )
