"""The distributed sampling example, left alone, and under torchrun with one of two ranks killed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.ranks import as_two_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_sampling.py"
FLAGS = "--num-data 300 --dim 3 --num-samples 300 --warmup-steps 150 --num-chains 10"
TIMEOUT = 200  # seconds
# Two ranks may write on one line.
BEGUN = re.compile(r"rank (\d) of 2, process (\d+): (starts|goes on)")
LEARNED = re.compile(r"rank (\d) of 2: step size (\S+), trajectories ([\d.]+)")


def torchrun(folder):
    """What the example prints; rank 1 is killed once, after a checkpoint of its own."""
    folder.mkdir()
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=2 {EXAMPLE}"
    saved = folder / "run.rank1of2.ckpt.previous"  # so that all have one
    text, killed = "", False
    with subprocess.Popen(
        [sys.executable, *command.split(), *FLAGS.split(), "--checkpoint", "run.ckpt"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        late = threading.Timer(TIMEOUT, process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            text += line
            for me, pid, _ in BEGUN.findall(line):
                if me == "1" and not killed:
                    before = saved.stat().st_mtime_ns if saved.exists() else 0
                    while not saved.exists() or saved.stat().st_mtime_ns == before:
                        assert process.poll() is None, text
                        time.sleep(0.001)
                    os.kill(int(pid), signal.SIGKILL)
                    killed = True
        late.cancel()
    assert process.returncode == 0, text
    assert killed
    return text


def report(text):
    """The summary and what was learned, which both ranks print alike."""
    learned = LEARNED.findall(text)
    assert sorted(me for me, *_ in learned) == ["0", "1"]
    assert learned[0][1:] == learned[1][1:]  # to the last bit
    return learned[0][1:], re.findall(r"w\[\d\].*", text)


def test_a_killed_rank_changes_nothing(tmp_path):
    text = torchrun(tmp_path / "killed")
    assert "10 chains in 2 processes" in text
    assert [how for _, _, how in BEGUN.findall(text)] == ["starts"] * 2 + ["goes on"] * 2
    assert "failed (exitcode: -9) local_rank: 1" in text  # torchrun says who it was
    learned, rows = report(text)
    assert len(rows) == 3
    flags = f"{FLAGS} --checkpoint run.ckpt"
    assert (learned, rows) == report(as_two_ranks(EXAMPLE, flags, tmp_path / "alone"))
