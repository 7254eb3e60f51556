"""Minibatches without end: one pass over the data, an *epoch*, after another.

Tensors are shuffled anew in each pass, by torch's generator and so by Pyro's seed. A pass of a
shuffle leaves out the last, shorter batch: the rows in it are others each time, so that none is
left out for long, and no step has the noise of a handful of rows. A ``DataLoader`` is taken as it
is.
"""

from collections.abc import Iterator, Sized
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_ebm import files
from pyro_ebm.files import Saved
from pyro_ebm.ops.arguments import check_count, check_tensor

Batch = tuple[object, ...]
Tensors = Tensor | tuple[Tensor, ...] | list[Tensor]

DEFAULT_SIZE = 100


@dataclass
class Rows:
    """The batches of one pass over tensors, each time another one.

    Args:
        tensors: of as many rows; none for one batch of nothing.
        batch_size: rows in a batch.
        shuffle: whether they are shuffled.
        num_rows: how many there are.
    """

    tensors: tuple[Tensor, ...]
    batch_size: int
    shuffle: bool
    num_rows: int

    def __len__(self) -> int:
        n, size = self.num_rows, self.batch_size
        return n // size if self.shuffle else -(-n // size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(self.num_rows) if self.shuffle else torch.arange(self.num_rows)
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            yield tuple(x[rows] for x in self.tensors)


def rows_of(data: Tensors, batch_size: int | None, shuffle: bool) -> Rows:
    """The rows of a tensor, or of a tuple of tensors.

    Raises:
        ValueError: for data that are neither, or a batch size that does not fit them.
    """
    tensors = tuple(data) if isinstance(data, tuple | list) else (data,)
    for x in tensors:
        check_tensor("data", x, "a tensor, a tuple of tensors, or a DataLoader")
    lengths = {len(x) if x.dim() else 0 for x in tensors} or {1}
    num_rows = min(lengths)
    if len(lengths) > 1 or num_rows == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"data must have rows, as many in each tensor, got shapes {shapes}")
    size = min(DEFAULT_SIZE, num_rows)
    if batch_size is not None and (size := check_count("batch_size", batch_size)) > num_rows:
        raise ValueError(f"batch_size must be at most {num_rows}, the rows of data, got {size}")
    return Rows(tensors, size, shuffle, num_rows)


class Batches:
    """The batches of tensors, or of a ``DataLoader``; each is what the model is called with.

    Args:
        data: a tensor, tensors of as many rows, or a ``DataLoader``; an empty tuple for a model
            that takes no arguments, one of which is all of a pass.
        batch_size: rows in a batch of tensors, by default 100 or all that there are.
        shuffle: whether tensors are shuffled in each pass.
        resumable: whether :meth:`state_dict` will be asked for.

    Raises:
        ValueError: for data that are none of these, or a batch size that does not fit them.

    Example:
        >>> batches = Batches(torch.arange(5.0), batch_size=2, shuffle=False)
        >>> len(batches), [next(batches) for _ in range(2)]
        (3, [(tensor([0., 1.]),), (tensor([2., 3.]),)])
    """

    def __init__(
        self,
        data: Tensors | DataLoader,
        batch_size: int | None = None,
        shuffle: bool = True,
        resumable: bool = True,
    ):
        if isinstance(data, DataLoader) and batch_size is not None:
            raise ValueError("batch_size: a DataLoader has its own; leave it out")
        loader = isinstance(data, DataLoader)
        self.rows = data if loader else rows_of(data, batch_size, shuffle)
        self.resumable = resumable
        self.position = 0  # how many batches of this pass are handed out
        self._start: Saved = {}  # where the generators were before this pass
        self._pass: Iterator[object] = iter(())
        self._peeked: Batch | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_rows(self) -> int | None:
        """How many rows a pass has; None where nobody knows."""
        if isinstance(self.rows, Rows):
            return self.rows.num_rows
        sampler = self.rows.sampler  # of an iterable dataset it is endless
        return len(sampler) if isinstance(sampler, Sized) else None

    def peek(self) -> Batch:
        """The batch that comes next."""
        if self._peeked is None:
            batch = next(self._pass, None)
            if batch is None:
                self._begin()
                batch = next(self._pass, None)
            if batch is None:
                raise ValueError("data: the DataLoader gives no batches; is its dataset empty?")
            self._peeked = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return self._peeked

    def __next__(self) -> Batch:
        batch, self._peeked = self.peek(), None
        self.position += 1
        return batch

    def _begin(self) -> None:
        """Begins a pass, from which :meth:`load_state_dict` can begin again."""
        self.position, generator = 0, self._generator
        if self.resumable:
            own = None if generator is None else generator.get_state()
            self._start = {"random": files.random_state(), "own": own}
        self._pass = iter(self.rows)

    @property
    def _generator(self) -> torch.Generator | None:
        """That of a ``DataLoader``."""
        return getattr(self.rows, "generator", None)

    def state_dict(self) -> Saved:
        """Where the generators were when this pass began, and how far it has come."""
        sizes = [self.num_rows, self.rows.batch_size]
        return {"start": self._start, "position": self.position, "sizes": sizes}

    def load_state_dict(self, state: Saved) -> None:
        """Goes to that batch; the global generators are to be set afterwards."""
        rows, size = state["sizes"]
        if (rows, size) != (self.num_rows, self.rows.batch_size):
            raise ValueError(
                f"it had {rows} rows in batches of {size}, now {self.num_rows} in batches of"
                f" {self.rows.batch_size}"
            )
        self._peeked, self._pass = None, iter(())
        if state["start"]:
            files.set_random_state(state["start"]["random"])
            if self._generator is not None:
                self._generator.set_state(state["start"]["own"])
            self._begin()
            for _ in range(state["position"]):
                next(self)


def steps_of(batches: Batches, num_steps: int | None, num_epochs: int | None) -> int:
    """How many steps there are, from either number.

    Raises:
        ValueError: for both, for a number below 1, or a ``DataLoader`` that cannot say its length.
    """
    if num_epochs is None:
        return check_count("num_steps", 2000 if num_steps is None else num_steps)
    if num_steps is not None:
        raise ValueError("give num_steps or num_epochs, not both")
    try:
        return check_count("num_epochs", num_epochs) * len(batches)
    except TypeError as error:
        raise ValueError("num_epochs: the DataLoader has no length; give num_steps") from error
