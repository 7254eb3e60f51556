"""Checkpoints: a run on disk, from which it goes on as if nothing had happened.

A checkpoint is one small file with the state of the run, and a folder beside it with the draws:

.. code-block:: text

    run.ckpt             where the run is, replaced at each checkpoint
    run.ckpt.previous    where it was one checkpoint earlier
    run.ckpt.draws/      00000.draws, 00001.draws, ...: what was drawn in between

Each checkpoint writes the draws since the last one to a file of their own, so that it costs as much
late in a run as early. These files form a chain: each holds the checksum of the one before, and the
state file that of the last. All are written as :mod:`pyro_ebm.files` says, the state file last: a
process that is killed in between leaves a file of draws that no state file refers to, and the next
one replaces it.
"""

import contextlib
import datetime
import time
import warnings
from pathlib import Path

from pyro_ebm import files
from pyro_ebm.files import CheckpointError, Saved
from pyro_ebm.mcmc.ranks import ProcessGroup
from pyro_ebm.mcmc.running.chains import VectorizedRun
from pyro_ebm.mcmc.running.run_settings import RunSettings, differences, machine
from pyro_ebm.mcmc.running.storage.draws import Memory
from pyro_ebm.ops.arguments import check_count
from pyro_ebm.ops.distributed import rank_path
from pyro_ebm.ops.rank_files import load_common

Every = int | datetime.timedelta
KIND, KIND_OF_DRAWS = "an MCMC run", "draws of an MCMC run"
FORMAT = 2
"""The layout of a state file; in layout 1 the settings and the state of kernels had other names."""


def refuse_to_replace(path: files.PathLike) -> None:
    """Raises a CheckpointError if there is a file already: a run does not end another one."""
    if Path(path).exists():
        raise CheckpointError(
            f"{path} is there already: go on from it with resume(...), to which the model's"
            f" arguments go; or, to start anew, move it away with the folder {path}.draws"
        )
    folder = Path(f"{path}.draws")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} holds the draws of another run: move it away")


def read_checkpoint(path: files.PathLike, ranks: ProcessGroup) -> Saved:
    """The state file of this rank, of the last transition after which all ranks have saved one.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it cannot be read, or there is no such transition.
    """
    mine = rank_path(path)
    try:
        payload = load_common(path, KIND, _mark) if ranks.size > 1 else files.load(mine, KIND)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no checkpoint at {mine}: start with run(...), or give its path"
        ) from None
    if payload is None or payload.get("format") != FORMAT:
        raise CheckpointError(
            f"{mine} was written by an earlier version of pyro_ebm, whose kernels kept other"
            " numbers: finish the run with that version, or start anew with another path"
        )
    return payload


def _mark(payload: Saved) -> tuple[int, int]:
    """Which save it is: the one after so many transitions."""
    return 0, payload["run"]["t"]


class Checkpoint:
    """The checkpoints of one run.

    Args:
        path: the state file.
        every: how many transitions, or how much time, lies between two checkpoints.
        settings: what the run was asked to do.
    """

    def __init__(self, path: files.PathLike, every: Every, settings: RunSettings):
        self.path, self.every, self.settings = Path(path), every, settings
        self.folder = Path(f"{self.path}.draws")
        self.chunks, self.last = 0, ""  # how many files of draws there are, and the last checksum
        self.saved = {"warmup": 0, "draws": 0}
        self.failed, self.keep_previous = False, True  # the last save; whether to keep its file
        self._t, self._time = 0, time.monotonic()
        self._warned = False

    # -- saving --------------------------------------------------------------------------------

    def start(self, run: VectorizedRun) -> None:
        """The first checkpoint, before any transition.

        Raises:
            OSError: if it cannot be written: better now than after hours.
        """
        self.folder.mkdir(exist_ok=True)
        self.save(run)

    def after_transition(self, run: VectorizedRun) -> None:
        """Saves a checkpoint if it is time for one; see :meth:`try_to_save`."""
        if self.is_due(run):
            self.try_to_save(run)

    def is_due(self, run: VectorizedRun) -> bool:
        """Whether it is time for a checkpoint."""
        if run.done:
            return True
        if isinstance(self.every, int):
            return run.t - self._t >= self.every
        return time.monotonic() - self._time >= self.every.total_seconds()

    def try_to_save(self, run: VectorizedRun) -> None:
        """Saves a checkpoint; the first failure is a warning."""
        self.failed = False
        try:
            self.save(run)
        except OSError as error:
            self.failed = True
            self._t, self._time = run.t, time.monotonic()
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the checkpoint after transition {run.t} could not be written ({error}). The"
                    f" run goes on and will try again; {self.path} is as it was",
                    stacklevel=5,
                )

    def save(self, run: VectorizedRun) -> None:
        """Saves a checkpoint.

        Raises:
            OSError: if it cannot be written; the one before is then as it was.
        """
        state = run.state_dict()
        self._save_draws(run)
        payload = {
            "format": FORMAT,
            "settings": self.settings,
            "machine": machine(),
            "run": state,
            "store": None if run.store is None else run.store.run,
            "chunks": self.chunks,
            "checksum": self.last,
        }
        files.save(self.path, payload, KIND, self.keep_previous)
        self._t, self._time = run.t, time.monotonic()

    def _save_draws(self, run: VectorizedRun) -> None:
        new, saved = {}, dict(self.saved)
        for name, record in run.records.items():
            if isinstance(record.store, Memory) and record.store.count > saved[name]:
                new[name] = record.store.rows(saved[name])
                saved[name] = record.store.count
        if new:
            payload = {"before": self.last, "draws": new}
            self.last = files.save(self._chunk(self.chunks), payload, KIND_OF_DRAWS, False)
            self.chunks, self.saved = self.chunks + 1, saved

    def has_all(self, run: VectorizedRun) -> bool:
        """Whether all draws of the run are on disk."""
        return all(
            record.count == self.saved[name]
            for name, record in run.records.items()
            if isinstance(record.store, Memory)
        )

    def _chunk(self, i: int) -> Path:
        return self.folder / f"{i:05d}.draws"

    # -- going on ------------------------------------------------------------------------------

    def compare(self, payload: Saved) -> None:
        """Raises a CheckpointError if a state is that of another run."""
        if found := differences(self.settings, payload["settings"]):
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError(
                f"{self.path} is of another run: {'; '.join(found[:5])}{more}. Give what it was run"
                " with, or another path"
            )
        if found := differences(machine(), payload["machine"]):
            warnings.warn(
                f"the draws go on from {self.path}, but not to the last bit: {'; '.join(found)}",
                stacklevel=5,
            )

    def load(self, run: VectorizedRun, payload: Saved) -> None:
        """Restores a run as it was saved.

        Raises:
            CheckpointError: if draws are missing or others, or the model is another.
        """
        run.load_state_dict(payload["run"], exact=not differences(machine(), payload["machine"]))
        self._load_draws(run, payload["chunks"], payload["checksum"])
        if run.store is not None:
            run.store.go_back(run.records["draws"].first)
        self.saved.update({name: record.first for name, record in run.records.items()})
        self._t, self._time = run.t, time.monotonic()

    def _load_draws(self, run: VectorizedRun, chunks: int, checksum: str) -> None:
        for i in range(chunks):
            path = self._chunk(i)
            if not path.exists():
                raise CheckpointError(
                    f"{path} is missing, which {self.path} refers to: keep the two together"
                )
            payload = files.load(path, KIND_OF_DRAWS)
            if payload["before"] != self.last:
                raise CheckpointError(f"{path} does not go on from the file of draws before it")
            self.last = files.checksum(path)
            for name, rows in payload["draws"].items():
                if name in run.records:
                    run.records[name].store.put(rows)
        if self.last != checksum:
            raise CheckpointError(f"the draws in {self.folder} are not those of {self.path}")
        self.chunks = chunks


def checked_every(every: object) -> Every:
    """Raises a ValueError unless it is a number of transitions, or a time, above 0."""
    if isinstance(every, datetime.timedelta) and every > datetime.timedelta(0):
        return every
    with contextlib.suppress(ValueError):
        return check_count("checkpoint_every", every)
    raise ValueError(
        "checkpoint_every must be a number of transitions, as 1000, or a time, as"
        f" datetime.timedelta(minutes=1), got {every!r}"
    )
