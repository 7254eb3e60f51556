"""The forms in which couplings are given: dense or sparse matrices, one for each edge or for all.

A matrix holds each coupling twice and must say the same both times; the other forms hold it once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.distributions.boltzmann.interaction_graph import (
    Pairs,
    complete_graph,
    graph_of,
    symmetric,
)
from pyro_ebm.ops.arguments import shown


def floating(name: str, value: object, beside: Sequence[object] = ()) -> Tensor:
    """A number or tensor as a floating tensor.

    Args:
        name: what to call it.
        value: a number, or a tensor.
        beside: the first tensor among these tells the device of a number, the first floating one
            its dtype.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> floating("couplings", 0.5)
        tensor(0.5000)
    """
    if isinstance(value, float | int):
        tensors = [t for t in beside if isinstance(t, Tensor)]
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]
        return torch.tensor(
            value,
            dtype=dtypes[0] if dtypes else torch.get_default_dtype(),
            device=tensors[0].device if tensors else None,
        )
    if not isinstance(value, Tensor) or value.is_complex():
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else shown(value)
        raise ValueError(f"{name} must be a real number or tensor, got {got}")
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def interactions(
    couplings: Tensor, edges: Tensor | None, num_sites: int | None = None
) -> tuple[Tensor, Pairs]:
    """The pairs that interact, and their couplings as those want them.

    Args:
        couplings: with edges, shape ``(*batch, E)``, ``(*batch, 1)`` or ``()``; without, symmetric
            matrices ``(*batch, n, n)``, or one as a sparse COO tensor.
        edges: pairs of sites, shape ``(E, 2)``, or None.
        num_sites: n, or None where edges or matrix are to tell.

    Raises:
        ValueError: for forms and shapes that do not fit.

    Example:
        >>> matrix = torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.2], [0.3, 0.2, 0.0]])
        >>> couplings, pairs = interactions(matrix.to_sparse(), None)
        >>> couplings, pairs.edges.tolist()
        (tensor([0.3000, 0.2000]), [[0, 2], [1, 2]])
    """
    if edges is not None:
        if couplings.layout != torch.strided:
            raise ValueError("a sparse matrix of couplings brings its own edges: leave out edges=")
        graph = graph_of(edges, num_sites, couplings.device)
        couplings = couplings if couplings.dim() else couplings[None]
        if couplings.shape[-1] not in (1, len(edges)):
            raise ValueError(
                f"couplings of shape {tuple(couplings.shape)} do not fit {len(edges)} edges: give"
                f" one for each, shape (*batch, {len(edges)}), or one for all, a number; a batch of"
                " such numbers has shape (*batch, 1)"
            )
        return couplings, graph
    n = couplings.shape[-1] if couplings.dim() >= 2 else 0
    if n == 0 or couplings.shape[-2] != n:
        raise ValueError(
            f"couplings of shape {tuple(couplings.shape)} are not matrices (*batch, n, n): for one"
            " coupling an edge, or one for all, give edges= too, such as lattice_edges(4, 4)"
        )
    if num_sites not in (None, n):
        raise ValueError(f"couplings between {n} sites do not fit a bias or num_sites={num_sites}")
    if couplings.layout == torch.strided:
        return couplings, complete_graph(n, couplings.device)
    if couplings.layout != torch.sparse_coo or couplings.dim() != 2:
        raise ValueError(
            f"sparse couplings of layout {couplings.layout} and shape {tuple(couplings.shape)} must"
            " be one matrix in COO layout, as by to_sparse_coo(): give others by edges="
        )
    check_symmetric(couplings.detach())
    matrix = ((couplings + couplings.mT) / 2).coalesce()
    start, end = matrix.indices()
    upper = (start < end).nonzero()[:, 0]
    pairs = torch.stack([start[upper], end[upper]], -1)
    return matrix.values().index_select(0, upper), graph_of(pairs, n)


def couplings_within(pairs: Pairs, couplings: Tensor, blocks: Tensor) -> Tensor:
    """The couplings between the sites of each block, 0 where there are none.

    Args:
        pairs: the pairs that interact.
        couplings: as :func:`interactions` gives them.
        blocks: indices of sites, shape ``(G, k)``.

    Returns:
        Symmetric matrices, shape ``(*batch, G, k, k)``.

    Example:
        >>> edges = torch.tensor([[1, 0], [1, 2]])
        >>> couplings, pairs = interactions(torch.tensor([2.0, 3.0]), edges)
        >>> couplings_within(pairs, couplings, torch.tensor([[0, 1]]))
        tensor([[[0., 2.],
                 [2., 0.]]])
    """
    i, j = blocks[:, :, None], blocks[:, None, :]
    if pairs.coupling_dim == 2:
        return symmetric(couplings)[..., i, j]
    batch, n, num_edges = couplings.shape[:-1], pairs.num_sites, pairs.num_edges
    ends = pairs.edges.sort(-1).values
    # one more than the last pair stands for no pair
    keys, edge = torch.cat([ends @ ends.new_tensor([n, 1]), ends.new_tensor([n * n])]).sort()
    wanted = torch.minimum(i, j) * n + torch.maximum(i, j)
    place = torch.searchsorted(keys, wanted)
    found = torch.where(keys[place] == wanted, edge[place], num_edges)
    every = couplings.expand(batch + (num_edges,))
    return torch.cat([every, couplings.new_zeros(batch + (1,))], -1)[..., found]


def check_symmetric(couplings: Tensor) -> None:
    """Raises a ValueError unless matrices are symmetric, to rounding, with a diagonal of 0.

    Args:
        couplings: shape ``(*batch, n, n)``, or a sparse COO matrix.

    Example:
        >>> check_symmetric(torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
        Traceback (most recent call last):
        ValueError: couplings must be symmetric, but the entries [0, 1] and [1, 0] differ by 0.5...
    """
    tolerance = torch.finfo(couplings.dtype).eps ** 0.5
    place, gap = _largest(couplings - couplings.mT)
    if gap > tolerance * _largest(couplings)[1]:
        *batch, i, j = place
        raise ValueError(
            f"couplings must be symmetric, but the entries {[*batch, i, j]} and {[*batch, j, i]}"
            f" differ by {gap:.4g}: give J + J.mT of one triangle, or (J + J.mT) / 2"
        )
    place, value = _largest(couplings, on_diagonal=True)
    if value > 0:
        raise ValueError(
            f"the diagonal of couplings must be 0, but the entry {place} has size {value:.4g}: what"
            " a site does alone belongs in its bias (a diagonal J_ii adds J_ii / 2 to the bias of a"
            " 0/1 unit, and is a constant of spins)"
        )


def _largest(matrix: Tensor, on_diagonal: bool = False) -> tuple[list[int], float]:
    """Where the entry of largest size is, of all or of those on the diagonal, and its size."""
    if matrix.is_sparse:
        matrix = matrix.coalesce()
        places, size = matrix.indices(), matrix.values().abs()
        if on_diagonal:
            size = torch.where(places[0] == places[1], size, 0)
        if not len(size):
            return [], 0.0
        return places[:, size.argmax()].tolist(), float(size.max())
    size = matrix.abs()
    if on_diagonal:
        size = torch.diag_embed(size.diagonal(0, -2, -1))
    place = torch.unravel_index(size.argmax(), size.shape)
    return [int(i) for i in place], float(size.max())
