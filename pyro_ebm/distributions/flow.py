"""Normalizing flows of zuko as Pyro distributions.

A flow is noise that can be trained, drawn from and scored: the noise of flow-contrastive
estimation, a ``base`` for an energy, a proposal for ``MHKernel``. This is the only module that
imports zuko, when a flow is made.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_ebm.ops.arguments import check_count, check_number, check_tensor, shown


class FlowDistribution(TorchDistribution):
    r"""A zuko flow, conditioned or not, as a proper Pyro distribution.

    .. math:: \log q(x) = \log N(f(x); 0, I)
              + \log \left| \det \frac{\partial f}{\partial x} \right|

    Args:
        flow: what a zuko flow returns when called, ``flow()`` or ``flow(context)``: a distribution
            with batch shape that of the context and event shape ``(features,)``.
        support: where the flow lives; the reals by default.
        validate_args: whether ``log_prob`` refuses points outside the support.

    Example:
        >>> net = neural_spline_flow(features=2)
        >>> q = FlowDistribution(net())
        >>> q.rsample((5,)).shape, q.expand((3,)).sample().shape
        (torch.Size([5, 2]), torch.Size([3, 2]))
        >>> x, log_q = q.rsample_and_log_prob((5,))  # in one pass
        >>> torch.allclose(q.log_prob(x), log_q, atol=1e-4)
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(
        self,
        flow: Distribution,
        support: constraints.Constraint = constraints.real_vector,
        validate_args: bool | None = None,
    ):
        if not isinstance(flow, Distribution):
            raise ValueError(
                f"flow must be a distribution, what a zuko flow returns when called: got"
                f" {type(flow).__name__}; write FlowDistribution(flow())"
            )
        self.flow = flow
        self._support = support
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where the flow lives."""
        return self._support

    def rsample_and_log_prob(
        self, sample_shape: torch.Size | tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Reparametrized draws and their log density, in one pass through the flow.

        Args:
            sample_shape: how many.

        Returns:
            Shapes ``(*sample, *batch, *event)`` and ``(*sample, *batch)``.
        """
        both = getattr(self.flow, "rsample_and_log_prob", None)
        if both is not None:
            return both(torch.Size(sample_shape))
        x = self.flow.rsample(torch.Size(sample_shape))
        return x, self.flow.log_prob(x)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Reparametrized draws, shape ``(*sample, *batch, *event)``; the last are kept.

        Scoring the very tensor that was drawn last costs nothing.
        """
        x, log_prob = self.rsample_and_log_prob(sample_shape)
        self._last = (x, log_prob) if torch.is_grad_enabled() else None
        return x

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws without a gradient, shape ``(*sample, *batch, *event)``."""
        with torch.no_grad():
            return self.flow.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density, shape ``(*sample, *batch)``."""
        if self._last is not None and self._last[0] is value:
            return self._last[1]
        if self._validate_args:
            self._validate_sample(value)
        return self.flow.log_prob(value)

    def expand(
        self, batch_shape: torch.Size | tuple[int, ...], _instance: Any = None
    ) -> "FlowDistribution":
        """A copy with a larger batch, elements independent."""
        new: Any = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.flow = self.flow.expand(batch_shape)
        new._support, new._last = self._support, None
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        return (
            f"FlowDistribution({type(self.flow).__name__}, event_shape={tuple(self.event_shape)})"
        )


def neural_spline_flow(
    features: int,
    context: int = 0,
    transforms: int = 3,
    hidden_features: tuple[int, ...] = (64, 64),
) -> nn.Module:
    """A neural spline flow of zuko: called, it returns the distribution to wrap.

    Any other flow of ``zuko.flows`` does as well; importing zuko oneself turns torch's validation
    of distributions off for the whole process, this function leaves it as it is.

    Args:
        features: dimension of a point.
        context: dimension of what the flow is conditioned on.
        transforms: number of transformations.
        hidden_features: widths of the networks inside.

    Returns:
        A lazy distribution, a module; ``net()`` or ``net(context)`` is the distribution.

    Example:
        >>> net = neural_spline_flow(features=2, transforms=2)
        >>> net().event_shape
        torch.Size([2])
    """
    check_count("features", features)
    check_count("context", context, 0)
    check_count("transforms", transforms)
    _check_widths(hidden_features)
    flows = _zuko().flows
    return flows.NSF(features, context, transforms=transforms, hidden_features=hidden_features)


def coupling_flow(
    features: int,
    transforms: int | None = None,
    hidden_features: tuple[int, ...] = (64, 64),
    bins: int = 16,
) -> nn.Module:
    r"""A spline flow that is quick in both directions: marginals first, then couplings.

    .. math:: f = c_T \circ \dots \circ c_1 \circ m

    with :math:`m` a monotone spline of each coordinate by itself, and :math:`c_t` splines of one
    half of the coordinates, given the other half. All are the identity at first. Splines reach from
    -5 to 5, beyond which they are the identity too: standardise what it is fitted to. Drawing and
    scoring are one pass each, where :func:`neural_spline_flow` needs as many as there are
    coordinates for one of the two.

    Args:
        features: dimension of a point; a single one has the spline :math:`m` alone.
        transforms: :math:`T`; by default 2 in two dimensions, and 4 in more.
        hidden_features: widths of the networks inside.
        bins: pieces of each spline.

    Returns:
        A lazy distribution, a module; ``net()`` is the distribution.

    Reference:
        Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows.

    Example:
        >>> net = coupling_flow(features=2)
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(net().log_prob(x), dist.Normal(0.0, 1.0).log_prob(x).sum(-1), atol=1e-4)
        True
    """
    check_count("features", features)
    if transforms is None:
        transforms = 2 if features <= 2 else 4
    check_count("transforms", transforms, 0)
    check_count("bins", bins, 2)
    _check_widths(hidden_features)
    zuko, shapes = _zuko(), [(bins,), (bins,), (bins - 1,)]
    spline: Any = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": shapes}
    marginal = zuko.flows.ElementWiseTransform(features, **spline)
    couplings, index = [], torch.arange(features)
    for t in range(transforms if features > 1 else 0):
        # couplings 2 b and 2 b + 1 part the coordinates by the bit b of their numbers
        bit = t // 2 % (features - 1).bit_length()
        mask = (index >> bit) % 2 == t % 2
        coupling = zuko.flows.GeneralCouplingTransform(
            features, mask=mask, hidden_features=hidden_features, **spline
        )
        couplings.append(coupling)
    last = [p for coupling in couplings for p in list(coupling.hyper.parameters())[-2:]]
    for parameter in (*marginal.parameters(), *last):
        nn.init.zeros_(parameter)
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )
    return zuko.flows.Flow([marginal, *couplings], base)


def _check_widths(hidden_features: object) -> None:
    if not isinstance(hidden_features, Sequence):
        raise ValueError(
            f"hidden_features must be widths, such as (64,), got {shown(hidden_features)}"
        )
    for width in hidden_features:
        check_count("hidden_features", width)


def _zuko() -> Any:
    """zuko, whose import leaves torch's validation as it was."""
    validate = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(validate)
    return zuko


def fit_flow(
    flow: Callable[[], Distribution],
    data: Tensor,
    num_steps: int = 1000,
    batch_size: int = 256,
    lr: float = 1e-3,
    disable_progbar: bool = False,
    anneal: bool = False,
) -> list[float]:
    r"""Fits a flow to data by maximum likelihood: :math:`\max \mathbb E \log q(x)`.

    Flow-contrastive estimation wants a flow that already covers the data.

    Args:
        flow: a module that returns a distribution when called, such as a zuko flow; trained in
            place.
        data: points, shape ``(n, *event)``.
        num_steps: steps of Adam.
        batch_size: points for each step, drawn with replacement.
        lr: learning rate.
        disable_progbar: whether to show no progress.
        anneal: whether the learning rate falls to 0, along half a wave of a cosine.

    Returns:
        The mean negative log-likelihood of each step's batch, in nats.

    Raises:
        ValueError: for data that are not finite, or a flow without parameters.

    Example:
        >>> net = neural_spline_flow(features=1)
        >>> losses = fit_flow(net, 3 + torch.randn(500, 1), num_steps=20, disable_progbar=True)
        >>> len(losses)
        20
    """
    parameters = list(flow.parameters()) if isinstance(flow, nn.Module) else []
    if not parameters:
        raise ValueError("flow must be a module with parameters that returns a distribution")
    check_tensor("data", data)
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    check_number("lr", lr)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if data.dim() < 1 or not len(data):
        raise ValueError(f"data must be points, shape (n, *event), got shape {tuple(data.shape)}")
    if not data.isfinite().all():
        raise ValueError("the data hold NaN or infinite values: drop those rows")
    if data.shape[1:] != (event := flow().event_shape):
        raise ValueError(
            f"data must have shape (n, *{tuple(event)}) for this flow, got {tuple(data.shape)}"
        )
    optimizer, losses = torch.optim.Adam(parameters, lr=lr), []
    wave = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    with tqdm(range(num_steps), disable=disable_progbar, desc="fit flow") as bar:
        for _ in bar:
            batch = data[torch.randint(len(data), (min(batch_size, len(data)),))]
            loss = -flow().log_prob(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if anneal:
                wave.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"{losses[-1]:.3f} nats", refresh=False)
    optimizer.zero_grad()  # SVI adds to the gradients that it finds
    return losses
