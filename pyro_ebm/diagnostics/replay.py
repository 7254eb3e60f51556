r"""A model run again at draws of its latents: its observed sites and their log likelihood.

The pointwise log-likelihood of draws :math:`\theta_1, \dots, \theta_S` is

.. math:: \log p(y_i \mid \theta_s), \qquad s = 1, \dots, S,

with :math:`i` an element of the data. Three kinds of observed sites have none: a ``pyro.factor``;
a site whose observed value is computed from latents, which is a factor on these; and an energy
without a known :math:`\log Z`, whose log density is off by a constant.
"""

import contextlib
from collections.abc import Iterator, Mapping

import pyro
import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.core.wrappers import innermost
from pyro_ebm.distributions.energy import energies_of
from pyro_ebm.models.checks.intractability import lags
from pyro_ebm.models.over_chains import OverChains
from pyro_ebm.models.runs import BoundModel, sample_sites, side_runs
from pyro_ebm.models.sites.latents import SampleSite

CHUNK_SIZE = 256  # draws evaluated at once


class Replay:
    r"""A model at draws of its latents.

    Args:
        model: a Pyro model, or None: nothing is then known of any site.
        args: its positional arguments.
        kwargs: its keyword arguments.
        draws: values of its latents, each of shape ``(num, *site)``.
        num: how many draws there are, where the model has no latents.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> replay = Replay(model, (torch.zeros(3),), {}, {"mu": torch.tensor([0.0, 1.0])})
        >>> replay.log_density(["y"])["y"]
        tensor([[-0.9189, -0.9189, -0.9189],
                [-1.4189, -1.4189, -1.4189]])
    """

    def __init__(
        self,
        model: Model | None,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        draws: Mapping[str, Tensor],
        num: int = 1,
    ):
        self.model, self.args, self.kwargs, self.draws = model, args, kwargs, draws
        self.num = len(next(iter(draws.values()))) if draws else num
        self.sites: dict[str, SampleSite] = {}
        """The sample sites of the model at the first draw, latents and all."""
        if model is None:
            return
        with self._quiet():
            self.sites = self._run(0)
            self._last = self._run(-1)

    @property
    def observed(self) -> list[str]:
        """The observed sites, but for ``pyro.factor``, ``pyro.deterministic`` and their like."""
        return [
            name
            for name, site in self.sites.items()
            if site["is_observed"]
            and name not in self.draws  # else conditioned on a draw
            and not isinstance(innermost(site["fn"]), Unit | Delta)
        ]

    @property
    def undrawn(self) -> list[str]:
        """The latents of which there are no draws."""
        return [name for name, site in self.sites.items() if not site["is_observed"]]

    def is_data(self, name: str) -> bool:
        """Whether an observed value is the same at the first and the last draw."""
        first, last = (torch.as_tensor(s[name]["value"]) for s in (self.sites, self._last))
        same = (first == last) | (first.isnan() & last.isnan())  # masked data may be NaN
        return bool(same.all())

    def is_normalized(self, name: str) -> bool:
        """Whether the density of a site integrates to 1: the log Z of its energies is known."""
        known = all(energy.is_normalized for energy in energies_of(self.sites[name]["fn"]))
        with self._quiet():
            return known and not lags(self.sites[name], self._last[name])

    def log_density(self, names: list[str]) -> dict[str, Tensor]:
        """The log density of each element of some sites at each draw, without ``poutine.scale``.

        All draws are evaluated at once where the model can be
        (:class:`~pyro_ebm.models.over_chains.OverChains`), else one by one.

        Args:
            names: the sites.

        Returns:
            Shapes ``(num, *batch)``; 0 where masked.
        """

        def at(sites: Mapping[str, SampleSite]) -> dict[str, Tensor]:
            return {name: _log_density(sites[name]) for name in names}

        with self._quiet():
            if not self.draws:
                return {k: v.expand(self.num, *v.shape) for k, v in at(self.sites).items()}
            one = OverChains(lambda draw: at(self._trace(draw)), chunk_size=CHUNK_SIZE)
            return one(dict(self.draws))

    def _run(self, index: int) -> dict[str, SampleSite]:
        return self._trace({name: value[index] for name, value in self.draws.items()})

    def _trace(self, draw: dict[str, Tensor]) -> dict[str, SampleSite]:
        """The sample sites of the model, given one draw."""
        assert self.model is not None
        return sample_sites(BoundModel(self.model, self.args, self.kwargs).trace_at(draw))

    @staticmethod
    @contextlib.contextmanager
    def _quiet() -> Iterator[None]:
        with torch.no_grad(), pyro.validation_enabled(False), side_runs():
            yield


def is_factor(site: SampleSite) -> bool:
    """Whether a site is a ``pyro.factor``."""
    return isinstance(innermost(site["fn"]), Unit)


def _log_density(site: SampleSite) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])
