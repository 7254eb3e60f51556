r"""The potential of a doubly intractable posterior, and auxiliary draws at any of its positions.

The posterior of :math:`\theta` is

.. math:: p(\theta \mid x) \propto p(\theta) \prod_i \frac{f_i(x_i \mid \theta)}{Z_i(\theta)},

and the potential here holds everything but the :math:`Z_i`: by itself it is that of another model.
:class:`~pyro_ebm.mcmc.exchange.kernel.ExchangeKernel` makes up for them with auxiliary draws.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.func import vmap
from torch.utils._pytree import tree_map

from pyro_ebm.distributions.checks.boundary import check_inside
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.checks.rows import check_rows
from pyro_ebm.distributions.core.sampler import starting_points_only
from pyro_ebm.distributions.core.supports import stated_support
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.exchange.auxiliary import (
    Auxiliary,
    AuxiliaryDraw,
    InnerChain,
    auxiliary_of,
    draw_inside,
    without_masked,
)
from pyro_ebm.mcmc.exchange.checks import refuse_parts, refuse_site
from pyro_ebm.mcmc.exchange.terms import Terms, log_ratio_of, surplus_of
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.checks.intractability import (
    NormalizerError,
    moving_normalizers,
)
from pyro_ebm.models.over_chains import OverChains, Way, saved_way
from pyro_ebm.models.provenance import trace_latents
from pyro_ebm.models.runs import latents_of, sample_sites, site_of
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite, init_near_zero
from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.rows import random_state_put_back

MAX_DOUBLINGS = 60


class AuxiliaryDraws(NamedTuple):
    """The auxiliaries of all sites."""

    sites: dict[str, AuxiliaryDraw]
    """One draw for each site, all its tensors led by the chains."""
    terms: Terms
    """Their terms at the positions where they were drawn."""

    @property
    def points(self) -> dict[str, Tensor]:
        """The draws themselves, shapes ``(chains, *rows, *event)``."""
        return {name: draw.y for name, draw in self.sites.items()}

    @property
    def still(self) -> Tensor:
        """The share of inner chains that stood still, of the worst site, shape ``(chains,)``."""
        return torch.stack([draw.still for draw in self.sites.values()]).amax(0)


class ExchangePotential(ModelPotential):
    r"""Everything in a posterior but the unknown :math:`Z(\theta)`, and auxiliary draws.

    Args:
        model: a Pyro model with an energy whose unknown log Z depends on a latent.
        args: its positional arguments.
        kwargs: its keyword arguments.
        num_inner_steps: of an auxiliary's chain or sweeps; the energy's ``num_steps`` by default.
        inner_kernel: of the auxiliaries' chains; see
            :func:`~pyro_ebm.mcmc.exchange.auxiliary.auxiliary_of`.
        transforms: as in :class:`~pyro_ebm.mcmc.ModelPotential`, as are the rest.
        max_plate_nesting: as in Pyro's kernels.
        init_strategy: where chains start.
        keep_discrete: whether discrete latents are sites to be sampled, and not summed out.

    Attributes:
        auxiliaries: how the auxiliary is drawn of each site whose unknown log Z moves.
        intractable_sites: the latents that move one.

    Raises:
        NormalizerError: for a Z that does not cancel.
        ValueError: if no site has a Z that moves, or as in
            :class:`~pyro_ebm.mcmc.ModelPotential`.

    Example:
        >>> from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
        >>> def model(x):
        ...     J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("x", BoltzmannMachine(J, edges=lattice_edges(10, 10)), obs=x)
        >>> potential = ExchangePotential(model, (torch.ones(100),), num_inner_steps=20)
        >>> potential.auxiliaries
        {'x': 20 Gibbs sweeps}
        >>> draws = potential.draw(potential.initial(4))
        >>> draws.points["x"].shape, draws.terms.surplus.shape
        (torch.Size([4, 100]), torch.Size([4]))
    """

    lp_name = "lp_without_log_z"

    def __init__(
        self,
        model: Model,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        num_inner_steps: int | None = None,
        inner_kernel: Kernel | None = None,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: InitStrategy = init_near_zero,
        keep_discrete: bool = False,
    ):
        super().__init__(
            model, args, kwargs, transforms, max_plate_nesting, init_strategy, keep_discrete
        )
        with starting_points_only(), poutine.block(), eval_mode(self.modules):
            trace = self._first_run()
        # each energy at some value of the latents, and the data where they lie in its support
        self._examples = {name: _example(site_of(trace, name)) for name in self._moved}
        self.auxiliaries = self._choose(num_inner_steps, inner_kernel)
        with self.evaluating():
            self._check_data()
        # those for inner chains to adapt to, and the others
        self._draw_ways: dict[bool, Way | None] = {}

    def _choose(self, num_steps: int | None, kernel: Kernel | None) -> dict[str, Auxiliary]:
        discrete = {name: e.support.is_discrete for name, (e, _) in self._examples.items()}
        if kernel is not None and kernel.discrete not in discrete.values():
            raise ValueError(
                f"inner_kernel={kernel!r} moves {'discrete' if kernel.discrete else 'continuous'}"
                f" sites, and {self._moved} are not"
            )
        return {
            name: auxiliary_of(
                energy,
                num_steps,
                kernel if kernel is not None and kernel.discrete == discrete[name] else None,
            )
            for name, (energy, _) in self._examples.items()
        }

    def _check_data(self) -> None:
        """Whether rows influence each other, and whether inner chains can start at the data."""
        for name, (energy, x) in self._examples.items():
            check_rows(energy, x, f"the energy of site {name!r} ({energy.energy_name})")
            if isinstance(self.auxiliaries[name], InnerChain):
                # masked rows are NaN
                rows = x.reshape((-1,) + energy.event_shape)
                hidden = rows.isnan().reshape(len(rows), -1).any(-1)
                seen = rows[~hidden] if hidden.any() else x
                check_inside(energy.support, seen, f"the data at site {name!r}")

    # -- which sites, and which do not cancel ----------------------------------------------------

    def _check_normalizers(self) -> None:
        moved = moving_normalizers(self.bound)
        if not moved:
            raise ValueError(
                "there is nothing to exchange: no site of the model has an unknown log Z that"
                " depends on a latent. Use LangevinKernel, MHKernel or NUTS"
            )
        for one in moved:
            refuse_parts(one)
        with starting_points_only():
            trace = trace_latents(self.bound)
        latents, discrete = set(), set()
        for name, node in latents_of(trace).items():
            (discrete if stated_support(node["fn"]).is_discrete else latents).add(name)
        for one in moved:
            refuse_site(one, site_of(trace, one.name))
            # where it is not known which latents were read, any may have been
            if guilty := discrete & (one.latents or discrete) - {one.name}:
                raise NormalizerError(
                    f"{one}. ExchangeKernel moves continuous latents, but not"
                    f" {', '.join(map(repr, sorted(guilty)))}: give log_normalizer= for each of"
                    " its values"
                )
        self._moved = [one.name for one in moved]
        known = all(one.latents for one in moved)
        self.intractable_sites = frozenset().union(
            *(one.latents if known else latents for one in moved)
        )

    # -- auxiliary draws -------------------------------------------------------------------------

    def bind_auxiliaries(self, warmup_steps: int) -> None:
        """Forgets what inner chains have learned; the next ``warmup_steps`` draws may adapt."""
        with self.evaluating():
            for name, auxiliary in self.auxiliaries.items():
                auxiliary.bind(*self._examples[name], warmup_steps)

    @torch.no_grad()
    def draw(self, z: Tensor, tuning: bool = False, num_steps: int | None = None) -> AuxiliaryDraws:
        r"""Auxiliaries :math:`y_i \sim f_i(\cdot \mid \theta) / Z_i(\theta)` of every chain.

        Args:
            z: where, positions of shape ``(chains, dim)``.
            tuning: whether the draws are for inner chains to adapt to: of these alone, and from
                where they were last.
            num_steps: of inner chains, instead of their own number.
        """
        zero, starts = torch.zeros_like(z[:, 0]), {}
        if tuning:
            last = {k: chain.position for k, chain in self.inner_chains.items()}
            starts = {k: start for k, start in last.items() if start is not None}
        auxiliaries = self.inner_chains if tuning else self.auxiliaries

        def one(z: Tensor, zero: Tensor, starts: dict[str, Tensor]) -> AuxiliaryDraws:
            return self._draws_of_one(auxiliaries, z, zero, starts, num_steps)

        drawing = OverChains(one, self._agree, _warn_slow, ("vmap",), randomness="different")
        drawing.way = self._draw_ways.get(tuning)
        with self.evaluating(), poutine.block():
            if self.way in (None, "loop"):
                return drawing.one_by_one(z, zero, starts)
            draws = drawing(z, zero, starts)
        self._draw_ways[tuning] = drawing.way
        return draws

    @torch.no_grad()
    def terms(self, z: Tensor, points: Mapping[str, Tensor]) -> Terms:
        r"""The terms of auxiliaries at other positions than those where they were drawn.

        Args:
            z: positions, shape ``(chains, dim)``.
            points: the auxiliaries, of each site, shape ``(chains, *rows, *event)``.
        """
        with self.evaluating(), poutine.block():
            if z.shape[0] > 1 and self._draw_ways.get(False) == "vmap":
                return vmap(self._terms_of_one)(z, dict(points))
            return self._terms_one_by_one(z, points)

    def log_ratio(self, new: Terms, old: Terms, potential: Tensor) -> tuple[Tensor, Tensor]:
        """The log ratio of moves, but for that of their proposals, and its error, ``(chains,)``.

        Args:
            new: the terms of the auxiliaries where they were drawn.
            old: their terms where the chains are.
            potential: the decrease of the potential, shape ``(chains,)``.
        """
        log_ratio, error = log_ratio_of(new, old)
        return log_ratio + potential if self._sums_apart else log_ratio, error

    @property
    def _sums_apart(self) -> bool:
        """Whether the density of the rest is that of the potential, and not of a run of the model.

        So it is where discrete latents are summed out, or idle elements have a density added.
        """
        return bool(self.summed_out) or bool(self.idle)

    def _terms_one_by_one(self, z: Tensor, points: Mapping[str, Tensor]) -> Terms:
        each = [{name: y[i] for name, y in points.items()} for i in range(len(z))]
        rows = [self._terms_of_one(*row) for row in zip(z, each, strict=True)]
        return Terms(*map(torch.stack, zip(*rows, strict=True)))

    def _terms_of_one(
        self, z: Tensor, points: dict[str, Tensor], trace: poutine.Trace | None = None
    ) -> Terms:
        trace = self.trace_at(z) if trace is None else trace
        nodes = sample_sites(trace)
        apart = self._sums_apart
        parts = [surplus_of(nodes[k], _data(nodes[k]), y, apart) for k, y in points.items()]
        surplus, square, data = (torch.stack(part).sum() for part in zip(*parts, strict=True))
        rest = -data if apart else self._log_rest(z, trace)
        return Terms(rest.to(z.dtype), surplus.to(z.dtype), square.sqrt().to(z.dtype))

    def _log_rest(self, z: Tensor, trace: poutine.Trace) -> Tensor:
        """The log density of all sites whose Z does not move, Jacobians included."""
        x, unconstrained = self.constrain(z), self.unravel(z)
        jacobians = [
            site.transform.log_abs_det_jacobian(x[site.name], unconstrained[site.name]).sum()
            for site in self.sites
        ]
        others = trace.log_prob_sum(lambda name, _: name not in self._moved)
        return others - torch.stack(jacobians).sum()

    def _draws_of_one(
        self,
        auxiliaries: Mapping[str, Auxiliary],
        z: Tensor,
        zero: Tensor,
        starts: Mapping[str, Tensor],
        num_steps: int | None,
    ) -> AuxiliaryDraws:
        trace, sites = self.trace_at(z), {}
        for name, auxiliary in auxiliaries.items():
            node = site_of(trace, name)
            draw = functools.partial(
                auxiliary, zero=zero, num_steps=num_steps, position=starts.get(name)
            )
            sites[name] = draw_inside(node["fn"], _rows(node), draw)
        points = {name: draw.y for name, draw in sites.items()}
        return AuxiliaryDraws(sites, self._terms_of_one(z, points, trace))

    def _agree(self, draw: Callable[..., AuxiliaryDraws], *args: object) -> bool:
        """Whether some draws have the terms that a run of the model gives them."""
        some = tree_map(lambda x: x[:2], args)
        with random_state_put_back():
            draws = draw(*some)
        wanted = self._terms_one_by_one(some[0], draws.points)
        return all(
            bool((((f - w).abs() <= 1e-3 * (1 + w.abs()) + wanted.error) | ~w.isfinite()).all())
            for f, w in zip(draws.terms, wanted, strict=True)
        )

    # -- inner chains learn ----------------------------------------------------------------------

    @property
    def inner_chains(self) -> dict[str, InnerChain]:
        """The auxiliaries that are drawn by chains."""
        return {k: a for k, a in self.auxiliaries.items() if isinstance(a, InnerChain)}

    def learn(self, z: Tensor) -> None:
        """Adapts the inner chains, while the warmup lasts, to the densities at ``z``."""
        adapting = {k: chain for k, chain in self.inner_chains.items() if chain.is_adapting}
        if adapting:
            draws = self.draw(z, tuning=True)
            renewed = {k: chain for k, chain in adapting.items() if chain.learn(draws.sites[k])}
            self.find_step_sizes(z, renewed)

    def find_step_sizes(self, z: Tensor, chains: Mapping[str, InnerChain]) -> None:
        """Doubles or halves the step sizes until their acceptance at ``z`` crosses the target."""
        searching = {k: chain for k, chain in chains.items() if chain.is_adapting}
        for _ in range(MAX_DOUBLINGS):
            if not searching:
                return
            draws = self.draw(z, tuning=True, num_steps=1)
            searching = {k: chain for k, chain in searching.items() if chain.search(draws.sites[k])}

    def state_dict(self) -> Saved:
        """What inner chains have learned, and whether draws are vectorized."""
        chains = {name: chain.state_dict() for name, chain in self.inner_chains.items()}
        ways = [self._draw_ways.get(tuning) for tuning in (False, True)]
        vectorize = [None if way is None else way == "vmap" for way in ways]
        return {"inner_chains": chains, "draws_vectorize": vectorize}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another one was, after :meth:`bind_auxiliaries`."""
        for name, chain in self.inner_chains.items():
            chain.load_state_dict(state["inner_chains"][name])
        for tuning, way in zip((False, True), state["draws_vectorize"], strict=True):
            self._draw_ways[tuning] = saved_way(way)

    def note(self, draws: AuxiliaryDraws) -> None:
        """Keeps how often the inner chains accepted."""
        for name, chain in self.inner_chains.items():
            chain.acceptance_rate = float(draws.sites[name].accept_prob.mean())


def _warn_slow(reason: str, *_: object) -> None:
    warnings.warn(
        "the auxiliary draws cannot be vectorized over chains, so they are made one chain after"
        f" another, which is slower ({reason})",
        stacklevel=4,
    )


def _data(node: SampleSite) -> Tensor:
    """The value of a site, one row for each factor 1 / Z."""
    value, fn = node["value"], node["fn"]
    return value.expand(torch.broadcast_shapes(value.shape, fn.shape()))


def _rows(node: SampleSite) -> Tensor:
    """Where its auxiliary starts."""
    return without_masked(_data(node), node["mask"], node["fn"].event_dim)


def _example(node: SampleSite) -> tuple[UnnormalizedEnergy, Tensor]:
    found: list[tuple[UnnormalizedEnergy, Tensor]] = []

    def remember(energy: UnnormalizedEnergy, x: Tensor) -> AuxiliaryDraw:
        found.append((energy, x))
        return AuxiliaryDraw(x, x, x)

    draw_inside(node["fn"], _rows(node), remember)
    return found[0]
