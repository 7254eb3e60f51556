"""A training that is killed at random moments ends where it would have."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from tests.losses.test_checkpoint import BySVI, MORE
from pyro_ebm.losses import load_training, save_training
from tests.losses.test_loss_contract import data
import pyro

path, num_steps = sys.argv[1], int(sys.argv[2])
pyro.set_rng_seed(0)
training = BySVI(MORE["pcd"])
start = load_training(
    path, *training.parts, kwargs={"x": data()}, missing_ok=True
).get("step", 0)
print("begun", start, flush=True)
for step in range(start, num_steps):
    value = training.step()
    save_training(path, *training.parts, step=step + 1)
print("ended", value, sum(float(v.double().sum()) for v in training.numbers().values()))
"""


def killed(tmp_path, kills, num_steps, seed):
    """The last line of a training that was killed a few times, and how often it was."""
    rng, done = random.Random(seed), 0
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "t.ckpt"), str(num_steps)]
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()
        if done < kills:
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
        rest = process.stdout.read().splitlines()
        code = process.wait()
        process.stdout.close()
        if code == 0:
            return rest[-1], done
        assert code == -signal.SIGKILL
        done += 1


def uninterrupted(tmp_path, num_steps):
    (tmp_path / "once").mkdir()
    return killed(tmp_path / "once", 0, num_steps, 0)[0]


def test_killed_it_ends_where_it_would_have(tmp_path):
    last, kills = killed(tmp_path, kills=2, num_steps=60, seed=0)
    assert kills == 2
    assert last == uninterrupted(tmp_path, 60)


@pytest.mark.slow
def test_killed_many_times_it_ends_where_it_would_have(tmp_path):
    last, kills = killed(tmp_path, kills=30, num_steps=600, seed=1)
    assert kills >= 10
    assert last == uninterrupted(tmp_path, 600)
