r"""Pairwise energies of discrete sites: what Boltzmann machines and Potts models share.

Each of :math:`n` sites takes one of :math:`K` support values :math:`c \in \mathbb R^b`, and sites
interact in pairs, through the inner products of their support values:

.. math:: p(s) \propto e^{-E(s)}, \qquad
          -E(s) = \sum_{i<j} J_{ij} \langle s_i, s_j \rangle + \sum_i \langle b_i, s_i \rangle .

With the support values -1 and 1 this is the Ising model, with 0 and 1 the Boltzmann machine as
Hinton writes it, with the unit vectors of :math:`\mathbb R^q` the Potts model. The energy is
linear in each site: the others act on a site through its *local field* alone,

.. math:: f_i = \sum_j J_{ij} s_j + b_i, \qquad
          p(s_i = c \mid \text{rest}) \propto e^{\langle c, f_i \rangle},

and all of the following is made of local fields.

* A *sweep* draws each site anew given the others. Sites without a coupling between them are drawn
  at once, colour after colour (see :mod:`pyro_ebm.distributions.boltzmann.interaction_graph`).
* The sites :math:`B` of one colour are independent given those of the others, :math:`A`, so that
  an enumeration need not visit their states:
  :math:`Z = \sum_{s_A} e^{-E(s_A, 0)} \prod_{i \in B} \sum_c e^{\langle c, f_i(s_A) \rangle}`.

Reference:
    Ackley, Hinton and Sejnowski (1985), A learning algorithm for Boltzmann machines. Geman and
    Geman (1984), Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of
    images.
"""

from typing import Self, Unpack

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.distributions.boltzmann.couplings import (
    check_symmetric,
    couplings_within,
    floating,
    interactions,
)
from pyro_ebm.distributions.checks.arguments import common_batch
from pyro_ebm.distributions.core.discrete import support_values_of
from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.distributions.enumerated import EnergySettings, EnumeratedEnergy, Enumeration
from pyro_ebm.ops.integration.enumerate import check_enumerable, states

NUMBERS_PER_CHUNK = 2**20
"""How many numbers an enumeration holds at once."""


class PairwiseSettings(EnergySettings, total=False):
    """What every pairwise energy takes."""

    num_sites: int | None


class PairwiseEnergy(EnumeratedEnergy):
    r"""Discrete sites that interact in pairs, the base of Boltzmann machines and Potts models.

    A member says which support values its sites take. Everything else, sweeps and sums over states
    included, is here.

    Args:
        couplings: :math:`J`, with ``edges`` one for each or one for all, without a symmetric
            matrix, in the forms of :class:`~pyro_ebm.distributions.BoltzmannMachine`.
        bias: :math:`b`, shape ``(*batch, n, b)``, or ``(*batch, 1, b)`` for one at all sites; 0 by
            default.
        edges: pairs of sites, shape ``(E, 2)``, each pair once.
        num_sites: n, by default the bias's, else one more than the largest site of an edge.
        values: the constraint of one site: its support values are those of
            :func:`~pyro_ebm.distributions.core.discrete.support_values_of`.
        num_states: K where ``values`` are one-hot rows, which alone do not tell.
        **kwargs: passed to :class:`~pyro_ebm.distributions.enumerated.EnumeratedEnergy`. The
            values of couplings and bias are checked unless ``validate_args`` is False, or they
            cannot be read, as under ``vmap``.

    Raises:
        ValueError: for couplings, bias or edges of shapes that do not fit, matrices that are not
            symmetric or have a diagonal, values that are not finite, edges out of range, from a
            site to itself, or given twice.

    Example:
        >>> class SpinOne(PairwiseEnergy):  # sites -1, 0 and 1
        ...     def __init__(self, couplings, **kwargs):
        ...         values = dist.constraints.integer_interval(-1, 1)
        ...         super().__init__(couplings, values=values, **kwargs)
        >>> p = SpinOne(0.5, edges=torch.tensor([[0, 1], [1, 2]]))
        >>> p.energy(torch.tensor([1.0, -1.0, 0.0]))
        tensor(0.5000)
        >>> p.exact_log_normalizer()
        tensor(3.4076)
        >>> p.sample((2,)).shape
        torch.Size([2, 3])
    """

    supports_tempering = True

    def __init__(
        self,
        couplings: Tensor | float,
        bias: Tensor | None = None,
        edges: Tensor | None = None,
        num_sites: int | None = None,
        *,
        values: constraints.Constraint,
        num_states: int | None = None,
        **kwargs: Unpack[EnergySettings],
    ):
        couplings = floating("couplings", couplings, (bias, edges))
        if bias is not None:
            if bias.dim() < 2:
                raise ValueError(f"a bias of vectors has 2 dimensions, got {tuple(bias.shape)}")
            couplings = couplings.to(torch.promote_types(couplings.dtype, bias.dtype))
            if num_sites is None and bias.shape[-2] > 1:
                num_sites = bias.shape[-2]
        self.couplings, self.pairs = interactions(couplings, edges, num_sites)
        n = self.pairs.num_sites
        event_shape = torch.Size((n,) if num_states is None else (n, num_states))
        support_values = support_values_of(values, event_shape)
        if support_values is None:
            raise ValueError(f"values must be a discrete constraint, got {values}")
        self.support_values = support_values.to(self.couplings.device, self.couplings.dtype)
        bias = torch.zeros_like(self.support_values[:1]) if bias is None else bias
        if bias.shape[-2] not in (1, n) or bias.shape[-1] != support_values.shape[1]:
            raise ValueError(
                f"the bias or field has {bias.shape[-1]} number(s) for each of {bias.shape[-2]}"
                f" site(s), but there are {n} sites of {support_values.shape[1]} number(s)"
            )
        self._bias = bias.to(self.couplings.dtype)
        batch = common_batch(
            "couplings and bias", self.couplings.shape[: -self.pairs.coupling_dim], bias.shape[:-2]
        )
        super().__init__(event_shape, values, batch, **kwargs)
        if self._validate_args:
            self._check_values()

    @property
    def num_sites(self) -> int:
        """The number n of sites."""
        return self.pairs.num_sites

    @property
    def edges(self) -> Tensor:
        """The pairs of sites that interact, shape ``(E, 2)``."""
        return self.pairs.edges

    def _energy(self, x: Tensor) -> Tensor:
        s = self._vectors(x)
        return -self.pairs.pair_sum(self.couplings, s) - (self._bias * s).sum((-1, -2))

    # -- a site given the others ---------------------------------------------------------------

    def local_field(self, x: Tensor) -> Tensor:
        r"""What each site feels of the others, :math:`f_i = \sum_j J_{ij} s_j + b_i`.

        Args:
            x: points, shape ``(*sample, *batch, *event)``.

        Returns:
            The shape of ``x`` (broadcast against the batch).
        """
        s, pairs = self._vectors(self.broadcast(x)), self.pairs
        weights = pairs.weights(self.couplings)
        fields = torch.cat([pairs.field(w, s, k) for k, w in enumerate(weights)], -2)
        return self._points(fields.index_select(-2, pairs.order.argsort()) + self._bias)

    def closed_conditionals(self, x: Tensor, blocks: Tensor) -> Tensor:
        r"""The log densities of blocks of sites given all others, from local fields.

        .. math:: p(s_B \mid \text{rest}) \propto \exp \Big( \sum_{i \in B} \langle s_i, g_i \rangle
                  + \sum_{i < j \in B} J_{ij} \langle s_i, s_j \rangle \Big), \qquad
                  g_i = f_i - \sum_{j \in B} J_{ij} s_j

        Args:
            x: points, shape ``(*sample, *batch, *event)``.
            blocks: indices of sites, shape ``(G, k)``.

        Returns:
            Shape ``(*sample, *batch, G)``.
        """
        s, field = (
            self._vectors(y)[..., blocks, :] for y in (self.broadcast(x), self.local_field(x))
        )
        if blocks.shape[1] == 1:  # (*batch, G, 1, b)
            logits = field[..., 0, :] @ self.support_values.mT
            return (s * field).sum((-1, -2)) - logits.logsumexp(-1)
        within = couplings_within(self.pairs, self.couplings, blocks)  # (*batch, G, k, k)
        outer = field - within @ s
        c = states(self.support_values, blocks.shape[1]).unflatten(-1, s.shape[-2:])  # (S, k, b)
        logits = torch.einsum("skb,...gkb->...gs", c, outer)
        logits = logits + torch.einsum("...gij,sij->...gs", within, c @ c.mT) / 2
        own = (s * outer).sum((-1, -2)) + (within * (s @ s.mT)).sum((-1, -2)) / 2
        return own - logits.logsumexp(-1)

    def gibbs_noise(self, x: Tensor) -> tuple[Tensor, ...]:
        """The uniforms of a sweep, one for each site."""
        shape = self._vectors(self.broadcast(x)).shape[:-1]
        # at least float32: the uniforms of bfloat16 are multiples of 2^-8
        dtype = torch.promote_types(self.couplings.dtype, torch.float32)
        return (torch.rand(shape, dtype=dtype, device=self.couplings.device),)

    @torch.no_grad()
    def gibbs_sweep(
        self, x: Tensor, noise: tuple[Tensor, ...], beta: Tensor | None = None
    ) -> Tensor:
        r"""Every site drawn anew given the others, one colour after the other.

        .. math:: p(s_i = c \mid \text{rest}) \propto e^{\beta \langle c, f_i \rangle}
        """
        s, pairs = self._vectors(self.broadcast(x)), self.pairs
        sizes = [len(sites) for sites in pairs.blocks]
        bias = self._bias.expand(self._bias.shape[:-2] + (self.num_sites, s.shape[-1]))
        biases = bias.index_select(-2, pairs.order).split(sizes, -2)
        uniforms = noise[0].split(sizes, -1)
        for k, weight in enumerate(pairs.weights(self.couplings)):
            field = pairs.field(weight, s, k) + biases[k]
            if beta is not None:
                field = beta[..., None, None] * field
            new = self._draw_given(field, uniforms[k]).to(s.dtype)
            s = s.index_copy(-2, pairs.blocks[k], new)
        return self._points(s).to(x.dtype)

    def _draw_given(self, field: Tensor, uniform: Tensor) -> Tensor:
        """Sites ``(..., c, b)`` drawn in local fields ``(..., c, b)``, by the inverse cdf."""
        logits = field @ self.support_values.mT.to(field.dtype)
        cdf = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)  # times a constant
        which = (uniform[..., None] * cdf[..., -1:] >= cdf[..., :-1]).sum(-1)
        return self.support_values.index_select(0, which.flatten()).reshape(field.shape)

    # -- sums over all states ------------------------------------------------------------------

    def _completed(self, s: Tensor) -> Tensor:
        s = self._embedded(s)
        weights = self.pairs.weights(self.couplings)
        for k in self.pairs.independent:
            field = self._block_field(weights[k], s, k)
            new = self._draw_given(field, torch.rand_like(field[..., 0]))
            s = s.index_copy(-2, self.pairs.blocks[k], new)
        return self._points(s)

    def _enumeration(self, max_units: int) -> Enumeration:
        count, batch = len(self.pairs.rest), self.unexpanded.batch_shape
        check_enumerable(len(self.support_values), count, 2**max_units)
        chunk_size = max(NUMBERS_PER_CHUNK // (self._numbers * max(batch.numel(), 1)), 64)

        def log_f(enumerated: Tensor) -> Tensor:  # (chunk, count * b) -> (chunk, *batch)
            s = self._embedded(enumerated.reshape(enumerated.shape[:1] + (1,) * len(batch) + (-1,)))
            #   -E(s_A, 0) + sum_{i in B} log sum_c exp(<c, f_i>)
            total = self.pairs.pair_sum(self.couplings, s) + (self._bias * s).sum((-1, -2))
            weights = self.pairs.weights(self.couplings)
            for k in self.pairs.independent:
                logits = self._block_field(weights[k], s, k) @ self.support_values.mT
                total = total + logits.logsumexp(-1).sum(-1)
            return total

        return Enumeration(log_f, self.support_values, count, chunk_size)

    @property
    def _numbers(self) -> int:
        """How many numbers the energy of one point holds at once, about."""
        return (self.pairs.num_edges + self.num_sites) * self.support_values.shape[1]

    def _embedded(self, enumerated: Tensor) -> Tensor:
        """States ``(..., n, b)`` that have these at all sites but the independent ones, 0 there."""
        rest, b = self.pairs.rest, self.support_values.shape[1]
        s = enumerated.new_zeros(enumerated.shape[:-1] + (self.num_sites, b))
        return s.index_copy(-2, rest, enumerated.reshape(enumerated.shape[:-1] + (len(rest), b)))

    def _block_field(self, weight: Tensor, s: Tensor, k: int) -> Tensor:
        bias = self._bias
        if bias.shape[-2] > 1:
            bias = bias.index_select(-2, self.pairs.blocks[k])
        return self.pairs.field(weight, s, k) + bias

    # -- other temperatures --------------------------------------------------------------------

    def tempered(self, beta: Tensor | float) -> Self:
        r"""The density :math:`\propto e^{-\beta E(s)}`: all parameters times :math:`\beta`.

        Args:
            beta: a number, or a tensor that broadcasts with the batch. At 0 all states are alike,
                below it the most likely become the least. :math:`\log Z` is known at the numbers 0
                and, if it is known here, 1.

        Raises:
            ValueError: if it is not finite, or does not broadcast.
        """
        return self._scaled(beta, {"couplings": self.pairs.coupling_dim, "_bias": 2})

    # -- plumbing ------------------------------------------------------------------------------

    def _vectors(self, x: Tensor) -> Tensor:
        """Points ``(..., *event)`` as vectors ``(..., n, b)``, in floating numbers."""
        x = x.to(torch.promote_types(x.dtype, self.couplings.dtype))
        return x if self.event_dim == 2 else x[..., None]

    def _points(self, s: Tensor) -> Tensor:
        """Vectors ``(..., n, b)`` as points ``(..., *event)``."""
        return s if self.event_dim == 2 else s[..., 0]

    @property
    def like(self) -> Tensor:
        """A tensor of the parameters' dtype and device."""
        return self.couplings.detach()

    def _check_values(self) -> None:
        if readable(self._bias) and not self._bias.isfinite().all():
            raise ValueError("the bias must be finite")
        if not readable(self.couplings):
            return
        if not self.couplings.isfinite().all():
            raise ValueError("couplings must be finite")
        if self.pairs.coupling_dim == 2:
            check_symmetric(self.couplings.detach())

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return (
            f"{type(self).__name__}(event_shape={tuple(self.event_shape)}{batch},"
            f" pairs={self.pairs.num_edges}, log_normalizer={self.normalizer_state})"
        )
