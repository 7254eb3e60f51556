r"""Conditional densities of discrete variables given all others, in which log Z does not appear.

For a block :math:`B` of variables, and all states :math:`s_B` that they may have,

.. math:: p(x_B \mid x_{-B})
          = \frac{e^{\log \tilde p(x)}}{\sum_{s_B} e^{\log \tilde p(s_B, x_{-B})}},
          \qquad \tilde p = h\, e^{-E} ,

a ratio from which :math:`Z` cancels. It takes :math:`K^{|B|}` values of the energy at points that
differ from :math:`x` in :math:`B` alone. The product over blocks is the *composite likelihood*,
that over single variables the *pseudolikelihood*,

.. math:: \log \mathrm{PL}(x) = \sum_i \log p(x_i \mid x_{-i}) .

Pairwise energies and restricted Boltzmann machines have conditionals in closed form. Where it is
known which variables interact, a block falls apart into those of its parts that share no pair: they
are independent given the rest, and so the colour classes of a lattice, taken as blocks, cost no
more than single sites and have the same value.

Reference:
    Besag (1975), Statistical analysis of non-lattice data. Varin, Reid and Firth (2011), An
    overview of composite likelihood methods.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_ebm.distributions.boltzmann.interaction_graph import InteractionGraph
from pyro_ebm.distributions.core.discrete import support_values_of
from pyro_ebm.distributions.core.wrappers import unvalidated
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.ops.arguments import shown
from pyro_ebm.ops.integration.enumerate import states

MAX_BLOCK_STATES = 2**16
"""How many states a block may have."""

Blocks = tuple[tuple[int, ...], ...]


def variables_of(p: UnnormalizedEnergy) -> tuple[int, Tensor]:
    """The number n of variables of a discrete energy, and their support values ``(K, b)``.

    Raises:
        ValueError: for an energy of real numbers, or whole numbers without bounds.

    Example:
        >>> variables_of(UnnormalizedEnergy(lambda x: x.sum(-1), (3,), dist.constraints.boolean))
        (3, tensor([[0.],
                [1.]]))
    """
    values = support_values_of(p.support, p.event_shape)
    if values is None:
        raise ValueError(
            f"a pseudolikelihood sums over the values of each variable, and {p!r} lives on"
            f" {p.support}: on continuous supports use ScoreMatching, which is its limit there"
        )
    return p.event_shape.numel() // values.shape[1], values


def checked_blocks(blocks: object) -> Blocks | None:
    """Blocks of variables as tuples of their indices; None stands for every variable alone.

    Raises:
        ValueError: unless they are sequences of different whole numbers.

    Example:
        >>> checked_blocks([[0, 1], torch.tensor([2])])
        ((0, 1), (2,))
    """
    if blocks is None:
        return None
    blocks = blocks.tolist() if isinstance(blocks, Tensor) else blocks
    if not isinstance(blocks, Iterable) or isinstance(blocks, str) or not (blocks := list(blocks)):
        raise ValueError(
            "blocks must be sequences of the indices of variables, such as [[0, 1], [2, 3]], got"
            f" {shown(blocks)}"
        )
    return tuple(map(_checked_block, blocks))


def _checked_block(block: object) -> tuple[int, ...]:
    indices = block.tolist() if isinstance(block, Tensor) else block
    if not isinstance(indices, list | tuple | range) or not all(type(i) is int for i in indices):
        raise ValueError(
            "each of the blocks must be a sequence of the indices of its variables, such as [0, 1],"
            f" got {shown(block)}"
        )
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"of the blocks {list(indices)} is empty, or holds a variable twice")
    return tuple(indices)


def blocks_of(p: UnnormalizedEnergy, blocks: Blocks | None) -> list[Tensor]:
    """The blocks of an energy, those of one size together, shapes ``(G, k)``.

    Where it is known which variables interact, blocks are cut into parts that are independent
    given the rest.

    Raises:
        ValueError: for an energy that is not discrete, or an index out of range.

    Example:
        >>> from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
        >>> p = BoltzmannMachine(0.2, edges=lattice_edges(2, 2))
        >>> [group.tolist() for group in blocks_of(p, ((0, 1), (0, 3)))]  # 0 and 3 share no edge
        [[[0], [3]], [[0, 1]]]
    """
    n, _ = variables_of(p)
    device = p.like.device
    if blocks is None:
        return [torch.arange(n, device=device)[:, None]]
    if wrong := [i for block in blocks for i in block if not 0 <= i < n]:
        raise ValueError(
            f"blocks name the variable {wrong[0]}, and those of {p!r} are 0 to {n - 1}"
        )
    pairs = getattr(p, "pairs", None)
    graph = pairs if isinstance(pairs, InteractionGraph) else None
    return [group.to(device) for group in _by_size(graph, blocks)]


@functools.lru_cache(maxsize=32)
def _by_size(graph: InteractionGraph | None, blocks: Blocks) -> tuple[Tensor, ...]:
    if graph is not None:
        import networkx  # late: it takes a while to import

        whole = networkx.Graph(graph.edges.tolist())
        whole.add_nodes_from(range(graph.num_sites))
        blocks = tuple(
            tuple(sorted(part))
            for block in blocks
            for part in networkx.connected_components(whole.subgraph(block))
        )
    sizes = sorted({len(block) for block in blocks})
    return tuple(torch.tensor([block for block in blocks if len(block) == k]) for k in sizes)


def log_conditionals(p: UnnormalizedEnergy, x: Tensor, blocks: Tensor) -> Tensor:
    r"""The log conditional densities :math:`\log p(x_B \mid x_{-B})` of blocks of one size.

    In closed form where the energy has ``closed_conditionals``, else by changes of the variables.

    Args:
        p: the energy, on a discrete support.
        x: points, shape ``(*sample, *batch, *event)``.
        blocks: indices of variables, shape ``(G, k)``.

    Returns:
        Shape ``(*sample, *batch, G)``.

    Raises:
        ValueError: if a block has too many states to sum over.

    Example:
        >>> def energy(x):
        ...     return -2 * x[..., 0] * x[..., 1]
        >>> p = UnnormalizedEnergy(energy, (2,), dist.constraints.boolean)
        >>> log_conditionals(p, torch.tensor([1.0, 1.0]), torch.tensor([[0], [1]])).exp()
        tensor([0.8808, 0.8808])
    """
    size, values = blocks.shape[1], variables_of(p)[1]
    if len(values) ** size > MAX_BLOCK_STATES:
        raise ValueError(
            f"a block of {size} variables of {len(values)} values has {len(values)}^{size} states,"
            f" more than {MAX_BLOCK_STATES:,} that are summed over: use smaller blocks"
        )
    closed = getattr(p, "closed_conditionals", lambda x, blocks: None)(x, blocks)
    return _by_changes(p, x, blocks, values) if closed is None else closed


def _by_changes(p: UnnormalizedEnergy, x: Tensor, blocks: Tensor, values: Tensor) -> Tensor:
    """The same, from energies at all states of each block."""
    #   log p(x_B | x_-B) = -log (1 + sum_{s_B != x_B} p~(s_B, x_-B) / p~(x))
    x, values = p.broadcast(x), values.to(x)
    batch = x.shape[: x.dim() - p.event_dim]
    (groups, size), (num_values, b) = blocks.shape, values.shape
    s = x.reshape(batch + (-1, b))
    which = (s[..., None, :] == values).all(-1).int().argmax(-1)  # (*batch, n)
    # every other state of a block is a shift of its values, not all 0: (S, k)
    shifts = states(torch.arange(num_values, device=x.device)[:, None], size)[1:]
    index = blocks.expand(len(shifts), groups, size)
    shift = index.new_zeros(len(shifts), groups, s.shape[-2])
    shift = shift.scatter(-1, index, shifts[:, None].expand(index.shape))
    shift = shift.reshape(shift.shape[:2] + (1,) * len(batch) + shift.shape[2:])
    moved = values[(which + shift) % num_values]  # (S, G, *batch, n, b)
    q = unvalidated(p)
    log_p = q.unnormalized_log_prob(moved.reshape(moved.shape[:2] + x.shape))
    gain = log_p - q.unnormalized_log_prob(x)
    return -torch.cat([torch.zeros_like(gain[:1]), gain]).logsumexp(0).movedim(0, -1)


def log_composite(p: UnnormalizedEnergy, x: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    r"""The log composite likelihood :math:`\sum_B \log p(x_B \mid x_{-B})`.

    Args:
        p: the energy, on a discrete support.
        x: points, shape ``(*sample, *batch, *event)``.
        blocks: indices of variables, shapes ``(G, k)``.

    Returns:
        Shape ``(*sample, *batch)``.
    """
    terms = [log_conditionals(p, x, group).sum(-1) for group in blocks]
    return torch.stack(terms).sum(0)
