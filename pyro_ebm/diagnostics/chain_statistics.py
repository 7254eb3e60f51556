r"""Statistics by which the chains of a run are compared, for all elements of all sites at once.

*Split R-hat* (Pyro's) compares the means of :math:`m` half-chains of :math:`n` draws with the
variance :math:`W` inside of them. Where chains have converged and their draws have the
autocorrelation time :math:`\tau`, the variance of the means is about
:math:`\tau W \chi^2_{m-1} / (m - 1) / n`, and so

.. math:: \hat R^2 = 1 + \frac{1}{n} \left(\tau\, \frac{\chi^2_{m-1}}{m - 1} - 1\right) .

The R-hat of a short run is large by chance: 1.15 is nothing unusual at 4 chains of 100 draws and
:math:`\tau = 5`. :func:`largest_r_hat` is the greatest that converged chains give.

R-hat is also taken of *ranks*, as normal scores, which the heavy tails of a distribution do not
hide, and of the ranks of distances from the median, by which chains differ in spread.

Of a run that is too large :func:`survey` looks at evenly spaced draws, at ``LIMIT`` numbers in all;
if there are too many elements for that, at evenly spaced ones and at those that are suspect. Ranks
are taken of fewer still.

Where chains started together in super-chains, R-hat is the nested one
(:mod:`pyro_ebm.diagnostics.superchains`).

Reference:
    Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and
    localization: an improved R-hat for assessing convergence of MCMC.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyro_ebm.diagnostics.superchains import (
    largest_nested_r_hat,
    nested_r_hat,
)

LIMIT = 2**22
"""How many numbers are looked at."""
RANKED, LOCATED = 2**19, 2**20
"""Of how many ranks are taken, and medians."""
BLOCK = 2**20
"""How many are held at once."""
FEWEST = 250
"""Of so many draws of each chain, if there are, before elements are left out."""
PAIRS = 100
"""Of how many draws of each chain medians are taken, and moves to the next draw."""
AUTOCORRELATION_TIME = 5.0
"""That of draws which count as well mixed."""
LEVEL = 1e-3
"""The probability with which R-hat says that chains which have converged have not."""


class Elements:
    """The elements of all sites side by side, numbered.

    Args:
        samples: the draws of each site, shape ``(chains, draws, *site)``.
        num_superchains: how many super-chains started together, if they did.

    Example:
        >>> elements = Elements({"a": torch.zeros(4, 100), "b": torch.zeros(4, 100, 2, 3)})
        >>> len(elements), elements.name(0), elements.name(6)
        (7, 'a', 'b[1,2]')
    """

    def __init__(self, samples: Mapping[str, Tensor], num_superchains: int | None = None):
        self.num_superchains = num_superchains
        sites = {name: x.detach() for name, x in samples.items() if x.numel() > 0}
        self.shapes = {name: x.shape[2:] for name, x in sites.items()}
        self.sites = {name: x.reshape(*x.shape[:2], -1) for name, x in sites.items()}
        first = next(iter(sites.values()), torch.empty(0, 0))
        self.num_chains, self.num_draws = first.shape[:2]

    def r_hat(self, x: Tensor) -> Tensor:
        """Split R-hat of draws ``(chains, draws, ...)``, or nested R-hat where it applies."""
        if self.num_superchains is None:
            return split_gelman_rubin(x)
        return nested_r_hat(x, self.num_superchains)

    def largest_r_hat(self, num_draws: int) -> float:
        """The greatest that converged chains of so many draws give, in any of the elements."""
        if self.num_superchains is None:
            return largest_r_hat(self.num_chains, num_draws, len(self))
        z, time = _quantile(len(self)), AUTOCORRELATION_TIME
        return largest_nested_r_hat(self.num_superchains, self.num_chains, num_draws, time, z)

    def __len__(self) -> int:
        return sum(x.shape[2] for x in self.sites.values())

    def name(self, element: int) -> str:
        """The site of an element, with its index, as in Pyro's summaries."""
        for name, x in self.sites.items():
            if element < x.shape[2]:
                index = []
                for size in reversed(self.shapes[name]):
                    element, i = divmod(element, size)
                    index.insert(0, str(i))
                return f"{name}[{','.join(index)}]" if index else name
            element -= x.shape[2]
        raise IndexError(element)

    def at(self, chains: Tensor, draws: Tensor) -> Tensor:
        """All elements of some draws, one of a chain for each row, ``(rows, elements)``."""
        rows = [x[chains.to(x.device), draws.to(x.device)] for x in self.sites.values()]
        return torch.cat(rows, -1).double()

    def take(self, numbers: Tensor, draws: slice = slice(None)) -> Tensor:
        """Draws of the elements of these numbers, which ascend, ``(chains, draws, k)``."""
        sizes = torch.tensor([x.shape[2] for x in self.sites.values()])
        stops = torch.searchsorted(numbers, sizes.cumsum(0)).tolist()
        found, before, start = list[Tensor](), 0, 0
        for x, stop in zip(self.sites.values(), stops, strict=True):
            if stop > start:
                index = numbers[start:stop] - before
                x, first, last = x[:, draws], int(index[0]), int(index[-1])
                all_between = last - first == stop - start - 1
                part = x[..., first : last + 1] if all_between else x[..., index.to(x.device)]
                found.append(part)
            before, start = before + x.shape[2], stop
        return torch.cat(found, -1).double()


@dataclass
class Survey:
    """What is known of each element that was looked at, and of each chain.

    Attributes:
        number: of the element, shape ``(k,)``.
        r_hat: its split R-hat; NaN where all draws are equal.
        gap: the widest gap between the locations of chains, in units of the spread of a chain.
        tails: the standard deviation in units of that spread: large where tails are heavy.
        whole: whether its draws are whole numbers.
        num_draws: of how many draws of each chain R-hat is.
        moves: of each chain, how far it moves to the next draw, in units of the spread of all
            draws, in the element where that is most; infinite without real elements.
        own_moves: the same in units of its own spread, in the mean of the elements.
        constant: whether it stands at one point.
        finite: whether all draws are.
    """

    number: Tensor
    r_hat: Tensor
    gap: Tensor
    tails: Tensor
    whole: Tensor
    num_draws: int
    moves: Tensor
    own_moves: Tensor
    constant: Tensor
    finite: bool


class _Of(NamedTuple):
    """A survey of one block."""

    r_hat: Tensor
    gap: Tensor
    tails: Tensor
    whole: Tensor


def survey(elements: Elements) -> Survey:
    """Looks at the draws of all elements, or of some; at least 4 of each chain, or 1 if nested."""
    chains, draws = elements.num_chains, elements.num_draws
    every = -(-draws // max(FEWEST, LIMIT // (chains * len(elements))))
    num = -(-draws // every)
    number = some_elements(elements, LIMIT // (chains * num))
    pairs = min(PAIRS, max(PAIRS // 3, LOCATED // (chains * len(number))))
    last = max(1, draws - 1)  # of a single draw there is no move
    apart = -(-last // pairs)
    found, finite = list[_Of](), True
    moves, own_moves = torch.zeros(2, chains, dtype=torch.float64)
    constant = torch.ones(chains, dtype=torch.bool)
    for block in number.split(max(1, BLOCK // (chains * num))):
        x = elements.take(block, slice(None, None, every))
        here = elements.take(block, slice(0, last, apart))
        there = elements.take(block, slice(draws - last, None, apart))
        place = locate(here)
        tails = x.flatten(0, 1).std(0) / place.spread
        of = _Of(elements.r_hat(x), gaps(place), tails, place.whole)
        found.append(_Of(*(value.cpu() for value in of)))
        finite &= bool(x.sum().isfinite())
        constant &= (here == here[:, :1]).all(2).all(1).cpu()
        move = (there - here).abs().mean(1)
        own = (here - place.location[:, None]).abs().mean(1)
        all_draws = (here - place.location.quantile(0.5, 0)).abs().mean((0, 1))
        relative, own = (
            torch.where(place.whole, 0.0, _ratio(move, spread)) for spread in (all_draws, own)
        )
        moves = torch.maximum(moves, relative.amax(1).cpu())
        own_moves = own_moves + own.sum(1).cpu()
    all_of = _Of(*(torch.cat(values) for values in zip(*found, strict=True)))
    num_real = int((~all_of.whole).sum())
    if num_real == 0:
        moves, constant = moves + math.inf, constant & False
    own_moves = own_moves / num_real if num_real else moves
    return Survey(number, *all_of, num, moves, own_moves, constant, finite)


def some_elements(elements: Elements, most: int) -> Tensor:
    """The numbers of all elements, or if there are too many of evenly spaced ones and of suspects.

    Suspects are those in which the means of 4 draws differ most between half-chains.
    """
    total = len(elements)
    if total <= most:
        return torch.arange(total)
    half, suspicion = elements.num_draws // 2, list[Tensor]()
    few = [slice(first, first + half, -(-half // 4)) for first in (0, half)]
    for x in elements.sites.values():
        within, means = torch.var_mean(torch.stack([x[:, part].float() for part in few]), 2)
        suspicion.append(_ratio(means.flatten(0, 1).var(0), within.mean((0, 1))).cpu())
    suspects = torch.cat(suspicion).topk(most // 2).indices
    return torch.cat([suspects, _evenly(total, most // 2)]).unique()


def _evenly(total: int, most: int) -> Tensor:
    return torch.arange(0, total, -(-total // most))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The ratio a / b, and 0 where a is 0."""
    return torch.where(a == 0, 0.0, a / b)


class Places(NamedTuple):
    """Where each chain is, of each element."""

    location: Tensor
    """The median of its draws, or the mean of whole numbers, shape ``(chains, k)``."""
    spread: Tensor
    """The spread of a chain, shape ``(k,)``: for normal draws their standard deviation."""
    whole: Tensor
    """Whether an element is a whole number, shape ``(k,)``."""


def locate(x: Tensor) -> Places:
    """Where the chains of the draws ``(chains, draws, k)`` are.

    Neither far tails nor a few chains elsewhere matter: the spread is the width from the 10th to
    the 90th percentile, in the median of the chains. Medians of bits would say little: whole
    numbers have means, and the root of the mean variance.
    """
    ranked, last = x.sort(1).values, x.shape[1] - 1
    low, middle, high = (ranked[:, round(p * last)] for p in (0.1, 0.5, 0.9))
    whole = (x == x.round()).flatten(0, 1).all(0)
    #   of a normal distribution  q(.9) - q(.1) = 2.563 sd
    spread = ((high - low) / 2.563).quantile(0.5, 0)
    return Places(
        torch.where(whole, x.mean(1), middle),
        torch.where(whole, x.var(1, correction=min(last, 1)).mean(0).sqrt(), spread),
        whole,
    )


def gaps(places: Places) -> Tensor:
    """The widest gap between chains, in units of their spread, shape ``(k,)``."""
    if len(places.location) < 2:
        return torch.zeros_like(places.spread)
    return _ratio(places.location.sort(0).values.diff(dim=0).amax(0), places.spread)


def rank_r_hats(elements: Elements, found: Survey) -> tuple[Tensor, Tensor, int]:
    """R-hat of ranks, and of the ranks of distances from the median.

    Args:
        elements: the draws.
        found: what is known of them.

    Returns:
        The numbers of the elements, shape ``(k,)``; the R-hats, shape ``(2, k)``; and of how many
        draws of each chain they are.
    """
    chains, draws, number = elements.num_chains, elements.num_draws, found.number[~found.whole]
    every = -(-draws // max(2 * FEWEST, RANKED // (chains * max(1, len(number)))))
    num = -(-draws // every)
    most = max(2, RANKED // (chains * num))
    if len(number) > most:
        heaviest = found.tails[~found.whole].topk(most // 2).indices
        number = number[torch.cat([heaviest, _evenly(len(number), most // 2)]).unique()]
    if len(number) == 0:
        return number, torch.empty(2, 0), num
    x = elements.take(number, slice(None, None, every))
    scores, median = normal_scores(x)
    distances, _ = normal_scores((x - median).abs())
    r_hats = [elements.r_hat(x) for x in (scores, distances)]
    return number, torch.stack(r_hats).cpu(), num


def normal_scores(x: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks of all draws ``(chains, draws, k)`` as quantiles of N(0, 1), and the medians."""
    values, order = x.flatten(0, 1).sort(0)
    num = len(values)
    places = torch.arange(1, num + 1, device=x.device, dtype=x.dtype)
    scores = torch.special.ndtri((places - 3 / 8) / (num + 1 / 4))
    found = torch.empty_like(values).scatter_(0, order, scores[:, None].expand_as(values))
    return found.reshape(x.shape), values[num // 2]


def largest_r_hat(num_chains: int, num_draws: int, num_elements: int) -> float:
    r"""The greatest split R-hat of chains that have converged, with the probability 1 - ``LEVEL``.

    Of draws with the autocorrelation time ``AUTOCORRELATION_TIME``; the quantile of
    :math:`\chi^2` is Wilson and Hilferty's.

    Args:
        num_chains: the number of chains.
        num_draws: the draws of each.
        num_elements: of how many elements it is the greatest; each has three R-hats.

    Example:
        >>> [round(largest_r_hat(4, n, 10), 2) for n in (50, 100, 1000)]
        [1.38, 1.21, 1.02]
    """
    n, k = num_draws // 2, 2 * num_chains - 1
    z = _quantile(num_elements)
    chi_square = (1 - 2 / (9 * k) + z * math.sqrt(2 / (9 * k))) ** 3  # / k
    return math.sqrt(1 + (AUTOCORRELATION_TIME * chi_square - 1) / n)


def _quantile(num_elements: int) -> float:
    """The normal quantile that none of three R-hats of each element exceeds, but with ``LEVEL``."""
    level = torch.tensor(1 - LEVEL / (3 * num_elements), dtype=torch.float64)
    return float(torch.special.ndtri(level))
