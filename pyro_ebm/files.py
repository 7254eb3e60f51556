r"""Files that are written whole or not at all, and that run no code when they are read.

A file is one line of text, then tensors:

.. code-block:: text

    pyro_ebm {"version": 1, "kind": "mcmc", "size": 1234, "sha256": "..."}
    <size bytes, as torch.save writes them>

*Written whole or not at all.* The bytes go to ``path.tmp`` in the same folder and to the disk
(``fsync``), and then take the place of the file in one rename. Whenever the process or the machine
dies, ``path`` is the file before or the file after. The one before stays as ``path.previous``.

*Read whole or not at all.* Size and checksum come first; then ``torch.load(weights_only=True)``
reads tensors, numbers, strings and what they are nested in, and refuses anything that would run.
A file that is cut short, altered, foreign, of another kind or of a newer version is a
:class:`CheckpointError`, and never taken for an empty one. (The checksum guards against accidents.
Whoever can write the file can write the checksum too.)
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

VERSION = 1
MAGIC = b"pyro_ebm "
MAX_HEADER = 1024  # bytes

PathLike = str | os.PathLike[str]
Saved = dict[str, Any]
"""What a file or a ``state_dict`` holds, by name."""


class CheckpointError(ValueError):
    """A file that cannot be read, or that belongs to another run or training."""


def previous(path: PathLike) -> Path:
    """The path at which the file before this one is kept.

    Example:
        >>> previous("run.ckpt").name
        'run.ckpt.previous'
    """
    return Path(f"{os.fspath(path)}.previous")


def save(
    path: PathLike, payload: Mapping[str, object], kind: str, keep_previous: bool = True
) -> str:
    """Writes a file whole or not at all, and keeps the one before at :func:`previous`.

    Args:
        path: where; its folder must exist.
        payload: tensors, numbers, strings, bytes, ``None``, dtypes, and dicts, lists and tuples of
            these. Tensors are kept as plain ones on the CPU.
        kind: what the file holds, in a word; :func:`load` compares it.
        keep_previous: whether to keep the one before.

    Returns:
        The checksum.

    Raises:
        TypeError: for a payload that :func:`load` would refuse; it names the place.
        OSError: if it cannot be written, as on a full disk. The file at ``path`` is then as before.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/x.ckpt", {"z": torch.ones(2), "step": 3}, kind="example")
        ...     load(f"{folder}/x.ckpt", kind="example")
        {'z': tensor([1., 1.]), 'step': 3}
    """
    buffer = io.BytesIO()
    torch.save(_plain(payload, "payload"), buffer)
    data = buffer.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    header = {
        "version": VERSION,
        "kind": kind,
        "size": len(data),
        "sha256": digest,
    }
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + json.dumps(header).encode() + b"\n")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            _keep(path)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest


def load(path: PathLike, kind: str) -> Saved:
    """The payload that :func:`save` wrote, with its tensors on the CPU.

    Args:
        path: the file.
        kind: what it must hold.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: for a file that is cut short, altered, foreign, of another kind or of a
            newer version; it says which, and whether the file before is whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "x.ckpt").write_text("something else")
        ...     try:
        ...         load(f"{folder}/x.ckpt", kind="example")
        ...     except CheckpointError as error:
        ...         print(str(error).rpartition("/")[2])
        x.ckpt is not a file of pyro_ebm: give another path
    """
    try:
        return _load(path, kind)
    except CheckpointError as error:
        before = previous(path)
        try:
            _load(before, kind)
        except (OSError, CheckpointError):
            raise error from None
        raise CheckpointError(
            f"{error}. The file before it is whole: to go on from there, move {before} to"
            f" {os.fspath(path)}"
        ) from error


def checksum(path: PathLike) -> str:
    """The checksum in the header of a file; the content is not compared with it.

    Raises:
        CheckpointError: if there is no such header.
    """
    with Path(path).open("rb") as file:
        return _header(path, file.read(MAX_HEADER)).sha256


def _load(path: PathLike, kind: str) -> Saved:
    name = os.fspath(path)
    data = memoryview(Path(path).read_bytes())
    header = _header(path, bytes(data[:MAX_HEADER]))
    if header.version > VERSION:
        raise CheckpointError(
            f"{name} was written by a newer pyro_ebm (version {header.version} of the format,"
            f" this one reads up to {VERSION}): upgrade pyro_ebm"
        )
    if header.kind != kind:
        raise CheckpointError(
            f"{name} holds {header.kind!r}, not {kind!r}: give the path of the latter"
        )
    data = data[header.length :]
    if len(data) < header.size:
        raise CheckpointError(f"{name} is cut short: {len(data)} of {header.size} bytes are there")
    if len(data) > header.size or hashlib.sha256(data).hexdigest() != header.sha256:
        raise CheckpointError(f"{name} was altered after it was written: its checksum is wrong")
    try:
        with warnings.catch_warnings():  # of what a foreign pickle might not support
            warnings.simplefilter("ignore")
            payload = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{name} holds more than tensors, numbers and strings, and is not loaded: a file that"
            " runs code when it is read was not written by pyro_ebm"
        ) from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{name} holds a {type(payload).__name__}, not a dict")
    return payload


class _Header(NamedTuple):
    """The first line, and its ``length`` in bytes."""

    version: int
    kind: str
    size: int
    sha256: str
    length: int


def _header(path: PathLike, start: bytes) -> _Header:
    name = os.fspath(path)
    if not start:
        raise CheckpointError(f"{name} is empty")
    if not start.startswith(MAGIC[: len(start)]):
        raise CheckpointError(f"{name} is not a file of pyro_ebm: give another path")
    line, newline, _ = start.partition(b"\n")
    if not newline:
        raise CheckpointError(f"{name} is cut short, within its first line")
    try:
        header = json.loads(line.removeprefix(MAGIC))
        version, size = int(header["version"]), int(header["size"])
        kind, sha256 = str(header["kind"]), str(header["sha256"])
        if version < 1:
            raise ValueError("there is no such version")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} was altered: its first line cannot be read") from error
    return _Header(version, kind, size, sha256, len(line) + 1)


# What torch.load raises for bytes that torch.save did not write
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def _keep(path: Path) -> None:
    """Gives the file the name of the one before it too, while it stays where it is."""
    before = previous(path)
    temporary = Path(f"{before}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    temporary.replace(before)
    temporary.unlink(missing_ok=True)  # a rename of one link to another leaves both


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a crash of the machine."""
    if os.name == "nt":  # which gives no handle on a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: object, place: str) -> object:
    """The value with plain tensors on the CPU; refuses what a file cannot hold."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # torch.save writes the whole memory that a view looks at
        whole = value.is_sparse or value.untyped_storage().nbytes() <= value.nbytes
        return value if whole else value.clone()
    if value is None or type(value) in _ATOMS:
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{place} has the key {key!r}: keys are strings or integers")
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)(_plain(item, f"{place}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"{place} is a {type(value).__name__}, and a file holds tensors, numbers, strings, and"
        " dicts, lists and tuples of these"
    )


_ATOMS = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size)


# -- the random state ------------------------------------------------------------------------------


def random_state() -> Saved:
    """The state of all global random number generators: torch's on all devices, NumPy's, Python's.

    Example:
        >>> state = random_state()
        >>> x = torch.rand(3)
        >>> set_random_state(state)
        >>> torch.equal(torch.rand(3), x)
        True
    """
    state = get_rng_state()
    name, words, *rest = state["numpy"]
    return {
        "torch": state["torch"],
        "python": state["random"],
        "numpy": [name, torch.as_tensor(words.astype("int64")), *rest],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Saved) -> None:
    """Restores what :func:`random_state` returned.

    Raises:
        CheckpointError: if the state is of more CUDA devices than there are.
    """
    if len(state["cuda"]) > torch.cuda.device_count():
        raise CheckpointError(
            f"the random state is of {len(state['cuda'])} CUDA devices, and there are"
            f" {torch.cuda.device_count()}: go on where there are as many"
        )
    name, words, *rest = state["numpy"]
    numpy = (name, words.numpy().astype("uint32"), *rest)
    set_rng_state({"torch": state["torch"], "random": state["python"], "numpy": numpy})
    for device, of_device in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(of_device, device)


__all__ = [
    "CheckpointError",
    "checksum",
    "load",
    "previous",
    "random_state",
    "save",
    "set_random_state",
]
