r"""The rows that subsampled plates of a model look at.

A plate ``pyro.plate("data", N, subsample_size=n)`` draws :math:`n` of its :math:`N` rows without
replacement, and Pyro multiplies the log densities in it by :math:`N / n`, in nested plates by the
product of these. Given the rows a model is one fixed density

.. math:: U_S(z) = -\log p(z) - \frac{N}{n} \sum_{i \in S} \log p(x_i \mid z),

whose mean over the subsamples :math:`S` is the potential of all the data. So is its mean over the
blocks of a partition of the rows, each weighted by its size.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.models.runs import is_subsample, latents_of
from pyro_ebm.models.sites.latents import SampleSite

MAX_RANKED = 100_000
"""Up to so many numbers are ranked to draw the subsamples of many chains at once."""
Rows = dict[str, Tensor]
"""The rows of each subsampled plate, by its name: shape ``(n,)``, or ``(chains, n)``."""


class PlateSize(NamedTuple):
    """How many rows a plate has, and how many of them it looks at."""

    size: int
    subsample_size: int


class GivenRows(Messenger):
    """Tells the subsampled plates of a model which rows to look at: the first ones, or ``rows``.

    Example:
        >>> def model(y):
        ...     with pyro.plate("data", 4, subsample_size=2) as rows:
        ...         return pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[rows])
        >>> given = GivenRows()
        >>> given(model)(torch.arange(4.0))
        tensor([0., 1.])
        >>> given.rows = {"data": torch.tensor([3, 1])}
        >>> given(model)(torch.arange(4.0)), given.plates
        (tensor([3., 1.]), {'data': PlateSize(size=4, subsample_size=2)})

    Attributes:
        plates: the subsampled plates that were met.
        rows: what they look at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, PlateSize] = {}
        self.rows: Rows = {}

    def _pyro_sample(self, msg: SampleSite) -> None:
        if not is_subsample(msg) or msg["value"] is not None:
            return
        name, fn = msg["name"], msg["fn"]
        size, subsample_size = getattr(fn, "size", 0), getattr(fn, "subsample_size", None)
        if subsample_size is None or subsample_size >= size:
            return
        plate = PlateSize(size, subsample_size)
        if self.plates.setdefault(name, plate) != plate:
            raise ValueError(
                f"plate {name!r} subsamples {plate.subsample_size} of {plate.size}, and before"
                f" {self.plates[name].subsample_size} of {self.plates[name].size}: its sizes are to"
                " be the same in every run"
            )
        if name not in self.rows:
            device = getattr(fn, "device", None)
            self.rows[name] = torch.arange(subsample_size, device=device)
        msg["value"] = self.rows[name]


def refuse_local_latents(trace: poutine.Trace, plates: Mapping[str, PlateSize]) -> None:
    """Raises a NotImplementedError for a latent inside a subsampled plate; it names both."""
    for name, site in latents_of(trace).items():
        for frame in site["cond_indep_stack"]:
            if frame.name in plates:
                raise NotImplementedError(
                    f"site {name!r} is a latent of each row of the subsampled plate {frame.name!r},"
                    " and a step sees few of the rows: sum or integrate it out of the likelihood"
                    " (a mixture is dist.MixtureSameFamily), or sample it in a plate of all rows,"
                    f" without subsample_size, outside of {frame.name!r}, and index it there by"
                    " the rows"
                )


def draw_rows(plates: Mapping[str, PlateSize], num: int | None, device: torch.device) -> Rows:
    """A subsample of each plate, or ``num`` of them.

    Example:
        >>> rows = draw_rows({"data": PlateSize(5, 3)}, 2, torch.device("cpu"))["data"]
        >>> rows.shape, rows.sort().values.diff().min() > 0
        (torch.Size([2, 3]), tensor(True))
    """
    found = {}
    for name, (size, n) in plates.items():
        rows = _subsamples(num or 1, size, n, device)
        found[name] = rows[0] if num is None else rows
    return found


def _subsamples(num: int, size: int, n: int, device: torch.device) -> Tensor:
    """``n`` of ``size`` rows without replacement, ``num`` times: shape ``(num, n)``.

    Where they are a small part, at a cost that does not grow with ``size``.
    """
    if 4 * n > size:
        if num > 1 and num * size <= MAX_RANKED:
            return torch.rand(num, size, device=device).topk(n, -1).indices
        return torch.stack([torch.randperm(size, device=device)[:n] for _ in range(num)])
    # the first n different ones of a sequence of independent rows
    x = torch.randint(size, (num, n + n // 2 + 10), device=device)
    ordered, place = x.sort(stable=True)
    new = torch.ones_like(x, dtype=torch.bool)
    new[:, 1:] = ordered.diff() != 0
    new = torch.zeros_like(new).scatter(1, place, new)  # in the order of the sequence
    count = new.cumsum(1)
    enough = count[:, -1] >= n
    rows = x[new & (count <= n) & enough[:, None]].reshape(-1, n)
    missing = num - len(rows)
    return torch.cat([rows, _subsamples(missing, size, n, device)]) if missing else rows


def blocks(plates: Mapping[str, PlateSize], device: torch.device) -> Iterator[tuple[Rows, float]]:
    r"""Subsamples, and weights with which their potentials add up to that of all the data.

    If :math:`n` does not divide :math:`N`, the :math:`r` rows that are left are filled up by row 0,
    which a block of nothing else takes away again:

    .. math:: \frac{n}{N} U_{R \cup \{0, \ldots, 0\}} - \frac{n - r}{N} U_{\{0, \ldots, 0\}}.

    Example:
        >>> for rows, weight in blocks({"data": PlateSize(5, 2)}, torch.device("cpu")):
        ...     print(rows["data"].tolist(), weight)
        [0, 1] 0.4
        [2, 3] 0.4
        [4, 0] 0.4
        [0, 0] -0.2
    """
    parts = [list(_blocks(plate, device)) for plate in plates.values()]
    for combination in itertools.product(*parts):
        weight = 1.0
        for _, of_plate in combination:
            weight *= of_plate
        yield dict(zip(plates, [rows for rows, _ in combination], strict=True)), weight


def _blocks(plate: PlateSize, device: torch.device) -> Iterator[tuple[Tensor, float]]:
    size, n = plate
    for rows in torch.arange(size - size % n, device=device).split(n):
        yield rows, n / size
    if rest := size % n:
        fill = torch.zeros(n - rest, dtype=torch.long, device=device)
        yield torch.cat([torch.arange(size - rest, size, device=device), fill]), n / size
        yield torch.zeros(n, dtype=torch.long, device=device), -(n - rest) / size


def stacked(rows: Sequence[Rows]) -> Rows:
    """Subsamples of several chains, shape ``(chains, n)``."""
    return {name: torch.stack([each[name] for each in rows]) for name in rows[0]} if rows else {}
