"""Nesterov's dual averaging of step sizes, as tensors."""

from typing import Any

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from pyro_ebm.files import Saved
from pyro_ebm.mcmc.state import to_device

_STATE = ("prox_center", "_x_avg", "_g_avg", "_x_t", "_t")  # of Pyro's DualAveraging


class TensorAveraging(DualAveraging):
    r"""Nesterov's dual averaging for each element of a tensor, in few operations.

    Args:
        prox_center: the point where the search starts, and towards which it is shrunk.

    Example:
        >>> averaging = TensorAveraging(torch.zeros(2))
        >>> averaging.step(torch.tensor([0.0, 1.1]))
        >>> averaging.get_state()[0]
        tensor([ 0., -2.])
    """

    prox_center: Tensor

    def __init__(self, prox_center: Tensor):
        super().__init__(prox_center)  # pyright: ignore[reportArgumentType]

    def reset(self) -> None:
        """Starts again from the center."""
        self._t: int = 0
        self._x_t: Any = None
        self._x_avg: Tensor = torch.zeros_like(self.prox_center)
        self._g_avg: Tensor = torch.zeros_like(self.prox_center)

    def get_state(self) -> tuple[Tensor, Tensor]:
        """The latest point, and the average of all."""
        return self._x_t, self._x_avg

    def step(self, g: Tensor) -> None:
        """Takes one more gradient, of the shape of the center."""
        self._t += 1
        t = self._t
        self._g_avg = torch.lerp(self._g_avg, g.to(self._g_avg.dtype), 1 / (t + self.t0))
        self._x_t = torch.sub(self.prox_center, self._g_avg, alpha=t**0.5 / self.gamma)
        weight = t**-self.kappa  # lerp of an infinity, as the logarithm of 0, is NaN
        self._x_avg = torch.add(self._x_avg * (1 - weight), self._x_t, alpha=weight)

    def state_dict(self) -> Saved:
        """The averages so far, for :meth:`load_state_dict`."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Saved, device: torch.device) -> None:
        """Goes on from the averages of another one."""
        for name in _STATE:
            setattr(self, name, to_device(state[name], device))
