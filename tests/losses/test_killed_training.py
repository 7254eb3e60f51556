"""A training that is killed at random moments ends where it would have."""

import random
import signal
import time

import pyro
import pytest
import torch

from pyro_ebm.losses import load_training, save_training
from tests.losses.test_checkpoint import MORE, BySVI
from tests.losses.test_loss_contract import data
from tests.ranks import processes


def train(path, num_steps, says):
    """Starts, or goes on, to the end; says when it begins, and what the end is."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    training = BySVI(MORE["pcd"])
    kept = load_training(path, *training.parts, kwargs={"x": data()}, missing_ok=True)
    says.send("begun")
    for step in range(kept.get("step", 0), num_steps):
        value = training.step()
        save_training(path, *training.parts, step=step + 1)
    says.send((value, sum(float(v.detach().double().sum()) for v in training.numbers().values())))


def process_of(path, num_steps):
    """A process that has begun to train, and what it will say."""
    hears, says = processes.Pipe(duplex=False)
    process = processes.Process(target=train, args=(path, num_steps, says))
    process.start()
    says.close()
    assert hears.recv() == "begun"
    return process, hears


def uninterrupted(path, num_steps):
    """Where a training ends, and after how many seconds."""
    process, hears = process_of(path, num_steps)
    start = time.perf_counter()
    end = hears.recv()
    process.join()
    return end, time.perf_counter() - start


def killed(path, kills, num_steps, seconds, seed):
    """Where a training ends that is killed up to ``kills`` times, and how often it was."""
    rng, done = random.Random(seed), 0
    while True:
        process, hears = process_of(path, num_steps)
        if done < kills:
            time.sleep(rng.uniform(0.0, 0.8 * seconds / kills))
            process.kill()
        process.join()
        if process.exitcode == 0:
            return hears.recv(), done
        assert process.exitcode == -signal.SIGKILL
        done += 1


def test_killed_it_ends_where_it_would_have(tmp_path):
    want, seconds = uninterrupted(tmp_path / "once", 30)
    end, kills = killed(tmp_path / "t.ckpt", 2, 30, seconds, seed=0)
    assert kills == 2
    assert end == want


@pytest.mark.slow
def test_killed_many_times_it_ends_where_it_would_have(tmp_path):
    want, seconds = uninterrupted(tmp_path / "once", 600)
    end, kills = killed(tmp_path / "t.ckpt", 30, 600, seconds, seed=1)
    assert kills >= 10
    assert end == want
