r"""Graphs of interacting pairs: lattices, their colourings, and sums over neighbours.

A pairwise energy couples the sites :math:`i, j` that share an edge. Sites that share none are
independent given all others, and so may be resampled at once: a *colouring*, which gives the ends
of every edge different colours, cuts a Gibbs sweep into one parallel update for each colour. A
lattice with even (or open) sides needs two colours, the two of a checkerboard; a complete graph
needs as many as it has sites.

States are *vectors* here, :math:`s_i \in \mathbb R^b` for each of :math:`n` sites, in tensors of
shape ``(..., n, b)``; a spin is a vector of one number, a Potts state a one-hot row.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_ebm.ops.arguments import shown

MAX_GRAPHS = 32
"""How many colourings are remembered."""

MAX_DSATUR = 2000
"""How many sites are coloured by the best of the greedy strategies, which is slow."""

WASTE = 4
"""Sites whose degrees differ by more than this factor are not updated side by side."""


def lattice_edges(*shape: int, periodic: bool | Sequence[bool] = True) -> Tensor:
    r"""The edges of a rectangular lattice of any dimension, each once.

    Sites are numbered row by row, as ``torch.arange(n).reshape(shape)``. A periodic side (a torus)
    joins its last sites to its first, unless they are neighbours already: on a side of 2 there is
    one edge between the two sites, not two, and a side of 1 has none.

    Args:
        shape: the sides of the lattice.
        periodic: whether the sides wrap around; ``False`` is the free boundary. One for all sides,
            or one for each.

    Returns:
        Pairs of sites, shape ``(E, 2)``: the edges along the first side, then those along the
        second, and so on, so that each direction can have a coupling of its own.

    Raises:
        ValueError: for a side less than 1, or flags of another number than sides.

    Example:
        >>> lattice_edges(2, 3, periodic=False).tolist()
        [[0, 3], [1, 4], [2, 5], [0, 1], [1, 2], [3, 4], [4, 5]]
        >>> lattice_edges(32, 32).shape  # a torus: 2 edges for each site
        torch.Size([2048, 2])
    """
    if not shape or not all(isinstance(side, int) and side >= 1 for side in shape):
        raise ValueError(f"the sides of a lattice must be integers of at least 1, got {shape}")
    if not isinstance(periodic, bool | Sequence):
        raise ValueError(f"periodic must be a bool, or one for each side, got {shown(periodic)}")
    wraps = [periodic] * len(shape) if isinstance(periodic, bool) else list(periodic)
    if len(wraps) != len(shape):
        raise ValueError(
            f"periodic must be one bool, or one for each of the {len(shape)} sides, got {periodic}"
        )
    sites = torch.arange(math.prod(shape)).reshape(shape)
    edges = []
    for axis, side in enumerate(shape):
        if wraps[axis] and side > 2:
            start, end = sites, sites.roll(-1, axis)
        else:
            start, end = sites.narrow(axis, 0, side - 1), sites.narrow(axis, 1, side - 1)
        edges.append(torch.stack([start.flatten(), end.flatten()], -1))
    return torch.cat(edges)


class Pairs(ABC):
    """Which sites interact, and how their sums are computed from couplings and vectors."""

    num_sites: int
    blocks: tuple[Tensor, ...]
    """Sites without edges among them, shape ``(c,)``; every site is in one block."""
    order: Tensor
    """All blocks one after the other, shape ``(n,)``."""
    independent: tuple[int, ...]
    """The blocks of a largest colour: together, still without edges among them."""
    rest: Tensor
    """The sites of all other blocks, in order."""
    coupling_dim: int
    """How many of the couplings' dimensions, from the right, are not batch."""
    edges: Tensor
    """The pairs themselves, shape ``(E, 2)``."""
    num_edges: int
    """How many there are."""

    @abstractmethod
    def pair_sum(self, couplings: Tensor, s: Tensor) -> Tensor:
        r""":math:`\sum_{i<j} J_{ij} \langle s_i, s_j \rangle`, shape ``(*sample, *batch)``."""

    @abstractmethod
    def weights(self, couplings: Tensor) -> Sequence[Tensor]:
        """The couplings that each block sees, as :meth:`field` wants them."""

    @abstractmethod
    def field(self, weight: Tensor, s: Tensor, block: int) -> Tensor:
        r""":math:`\sum_j J_{ij} s_j` for the sites of a block, ``(*sample, *batch, c, b)``."""


class CompleteGraph(Pairs):
    """Every site interacts with every other: couplings are symmetric matrices ``(*batch, n, n)``.

    A part that is not symmetric, and the diagonal, count for nothing and get no gradient.

    Args:
        num_sites: n, how many sites there are.
        device: where its indices live.

    Example:
        >>> couplings = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> CompleteGraph(2).pair_sum(couplings, torch.tensor([[1.0], [-1.0]]))
        tensor(-2.)
    """

    coupling_dim = 2

    def __init__(self, num_sites: int, device: torch.device | None = None):
        self.num_sites = num_sites
        self.order = torch.arange(num_sites, device=device)
        self.blocks = self.order.split(1)
        self.independent, self.rest = (num_sites - 1,), self.order[:-1]
        self._device = device

    @property
    def edges(self) -> Tensor:
        """All pairs, shape ``(n (n - 1) / 2, 2)``."""
        return torch.combinations(self.order)

    @property
    def num_edges(self) -> int:
        """How many pairs there are, n (n - 1) / 2."""
        return self.num_sites * (self.num_sites - 1) // 2

    def pair_sum(self, couplings: Tensor, s: Tensor) -> Tensor:
        r""":math:`\sum_{i<j} J_{ij} \langle s_i, s_j \rangle`, shape ``(*sample, *batch)``."""
        js = torch.einsum("...ij,...jb->...ib", symmetric(couplings), s)
        return (s * js).sum((-1, -2)) / 2

    def weights(self, couplings: Tensor) -> Sequence[Tensor]:
        """The rows of the matrix, shape ``(*batch, n)`` each."""
        return symmetric(couplings).unbind(-2)

    def field(self, weight: Tensor, s: Tensor, block: int) -> Tensor:
        r""":math:`\sum_j J_{ij} s_j` for the sites of a block, ``(*sample, *batch, c, b)``."""
        return torch.einsum("...j,...jb->...b", weight, s)[..., None, :]

    def __reduce__(self) -> tuple[object, ...]:
        # its blocks are views of one tensor, which each would be saved with
        return complete_graph, (self.num_sites, self._device)


@functools.lru_cache(maxsize=MAX_GRAPHS)
def complete_graph(num_sites: int, device: torch.device | None = None) -> CompleteGraph:
    """The complete graph of so many sites, made once."""
    return CompleteGraph(num_sites, device)


def symmetric(couplings: Tensor) -> Tensor:
    """(J + J') / 2 without its diagonal: so is then the gradient, to the last bit."""
    n = couplings.shape[-1]
    off_diagonal = 1 - torch.eye(n, dtype=couplings.dtype, device=couplings.device)
    return (couplings + couplings.mT) * (off_diagonal / 2)


@dataclass(frozen=True, eq=False)
class _Neighbours:
    """The neighbours of a block's sites, and the edges to them, d at most for each of c sites."""

    sites: Tensor  # (d * c,)
    edges: Tensor  # (d, c), E where a site has fewer neighbours than d
    padded: bool  # whether there is such a site


@dataclass(frozen=True, eq=False)
class InteractionGraph(Pairs):
    """Some sites interact: couplings of shape ``(*batch, E)``, or ``(*batch, 1)`` for all alike.

    Memory is proportional to the edges. Built by :func:`graph_of`, which remembers colourings.

    Example:
        >>> graph = graph_of(lattice_edges(4, 4))
        >>> graph.num_sites, graph.num_edges, len(graph.blocks)
        (16, 32, 2)
        >>> graph.pair_sum(torch.tensor([0.5]), torch.ones(16, 1))  # 0.5 for each edge
        tensor(16.)
    """

    num_sites: int
    edges: Tensor
    blocks: tuple[Tensor, ...]
    order: Tensor
    independent: tuple[int, ...]
    rest: Tensor
    neighbours: tuple[_Neighbours, ...]
    coupling_dim: int = 1

    @property
    def num_edges(self) -> int:
        """How many edges there are."""
        return len(self.edges)

    def pair_sum(self, couplings: Tensor, s: Tensor) -> Tensor:
        r""":math:`\sum_{i<j} J_{ij} \langle s_i, s_j \rangle`, shape ``(*sample, *batch)``."""
        start, end = self.edges.unbind(-1)
        products = (s.index_select(-2, start) * s.index_select(-2, end)).sum(-1)
        return (couplings * products).sum(-1)

    def weights(self, couplings: Tensor) -> Sequence[Tensor]:
        """Shape ``(*batch, d, c)`` each, 0 where a site has fewer neighbours than d.

        Shape ``(*batch, 1, 1)`` where no site has, and all edges have one coupling.
        """
        if couplings.shape[-1] == 1 and not any(near.padded for near in self.neighbours):
            return [couplings[..., None]] * len(self.blocks)
        batch = couplings.shape[:-1]
        every = couplings.expand(batch + self.edges.shape[:1])
        padded = torch.cat([every, couplings.new_zeros(batch + (1,))], -1)
        return [padded[..., near.edges] for near in self.neighbours]

    def field(self, weight: Tensor, s: Tensor, block: int) -> Tensor:
        r""":math:`\sum_j J_{ij} s_j` for the sites of a block, ``(*sample, *batch, c, b)``."""
        near = self.neighbours[block]
        s = s.index_select(-2, near.sites).unflatten(-2, tuple(near.edges.shape))
        if weight.shape[-2:] == (1, 1):
            return weight * s.sum(-3)
        return (weight[..., None] * s).sum(-3)


def graph_of(
    edges: Tensor, num_sites: int | None = None, device: torch.device | None = None
) -> InteractionGraph:
    """The graph of these edges, coloured.

    Edges of the same contents are checked and coloured once, whatever tensor holds them.

    Args:
        edges: pairs of sites, integers of shape ``(E, 2)``, each pair once and in any order.
        num_sites: n, one more than the largest site by default.
        device: where the graph's indices live, by default where the edges do.

    Raises:
        ValueError: for another shape or dtype, a site out of range, a loop, a pair given twice.

    Example:
        >>> graph_of(torch.tensor([[0, 1], [1, 2], [1, 0]]))
        Traceback (most recent call last):
        ValueError: edges must hold each pair once, but [0] and [2] are both the pair (0, 1)...
    """
    if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.shape[1] != 2:
        got = f"shape {tuple(edges.shape)}" if isinstance(edges, Tensor) else repr(edges)
        raise ValueError(
            f"edges must be pairs of sites, a tensor of shape (E, 2) such as lattice_edges(4, 4),"
            f" got {got}"
        )
    if edges.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"edges must be integers (torch.long), got {edges.dtype}")
    array = edges.detach().cpu().numpy().astype(np.int64)
    if num_sites is None:
        if not len(array):
            raise ValueError("without edges the number of sites is unknown: give num_sites=")
        num_sites = int(array.max()) + 1
    return _graph(array.tobytes(), num_sites, device or edges.device)


@functools.lru_cache(maxsize=MAX_GRAPHS)
def _graph(data: bytes, num_sites: int, device: torch.device) -> InteractionGraph:
    edges = np.frombuffer(data, dtype=np.int64).reshape(-1, 2)
    _check_edges(edges, num_sites)

    # each edge twice, once from each end, sorted by the site whose neighbour the other is
    site, neighbour = np.concatenate([edges, edges[:, ::-1]]).T
    by_site = np.argsort(site, kind="stable")
    degree = np.bincount(site, minlength=num_sites)
    first = np.cumsum(degree) - degree
    neighbour = np.append(neighbour[by_site], 0)
    edge = np.append(np.tile(np.arange(len(edges)), 2)[by_site], len(edges))

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    blocks, near, colour_of = [], [], []
    colours = colour_sites(edges, num_sites)
    for colour in range(colours.max() + 1):
        for sites in _like_degrees(np.flatnonzero(colours == colour), degree):
            rank = np.arange(degree[sites].max())[:, None]
            where = np.where(rank < degree[sites], first[sites] + rank, -1)
            padded = bool((where < 0).any())
            near.append(_Neighbours(tensor(neighbour[where].ravel()), tensor(edge[where]), padded))
            blocks.append(tensor(sites))
            colour_of.append(colour)
    largest = np.bincount(colours).argmax()
    return InteractionGraph(
        num_sites,
        tensor(edges.copy()),
        tuple(blocks),
        torch.cat(blocks),
        tuple(i for i, colour in enumerate(colour_of) if colour == largest),
        tensor(np.flatnonzero(colours != largest)),
        tuple(near),
    )


def colour_sites(edges: ArrayLike, num_sites: int) -> np.ndarray:
    """A colour for each site, shape ``(n,)``: two wherever two do, else few by greedy colouring.

    Args:
        edges: pairs of sites, shape ``(E, 2)``.
        num_sites: n, how many sites there are.

    Example:
        >>> colour_sites([[0, 1], [1, 2]], 3)
        array([0, 1, 0])
    """
    import networkx  # late: it takes a while to import

    graph = networkx.Graph()
    graph.add_nodes_from(range(num_sites))
    graph.add_edges_from(np.asarray(edges).tolist())
    if networkx.is_bipartite(graph):
        found = networkx.bipartite.color(graph)
        # networkx starts every component at colour 1, which puts lone sites there
        return np.array([1 - found[i] if graph.degree[i] else 0 for i in range(num_sites)])
    # DSATUR finds the three colours of a torus with odd sides, in quadratic time
    strategies = ["smallest_last", "largest_first"] + ["DSATUR"] * (num_sites <= MAX_DSATUR)
    tries = [networkx.greedy_color(graph, strategy) for strategy in strategies]
    best = min(tries, key=lambda colours: max(colours.values()))
    return np.array([best[i] for i in range(num_sites)])


def _like_degrees(sites: np.ndarray, degree: np.ndarray) -> list[np.ndarray]:
    """The sites, cut where padding all of them to the largest degree would waste memory."""
    parts = []
    sites = sites[np.argsort(-degree[sites], kind="stable")]
    while len(sites):
        many = int((degree[sites] * WASTE >= degree[sites[0]]).sum())
        parts.append(np.sort(sites[:many]))
        sites = sites[many:]
    return parts


def _check_edges(edges: np.ndarray, num_sites: int) -> None:
    outside = (edges < 0) | (edges >= num_sites)
    if outside.any():
        row = int(np.argmax(outside.any(1)))
        raise ValueError(
            f"edges[{row}] = {tuple(edges[row].tolist())} is not a pair of the {num_sites} sites"
            f" 0 to {num_sites - 1}"
        )
    loops = edges[:, 0] == edges[:, 1]
    if loops.any():
        row = int(np.argmax(loops))
        raise ValueError(
            f"edges[{row}] = {tuple(edges[row].tolist())} joins a site to itself: what a site does"
            " alone belongs in its bias"
        )
    pairs = np.sort(edges, 1) @ np.array([num_sites, 1])
    order = np.argsort(pairs, kind="stable")
    repeats = np.flatnonzero(np.diff(pairs[order]) == 0)
    if len(repeats):
        row, again = order[repeats[0]], order[repeats[0] + 1]
        raise ValueError(
            f"edges must hold each pair once, but [{row}] and [{again}] are both the pair"
            f" {tuple(np.sort(edges[row]).tolist())}: add their couplings, and keep one"
        )
