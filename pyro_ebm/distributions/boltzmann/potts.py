r"""Potts models: sites of :math:`q` states that interact where they are alike.

.. math:: p(s) \propto \exp\Big( \sum_{(i, j)} J_{ij} [s_i = s_j] + \sum_i h_i(s_i) \Big)

A state is written as a unit vector of :math:`\mathbb R^q`, so that :math:`[s_i = s_j]` is an inner
product, and points are one-hot rows, shape ``(n, q)``. Sweeps and sums over states are those of
:mod:`pyro_ebm.distributions.boltzmann.pairwise`. With :math:`q = 2` this is the Ising model at
half the coupling, up to a constant, for :math:`[s = s'] = (1 + s s') / 2` of spins.
"""

from typing import Unpack

from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.distributions.boltzmann.couplings import floating
from pyro_ebm.distributions.boltzmann.pairwise import PairwiseEnergy, PairwiseSettings
from pyro_ebm.ops.arguments import check_count


class Potts(PairwiseEnergy):
    r"""The Potts model, over one-hot rows.

    .. math:: p(x) \propto \exp\Big( \sum_{(i, j)} J_{ij}\, x_i^\top x_j + \sum_i h_i^\top x_i \Big)

    Labels become points by ``torch.nn.functional.one_hot(labels, q).float()``.

    Args:
        couplings: :math:`J`, with ``edges`` one for each or one for all, without a symmetric
            matrix, in the forms of :class:`~pyro_ebm.distributions.BoltzmannMachine`.
        field: :math:`h`, shape ``(*batch, n, q)``, or ``(q,)`` or ``(*batch, 1, q)`` for one at all
            sites; 0 by default.
        edges: pairs of sites, shape ``(E, 2)``, each pair once, such as ``lattice_edges(6, 6)``.
        num_states: q, by default the field's.
        **kwargs: ``num_sites`` (where neither field nor edges tell), and ``log_normalizer``,
            ``kernel``, ``num_steps``, ``learned_normalizer`` and ``validate_args`` of
            :class:`~pyro_ebm.UnnormalizedEnergy`.

    Raises:
        ValueError: for couplings, field or edges of shapes that do not fit, matrices that are not
            symmetric or have a diagonal, values that are not finite, edges out of range, from a
            site to itself, or given twice.

    Reference:
        Potts (1952), Some generalized order-disorder transformations. Wu (1982), The Potts model.

    Example:
        >>> from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
        >>> p = Potts(1.0, edges=lattice_edges(2, 3), num_states=3)
        >>> p
        Potts(event_shape=(6, 3), pairs=9, log_normalizer=unknown)
        >>> x = p.exact_sample((5,))
        >>> p.labels(x).shape
        torch.Size([5, 6])
        >>> p.energy(torch.eye(3)[torch.zeros(6, dtype=torch.long)])  # -1 for each edge
        tensor(-9.)
    """

    def __init__(
        self,
        couplings: Tensor | float,
        field: Tensor | None = None,
        edges: Tensor | None = None,
        num_states: int | None = None,
        **kwargs: Unpack[PairwiseSettings],
    ):
        if field is not None:
            field = floating("field", field)
            field = field[None] if field.dim() == 1 else field
            if field.dim() < 2:
                raise ValueError("field must have shape (q,) or (*batch, n, q), got a number")
            if num_states is None:
                num_states = field.shape[-1]
        if num_states is None:
            raise ValueError("without a field the number of states is unknown: give num_states=")
        num_states = check_count("num_states", num_states, 2)
        super().__init__(
            couplings, field, edges, values=constraints.one_hot, num_states=num_states, **kwargs
        )

    @property
    def num_states(self) -> int:
        """The number q of states of a site."""
        return self.event_shape[-1]

    @property
    def field(self) -> Tensor:
        """The field at each site, shape ``(*batch, n, q)``."""
        return self._bias.expand(self._bias.shape[:-2] + tuple(self.event_shape))

    def labels(self, x: Tensor) -> Tensor:
        """The states of points as integers from 0 to q - 1.

        Args:
            x: one-hot rows, shape ``(*sample, *batch, n, q)``.

        Returns:
            Shape ``(*sample, *batch, n)``.
        """
        return x.argmax(-1)

    def _validate_sample(self, value: Tensor) -> None:
        shape = tuple(self.event_shape)
        if isinstance(value, Tensor) and tuple(value.shape[-2:]) != shape:
            raise ValueError(
                f"points of {self!r} are one-hot rows, shape (*sample, *batch, {shape[0]},"
                f" {shape[1]}), got {tuple(value.shape)}: of labels these are"
                f" torch.nn.functional.one_hot(labels, {shape[1]}).float()"
            )
        super()._validate_sample(value)
