"""A training of two ranks is saved by each, and goes on exactly, from a step that both have."""

import re

import pyro
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm.files import CheckpointError
from pyro_ebm.losses import ContrastiveDivergence, FlowNCE, load_training, save_training
from pyro_ebm.ops.distributed import rank, rank_path, rank_seed
from tests.losses.test_distributed import MORE, Shard, points
from tests.ranks import Ranks

LOSSES = {
    "pcd": lambda: ContrastiveDivergence(persistent=True, num_chains=7, restart_prob=0.1),
    "flow-nce": FlowNCE,
    "dsm": MORE["dsm"],
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


class Training:
    """As a new process starts it."""

    def __init__(self, name):
        pyro.clear_param_store()
        self.loss = LOSSES[name]()
        world = Shard(self.loss, spectral=True)
        self.x = points()[6 * rank() : 6 * rank() + 6]
        self.module = self.loss(world.model, world.guide).initialize(self.x)
        self.ddp = DistributedDataParallel(self.module, find_unused_parameters=True)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.01)
        self.parts = (self.ddp, self.optimizer)
        pyro.set_rng_seed(rank_seed(0))

    def step(self):
        self.optimizer.zero_grad()
        loss = self.ddp(self.x)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_loaded_it_goes_on_exactly(ranks, name, tmp_path):
    path = tmp_path / "t.ckpt"
    before = ranks(begin, name, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.rank0of2.ckpt", "t.rank1of2.ckpt"]
    after = ranks(go_on, name, path)
    assert after == before
    assert before[0][0] != before[1][0]  # each has a shard, and noise, of its own
    assert before[0][1] == before[1][1]  # and one model
    if name == "pcd":
        assert before[0][2] != before[1][2]


def begin(name, path):
    training = Training(name)
    for _ in range(4):
        training.step()
    save_training(path, *training.parts, step=4)
    return five_more(training)


def go_on(name, path):
    training = Training(name)
    pyro.set_rng_seed(99)
    assert load_training(path, *training.parts) == {"step": 4}
    return five_more(training)


def five_more(training):
    losses = [training.step() for _ in range(5)]
    weights = [float(v.sum()) for v in training.module.state_dict().values()]
    return losses, weights, str(training.loss.state_dict())


def save_at(path, steps, step_of_rank):
    """Each rank saves at some of the steps, as if it was stopped after."""
    training = Training("pcd")
    for step in range(1, steps + 1):
        training.step()
        if step in step_of_rank[rank()]:
            save_training(path, *training.parts, step=step)


def load_here(path, missing_ok=False):
    """The progress, or what the error says."""
    training = Training("pcd")
    try:
        return load_training(path, *training.parts, missing_ok=missing_ok)
    except (CheckpointError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("behind", [0, 1])
def test_a_rank_that_was_stopped_before_its_save(ranks, behind, tmp_path):
    path = tmp_path / "t.ckpt"
    saved = [[2, 4], [2, 4]]
    saved[behind] = [2]
    ranks(save_at, path, 4, saved)
    assert ranks(load_here, path) == [{"step": 2}, {"step": 2}]


def test_no_step_that_both_have(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    ranks(save_at, path, 4, [[2, 3, 4], [1]])
    for told in ranks(load_here, path):
        assert told.startswith("CheckpointError")
        assert "rank 0 has save 3 after 4 steps, rank 1 has save 1 after 1 steps" in told
        assert "of one save, or remove them all" in told


def go_on_and_save(path, step_of_rank):
    """Loads, as a new process would, and saves once more where the rank is not stopped before."""
    training = Training("pcd")
    first = load_training(path, *training.parts)["step"]
    for step in (first + 1, first + 2):
        training.step()
        if step in step_of_rank[rank()]:
            save_training(path, *training.parts, step=step)
    return first


def test_stopped_twice_between_two_saves(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    ranks(save_at, path, 4, [[2, 4], [2]])
    for _ in range(3):
        assert ranks(go_on_and_save, path, [[4], []]) == [2, 2]
    assert ranks(go_on_and_save, path, [[4], [4]]) == [2, 2]
    assert ranks(load_here, path) == [{"step": 4}, {"step": 4}]


def save_without_a_loss(path, times, count_from=()):
    """A network and an optimiser alone, which count no steps."""
    net = torch.nn.Linear(1, 1)
    if count_from:
        load_training(path, net)
    for step in times[rank()]:
        save_training(path, net, step=step)


def load_without_a_loss(path):
    return load_training(path, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("again", [False, True])
def test_without_a_loss_saves_are_numbered_all_the_same(ranks, again, tmp_path):
    path = tmp_path / "t.ckpt"
    if again:
        ranks(save_without_a_loss, path, [[1], [1]])
    ranks(save_without_a_loss, path, [[2, 4], [2]], again)
    assert ranks(load_without_a_loss, path) == [{"step": 2}, {"step": 2}]


def test_a_rank_without_a_file(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    ranks(save_at, path, 2, [[1, 2], []])
    for told in (*ranks(load_here, path), *ranks(load_here, path, True)):
        assert "rank 0 has save 2 after 2 steps, rank 1 has none" in told


def test_stopped_within_the_first_save(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    ranks(save_at, path, 1, [[1], []])
    for told in ranks(load_here, path):
        assert "rank 0 has save 1 after 1 steps, rank 1 has none" in told
    assert ranks(load_here, path, True) == [{}, {}]
    ranks(save_at, path, 1, [[1], [1]])  # and it begins anew
    assert ranks(load_here, path) == [{"step": 1}, {"step": 1}]


def test_a_file_that_cannot_be_opened_stops_both(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    ranks(save_at, path, 1, [[1], []])
    (tmp_path / "t.rank1of2.ckpt").mkdir()
    first, second = ranks(load_or_error, path)
    assert "the files of ranks [1] cannot be read" in first
    assert "IsADirectoryError" in second


def load_or_error(path):
    try:
        return str(load_here(path, True))
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def test_no_file_at_all(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    assert ranks(load_here, path, True) == [{}, {}]
    assert all(told.startswith("FileNotFoundError") for told in ranks(load_here, path))


def test_a_broken_file_of_one_rank_stops_both(ranks, tmp_path):
    path = tmp_path / "t.ckpt"
    ranks(save_at, path, 1, [[1], [1]])
    broken = tmp_path / "t.rank1of2.ckpt"
    broken.write_bytes(broken.read_bytes()[:-9])
    first, second = ranks(load_here, path, True)
    assert "the files of ranks [1] cannot be read" in first
    assert "t.rank1of2.ckpt is cut short" in second


@pytest.mark.parametrize("stem", ["t", "run[1]"])
def test_another_number_of_ranks(ranks, stem, tmp_path):
    path = tmp_path / f"{stem}.ckpt"
    ranks(save_at, path, 1, [[1], [1]])
    assert rank_path(path) == path
    match = re.escape(f"no {stem}.ckpt, but there is {stem}.rank0of2.ckpt")
    for missing_ok in (False, True):
        with pytest.raises(CheckpointError, match=match):
            load_training(path, missing_ok=missing_ok)
    other = tmp_path / "u.ckpt"
    save_training(other)
    for told in ranks(load_here, other, True):
        assert "of2.ckpt, but there is u.ckpt" in told
