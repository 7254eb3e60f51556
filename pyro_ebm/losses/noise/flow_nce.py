r"""Flow-contrastive estimation: the noise is a flow, trained against the energy.

The objective is that of noise-contrastive estimation,

.. math:: V(\theta, \phi) = \mathbb E_{data} \log \sigma(G(x))
          + \sum_j \mathbb E_{q_\phi} \log \sigma(-G(\tilde x_j)), \qquad
          G = \log p_\theta - \log q_\phi - \log \nu ,

which the energy maximises and the flow minimises: noise that is hard to tell from the data is the
noise to learn from. The flow's gradient is reparametrized and passes through a *gradient
reversal*, the identity forwards and -1 backwards, on the draws and on both log densities; so one
backward pass serves both players, in ``SVI`` and in ``loss(model, guide)`` alike.

Reference:
    Gao, Nijkamp, Kingma, Xu, Dai and Wu (2020), Flow contrastive estimation of energy-based
    models. Ganin and Lempitsky (2015), Unsupervised domain adaptation by backpropagation (gradient
    reversal).
"""

import math
from collections.abc import Mapping
from typing import Unpack

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributions import Distribution

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import Saved
from pyro_ebm.losses.base import LossSettings
from pyro_ebm.losses.noise.nce import NCE
from pyro_ebm.losses.noise.noise import Noise, refuse_shared
from pyro_ebm.losses.sites import EnergySite
from pyro_ebm.ops.arguments import check_number, shown
from pyro_ebm.ops.leaves import leaves
from pyro_ebm.ops.score import value_and_grad


class FlowNCE(NCE):
    r"""Noise-contrastive estimation with a noise that learns.

    The guide samples, at the name of the energy site, a distribution with reparametrized draws and
    parameters of its own: a :class:`~pyro_ebm.distributions.flow.FlowDistribution`. Fit it to the
    data first (:func:`~pyro_ebm.distributions.flow.fit_flow`). Afterwards both are usable: the
    normalized flow, and the energy with its learned log Z.

    Players take turns. With ``alternate="accuracy"`` the energy trains while the smoothed accuracy
    of the classifier is below ``threshold``, the flow while it is above; with an integer k each
    trains for k steps; with ``None`` both train at every step.

    Args:
        noise_ratio: :math:`\nu`, noise points for each datum.
        alternate: ``"accuracy"``, a number of steps, or None.
        threshold: accuracy at which the turn changes.
        smoothing: weight of the past in the running accuracy.
        broad_noise: a normalized distribution on one event, mixed into the noise so that it covers
            what the flow forgets.
        broad_weight: its weight in the mixture.
        **kwargs: those of :class:`~pyro_ebm.losses.NCE`: ``self_normalized``,
            ``init_log_normalizer``, ``num_particles``, ...

    Raises:
        ValueError: for a guide without noise, noise without reparametrized draws, a parameter that
            both players share, or numbers out of range.

    Example:
        >>> from pyro_ebm.distributions.flow import FlowDistribution, neural_spline_flow
        >>> flow = neural_spline_flow(features=2, transforms=1)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
        >>> def model(x):
        ...     pyro.module("energy", net)
        ...     log_z = pyro.param("log_z", torch.tensor(0.0))
        ...     p = UnnormalizedEnergy(lambda x: net(x).squeeze(-1), (2,), log_normalizer=log_z)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", p, obs=x)
        >>> def guide(x):
        ...     pyro.module("flow", flow)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", FlowDistribution(flow()))
        >>> from pyro.infer import SVI
        >>> loss = FlowNCE()
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        >>> _ = svi.step(torch.randn(64, 2))
        >>> loss.turn in ("energy", "flow")
        True
    """

    def __init__(
        self,
        noise_ratio: int = 1,
        alternate: str | int | None = "accuracy",
        threshold: float = 0.6,
        smoothing: float = 0.9,
        broad_noise: TorchDistribution | None = None,
        broad_weight: float = 0.1,
        **kwargs: Unpack[LossSettings],
    ):
        super().__init__(noise_ratio, **kwargs)
        every = isinstance(alternate, int) and not isinstance(alternate, bool) and alternate >= 1
        if not (alternate in ("accuracy", None) or every):
            raise ValueError(
                f"alternate must be 'accuracy', None or a number of steps, got {shown(alternate)}"
            )
        check_number("smoothing", smoothing)
        if broad_noise is not None and not isinstance(broad_noise, Distribution):
            raise ValueError(f"broad_noise must be a distribution, got {shown(broad_noise)}")
        for name, value in (("threshold", threshold), ("broad_weight", broad_weight)):
            check_number(name, value)
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        self.alternate, self.threshold, self.smoothing = alternate, threshold, smoothing
        self.broad_noise = broad_noise
        self.broad_weight = broad_weight
        self.accuracy: float | None = None
        self.num_steps = 0

    @property
    def turn(self) -> str:
        """Who trains at the next step: ``"energy"``, ``"flow"`` or ``"both"``."""
        if self.alternate is None:
            return "both"
        if isinstance(self.alternate, int):
            return "energy" if (self.num_steps // self.alternate) % 2 == 0 else "flow"
        below = self.accuracy is None or self.accuracy < self.threshold
        return "energy" if below else "flow"

    def noise_of(self, site: EnergySite, fn: TorchDistribution) -> Noise:
        """Draws, with reversed gradients of the flow; detached where the flow rests."""
        self._contrasted.add(site.name)
        self._rows[site.name] = site.num_rows
        if not fn.has_rsample:
            raise ValueError(
                f"the noise at site {site.name!r}, {type(fn).__name__}, has no reparametrized"
                " draws for FlowNCE to train it by: use a flow, or NCE with fixed noise"
            )
        # no graph where the flow rests, but the one in which shared parameters are looked for
        with torch.set_grad_enabled(self.turn != "energy" or site.name not in self._sites_checked):
            noise = self._drawn(site, fn)
            if self.broad_noise is not None:
                noise = self._mixed(site, fn, self.broad_noise, noise)
        if site.name not in self._sites_checked:
            refuse_shared(site, noise.log_q_data)
        if self.turn == "energy":
            return noise.detach()
        return Noise(*map(reverse, noise))

    def log_densities(self, site: EnergySite, noise: Noise) -> tuple[Tensor, Tensor]:
        """As :meth:`NCE.log_densities`; on the flow's turn, without a gradient for the energy."""
        if self.turn != "flow":
            return super().log_densities(site, noise)
        # The flow's turn: the energy is a fixed function, expanded near the noise by its gradient,
        # so that no gradient reaches its parameters and none of them moves.
        log_p, x = site.energy.log_prob, noise.x
        value, slope = value_and_grad(log_p, x.detach())
        change = slope * (x - x.detach())  # 0, with the right derivative
        with torch.no_grad():
            log_p_data = log_p(site.x)
        return log_p_data, value + change.reshape(value.shape + (-1,)).sum(-1)

    def _drawn(self, site: EnergySite, fn: TorchDistribution) -> Noise:
        """``noise_ratio`` draws and their log densities; the guide's own draw is the first."""
        assert site.guide_value is not None
        # the very tensor that was drawn, whose log density a flow has at hand
        x, log_q, log_q_data = self.scored(site, fn, site.guide_value)
        x, log_q = x[None], log_q[None]
        if self.noise_ratio > 1:
            shape = torch.Size((self.noise_ratio - 1,))
            if both := getattr(fn, "rsample_and_log_prob", None):  # in one pass
                more, log_q_more = both(shape)
            else:
                more = fn.rsample(shape)
                log_q_more = fn.log_prob(more)
            x, log_q = torch.cat([x, more]), torch.cat([log_q, log_q_more])
        return Noise(x, log_q, log_q_data)

    def _mixed(
        self, site: EnergySite, fn: TorchDistribution, broad: TorchDistribution, noise: Noise
    ) -> Noise:
        """Noise from (1 - w) flow + w broad, and its log densities."""
        w = self.broad_weight
        if broad.event_shape != site.energy.event_shape or broad.batch_shape:
            raise ValueError(
                f"broad_noise must be a distribution of one event of shape"
                f" {tuple(site.energy.event_shape)} at site {site.name!r}, got batch_shape="
                f"{tuple(broad.batch_shape)} and event_shape={tuple(broad.event_shape)}"
            )
        broad = broad.expand(site.batch_shape)
        pick = torch.rand(noise.log_q.shape, device=noise.x.device) < w
        rows = pick.reshape(pick.shape + (1,) * site.energy.event_dim)
        x = torch.where(rows, broad.sample((self.noise_ratio,)), noise.x)
        # at the points that were replaced, the flow's log density is another one
        log_q = torch.where(pick, fn.log_prob(x), noise.log_q)

        def mix(log_q: Tensor, log_broad: Tensor) -> Tensor:
            return torch.logaddexp(math.log1p(-w) + log_q, math.log(w) + log_broad)

        at_data = mix(noise.log_q_data, broad.log_prob(site.x))
        return Noise(x, mix(log_q, broad.log_prob(x)), at_data)

    def differentiable_loss(
        self, model: Model, guide: Model, *args: object, **kwargs: object
    ) -> Tensor:
        """The loss as a tensor whose gradient is the method's; after a step the turn goes on."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if not self.evaluating:
            accuracy = self._accuracy_of_this_step()
            if math.isfinite(accuracy):  # not of a batch all masked
                past = accuracy if self.accuracy is None else self.accuracy
                self.accuracy = self.smoothing * past + (1 - self.smoothing) * accuracy
            self.num_steps += 1
        return loss

    def _accuracy_of_this_step(self) -> float:
        """The mean over the sites, of all ranks' rows, so that all switch players together."""
        if not self._contrasted:
            return math.nan
        sites = sorted(self._contrasted)
        rates = torch.stack([self.records[name]["accuracy"] for name in sites])
        rates = self.pooled(rates, torch.stack([self._rows[name] for name in sites]))
        return float(rates[rates.isfinite()].mean())

    def _get_trace(
        self, model: Model, guide: Model, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Trace, Trace]:
        self._contrasted: set[str] = set()
        self._rows: dict[str, Tensor] = {}
        traces = super()._get_trace(model, guide, args, kwargs)
        if self.turn == "flow":  # whatever else the loss trains is of the energy's player
            for trace in traces:
                for name, site in trace.nodes.items():
                    if site["type"] == "sample" and name not in self._contrasted:
                        _detach(site)
        return traces

    def _after_backward(self, params: Mapping[str, Tensor], loss: Tensor) -> None:
        """Gives parameters at rest the gradient None, with which no momentum moves them either."""
        moving = {id(leaf) for leaf in leaves(loss)}
        for parameter in params.values():
            if id(parameter) not in moving:
                parameter.grad = None

    def state_dict(self) -> Saved:
        """The running accuracy and the number of steps, which decide whose turn it is."""
        turns = {"accuracy": self.accuracy, "num_steps": self.num_steps}
        return {**super().state_dict(), **turns}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.accuracy, self.num_steps = state["accuracy"], state["num_steps"]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        return -grads[0]


def reverse(x: Tensor) -> Tensor:
    """The identity, with the gradient reversed.

    Example:
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> reverse(x).backward()
        >>> x.grad
        tensor(-1.)
    """
    return _Reverse.apply(x)


def _detach(site: Message) -> None:
    """Detaches the terms of a site."""
    for name in ("log_prob", "log_prob_sum"):
        site[name] = site[name].detach()
    if "score_parts" in site:
        parts = [p.detach() if isinstance(p, Tensor) else p for p in site["score_parts"]]
        site["score_parts"] = ScoreParts(*parts)
