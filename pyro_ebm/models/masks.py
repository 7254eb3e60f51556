r"""Masked elements: missing data that are NaN, and latents that nothing depends on.

A masked log density is 0, but its gradient is :math:`0 \cdot \mathrm{NaN}` where it was NaN. So
values that are NaN and masked give way to points of the support: neither density nor gradient
depends on which.

A latent's element that is masked has no density of its own. Often another site gives it one, and a
flat prior is what was meant. But in padded sequences, and where ``obs_mask=`` says that an element
is observed, nothing does: on an unbounded support its density is improper, its chains drift away,
and their variance spoils the mass matrix of the others. Such an element is sampled from the
standard normal on the unconstrained space, whose draws nobody needs.
"""

from collections.abc import Callable, Mapping

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.core.introspection import elementwise
from pyro_ebm.distributions.core.supports import plain_support, stated_support
from pyro_ebm.distributions.core.wrappers import unmasked
from pyro_ebm.models.provenance import HostReads
from pyro_ebm.models.runs import latents_of
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.models.sites.site import to_support

NUM_LOOKS = 4
MAX_TRIES = 20

PotentialFn = Callable[[dict[str, Tensor]], Tensor]


class FillMasked(Messenger):
    """Puts points of the support where observed values are NaN and masked.

    The first run of the model finds the sites; later ones fill these without reading their values.

    Example:
        >>> y = torch.tensor([1.0, torch.nan])
        >>> def model():
        ...     with pyro.plate("data", 2), poutine.mask(mask=~y.isnan()):
        ...         return pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> from pyro import poutine
        >>> FillMasked()(model)()
        tensor([1., 0.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.looks = True

    def _pyro_sample(self, msg: SampleSite) -> None:
        x = msg["value"]
        if not (msg["is_observed"] and isinstance(x, Tensor) and x.is_floating_point()):
            return
        if self.looks and detach_provenance(x).isnan().any():
            self.names.add(msg["name"])
        if msg["name"] in self.names:
            fn, mask, _ = unmasked(msg["fn"], msg["mask"])
            if mask is not None and (point := _a_point(fn, x)) is not None:
                batch = point.shape[: point.dim() - fn.event_dim]
                missing = x.expand(point.shape).isnan()
                missing = missing.reshape(batch + (-1,)).any(-1) & ~mask
                rows = missing.reshape(batch + (1,) * fn.event_dim)
                msg["value"] = torch.where(rows, point, x)


def _a_point(fn: TorchDistribution, x: Tensor) -> Tensor | None:
    """A point of a support for each element, the shape of the values and the distribution."""
    shape = torch.broadcast_shapes(x.shape, fn.shape())
    support = plain_support(stated_support(fn))
    if support.is_discrete:
        support = elementwise(support)
        low = torch.as_tensor(getattr(support, "lower_bound", 0)).to(x)
        return low.expand(shape) if support.event_dim == 0 else None
    try:
        bijection = biject_to(support)
    except NotImplementedError:
        return None
    point = bijection(x.new_zeros(bijection.inverse_shape(shape)))
    return point.to(x)


def masked_elements(run: Callable[[], poutine.Trace]) -> dict[str, Tensor]:
    """The masked elements of latents on unbounded supports, masked whatever the latents are.

    Args:
        run: makes a trace of the model whose tensors carry the latents that they come from.

    Returns:
        For the sites with such elements, boolean tensors of their batch shape.
    """
    found = {}
    with HostReads() as reads:
        trace = run()
    for name, node in latents_of(trace).items():
        fn, mask, _ = unmasked(node["fn"], node["mask"])
        if mask is None or get_provenance(mask) or _is_finite(plain_support(fn.support)):
            continue
        masked = ~detach_provenance(mask).bool()
        if masked.any():
            found[name] = masked.expand(fn.batch_shape)
    return {} if reads.latents else found  # a mask may have been made of what was read


def _is_finite(support: constraints.Constraint) -> bool:
    """Whether a flat density on the support is a density, so that nothing drifts away."""
    support = elementwise(support)
    if support.is_discrete:
        return True
    ends = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    compact = (constraints.simplex, constraints.corr_cholesky)
    return all(e is not None and torch.as_tensor(e).isfinite().all() for e in ends) or any(
        isinstance(support, type(each)) for each in compact
    )


def with_normal(
    potential_fn: PotentialFn, idle: Mapping[str, Tensor], params: dict[str, Tensor]
) -> Tensor:
    """A potential that does not see the idle elements of its sites, which are standard normal."""
    held = {name: torch.where(where, 0.0, params[name]) for name, where in idle.items()}
    squares = [torch.where(idle[name], params[name], 0.0).square().sum() for name in idle]
    return potential_fn({**params, **held}) + torch.stack(squares).sum() / 2


def idle_elements(
    potential_fn: PotentialFn,
    draw: Callable[[], dict[str, Tensor]],
    transforms: Mapping[str, Transform],
    masked: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The masked elements that move nothing but the Jacobian, by values and gradients.

    Args:
        potential_fn: of unconstrained values, with the Jacobians of the transforms.
        draw: random unconstrained values.
        transforms: from the supports to the reals.
        masked: what :func:`masked_elements` found.

    Returns:
        Boolean tensors of the shapes of unconstrained values, for the sites with such elements.
    """

    def without_jacobian(params: dict[str, Tensor]) -> Tensor:
        total = potential_fn(params).reshape(())
        for name in masked:
            x = to_support(transforms[name], params[name])
            total = total - transforms[name].log_abs_det_jacobian(x, params[name]).sum()
        return total

    idle: dict[str, Tensor] = {}
    looks = 0
    for params in (draw() for _ in range(MAX_TRIES)):
        leaves = {name: params[name].clone().requires_grad_() for name in masked}
        try:
            with torch.enable_grad():
                value = without_jacobian({**params, **leaves})
        except torch.linalg.LinAlgError:
            continue
        if not value.isfinite():
            continue
        for name, leaf in leaves.items():
            grad = None
            if value.requires_grad:
                (grad,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
            rows = masked[name].reshape(
                masked[name].shape + (1,) * (leaf.dim() - masked[name].dim())
            )
            flat = torch.ones_like(rows) if grad is None else grad.abs() <= 1e-5
            idle[name] = idle.get(name, rows.expand(leaf.shape)) & flat
        moved = {
            k: torch.where(i, 3 * torch.randn_like(params[k]), params[k]) for k, i in idle.items()
        }
        with torch.no_grad():
            change = without_jacobian({**params, **moved}) - value.detach()
        if not change.abs() <= 1e-4 * (1 + value.detach().abs()):
            return {}  # by a branch or the like, which has no gradient
        looks += 1
        if looks == NUM_LOOKS:
            return {name: where for name, where in idle.items() if where.any()}
    return {}
