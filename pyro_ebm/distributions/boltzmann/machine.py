r"""Fully visible Boltzmann machines, the Ising model among them.

.. math:: p(s) \propto \exp\Big( \sum_{i<j} J_{ij} s_i s_j + \sum_i b_i s_i \Big)

over spins :math:`s_i \in \{-1, 1\}` or bits :math:`s_i \in \{0, 1\}`. A unit is drawn given the
others by the log-odds :math:`2 f_i` of spins, :math:`f_i` of bits, at its local field
:math:`f_i = \sum_j J_{ij} s_j + b_i`. Sweeps and sums over states are those of
:mod:`pyro_ebm.distributions.boltzmann.pairwise`.

With spins, ``BoltzmannMachine(J, edges=lattice_edges(10, 10))`` is the Ising model on a torus;
couplings :math:`J_{ij} = \beta / N` between all :math:`N` units are the Curie-Weiss model (whose
usual :math:`e^{\beta M^2 / 2N}` has the constant :math:`\beta / 2` of the diagonal on top).
"""

from typing import Unpack

from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.distributions.boltzmann.couplings import floating
from pyro_ebm.distributions.boltzmann.pairwise import PairwiseEnergy, PairwiseSettings
from pyro_ebm.distributions.core.discrete import spin

STATES = {"spin": spin, "binary": constraints.boolean}


class BoltzmannMachine(PairwiseEnergy):
    r"""Units that interact in pairs, all of them visible.

    .. math:: p(s) \propto \exp\Big( \sum_{i<j} J_{ij} s_i s_j + \sum_i b_i s_i \Big)

    Args:
        couplings: :math:`J`, in one of these forms.

            * With ``edges``, one for each edge, shape ``(*batch, E)``; or one for all, a number, a
              scalar, or shape ``(*batch, 1)``. Memory is proportional to the edges.
            * Without, a symmetric matrix, shape ``(*batch, n, n)``, its diagonal 0; its gradient is
              symmetric too. Or such a matrix as a sparse COO tensor, shape ``(n, n)``.
        bias: :math:`b`, shape ``(*batch, n)``, or one for all units, a number, a scalar, or shape
            ``(*batch, 1)``; 0 by default.
        edges: pairs of units, shape ``(E, 2)``, each pair once, such as ``lattice_edges(10, 10)``.
        states: ``"spin"`` for -1 and 1, ``"binary"`` for 0 and 1.
        **kwargs: ``num_sites`` (the number of units, where neither bias nor edges tell), and
            ``log_normalizer``, ``kernel``, ``num_steps``, ``learned_normalizer`` and
            ``validate_args`` of :class:`~pyro_ebm.UnnormalizedEnergy`.

    Raises:
        ValueError: for couplings, bias or edges of shapes that do not fit, matrices that are not
            symmetric or have a diagonal, values that are not finite, edges out of range, from a
            unit to itself, or given twice.

    Reference:
        Ising (1925), Beitrag zur Theorie des Ferromagnetismus. Ackley, Hinton and Sejnowski (1985),
        A learning algorithm for Boltzmann machines.

    Example:
        >>> from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
        >>> p = BoltzmannMachine(0.2, edges=lattice_edges(4, 4))
        >>> p
        BoltzmannMachine(event_shape=(16,), pairs=32, log_normalizer=unknown)
        >>> p.exact_log_normalizer()
        tensor(11.7715)
        >>> p.energy(torch.ones(16))  # -0.2 for each edge
        tensor(-6.4000)
        >>> p.sample((100,)).shape
        torch.Size([100, 16])
    """

    def __init__(
        self,
        couplings: Tensor | float,
        bias: Tensor | float | None = None,
        edges: Tensor | None = None,
        states: str = "spin",
        **kwargs: Unpack[PairwiseSettings],
    ):
        if not isinstance(states, str) or states not in STATES:
            raise ValueError(f"states must be 'spin' (-1, 1) or 'binary' (0, 1), got {states!r}")
        if bias is not None:
            bias = floating("bias", bias, (couplings, edges))
            bias = (bias if bias.dim() else bias[None])[..., None]
        super().__init__(couplings, bias, edges, values=STATES[states], **kwargs)

    @property
    def bias(self) -> Tensor:
        """The bias of each unit, shape ``(*batch, n)``."""
        return self._bias[..., 0].expand(self._bias.shape[:-2] + (self.num_sites,))

    def _draw_given(self, field: Tensor, uniform: Tensor) -> Tensor:
        """Units given their local fields, by their log-odds."""
        low, high = self.support_values
        up = uniform[..., None] < ((high - low) * field).sigmoid()
        return low + (high - low) * up

    def _validate_sample(self, value: Tensor) -> None:
        if isinstance(value, Tensor) and not bool(
            (value[..., None] == self.support_values[:, 0]).any(-1).all()
        ):
            low, high = self.support_values.flatten().int().tolist()
            way = "bits as spins are 2 * x - 1, or say states='binary'"
            if low == 0:
                way = "spins as bits are (1 + s) / 2, or say states='spin'"
            raise ValueError(
                f"the units of {self!r} are {low} or {high}, and the value holds others, between"
                f" {value.min().item():.4g} and {value.max().item():.4g}: {way}"
            )
        super()._validate_sample(value)
