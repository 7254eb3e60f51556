"""Small images: handwritten digits, clothes, and the spins of an Ising model."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.ops.arguments import check_count, check_number


class LabelledImages(NamedTuple):
    """What :func:`digits` and :func:`fashion_mnist` return.

    Example:
        >>> images = digits()
        >>> images.train.shape, images.test_labels.shape
        (torch.Size([1437, 8, 8]), torch.Size([360]))
    """

    train: Tensor
    """Images to train on, shape ``(n, height, width)``."""
    test: Tensor
    """Images held out, shape ``(m, height, width)``."""
    train_labels: Tensor
    """Their classes, integers from 0 to 9, shape ``(n,)``."""
    test_labels: Tensor
    """Those of ``test``, shape ``(m,)``."""


def digits(test_size: float = 0.2, seed: int = 0) -> LabelledImages:
    """The 1,797 handwritten digits of scikit-learn, split in two with equal shares of each digit.

    A pixel is a multiple of 1/16 from 0 (paper) to 1 (ink). As bits they are
    ``(x > 7 / 16).to(x)``; densities on the real line want noise on them,
    ``(16 * x + torch.rand_like(x)) / 17``.

    Args:
        test_size: the part that is held out.
        seed: of the split.

    Raises:
        ImportError: without the package scikit-learn.

    Reference:
        Alpaydin and Kaynak (1998), Optical recognition of handwritten digits, UCI Machine Learning
        Repository.

    Example:
        >>> train, test, train_labels, test_labels = digits()
        >>> train.shape, test.shape
        (torch.Size([1437, 8, 8]), torch.Size([360, 8, 8]))
        >>> test_labels.bincount().tolist()
        [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "digits() needs the package scikit-learn: pip install 'pyro-ebm[datasets]'"
        ) from error
    x, labels = load_digits(return_X_y=True)
    parts = train_test_split(x, labels, test_size=test_size, random_state=seed, stratify=labels)
    train, test = (torch.tensor(part).reshape(-1, 8, 8) / 16 for part in parts[:2])
    dtype = torch.get_default_dtype()
    return LabelledImages(train.to(dtype), test.to(dtype), *map(torch.tensor, parts[2:]))


def fashion_mnist(folder: str | os.PathLike[str]) -> LabelledImages:
    """The 70,000 images of clothes of Fashion-MNIST, 28 x 28, from files that you have.

    A pixel is a multiple of 1/255 from 0 (background) to 1. The classes are T-shirt, trouser,
    pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.

    Args:
        folder: holds the four files ``train-images-idx3-ubyte.gz`` etc., as
            ``/usr/share/datasets/fashion-mnist`` does with Debian's package
            ``dataset-fashion-mnist``. Unpacked files will do.

    Raises:
        FileNotFoundError: if one is not there.
        ValueError: if one is not such a file, or does not have a label for each image.

    Reference:
        Xiao, Rasul and Vollgraf (2017), Fashion-MNIST: a novel image dataset for benchmarking
        machine learning algorithms.

    Example:
        >>> fashion_mnist("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: fashion_mnist() finds no train-images-idx3-ubyte.gz in 'nowhere'...
    """
    parts = []
    for part in ("train", "t10k"):
        x, labels = (_idx(Path(folder), f"{part}-{kind}-ubyte") for kind in FASHION_KINDS)
        if len(x) != len(labels):
            raise ValueError(f"{part} in {str(folder)!r}: {len(x)} images, {len(labels)} labels")
        parts.append((x.to(torch.get_default_dtype()) / 255, labels.long()))
    (train, train_labels), (test, test_labels) = parts
    return LabelledImages(train, test, train_labels, test_labels)


FASHION_KINDS = "images-idx3", "labels-idx1"


def _idx(folder: Path, name: str) -> Tensor:
    """The bytes of an IDX file: 0, 0, 8 (for bytes), the number of axes; their sizes; the data."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"fashion_mnist() finds no {name}.gz in {str(folder)!r}. On Debian: apt install"
            ' dataset-fashion-mnist, and fashion_mnist("/usr/share/datasets/fashion-mnist")'
        )
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error})") from error
    axes = int(name.split("idx")[1][0])
    start = 4 + 4 * axes
    shape = [int.from_bytes(data[i : i + 4]) for i in range(4, start, 4)]
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) != start + math.prod(shape):
        raise ValueError(f"{path} is not a whole IDX file of bytes with {axes} axes")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)


def ising(
    n: int,
    side: int = 8,
    temperature: float = 2 / math.log(1 + math.sqrt(2)),
    num_sweeps: int = 500,
) -> Tensor:
    r"""Spins of the Ising model on a square torus, -1 and 1.

    .. math:: p(s) \propto \exp\Big( \frac1T \sum_{i \sim j} s_i s_j \Big)

    Each image is the end of a Gibbs chain of its own. Half of the chains, by chance, start with all
    spins up, the others with all down: no chain has to cross from one magnetisation to the other.
    Near the critical temperature a chain forgets its start within about :math:`L^{2.2}` sweeps at
    side :math:`L`, a hundred by default, and a large lattice wants more ``num_sweeps``.

    Args:
        n: how many images.
        side: L.
        temperature: T, by default the critical one, 2.269.
        num_sweeps: sweeps of each chain.

    Returns:
        Shape ``(n, side, side)``. The density is
        ``BoltzmannMachine(1 / temperature, edges=lattice_edges(side, side))``, over flattened
        images; with ``side`` 6 at most its ``exact_sample`` draws exactly.

    Reference:
        Onsager (1944), Crystal statistics I.

    Example:
        >>> ising(100, side=4).unique()
        tensor([-1.,  1.])
        >>> hot, cold = (ising(100, 8, temperature) for temperature in (4.0, 1.5))
        >>> [round(float(x.mean((1, 2)).abs().mean()), 1) for x in (hot, cold)]
        [0.2, 1.0]
    """
    n, side = check_count("n", n, least=0), check_count("side", side, least=2)
    check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    density = BoltzmannMachine(1 / temperature, edges=lattice_edges(side, side))
    x = (2.0 * torch.randint(2, (n, 1)) - 1).repeat(1, side * side)
    for _ in range(check_count("num_sweeps", num_sweeps)):
        x = density.gibbs_sweep(x, density.gibbs_noise(x))
    return x.reshape(n, side, side)
