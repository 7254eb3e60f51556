"""Starts whose sites belong together: an ``init_strategy`` that draws all of them at once."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.autoguide.initialization import init_to_generated, init_to_value
from torch import Tensor
from torch.distributions import biject_to

from pyro_ebm.distributions.checks.boundary import ends_of
from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.internals.pyro_runtime import outside_plates
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite, init_near_zero, support_of

ROUNDING = 1e-3
"""An element of a vector or a matrix may be so far from what its position leads to."""


class StartError(ValueError):
    """Draws that chains are to start from do not fit the model."""


class JointStart:
    """An ``init_strategy`` of draws from a joint distribution of the sites.

    Pyro asks for one site after another: what it gets in one run of the model is one draw. Sites
    that a draw does not have start as the ``fallback`` says.

    Args:
        draw: makes draws of each site in its support, ``num -> {name: (num, *site)}``.
        fallback: the strategy of other sites; by default Pyro's uniform one, and a warning says
            which sites start so. (Discrete sites start at a draw from their prior, without one.)
        source: what the draws are of, in words, for errors.

    Example:
        >>> def draw(num):
        ...     x = torch.randn(num)
        ...     return {"x": x, "minus_x": -x}
        >>> start = JointStart(draw)
        >>> sites = [{"name": name, "fn": dist.Normal(0.0, 1.0)} for name in ("x", "minus_x")]
        >>> [start(site) for site in sites]
        [tensor(1.5410), tensor(-1.5410)]
    """

    def __init__(
        self,
        draw: Callable[[int], Mapping[str, Tensor]],
        fallback: InitStrategy | None = None,
        source: str = "the start",
    ):
        self._draw, self.fallback, self.source = draw, fallback, source
        self._names: list[str] | None = None  # of the last draw
        self._told: set[str] = set()
        self._of_one_run = init_to_generated(generate=self._generate)

    def draw(self, num: int) -> Mapping[str, Tensor]:
        """As many draws, from any place in a model."""
        with outside_plates():
            found = {name: value.detach() for name, value in self._draw(num).items()}
        self._names = sorted(found)
        return found

    def _generate(self) -> InitStrategy:
        values = {name: value[0] for name, value in self.draw(1).items()}
        return init_to_value(values=values, fallback=_none)

    def __call__(self, site: SampleSite) -> object:
        """The value of one site, in one run of a model; a site without one is told of."""
        value = self.of_draw(site)
        if value is not None:
            return value
        self._tell([site["name"]])
        return self.otherwise(site)

    def of_draw(self, site: SampleSite) -> Tensor | None:
        """The value of one site in the draw of this run of a model, None if it has none.

        Raises:
            StartError: if the site has another shape, or the value is not in its support.
        """
        value: Tensor | None = self._of_one_run(site)
        if value is not None:
            name, fn = site["name"], site["fn"]
            least = fn.event_dim + _plate_dims(site)
            # dimensions to the left of the plates may be those of sites that are summed out
            shape = fn.shape()[max(0, len(fn.shape()) - max(value.dim(), least)) :]
            self.check_values(name, value[None], shape, support_of(name, fn)[0])
        return value

    def otherwise(self, site: SampleSite) -> object:
        """The value of a site that the draws do not have."""
        strategy: InitStrategy = self.fallback or init_near_zero
        return strategy(site)

    # -- checks --------------------------------------------------------------------------------

    def check_sites(self, sites: Mapping[str, TorchDistribution]) -> None:
        """Sees that the draws have sites of the model, and says which start otherwise.

        Args:
            sites: the latents of the model that chains move.

        Raises:
            StartError: if the draws have none of them.
        """
        if not sites:
            return
        names = self.draw(1) if self._names is None else self._names
        if not sites.keys() & set(names):
            raise StartError(
                f"{self.source} has no site in common with the model, whose sites are"
                f" {sorted(sites)}: its own are {sorted(names)}. Take draws of this model"
                " (reparametrized sites have names of their own), or another init_strategy"
            )
        discrete = {name for name, fn in sites.items() if support_of(name, fn)[0].is_discrete}
        self._tell(sites.keys() - set(names) - discrete)

    def _tell(self, missing: Iterable[str]) -> None:
        """Warns once of sites that start uniformly, if the user has not said where they start."""
        new = sorted(set(missing) - self._told)
        if self.fallback is None and new:
            self._told.update(new)
            warnings.warn(
                f"site(s) {new} of the model are not in {self.source}, which has {self._names}, and"
                " start uniformly: give fallback=, an init_strategy for them",
                stacklevel=3,
            )

    def check_values(
        self, name: str, x: Tensor, shape: torch.Size, support: constraints.Constraint
    ) -> None:
        """Raises a StartError unless values ``(num, *shape)`` of a site lie in its support."""
        if x.shape[1:] != shape:
            raise StartError(
                f"{self.source} has values of shape {tuple(x.shape[1:])} for site {name!r}, which"
                f" has shape {tuple(shape)} in the model: take draws of this model, with these data"
            )
        support = elementwise(support)
        good = _in_support(support, x)
        if not bool(good.all()):
            such = f" (such as {float(x[~good][0]):.4g})" if good.shape == x.shape else ""
            raise StartError(
                f"{self.source} has values of site {name!r} outside of its support {support} in the"
                f" model{such}: take draws of this model, or leave the site out"
            )


def _none(site: SampleSite) -> None:
    """No value: a function, since Pyro takes a fallback of None for an error."""


def _plate_dims(site: SampleSite) -> int:
    dims = [frame.dim for frame in site.get("cond_indep_stack", ())]
    return max((-dim for dim in dims if dim is not None), default=0)


def _in_support(support: constraints.Constraint, x: Tensor) -> Tensor:
    """Whether values lie in a support that is no ``independent``, up to rounding."""
    holds = support.check(x)
    if bool(holds.all()) or support.is_discrete:
        return holds
    if support.event_dim == 0:  # numbers that were rounded onto an open end
        ends = [x == end for end in ends_of(support) if end is not None]
        return functools.reduce(torch.logical_or, ends, holds)
    try:  # a simplex that sums to 1, and a matrix that is symmetric, to fewer digits than asked for
        bijection = biject_to(support)
        off = (bijection(bijection.inv(x)) - x).abs()
    except (NotImplementedError, torch.linalg.LinAlgError):  # no position leads there
        return holds
    return holds | (off < ROUNDING).flatten(-support.event_dim).all(-1)
