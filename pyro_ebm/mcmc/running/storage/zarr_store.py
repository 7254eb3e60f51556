"""Draws on disk, in a Zarr store that ArviZ opens: runs whose draws are larger than memory.

The store has the groups ``posterior`` and ``sample_stats`` of ArviZ, each an array ``(chain, draw,
...)`` for a site or a statistic, in chunks of some draws of all chains, each with a checksum.
Draws are appended a block at a time. A reader who opens the store (``xarray``, ArviZ) looks at its
*consolidated metadata*, which are replaced in one rename once a block is there whole: it sees all
of a block or nothing, also while the run goes on and after it was killed.
"""

import math
import os
import uuid
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.diagnostics.arviz import attributes
from pyro_ebm.files import CheckpointError, PathLike, sync_folder
from pyro_ebm.mcmc.running.storage.draws import (
    POSITION,
    draws_in_a_block,
    samples_of,
    statistics_of,
)
from pyro_ebm.models.sites.site import Site

GROUPS = ("posterior", "sample_stats")


class ZarrStore:
    """Draws in a Zarr store.

    Args:
        path: the folder of the store.
        sites: those that are kept, in the order of the position.
        transforms: from their supports to the reals.
        run: the identifier of the run that an existing store must belong to; None for a new run.
        num_superchains: of the run, an attribute of the groups.

    Attributes:
        run: the identifier of the run, which its checkpoint keeps.
        count: how many draws there are.

    Raises:
        ImportError: without the package zarr.
    """

    def __init__(
        self,
        path: PathLike,
        sites: Sequence[Site],
        transforms: Mapping[str, Transform],
        run: str | None = None,
        num_superchains: int | None = None,
    ):
        self.num_superchains = num_superchains
        self._zarr = _imported()
        self.path, self.sites, self.transforms = Path(path), sites, transforms
        self.run = uuid.uuid4().hex if run is None else run
        self.count = 0
        self._root: Any = None

    @staticmethod
    def refuse_to_replace(path: PathLike) -> None:
        """Raises a CheckpointError if there is something already."""
        if Path(path).exists():
            raise CheckpointError(f"{os.fspath(path)} is there already: move it, or give another")

    def open(self) -> None:
        """Opens the store, or makes it.

        Raises:
            CheckpointError: if it belongs to another run.
        """
        if (self.path / "zarr.json").exists():
            self._root = self._zarr.open_group(self.path, mode="r+", use_consolidated=False)
            if self._root.attrs.get("run") != self.run:
                raise CheckpointError(f"the store {self.path} is that of another run")
        else:
            self._root = self._zarr.create_group(
                self.path, zarr_format=3, attributes={"run": self.run}
            )
        for group in GROUPS:
            if group not in self._root:
                self._root.create_group(group, attributes=attributes(self.num_superchains))
        self._commit()

    # -- writing -------------------------------------------------------------------------------

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Appends draws, each of shape ``(draws, chains, ...)``.

        Raises:
            OSError: if they cannot be written; a reader sees those before.
        """
        num = len(rows[POSITION])
        if num == 0:
            return
        values = (samples_of(rows, self.sites, self.transforms), statistics_of(rows))
        written: list[Path] = []
        try:
            for group, arrays in zip(GROUPS, values, strict=True):
                for name, value in arrays.items():
                    written += self._append(group, name, value, draws_in_a_block(rows[POSITION]))
            self._sync(written)
            self._commit()
        except OSError as error:
            raise OSError(
                error.errno,
                f"draws could not be written to the store {self.path} ({error.strerror}): make"
                f" room, and go on from the last checkpoint; its first {self.count} are whole",
            ) from error
        self.count += num

    def _append(self, group: str, name: str, value: Tensor, chunk_size: int) -> list[Path]:
        """Appends draws to one array, and returns the files that were written."""
        array, chains = value.cpu().numpy(), value.shape[0]
        if name not in self._root[group]:
            if self.count:
                raise CheckpointError(
                    f"the array {group}/{name} is gone from the store {self.path}, with its first"
                    f" {self.count} draws: put it back"
                )
            lead = ("chain", "draw")
            self._root[group].create_array(
                name,
                shape=(chains, 0, *array.shape[2:]),
                chunks=(chains, chunk_size, *(max(size, 1) for size in array.shape[2:])),
                dtype=array.dtype,
                fill_value=math.nan if array.dtype.kind == "f" else None,
                compressors=[self._zarr.codecs.Crc32cCodec()],
                dimension_names=(*lead, *(f"{name}_dim_{i}" for i in range(array.ndim - 2))),
            )
        # a chunk of zeros is written like any other, so that a missing one is a loss
        whole = self._root[group][name].with_config({"write_empty_chunks": True})
        stop = self.count + array.shape[1]
        whole.resize((chains, stop, *array.shape[2:]))
        whole[:, self.count : stop] = array
        folder, size = self.path / group / name, whole.chunks[1]
        written = [folder / "zarr.json"]
        if array.size == 0:  # of a site without elements: there is no chunk
            return written
        for chunk in range(self.count // size, (stop - 1) // size + 1):
            key = whole.metadata.encode_chunk_key((0, chunk) + (0,) * (array.ndim - 2))
            written.append(folder / key)
        return written

    def _commit(self) -> None:
        """Makes what was written visible to readers."""
        with warnings.catch_warnings():  # xarray does the same: the format is not settled yet
            warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
            self._zarr.consolidate_metadata(self.path, zarr_format=3)
        self._sync([self.path / "zarr.json"])

    def _sync(self, files: Sequence[Path]) -> None:
        """Makes files last through a crash of the machine."""
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        for folder in {parent for file in files for parent in file.parents}:
            if folder.is_relative_to(self.path):
                sync_folder(folder)

    # -- going on ------------------------------------------------------------------------------

    def go_back(self, count: int) -> None:
        """Opens the store as it was with its first ``count`` draws; later ones are made again.

        Raises:
            CheckpointError: if it is that of another run, or has not all of them.
        """
        if count and not self.path.exists():
            raise CheckpointError(f"the store {self.path} is missing: put it back where it was")
        if count:  # nothing is made anew that was there
            there = {file.parent.name for file in self.path.glob("posterior/*/zarr.json")}
            if gone := [site.name for site in self.sites if site.name not in there]:
                raise CheckpointError(
                    f"the store {self.path} has lost the draws of {gone}: put them back"
                )
        self.open()
        for group in GROUPS:
            for name, array in self._root[group].arrays():
                if array.shape[1] < count:
                    raise CheckpointError(
                        f"the store {self.path} has {array.shape[1]} draws of {name!r}, and the"
                        f" checkpoint refers to {count}: keep the two together"
                    )
                array.resize((array.shape[0], count, *array.shape[2:]))
                if array.nchunks_initialized < array.nchunks:
                    raise CheckpointError(f"draws of {name!r} are missing in the store {self.path}")
        self.count = count
        self._commit()


def some_draws(path: PathLike, most: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Samples and statistics of draws all through a store, of 64 evenly spaced blocks at most.

    Args:
        path: the folder of the store.
        most: how many numbers are kept.
    """
    root = _imported().open_group(path, mode="r")
    arrays = [dict(root[group].arrays()) for group in GROUPS]
    draws, size = next((a.shape[1], a.chunks[1]) for a in arrays[1].values())
    blocks = torch.linspace(0, (draws - 1) // size, 64).round().int().unique().tolist()
    numbers = sum(math.prod(a.shape) // draws for a in arrays[0].values())
    every = max(1, -(-len(blocks) * size * numbers // most))

    def read(array: Any) -> Tensor:
        parts = [array[:, i * size : (i + 1) * size][:, ::every] for i in blocks]
        return torch.cat([torch.from_numpy(part) for part in parts], 1)

    samples, fields = ({name: read(array) for name, array in group.items()} for group in arrays)
    return samples, fields


def thinned_draws(path: PathLike, names: Collection[str] | None, most: int) -> dict[str, Tensor]:
    """Evenly spaced draws of a store, all of them if there are few, by their sites.

    Args:
        path: the folder of the store.
        names: the sites; all if None.
        most: how many numbers are kept.
    """
    group: Any = _imported().open_group(path, mode="r")["posterior"]
    arrays = {k: a for k, a in group.arrays() if names is None or k in names}
    every = max(1, -(-sum(math.prod(a.shape) for a in arrays.values()) // most))
    return {name: torch.from_numpy(array[:, ::every]) for name, array in arrays.items()}


def _imported() -> Any:
    try:
        import zarr
        import zarr.codecs
    except ImportError as error:
        raise ImportError("store= needs the package zarr: pip install 'pyro-ebm[zarr]'") from error
    return zarr
