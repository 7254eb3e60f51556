"""The checkpoints of tempered particles: one small file, replaced after a temperature."""

import time
import warnings

import torch
from torch import Tensor

from pyro_ebm import files
from pyro_ebm.evidence.smc.run import TemperedRun
from pyro_ebm.files import CheckpointError, PathLike
from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.running.run_settings import RunSettings, differences, machine
from pyro_ebm.mcmc.running.storage.checkpoint import Every
from pyro_ebm.ops.distributed import rank_path
from pyro_ebm.ops.rank_files import load_common

KIND = "an SMC run"
PROBES = 16
"""Particles at which the model is compared with that of the checkpoint."""


class SMCCheckpoint:
    """The checkpoints of one run.

    Args:
        path: the file; each rank has its own.
        every: how many temperatures, or how much time, lies between two of them.
        settings: what the run was asked to do.
        ranks: share out the particles, and save together.
    """

    def __init__(self, path: PathLike, every: Every, settings: RunSettings, ranks: ProcessGroup):
        self.given, self.path, self.every, self.settings = (
            path,
            rank_path(path, "checkpoint"),
            every,
            settings,
        )
        self.ranks, self._last, self._time = ranks, 0, time.monotonic()

    def refuse_to_replace(self) -> None:
        """Raises a CheckpointError if there is a file already."""
        if self.path.exists():
            raise CheckpointError(
                f"{self.path} is there already: go on from it with resume(...), or move it away"
            )

    def save(self, run: TemperedRun) -> None:
        """Saves a run that is at the start, at its end, or due; a failure is a warning."""
        made = len(run.temperatures)
        due = made - self._last >= self.every if isinstance(self.every, int) else self._waited()
        due = bool(self.ranks.from_first(torch.tensor(float(due))))
        if not (due or made == 0 or run.done):
            return
        payload = {
            "settings": self.settings,
            "machine": machine(),
            "run": run.state_dict(),
            "potential": _potential(run),
        }
        try:
            files.save(self.path, payload, KIND)
        except OSError as error:
            if made == 0:
                raise
            warnings.warn(
                f"the checkpoint after temperature {made} could not be written ({error}): the run"
                f" goes on, and {self.path} is as it was",
                stacklevel=4,
            )
        self._last, self._time = made, time.monotonic()

    def _waited(self) -> bool:
        assert not isinstance(self.every, int)
        return time.monotonic() - self._time >= self.every.total_seconds()

    def load(self, run: TemperedRun) -> None:
        """Puts a run where that of the file was.

        Raises:
            FileNotFoundError: if there is no file.
            CheckpointError: if it is of another run, or another model.
        """
        try:
            several = self.ranks.size > 1
            payload = (
                load_common(self.given, KIND, _mark) if several else files.load(self.path, KIND)
            )
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no checkpoint at {self.path}: start with run(...), or give its path"
            ) from None
        assert payload is not None
        if found := differences(self.settings, payload["settings"]):
            raise CheckpointError(
                f"{self.path} is of another run: {'; '.join(found[:5])}. Give what it was run with,"
                " or another path"
            )
        run.load_state_dict(payload["run"])
        saved: Tensor = payload["potential"]
        if not torch.allclose(_potential(run).cpu(), saved, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise CheckpointError(
                f"the model is another one than that of {self.path}: at the positions that were"
                " saved it has another density. Go on with the model, the parameters and the data"
                " of the run"
            )
        run.restore_random_state(payload["run"])


def _potential(run: TemperedRun) -> Tensor:
    with torch.no_grad():
        return run.path.at(1.0)(run.z[:PROBES])


def _mark(payload: files.Saved) -> tuple[int, int]:
    return 0, len(payload["run"]["temperatures"])
