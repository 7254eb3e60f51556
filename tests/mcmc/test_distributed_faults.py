"""Runs on two ranks go on exactly after kills and full disks, and name a rank that is gone."""

import datetime
import functools
import os
import signal
import time
import warnings
from pathlib import Path

import pyro
import pytest
import torch

from pyro_ebm import files
from pyro_ebm.files import CheckpointError
from pyro_ebm.mcmc.running import distributed as ranked_run
from pyro_ebm.ops.distributed import RankError, naming_ranks, rank
from tests.mcmc.test_distributed_run import Y, everything, same, sampler
from tests.ranks import Ranks, free_port, processes


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


# -- checkpoints -----------------------------------------------------------------------------


class Stop(Exception):
    pass


@functools.cache
def whole_run(name="langevin", **settings):
    """A run that nothing stops, without a file: one for all tests."""
    whole = sampler(name, **settings)
    pyro.set_rng_seed(3)
    whole.run(Y)
    return everything(whole)


def interrupted(folder, at, every, name):
    """A run that is stopped, on each rank after another transition, and goes on."""
    whole = whole_run(name, save_warmup=True)
    settings = {"checkpoint": Path(folder) / "run.ckpt", "checkpoint_every": every}

    def stop(kernel, params, stage, i):
        if (stage == "Sample") * 80 + i == at:
            raise Stop

    pyro.set_rng_seed(3)
    stopped = sampler(name, save_warmup=True, hook_fn=stop, **settings)
    with pytest.raises(Stop):
        stopped.run(Y)
    again = sampler(name, save_warmup=True, **settings)
    again.resume(Y)
    return whole, everything(again), torch.rand(3)


@pytest.mark.parametrize("at", [33, 130])
@pytest.mark.parametrize("name", ["langevin", "chees, dense"])
def test_resumes_exactly(ranks, tmp_path, at, name):
    (whole, again, number), (_, _, other) = ranks(interrupted, tmp_path, at, 20, name)
    assert same(whole, again)
    assert not torch.equal(number, other)
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".ckpt")
    assert names == ["run.rank0of2.ckpt", "run.rank1of2.ckpt"]


def one_save_apart(folder, at, gone_back):
    """A kill that came when one rank had saved, and the other had not yet."""
    settings = {"checkpoint": Path(folder) / "run.ckpt", "checkpoint_every": 20}

    def stop(kernel, params, stage, i):
        if (stage == "Sample") * 80 + i == at:
            raise Stop

    whole = whole_run()
    pyro.set_rng_seed(3)
    with pytest.raises(Stop):
        sampler(hook_fn=stop, **settings).run(Y)
    if rank() == 1:  # its last save is undone
        for _ in range(gone_back):
            before = Path(folder) / "run.rank1of2.ckpt.previous"
            before.replace(Path(folder) / "run.rank1of2.ckpt")
    again = sampler(**settings)
    try:
        again.resume(Y)
    except CheckpointError as error:
        return str(error)
    return whole, everything(again)


@pytest.mark.parametrize("at", [50, 125])
def test_a_kill_between_the_saves_of_two_ranks(ranks, tmp_path, at):
    whole, again = ranks(one_save_apart, tmp_path, at, 1)[0]
    assert same(whole, again)


def test_saves_too_far_apart_are_an_error(ranks, tmp_path):
    for error in ranks(too_far_apart, tmp_path):
        assert "no save is kept by all of them" in error


def too_far_apart(folder):
    (Path(folder) / str(rank())).mkdir()
    path = Path(folder) / f"run.rank{rank()}of2.ckpt"
    for steps in (3, 4, 5)[rank() :: 2][:2]:
        files.save(path, {"run": {"t": steps * (1 + rank())}}, "an MCMC run")
    with pytest.raises(CheckpointError) as caught:
        sampler(checkpoint=Path(folder) / "run.ckpt").resume(Y)
    return str(caught.value)


def on_a_full_disk(folder, fails, stop_at):
    """Rank 1 cannot write while the disk is full, and the run goes on."""
    save, t = files.save, []

    def failing(path, payload, kind, keep_previous=True):
        if kind == "an MCMC run":
            t.append(payload["run"]["t"])
        if rank() == 1 and t and t[-1] in fails:
            raise OSError(28, "No space left on device")
        return save(path, payload, kind, keep_previous)

    def stop(kernel, params, stage, i):
        if (stage == "Sample") * 80 + i == stop_at:
            raise Stop

    settings = {"checkpoint": Path(folder) / "run.ckpt", "checkpoint_every": 20}
    whole = whole_run()
    pyro.set_rng_seed(3)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(files, "save", failing)
        with pytest.raises(Stop):
            sampler(hook_fn=stop, **settings).run(Y)
    again = sampler(**settings)
    again.resume(Y)
    return whole, everything(again), [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("fails", "stop_at"), [((60,), 65), ((60, 80), 95), ((60,), 85), ((60, 100), 110)]
)
def test_a_full_disk_on_one_rank(ranks, tmp_path, fails, stop_at):
    (whole, again, quiet), (_, _, told) = ranks(on_a_full_disk, tmp_path, fails, stop_at)
    assert same(whole, again)
    assert quiet == []
    assert len(told) == 1
    assert "after transition 60 could not be written" in told[0]


def by_the_clock(folder):
    """The transitions after which a rank saved, where rank 1 is the slower one."""
    saved, save = [], files.save

    def noting(path, payload, kind, keep_previous=True):
        if kind == "an MCMC run":
            saved.append(payload["run"]["t"])
        return save(path, payload, kind, keep_previous)

    every = datetime.timedelta(milliseconds=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "save", noting)
        patch.setattr(ranked_run, "BETWEEN", 0.01)
        hook = None if rank() == 0 else lambda *_: time.sleep(0.001)
        settings = {"checkpoint": Path(folder) / "run.ckpt", "checkpoint_every": every}
        sampler(hook_fn=hook, **settings).run(Y)
    return saved


def test_the_clock_of_the_first_rank_decides(ranks, tmp_path):
    first, second = ranks(by_the_clock, tmp_path)
    assert first == second
    assert first[0] == 0
    assert first[-1] == 180
    assert len(first) > 4


def stored(folder):
    mcmc = sampler(num_chains=5, store=Path(folder) / "run.zarr")
    mcmc.run(Y)
    with pytest.raises(RuntimeError, match="in the store"):
        mcmc.get_samples()
    return dict(mcmc.to_arviz().posterior.sizes)


def test_each_rank_has_a_store(ranks, tmp_path):
    first, second = ranks(stored, tmp_path)
    assert first == {"chain": 3, "draw": 100, "x_dim_0": 2}
    assert second == {"chain": 2, "draw": 100, "x_dim_0": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.rank0of2.zarr", "run.rank1of2.zarr"]


# -- a rank that dies or hangs ---------------------------------------------------------------

TIMEOUT = 2.0  # seconds, of the group and of the roll call


def struck(me, port, stage, hangs, answers):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    wait = datetime.timedelta(seconds=TIMEOUT)
    torch.distributed.init_process_group("gloo", rank=me, world_size=2, timeout=wait)
    times = []

    def hook(kernel, params, now, i):
        times.append(time.monotonic())
        if me == 1 and (now, i) == (stage, 50):
            signal.pause() if hangs else os.kill(os.getpid(), signal.SIGKILL)

    try:
        with naming_ranks(TIMEOUT):
            sampler(num_samples=1_000_000, hook_fn=hook).run(Y)
    except RankError as error:
        answers.put((error.ranks, str(error), time.monotonic() - times[0]))


@pytest.mark.parametrize(
    ("stage", "hangs"), [("Warmup", False), ("Sample", False), ("Sample", True)]
)
def test_who_is_missing_is_named(stage, hangs):
    port, answers = free_port(), processes.Queue()
    pair = [processes.Process(target=struck, args=(i, port, stage, hangs, answers)) for i in (0, 1)]
    for process in pair:
        process.start()
    missing, text, seconds = answers.get(timeout=60)
    pair[1].kill()
    for process in pair:
        process.join(30)
    assert missing == (1,)
    assert "rank 1 of 2 died or hangs" in text
    assert seconds < 2 * TIMEOUT + 10  # of these, a few are warmup and waits
