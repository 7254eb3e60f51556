"""What is wrong with the draws of a run, in words, with the next thing to try.

A run that has not converged has draws like any other. :func:`findings` looks at them: do the chains
agree, do some stand apart or hardly move, do draws diverge or run off? What it compares, and from
where on it speaks, is in :mod:`pyro_ebm.diagnostics.chain_statistics`.

A further finding is one line more in :func:`findings`, or one
:attr:`~pyro_ebm.mcmc.Kernel.findings` of a kernel.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyro_ebm.diagnostics.chain_statistics import (
    LIMIT,
    Elements,
    Survey,
    gaps,
    locate,
    rank_r_hats,
    survey,
)

MAX_R_HAT = 1.05
MAX_NESTED_R_HAT = 1.01
MAX_R_HAT_ALONE = 1.2
"""Of the halves of a single chain: above it, most chains drift."""
MAX_GAP = 4.0
"""Chains stand apart if the gap between them is so many times the spread of one."""
MIN_MOVE, MIN_OWN_MOVE = 0.02, 0.25
"""A chain hardly moves if it moves less between two draws, see :class:`Survey`."""
MANY = 50
"""So many draws are enough to see whether a chain moves."""
MIN_RISE = 0.8
"""Of the correlation of a chain's log density with time: it goes on rising."""
MAX_LP = 1e10
"""No log density of a model is larger, or smaller than minus this."""
LOOKED_AT_AGAIN = 5
"""So many of the worst elements are looked at with all of their draws."""
LISTED = 5
"""So many chains are listed by their numbers."""

ONE_STEP = {"LangevinKernel", "BarkerKernel", "MHKernel"}
WARMUP = "a longer warmup (warmup_steps=)"
MORE = "a longer warmup and more draws (warmup_steps=, num_samples=)"
CHEES = "ChEESKernel, which moves further in a transition"
TEMPERING = "TemperingKernel, which crosses between far modes"
REPARAMETRISE = "another parametrisation (pyro.infer.reparam)"
FINITE_Z = (
    "another sign of the energy, or base= of UnnormalizedEnergy, if it has no finite Z"
    " (p is proportional to exp(-E))"
)
STARTS = "other starts (init_strategy=, initial_params=)"


class ConvergenceWarning(UserWarning):
    """The draws of a run may be wrong: the message says what was found, and what to try."""


class Sampler(NamedTuple):
    """What made the draws.

    Attributes:
        kernels: the names of the kernels, which are not recommended again.
        max_divergences: which share of diverging transitions is harmless.
        adapts_step_size: whether the warmup adapts a step size.
    """

    kernels: Collection[str] = ()
    max_divergences: float = 0.0
    adapts_step_size: bool = True

    def other_step(self, way: str) -> str:
        """The remedy of a ``"smaller"`` or ``"larger"`` step."""
        to = "1" if way == "smaller" else "0"
        setting = f"target_accept_prob nearer to {to}" if self.adapts_step_size else "step_size"
        return f"a {way} step ({setting})"

    def without(self, *remedies: str) -> list[str]:
        """The remedies that are not in use already."""
        return [text for text in remedies if text.partition(",")[0] not in self.kernels]


class Finding(NamedTuple):
    """Something that is wrong with the draws of a run.

    Attributes:
        kind: ``"r_hat"``, ``"apart"``, ``"stuck"``, ``"diverging"``, ``"run_off"``, or a kernel's.
        text: what was found, with its place and its number.
        remedies: what to try, the first one first; none where another finding has them.
    """

    kind: str
    text: str
    remedies: Sequence[str]

    def __str__(self) -> str:
        if not self.remedies:
            return f"{self.text}."
        *others, last = self.remedies
        return f"{self.text}. Try {'; '.join([*others, f'or {last}' if others else last])}."


def warn(found: Sequence[Finding], stacklevel: int) -> None:
    """One :class:`ConvergenceWarning` of all findings, if there are any."""
    if found:
        lines = "".join(f"\n- {finding}" for finding in found)
        warnings.warn(f"these draws may be wrong:{lines}", ConvergenceWarning, stacklevel + 1)


@torch.no_grad()
def findings(
    samples: Mapping[str, Tensor],
    fields: Mapping[str, Tensor],
    sampler: Sampler = Sampler(),  # noqa: B008
    num_superchains: int | None = None,
) -> list[Finding]:
    """What is wrong with the draws of a run.

    Args:
        samples: the draws of each site, shape ``(chains, draws, *site)``.
        fields: the statistics of each draw, shape ``(chains, draws)``.
        sampler: what made them.
        num_superchains: how many super-chains started together, if they did: R-hat is nested.

    Returns:
        The findings; none of fewer than 4 draws of each chain, unless there are super-chains.

    Example:
        >>> x = torch.randn(16, 200)
        >>> x[14:] += 8
        >>> for finding in findings({"x": x}, {}):
        ...     print(finding.text)
        R-hat is 2.84 at 'x': the chains do not agree
        2 of 16 chains (14, 15) stand apart: they are near 7.78 at 'x', the others near 0.00162
    """
    elements = Elements(samples, num_superchains)
    enough = elements.num_draws >= 4
    if not len(elements) or not (enough or num_superchains):
        return []
    found = survey(elements)
    if far := _run_off(elements, found, fields):
        return [far]
    stuck = _stuck(elements, found)
    apart = _apart(elements, found, ~stuck, sampler) if enough else None
    of_draws = [
        None if stuck.all() else _r_hat(elements, found, sampler, apart is None),
        apart,
        _hardly_moving(found, stuck, fields, sampler),
        _diverging(elements, fields, sampler),
    ]
    return [finding for finding in of_draws if finding is not None]


# -- the chains agree ------------------------------------------------------------------------------


def _r_hat(
    elements: Elements, found: Survey, sampler: Sampler, with_remedies: bool
) -> Finding | None:
    chains, nested = elements.num_chains, elements.num_superchains is not None
    name = "nested R-hat" if nested else "R-hat"
    limit = _limit(elements, found.num_draws)
    number, size = _worst(found.number, found.r_hat)
    size = elements.r_hat(elements.take(number)).cpu()  # of all draws, as a summary has it
    size = torch.where(size.isnan(), 0.0, size)
    size, at, what = float(size.max()), int(number[size.argmax()]), name
    if size > _limit(elements, elements.num_draws):
        over, of = int((found.r_hat > limit).sum()), len(found.number)
    else:
        ranked, r_hats, num_draws = rank_r_hats(elements, found)
        if not len(ranked):
            return None
        limit = _limit(elements, num_draws)
        largest = r_hats.amax(0)
        number, worst = _worst(ranked, largest)
        size, at = float(worst.max()), int(number[worst.argmax()])
        if not size > limit:
            return None
        over, of = int((largest > limit).sum()), len(ranked)
        column = r_hats[:, int((ranked == at).nonzero())]
        what = f"{name} of the ranks"
        if column[1] > column[0]:
            what = f"{name} of the distances from the median"
    more = f" (and over {limit:.{2 + nested}f} at {over} of {of} elements)" if over > 1 else ""
    parts = "chains do" if chains > 1 else "halves of the chain do"
    parts = "super-chains do" if nested else parts
    others = [REPARAMETRISE]
    if found.whole.all():
        others = [TEMPERING]
    elif ONE_STEP.intersection(sampler.kernels):
        others = [CHEES, REPARAMETRISE]
    return Finding(
        "r_hat",
        f"{what} is {size:.{3 + nested}g} at {elements.name(at)!r}{more}: the {parts} not agree",
        sampler.without(MORE, *others) if with_remedies else (),
    )


def _limit(elements: Elements, num_draws: int) -> float:
    """The largest R-hat of so many draws of each chain that is nothing unusual."""
    at_least = MAX_R_HAT if elements.num_superchains is None else MAX_NESTED_R_HAT
    return max(at_least, elements.largest_r_hat(num_draws))


def _worst(number: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The elements at which it is largest, in ascending order, NaN being small."""
    size = torch.where(size.isnan(), -math.inf, size)
    index = size.topk(min(LOOKED_AT_AGAIN, len(size))).indices.sort().values
    return number[index], size[index]


def _apart(elements: Elements, found: Survey, moving: Tensor, sampler: Sampler) -> Finding | None:
    """Whether the widest gap between the chains that move parts them into groups."""
    chains = moving.nonzero().flatten()
    limit = MAX_GAP * max(1.0, math.sqrt(MANY / elements.num_draws))
    number, gap = _worst(found.number, found.gap)
    if len(chains) < 2 or not (gap > limit).any():
        return None
    x = elements.take(number)
    x = x[chains.to(x.device)]
    places = locate(x)
    gap = gaps(places)
    if not gap.max() > limit:
        return None
    worst = int(gap.argmax())
    place, order = places.location[:, worst].cpu().sort()
    cut = int(place.diff().argmax()) + 1
    groups = [(place[:cut], order[:cut]), (place[cut:], order[cut:])]
    (here, few), (there, _) = sorted(groups, key=lambda group: len(group[0]))
    one, name = len(few) == 1, elements.name(int(number[worst]))
    which = _of_chains(chains[few].sort().values, elements.num_chains)
    near = f"near {float(here.median()):.3g} at {name!r}"
    alone = torch.stack([split_gelman_rubin(chain[None, :, worst]) for chain in x])
    remedies = [TEMPERING, WARMUP, STARTS]
    if float(alone.median()) > MAX_R_HAT_ALONE:  # they have not come to rest
        remedies = [WARMUP, TEMPERING, STARTS]
    return Finding(
        "apart",
        f"{which} stand{'s' * one} apart: {'it is' if one else 'they are'} {near}, the others near"
        f" {float(there.median()):.3g}",
        sampler.without(*remedies),
    )


# -- the chains move -------------------------------------------------------------------------------


def _stuck(elements: Elements, found: Survey) -> Tensor:
    """Which chains hardly move, shape ``(chains,)``."""
    if elements.num_draws < MANY:
        return torch.zeros_like(found.constant)
    slow = (found.moves < MIN_MOVE) & (found.own_moves < MIN_OWN_MOVE)
    return slow | found.constant


def _hardly_moving(
    found: Survey, stuck: Tensor, fields: Mapping[str, Tensor], sampler: Sampler
) -> Finding | None:
    if not stuck.any():
        return None
    moves, of = found.moves[stuck], _of_chains(stuck.nonzero().flatten(), len(stuck))
    numbers, remedies = "", [WARMUP, STARTS]
    if "step_size" in fields and "acceptance_rate" in fields:
        step_size, rates = (
            fields[name].cpu()[stuck].double() for name in ("step_size", "acceptance_rate")
        )
        rate = float(rates.mean())
        numbers = f" (step size {float(step_size.median()):.2g}, acceptance {rate:.2g})"
        remedies.insert(0, sampler.other_step("smaller" if rate < 0.5 else "larger"))
        if not sampler.adapts_step_size:
            remedies.insert(1, "adapt_step_size=True")
    one, share = int(stuck.sum()) == 1, float(moves.max())
    text = f"{of} stand{'s' * one} still{numbers}"
    if share > 0:
        far = f"{_percent(share)} of the spread of all draws"
        text = f"{of} hardly move{'s' * one}, between two draws by at most {far}{numbers}"
        if _rises(fields, stuck):
            text += ", and the log density rises all along"
            remedies = [FINITE_Z, WARMUP, STARTS]
    return Finding("stuck", text, remedies)


def _rises(fields: Mapping[str, Tensor], which: Tensor) -> bool:
    """Whether the log density of most of these chains, ``(chains,)``, rises with each draw."""
    if "lp" not in fields:
        return False
    lp = fields["lp"].cpu()[which].double()
    time = torch.arange(lp.shape[1], dtype=lp.dtype).expand_as(lp)
    along = torch.stack([time, lp], 1)
    along = along - along.mean(-1, keepdim=True)
    time, lp = (along / along.norm(dim=-1, keepdim=True)).unbind(1)
    return bool((time * lp).sum(-1).median() > MIN_RISE)


# -- the transitions are valid ---------------------------------------------------------------------


def _diverging(
    elements: Elements, fields: Mapping[str, Tensor], sampler: Sampler
) -> Finding | None:
    """Whether more than ``max_divergences`` diverge, or ten times that of one chain."""
    share, diverging = sampler.max_divergences, fields.get("diverging")
    if diverging is None or not diverging.any():
        return None
    counts, draws = diverging.sum(1).cpu(), diverging.shape[1]
    count, worst, total = int(counts.sum()), int(counts.max()), diverging.numel()
    few = 2 if share > 0 else 0
    if count <= max(few, share * total) and worst <= max(few, 10 * share * draws):
        return None
    text = f"{count} of {total} draws diverged ({_percent(count / total)})"
    if len(counts) > 1 and worst > count / 2:
        text += f", {worst} of them in chain {int(counts.argmax())}"
    if where := _where_diverging(elements, diverging):
        text += f", most of them where {where}"
    return Finding("diverging", text, [sampler.other_step("smaller"), REPARAMETRISE])


def _where_diverging(elements: Elements, diverging: Tensor) -> str | None:
    """The element whose draws differ most where transitions diverged, if they do."""
    most, rows = max(1, min(500, LIMIT // len(elements))), []
    for chosen in (diverging, ~diverging):
        chain, draw = chosen.nonzero(as_tuple=True)
        some = slice(None, None, -(-len(chain) // most) or 1)
        rows.append(elements.at(chain[some], draw[some]))
    if min(map(len, rows)) == 0:
        return None
    here, there = (x.median(0).values for x in rows)
    spread = (rows[1] - there).abs().mean(0)
    distance = torch.where(spread > 0, (here - there).abs() / spread, 0.0)
    at = int(distance.argmax())
    if not distance[at] > 1:
        return None
    return f"{elements.name(at)!r} is near {float(here[at]):.2g} (elsewhere {float(there[at]):.2g})"


def _run_off(elements: Elements, found: Survey, fields: Mapping[str, Tensor]) -> Finding | None:
    """Whether draws are not finite, or so far out that the log density is."""
    lp = fields.get("lp")
    far = torch.zeros(0) if lp is None else ((lp.abs() > MAX_LP) | ~lp.isfinite()).any(1).cpu()
    if found.finite and not far.any():
        return None
    largest = torch.cat([x.double().abs().amax((0, 1)).cpu() for x in elements.sites.values()])
    at = int(torch.where(largest.isnan(), math.inf, largest).argmax())
    of = _of_chains(far.nonzero().flatten(), len(far)) if far.any() else "draws"
    return Finding(
        "run_off",
        f"{of} ran off: {elements.name(at)!r} reaches {float(largest[at]):.2g}",
        [
            "a smaller step_size",
            "adjusted=True of LangevinKernel",
            FINITE_Z,
        ],
    )


# -- words -----------------------------------------------------------------------------------------


def _of_chains(which: Tensor, total: int) -> str:
    """Such as "2 of 16 chains (3, 11)"."""
    if len(which) == total:
        return f"all {total} chains" if total > 1 else "the chain"
    listed = f" ({', '.join(map(str, which.tolist()))})" if len(which) <= LISTED else ""
    return f"{len(which)} of {total} chains{listed}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
