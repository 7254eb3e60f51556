"""Draws follow their density, and the density has mass 1; images are what they say."""

import gzip
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import datasets
from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
from tests.enumeration import assert_counts
from tests.statistics import assert_mean_of_rows

SETS = {
    "eight_gaussians": datasets.EightGaussians(),
    "two_moons": datasets.TwoMoons(),
    "swiss_roll": datasets.SwissRoll(),
    "rings": datasets.Rings(),
    "checkerboard": datasets.Checkerboard(),
    "pinwheel": datasets.Pinwheel(),
}
OTHERS = {
    "eight_gaussians, wide": datasets.EightGaussians(noise=1.0),
    "two_moons, thin": datasets.TwoMoons(noise=0.1),
    "swiss_roll, wide": datasets.SwissRoll(noise=0.6),
    "two rings": datasets.Rings(0.3, (0.5, 3.5)),
    "pinwheel of three": datasets.Pinwheel(3),
}


def midpoints(half_width: float, points: int) -> tuple[torch.Tensor, float]:
    side = 2 * half_width / points
    axis = side * (torch.arange(points, dtype=torch.float64) + 0.5) - half_width
    return torch.cartesian_prod(axis, axis), side**2


@pytest.mark.parametrize("p", [*SETS.values(), *OTHERS.values()], ids=[*SETS, *OTHERS])
def test_draws_follow_the_density(p):
    # cells of side .5, each of 10 x 10 midpoints
    x, area = midpoints(8.0, 320)
    mass = (p.log_prob(x).exp() * area).reshape(32, 10, 32, 10).sum((1, 3)).flatten()
    assert abs(mass.sum() - 1) < 1e-4
    draws = p.sample((20_000,))
    cell = ((draws + 8) / 0.5).floor().long()
    assert ((cell >= 0) & (cell < 32)).all()
    counts = (32 * cell[:, 0] + cell[:, 1]).bincount(minlength=1024).double()
    likely = mass > 1e-3
    rest = torch.stack([counts[~likely].sum()]), torch.stack([1 - mass[likely].sum()])
    assert_counts(torch.cat([counts[likely], rest[0]]), torch.cat([mass[likely], rest[1]]))


@pytest.mark.parametrize("name", SETS)
def test_the_function_draws_from_the_distribution(name):
    draw = getattr(datasets, name)
    pyro.set_rng_seed(3)
    x, y = draw(50), draw(50)
    pyro.set_rng_seed(3)
    assert torch.equal(SETS[name].sample((5, 10)).reshape(50, 2), x)
    assert not torch.equal(x, y)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    before = torch.get_rng_state()
    a, b = (draw(7, generator=g) for g in generators)
    assert torch.equal(a, b)
    assert a.shape == (7, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(0).shape == (0, 2)
    with pytest.raises(ValueError, match="n must be an integer"):
        draw(2.5)


@pytest.mark.parametrize("p", SETS.values(), ids=SETS)
def test_a_density_is_a_distribution_of_pyro(p):
    with pyro.plate("rows", 4):
        x = pyro.sample("x", p)
    assert x.shape == (4, 2)
    assert p.expand((3,)).sample((2,)).shape == (2, 3, 2)
    for shape in [(), (3,), (2, 3)]:
        assert p.log_prob(torch.zeros(*shape, 2)).shape == shape
    x64 = x.double()
    assert p.log_prob(x64).dtype == torch.float64
    torch.testing.assert_close(p.log_prob(x64).float(), p.log_prob(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="right-most size"):
        p.log_prob(torch.zeros(3))
    torch.set_default_dtype(torch.float64)
    assert p.sample().dtype == torch.float64


def test_curves_of_hardly_any_noise_are_summed_as_finely():
    # in the middle of a straight enough piece: 1 / (2 length) N(0; 0, s^2) across
    p = datasets.TwoMoons(noise=0.001)
    x = torch.tensor([-1.0, 1.5], dtype=torch.float64)
    across = dist.Normal(0.0, 0.001).log_prob(torch.tensor(0.0)).double()
    assert abs(p.log_prob(x) - across + torch.tensor(4 * torch.pi).log()) < 1e-3


@pytest.mark.parametrize("noise", [0.0, -1.0, torch.inf, "wide"])
def test_noise_must_be_positive(noise):
    for make in (datasets.two_moons, datasets.rings, datasets.eight_gaussians, datasets.swiss_roll):
        with pytest.raises(ValueError, match="noise must be"):
            make(3, noise=noise)


def test_digits_are_split_by_seed():
    parts, again, other = datasets.digits(), datasets.digits(), datasets.digits(seed=1)
    assert torch.equal(parts.train, again.train)
    assert not torch.equal(parts.train, other.train)
    both = torch.cat([parts.train, parts.test])
    assert both.shape == (1797, 8, 8)
    assert (both.min(), both.max(), both.dtype) == (0, 1, torch.float32)
    assert torch.equal(16 * both, (16 * both).round())
    shares = parts.train_labels.bincount() / (1797 * 0.8), other.test_labels.bincount() / 359.4
    assert (shares[0] - shares[1]).abs().max() < 0.005
    # labels belong to their images: the nearest image held out has the same digit
    near = torch.cdist(parts.test.flatten(1), parts.train.flatten(1)).argmin(1)
    assert (parts.train_labels[near] == parts.test_labels).double().mean() > 0.95


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-ebm\[datasets\]'"):
        datasets.digits()


def write_idx(path, array, pack=gzip.compress):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(pack(bytes([0, 0, 8, array.dim()]) + sizes + array.numpy().tobytes()))


def test_fashion_mnist_from_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        datasets.fashion_mnist(tmp_path)
    whole = torch.randint(256, (7, 28, 28), dtype=torch.uint8)
    labels = torch.tensor([3, 0, 9, 9, 1, 5, 2], dtype=torch.uint8)
    for part, rows, pack in (("train", slice(4), gzip.compress), ("t10k", slice(4, 7), bytes)):
        end = "" if pack is bytes else ".gz"
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{end}", whole[rows], pack)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", labels[rows], pack)
    parts = datasets.fashion_mnist(tmp_path)
    assert torch.equal((255 * torch.cat([parts.train, parts.test])).round().byte(), whole)
    assert parts.train.dtype == torch.float32
    assert parts.train_labels.tolist() == [3, 0, 9, 9]
    assert parts.test_labels.tolist() == [1, 5, 2]
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:3])
    with pytest.raises(ValueError, match="4 images, 3 labels"):
        datasets.fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(b"\0\0\x08\x01\0\0\0\x04ab")
    )
    with pytest.raises(ValueError, match="not a whole IDX file"):
        datasets.fashion_mnist(tmp_path)


@pytest.mark.parametrize("temperature", [1.5, 2.269, 4.0])
def test_ising_spins_follow_their_density(temperature):
    p = BoltzmannMachine(1 / temperature, edges=lattice_edges(4, 4))
    states = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * 16) - 1
    weights = (-p.energy(states).double()).softmax(0)
    x = datasets.ising(2000, 4, temperature, num_sweeps=200)
    assert x.shape == (2000, 4, 4)
    for of in (p.energy, lambda s: s.mean(-1).abs(), lambda s: s.mean(-1)):
        assert_mean_of_rows(of(x.flatten(1)).double(), (weights * of(states)).sum())


def test_wrong_arguments_of_ising():
    with pytest.raises(ValueError, match="temperature must be positive"):
        datasets.ising(3, temperature=0.0)
    with pytest.raises(ValueError, match="side must be"):
        datasets.ising(3, side=1)
