r"""What the negatives tell of their chains, and warnings of chains that fail in silence.

Acceptance rate and energies look well while the chains of a gradient fail in two ways. Their step
size may *collapse*: the energy grows steep, the step size follows it down, and negatives that
hardly move are no draws of it. Or they lie *apart* from the data: wider, since they have not
arrived, or narrower, since they sit on a few points. So two numbers are kept of each gradient: with
data :math:`x`, and chains from :math:`s_c` to :math:`x'_c`,

.. math:: \text{spread} = \sqrt{\frac{\operatorname{tr} \operatorname{Cov}(x')}
                                     {\operatorname{tr} \operatorname{Cov}(x)}}, \qquad
          \text{distance moved} = \frac{\operatorname{median}_c |x'_c - s_c|}
                                       {\sqrt{\operatorname{tr} \operatorname{Cov}(x)}} .

The median is that of chains that go on, even where some start again. Independent draws of many
dimensions are :math:`\sqrt 2` apart. Neither number takes an evaluation of the energy.
"""

import copy
import math
import warnings
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.files import Saved
from pyro_ebm.losses.contrastive.negatives import Negatives
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.code import outside_level

COLLAPSED = 0.1
"""A step size that falls has collapsed below this part of its highest, if chains move little."""
FALLING = 1 / 3
"""It is falling below this part of what it was after half as many gradients."""
SHORT = 0.5
"""Chains that move by less than this, in spreads of the data, move little."""
APART = 2.0
"""A spread beyond this factor, either way, is far from that of the data."""
LONG = 300
"""For so many gradients in a row is for long."""


def chain_numbers(data: Tensor, start: Tensor, end: Tensor) -> dict[str, Tensor]:
    """The spread of negatives, and the distance that their chains moved.

    Args:
        data: shape ``(rows, d)``.
        start: where the chains started, shape ``(chains, d)``.
        end: the negatives, of the same shape.

    Returns:
        ``spread`` and ``distance_moved``, of shape ``()``; nothing of a single row or chain.

    Example:
        >>> data, start = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0], [8.0]])
        >>> chain_numbers(data, start, start + torch.tensor([[1.0], [3.0], [2.0]]))
        {'spread': tensor(3.2404), 'distance_moved': tensor(1.4142)}
    """
    if min(len(data), len(end)) < 2:
        return {}
    data, start, end = (x if x.is_floating_point() else x.float() for x in (data, start, end))
    of_data, of_negatives = (
        torch.linalg.vector_norm(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (data, end)
    )
    moved = torch.linalg.vector_norm(end - start, dim=1).median()
    return {"spread": of_negatives / of_data, "distance_moved": moved / of_data}


@dataclass
class _Followed:
    """What is kept in mind of the chains of a site."""

    num_gradients: int = 0
    highest: float = 0.0
    """The highest step size."""
    marks: list[tuple[int, float]] = field(default_factory=list)
    """Numbers of gradients, a tenth apart, and the step sizes then."""
    apart: int = 0
    """For how many gradients the spread has been far from that of the data."""
    warned: list[str] = field(default_factory=list)

    def trend(self, step_size: float) -> float:
        """Takes in a step size; what part it is of the highest."""
        self.num_gradients += 1
        self.highest = max(self.highest, step_size)
        if not self.marks or self.num_gradients >= 1.1 * self.marks[-1][0]:
            self.marks.append((self.num_gradients, step_size))
        return step_size / self.highest

    def falls_to(self, step_size: float) -> bool:
        """Whether a step size is far below that after half as many gradients."""
        half = self.num_gradients / 2
        before = next((size for n, size in reversed(self.marks) if n <= half), step_size)
        return step_size < FALLING * before


class ChainWatch:
    """Follows the chains of each site, and warns once of either failure.

    A step size that is high while the energy is flat falls to a level as the energy takes shape.
    Only one that goes on falling has collapsed, whatever the rate of the training.

    Example:
        >>> watch = ChainWatch()
        >>> [watch.trend("x", step_size, distance_moved=0.9) for step_size in (0.5, 2.0, 1.0)]
        [1.0, 1.0, 0.5]
    """

    def __init__(self) -> None:
        self._sites: dict[str, _Followed] = {}

    def __call__(self, site: EnergySite, negatives: Negatives) -> dict[str, Tensor]:
        """The numbers of a gradient, by their names in the loss's diagnostics.

        Args:
            site: the site.
            negatives: its negatives.
        """
        width = site.energy.event_shape.numel()
        points = (site.x, negatives.start, negatives.x)
        data, start, end = (x.detach().reshape(-1, width) for x in points)
        if site.mask is not None:
            rows = site.mask.reshape(-1)
            data = data[rows]
            if negatives.by_row:
                start, end = start[rows], end[rows]
        numbers = chain_numbers(data, start, end)
        spread, moved = map(float, numbers.values()) if numbers else (math.nan, math.nan)
        if negatives.restarted is not None:
            numbers["restarted"] = negatives.restarted
        if negatives.adapts:
            trend = self.trend(site.name, float(negatives.step_size), moved, site.energy)
            numbers["step_size_trend"] = negatives.step_size.new_tensor(trend)
        if site.is_observed:  # the draws of a guide need not be spread as a prior's are, at first
            self.compare(site.name, spread, site.energy)
        return numbers

    def trend(
        self,
        name: str,
        step_size: float,
        distance_moved: float,
        energy: UnnormalizedEnergy | None = None,
    ) -> float:
        """The step size as a part of its highest so far; warns if it has collapsed.

        Args:
            name: the site's.
            step_size: that of this gradient.
            distance_moved: by the chains.
            energy: on which the advice depends.
        """
        followed = self._followed(name)
        trend = followed.trend(step_size)
        if trend < COLLAPSED and distance_moved < SHORT and followed.falls_to(step_size):
            self._warn(
                name,
                "step size",
                f"the step size of the chains has fallen from {followed.highest:.2g} to"
                f" {step_size:.2g} and goes on falling, and half of them {_move(distance_moved)} at"
                " a gradient: the energy has grown too steep for them, and the negatives are no"
                f" draws of it. {_against_steepness(energy)}",
            )
        return trend

    def compare(self, name: str, spread: float, energy: UnnormalizedEnergy | None = None) -> None:
        """Warns if the spread of the negatives has been far from that of the data for long.

        Args:
            name: the site's.
            spread: that of the negatives over that of the data.
            energy: on which the advice depends.
        """
        followed = self._followed(name)
        apart = math.isfinite(spread) and not 1 / APART <= spread <= APART
        followed.apart = followed.apart + 1 if apart else 0
        if followed.apart >= LONG:
            advice = _too_wide(energy) if spread > 1 else NARROW
            self._warn(
                name,
                "spread",
                f"for {LONG} gradients in a row the spread of the negatives was far from that of"
                f" the data, at last {spread:.2g} times as large: {advice}",
            )

    def _followed(self, name: str) -> _Followed:
        return self._sites.setdefault(name, _Followed())

    def _warn(self, name: str, of: str, what: str) -> None:
        warned = self._followed(name).warned
        if of not in warned:
            warned.append(of)
            warnings.warn(f"site {name!r}: {what}", stacklevel=outside_level())

    def state_dict(self) -> Saved:
        """What is kept in mind of each site."""
        return {name: asdict(followed) for name, followed in self._sites.items()}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._sites = {name: _Followed(**copy.deepcopy(kept)) for name, kept in state.items()}


def _move(distance: float) -> str:
    return f"move by less than {distance:.2g} of the data's spread" if distance else "do not move"


def _against_steepness(energy: UnnormalizedEnergy | None) -> str:
    ways = ["take a smaller or a falling rate, or more num_steps"]
    if energy is None or energy.base is None:
        ways.append("give the energy a base that is like the data and wider")
    hold = "hold it by energy_penalty"
    if energy is not None and energy.modules:
        normed = any(map(is_parametrized, energy.modules))  # or constrained in another way
        hold += "" if normed else f" or a spectral norm of its layers ({SPECTRAL_NORM})"
    ways.append(hold)
    ways.append(
        "add noise to data that lie on a surface, as images with pixels that are always 0 do"
    )
    return "; ".join(ways).capitalize()


def _too_wide(energy: UnnormalizedEnergy | None) -> str:
    has_one = energy is not None and energy.base is not None
    base = "Take a base that is nearer to" if has_one else "Give the energy a base that is like"
    return (
        f"the chains have not come to the data from where they start. {base} the data and wider, as"
        " base=gaussian_noise(data, width=2.0), take more num_steps, or a smaller rate"
    )


SPECTRAL_NORM = (
    "torch.nn.utils.parametrizations.spectral_norm, and spectral_norm=True of pyro_ebm.nn's"
)
NARROW = (
    "the chains sit on a few points, or have not spread from where they start. Take"
    " restart_prob=0.05, more chains and num_steps, or a smaller rate"
)
