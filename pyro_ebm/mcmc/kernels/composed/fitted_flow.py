r"""A normalizing flow that is fitted, window by window, to where the chains of a run have been.

Positions are standardised, coordinate by coordinate: the flow is a density of
:math:`y = (z - m) / s`, with the means :math:`m` and deviations :math:`s` of a window
(:func:`standardisation`).

The windows end at fractions :math:`(2/3)^k` of the warmup, and each is the later half of what went
before: the first ones hold the chains' way in, the last one half of the warmup. Where chains are
shared out over ranks, each fit is to the positions of all of them.
"""

import copy
import math
from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, TransformedDistribution
from torch.distributions.transforms import ReshapeTransform

from pyro_ebm.distributions.flow import FlowDistribution, fit_flow
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.ranks import current
from pyro_ebm.mcmc.state import to_device
from pyro_ebm.models.sites.site import Site

MAX_POSITIONS = 100_000
MAX_NUMBERS = 2**24
"""Of a window so many positions, and so many coordinates of them, are kept at most."""
BATCH_SIZE = 256
SPLINES_REACH = 4.5
""":func:`~pyro_ebm.distributions.flow.coupling_flow` reaches a little further, to 5."""
FIRST = 0.15  # of the warmup: no window ends before


def window_ends(warmup_steps: int) -> list[int]:
    """After how many transitions the flow is fitted.

    Example:
        >>> window_ends(1000)
        [198, 296, 444, 667, 1000]
        >>> window_ends(2)
        [1, 2]
    """
    ends, share = set[int](), 1.0
    while share > FIRST and warmup_steps:
        ends.add(max(1, round(share * warmup_steps)))
        share *= 2 / 3
    return sorted(ends)


def standardisation(z: Tensor) -> tuple[Tensor, Tensor]:
    """The means and the deviations of positions ``(n, dim)``, each of shape ``(dim,)``.

    Of a long tail the deviation is larger, up to four times, so that all points lie where splines
    reach: where the flow has far less mass than the target, a chain would stand for long.

    Example:
        >>> standardisation(torch.tensor([[-1.0], [1.0]]))
        (tensor([0.]), tensor([1.]))
        >>> z = torch.cat([torch.zeros(99, 1), torch.ones(1, 1)])  # 10 deviations away
        >>> standardisation(z)[1] / z.std(0, correction=0)
        tensor([2.2111])
    """
    mean, deviation = z.mean(0), z.std(0, correction=0)
    reach = (z - mean).abs().amax(0) / SPLINES_REACH
    scale = torch.maximum(deviation, reach.minimum(4 * deviation))
    return mean, torch.where(scale > 0, scale, 1.0)


class FittedFlow:
    """A flow of the positions of all chains.

    Args:
        flow: a module that returns a distribution of event shape ``(dim,)`` when called; it is
            copied.
        like: a tensor of the dtype and device of positions.
        dim: dimension of a position.
        warmup_steps: length of the warmup.
        num_fit_steps: steps of Adam, of all fits together; at 0 it stays as it is.
        lr: the first learning rate of a fit, which falls to 0.

    Attributes:
        net: the copy.
        losses: the mean negative log-likelihood at the end of each fit, in nats.
    """

    def __init__(
        self,
        flow: Callable[[], Distribution],
        like: Tensor,
        dim: int,
        warmup_steps: int,
        num_fit_steps: int,
        lr: float,
    ):
        assert isinstance(flow, nn.Module)
        self.net = copy.deepcopy(flow).to(like).requires_grad_(False)
        self.mean, self.scale = like.new_zeros(dim), like.new_ones(dim)
        self.warmup_steps, self.num_fit_steps, self.lr = warmup_steps, num_fit_steps, lr
        self.losses: list[float] = []
        self.ranks = current()
        self._ends, self._t = window_ends(warmup_steps) if num_fit_steps else [], 0
        self._kept: list[Tensor] = []
        self._times: list[int] = []

    @property
    def ready(self) -> bool:
        """Whether it was fitted at least once, or never will be."""
        return bool(self.losses) or not self._ends

    # -- the proposal ----------------------------------------------------------------------------

    @torch.no_grad()
    @pyro.validation_enabled(False)
    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num, dim)``, and their log densities up to a constant, ``(num,)``."""
        y, log_q = FlowDistribution(self.net()).rsample_and_log_prob((num,))
        return self.mean + self.scale * y, log_q

    @torch.no_grad()
    @pyro.validation_enabled(False)
    def log_prob(self, z: Tensor) -> Tensor:
        """The log densities of positions ``(num, dim)``, up to the same constant, ``(num,)``."""
        return self.net().log_prob((z - self.mean) / self.scale)

    def at_site(self, site: Site) -> TransformedDistribution:
        """The flow, as it is now, as a distribution of the values of a model's one site."""
        standard = AffineTransform(self.mean, self.scale, event_dim=1)
        shaped = ReshapeTransform(torch.Size([site.shape.numel()]), site.shape)
        transforms = [standard, shaped, site.transform.inv]
        return TransformedDistribution(copy.deepcopy(self.net)(), transforms, validate_args=False)

    # -- the fit ---------------------------------------------------------------------------------

    def learn(self, z: Tensor) -> bool:
        """Takes the positions ``(chains, dim)`` of one more transition of the warmup.

        Returns:
            Whether they were the last of a window, and the flow is another one.
        """
        if not self._ends:
            return False
        self._t += 1
        if self._t % self._stride(z) == 0 or self._t == self._ends[0]:
            self._kept.append(z)
            self._times.append(self._t)
        if self._t < self._ends[0]:
            return False
        end = self._ends.pop(0)
        window = [z for z, t in zip(self._kept, self._times, strict=True) if 2 * t > end]
        self._fit(self.ranks.rows(torch.cat(window)), end)
        later = [i for i, t in enumerate(self._times) if self._ends and 2 * t > self._ends[0]]
        self._kept = [self._kept[i] for i in later]
        self._times = [self._times[i] for i in later]
        return True

    def _stride(self, z: Tensor) -> int:
        """Every so many transitions positions are kept."""
        chains = max(self.ranks.num_chains, len(z)) if self.ranks.size > 1 else len(z)
        most = max(1, min(MAX_POSITIONS, MAX_NUMBERS // z.shape[1]) // chains)
        return -(-self.warmup_steps // (2 * most)) or 1

    def _fit(self, z: Tensor, end: int) -> None:
        share = end / sum(window_ends(self.warmup_steps))
        num_steps = max(1, round(share * self.num_fit_steps))
        # every rank makes the same fit; to the last bit it is that of the first
        seed = int(self.ranks.from_first(torch.randint(2**31, ())))
        z = z.detach().clone()
        self.mean, self.scale = standardisation(z)
        before = copy.deepcopy(self.net.state_dict())
        devices = [] if z.device.type == "cpu" else [z.device]
        unvalidated = pyro.validation_enabled(False)
        with torch.random.fork_rng(devices), torch.enable_grad(), unvalidated:
            torch.manual_seed(seed)
            self.net.requires_grad_(True)
            losses = fit_flow(
                self.net,
                (z - self.mean) / self.scale,
                num_steps,
                BATCH_SIZE,
                self.lr,
                disable_progbar=True,
                anneal=True,
            )
            self.net.requires_grad_(False)
        if not (math.isfinite(losses[-1]) and self.log_prob(z[:BATCH_SIZE]).isfinite().all()):
            self.net.load_state_dict(before)  # it ran off: a shorter lr may do
        for parameter in self.net.parameters():
            parameter.copy_(self.ranks.from_first(parameter.detach()))
        last = losses[-max(1, num_steps // 10) :]
        self.losses.append(sum(last) / len(last))

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> Saved:
        """What was learned so far, for :meth:`load_state_dict`."""
        return {
            "net": {name: value.clone() for name, value in self.net.state_dict().items()},
            "mean": self.mean,
            "scale": self.scale,
            "losses": list(self.losses),
            "t": self._t,
            "ends": list(self._ends),
            "kept": list(self._kept),
            "times": list(self._times),
        }

    def load_state_dict(self, state: Saved) -> None:
        """Goes on from where another one with the same arguments was."""
        device = self.mean.device
        self.net.load_state_dict(state["net"])
        self.mean, self.scale = (to_device(state[name], device) for name in ("mean", "scale"))
        self.losses, self._t, self._ends = list(state["losses"]), state["t"], list(state["ends"])
        self._kept = [to_device(z, device) for z in state["kept"]]
        self._times = list(state["times"])
