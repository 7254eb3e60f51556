"""The distributed example: beside one process, and under torchrun with each rank killed once."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.ranks import as_two_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_training.py"
FLAGS = "--num-steps 60 --every 10 --batch-size 64 --channels 8 --checkpoint t.ckpt"
TIMEOUT = 200  # seconds
ALONE = "rank 0 trains alone"
# Two ranks may write on one line.
BEGUN = re.compile(r"rank (\d) of 2, process (\d+): from step (\d+)")


def torchrun(folder, kill_after):
    """What the example prints; a rank is killed each time that one of these lines appears."""
    folder.mkdir()
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=2 {EXAMPLE}"
    kills, pids, lines = list(kill_after), {}, []
    with subprocess.Popen(
        [sys.executable, *command.split(), *FLAGS.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        late = threading.Timer(TIMEOUT, process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            pids.update((int(me), int(pid)) for me, pid, _ in BEGUN.findall(line))
            if kills and kills[0][0] in line:
                who = kills.pop(0)[1]
                assert who in pids, "\n".join(lines)
                if ALONE in line:  # until the other has ended
                    os.kill(pids[who], signal.SIGSTOP)
                    while exists(pids[1 - who]):
                        time.sleep(0.05)
                os.kill(pids[who], signal.SIGKILL)
        late.cancel()
    assert process.returncode == 0, "\n".join(lines)
    assert not kills
    assert [p.name for p in folder.iterdir()] == []  # a finished run leaves no checkpoint
    return lines


def left_alone(folder):
    """What the example prints in two processes that nobody kills."""
    text = as_two_ranks(EXAMPLE, FLAGS, folder / "alone")
    assert list((folder / "alone").iterdir()) == []
    return text.splitlines()


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def table(lines):
    """The rows of the losses, beside those of one process."""
    head = next(i for i, line in enumerate(lines) if line.split()[:3] == ["step", "2", "ranks"])
    return [[float(word) for word in line.split()] for line in lines[head + 1 : head + 7]]


def test_two_ranks_learn_what_one_process_does(tmp_path):
    rows = table(left_alone(tmp_path))
    assert [row[0] for row in rows] == [10, 20, 30, 40, 50, 60]
    fallen = rows[0][1] - rows[-1][1]
    assert fallen > 1
    for _, two, one in rows:
        assert abs(two - one) < 0.2 * fallen


@pytest.mark.slow
def test_a_killed_rank_changes_nothing(tmp_path):
    lines = torchrun(tmp_path / "killed", [("step 20: saved", 1), (ALONE, 0)])
    text = "\n".join(lines)
    starts = [(int(me), int(step)) for me, _, step in BEGUN.findall(text)]
    assert sorted(starts[:2]) == [(0, 0), (1, 0)]
    assert starts[4:] in ([(0, 60), (1, 60)], [(1, 60), (0, 60)])  # the other's file is still there
    again = {step for _, step in starts[2:4]}
    assert len(again) == 1  # both from one checkpoint, whenever the signal came:
    assert again <= {10, 20, 30, 40, 50}  # 10 if rank 1 had not saved yet, and rank 0 had
    assert "failed (exitcode: -9) local_rank: 1" in text  # torchrun says who it was

    assert table(lines) == table(left_alone(tmp_path))


@pytest.mark.slow
def test_ranks_killed_in_turn_change_nothing(tmp_path):
    kills = [("step 20: saved", 1), ("step 50: saved", 0)]
    lines = torchrun(tmp_path / "killed", kills)
    assert table(lines) == table(left_alone(tmp_path))
