"""The exponential moving average of weights, as :mod:`~pyro_ebm.losses.fitting.fit` has it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.ops.arguments import check_number


class WeightAverage:
    r"""The average of parameters over the steps of a training. Buffers have no part in it.

    Args:
        parameters: what is averaged; those with a constraint, unconstrained.
        decay: :math:`\beta`, in [0, 1).

    Raises:
        ValueError: for a decay out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> average = WeightAverage([w], decay=0.999)
        >>> with torch.no_grad():
        ...     w += 11.0
        >>> average.update()  # beta_1 = 2 / 11
        >>> with average.in_place():
        ...     round(w.item(), 4)
        9.0
        >>> w.item()
        11.0
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        check_number("average", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"average must lie in [0, 1), got {decay}")
        self.parameters, self.decay, self.num_updates = list(parameters), float(decay), 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a step."""
        self.num_updates += 1
        beta = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, 1 - beta)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the parameters are their averages."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchanges the parameters and their averages."""
        for p, mean in zip(self.parameters, self.averages, strict=True):
            now = p.clone()
            p.copy_(mean)
            mean.copy_(now)

    def state_dict(self) -> Saved:
        """The averages."""
        return {"averages": self.averages, "num_updates": self.num_updates}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        for mine, saved in zip(self.averages, state["averages"], strict=True):
            mine.copy_(saved)
        self.num_updates = state["num_updates"]
