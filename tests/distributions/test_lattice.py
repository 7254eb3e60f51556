"""Lattices and colourings: every edge once, few colours, proper ones, memory by the edges."""

import itertools
import pickle

import networkx
import pytest
import torch

from pyro_ebm.distributions.boltzmann import interaction_graph as lattice
from pyro_ebm.distributions.boltzmann.interaction_graph import (
    complete_graph,
    graph_of,
    lattice_edges,
)


def as_pairs(edges):
    return sorted(tuple(sorted(pair)) for pair in edges.tolist())


@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3), (1, 5), (1,), (2, 2), (3, 4, 5)])
@pytest.mark.parametrize("periodic", [True, False])
def test_a_lattice_is_that_of_networkx(shape, periodic):
    edges = lattice_edges(*shape, periodic=periodic)
    grid = networkx.Graph()
    places = list(itertools.product(*map(range, shape)))  # row by row
    for i, place in enumerate(places):
        for axis, side in enumerate(shape):
            end = list(place)
            end[axis] += 1
            if periodic:
                end[axis] %= side
            if tuple(end) in places and tuple(end) != place:
                grid.add_edge(i, places.index(tuple(end)))  # of a pair that comes twice, one
    assert edges.shape == (grid.number_of_edges(), 2)
    assert edges.dtype == torch.long
    assert as_pairs(edges) == sorted(tuple(sorted(pair)) for pair in grid.edges)


def test_one_side_may_wrap_alone():
    edges = lattice_edges(3, 4, periodic=(False, True))
    assert len(edges) == 2 * 4 + 3 * 4
    assert as_pairs(edges[:8]) == as_pairs(lattice_edges(3, 4, periodic=False)[:8])


@pytest.mark.parametrize("shape", [(), (0, 3), (2.0,), (-1,)])
def test_sides_are_positive_integers(shape):
    with pytest.raises(ValueError, match="sides of a lattice must be integers of at least 1"):
        lattice_edges(*shape)


def test_one_flag_for_each_side():
    with pytest.raises(ValueError, match="one for each of the 2 sides"):
        lattice_edges(3, 4, periodic=(True,))


@pytest.mark.parametrize(
    ("shape", "periodic", "colours"),
    [
        ((4, 4), True, 2),
        ((32, 32), True, 2),
        ((4, 6, 2), True, 2),
        ((5, 7), False, 2),
        ((3, 3), True, 3),
        ((5, 5), True, 3),
        ((3, 4, 5), True, 3),
        ((1,), True, 1),
    ],
)
def test_a_lattice_has_as_few_colours_as_can_be(shape, periodic, colours):
    n = torch.Size(shape).numel()
    graph = graph_of(lattice_edges(*shape, periodic=periodic), n)
    assert len(graph.blocks) == colours
    assert_proper(graph)


def assert_proper(graph):
    """Every site in one block, no edge within one, nor within the independent blocks together."""
    assert graph.order.sort().values.tolist() == list(range(graph.num_sites))
    block = torch.empty(graph.num_sites, dtype=torch.long)
    for k, sites in enumerate(graph.blocks):
        block[sites] = k
    start, end = graph.edges.unbind(-1)
    assert (block[start] != block[end]).all()
    alone = torch.isin(block, torch.tensor(graph.independent))
    assert not (alone[start] & alone[end]).any()
    assert graph.rest.tolist() == (~alone).nonzero()[:, 0].tolist()


def test_the_checkerboard():
    even, odd = graph_of(lattice_edges(4, 4)).blocks
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    assert even.tolist() == ((rows + columns) % 2 == 0).nonzero()[:, 0].tolist()
    assert len(odd) == 8


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs(seed):
    graph = networkx.gnp_random_graph(30, 0.2, seed=seed)
    edges = torch.tensor(list(graph.edges))
    assert_proper(graph_of(edges, 30))


def test_bipartite_graphs_are_not_left_to_a_greedy_search(monkeypatch):
    monkeypatch.setattr(networkx, "greedy_color", None)
    crown = torch.tensor([(2 * i, 2 * j + 1) for i in range(40) for j in range(40) if i != j])
    graph = graph_of(crown)  # the greedy order of degrees takes 40 colours
    assert len(graph.blocks) == 2
    assert_proper(graph)


def test_a_star_takes_memory_by_its_edges():
    # the hub's colour holds one site of each pair too: side by side all would have its degree
    n = 5000
    star = torch.stack([torch.zeros(n, dtype=torch.long), torch.arange(1, n + 1)], -1)
    pairs = torch.arange(n + 1, 3 * n + 1).reshape(n, 2)
    graph = graph_of(torch.cat([star, pairs]), 4 * n)
    assert_proper(graph)
    assert len(graph.blocks) < 6
    assert sum(near.edges.numel() for near in graph.neighbours) == 4 * n


def test_complete_graph():
    graph = complete_graph(5)
    assert as_pairs(graph.edges) == list(itertools.combinations(range(5), 2))
    assert graph.num_edges == 10
    assert_proper(graph)
    # views of one tensor are not saved each with all of it
    assert len(pickle.dumps(complete_graph(1000))) < 1000
    assert pickle.loads(pickle.dumps(graph)).num_sites == 5


def test_colourings_are_remembered_by_the_edges_contents(monkeypatch):
    edges = lattice_edges(6, 5)
    graph = graph_of(edges)
    monkeypatch.setattr(lattice, "colour_sites", None)  # any further colouring would fail
    assert graph_of(edges) is graph
    assert graph_of(edges.clone()) is graph
    assert graph_of(edges.int()) is graph
    monkeypatch.undo()
    edges[0] = torch.tensor([0, 7])  # in place: another graph in the same tensor
    assert graph_of(edges).edges[0].tolist() == [0, 7]
    assert graph.edges[0].tolist() == [0, 5]


def test_a_graph_pickles():
    graph = graph_of(lattice_edges(3, 4))
    copy = pickle.loads(pickle.dumps(graph))
    assert all(map(torch.equal, copy.blocks, graph.blocks))


@pytest.mark.parametrize(
    ("edges", "num_sites", "says"),
    [
        ([[0, 1], [2, 2]], None, r"edges\[1\] = \(2, 2\) joins a site to itself"),
        ([[0, 1], [1, 2], [1, 0]], None, r"\[0\] and \[2\] are both the pair \(0, 1\)"),
        ([[0, 1], [0, 1]], None, r"\[0\] and \[1\] are both the pair \(0, 1\)"),
        ([[0, 1], [1, 4]], 4, r"edges\[1\] = \(1, 4\) is not a pair of the 4 sites 0 to 3"),
        ([[0, 1], [-1, 0]], None, r"edges\[1\] = \(-1, 0\) is not a pair"),
        ([0, 1], None, r"shape \(E, 2\).*got shape \(2,\)"),
        ([[0.0, 1.0]], None, "must be integers .*got torch.float32"),
        (torch.zeros(0, 2, dtype=torch.long), None, "give num_sites="),
    ],
)
def test_bad_edges(edges, num_sites, says):
    with pytest.raises(ValueError, match=says):
        graph_of(torch.as_tensor(edges), num_sites)


def test_edges_that_are_no_tensor():
    with pytest.raises(ValueError, match=r"edges must be pairs of sites.*got \[\[0, 1\]\]"):
        graph_of([[0, 1]])
