"""Ranks that die or hang are named by those that are left, within the stated time."""

import contextlib
import datetime
import os
import pickle
import signal
import time

import pytest
import torch
import torch.distributed as dist

from pyro_ebm.ops.distributed import (
    RankError,
    gathered,
    naming_ranks,
    pooled_mean,
    rank,
    rank_path,
    rank_seed,
    world_size,
)
from tests.ranks import free_port, processes

TIMEOUT = 2.0  # seconds, of the group and of the roll call
SIZE = 3


def work(me, port, fault, faulty, answers):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    wait = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", rank=me, world_size=SIZE, timeout=wait)
    start = time.monotonic()
    try:
        with naming_ranks(TIMEOUT):
            gathered(torch.tensor(me))
            if me in faulty:
                fault()
            start = time.monotonic()
            gathered(torch.tensor(me))
    except RankError as error:
        answers.put((me, error.ranks, str(error), time.monotonic() - start))
    except ValueError as error:
        answers.put((me, "own", str(error), 0.0))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    signal.pause()


def fail():
    raise ValueError("of my own")


def run(fault, faulty):
    """What the ranks say: {rank: (missing, message, seconds)}."""
    answers, port = processes.Queue(), free_port()
    ranks = [
        processes.Process(target=work, args=(me, port, fault, faulty, answers))
        for me in range(SIZE)
    ]
    for process in ranks:
        process.start()
    told = {}
    with contextlib.suppress(TimeoutError):
        for _ in range(SIZE - (fault is not fail) * len(faulty)):
            me, *rest = answers.get(timeout=60)
            told[me] = rest
    for process in ranks:
        process.kill()
        process.join()
    return told


@pytest.mark.parametrize(
    ("fault", "faulty", "at_most"),
    [(die, [1], TIMEOUT), (hang, [0], 2 * TIMEOUT + 3), (hang, [1, 2], 2 * TIMEOUT + 3)],
)
def test_who_is_missing_is_named(fault, faulty, at_most):
    told = run(fault, faulty)
    assert sorted(told) == [me for me in range(SIZE) if me not in faulty]
    for missing, message, seconds in told.values():
        assert missing == tuple(faulty)
        names = f"rank {faulty[0]} of 3" if len(faulty) == 1 else "ranks 1, 2 of 3"
        assert message.startswith(names)
        assert seconds < at_most


def test_an_error_of_ones_own_is_not_hidden():
    told = run(fail, [2])
    assert told[2][:2] == ["own", "of my own"]
    assert told[0][0] == told[1][0] == (2,)


def test_alone_everything_answers_at_once(tmp_path):
    assert (world_size(), rank()) == (1, 0)
    assert gathered(torch.ones(2)).shape == (1, 2)
    assert pooled_mean(torch.tensor(3.0), torch.tensor(2)).item() == 3.0
    assert rank_path(tmp_path / "a.ckpt") == tmp_path / "a.ckpt"
    with naming_ranks(1.0), pytest.raises(RuntimeError, match="gloo"):
        raise RuntimeError("gloo")


def test_seeds_differ_and_are_seeds():
    seeds = [rank_seed(seed, of) for seed in range(20) for of in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert rank_seed(3) == rank_seed(3, of=0)


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(RankError("rank 1 is gone", (1,))))
    assert (str(error), error.ranks) == ("rank 1 is gone", (1,))
