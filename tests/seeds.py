"""Seeds that can be shifted, so that tests see another sample."""

import contextlib
from collections.abc import Iterator

import torch

SHIFT = 2**20  # longer than the runs of small seeds that tests go through

number = 0  # that by which they are shifted now

_manual_seed = torch.manual_seed


@contextlib.contextmanager
def reseeded(by: int) -> Iterator[None]:
    """Shifts what ``torch.manual_seed`` is given, and Pyro's function by it, ``by`` numbers."""
    global number
    number = by
    torch.manual_seed = lambda seed: _manual_seed(int(seed) + SHIFT * by)
    try:
        yield
    finally:
        number, torch.manual_seed = 0, _manual_seed
