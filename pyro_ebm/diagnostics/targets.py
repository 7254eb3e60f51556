r"""How far draws are from a target, and how many more are expected to reach it.

The effective sample size grows as the number of draws does, and so does
:math:`1 / (\hat R^2 - 1)` of chains that have converged: a target that is missed by a factor wants
so many times the draws. A run that has not converged breaks this rule, so that each prediction is
kept between 1.1 and 2 times the draws that there are.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics.chain_statistics import Elements
from pyro_ebm.diagnostics.convergence import REPARAMETRISE, Finding
from pyro_ebm.diagnostics.superchains import effective_draws
from pyro_ebm.ops.arguments import check_names, shown

LEAST, MOST = 1.1, 2.0
BEYOND = 1.05
"""So many times the draws that are expected to do."""


class Gap(NamedTuple):
    """A target that is missed.

    Attributes:
        what: in words, with its place and its number.
        factor: how many times the draws it wants.
    """

    what: str
    factor: float


class Target:
    """What draws are to reach, and when to give up.

    Args:
        ess: the least effective sample size.
        rhat: the largest R-hat.
        names: the sites that count; None for all.
        max_draws: the most draws of each chain.
        max_seconds: the most time, if given.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> target = Target(ess=1000, rhat=1.01)
        >>> [gap.what for gap in target.gaps({"x": torch.randn(4, 100)})]
        ["the effective sample size is 359 at 'x', and not 1000"]
        >>> target.gaps({"x": torch.randn(4, 400)})
        []
    """

    def __init__(
        self,
        ess: float,
        rhat: float,
        names: Sequence[str] | None = None,
        max_draws: int = 10**9,
        max_seconds: float | None = None,
    ):
        positive = {"ess": ess, "max_seconds": math.inf if max_seconds is None else max_seconds}
        for name, value in positive.items():
            if not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{name} must be a number above 0, got {shown(value)}")
        if not (isinstance(rhat, int | float) and rhat > 1):
            raise ValueError(f"rhat must be a number above 1, as 1.01, got {shown(rhat)}")
        if names is not None:
            check_names("names", names)
            if not names:
                raise ValueError("names must hold at least one site, or be None for all of them")
        self.ess, self.rhat, self.names = ess, rhat, names
        self.max_draws, self.max_seconds = max_draws, positive["max_seconds"]

    def check(self, kept: Collection[str]) -> None:
        """Raises a ValueError if a site that counts is not kept."""
        if unknown := [name for name in self.names or () if name not in kept]:
            raise ValueError(f"names has {unknown}, the sites that are kept are {sorted(kept)}")

    @torch.no_grad()
    def gaps(self, samples: Mapping[str, Tensor], num_superchains: int | None = None) -> list[Gap]:
        """The targets that draws ``(chains, draws, *site)`` miss, each where it is missed most.

        Elements of which all draws are equal do not count.
        """
        elements, found = Elements(samples, num_superchains), list[Gap]()
        parts = [x.reshape(*x.shape[:2], -1).double() for x in samples.values() if x.numel()]
        if not parts:
            return []
        if num_superchains is None and elements.num_draws < 4:
            return [Gap(f"there are {elements.num_draws} draws of each chain, and not 4", MOST)]
        moving = torch.cat([(x != x[:1, :1]).flatten(0, 1).any(0) for x in parts]).cpu()
        ess = torch.cat([effective_draws(x) for x in parts]).cpu()
        ess = torch.where(moving, torch.where(ess.isnan(), 0.0, ess), math.inf)
        worst = int(ess.argmin())
        if (least := float(ess[worst])) < self.ess:
            what = f"the effective sample size is {least:.3g} at {elements.name(worst)!r}"
            factor = math.inf if least <= 0 else self.ess / least
            found.append(Gap(f"{what}, and not {self.ess:g}", factor))
        r_hats = [elements.r_hat(x) for x in parts]
        r_hat = torch.cat(r_hats).cpu()
        r_hat = torch.where(moving, torch.where(r_hat.isnan(), math.inf, r_hat), 1.0)
        worst = int(r_hat.argmax())
        if (largest := float(r_hat[worst])) > self.rhat:
            what = f"{'R-hat' if num_superchains is None else 'nested R-hat'} is {largest:.4g}"
            what = f"{what} at {elements.name(worst)!r}, and not {self.rhat:g}"
            found.append(Gap(what, (largest**2 - 1) / (self.rhat**2 - 1)))
        return found

    def more(self, gaps: Sequence[Gap], num: int, seconds: float, pace: float) -> int:
        """How many draws of each chain are to follow; 0 if none.

        Args:
            gaps: what is missed.
            num: the draws that there are.
            seconds: the time that was spent.
            pace: how many seconds a draw takes; infinite if that is not known.
        """
        left = self.max_seconds - seconds
        if not gaps or left <= 0:
            return 0
        factor = BEYOND * max(gap.factor for gap in gaps)
        wanted = math.ceil(num * min(max(factor, LEAST), MOST)) - num
        if self.max_seconds < math.inf:  # by small steps until the pace is known
            in_time = left / pace if pace < math.inf else num / 10
            wanted = min(wanted, max(1, int(in_time)))
        return max(0, min(wanted, self.max_draws - num))

    def missed(self, gaps: Sequence[Gap], num: int, seconds: float) -> Finding:
        """The finding that a run stopped before its target."""
        late = seconds >= self.max_seconds
        limit = f"max_seconds={self.max_seconds:g}" if late else f"max_draws={self.max_draws}"
        text = "; ".join(gap.what for gap in gaps)
        more = "more time" if late else "more draws (max_draws=)"
        return Finding(
            "target",
            f"stopped by {limit}, after {num} draws of each chain: {text}",
            [more, REPARAMETRISE],
        )
