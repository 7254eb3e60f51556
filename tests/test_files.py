"""Files: whole or not at all, and nothing in them runs."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_ebm import files
from pyro_ebm.files import CheckpointError

KIND = "a test"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.ckpt"


def parts(path):
    """The first line as a dict, and the rest."""
    line, _, data = path.read_bytes().partition(b"\n")
    return json.loads(line.removeprefix(files.MAGIC)), data


def write(path, header, data):
    path.write_bytes(files.MAGIC + json.dumps(header).encode() + b"\n" + data)


def signed(path, data):
    """Any bytes, with the header that belongs to them."""
    header = {"version": files.VERSION, "kind": KIND, "size": len(data)}
    write(path, {**header, "sha256": hashlib.sha256(data).hexdigest()}, data)


# -- what goes in comes out ------------------------------------------------------------------------

PAYLOAD = {
    "numbers": [1, 2.5, True, None, 3 + 4j, float("inf")],
    "nested": {"a": ({"b": ["c"]}, b"bytes"), 7: torch.Size([2, 3])},
    "dtype": torch.float64,
    "empty": {},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_a_payload_comes_back_as_it_was(path):
    files.save(path, PAYLOAD, KIND)
    assert files.load(path, KIND) == PAYLOAD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_a_tensor_comes_back_to_the_last_bit(path, dtype, shape):
    x = torch.randn(shape).mul(100).to(dtype)
    files.save(path, {"x": x}, KIND)
    y = files.load(path, KIND)["x"]
    assert (y.dtype, y.shape) == (dtype, shape)
    assert torch.equal(x, y)


def test_numbers_that_are_no_numbers_come_back(path):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    files.save(path, {"x": x}, KIND)
    assert files.load(path, KIND)["x"].view(torch.int32).equal(x.view(torch.int32))


def test_a_view_is_saved_without_what_it_is_a_view_of(path):
    big = torch.randn(1000, 1000)
    files.save(path, {"row": big[3], "column": big[:, 5], "one": big[0, 0]}, KIND)
    assert path.stat().st_size < 20_000
    found = files.load(path, KIND)
    assert torch.equal(found["row"], big[3])
    assert torch.equal(found["column"], big[:, 5])


def test_tensors_come_back_plain(path):
    weight = torch.nn.Parameter(torch.ones(2))
    files.save(path, {"weight": weight, "twice": 2 * weight}, KIND)
    found = files.load(path, KIND)
    assert type(found["weight"]) is torch.Tensor
    assert not found["twice"].requires_grad


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {2}]}, "payload['a'][1] is a set"),
        ({"f": len}, "payload['f'] is a builtin_function_or_method"),
        ({"x": np.ones(2)}, "payload['x'] is a ndarray"),
        ({"x": np.float64(1.0)}, "payload['x'] is a float64"),
        ({"a": {(1, 2): 3}}, "payload['a'] has the key (1, 2)"),
        ({"n": torch.nn.Linear(1, 1)}, "payload['n'] is a Linear"),
    ],
)
def test_what_could_not_be_read_is_not_written(path, value, place):
    with pytest.raises(TypeError, match=re.escape(place)):
        files.save(path, value, KIND)
    assert list(path.parent.iterdir()) == []


# -- whole or not at all ---------------------------------------------------------------------------


def test_the_one_before_is_kept(path):
    for i in range(3):
        checksum = files.save(path, {"i": i}, KIND)
    assert files.load(path, KIND) == {"i": 2}
    assert files.load(files.previous(path), KIND) == {"i": 1}
    assert files.checksum(path) == checksum != files.checksum(files.previous(path))
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.ckpt", "x.ckpt.previous"]


def test_the_one_before_is_kept_without_links_too(path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    test_the_one_before_is_kept(path)


def test_leftovers_of_a_killed_process_do_no_harm(path):
    files.save(path, {"i": 0}, KIND)
    Path(f"{path}.tmp").write_bytes(b"half a file")
    os.link(path, f"{path}.previous.tmp")
    os.link(path, files.previous(path))
    files.save(path, {"i": 1}, KIND)
    assert files.load(path, KIND) == {"i": 1}
    assert files.load(files.previous(path), KIND) == {"i": 0}
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.ckpt", "x.ckpt.previous"]


@pytest.mark.parametrize("fails", ["fsync", "replace", "link_and_copy"])
def test_an_error_leaves_the_file_as_it_was(path, monkeypatch, fails):
    files.save(path, {"i": 0}, KIND)
    files.save(path, {"i": 1}, KIND)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif fails == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(files.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        files.save(path, {"i": 2}, KIND)
    monkeypatch.undo()
    assert files.load(path, KIND) == {"i": 1}
    assert files.load(files.previous(path), KIND) == {"i": 0}
    assert not Path(f"{path}.tmp").exists()


def test_a_disk_that_is_full_leaves_the_file_as_it_was(path):
    files.save(path, {"i": 0}, KIND)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.save(path, {"x": torch.randn(100_000)}, KIND)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files.load(path, KIND) == {"i": 0}
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]


# A new process would spend its life importing: one that has imported all kills forks of itself.
KILLER = """
    import os, random, signal, sys, time
    import torch
    from pyro_ebm import files

    path, kills = sys.argv[1], int(sys.argv[2])
    random.seed(kills)
    written = []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            i = files.load(path, "a test")["i"]
            while True:
                i += 1
                files.save(path, {"i": i, "x": torch.full((20_000,), float(i))}, "a test")
        time.sleep(0.05 * random.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name in (path, files.previous(path)):  # the latter was there before the first kill
            found = files.load(name, "a test")
            assert (found["x"] == found["i"]).all(), found["i"]
        written.append(files.load(path, "a test")["i"])
    assert written == sorted(written)
    print(written[-1])
"""


@pytest.mark.parametrize(
    "kills", [20, pytest.param(1000, marks=pytest.mark.slow)], ids=lambda kills: f"{kills}-kills"
)
def test_a_process_killed_while_writing_leaves_a_whole_file(path, kills):
    for _ in range(2):
        files.save(path, {"i": 0, "x": torch.zeros(1)}, KIND)
    script = textwrap.dedent(KILLER)
    command = [sys.executable, "-c", script, str(path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > kills / 2  # the kills came in the middle of the writing


# -- hostile files ---------------------------------------------------------------------------------


def test_no_file(path):
    with pytest.raises(FileNotFoundError):
        files.load(path, KIND)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.5, 0.99])
def test_a_file_that_is_cut_short_at_any_place(path, share):
    files.save(path, PAYLOAD, KIND)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"x\.ckpt is (empty|cut short)"):
        files.load(path, KIND)


def test_a_file_that_was_altered_at_any_place(path):
    files.save(path, {"x": torch.arange(20)}, KIND)
    data = path.read_bytes()
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError, match=r"x\.ckpt "):
            files.load(path, KIND)
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="altered"):
        files.load(path, KIND)


def test_a_foreign_file(path):
    torch.save({"x": 1}, path)
    with pytest.raises(CheckpointError, match="is not a file of pyro_ebm"):
        files.load(path, KIND)


def test_another_kind(path):
    files.save(path, {"x": 1}, "another thing")
    with pytest.raises(CheckpointError, match="holds 'another thing', not 'a test'"):
        files.load(path, KIND)


def test_a_newer_version(path):
    files.save(path, {"x": 1}, KIND)
    header, data = parts(path)
    write(path, {**header, "version": files.VERSION + 1}, data)
    with pytest.raises(CheckpointError, match=r"newer pyro_ebm .*: upgrade pyro_ebm"):
        files.load(path, KIND)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm_was_done",)


def test_nothing_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Harm()}, tmp_path / "evil")
    for data in ((tmp_path / "evil").read_bytes(), pickle.dumps(Harm())):
        signed(path, data)
        with pytest.raises(CheckpointError, match="runs code"):
            files.load(path, KIND)
    assert not Path("harm_was_done").exists()


def test_a_payload_that_is_no_dict(path, tmp_path):
    torch.save([1, 2], tmp_path / "list")
    signed(path, (tmp_path / "list").read_bytes())
    with pytest.raises(CheckpointError, match="holds a list"):
        files.load(path, KIND)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.binary(max_size=200), cut=st.integers(0, 2000), at=st.integers(0, 2000))
def test_any_bytes_are_an_error_of_ours(tmp_path_factory, data, cut, at):
    path = tmp_path_factory.mktemp("any") / "x.ckpt"
    files.save(path, {"x": torch.arange(10), "y": [1, "a"]}, KIND)
    _, whole = parts(path)
    spliced = whole[:at] + data + whole[at + cut :]
    for write_to in (path.write_bytes, lambda data: signed(path, data)):
        write_to(spliced)
        with contextlib.suppress(CheckpointError):
            assert isinstance(files.load(path, KIND), dict)


def test_the_way_out_is_named_if_it_is_one(path):
    files.save(path, {"i": 0}, KIND)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError) as alone:
        files.load(path, KIND)
    assert "previous" not in str(alone.value)

    for i in range(2):
        path.unlink()
        files.save(path, {"i": i}, KIND)
    files.save(path, {"i": 2}, KIND)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="The file before it is whole") as error:
        files.load(path, KIND)
    assert f"move {files.previous(path)} to {path}" in str(error.value)
    files.previous(path).replace(path)
    assert files.load(path, KIND) == {"i": 1}


# -- the random state ------------------------------------------------------------------------------


def test_the_random_state_comes_back_through_a_file(path):
    def numbers():
        of_numpy = scipy.stats.norm.rvs(size=5)  # from NumPy's global generator
        return torch.randn(5).tolist(), of_numpy.tolist(), random.gauss(0, 1)

    pyro.set_rng_seed(3)
    scipy.stats.norm.rvs()  # one of a pair: the other waits
    random.gauss(0, 1)
    files.save(path, files.random_state(), KIND)
    wanted = numbers()
    pyro.set_rng_seed(0)
    assert all(a != b for a, b in zip(numbers(), wanted, strict=True))
    files.set_random_state(files.load(path, KIND))
    assert numbers() == wanted


def test_a_random_state_of_more_devices_than_there_are():
    state = {**files.random_state(), "cuda": [torch.zeros(16)] * 99}
    with pytest.raises(CheckpointError, match="of 99 CUDA devices"):
        files.set_random_state(state)
