"""Counts of exchange moves, and warnings of faults that leave no trace in the draws."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_ebm.files import Saved

ENOUGH, FEW = 10, 4
"""Fewer moves than this prove nothing, or only if they are most of all."""
MAX_STILL, MAX_STILL_OF_ONE = 0.02, 0.5
"""The largest share of accepted moves that may stand still: of all chains, of one chain."""
MAX_LOST = 0.01
"""The largest share of all moves that rounding may decide."""


class Watch:
    """Counts moves chain by chain, and warns once of each fault.

    A move that was accepted while its inner chains stood still does not depend on the data: it is
    one of the prior. A mean over all chains would not show the one that is lost far out. A move is
    *lost* if it was rejected as undecided (:mod:`~pyro_ebm.mcmc.exchange.terms`) and would else
    perhaps have been accepted.

    Args:
        warmup_steps: of the run. The second half of the warmup counts, and warnings come at its
            end and after 1, 3, 7, ... transitions more.
    """

    def __init__(self, warmup_steps: int):
        self.first, self.end = warmup_steps // 2, max(warmup_steps, 1)
        self.steps = 0
        self.counts: Tensor | None = None
        """Moves, accepted, of these while inner chains stood still, lost: shape ``(4, chains)``."""
        self.reported: list[str] = []

    def add(
        self,
        accepted: Tensor,
        still: Tensor,
        lost: Tensor,
        chains: Mapping[str, object],
        dtype: torch.dtype,
    ) -> None:
        """Counts a move of every chain.

        Args:
            accepted: shape ``(chains,)``.
            still: the share of its inner chains that stood still, shape ``(chains,)``.
            lost: shape ``(chains,)``.
            chains: the inner chains, by site.
            dtype: of the energies.
        """
        self.steps += 1
        if self.steps <= self.first:
            return
        one = torch.ones_like(still)
        counts = torch.stack([one, accepted * one, accepted * still, lost * one])
        self.counts = counts if self.counts is None else self.counts.to(counts) + counts
        after = self.steps - self.end + 1
        if after > 0 and after & (after - 1) == 0:
            self._look(self.counts, chains, dtype)

    @property
    def num_lost(self) -> int:
        """How many moves were lost."""
        return 0 if self.counts is None else int(self.counts[3].sum())

    def _look(self, counts: Tensor, chains: Mapping[str, object], dtype: torch.dtype) -> None:
        moves, accepted, still, lost = counts.double().cpu()
        total = still.sum() / accepted.sum()
        of_one = (still >= ENOUGH) & (still > MAX_STILL_OF_ONE * accepted)
        most = still.sum() >= FEW and total > MAX_STILL_OF_ONE
        if most or (still.sum() >= ENOUGH and total > MAX_STILL) or of_one.any():
            where = f"chain {int(of_one.int().argmax())}" if of_one.any() else "all chains"
            share = (still / accepted)[of_one][0] if of_one.any() else total
            self._warn(
                "still",
                f"in {100 * float(share):.3g}% of the accepted moves of {where} the inner chain of"
                f" site {_listed(chains)} stands still ({_listed(chains.values())}): its"
                " auxiliaries are the data, so that the draws fall back to the prior. Leave"
                " inner_kernel at its default, or give one that moves at every value of the"
                " latents, or a longer warmup for it to adapt",
            )
        if lost.sum() >= ENOUGH and lost.sum() > MAX_LOST * moves.sum():
            name = str(dtype).removeprefix("torch.")
            way = (
                "give the data and the parameters in double precision (x.double(),"
                " torch.set_default_dtype(torch.float64))"
                if dtype != torch.float64
                else "subtract from the energy what is the same for all data"
            )
            self._warn(
                "lost",
                f"{100 * float(lost.sum() / moves.sum()):.3g}% of the moves are rejected because"
                f" the energies are so large that their rounding in {name} would decide. The draws"
                f" may miss where these lead: {way}",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self.reported:
            self.reported.append(what)
            warnings.warn(message, stacklevel=7)

    def state_dict(self) -> Saved:
        """The counts so far, for :meth:`load_state_dict`."""
        return {"steps": self.steps, "counts": self.counts, "reported": list(self.reported)}

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from the counts of another one."""
        self.steps, self.counts = state["steps"], state["counts"]
        self.reported = list(state["reported"])


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(repr, values))
