"""Ranks that share out the chains of a run: what they exchange, beside the warmup.

They start together or not at all, wait for each other about once a second, save their checkpoints
after one and the same transition, and bring their draws to rank 0. Between two waits they exchange
nothing. (Without the waits a rank that is a little faster would, after some hours, be ahead by more
than the timeout of the group, and a rank that hangs would be noticed at the end.)
"""

import time

import torch
from torch import Tensor

from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.running.chains import VectorizedRun
from pyro_ebm.mcmc.running.storage.checkpoint import Checkpoint

BETWEEN = 1.0
"""Seconds between two waits, about."""


class RankSync:
    """Lets the ranks wait for each other after some transitions, and save together.

    Rank 0 sets how many transitions there are to the next wait, and by its clock whether it is time
    for a checkpoint.

    Args:
        ranks: the ranks.
        checkpoint: of this rank.
    """

    def __init__(self, ranks: ProcessGroup, checkpoint: Checkpoint | None):
        self.ranks, self.checkpoint = ranks, checkpoint
        self._next = self._stride = 0
        self._time = time.monotonic()

    def __call__(self, run: VectorizedRun) -> None:
        """Waits for the other ranks, and saves a checkpoint, if it is time to."""
        checkpoint = self.checkpoint
        # a number of transitions is up on all ranks at once, a time is not
        counted = (
            checkpoint is not None and isinstance(checkpoint.every, int) and checkpoint.is_due(run)
        )
        if not (run.t >= self._next or run.done or counted):
            return
        took, self._time = time.monotonic() - self._time, time.monotonic()
        stride = max(self._stride, 1)
        stride = min(10 * stride, 1 + int(stride * BETWEEN / max(took, 1e-6)))
        due = checkpoint is not None and checkpoint.is_due(run)
        mine = torch.tensor([stride, due], dtype=torch.float64)
        failed = torch.tensor(checkpoint is not None and checkpoint.failed)
        self._stride, due = map(int, self.ranks.from_first(mine))
        any_failed = self.ranks.any(failed)
        self._next = run.t + self._stride
        if checkpoint is not None and due:
            # who saved the last one alone keeps the one before, which all have
            checkpoint.keep_previous = bool(failed) or not any_failed
            checkpoint.try_to_save(run)


CALLS = ("run", "resume")


def check_call(ranks: ProcessGroup, name: str) -> None:
    """Raises a ValueError unless all ranks make this call.

    Args:
        ranks: the ranks.
        name: ``"run"`` or ``"resume"``.
    """
    number = torch.tensor(float(CALLS.index(name)))
    ranks.check_alike(number, f"what they call: this one calls {name}, another one does not")


def check_alike(ranks: ProcessGroup, run: VectorizedRun, z: Tensor, num_chains: int) -> None:
    """Raises a ValueError unless all ranks have the same settings, model, data and parameters.

    Args:
        ranks: the ranks.
        run: before its start.
        z: where the chains here will start, shape ``(rows, dim)``.
        num_chains: of all ranks.
    """
    if ranks.size == 1:
        return
    numbers = [num_chains, run.goal, run.warmup_steps, run.thinning, run.potential.dim]
    ranks.check_alike(
        torch.tensor(numbers, dtype=torch.float64),
        "num_chains, num_samples, warmup_steps, thinning or the dimension of the model",
    )
    here = ranks.here(num_chains)
    first = ranks.from_first(z[: len(z) // (here.stop - here.start)])
    ranks.check_alike(run.kernel.evaluate(first).potential, "the log density of the model")


__all__ = ["RankSync", "check_alike", "check_call"]
